"""Time and memory of a training step: each method beside the frozen base, and beside transformers + peft.

    python bench.py step                                      # batches of 8 and of 32
    python bench.py step --batch 8 --k 16 --names floor hellora --json step.json
    python bench.py step --shape full                         # OLMoE-1B-7B's own size: a GPU of 40 GB or more

The frozen base, whose row is named `floor`, is the model alone: all weights are frozen, and there is no adapter. It
runs forward, and backward to the input of every layer. A step is forward, backward, optimizer step and clearing the
gradients. All rows are timed in turn in one process, on the same batches. At full size they come one after the other,
since only one model fits. Compare the ratios: the absolute numbers depend on the machine.

The model has random weights, and by default the shape of OLMoE-1B-7B at a quarter of its width and depth. Rank 8 is a
quarter of the paper's 32, so that adapters have their real share of the multiplications. Lengths follow GSM8K's under
OLMoE's tokenizer. Token ids follow Zipf's law, so that routing is as skewed as on text. The hot experts are profiled on
the same data.

Dimensions: L layers, E experts per layer.
"""

import gc
from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import median

import numpy as np
import torch

import hellora
import ops
from command import cli
from command.cli import InputError, flag, say
from command.files import writable, write_json
from data import Batch
from lab.benchmarks.flops import adapter_flops, model_flops, peft_flops
from lab.benchmarks.measure import (
    allocated_peak,
    grouped_matmul_speed,
    host_waits,
    nbytes,
    saved_bytes,
    seconds,
    take_turns,
    times_as_fast,
)
from lab.benchmarks.subjects import BY_NUMBER, COMPILED, OURS, PEERS, PLACED, Subject, make_subject, our_model, sharing
from lab.benchmarks.workload import SHAPES, make_batches
from lab.markdown import grid
from machine.processes import DTYPE_HELP, DTYPES, default_dtype, freed_memory_kept
from model import MoEConfig
from profile import profile_routing

NAMES = ("floor", *OURS, "fft", *PEERS)
RANKS, BATCHES = {"small": 8, "full": 32}, {"small": [8, 32], "full": [16]}
EVERY = (*NAMES, "moe-sieve", *PLACED, *BY_NUMBER)
NAMES_HELP = "rows to measure; also moe-sieve, METHOD-pure, METHOD-gate, hellora-kN; or all of these; ROW-compiled"
POSITIVE = cli.number(int, 1)
EXAMPLES = 32  # timed in one repetition: four batches of 8, or one of 32


@dataclass(frozen=True)
class Settings:
    """The flags of `bench.py step`."""

    shape: str = flag("small", "a quarter of OLMoE-1B-7B's width and depth, or its full size", choices=list(SHAPES))
    batch: list[int] | None = flag(None, "sequences per step (default: 8 32, full size 16)", type=POSITIVE, nargs="+")
    k: int = flag(8, "hot experts per layer", type=POSITIVE)
    rank: int | None = flag(None, "LoRA rank r (default: 8, full size 32); alpha is 2 r", type=POSITIVE)
    dtype: str | None = flag(None, DTYPE_HELP, choices=DTYPES)
    names: tuple[str, ...] = flag(NAMES, NAMES_HELP, nargs="+", choices=(*EVERY, *COMPILED, "all"), metavar="ROW")
    repeats: int = flag(5, "times each row is timed", type=POSITIVE)
    json: str | None = flag(None, "write the rows", metavar="FILE")


# ------------------------------------------------------------------------------------------------------- measurement


def measure(settings: Settings, batch: int, **changes: int) -> list[dict]:
    """The rows of one size of batch. changes: of the shape's config.json."""
    shape, dtype = SHAPES[settings.shape] | changes, getattr(torch, settings.dtype)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batches = make_batches(batch, max(1, EXAMPLES // batch), shape["vocab_size"], device)
    base = our_model(shape, device, dtype)
    counts = profile_routing(base, batches).counts  # [L, E]
    numbers = BY_NUMBER | {"moe-sieve": counts.shape[1] // 4}
    profiling = median(seconds(lambda: profile_routing(base, batches), device) for _ in range(settings.repeats))
    routed = int(batches[0].lengths.sum()) * base.config.num_experts_per_tok
    with freed_memory_kept(device):
        fastest = grouped_matmul_speed(base.layers[0].mlp.experts.gate_up_proj, routed)
        say(f"grouped matmul of {routed:,} rows: {fastest / 1e9:.0f} GFLOP/s")
        config = base.config
        base = base if settings.shape == "small" else None  # at full size one model at a time fits
        absent = {name: why for name in settings.names if (why := missing(name, dtype))}
        present = [name for name in settings.names if name not in absent]
        rows, times = [], {}
        for group in [present] if settings.shape == "small" else [[name] for name in present]:
            try:
                subjects = []
                for name in group:
                    hot = hellora.select_experts("hot", counts, numbers.get(name, settings.k))
                    own = base is None or name == "fft"  # trains the weights
                    model = our_model(shape, device, dtype) if own else sharing(base)
                    subjects.append(make_subject(name, model, hot, settings.rank))
                for subject in subjects:
                    subject.step(batches[0])  # warm up; the optimizer allocates its moments
                sides = {subject.name: subject.step for subject in subjects}
                times |= take_turns(sides, batches, settings.repeats, device)
                rows += [subject_row(subject, config, batches, times[subject.name]) for subject in subjects]
            except torch.OutOfMemoryError:
                absent |= dict.fromkeys(group, "out of memory")
            subjects = []
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    for row in rows:
        mine = times[row["name"]]
        row |= {f"over_{other}": times_as_fast(mine, times[other]) for other in ("floor", *PEERS) if other in times}
        row |= {"dtype": settings.dtype, "share_of_matmul": row["flops_per_s"] / fastest}
    for name, why in absent.items():
        rows.append({"name": name, "batch": batch, "samples_per_s": None, "note": why})
    if "hellora" in times:
        share = 0.1 * profiling / (0.1 * profiling + 3 * time_of_all(times["hellora"]))
        hot_share = float((counts * hellora.select_experts("hot", counts, settings.k)).sum() / counts.sum())
        rows.append({"name": "profile", "batch": batch, "samples_per_s": batch * len(batches) / profiling})
        rows[-1] |= {"share": share, "hot_share": hot_share}
    return rows


def missing(name: str, dtype: torch.dtype) -> str | None:
    """Why a row cannot be measured; None if it can."""
    if name == "fft" and dtype != torch.float32:
        return "weights that train are float32"
    if name in COMPILED:
        try:
            ops.compile_elementwise(torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype)
        except InputError as error:
            return str(error)
    lacks = [package for package in ("transformers", "peft") if name in PEERS and not find_spec(package)]
    return f"{lacks[0]} is not installed" if lacks else None


def time_of_all(spent: np.ndarray) -> float:
    """Seconds for every batch once: the median of each.  spent [repeats, batches]"""
    return float(np.median(spent, axis=0).sum())


def subject_row(subject: Subject, config: MoEConfig, batches: list[Batch], spent: np.ndarray) -> dict:
    """Speed, memory and adapter FLOPs of one subject.  spent [repeats, batches]

    `flops_per_s` counts the multiplications and additions that the frozen base and our adapters need on the real
    tokens. What a peer computes beyond, on padding or to form B A, does not count; nor do gradients of base weights.
    """
    first, is_peer = batches[0], subject.name in PEERS
    to_embeddings = subject.name in ("floor", "floor-compiled", "fft")
    needed = sum(model_flops(config, batch, to_embeddings=to_embeddings) for batch in batches)
    needed += 0 if is_peer else sum(adapter_flops(subject.model, batch) for batch in batches)
    device, total = first.input_ids.device, time_of_all(spent)
    return {
        "name": subject.name,
        "batch": len(first.lengths),
        "samples_per_s": len(first.lengths) * len(batches) / total,
        "tokens_per_s": sum(int(batch.lengths.sum()) for batch in batches) / total,
        # weights, moments, gradients, activations
        "peak_bytes": nbytes(subject.resident()) + allocated_peak(lambda: subject.step(first), device),
        "saved_bytes": saved_bytes(lambda: subject.loss(first), subject.resident()),
        "host_waits": host_waits(lambda: subject.step(first), device),
        "adapter_flops": (peft_flops if is_peer else adapter_flops)(subject.model, first),
        "flops_per_s": needed / total,
        "seconds": spent.flatten().tolist(),
    }


# ------------------------------------------------------------------------------------------------------- the command


def show(rows: list[dict]) -> None:
    """Print one table, where the host waits for the GPU, and what counting costs."""
    others = [name for name in ("floor", *PEERS) if any(f"over_{name}" in row for row in rows)]
    heads = ["", "batch", "samples/s", "tokens/s", *(f"/ {name}" for name in others)]
    heads += ["peak MB", "saved MB", "adapter GFLOP", "GFLOP/s", "/ matmul"]
    lines, notes = [], []
    for row in rows:
        if row["samples_per_s"] is None:
            notes.append(f"{row['name']}: not run, {row['note']}")
        elif row["name"] == "profile":
            notes.append(
                f"counting a tenth of the data takes {row['share']:.1%} of the time of 3 epochs; the hot experts "
                f"receive {row['hot_share']:.0%} of the routed tokens"
            )
        else:
            lines.append([
                row["name"], str(row["batch"]), f"{row['samples_per_s']:.2f}", f"{row['tokens_per_s']:,.0f}",
                *(f"{row[f'over_{name}']:.2f}" for name in others),
                f"{row['peak_bytes'] / 1e6:,.0f}", f"{row['saved_bytes'] / 1e6:,.1f}",
                f"{row['adapter_flops'] / 1e9:,.1f}", f"{row['flops_per_s'] / 1e9:,.0f}",
                f"{row['share_of_matmul']:.2f}",
            ])  # fmt: skip
            waits = row["host_waits"] or {}
            notes += [f"{row['name']} waits for the GPU {count} times in {place}" for place, count in waits.items()]
    say(*grid(heads, lines), *notes)


def main(argv: list[str]) -> list[dict]:
    settings = cli.parse(
        Settings,
        argv,
        prog="bench.py step",
        description="Time and memory of a training step.",
        example="OMP_NUM_THREADS=2 python bench.py step --batch 8 --names floor hellora lora",
    )
    num_experts = SHAPES[settings.shape]["num_experts"]
    if settings.k > num_experts:
        raise InputError(f"--k {settings.k}: expected 1..{num_experts}, the experts of a layer")
    out = settings.json and writable(settings.json)
    dtype, rank = settings.dtype or default_dtype(), settings.rank or RANKS[settings.shape]
    settings = replace(settings, dtype=dtype, rank=rank, names=EVERY if "all" in settings.names else settings.names)
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    size = f"hidden {SHAPES[settings.shape]['hidden_size']}, rank {rank}, k {settings.k}"
    say(f"{where}, torch {torch.__version__}; {size}, {dtype}", "floor: the frozen base alone")
    rows = []
    for batch in settings.batch or BATCHES[settings.shape]:
        part = measure(settings, batch)
        show(part)
        rows += part
    if out:
        write_json(out, rows)
    return rows
