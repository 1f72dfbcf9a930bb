"""Files of a Hugging Face checkpoint: found, checked against config.json, read in slices, written in shards.

Weights have the hub's keys here. They are read from safetensors files only, which can hold nothing but numbers; a
pickle is never opened.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from command.cli import InputError, did_you_mean, note
from command.errors import first_line
from command.files import read_json, write_json, write_text
from hub.config import Family, read_numbers, token_ids

TINY = Path(__file__).parent.parent / "tiny"
REVISION_HELP = "branch, tag or commit of a hub id (or --model ID@REVISION)"
EMBEDDED = {"tiny": TINY, "tiny-mixtral": TINY / "mixtral"}  # models that come with the repository: `--model NAME`
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BESIDE = (  # what a checkpoint holds besides config.json, weights and code
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.tiktoken", "chat_template*", "additional_chat_templates/*", "*processor_config.json", "LICENSE*"),
)
CHECKPOINT = ("config.json", "model*.safetensors", "*.safetensors.index.json", "*.py", *BESIDE)  # its files on the hub
IN_MEMORY = ("experts.gate_up_proj", "experts.down_proj")  # stacks of transformers 5, which can be saved as they are
SHARD_BYTES = 5 * 10**9  # of one file, as transformers writes them
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def resolve(path: str | Path, wanted: tuple[str, ...] = CHECKPOINT) -> Path:
    """The folder of a checkpoint: an embedded model, a local folder, or a hub id, of which files `wanted` are cached.

    ID@REVISION is a branch, tag or commit of a hub id. Raises InputError if there is no such checkpoint.
    """
    if str(path) in EMBEDDED:
        return EMBEDDED[str(path)]
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        check_kind(Path(path))
        return Path(path)
    name, revision = name_and_revision(str(path))
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(wanted)))
    except Exception as error:  # of the library, its HTTP client or the disk; a partial file is never used
        embedded = " or ".join(map(repr, EMBEDDED))
        parent = os.path.dirname(path)
        beside = [str(each) for each in Path(parent).iterdir()] if os.path.isdir(parent or ".") else ()
        unknown = f"the hub has no such model or cannot be reached ({first_line(error)})"
        hub = "not a hub id (NAME/NAME)" if isinstance(error, HFValidationError) else unknown
        raise InputError(
            f"no such run or model: {str(path)!r} is not {embedded}, not a folder, and {hub}"
            f"{did_you_mean(str(path), (*EMBEDDED, *beside))}"
        ) from None


def check_kind(folder: Path) -> None:
    """Raise InputError, which says what a folder is instead, if it is not one of a checkpoint."""
    config = read_json(folder / "config.json", dict, missing={}) if folder.is_dir() else {}
    if (folder / "adapter_config.json").is_file():
        advice = "it is a PEFT adapter; name its base model"
    elif {"settings", "model"} <= config.keys():
        merged = f"merge its adapter first (python export.py {folder} --to merged --out DIR)"
        other = f"name {folder / 'model'}" if (folder / "model").is_dir() else merged
        advice = f"it is a run of train.py; {other}"
    elif (folder / "adapter.json").is_file():
        advice = "it is the adapter of a run of train.py; name the model that it was trained on"
    else:
        advice = "expected the folder of a Hugging Face checkpoint"
    if not config or "model" in config:
        raise InputError(f"model {str(folder)!r} has no config.json of a model; {advice}")


def name_and_revision(model: str) -> tuple[str, str | None]:
    """ID@REVISION in its two parts; a model without a revision has None."""
    name, _, revision = model.partition("@")
    return (model, None) if os.path.exists(model) or not revision else (name, revision)


def with_revision(model: str, revision: str | None) -> str:
    """ID@REVISION for the flags --model and --revision. Raises InputError for a model that has no revisions."""
    if revision and (model in EMBEDDED or os.path.exists(model) or "@" in model):
        raise InputError(f"--revision {revision} applies to a hub id, and the model is {model}; leave it out")
    return f"{model}@{revision}" if revision else model


def hub_commit(folder: Path) -> str | None:
    """The commit of the hub that a checkpoint's folder holds; None for a folder of another origin."""
    return folder.name if folder.parent.name == "snapshots" else None


def read_config_numbers(folder: Path) -> dict:
    """The fields of model.MoEConfig from the config.json of a folder. Raises InputError that names the folder.

    generation_config.json may name more tokens that end a text, under the same key.
    """
    place = f"{folder}/"  # the messages begin with "config.json:"
    hub = read_json(folder / "config.json", dict)
    more = read_json(folder / "generation_config.json", dict, missing={})
    try:
        numbers = read_numbers(hub)
        place += "generation_"
        ends = numbers["eos_token_ids"] + token_ids(more, "eos_token_id", numbers["vocab_size"])
    except InputError as error:
        raise InputError(f"{place}{error}") from None
    return numbers | {"eos_token_ids": tuple(dict.fromkeys(ends))}


@dataclass(frozen=True)
class Stored:
    """A weight of a checkpoint: the tensor of a file that holds it, and where inside it."""

    file: Path
    tensor: str  # its name in the file
    shape: tuple[int, ...]
    dtype: torch.dtype
    expert: int | None = None  # in a stack of experts
    first_row: int = 0  # in a stack of gate and up

    def index(self, dim: int = 0, first: int = 0, end: int | None = None) -> tuple[int | slice, ...]:
        """The index, into the tensor, of the places first to end - 1 of one dimension."""
        slices = [slice(0, size) for size in self.shape]
        slices[dim] = slice(first, self.shape[dim] if end is None else end)
        if self.expert is None:
            return tuple(slices)
        rows = slice(self.first_row + slices[0].start, self.first_row + slices[0].stop)
        return self.expert, rows, *slices[1:]


def stored(folder: Path, wanted: dict[str, tuple[int, ...]], family: Family | None = None) -> dict[str, Stored]:
    """All weights of a checkpoint by key, in the order of the files; no weight is read, except to compare tied ones.

    wanted: the shapes that config.json implies. family: of a model, whose experts may be stacked in the files.
    Raises InputError if a weight is missing, unexpected or of another shape, or if it is quantised.
    """
    held = [pair for file in files(folder) for pair in headers(file)]
    in_memory = any(key.endswith(IN_MEMORY[0]) for key, _ in held)
    weights, unexpected = {}, []
    for key, weight in held:
        parts = {key: weight} if key in wanted or family is None else in_hub_layout(key, weight, family, in_memory)
        for name, part in parts.items():
            file = part.file
            if name not in wanted:
                unexpected.append((name, part))
            elif name in weights:
                raise InputError(f"{file}: {name} is in {weights[name].file.name} too; expected every weight once")
            elif part.shape != tuple(wanted[name]):
                raise InputError(f"{file}: {name} has shape {part.shape}, config.json implies {tuple(wanted[name])}")
            elif not isinstance(part.dtype, torch.dtype):
                known = ", ".join(DTYPES)
                raise InputError(f"{file}: {name} is {part.dtype}, a quantised checkpoint? Expected one of {known}")
            else:
                weights[name] = part
    unexpected = [name for name, part in unexpected if not is_harmless(name, part, weights)]
    missing = [name for name in wanted if name not in weights]
    if missing or unexpected:
        raise InputError(
            f"{folder}: {len(missing)} missing keys {missing[:5]}, "
            f"{len(unexpected)} unexpected keys {unexpected[:5]}; is config.json of this checkpoint?"
        )
    return weights


def headers(file: Path) -> Iterator[tuple[str, Stored]]:
    """The key and the place of every tensor of a safetensors file, in the order of the file."""
    try:
        with safe_open(file, framework="pt") as content:  # checks that the file has all the bytes that it names
            for key in content.offset_keys():
                tensor = content.get_slice(key)
                dtype = DTYPES.get(tensor.get_dtype(), tensor.get_dtype())
                yield key, Stored(file, key, tuple(tensor.get_shape()), dtype)
    except (OSError, SafetensorError) as error:
        with file.open("rb") as content:
            if content.read(8) == b"version ":
                advice = "a Git LFS pointer instead of the weights; fetch them with `git lfs pull`"
                raise InputError(f"{file}: {advice}") from None
        raise InputError(f"{file}: not a whole safetensors file ({error}); download it again") from None


def in_hub_layout(key: str, weight: Stored, family: Family, in_memory: bool) -> dict[str, Stored]:
    """A weight of a file -> the parts of it that `hub.weights.hub_key` names: the matrices of a stack of experts.

    A family may stack its experts in its files. in_memory: these files have the names of transformers 5 in memory, with
    the stacks IN_MEMORY [E, 2F, D] and [E, D, F]. Most blocks are called `mlp` there, and routers have no inner module.
    """
    if in_memory and family.stacks != IN_MEMORY:
        router = family.router.partition(".")[0]
        key = key.replace(".mlp.", f".{family.moe}.")
        key = key.replace(f".{family.moe}.{router}.weight", f".{family.moe}.{family.router}.weight")
    pair = IN_MEMORY if in_memory else family.stacks or ()
    block, _, name = key.partition(f".{family.moe}.")
    if name not in pair or len(weight.shape) != 3 or not isinstance(weight.dtype, torch.dtype):
        return {key: weight}
    leaves = family.projections[2:] if pair.index(name) else family.projections[:2]
    rows, fan_in = weight.shape[1] // len(leaves), weight.shape[2]
    return {
        f"{block}.{family.moe}.experts.{e}.{leaf}.weight": replace(
            weight, shape=(rows, fan_in), expert=e, first_row=i * rows
        )
        for e in range(weight.shape[0])
        for i, leaf in enumerate(leaves)
    }


def is_harmless(key: str, weight: Stored, weights: dict[str, Stored]) -> bool:
    """Whether a tensor that config.json does not imply changes nothing: rotary tables, masks, a copy of a tied head.

    Raises InputError if the embedding is tied and the head differs from it.
    """
    attention = r"(model\.)?layers\.\d+\.self_attn\."
    tables = r"rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)"
    if re.fullmatch(rf"({attention}|model\.)?{tables}|{attention}masked_bias", key):
        return True
    if re.fullmatch(rf"{attention}bias", key) and len(weight.shape) == 4:  # the causal mask [1, 1, S, S]
        return True
    embedding = weights.get("model.embed_tokens.weight")
    if key != "lm_head.weight" or embedding is None:
        return False
    pair = {"head": weight, "embedding": embedding}
    tensors = dict(read_slices(pair, dict.fromkeys(pair, WHOLE)))
    if not torch.equal(tensors["head"], tensors["embedding"]):
        tied = "config.json ties it to them (tie_word_embeddings)"
        raise InputError(f"{weight.file}: {key} differs from the embeddings, but {tied}; set that to false to use it")
    return True


@cache  # once for a command
def note_stale_index(folder: Path) -> None:
    note(f"{folder}: the weights are read from {SINGLE}, as transformers does, and {INDEX} is ignored")


def files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint: model.safetensors, or those that its index names.

    Where there are both, the index is left out, as transformers does.
    """
    index, only = folder / INDEX, folder / SINGLE
    names = [only.name]
    if index.is_file() and only.is_file():
        note_stale_index(folder)
    elif index.is_file():
        try:
            names = sorted(set(read_json(index, dict)["weight_map"].values()))
            elsewhere = [name for name in names if Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError):
            names, elsewhere = [], []
        if not names or any(Path(name).is_absolute() or ".." in Path(name).parts for name in elsewhere):
            raise InputError(f"{index}: not a safetensors index; download it again")
        if elsewhere:
            raise InputError(
                f"{index}: its files lie in a subfolder ({elsewhere[0]}); move them beside config.json, and take the "
                "folder out of their names in the index"
            )
    for name in names:
        if not (folder / name).is_file():
            advice = f"expected {only.name}, or shards with {INDEX}, as transformers saves them; download it again"
            for path in folder.glob("*/*.safetensors"):
                advice = f"there are weights in a subfolder ({path.relative_to(folder)}); name that folder"
            for path in (*folder.glob("*.bin"), *folder.glob("*.pt*")):
                advice = f"{path.name} is a pickle, which is never opened; save it as safetensors with transformers"
            raise InputError(f"{folder}: {name} is missing; {advice}")
    return [folder / name for name in names]


def check_finite(tensor: Tensor, name: str) -> None:
    """Raise InputError, with the tensor's name, if it holds NaN or infinity."""
    # A sum is as fast as a copy. It may overflow, so what it suspects is looked at number by number.
    if tensor.is_floating_point() and not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise InputError(f"{name} holds NaN or infinity; the file is damaged, or the training that made it diverged")


def converted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """The tensor in another dtype. Raises InputError, with its name, for a value beyond its range, NaN or infinity."""
    new = tensor.to(dtype)
    if not new.sum().isfinite() and not new.isfinite().all():
        check_finite(tensor, name)
        short, largest = str(dtype).removeprefix("torch."), tensor.abs().max()
        raise InputError(f"{name} goes up to {largest:.3g}, beyond the range of {short}; choose --dtype float32")
    return new


class Part(NamedTuple):
    """The places first to end - 1 of one dimension of a tensor, and all of the others."""

    dim: int = 0
    first: int = 0
    end: int | None = None  # None: to the last


WHOLE = Part()


def read_slices(
    weights: dict[str, Stored], wanted: dict[str, Part], allow_nan: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """The wanted parts of the wanted weights, one at a time: no process reads what it does not hold.

    Raises InputError for weights that hold NaN or infinity, unless these are allowed.
    """
    for path in dict.fromkeys(weight.file for weight in weights.values()):
        here = [key for key in wanted if weights[key].file == path]
        parts = ((weights[key].tensor, weights[key].index(*wanted[key])) for key in here)
        for key, tensor in zip(here, read_parts(path, parts), strict=True):
            if not allow_nan:
                check_finite(tensor, f"{path}: {key}")
            yield key, tensor


MAPPED = 2**28  # bytes


def read_parts(file: Path, parts: Iterable[tuple[str, tuple[int | slice, ...]]]) -> Iterator[Tensor]:
    """Parts of the tensors of a safetensors file, each given by a name and an index.

    The file is mapped into memory, and what was read of it counts as memory of the process until it is closed. So it is
    opened again after every MAPPED bytes.
    """
    content, mapped = None, 0
    for name, index in parts:
        if content is None or mapped > MAPPED:
            content, mapped = safe_open(file, framework="pt"), 0
        tensor = content.get_slice(name)[index]
        mapped += tensor.nbytes
        yield tensor


def copy_beside(base: Path, out: Path) -> None:
    """Copy what a checkpoint holds besides config.json and weights: tokenizer, chat template, its own code, ..."""
    configs = (read_json(base / name, dict, missing={}) for name in ("config.json", "tokenizer_config.json"))
    has_code = any("auto_map" in config for config in configs)  # which names classes in files beside it
    for path in [path for pattern in (*BESIDE, *(["*.py"] if has_code else [])) for path in base.glob(pattern)]:
        if path.is_file():
            target = out / path.relative_to(base)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)


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
        name = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = dict(next(stream) for _ in keys)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        del tensors
    next(stream, None)  # lets the generator finish
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
