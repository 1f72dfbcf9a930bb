"""How far an adapter, or a merged checkpoint, moves every weight of its base.

    matrices = adapter_changes(reading, weights, config)      # |dW| from the factors, |W| from the base's files
    table = by_expert(matrices, config)

The norm of B A comes from two small products, tr(B^T B A A^T): B A is never formed. Of the base one matrix is in memory
at a time.

Dimensions: L layers with experts, E experts per layer, r rank.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hellora import folded
from hub.checkpoint import WHOLE, Stored, read_slices
from hub.config import Family
from hub.peft import Factors, Reading
from model import MoEConfig

EXPERTS, ROUTER, ATTENTION, OTHER = "experts", "router", "attention", "other modules"
# What training left of a pair.
EMPTY = "empty"  # A and B are zero: written for an expert that has no adapter
UNMOVED = "unmoved"  # B is zero, as before the first step
NO_A = "no A"  # A is zero and B is not
NOT_FINITE = "not finite"
MOVED = "moved"


class Place(NamedTuple):
    """Where a matrix of the hub's checkpoint belongs."""

    layer: int
    part: str  # EXPERTS, ROUTER, ATTENTION or OTHER
    expert: int | None = None
    projection: str | None = None


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix: what became of its pair, and how far it moves the weight."""

    place: Place
    state: str
    change: float  # |dW|, Euclidean
    weight: float  # |W|
    is_A_as_drawn: bool = False  # no entry of A is outside the range that A is drawn from

    @property
    def ratio(self) -> float:
        return self.change / self.weight if self.weight else math.inf


def place_of(key: str, family: Family) -> Place:
    """The place of a matrix, by the hub's key without ".weight"."""
    match = re.match(r"model\.layers\.(\d+)\.(.+)", key)
    if not match:
        return Place(-1, OTHER)
    layer, path = int(match[1]), match[2]
    expert = re.fullmatch(rf"{re.escape(family.moe)}\.experts\.(\d+)\.(\w+)", path)
    if expert:
        return Place(layer, EXPERTS, int(expert[1]), expert[2])
    if path == f"{family.moe}.{family.router}":
        return Place(layer, ROUTER)
    return Place(layer, ATTENTION if path.startswith("self_attn.") else OTHER)


def state_of(pair: Factors) -> str:
    """What training left of a pair."""
    if not all(factor.isfinite().all() for factor in pair.values()):
        return NOT_FINITE
    has_A, has_B = bool(pair["lora_A"].any()), bool(pair["lora_B"].any())
    if has_A:
        return MOVED if has_B else UNMOVED
    return NO_A if has_B else EMPTY


def is_as_drawn(A: Tensor) -> bool:
    """Whether all entries of A lie in +-1 / sqrt(in), the range that A is drawn from. A trained A leaves it."""
    return bool(A.abs().max() <= 1.01 / math.sqrt(A.shape[1]))  # 1 % for a file in 16 bits


def norm_of_product(B: Tensor, A: Tensor) -> float:
    """The Euclidean norm of B A.  B [out, r], A [r, in]"""
    A, B = A.double(), B.double()
    return math.sqrt(max(0.0, float(((B.T @ B) * (A @ A.T)).sum())))


@torch.no_grad()
def adapter_changes(reading: Reading, weights: dict[str, Stored], config: MoEConfig) -> dict[str, Matrix]:
    """Every matrix that has a pair, by key. weights: of the base, by key with ".weight"."""
    states = {key: state_of(pair) for key, pair in reading.pairs.items()}
    wanted = {f"{key}.weight": WHOLE for key in reading.pairs if f"{key}.weight" in weights}
    matrices = {}
    for name, W in read_slices(weights, wanted):
        key = name.removesuffix(".weight")
        pair, scale = reading.pairs[key], float(reading.scales[key])
        if states[key] == NOT_FINITE:
            change = math.nan
        elif reading.kind == "dora":
            change = float((folded(W, pair, "dora", scale) - W.float()).norm())
        else:
            change = scale * norm_of_product(pair["lora_B"], pair["lora_A"])
        place = place_of(key, config.family)
        drawn = pair["lora_B"].T if reading.is_swapped and place.part == EXPERTS else pair["lora_A"]
        matrices[key] = Matrix(place, states[key], change, float(W.float().norm()), is_as_drawn(drawn))
    return matrices


class Table(NamedTuple):
    """An expert moves if one of its matrices does. All [L, E]."""

    has_pair: Tensor  # bool
    moved: Tensor  # bool
    ratio: Tensor  # |dW| / |W| over the matrices that have a pair; 0 where there is none


def by_expert(matrices: dict[str, Matrix], config: MoEConfig) -> Table:
    """The changes of the experts' matrices, by layer and expert."""
    L, E = len(config.moe_layers), config.num_experts
    has_pair, moved = torch.zeros(2, L, E, dtype=torch.bool)
    change, weight = torch.zeros(2, L, E, dtype=torch.float64)
    for matrix in matrices.values():
        if matrix.place.part == EXPERTS and matrix.state != EMPTY:
            at = config.moe_layers.index(matrix.place.layer), matrix.place.expert
            has_pair[at] = True
            moved[at] |= matrix.state == MOVED
            change[at] += matrix.change**2
            weight[at] += matrix.weight**2
    return Table(has_pair, moved, (change / weight.clamp(min=1e-300)).sqrt())


def spread(reading: Reading, family: Family) -> float:
    """How much more the norms of lora_B's columns differ between the experts of a stack than within one: F statistic.

    Experts see different numbers of tokens, so the columns of one expert have like norms. If the columns were assigned
    to the wrong experts, the norms differ within an expert as much as between two, and F is about 1 or less. 0: cannot
    be computed.
    """
    stacks: dict[tuple, list[Tensor]] = {}
    for key, pair in reading.pairs.items():
        place = place_of(key, family)
        norms = (pair["lora_A"].T if reading.is_swapped else pair["lora_B"]).double().norm(dim=0)
        if place.part == EXPERTS and (norms > 0).sum() > 1:
            stacks.setdefault((place.layer, place.projection), []).append(norms[norms > 0].log())
    between = within = 0.0
    between_freedom = within_freedom = 0
    for groups in stacks.values():
        mean = torch.cat(groups).mean()
        between += sum(len(group) * float((group.mean() - mean) ** 2) for group in groups)
        within += sum(float((group - group.mean()).square().sum()) for group in groups)
        between_freedom += len(groups) - 1
        within_freedom += sum(len(group) - 1 for group in groups)
    if not (between_freedom and within_freedom and within):
        return 0.0
    return (between / between_freedom) / (within / within_freedom)
