"""What a name on the command line stands for: a run folder of train.py, a checkpoint, a PEFT adapter, or a hub id."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

import data
import hellora
from command.cli import InputError, note
from command.files import read_json, sha256
from hub import digests
from hub.checkpoint import resolve
from hub.peft import base_of
from model import MoETransformer, read_config
from run import memory
from run.adapters import fill_adapter, place_adapter, read_any_adapter
from run.step import load_shared
from run.validation import BEST


def run_config(source: str) -> dict | None:
    """config.json of a run folder of train.py, or of that which holds the adapter `source`; None if there is none."""
    folder = Path(source)
    try:
        folder = folder.parent if (folder / "adapter.json").is_file() else folder
        config = read_json(folder / "config.json", dict)
    except (OSError, InputError):  # is_file raises OSError for a name that is too long
        return None
    is_run = isinstance(config.get("model"), str) and isinstance(config.get("settings"), dict)
    return config if is_run else None


def locate(source: str) -> tuple[Path, Path | None]:
    """The folders of the checkpoint and of the adapter that `source` stands for. Full fine-tuning has no adapter."""
    run, folder = run_config(source), Path(source)
    if run is None:
        base = base_of(folder)  # of an adapter that PEFT saved
        return (resolve(base), folder) if base else (resolve(source), None)
    if (folder / "model").is_dir():
        return result_of(run, folder, "model"), None
    is_adapter = (folder / "adapter.json").is_file()
    return resolve(run["model"]), folder if is_adapter else result_of(run, folder, "adapter")


def result_of(run: dict, folder: Path, kind: str) -> Path:
    """The adapter or the model of the run in `folder`: the last one, or with --patience the best."""
    best = folder / BEST[kind]
    return best if run["settings"].get("patience") and best.is_dir() else folder / kind


DECIDING = ("config.json", "generation_config.json", "tokenizer.json")  # besides the weights


def content(source: str) -> dict[str, str]:
    """What decides the completions of the model that `source` stands for: {name: digest of its content}."""
    folder, adapter = locate(source)
    found = base_content(folder)
    if adapter:
        about = ("adapter.json", "adapter_config.json")
        found |= {name: sha256(adapter / name) for name in about if (adapter / name).is_file()}
        found["adapter"] = digests.combined(sorted(adapter.glob("*.safetensors")))
    return found


def base_content(folder: Path) -> dict[str, str]:
    """What decides the completions of a checkpoint: {"weights" or name of a file: digest}."""
    found = {name: sha256(folder / name) for name in DECIDING if (folder / name).is_file()}
    return found | {"weights": digests.weights_digest(folder)}


def check_base(run: dict, folder: Path) -> None:
    """Raise InputError if the checkpoint in `folder` has other weights than the run's adapter was trained on.

    run: config.json of the run. Other files that differ are noted. Runs of earlier versions name no digests.
    """
    trained_on = run.get("base")
    if not isinstance(trained_on, dict):
        return
    found = base_content(folder)
    changed = [name for name in ("weights", *DECIDING) if trained_on.get(name) != found.get(name)]
    if "weights" in changed:
        raise InputError(
            f"{folder} is not the base that this adapter was trained on: the weights differ; "
            f"restore the base that config.json of the run names ({run['model']}), or train on this one"
        )
    if changed:
        note(f"{folder}: {', '.join(changed)} changed since the adapter was trained on this base")


def content_of(folder: Path, start: str | None) -> dict:
    """What a run starts from.  -> {"base": digests of the base model's files}

    start: the run, its adapter's folder or PEFT's folder that the run starts from. Raises InputError if that is a run
    on other base weights.
    """
    if start and (before := run_config(start)):
        check_base(before, folder)
    return {"base": base_content(folder)}


def load(
    source: str,
    dtype: torch.dtype,
    device: torch.device,
    choose_shard: Callable[[Callable[..., memory.Plan]], str] | None = None,
) -> tuple[MoETransformer, Tokenizer]:
    """The model that `source` stands for, with its adapter, and its tokenizer.

    choose_shard(plan_of): how the processes hold the model, see `memory.choose_shard`; None: each holds all of it. In
    float32 the adapter is then merged, which is faster and is how LoRI evaluates. In bfloat16 merging would round the
    update off, so the adapter stays apart.
    """
    folder, adapter = locate(source)
    if run := run_config(source):
        if adapter:
            check_base(run, folder)
        if (used := adapter or folder).name in BEST.values():
            note(f"{used}: the best of the run by its validation loss")
    config = read_config(folder)
    tokenizer, found = data.load_tokenizer(folder, config), adapter and read_any_adapter(adapter, config)

    def attach(model: MoETransformer) -> None:
        if found:
            place_adapter(model, *found)

    plan_of = partial(memory.plan, config, attach, dtype=dtype, trains=False)
    shard = choose_shard(plan_of) if choose_shard else "none"
    model = load_shared(folder, dtype, device, shard=shard, attach=attach)
    if found:
        fill_adapter(model, *found, adapter)
        if dtype == torch.float32 and shard == "none":
            hellora.merge(model)
    return model.eval(), tokenizer
