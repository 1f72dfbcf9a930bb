"""Check the results of a GPU, then measure its speed and memory, in one command.

    python bench.py gpu --json results/gpu.json                  # a CUDA GPU of 40 GB or more: at most ten minutes
    python bench.py gpu --device cpu --shape small               # the rehearsal

First the checks of benchmarks/gpu_checks.py. Then training steps at the full size of OLMoE-1B-7B with random bfloat16
weights: each method beside the frozen model, and beside transformers + peft. Then decoding. Nothing is downloaded. The
last lines are tables for docs/speed.md.
"""

import gc
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import median

import torch
from torch import Tensor

import hellora
from command import cli
from command.cli import InputError, RunError, flag, say
from command.files import writable, write_json
from data import Batch
from hub.config import PRESETS
from lab.benchmarks.flops import adapter_flops, model_flops
from lab.benchmarks.generate import LENGTHS, decode_ours, decode_theirs, draw_lengths
from lab.benchmarks.gpu_checks import Check, run_checks
from lab.benchmarks.measure import allocated_peak, nbytes, seconds
from lab.benchmarks.subjects import PEERS, attach, make_ours, make_peer, our_model, transformers_model
from lab.benchmarks.workload import SHAPE, make_batches
from model import MoETransformer
from profile import profile_routing
from run import memory

NAMES = ("floor", "hellora", "lora", "dora", "peft-all")
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """What is measured."""

    shape: dict  # config.json of the model
    k: int  # hot experts per layer
    rank: int
    batch: int  # sequences of a step, as long as GSM8K's
    steps: int  # timed of each row
    prompts: int  # to decode, as long as GSM8K's, and as many slots
    matmul: int  # side of the matrices that the speed of the device is measured with


SIZES = {
    "full": Size(PRESETS["olmoe-1b-7b"], k=8, rank=32, batch=16, steps=10, prompts=64, matmul=8192),
    "small": Size(SHAPE, k=8, rank=8, batch=4, steps=3, prompts=4, matmul=1024),
}


# ---------------------------------------------------------------------------------------------------- what is measured


def matmul_speed(n: int, device: torch.device) -> float:
    """The device's own speed in bfloat16: multiplications and additions per second of the best of ten products."""
    a, b = (torch.randn(n, n, device=device).to(DTYPE) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(10))


def host_waits(work: Callable[[], object], device: torch.device) -> dict[str, int] | None:
    """How often the host waits for the GPU in `work`, by file and line. None on a CPU, which waits for nothing."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [warning for warning in caught if "synchronizing" in str(warning.message)]
    return dict(Counter(f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits))


def planned(name: str, base: MoETransformer, hot: Tensor, rank: int, batch: Batch) -> int | None:
    """Bytes that `memory.plan` says one process needs. It plans what trains: not the floor, and not peers."""
    if name == "floor" or name in PEERS:
        return None
    sizes = {"num_processes": 1, "sharded": False, "tokens": int(batch.lengths.sum())}
    attached = partial(attach, name, hot=hot, rank=rank)
    return memory.plan(base.config, lambda model: attached(model=model), dtype=DTYPE, **sizes).total


def measure(name: str, base: MoETransformer, hot: Tensor, size: Size, batch: Batch) -> dict:
    """One row: speed and memory of training steps on a batch. Raises ImportError for a peer that is not installed."""
    device = base.lm_head.weight.device
    subject = make_peer(name, base, size.rank) if name in PEERS else make_ours(name, base, hot, size.rank)
    step = partial(subject.step, batch)
    try:
        step()  # warm up; the optimizer allocates its moments
        times = [seconds(step, device) for _ in range(size.steps)]
        flops = model_flops(base.config, batch, to_embeddings=name == "floor")
        flops += 0 if name in PEERS else adapter_flops(subject.model, batch)
        return {
            "name": name,
            "samples_per_s": size.batch / median(times),
            "tokens_per_s": int(batch.lengths.sum()) / median(times),
            "flops_per_s": flops / median(times),
            "peak_bytes": nbytes(subject.resident()) + allocated_peak(step, device),
            "planned_bytes": planned(name, base, hot, size.rank, batch),
            "host_waits": host_waits(step, device),
            "seconds": times,
        }
    finally:
        subject.release()


def measure_all(base: MoETransformer, size: Size, speed: float) -> list[dict]:
    """A row of each of NAMES. One that cannot run says why."""
    device = base.lm_head.weight.device
    (batch,) = make_batches(size.batch, 1, base.config.vocab_size, device)
    hot = hellora.select_experts("hot", profile_routing(base, [batch]).counts, size.k)
    rows = []
    for name in NAMES:
        try:
            row = measure(name, base, hot, size, batch)
            over = row["samples_per_s"] / (rows[0] if rows else row)["samples_per_s"]
            rows.append(row | {"over_floor": over, "share_of_matmul": row["flops_per_s"] / speed})
        except ImportError as error:
            rows.append({"name": name, "note": f"{error.name} is not installed"})
        except torch.OutOfMemoryError:
            rows.append({"name": name, "note": "out of memory"})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        say(step_row(rows[-1]))
    return rows


def measure_decoding(base: MoETransformer, size: Size) -> list[dict]:
    """Greedy decoding by this code and by transformers, on the same weights, prompts and answer lengths."""
    rng, device = Random(0), base.lm_head.weight.device
    lengths = {name: draw_lengths(deciles, size.prompts, rng) for name, deciles in LENGTHS.items()}
    prompts = [[rng.randrange(base.config.vocab_size) for _ in range(n)] for n in lengths["prompt"]]
    sides = {"hellora": (decode_ours, lambda: base), "transformers": (decode_theirs, lambda: transformers_model(base))}
    rows = []
    for name, (decode, model) in sides.items():
        try:
            work = partial(decode, model(), prompts, lengths["answer"], size.prompts)
            work()  # warm up
            spent = seconds(work, device)
            tokens = sum(lengths["answer"])
            rows.append({"name": name, "samples_per_s": size.prompts / spent, "tokens_per_s": tokens / spent})
        except ImportError as error:
            rows.append({"name": name, "note": f"{error.name} is not installed"})
    return rows


# --------------------------------------------------------------------------------------------------------- the report

STEP_HEAD = """| | samples/s | / floor | share of matmul | peak GB | planned GB | waits for the GPU |
|---|---|---|---|---|---|---|"""
DECODING_HEAD = """| | samples/s | tokens/s |
|---|---|---|"""


def step_row(row: dict) -> str:
    """A row of the table of training steps."""
    if "note" in row:
        return f"| {row['name']} | not run: {row['note']} | | | | | |"
    waits = "not counted on a CPU" if row["host_waits"] is None else sum(row["host_waits"].values())
    cells = [f"{row['samples_per_s']:.2f}", f"{row['over_floor']:.2f}", f"{row['share_of_matmul']:.2f}"]
    cells += [
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{row['planned_bytes'] / 1e9:.2f}" if row["planned_bytes"] else "",
        waits,
    ]
    return f"| {row['name']} | {' | '.join(map(str, cells))} |"


def decoding_row(row: dict) -> str:
    if "note" in row:
        return f"| {row['name']} | not run: {row['note']} | |"
    return f"| {row['name']} | {row['samples_per_s']:.2f} | {row['tokens_per_s']:,.0f} |"


def check_row(check: Check) -> str:
    verdict = "passed" if check.passed else "FAILED"
    return f"{verdict}  {check.error:8.1e} of at most {check.limit:.0e}  {check.name}"


def explain_waits(rows: list[dict]) -> list[str]:
    """Where the host waits for the GPU in a step of hellora, line by line."""
    waits = next((row["host_waits"] for row in rows if row["name"] == "hellora" and "host_waits" in row), None)
    return [f"hellora waits {n} times in {place}" for place, n in (waits or {}).items()]


@dataclass(frozen=True)
class Settings:
    """The flags of `bench.py gpu`."""

    device: str = flag("cuda", "cpu: a rehearsal without a GPU", choices=("cuda", "cpu"))
    shape: str = flag("full", "OLMoE-1B-7B, or a quarter of its width and depth", choices=list(SIZES))
    json: str | None = flag(None, "write checks and rows to this file", metavar="FILE")


def find_device(name: str) -> torch.device:
    """The device asked for. Raises InputError if it is not there, or not what train.py would take."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU; add --device cpu --shape small to rehearse without one")
    if name == "cpu" and torch.cuda.is_available():
        raise InputError("--device cpu: there is a GPU; set CUDA_VISIBLE_DEVICES to nothing to rehearse without it")
    return torch.device(name)


def main(argv: list[str] | None = None) -> dict:
    """Check, measure and print; -> what is written to --json. Raises RunError at the end if a check failed."""
    about = "Check a GPU, then measure training and decoding on it."
    settings, began = cli.parse(Settings, argv, prog="bench.py gpu", description=about), time.perf_counter()
    out, device, size = settings.json and writable(settings.json), find_device(settings.device), SIZES[settings.shape]
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    checks = []
    for check in run_checks(device):
        checks.append(check)
        say(check_row(check))
    speed = matmul_speed(size.matmul, device)
    say(f"{where}, torch {torch.__version__}: bfloat16 matmul at {speed / 1e12:.3g} TFLOP/s")
    base = our_model(size.shape, device, DTYPE)
    steps = measure_all(base, size, speed)
    decoding = measure_decoding(base, size)
    found = {"device": where, "torch": torch.__version__, "shape": settings.shape, "matmul_flops_per_s": speed}
    found |= {"batch": size.batch, "rank": size.rank, "k": size.k, "prompts": size.prompts}
    found |= {"checks": [asdict(check) | {"passed": check.passed} for check in checks]}
    found |= {"steps": steps, "decoding": decoding, "seconds": time.perf_counter() - began}
    if out:
        write_json(out, found)
    say("", f"{where}, bfloat16, batch {size.batch}, rank {size.rank}, k {size.k}:", "", STEP_HEAD)
    say(
        *map(step_row, steps), "", *explain_waits(steps), f"Decoding {size.prompts} prompts at once:", "", DECODING_HEAD
    )
    say(*map(decoding_row, decoding), "", f"{len(checks)} checks and all rows took {found['seconds']:.0f} s")
    if failed := [check.name for check in checks if not check.passed]:
        raise RunError(f"{len(failed)} of {len(checks)} checks failed: {', '.join(failed)}")
    return found
