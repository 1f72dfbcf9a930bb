"""Take a run elsewhere: as a merged checkpoint, or as an adapter that PEFT loads. Check what any tool made.

    python export.py runs/tiny-math-hellora --to merged --out merged     # for serving: a checkpoint like any other
    python export.py runs/tiny-math-hellora --to peft --out adapter      # PeftModel.from_pretrained(base, "adapter")
    python export.py check adapter --base tiny                           # did the experts train?
    python export.py check merged --base tiny --adapter adapter          # is it base + adapter?

`--to merged` reads the base one tensor at a time, adds what the adapter adds, and writes a shard when it is full. It
needs memory for one shard.

`--to peft` writes a LoRA pair for every expert, with zeros for the cold ones (hub/peft.py says why). `--compact`
leaves the cold experts out. The file is then many times smaller. It loads in PEFT under transformers 4, not 5 (a size
mismatch). Servers that look for each expert by name (SGLang) should load it (not run); vLLM does not.

`check` reads an adapter or a merged checkpoint, of this project or of another tool, and prints what moved in every
layer and what is wrong (diagnosis/). Exit status 0: healthy; 3: a fault was found; 2: the input cannot be used.
"""

import command.start  # noqa: F401

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import data
from command import cli
from command.cli import InputError, flag, note, say
from command.files import atomic_folder, claimed, writable, write_json
from diagnosis import report
from diagnosis.changes import of_changes, of_merged
from diagnosis.findings import AS_READ, BASE, REORDERED, Finding, of_layout, of_order, of_pairs
from diagnosis.measure import adapter_changes, by_expert
from diagnosis.merged import Comparison, compare
from hellora import SHARED, TARGETS, Adapter, folded
from hub.checkpoint import (
    EMBEDDED,
    SHARD_BYTES,
    WHOLE,
    converted,
    copy_beside,
    read_slices,
    resolve,
    write_checkpoint,
)
from hub.config import IGNORE_HELP, ignore_keys
from hub.peft import Factors, Reading, Shapes, peft_bytes, unified, write_peft
from hub.tokenizer import write_stop_ids
from hub.weights import PROJECTIONS, as_stored, hub_key
from machine.processes import ALONE, default_dtype
from model import MoEConfig, load_model, read_config
from routing.profiles import load_profile
from run.adapters import (
    adapted_matrices,
    fill_adapter,
    from_peft,
    hub_shapes,
    place_adapter,
    read_own_adapter,
    reading_of,
    readings_of,
    weights_of,
)
from run.subject import BEST, Subject, other_base
from training_step import held_out_loss

ROWS = 64  # of --data, whose loss is measured


@dataclass(frozen=True)
class Settings:
    """The flags of this command."""

    run: str = flag(help="run folder of train.py, or an adapter in it", positional=True)
    to: str = flag(help="what to write", choices=("merged", "peft"))
    out: str = flag(help="folder to write, new or empty", metavar="DIR")
    model: str | None = flag(None, "the base model (default: where the run found it)")
    dtype: str | None = flag(
        None,
        "dtype of the written weights (default: the base's; peft: float32)",
        choices=("float32", "bfloat16", "float16"),
    )
    compact: bool = flag(
        False,
        "with --to peft: leave out experts without an adapter; neither PEFT on transformers 5 nor vLLM loads that",
    )
    ignore_config_keys: str | None = flag(None, IGNORE_HELP, metavar="KEYS")


@dataclass(frozen=True)
class CheckSettings:
    """The flags of `export.py check`."""

    source: str = flag(help="an adapter (a run folder, or PEFT's format), or a merged checkpoint", positional=True)
    base: str = flag(help="the base model: a folder, a hub id, or the name of an embedded model")
    adapter: str | None = flag(None, "the adapter that a merged checkpoint should contain", metavar="DIR")
    profile: str | None = flag(None, "routed tokens of every expert (default: the run's)", metavar="FILE")
    data: str | None = flag(None, f"training rows; {ROWS} of them show the order of packed stacks", metavar="FILE")
    plot: str | None = flag(None, "draw |dW| / |W| beside the routed tokens", metavar="PNG", type=cli.picture)
    json: str | None = flag(None, "write the table and the findings", metavar="FILE")
    ignore_config_keys: str | None = flag(None, IGNORE_HELP, metavar="KEYS")


# -------------------------------------------------------------------------------------------- merged checkpoint


def write_merged(
    out: Path,
    adapter: Adapter,
    factors: dict[str, Factors],
    base: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the checkpoint `base` with an adapter, given by matrix, folded in. dtype: by default as in `base`."""
    config = read_config(base)
    weights = weights_of(base, config)
    adapted = {f"{hub_key(matrix, config.family)}.weight": pair for matrix, pair in factors.items()}
    family, E, scaling = config.family, config.num_experts, adapter.alpha / adapter.r
    empty = ((key, torch.empty(w.shape, dtype=dtype or w.dtype, device="meta")) for key, w in weights.items())
    sizes = {key: tensor.nbytes for key, tensor in as_stored(empty, family, E)}
    total = sum(sizes.values())
    say(f"merged checkpoint: {total:,} bytes, {len(adapted):,} of {len(weights):,} weights change")
    check_space(out, total)
    merged = (
        (key, converted(folded(W, adapted[key], adapter.kind, scaling) if key in adapted else W, dtype or W.dtype, key))
        for key, W in read_slices(weights, dict.fromkeys(weights, WHOLE))
    )
    hub = config.hub
    if dtype:  # transformers 5 writes torch_dtype as `dtype`
        hub = {key: value for key, value in hub.items() if key != "dtype"}
        hub["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_checkpoint(out, sizes, as_stored(merged, family, E), hub, shard_bytes)
    copy_beside(base, out)


# ------------------------------------------------------------------------------------------------ PEFT adapter


def peft_shapes(adapter: Adapter, config: MoEConfig, compact: bool) -> Shapes:
    """The matrices that a PEFT file has pairs for, by the hub's keys, with their shapes.

    Attention and router as adapted, and all experts, or the hot ones if `compact`. Raises InputError for DoRA unless
    `compact`: PEFT has it only where experts have linear layers of their own, and there cold ones need no pair.
    """
    if adapter.kind == "dora" and not compact:
        why = "PEFT has DoRA on experts under transformers 4 alone"
        raise InputError(f"{why}, which reads only the file of --compact; add --compact, or use --to merged")
    if config.family.peft is None:
        raise InputError(f"PEFT is not known to load adapters of {config.model_type}; use --to merged")
    every = replace(adapter, hot=[list(range(config.num_experts))] * len(adapter.hot))
    shown = adapted_matrices(adapter if compact else every, config)
    matrices = [matrix for group in shown.values() for matrix in group]
    if not compact:
        # PEFT matches target_modules with the end of a name, so MLPs beside the experts get pairs (of zeros) too.
        for i in range(config.num_hidden_layers):
            block = f"layers.{i}.mlp" if i not in config.moe_layers else f"layers.{i}.mlp.shared_expert"
            if i not in config.moe_layers or config.shared_intermediate_size:
                matrices += [f"{block}.{projection}" for projection in PROJECTIONS]
    shapes = hub_shapes(config)
    return {key: shapes[key] for key in (hub_key(matrix, config.family) for matrix in matrices)}


def write_adapter(
    out: Path,
    adapter: Adapter,
    factors: dict[str, Factors],
    config: MoEConfig,
    base_name: str,
    *,
    compact: bool = False,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write an adapter, given by matrix, for PEFT: a pair for every expert, or for the hot ones if `compact`."""
    reading = reading_of(adapter, factors, config)
    stored, _ = unified(reading)  # one rank for experts and other modules
    shapes = peft_shapes(adapter, config, compact)
    size = peft_bytes(stored.r, shapes, dtype, stored.dora)
    small = peft_bytes(stored.r, peft_shapes(adapter, config, compact=True), dtype, stored.dora)
    what = "hot experts alone" if compact else f"zeros for cold experts included (--compact: {small:,})"
    say(f"adapter for PEFT: {size:,} bytes, {what}")
    if config.family.peft != "5" or stored.dora:
        what = "DoRA" if stored.dora else "adapters"
        say(f"PEFT loads {what} of {config.model_type} under transformers 4 only; for 5 use --to merged")
    check_space(out, size)
    # Full names of MLPs if compact: with a pattern, transformers 5 would silently make a model without the experts.
    targets = [path.rpartition(".")[2] for path in TARGETS[adapter.targets] if path not in SHARED]
    mlps = [key for key in reading.pairs if ".experts." in key or ".shared_expert" in key]
    targets += mlps if compact else config.family.projections
    write_peft(out, stored, shapes, targets, base_name, dtype)


# -------------------------------------------------------------------------------------------------- the command


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out`, which must be empty or not there. Raises InputError."""
    with claimed(out, beside=True):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out} exists and is not empty; name another folder")
        with atomic_folder(out) as part:
            yield part


def check_space(folder: Path, size: int) -> None:
    """Raise InputError if the disk has fewer than `size` free bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{folder.parent} has {free:,} free bytes, {size:,} are needed; name another folder")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["check"]:
        return check(argv[1:])
    settings = cli.parse(
        Settings,
        argv,
        prog="export.py",
        description="Export a run of train.py as a merged checkpoint, or as an adapter for PEFT.\n"
        "Also: export.py check.",
        example="python export.py runs/demo/hellora --to merged --out runs/merged",
    )
    if settings.compact and settings.to == "merged":
        raise InputError("--compact has no meaning with --to merged; leave it out")
    if not cli.is_main_process():
        return
    ignore_keys(settings.ignore_config_keys)
    subject, out = Subject(settings.run, base=settings.model), Path(settings.out).resolve()
    if subject.run is None:
        raise InputError(f"{settings.run} is not a run folder of train.py; expected one with config.json and adapter/")
    if subject.run["settings"]["method"] == "fft":
        raise InputError(f"{settings.run} is a run of fft and has no adapter; use its model/, a full checkpoint")
    folder, base, config = subject.adapter, subject.folder, subject.config
    adapter, _, factors = read_own_adapter(folder, config)
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    stop_ids = subject.run.get("stop_ids", ())
    with new_folder(out) as part:
        subject.check_base()
        if settings.to == "peft":
            is_local = subject.base in EMBEDDED or Path(subject.base).exists()
            name = str(base.resolve()) if is_local else subject.base
            dtype = dtype or torch.float32
            write_adapter(part, adapter, factors, config, name, compact=settings.compact, dtype=dtype)
        else:
            write_merged(part, adapter, factors, base, dtype=dtype)
            write_stop_ids(part, stop_ids)
    if settings.to == "peft" and set(stop_ids) - set(config.eos_token_ids):
        note(f"the base does not name all tokens that end an answer; serve it with the stop tokens {list(stop_ids)}")
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if folder.name == BEST["adapter"]:
        say(f"{folder}: the best of the run by its validation loss")
    written = "" if settings.to == "peft" or dtype else ", in the base's dtype; --dtype float32 keeps more digits"
    say(f"wrote {settings.out}: {size:,} bytes with everything{written}")


# ----------------------------------------------------------------------------------------------------- the check


def check(argv: list[str]) -> None:
    """`export.py check`: print what moved and what is wrong. Ends with status 3 if there is a fault."""
    settings = cli.parse(
        CheckSettings,
        argv,
        prog="export.py check",
        description="Did the experts train, merge and load? Check an adapter or a merged checkpoint of any tool.",
        example="python export.py check runs/demo/hellora --base tiny --plot runs/check.png",
    )
    if not cli.is_main_process():
        return
    ignore_keys(settings.ignore_config_keys)
    base, subject = resolve(settings.base), Subject(settings.source, base=settings.base)
    config = read_config(base)
    readings = read_readings(settings, subject, config)
    counts = read_counts(settings, config)
    plot, record = (path and writable(path) for path in (settings.plot, settings.json))
    losses = row_losses(settings.data, readings, base, config) if settings.data else None
    findings = [*of_pairs(readings[AS_READ], config), *of_order(readings, config, losses)] if readings else []
    if subject.adapter:
        matrices = adapter_changes(readings[AS_READ], weights_of(base, config), config)
        findings += [*of_base(subject), *of_layout(readings[AS_READ], config)]
        findings += of_changes(readings[AS_READ], matrices, config, counts)
    else:
        merged = resolve(subject.base if subject.run else settings.source)  # a run of full fine-tuning has model/
        comparison = compare_checkpoints(merged, base, config, readings)
        matrices = comparison.matrices
        findings += of_merged(comparison, readings, config)
        say(f"largest difference of an entry from the base: {comparison.largest:.3g}")
    findings.sort(key=lambda finding: not finding.is_fault)  # faults first, the worst of them first
    say(*report.table(matrices, config, counts), "")
    for finding in findings:
        say(*finding.lines(), "")
    experts = by_expert(matrices, config)
    if plot:
        report.draw(experts, counts, f"{settings.source} on {settings.base}", plot)
    if record:
        write_json(record, report.record(matrices, findings, config))
    num_faults = sum(finding.is_fault for finding in findings)
    say(f"{report.headline(experts, counts)}; {num_faults or 'no'} {'fault' if num_faults == 1 else 'faults'}")
    if num_faults:
        sys.exit(3)


def read_counts(settings: CheckSettings, config: MoEConfig) -> Tensor | None:
    """The routed tokens [L, E] of --profile, or of the run's own profile."""
    own = Path(settings.source) / "profile.json"
    path = settings.profile or (str(own) if os.path.isfile(own) else None)
    if path is None:
        return None
    return load_profile(path, config).counts


def read_readings(settings: CheckSettings, subject: Subject, config: MoEConfig) -> dict[str, Reading]:
    """The adapter to check, or the one of --adapter, as `readings_of` gives it; {}: a checkpoint is checked alone."""
    folder = subject.adapter
    if folder and settings.adapter:
        raise InputError(f"--adapter has no meaning with the adapter {settings.source}; leave it out")
    if settings.adapter:
        folder = Subject(settings.adapter).adapter
        if folder is None:
            raise InputError(f"--adapter {settings.adapter} holds no adapter; expected a run folder, or PEFT's format")
    return readings_of(folder, config) if folder else {}


def row_losses(file: str, readings: dict[str, Reading], base: Path, config: MoEConfig) -> dict[str, Tensor] | None:
    """The loss of each row [N], in nats per target token, of the base and with the adapter in each order.

    None: there is one order only.
    """
    if REORDERED not in readings:
        note(f"--data {file} is not read: there is no adapter with packed stacks that moved")
        return None
    reader = data.Reader("own", base, config)
    encoded = reader.encode(reader.load("train", file, ROWS))
    items = list({tuple(item.ids): item for item in encoded}.values())  # a row that occurs twice says nothing new
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    losses = {}
    for order, reading in {BASE: None, **readings}.items():
        model = None  # so that two models are never held at once
        model = load_model(base, getattr(torch, default_dtype()), device)
        if reading:
            adapter, state = from_peft(unified(reading)[0], config)
            place_adapter(model, adapter, state)
            fill_adapter(model, adapter, state, "the adapter")
        losses[order] = torch.tensor([held_out_loss(model, [item], 1, ALONE)[0] for item in items])
    return losses


def of_base(subject: Subject) -> Iterator[Finding]:
    """Whether the adapter was trained on this base, as far as it says."""
    try:
        subject.check_base()
        difference = None if subject.run else other_base(subject.adapter, subject.folder)
    except InputError as error:
        difference = True, str(error)
    if difference:
        is_known, sentence = difference
        means = "On another base the update means something else; on a merged base it counts twice."
        yield Finding("another-base", sentence, means, "check with the base that it was trained on", is_known)


def compare_checkpoints(folder: Path, base: Path, config: MoEConfig, readings: dict[str, Reading]) -> Comparison:
    """A merged checkpoint beside its base. Raises InputError for one of another model."""
    merged, weights = weights_of(folder, read_config(folder)), weights_of(base, config)
    if {key: weight.shape for key, weight in merged.items()} != {key: weight.shape for key, weight in weights.items()}:
        raise InputError(f"{folder} is not of the same model as {base}: names or shapes of weights differ")
    return compare(merged, weights, config, readings)


if __name__ == "__main__":
    cli.run(main)
