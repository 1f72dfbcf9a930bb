"""How long a computation takes, how much it allocates, how much autograd keeps of it, how often it waits for a GPU."""

import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity
from tqdm import tqdm


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """How long `work` takes, by CUDA events on a GPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


T = TypeVar("T")


def take_turns(
    sides: dict[str, Callable[[T], object]], batches: list[T], repeats: int, device: torch.device
) -> dict[str, np.ndarray]:
    """Seconds of each side's work on each batch, timed in turn, in alternating order.  -> [repeats, batches] each"""
    times = {name: np.empty((repeats, len(batches))) for name in sides}
    turns = tqdm(np.ndindex(repeats, len(batches)), total=repeats * len(batches), unit="turn", disable=None)
    for repeat, place in turns:  # disable=None: only on a terminal
        for name in list(sides)[:: -1 if (repeat + place) % 2 else 1]:
            times[name][repeat, place] = seconds(partial(sides[name], batches[place]), device)
    return times


def times_as_fast(seconds: np.ndarray, others: np.ndarray) -> float:
    """Speed relative to another's on the same batches, timed in turn.  seconds, others [repeats, batches]

    For each batch the median of the ratios, since the machine's own speed changes from turn to turn. Of these the mean
    weighted by time, since batches differ: some have more padding.
    """
    weight = np.median(seconds, axis=0)  # [batches]
    return float(np.average(np.median(others / seconds, axis=0), weights=weight))


def grouped_matmul_speed(W: Tensor, rows: int) -> float:
    """Multiplications and additions per second of the best grouped product with W [E, out, in], both ways, even groups.

    The groups have rows / E rows each: the best that the products of a layer with as many routed rows can come to.
    """
    E, fan_out, fan_in = W.shape
    each = max(1, rows // E)
    ends = torch.arange(each, E * each + 1, each, dtype=torch.int32, device=W.device)
    x, y = (torch.randn(E * each, n, device=W.device).to(W.dtype) for n in (fan_in, fan_out))
    with torch.no_grad():
        ways = (lambda: F.grouped_mm(x, W.mT, offs=ends), lambda: F.grouped_mm(y, W, offs=ends))
        return 2 * E * each * fan_out * fan_in / min(seconds(way, W.device) for way in ways for _ in range(7))


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind these tensors; a shared storage counts once."""
    return sum({(s := t.untyped_storage()).data_ptr(): s.nbytes() for t in tensors}.values())


@contextmanager
def no_stderr() -> Iterator[None]:
    """Hide stderr: some builds of torch write to it whenever the profiler starts."""
    kept = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def allocated_peak(work: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `work` has allocated at once, beyond what was allocated before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    with no_stderr(), torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return int(np.cumsum([0, *changes]).max())


def saved_bytes(forward: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Bytes that a forward pass keeps for its backward pass, beside the weights; a shared storage counts once."""
    kept = []

    def keep(t: Tensor) -> Tensor:  # detached: an operation that keeps its own output would otherwise keep itself alive
        kept.append(t.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        result = forward()  # noqa: F841 - keeps the graph
    own = {w.untyped_storage().data_ptr() for w in weights}
    return nbytes(t for t in kept if t.untyped_storage().data_ptr() not in own)


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
