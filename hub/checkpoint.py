"""Files of a Hugging Face checkpoint: found, checked against config.json, read in slices, written in shards.

Weights have the hub's keys here. They are read from safetensors files only, which can hold nothing but numbers; a
pickle is never opened.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from command.cli import InputError
from command.files import write_json, write_text
from hub.config import read_numbers

TINY = Path(__file__).parent.parent / "tiny"  # the embedded model: `--model tiny`
INDEX = "model.safetensors.index.json"
BESIDE = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
CHECKPOINT = ("config.json", "model*.safetensors", "*.safetensors.index.json", *BESIDE)  # its files on the hub
SHARD_BYTES = 5 * 10**9  # of one file, as transformers writes them
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def resolve(path: str | Path, wanted: tuple[str, ...] = CHECKPOINT) -> Path:
    """The folder of a checkpoint: 'tiny', a local folder, or a hub id, whose files `wanted` are downloaded and cached.

    Raises InputError if there is no such checkpoint.
    """
    if str(path) == "tiny":
        return TINY
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        if not (Path(path) / "config.json").is_file():
            raise InputError(f"model {str(path)!r}: it has no config.json; want a Hugging Face checkpoint folder")
        return Path(path)
    try:
        return Path(snapshot_download(str(path), allow_patterns=list(wanted)))
    except Exception as error:  # of the library, its HTTP client or the disk; a partial file is never used
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"model {str(path)!r} is not 'tiny', not a local folder, and the hub did not give it ({reason})"
        ) from None


def read_config_json(folder: Path) -> dict:
    """config.json of a checkpoint folder. Raises InputError if it is not a JSON object."""
    file = folder / "config.json"
    try:
        hub = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: not readable as JSON ({error})") from None
    if not isinstance(hub, dict):
        raise InputError(f"{file}: want a JSON object, not {type(hub).__name__}; is it a config.json of the hub?")
    return hub


def read_config_numbers(folder: Path) -> dict:
    """The fields of model.MoEConfig from the config.json of a folder. Raises InputError that names the folder."""
    hub = read_config_json(folder)
    try:
        return read_numbers(hub)
    except InputError as error:  # which begins with "config.json:"
        raise InputError(f"{folder}/{error}") from None


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint, as its file's header describes it."""

    file: Path
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stored(folder: Path, wanted: dict[str, tuple[int, ...]]) -> dict[str, Stored]:
    """All tensors of a checkpoint by key, in the order of the files; no weight is read.

    wanted: the shapes that config.json implies. Raises InputError if a tensor is missing, unexpected or of another
    shape, or if it is quantised.
    """
    found, unexpected = {}, []
    for file in files(folder):
        try:
            with safe_open(file, framework="pt") as content:
                parts = {key: content.get_slice(key) for key in content.keys()}  # noqa: SIM118 - not a dict
                heads = {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in parts.items()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file}: not a whole safetensors file ({error}); download it again") from None
        for key, (shape, dtype) in heads.items():
            if key not in wanted:
                unexpected.append(key)
                continue
            if key in found:
                raise InputError(f"{file}: {key} is in {found[key].file.name} too; want every weight once")
            if shape != tuple(wanted[key]):
                raise InputError(f"{file}: {key} has shape {shape}, config.json wants {tuple(wanted[key])}")
            if dtype not in DTYPES:
                raise InputError(f"{file}: {key} is {dtype}, a quantised checkpoint? Want one of {', '.join(DTYPES)}")
            found[key] = Stored(file, shape, DTYPES[dtype])
    missing = [key for key in wanted if key not in found]
    if missing or unexpected:
        raise InputError(
            f"{folder}: {len(missing)} missing keys {missing[:5]}, "
            f"{len(unexpected)} unexpected keys {unexpected[:5]}; is config.json of this checkpoint?"
        )
    return found


def files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those that its index names, or the only one."""
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            inside = all(Path(name).name == name for name in names)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            names, inside = [], False
        if not names or not inside:
            raise InputError(f"{index}: not a safetensors index; download it again")
    else:
        names = ["model.safetensors"]
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"{folder}: {name} is missing; the checkpoint is incomplete, download it again")
    return [folder / name for name in names]


def read_rows(weights: dict[str, Stored], rows: dict[str, slice]) -> Iterator[tuple[str, Tensor]]:
    """The wanted rows (of dimension 0) of the wanted weights, one at a time: no process reads what it does not hold.

    A memory-mapped file would count as memory of the process until it is closed, so this is a plain read. `stored` has
    checked the files: 8 bytes with the size of a JSON header, the header with the place of every tensor, the tensors.
    """
    for path in dict.fromkeys(weight.file for weight in weights.values()):
        with path.open("rb", buffering=0) as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(8)
            header = json.loads(file.read(start - 8))
            for key, wanted in rows.items():
                weight = weights[key]
                if weight.file != path:
                    continue
                first, end, _ = wanted.indices(weight.shape[0])
                tensor = torch.empty(max(0, end - first), *weight.shape[1:], dtype=weight.dtype)
                file.seek(start + header[key]["data_offsets"][0] + first * weight.nbytes // weight.shape[0])
                left = memoryview(tensor.view(torch.uint8).numpy()).cast("B") if tensor.numel() else b""
                while left:  # a read may return fewer bytes than asked for
                    got = file.readinto(left)
                    if not got:
                        raise InputError(f"{path}: ends early; download it again")
                    left = left[got:]
                yield key, tensor


def write_checkpoint(
    folder: Path, sizes: dict[str, int], weights: Iterable[tuple[str, Tensor]], hub: dict, shard_bytes: int
) -> None:
    """Write weights as `write_shards` does, and then config.json: without it a folder is not a checkpoint."""
    if (folder / INDEX).exists():  # its shards would stay beside ours
        raise InputError(f"{folder}: holds a sharded checkpoint; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").unlink(missing_ok=True)
    write_shards(folder, sizes, weights, shard_bytes)
    write_text(folder / "config.json", json.dumps(hub, indent=2) + "\n")  # as transformers writes it


def write_shards(folder: Path, sizes: dict[str, int], weights: Iterable[tuple[str, Tensor]], shard_bytes: int) -> None:
    """Write tensors as safetensors files of up to `shard_bytes`, with an index if there are several.

    sizes: bytes of every tensor, in the order of `weights`. The tensors of one file at a time are held in memory.
    """
    shards, filled = [[]], 0  # the keys of every file
    for key, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(key)
        filled += size
    weight_map, stream = {}, iter(weights)
    for i, keys in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(next(stream) for _ in keys)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        del tensors
    next(stream, None)  # lets the generator finish
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
