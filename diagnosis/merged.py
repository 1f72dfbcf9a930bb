"""A merged checkpoint beside its base and, if given, the adapter that it should hold.

    comparison = compare(merged, base, config, readings)

The delta D of an adapter and the difference M - W of the checkpoints are compared by <M - W, D> / <D, D>: 1 if the
checkpoint holds the delta once, 0 if not at all, 2 if twice. Rounding to the checkpoint's dtype lowers what can be
reached, so `most` is the same number for W + D rounded once. One matrix of each checkpoint is in memory at a time.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diagnosis.findings import AS_READ
from diagnosis.measure import EMPTY, EXPERTS, MOVED, NOT_FINITE, UNMOVED, Matrix, place_of, state_of
from hellora import folded
from hub.checkpoint import WHOLE, Stored, read_slices
from hub.config import Family
from hub.peft import Reading
from model import MoEConfig

TRANSPOSED = "transposed"  # beside AS_READ and REORDERED


@dataclass
class Multiple:
    """How many times a set of matrices holds a delta: sums of products over its entries."""

    held: float = 0.0  # <M - W, D>
    reachable: float = 0.0  # <round(W + D) - W, D>
    square: float = 0.0  # <D, D>

    @property
    def times(self) -> float:
        return self.held / self.square if self.square else 0.0

    @property
    def most(self) -> float:
        return self.reachable / self.square if self.square else 0.0

    @property
    def is_lost(self) -> bool:
        """Whether most of the delta is rounded away in the checkpoint's dtype."""
        return self.square > 0 and self.most < 0.5


@dataclass
class Comparison:
    """What differs between a merged checkpoint and its base."""

    matrices: dict[str, Matrix] = field(default_factory=dict)  # all that changed, or should have
    entries: int = 0  # of these matrices
    unchanged: int = 0  # of these entries
    largest: float = 0.0  # |M - W| of any entry
    unexplained: list[str] = field(default_factory=list)  # keys that changed although the adapter has no pair for them
    without: list[str] = field(default_factory=list)  # keys that lack the delta, although their dtype could hold it
    experts: dict[str, Multiple] = field(default_factory=dict)  # by hypothesis on how the adapter was read

    def add(self, hypothesis: str, more: Multiple) -> None:
        """Add a matrix to the sums of a hypothesis."""
        total = self.experts.setdefault(hypothesis, Multiple())
        total.held += more.held
        total.reachable += more.reachable
        total.square += more.square

    @property
    def unchanged_share(self) -> float:
        """The share of the entries of `matrices` that are those of the base."""
        return self.unchanged / max(self.entries, 1)


@torch.no_grad()
def compare(
    merged: dict[str, Stored], base: dict[str, Stored], config: MoEConfig, readings: dict[str, Reading]
) -> Comparison:
    """Compare all weights. readings: the adapter AS_READ and, for packed stacks, REORDERED; {}: no adapter is given.

    The experts' matrices that do not hold the delta as read are compared with the other hypotheses.
    """
    result, reading, others = Comparison(), readings.get(AS_READ), [name for name in readings if name != AS_READ]
    if reading and 2 * config.intermediate_size == config.hidden_size:  # a transposed stack of gate and up would fit
        others.append(TRANSPOSED)
    for name, W, M in side_by_side(base, merged):
        key, W32 = name.removesuffix(".weight"), W.float()
        difference = M.float() - W32
        place, largest = place_of(key, config.family), float(difference.abs().max())
        norms = float(difference.norm()), float(W32.norm())
        if not math.isfinite(largest):
            result.matrices[key] = Matrix(place, NOT_FINITE, *norms)
            continue
        state = state_of(reading.pairs[key]) if reading and key in reading.pairs else EMPTY
        if state == EMPTY and not largest:
            continue
        if reading and state == EMPTY:
            result.unexplained.append(name)
        result.matrices[key] = Matrix(place, MOVED if largest else UNMOVED, *norms)
        result.entries += difference.numel()
        result.unchanged += difference.numel() - int(difference.count_nonzero())
        result.largest = max(result.largest, largest)
        if state in (EMPTY, NOT_FINITE):
            continue
        own = multiple(difference, W32, delta(key, W, reading, config.family), M.dtype)
        if own.held < 0.1 * own.reachable and own.reachable > 0.1 * own.square:
            result.without.append(name)
        if place.part == EXPERTS:
            result.add(AS_READ, own)
            for hypothesis in () if abs(own.held - own.reachable) <= 0.1 * own.square else others:
                D = delta(key, W, readings.get(hypothesis, reading), config.family, hypothesis == TRANSPOSED)
                result.add(hypothesis, multiple(difference, W32, D, M.dtype))
    return result


def multiple(difference: Tensor, W: Tensor, D: Tensor, dtype: torch.dtype) -> Multiple:
    """How many times a difference holds D, and would if W + D had been rounded to `dtype`.  all [out, in]"""
    rounded = (W + D).to(dtype).float().sub_(W)
    return Multiple(*(float(torch.dot(x.flatten(), D.flatten())) for x in (difference, rounded, D)))


def side_by_side(base: dict[str, Stored], merged: dict[str, Stored]) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Every weight's name, the base's tensor and the merged one. A file is opened once for each file of the other."""
    by_files: dict[tuple, list[str]] = {}
    for name in base:
        by_files.setdefault((base[name].file, merged[name].file), []).append(name)
    for names in by_files.values():
        whole = dict.fromkeys(names, WHOLE)
        both = read_slices(base, whole), read_slices(merged, whole, allow_nan=True)
        for (name, W), (_, M) in zip(*both, strict=True):
            yield name, W, M


def delta(key: str, W: Tensor, reading: Reading, family: Family, transposed: bool = False) -> Tensor:
    """What an adapter adds to the weight W [out, in]; zeros where it has no pair.  -> float32 [out, in]

    transposed: as if the delta of the stack [2F, D] of gate and up, which must be square, had been added transposed.
    """
    gate_proj, up_proj, down_proj = family.projections
    stem, _, projection = key.rpartition(".")
    if transposed and projection != down_proj:
        stack = torch.cat([delta(f"{stem}.{name}", W, reading, family) for name in (gate_proj, up_proj)])
        return stack.T.chunk(2)[projection == up_proj]  # [F, D]
    pair = reading.pairs.get(key)
    if pair is None:
        return torch.zeros(W.shape)
    scale = float(reading.scales[key])
    if reading.kind == "dora":
        return folded(W, pair, "dora", scale) - W.float()
    return (scale * pair["lora_B"]) @ pair["lora_A"]
