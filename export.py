"""Take a run elsewhere: as a merged checkpoint, or as an adapter that PEFT loads.

    python export.py runs/tiny-math-hellora --to merged --out merged     # for serving: a checkpoint like any other
    python export.py runs/tiny-math-hellora --to peft --out adapter      # PeftModel.from_pretrained(base, "adapter")

`--to merged` reads the base tensor by tensor, adds what the adapter adds and writes a shard when it is full: memory for
one shard. Then it compares the result with base and adapter: every weight, and the logits on examples of the task.

`--to peft` writes a pair of factors for every expert, zeros for those without an adapter (why: peft_files.py).
`--compact` leaves these out. The file is then many times smaller, and loads in PEFT under transformers 4 (under 5 it
stops with a size mismatch) and in servers that look for each expert by name (SGLang), not in vLLM.

Dimensions: r rank, T tokens, V vocabulary.
"""

import argparse
import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

import data
import hellora
from command import cli
from command.cli import InputError
from hellora import Adapter
from hub.checkpoint import SHARD_BYTES, Stored, read_config, read_rows, resolve, stored, write_checkpoint
from hub.config import MoEConfig
from hub.peft import UNDER_5, Factors, hub_name, hub_shapes, modules, peft_bytes, write_peft
from lora import KINDS, Scatter, init_A
from model import MoETransformer, hub_views, load_model
from run import adapters
from scoring import completions

BESIDE = (  # what a checkpoint folder holds beside its weights
    "generation_config.json tokenizer.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json vocab.json merges.txt tokenizer.model chat_template.jinja"
).split()


# ------------------------------------------------------------------------------------- an adapter, matrix by matrix


@torch.no_grad()
def read_factors(folder: str | Path, config: MoEConfig) -> tuple[Adapter, dict[str, Factors]]:
    """The adapter of a run by matrix, dense: LoRI's A is drawn again, its sparse B spread out.

    Raises InputError for an adapter that is damaged or of another model.
    """
    adapter, state = adapters.read_adapter(folder)
    adapters.hot_mask(adapter.hot, config)
    shapes, r, found, digest = hub_shapes(config), adapter.r, {}, hashlib.sha256()
    is_sparse = any(name.endswith("positions") for name in state)

    def take(name: str, *shape: int) -> Tensor:
        tensor = state.pop(name, None)
        if tensor is None or tensor.shape != shape:
            what = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise InputError(f"{folder}: {name} is {what}, want {shape}; damaged, or of another model?")
        return tensor.float()

    for module, matrices in sorted(modules(adapter, config).items()):
        fan_out, fan_in = shapes[hub_name(matrices[0], config)]
        n = () if matrices == [module] else (len(matrices),)  # hot experts are stacked
        if adapter.kind == "lori":
            A = torch.empty(*n, r, fan_in)
            for matrix, rows in zip(matrices, A.view(-1, r, fan_in), strict=True):
                init_A(rows, adapter.seed, matrix)
            digest.update(A.numpy().astype("<f4").tobytes())
        else:
            A = take(f"{module}.lora_A", *n, r, fan_in)
        if is_sparse:  # a matrix none of whose entries was kept is not in the file
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
        raise InputError(f"{folder}: {next(iter(state))} is unexpected; a damaged adapter?")
    if adapter.kind == "lori" and digest.hexdigest() != adapter.sha256_A:
        raise InputError(f"{folder}: lora_A drawn from seed {adapter.seed} has another checksum; a damaged adapter?")
    return adapter, found


# -------------------------------------------------------------------------------------------- merged checkpoint


def weights_of(folder: Path) -> dict[str, Stored]:
    """The weights of a checkpoint by key, in its files' order. Raises InputError if config.json wants others."""
    with torch.device("meta"):
        views = hub_views(MoETransformer(read_config(folder)))
    return stored(folder, {key: tuple(view.shape) for key, view in views.items()})


def read_whole(weights: dict[str, Stored]) -> Iterator[tuple[str, Tensor]]:
    """Weights by key, one at a time, in the order of their files."""
    return read_rows(weights, dict.fromkeys(weights, slice(None)))


@torch.no_grad()
def fold(W: Tensor, factors: Factors, adapter: Adapter) -> Tensor:
    """The weight that computes the same as W [out, in] with its factors.  float32 [out, in]"""
    pair = KINDS[adapter.kind][1](W.unsqueeze(0), adapter.r, adapter.alpha)
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
    """Write the checkpoint `base` with an adapter, given by matrix, folded in; in another dtype if one is given."""
    config, weights = read_config(base), weights_of(base)
    adapted = {f"{hub_name(matrix, config)}.weight": pair for matrix, pair in factors.items()}
    sizes = {key: math.prod(weight.shape) * (dtype or weight.dtype).itemsize for key, weight in weights.items()}
    print(
        f"merged checkpoint: {sum(sizes.values()):,} bytes, {len(adapted):,} of {len(weights):,} weights change",
        flush=True,
    )
    check_space(out, sum(sizes.values()))
    merged = (
        (key, (fold(W, adapted[key], adapter) if key in adapted else W).to(dtype or W.dtype))
        for key, W in read_whole(weights)
    )
    # `dtype` is the newer name of torch_dtype
    hub = {key: value for key, value in config.hub.items() if not (dtype and key == "dtype")}
    hub |= {"torch_dtype": str(dtype).removeprefix("torch.")} if dtype else {}
    write_checkpoint(out, sizes, merged, hub, shard_bytes)
    for name in BESIDE:
        if (base / name).is_file():
            shutil.copyfile(base / name, out / name)


@torch.no_grad()
def check_merged(merged: Path, folder: Path, base: Path, items: list[data.Encoded]) -> str | None:
    """Compare the checkpoint `merged` with `base` and the adapter in `folder`, and print it.  -> what is wrong, or None

    Weights must be what hellora.merge makes, up to the order of a sum. Logits must be those of base and adapter at a
    typical token; a few tokens are sent to another expert by the least change.
    """
    dtypes = {weight.dtype for weight in weights_of(merged).values()}
    rounds = dtypes != {torch.float32}
    dtype = reduce(torch.promote_types, dtypes | {weight.dtype for weight in weights_of(base).values()})

    def logits(model: MoETransformer) -> Tensor:
        return torch.cat([model(torch.tensor([item.ids]))[0][0] for item in items]).float()  # [T, V]

    model = load_model(base, dtype)
    unadapted = logits(model)
    adapters.load_adapter(model, folder)
    expected = logits(model)
    hellora.merge(model)
    views, wrong = hub_views(model), []
    for key, W in read_whole(weights_of(merged)):
        want = views[key].to(W.dtype).float()
        if not (W.float() - want).abs().sum() <= 1e-5 * want.abs().sum():  # so that NaN is wrong too
            wrong.append(key)
    del model, views  # one model at a time
    got = logits(load_model(merged, dtype))

    effect, error = ((x - expected).abs().amax(-1) for x in (unadapted, got))  # [T] each
    agree = int((got.argmax(-1) == expected.argmax(-1)).sum())
    print(
        f"check on {len(items)} examples, {len(got):,} tokens, in {str(dtype).removeprefix('torch.')}: "
        f"logits go up to {expected.abs().max():.3g}",
        f"the adapter moves them by {effect.median():.2g} at a typical token, by {effect.max():.2g} at most",
        f"the merged checkpoint differs from base and adapter by {error.median():.2g} at a typical token, by "
        f"{error.max():.2g} at most; top-1 agrees at {agree:,} of {len(got):,}"
        + (" (16 bits round; --dtype float32 does not)" if rounds else ""),
        sep="\n",
        flush=True,
    )
    if wrong:
        return f"{len(wrong)} weights are not what the adapter makes of the base, the first is {wrong[0]}"
    tolerance = 0.05 if rounds else 1e-4  # of the largest logit
    if not error.median() <= tolerance * expected.abs().max():
        return f"at a typical token logits differ by more than {tolerance:g} of the largest one"
    return None


# -------------------------------------------------------------------------------------------------- the command


def check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"{folder.parent} has {free:,} bytes free, {size:,} are needed; name another place")


@contextmanager
def complete_or_gone(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that gets its name when all went well, and is removed if not.

    Raises InputError if `out` exists and is not an empty folder, and if it cannot be written.
    """
    out = out.resolve()
    part = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out {out} exists and is not empty; name another folder")
        part.mkdir(parents=True)
        yield part
        for file in part.iterdir():
            file.chmod(part.stat().st_mode & 0o666)  # safetensors writes for the owner's eyes only
        if out.exists():
            out.rmdir()
        part.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"--out {out} cannot be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(description="Export a run of train.py as a merged checkpoint, or as an adapter for PEFT.")
    parser.add_argument("run", help="run folder of train.py")
    parser.add_argument("--to", required=True, choices=("merged", "peft"), help="what to write")
    parser.add_argument("--out", required=True, help="folder to write; new or empty")
    parser.add_argument("--model", help="where the base model is (default: where the run had it)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: the base's; peft: float32"
    )
    parser.add_argument("--compact", action="store_true", help="peft: no cold experts; not for transformers 5 or vLLM")
    parser.add_argument("--examples", type=cli.number(int, 1), help="merged: examples to compare on (default: 4)")
    parser.add_argument("--train-data", help="merged: a local copy of the training file, which these are from")
    args = parser.parse_args(argv)
    others = {"merged": ("compact",), "peft": ("examples", "train_data")}[args.to]
    for flag in (f"--{name.replace('_', '-')}" for name in others if getattr(args, name)):
        raise InputError(f"{flag} has no meaning with --to {args.to}; leave it out")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_flags(argv)
    if not cli.is_main_process():
        return
    run = completions.run_config(args.run)
    if run is None:
        raise InputError(f"{args.run} is not a run folder of train.py; want one with config.json and adapter/")
    settings, folder = run["settings"], Path(args.run) / "adapter"
    if settings["method"] == "fft":
        raise InputError(f"{args.run} is a run of fft and has no adapter: its model/ is a whole checkpoint already")
    base_name = args.model or run["model"]
    base = resolve(base_name)
    config = read_config(base)
    adapter, factors = read_factors(folder, config)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    if args.to == "peft":
        with complete_or_gone(Path(args.out)) as out:
            dtype = dtype or torch.float32
            small, whole = (peft_bytes(adapter, config, compact, dtype) for compact in (True, False))
            print(
                f"adapter for PEFT: {small:,} bytes, hot experts alone"
                if args.compact
                else f"adapter for PEFT: {whole:,} bytes, zeros for cold experts included (--compact: {small:,})",
                flush=True,
            )
            if config.model_type not in UNDER_5:
                print(f"PEFT loads adapters of {config.model_type} under transformers 4 only; for 5 use --to merged")
            check_space(out, small if args.compact else whole)
            is_local = base_name == "tiny" or Path(base_name).exists()
            name = str(base.resolve()) if is_local else base_name
            write_peft(out, adapter, factors, config, name, compact=args.compact, dtype=dtype)
    else:
        source = args.train_data or settings["train_data"]
        examples = data.load_examples(settings["task"], "train", source, args.examples or 4)
        tokenizer = data.load_tokenizer(base, config)
        items = data.encode(examples, tokenizer, config.eos_token_id, settings["max_length"])
        with complete_or_gone(Path(args.out)) as out:
            write_merged(out, adapter, factors, base, dtype=dtype)
            wrong = check_merged(out, folder, base, items)
            if wrong:
                raise SystemExit(f"error: {wrong}; nothing was kept")
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    print(f"wrote {args.out}: {size:,} bytes with everything")


if __name__ == "__main__":
    cli.run(main)
