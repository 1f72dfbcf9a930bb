"""Take a run elsewhere: as a merged checkpoint, or as an adapter that PEFT loads.

    python export.py runs/tiny-math-hellora --to merged --out merged     # for serving: a checkpoint like any other
    python export.py runs/tiny-math-hellora --to peft --out adapter      # PeftModel.from_pretrained(base, "adapter")

`--to merged` reads the base one tensor at a time, adds what the adapter adds, and writes a shard when it is full. It
needs memory for one shard. It then compares the result with base and adapter: every weight, and the logits on a few
examples of the task.

`--to peft` writes a LoRA pair for every expert, with zeros for the cold ones (hub/peft.py says why). `--compact`
leaves the cold experts out. The file is then many times smaller. It loads in PEFT under transformers 4, and in servers
that look for each expert by name (SGLang). It does not load in vLLM, nor under transformers 5 (a size mismatch).

Dimensions: r rank, T tokens, V vocabulary.
"""

import command.start  # noqa: F401

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor

import data
import hellora
from command import cli
from command.cli import InputError, RunError, flag, say
from command.files import atomic_folder
from hellora import KINDS, SHARED, TARGETS, Adapter
from hub.checkpoint import (
    EMBEDDED,
    SHARD_BYTES,
    WHOLE,
    Stored,
    converted,
    copy_beside,
    read_slices,
    stored,
    write_checkpoint,
)
from hub.config import IGNORE_HELP, ignore_keys
from hub.peft import Factors, PeftAdapter, Shapes, peft_bytes, write_peft
from hub.weights import PROJECTIONS, as_stored, hub_key, hub_views
from lora import init_A
from lori import Scatter
from model import MoEConfig, MoETransformer, load_model, read_config
from run import adapters
from run.adapters import adapted_matrices, hub_shapes
from run.subject import Subject
from run.validation import BEST


@dataclass(frozen=True)
class Settings:
    """The flags of this command."""

    run: str = flag(help="run folder of train.py, or an adapter in it", positional=True)
    to: str = flag(help="what to write", choices=("merged", "peft"))
    out: str = flag(help="folder to write; new or empty")
    model: str | None = flag(None, "where the base model is (default: where the run had it)")
    dtype: str | None = flag(
        None, "of the weights written (default: the base's; peft: float32)", choices=("float32", "bfloat16", "float16")
    )
    compact: bool = flag(False, "peft: without the cold experts; not for transformers 5 or vLLM")
    examples: int | None = flag(None, "merged: examples to compare on (default: 4)", type=cli.number(int, 1))
    train_data: str | None = flag(None, "merged: a local copy of the training file, which the examples are from")
    ignore_config_keys: str | None = flag(None, IGNORE_HELP, metavar="KEYS")


# ------------------------------------------------------------------------------------- an adapter, matrix by matrix


@torch.no_grad()
def read_factors(folder: str | Path, config: MoEConfig) -> tuple[Adapter, dict[str, Factors]]:
    """The adapter of a run, and its factors by matrix, dense: LoRI's A is drawn again, its sparse B spread out.

    Raises InputError for an adapter that is damaged or does not fit the model.
    """
    adapter, state = adapters.read_adapter(folder)
    adapters.hot_mask(adapter.hot, config)
    shapes, r, found, digest = hub_shapes(config), adapter.r, {}, hashlib.sha256()
    is_sparse = any(name.endswith("positions") for name in state)

    def take(name: str, *shape: int) -> Tensor:
        tensor = state.pop(name, None)
        if tensor is None or tensor.shape != shape:
            what = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise InputError(f"{folder}: {name} is {what}, want {shape}; is it damaged, or of another model?")
        return tensor.float()

    for module, matrices in sorted(adapted_matrices(adapter, config).items()):
        fan_out, fan_in = shapes[hub_key(matrices[0], config.family)]
        n = () if matrices == [module] else (len(matrices),)  # hot experts are stacked
        if adapter.kind == "lori":
            A = torch.empty(*n, r, fan_in)
            for matrix, rows in zip(matrices, A.view(-1, r, fan_in), strict=True):
                init_A(rows, adapter.seed, matrix)
            digest.update(A.numpy().astype("<f4").tobytes())
        else:
            A = take(f"{module}.lora_A", *n, r, fan_in)
        if is_sparse:  # a matrix of which no entry was kept is not in the file
            name = f"{module}.parametrizations.lora_B"
            positions = state.pop(f"{name}.0.positions", torch.empty(0, dtype=torch.int64))
            values = take(f"{name}.original", len(positions)) if len(positions) else torch.empty(0)
            B = Scatter(positions, torch.Size((*n, fan_out, r)))(values)
        else:
            B = take(f"{module}.lora_B", *n, fan_out, r)
        factors = {"lora_A": A, "lora_B": B}
        if adapter.kind == "dora":
            factors["lora_m"] = take(f"{module}.lora_m", *n, fan_out)
        for j, matrix in enumerate(matrices):
            found[matrix] = {name: factor[j] if n else factor for name, factor in factors.items()}
    if state:
        raise InputError(f"{folder}: {next(iter(state))} is unexpected; is the adapter damaged?")
    if adapter.kind == "lori" and digest.hexdigest() != adapter.sha256_A:
        raise InputError(
            f"{folder}: lora_A drawn from seed {adapter.seed} has another checksum; is the adapter damaged?"
        )
    return adapter, found


# -------------------------------------------------------------------------------------------- merged checkpoint


def weights_of(folder: Path) -> dict[str, Stored]:
    """A checkpoint's weights by key, in the order of its files. Raises InputError if they do not fit config.json."""
    config = read_config(folder)
    with torch.device("meta"):
        views = hub_views(MoETransformer(config))
    return stored(folder, {key: tuple(view.shape) for key, view in views.items()}, config.family)


def all_rows(weights: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Weights by key, one at a time, in the order of their files."""
    return read_slices(weights, dict.fromkeys(weights, WHOLE))


@torch.no_grad()
def fold(W: Tensor, factors: Factors, adapter: Adapter) -> Tensor:
    """The weight that computes by itself what W [out, in] computes with its factors.  -> float32 [out, in]"""
    pair = KINDS[adapter.kind][1].pair(W.unsqueeze(0), adapter.r, adapter.alpha)
    pair.load_state_dict({name: factor.unsqueeze(0) for name, factor in factors.items()})
    return pair.merged(W.unsqueeze(0))[0]


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
    config, weights = read_config(base), weights_of(base)
    adapted = {f"{hub_key(matrix, config.family)}.weight": pair for matrix, pair in factors.items()}
    family, E = config.family, config.num_experts
    empty = ((key, torch.empty(w.shape, dtype=dtype or w.dtype, device="meta")) for key, w in weights.items())
    sizes = {key: tensor.nbytes for key, tensor in as_stored(empty, family, E)}
    total = sum(sizes.values())
    say(f"merged checkpoint: {total:,} bytes, {len(adapted):,} of {len(weights):,} weights change")
    check_space(out, total)
    merged = (
        (key, converted(fold(W, adapted[key], adapter) if key in adapted else W, dtype or W.dtype, key))
        for key, W in all_rows(weights)
    )
    hub = config.hub
    if dtype:  # transformers 5 writes torch_dtype as `dtype`
        hub = {key: value for key, value in hub.items() if key != "dtype"}
        hub["torch_dtype"] = str(dtype).removeprefix("torch.")
    write_checkpoint(out, sizes, as_stored(merged, family, E), hub, shard_bytes)
    copy_beside(base, out)


@torch.no_grad()
def logits(model: MoETransformer, items: list[data.Encoded]) -> Tensor:
    """Logits of all tokens of the items, float32 [T, V]."""
    return torch.cat([model(torch.tensor([item.ids]))[0][0] for item in items]).float()


@torch.no_grad()
def check_merged(merged: Path, folder: Path, base: Path, items: list[data.Encoded]) -> None:
    """Compare the checkpoint `merged` with `base` and the adapter in `folder`, and print how they differ.

    Weights must be what hellora.merge makes, up to the order of a sum. At a typical token the logits must be those of
    base and adapter; the least change can send a few tokens to another expert. Raises RunError if either is not so.
    """
    dtypes = {weight.dtype for weight in weights_of(merged).values()}
    rounds = dtypes != {torch.float32}
    dtype = reduce(torch.promote_types, dtypes | {weight.dtype for weight in weights_of(base).values()})

    model = load_model(base, dtype)
    unadapted = logits(model, items)
    adapters.load_adapter(model, folder)
    expected = logits(model, items)
    hellora.merge(model)
    views, wrong = hub_views(model), []
    for key, W in all_rows(weights_of(merged)):
        want = views[key].to(W.dtype).float()
        if not (W.float() - want).abs().sum() <= 1e-5 * want.abs().sum():  # NaN is wrong too
            wrong.append(key)
    del model, views  # one model at a time
    got = logits(load_model(merged, dtype), items)

    effect, error = ((x - expected).abs().amax(-1) for x in (unadapted, got))  # [T] each
    agree = int((got.argmax(-1) == expected.argmax(-1)).sum())
    note = " (16-bit weights are rounded, with --dtype float32 they are not)" if rounds else ""
    say(
        f"check on {len(items)} examples, {len(got):,} tokens, in {str(dtype).removeprefix('torch.')}: "
        f"the largest logit is {expected.abs().max():.3g}",
        f"the adapter changes logits by {effect.median():.2g} at a typical token, by {effect.max():.2g} at most",
        f"the merged checkpoint differs from base and adapter by {error.median():.2g} at a typical token, by "
        f"{error.max():.2g} at most; top-1 agrees at {agree:,} of {len(got):,}{note}",
    )
    if wrong:
        raise RunError(f"{len(wrong)} weights are not what the adapter makes of the base (first: {wrong[0]})")
    tolerance = 0.05 if rounds else 1e-4  # of the largest logit
    if not error.median() <= tolerance * expected.abs().max():
        raise RunError(f"at a typical token logits differ by more than {tolerance:g} of the largest one")


# ------------------------------------------------------------------------------------------------ PEFT adapter


def peft_shapes(adapter: Adapter, config: MoEConfig, compact: bool) -> Shapes:
    """The matrices that a PEFT file has pairs for, by the hub's keys, with their shapes.

    Attention and router as adapted, and all experts, or the hot ones if `compact`. Raises InputError for DoRA unless
    `compact`: PEFT has it only where experts have linear layers of their own, and there cold ones need no pair.
    """
    if adapter.kind == "dora" and not compact:
        why = "PEFT has DoRA on experts under transformers 4 alone"
        raise InputError(f"{why}, which takes the file of --compact; add that, or use --to merged")
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
    shapes = peft_shapes(adapter, config, compact)
    dora = adapter.kind == "dora"
    size = peft_bytes(adapter.r, shapes, dtype, dora)
    small = peft_bytes(adapter.r, peft_shapes(adapter, config, compact=True), dtype, dora)
    what = "hot experts alone" if compact else f"zeros for cold experts included (--compact: {small:,})"
    say(f"adapter for PEFT: {size:,} bytes, {what}")
    if config.family.peft != "5" or dora:
        what = "DoRA" if dora else "adapters"
        say(f"PEFT loads {what} of {config.model_type} under transformers 4 only; for 5 use --to merged")
    check_space(out, size)
    pairs = {hub_key(matrix, config.family): pair for matrix, pair in factors.items()}
    # Full names of MLPs if compact: with a pattern, transformers 5 would silently make a model without the experts.
    targets = [path.rpartition(".")[2] for path in TARGETS[adapter.targets] if path not in SHARED]
    mlps = [key for key in pairs if ".experts." in key or ".shared_expert" in key]
    targets += mlps if compact else config.family.projections
    write_peft(out, PeftAdapter(adapter.r, adapter.alpha, pairs, dora), shapes, targets, base_name, dtype)


# -------------------------------------------------------------------------------------------------- the command


def check_out(out: Path) -> None:
    """Raise InputError unless `out` is an empty folder, or one that can be made."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out} exists and is not empty; name another folder")
    place = next(path for path in (out, *out.parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"--out {out} cannot be written: {place} is not a writable folder; name another folder")


def check_space(folder: Path, size: int) -> None:
    """Raise InputError if the disk has fewer than `size` free bytes."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{folder.parent} has {free:,} free bytes, {size:,} are needed; name another folder")


def parse_flags(argv: list[str] | None = None) -> Settings:
    about = "Export a run of train.py as a merged checkpoint, or as an adapter for PEFT."
    settings = cli.parse(Settings, argv, prog="export.py", description=about)
    for name in {"merged": ("compact",), "peft": ("examples", "train_data")}[settings.to]:
        if getattr(settings, name):
            raise InputError(f"--{name.replace('_', '-')} has no meaning with --to {settings.to}; leave it out")
    return settings


def main(argv: list[str] | None = None) -> None:
    settings = parse_flags(argv)
    if not cli.is_main_process():
        return
    ignore_keys(settings.ignore_config_keys)
    subject, out = Subject(settings.run, base=settings.model), Path(settings.out).resolve()
    if subject.run is None:
        raise InputError(f"{settings.run} is not a run folder of train.py; want one with config.json and adapter/")
    trained = subject.run["settings"]
    if trained["method"] == "fft":
        raise InputError(f"{settings.run} is a run of fft and has no adapter: its model/ is a full checkpoint already")
    folder, base, config = subject.adapter, subject.folder, subject.config
    adapter, factors = read_factors(folder, config)
    dtype = getattr(torch, settings.dtype) if settings.dtype else None
    check_out(out)
    subject.check_base()
    if settings.to == "peft":
        is_local = subject.base in EMBEDDED or Path(subject.base).exists()
        name = str(base.resolve()) if is_local else subject.base
        with atomic_folder(out) as part:
            write_adapter(part, adapter, factors, config, name, compact=settings.compact, dtype=dtype or torch.float32)
    else:
        source = settings.train_data or trained["train_data"]
        options = {"max_length": trained["max_length"], "bos": trained.get("bos", "auto")}
        reader = data.Reader(trained["task"], base, config, **options)
        try:
            items = reader.encode(reader.load("train", source, settings.examples or 4))
        except InputError as error:
            advice = "the result is checked on rows of the training data; name others with --train-data FILE"
            raise InputError(f"{error}; {advice}") from None
        with atomic_folder(out) as part:
            write_merged(part, adapter, factors, base, dtype=dtype)
            check_merged(part, folder, base, items)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    if folder.name == BEST["adapter"]:
        say(f"{folder}: the best of the run by its validation loss")
    say(f"wrote {settings.out}: {size:,} bytes with everything")


if __name__ == "__main__":
    cli.run(main)
