"""Time and memory of a training step: each method beside the frozen model, and beside transformers + peft.

    python bench.py step                                      # batches of 8 and of 32
    python bench.py step --json step.json --plot step.png
    python bench.py step --batch 8 --sweep k --plot k.png     # how time and memory grow with k

`floor` is the model alone: all weights are frozen, and there is no adapter; it runs forward, and backward to the input
of every layer. A step is forward, backward, optimizer step and clearing the gradients. All rows are timed in turn in
one process, on the same batches. Compare the ratios: the absolute numbers depend on the machine.

The model has the shape of OLMoE-1B-7B at a quarter of its width and depth, with random weights. Rank 8 is a quarter of
the paper's 32, so that adapters have their real share of the multiplications. Lengths follow GSM8K's under OLMoE's
tokenizer. Token ids follow Zipf's law, so that routing is as skewed as on text. The hot experts are profiled on the
same data.

Dimensions: L layers, E experts per layer.
"""

from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import median

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import hellora
from command import cli
from command.cli import InputError, flag, say
from command.files import writable, write_json
from data import Batch
from lab.benchmarks.flops import adapter_flops, model_flops, peft_flops
from lab.benchmarks.measure import allocated_peak, grouped_matmul_speed, nbytes, saved_bytes, seconds
from lab.benchmarks.subjects import OURS, PEERS, Subject, make_ours, make_peer, our_model
from lab.benchmarks.workload import SHAPE, make_batches
from model import MoEConfig, MoETransformer
from profile import profile_routing
from run.processes import DTYPE_HELP, DTYPES, default_dtype, freed_memory_kept

NAMES = ("floor", *OURS, "fft", *PEERS)
SWEEPS = {  # --sweep -> the values tried
    "k": (1, 2, 4, 8, 16, 32, 64),
    "experts": (16, 32, 64, 128),
    "length": (64, 128, 256, 512),
    "batch": (1, 2, 4, 8, 16, 32),
    "rank": (1, 2, 4, 8, 16, 32, 64),
}
SWEPT = ("floor", "hellora", "lora")
POSITIVE = cli.number(int, 1)
EXAMPLES = 32  # timed in one repetition: four batches of 8, or one of 32


@dataclass(frozen=True)
class Case:
    """What one table measures: these rows, on one model and one size of batch."""

    names: tuple[str, ...]
    shape: dict  # config.json of the model
    batch: int
    k: int
    rank: int
    repeats: int
    device: torch.device
    dtype: torch.dtype  # of base model and products
    length: int | None = None  # of every sequence; None: as GSM8K's


# ------------------------------------------------------------------------------------------------------- measurement


def measure(case: Case) -> list[dict]:
    """The rows of one table."""
    count = max(1, EXAMPLES // case.batch)
    batches = make_batches(case.batch, count, case.shape["vocab_size"], case.device, case.length)
    base = our_model(case.shape, case.device, case.dtype)
    counts = profile_routing(base, batches).counts
    hot = hellora.select_experts("hot", counts, case.k)
    subjects, rows = [], []
    for name in case.names:
        if why := missing(name, case):
            say(f"{name}: not run, {why}")
            keys = ("samples_per_s", "tokens_per_s", "over_floor", "peak_bytes", "saved_bytes", "adapter_flops")
            rows.append({"name": name, "batch": case.batch, **dict.fromkeys(keys), "note": why})
        else:
            subjects.append(make_subject(name, case, base, hot))
    with freed_memory_kept(case.device):
        times = take_turns(subjects, batches, case)
        routed = int(batches[0].lengths.sum()) * base.config.num_experts_per_tok
        fastest = grouped_matmul_speed(base.layers[0].mlp.experts.gate_up_proj, routed)
    say(f"grouped matmul of {routed:,} rows: {fastest / 1e9:.0f} GFLOP/s")
    rows += [subject_row(subject, batches, times, case, fastest) for subject in subjects]
    if "hellora" in times:
        rows.append(profile_row(base, batches, counts, hot, times["hellora"], case))
    return rows


def missing(name: str, case: Case) -> str | None:
    """Why a row cannot be measured; None if it can."""
    if name == "fft" and case.dtype != torch.float32:
        return "weights that train are float32"
    lacks = [package for package in ("transformers", "peft") if name in PEERS and not find_spec(package)]
    return f"{lacks[0]} is not installed" if lacks else None


def make_subject(name: str, case: Case, base: MoETransformer, hot: Tensor) -> Subject:
    """The model of one row."""
    if name in PEERS:
        return make_peer(name, base, case.rank)
    return make_ours(name, our_model(case.shape, case.device, case.dtype), hot, case.rank)


def take_turns(subjects: list[Subject], batches: list[Batch], case: Case) -> dict[str, np.ndarray]:
    """Seconds of each subject's steps, timed in turn.  -> [repeats, batches] each"""
    for subject in subjects:
        subject.step(batches[0])  # warm up; the optimizer allocates its moments
    times = {subject.name: [] for subject in subjects}
    turns = range(case.repeats * len(batches))
    for turn in tqdm(turns, f"batch {case.batch}", unit="turn", disable=None):  # None: only on a terminal
        batch = batches[turn % len(batches)]
        forward = (turn + turn // len(batches)) % 2  # a batch meets both orders
        for subject in subjects if forward else subjects[::-1]:
            times[subject.name].append(seconds(lambda s=subject, b=batch: s.step(b), case.device))
    return {name: np.reshape(spent, (case.repeats, len(batches))) for name, spent in times.items()}


def times_as_fast(seconds: np.ndarray, others: np.ndarray) -> float:
    """Speed relative to another's on the same batches, timed in turn.  seconds, others [repeats, batches]

    For each batch the median of the ratios, since the machine's own speed changes from turn to turn. Of these the mean
    weighted by time, since batches differ: some have more padding.
    """
    weight = np.median(seconds, axis=0)  # [batches]
    return float(np.average(np.median(others / seconds, axis=0), weights=weight))


def time_of_all(spent: np.ndarray) -> float:
    """Seconds for every batch once: the median of each.  spent [repeats, batches]"""
    return float(np.median(spent, axis=0).sum())


def subject_row(
    subject: Subject, batches: list[Batch], times: dict[str, np.ndarray], case: Case, fastest: float
) -> dict:
    """Speed, memory and adapter FLOPs of one subject.  fastest: FLOP/s of the best grouped matmul

    `flops_per_s` counts the multiplications and additions that the frozen model and our adapters need on the real
    tokens. What a peer computes beyond, on padding or to form B A, does not count; nor do gradients of base weights.
    """
    spent = times[subject.name]
    over = {name: times_as_fast(spent, times[name]) for name in ("floor", *PEERS) if name in times}
    count = peft_flops if subject.name in PEERS else adapter_flops
    config, to_embeddings = MoEConfig.from_dict(case.shape), subject.name in ("floor", "fft")
    needed = sum(model_flops(config, batch, to_embeddings=to_embeddings) for batch in batches)
    needed += 0 if subject.name in PEERS else sum(adapter_flops(subject.model, batch) for batch in batches)
    return {
        "name": subject.name,
        "batch": case.batch,
        "dtype": str(case.dtype).removeprefix("torch."),
        "samples_per_s": case.batch * len(batches) / time_of_all(spent),
        "tokens_per_s": sum(int(batch.lengths.sum()) for batch in batches) / time_of_all(spent),
        "over_floor": over.pop("floor", None),
        **{f"over_{name}": ratio for name, ratio in over.items()},
        # weights, moments, gradients, activations
        "peak_bytes": nbytes(subject.resident()) + allocated_peak(lambda: subject.step(batches[0]), case.device),
        "saved_bytes": saved_bytes(lambda: subject.loss(batches[0]), subject.resident()),
        "adapter_flops": count(subject.model, batches[0]),
        "flops_per_s": needed / time_of_all(spent),
        "share_of_matmul": needed / time_of_all(spent) / fastest,
        "seconds": spent.flatten().tolist(),
    }


def profile_row(
    base: MoETransformer, batches: list[Batch], counts: Tensor, hot: Tensor, hellora_times: np.ndarray, case: Case
) -> dict:
    """What it costs to choose the experts, beside training on them for three epochs.  counts, hot [L, E]"""
    spent = median(seconds(lambda: profile_routing(base, batches), case.device) for _ in range(case.repeats))
    return {
        "name": "profile",
        "batch": case.batch,
        "samples_per_s": case.batch * len(batches) / spent,
        "share": 0.1 * spent / (0.1 * spent + 3 * time_of_all(hellora_times)),
        "hot_share": float((counts * hot).sum() / counts.sum()),
    }


# ------------------------------------------------------------------------------------------------------- the command


def show(rows: list[dict]) -> None:
    """Print one table."""
    peers = [f"over_{peer}" for peer in PEERS if any(f"over_{peer}" in row for row in rows)]
    ratios = "".join(f"{'/ ' + peer.removeprefix('over_'):>17}" for peer in peers)
    heads = f"{'':15}{'batch':>6}{'samples/s':>11}{'tokens/s':>10}{'/ floor':>9}{ratios}"
    say(f"{heads}{'peak MB':>9}{'saved MB':>10}{'adapter GFLOP':>15}{'GFLOP/s':>9}{'/ matmul':>10}")
    for row in rows:
        line = f"{row['name']:15}{row['batch']:6d}"
        if row["samples_per_s"] is None:
            say(f"{line}  not run: {row['note']}")
        elif row["name"] == "profile":
            say(
                f"{line}{row['samples_per_s']:11.2f}   counting a tenth of the data takes {row['share']:.1%} of the"
                f" time of 3 epochs; the hot experts receive {row['hot_share']:.0%} of the routed tokens"
            )
        else:
            ratio = "" if row["over_floor"] is None else f"{row['over_floor']:.2f}"
            ratios = "".join(f"{row[peer]:17.2f}" for peer in peers)
            line += f"{row['samples_per_s']:11.2f}{row['tokens_per_s']:10,.0f}{ratio:>9}{ratios}"
            line += f"{row['peak_bytes'] / 1e6:9,.0f}{row['saved_bytes'] / 1e6:10,.1f}"
            line += f"{row['adapter_flops'] / 1e9:15,.1f}{row['flops_per_s'] / 1e9:9,.0f}"
            say(f"{line}{row['share_of_matmul']:10.2f}")


@dataclass(frozen=True)
class Settings:
    """The flags of `bench.py step`."""

    batch: list[int] | None = flag(None, "sequences per step (default: 8 32; for a sweep 8)", type=POSITIVE, nargs="+")
    k: int = flag(8, "hot experts per layer", type=POSITIVE)
    rank: int = flag(8, "LoRA rank r; alpha is 2 r", type=POSITIVE)
    dtype: str | None = flag(None, DTYPE_HELP, choices=DTYPES)
    names: tuple[str, ...] = flag(NAMES, "rows to measure", nargs="+", choices=NAMES)
    repeats: int = flag(5, "times each row is timed, in turn", type=POSITIVE)
    sweep: str | None = flag(None, f"measure {', '.join(SWEPT)} for several values of this", choices=list(SWEEPS))
    json: str | None = flag(None, "write the rows", metavar="FILE")
    plot: str | None = flag(None, "draw the rows", type=cli.picture, metavar="FILE")


def main(argv: list[str]) -> list[dict]:
    settings = cli.parse(Settings, argv, prog="bench.py step", description="Time and memory of a training step.")
    sweep, sizes = settings.sweep, settings.batch or ([8] if settings.sweep else [8, 32])
    if settings.k > SHAPE["num_experts"]:
        raise InputError(f"--k {settings.k}: want 1..{SHAPE['num_experts']}, the experts of a layer")
    if sweep and len(sizes) > 1:
        raise InputError(f"--sweep {sweep} measures one batch size, --batch names {len(sizes)}; give one")
    out, picture = (file and writable(file) for file in (settings.json, settings.plot))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    name = settings.dtype or default_dtype()
    shape = f"hidden {SHAPE['hidden_size']}, rank {settings.rank}, k {settings.k}"
    say(f"{where}, torch {torch.__version__}; {shape}, {name}")
    dtype = getattr(torch, name)
    case = Case(tuple(settings.names), SHAPE, sizes[0], settings.k, settings.rank, settings.repeats, device, dtype)
    rows = []
    for value in SWEEPS[sweep] if sweep else sizes:
        if sweep:
            say(f"{sweep} {value}")
            change = {"shape": {**SHAPE, "num_experts": value}} if sweep == "experts" else {sweep: value}
            part = measure(replace(case, names=SWEPT, **change))
            rows += [{"sweep": sweep, "value": value, **row} for row in part]
        else:
            part = measure(replace(case, batch=value))
            rows += part
        show(part)
    if out:
        write_json(out, rows)
    if picture:
        from lab.benchmarks import step_charts  # here, since importing matplotlib takes long

        (step_charts.lines if sweep else step_charts.bars)(rows, picture)
    return rows
