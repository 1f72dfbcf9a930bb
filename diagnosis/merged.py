"""A merged checkpoint beside its base and, if given, the adapter that it should hold.

    comparison = compare(merged, base, config, readings)

The delta D of an adapter and the difference M - W of the checkpoints are compared by <M - W, D> / <D, D>: 1 if the
checkpoint holds the delta once, 0 if not at all, 2 if twice. Rounding to the checkpoint's dtype lowers what can be
reached, so `reachable` is the same number for W + D rounded once. One matrix of each checkpoint is in memory at a time.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diagnosis.measure import EMPTY, EXPERTS, MOVED, UNMOVED, Matrix, place_of, state_of
from hellora import folded
from hub.checkpoint import WHOLE, Stored, read_slices
from hub.config import Family
from hub.peft import Factors, Reading
from model import MoEConfig

AS_READ, REORDERED, TRANSPOSED = "as read", "reordered", "transposed"


@dataclass
class Multiple:
    """How many times a set of matrices holds a delta: sums of products over its entries."""

    held: float = 0.0  # <M - W, D>
    reachable: float = 0.0  # <round(W + D) - W, D>
    square: float = 0.0  # <D, D>

    def add(self, held: float, reachable: float, square: float) -> None:
        self.held, self.reachable, self.square = self.held + held, self.reachable + reachable, self.square + square

    @property
    def times(self) -> float:
        return self.held / self.square if self.square else 0.0

    @property
    def most(self) -> float:
        return self.reachable / self.square if self.square else 0.0


@dataclass
class Comparison:
    """What differs between a merged checkpoint and its base."""

    matrices: dict[str, Matrix] = field(default_factory=dict)  # all that changed, or should have
    entries: int = 0  # of these matrices
    unchanged: int = 0  # of these entries
    largest: float = 0.0  # |M - W| of any entry
    dtypes: set[torch.dtype] = field(default_factory=set)  # of the merged checkpoint
    unexplained: list[str] = field(default_factory=list)  # keys that changed although the adapter has no pair for them
    without: list[str] = field(default_factory=list)  # keys that lack the delta, although their dtype could hold it
    experts: dict[str, Multiple] = field(default_factory=dict)  # by hypothesis on how the adapter was read
    others: Multiple = field(default_factory=Multiple)  # of attention, router, ...


@torch.no_grad()
def compare(
    merged: dict[str, Stored], base: dict[str, Stored], config: MoEConfig, readings: dict[str, Reading]
) -> Comparison:
    """Compare all weights. readings: the adapter AS_READ and, for packed stacks, REORDERED; {}: no adapter is given."""
    result, reading = Comparison(dtypes={weight.dtype for weight in merged.values()}), readings.get(AS_READ)
    deltas = {name: one.pairs for name, one in readings.items()}
    if reading and 2 * config.intermediate_size == config.hidden_size:  # a transposed stack of gate and up would fit
        deltas[TRANSPOSED] = reading.pairs
    for name, W in read_slices(base, dict.fromkeys(base, WHOLE)):
        _, M = next(read_slices({name: merged[name]}, {name: WHOLE}))
        key, W32, dtype = name.removesuffix(".weight"), W.float(), M.dtype
        difference = M.float() - W32
        has_changed = bool(difference.any())
        pair = reading.pairs.get(key) if reading else None
        if pair is not None and state_of(pair) == EMPTY:
            pair = None
        if has_changed and reading and pair is None:
            result.unexplained.append(name)
        if not (has_changed or pair is not None):
            continue
        place = place_of(key, config.family)
        state = MOVED if has_changed else UNMOVED
        result.matrices[key] = Matrix(place, state, float(difference.norm()), float(W32.norm()))
        result.entries += difference.numel()
        result.unchanged += int((difference == 0).sum())
        result.largest = max(result.largest, float(difference.abs().max()))
        for hypothesis in deltas if pair is not None else ():
            if place.part != EXPERTS and hypothesis != AS_READ:
                continue
            D = delta(key, W, readings.get(hypothesis, reading), config.family, hypothesis == TRANSPOSED)
            rounded = (W32 + D).to(dtype).float() - W32
            products = [float((x * D).double().sum()) for x in (difference, rounded, D)]
            total = result.experts.setdefault(hypothesis, Multiple()) if place.part == EXPERTS else result.others
            total.add(*products)
            if hypothesis == AS_READ and products[0] < 0.1 * products[1] and products[1] > 0.1 * products[2]:
                result.without.append(name)
    return result


def delta(key: str, W: Tensor, reading: Reading, family: Family, transposed: bool = False) -> Tensor:
    """What an adapter adds to the weight W [out, in]; zeros where it has no pair.  -> float32 [out, in]

    transposed: as if the delta of the stack [2F, D] of gate and up, which must be square, had been added transposed.
    """
    pair = reading.pairs.get(key)
    place = place_of(key, family)
    gate_proj, up_proj, down_proj = family.projections
    if transposed and place.projection != down_proj:
        stem, F = key.rpartition(".")[0], len(W)
        rows = [product(reading, f"{stem}.{name}", W.shape) for name in (gate_proj, up_proj)]
        columns = slice(F, None) if place.projection == up_proj else slice(F)
        return torch.cat(rows)[:, columns].T  # [F, 2F]
    if pair is not None and reading.kind == "dora":
        return folded(W, pair, "dora", float(reading.scales[key])) - W.float()
    return product(reading, key, W.shape)


def product(reading: Reading, key: str, shape: torch.Size) -> Tensor:
    """s B A of one matrix; zeros where there is no pair.  -> float32 [out, in]"""
    pair: Factors | None = reading.pairs.get(key)
    if pair is None:
        return torch.zeros(shape)
    return float(reading.scales[key]) * pair["lora_B"] @ pair["lora_A"]


def unchanged_share(comparison: Comparison) -> float:
    """The share of the entries of changed matrices that are those of the base; NaN if there are none."""
    return comparison.unchanged / comparison.entries if comparison.entries else math.nan
