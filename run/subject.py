"""What a name on the command line stands for: a run folder of train.py, a checkpoint, a PEFT adapter, or a hub id.

subject = Subject("runs/tiny-math-hellora")      # the run; its base and its adapter
model = subject.load(torch.float32)

A command makes one Subject and hands it on, so that a file of the run or of the base is read once.
"""

import os
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path

import torch

import hellora
from command.cli import InputError, note
from command.files import read_json, sha256
from hub import digests
from hub.checkpoint import EMBEDDED, resolve
from hub.peft import base_of
from machine import memory
from machine.processes import ALONE, Processes
from model import MoEConfig, MoETransformer, read_config
from run.adapters import fill_adapter, place_adapter, read_any_adapter
from training_step import load_for_process

DECIDING = ("config.json", "generation_config.json", "tokenizer.json")  # besides the weights
BEST = {"adapter": "adapter-best", "model": "model-best"}  # what a run saves last, and the name of the best
OF_ADAPTER = ("adapter.json", "adapter_config.json")  # ours, and PEFT's


class Subject:
    """A model with what it consists of. Each part is read when it is first needed, and then kept."""

    def __init__(self, name: str, base: str | None = None) -> None:
        """base: the model that an adapter is put on, by default the one that it was trained on."""
        self.name, self.run = name, run_config(name)
        place = Path(name)
        self.adapter: Path | None = None  # the adapter's folder; None: the checkpoint is all
        if self.run is None:
            self.adapter = place if any(os.path.isfile(place / file) for file in OF_ADAPTER) else None
            self.base = base or base_of(place) or name
        elif (place / "model").is_dir():  # of full fine-tuning
            self.base = str(result_of(self.run, place, "model"))
        else:
            is_adapter = (place / "adapter.json").is_file()
            self.adapter = place if is_adapter else result_of(self.run, place, "adapter")
            self.base = base or self.run["model"]

    @property
    def is_here(self) -> bool:
        """Whether the name is that of a folder or of an embedded model, and not perhaps one of the hub."""
        return self.name in EMBEDDED or os.path.exists(self.name)

    @cached_property
    def folder(self) -> Path:
        """The checkpoint's folder. Raises InputError if there is no such checkpoint."""
        try:
            return resolve(self.base)
        except InputError as error:
            if self.run is None or self.base != self.run["model"]:
                raise
            where = "" if os.path.isabs(self.base) else " (if that is a path, seen from the folder train.py ran in)"
            raise InputError(f"{self.name} was trained on {self.base}{where}: {error}") from None

    @cached_property
    def config(self) -> MoEConfig:
        """config.json of the checkpoint."""
        return read_config(self.folder)

    @cached_property
    def digests(self) -> dict[str, str]:
        """What decides the completions of the checkpoint: {"weights" or name of a file: digest}."""
        return base_content(self.folder)

    @property
    def content(self) -> dict[str, str]:
        """What decides the completions: `digests`, and those of the adapter's files."""
        return self.digests | self.adapter_content

    @property
    def adapter_content(self) -> dict[str, str]:
        """Digests of the adapter's files; {} without an adapter."""
        if self.adapter is None:
            return {}
        files = {name: sha256(self.adapter / name) for name in OF_ADAPTER if (self.adapter / name).is_file()}
        return files | {"adapter": digests.combined(sorted(self.adapter.glob("*.safetensors")))}

    def check_base(self) -> None:
        """Raise InputError if the adapter of a run was trained on other weights than those of the checkpoint."""
        if self.run and self.adapter:
            check_base(self.run, self.folder, self.digests)

    def without_adapter(self) -> "Subject":
        """The model that the adapter was trained on, or that full fine-tuning started from. Raises InputError."""
        if self.run is None and self.adapter is None:
            raise InputError(f"--adapter none: {self.name} has no adapter; leave it out")
        return Subject(self.run["model"] if self.run else self.base)

    def load(
        self,
        dtype: torch.dtype,
        processes: Processes = ALONE,
        *,
        shard: str | None = None,
        tokens: int = 1,
        cached: int = 0,
    ) -> MoETransformer:
        """The model with its adapter, for decoding.

        shard: as of `memory.choose_shard`. tokens, cached: as of `memory.plan`, to choose by.
        In float32 the adapter is then merged, which is faster and is how LoRI evaluates. In bfloat16 merging would
        round the update off, so the adapter stays apart.
        """
        self.check_base()
        if (used := self.adapter or self.folder).name in BEST.values():
            note(f"{used}: the best of the run by its validation loss")
        stored = self.adapter and read_any_adapter(self.adapter, self.config)

        def attach(model: MoETransformer) -> None:
            if stored:
                place_adapter(model, *stored)

        plan_of = partial(memory.plan, self.config, attach, dtype=dtype, trains=False, tokens=tokens, cached=cached)
        shard = memory.choose_shard(shard, processes.device, processes.count, plan_of)
        model = load_for_process(self.folder, dtype, processes.device, shard=shard, attach=attach)
        if stored:
            fill_adapter(model, *stored, self.adapter)
            if dtype == torch.float32 and shard == "none":
                hellora.merge(model)
        return model.eval()


def run_config(name: str) -> dict | None:
    """config.json of a run folder of train.py, or of that which holds the adapter `name`; None if there is none.

    Raises InputError for a config.json that is damaged.
    """
    # os.path, which takes a name that is too long for one of nothing
    folder = Path(name).parent if os.path.isfile(Path(name) / "adapter.json") else Path(name)
    config = read_json(folder / "config.json", dict, missing={}) if os.path.isdir(folder) else {}
    is_run = isinstance(config.get("model"), str) and isinstance(config.get("settings"), dict)
    return config if is_run else None


def began(*records: dict | None) -> datetime:
    """What a chat template takes for the present: "began" of the first record that has it, or now.

    records: a run's config.json, an evaluation's evaluation.json, the contents of profile.json.
    """
    dates = (record["began"] for record in records if record and record.get("began"))
    try:
        return datetime.fromisoformat(next(dates))
    except (StopIteration, TypeError, ValueError):
        return datetime.now()


def result_of(run: dict, folder: Path, kind: str) -> Path:
    """The adapter or the model of the run in `folder`: the last one, or with --patience the best."""
    best = folder / BEST[kind]
    return best if run["settings"].get("patience") and best.is_dir() else folder / kind


def base_content(folder: Path) -> dict[str, str]:
    """What decides the completions of a checkpoint: {"weights" or name of a file: digest}."""
    files = {name: sha256(folder / name) for name in DECIDING if (folder / name).is_file()}
    return files | {"weights": digests.weights_digest(folder)}


def check_base(run: dict, folder: Path, content: dict[str, str]) -> None:
    """Raise InputError if the checkpoint in `folder` has other weights than the run's adapter was trained on.

    run: config.json of the run. content: as of `base_content`. Other files that differ are noted.
    """
    trained_on = run.get("base")
    if not isinstance(trained_on, dict):  # a run of an earlier version
        return
    changed = [name for name in ("weights", *DECIDING) if trained_on.get(name) != content.get(name)]
    if "weights" in changed:
        raise InputError(
            f"{folder} is not the base that this adapter was trained on: the weights differ; "
            f"restore the base that config.json of the run names ({run['model']}), or train on this one"
        )
    if changed:
        note(f"{folder}: {', '.join(changed)} changed since the adapter was trained on this base")


def other_base(adapter: Path, folder: Path) -> tuple[bool, str] | None:
    """What speaks against `folder` being the base that a PEFT adapter names; None if nothing does.

    -> whether the weights are known to differ, and a sentence
    """
    try:
        named = base_of(adapter)
    except InputError as error:
        return False, str(error)
    if named is None or Path(named).resolve() == folder.resolve():
        return None
    if f"models--{named.partition('@')[0].replace('/', '--')}" in folder.parts:  # a folder of the hub's cache
        return None
    if not (Path(named) / "config.json").is_file():
        return False, f"{adapter} names the base {named}, which is not here to be compared with {folder}"
    if digests.weights_digest(Path(named)) == digests.weights_digest(folder):
        return None
    return True, f"{adapter} names the base {named}, whose weights differ from those of {folder}"


def content_of(folder: Path, start: str | None) -> dict:
    """What a run starts from.  -> {"base": digests of the base model's files}

    start: the run, its adapter's folder or PEFT's folder that the run starts from. Raises InputError if that is a run
    on other base weights; that PEFT's folder names another base is noted.
    """
    content = base_content(folder)
    if start and (before := run_config(start)):
        check_base(before, folder, content)
    elif start and (difference := other_base(Path(start), folder)):
        note(difference[1])
    return {"base": content}
