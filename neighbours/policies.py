"""Other ways to choose experts than HELLoRA's: the paper's ablations, MoE-Sieve's, ESFT's.

A ranking gives every expert a number; `hellora.hottest` of it are adapted. A set is chosen without a number of experts
per layer. counts [L, E]: tokens that each expert computed, or their gate mass.

Dimensions: L layers with experts, E experts per layer.
"""

import math

import torch
from torch import Tensor

from lora import uniform


def model_wide(counts: Tensor) -> Tensor:
    """Ranking: counts summed over layers, so that all layers adapt the same ids (ablation HELLoRA_M, §4.5.1)."""
    return counts.sum(0).expand_as(counts)


def coldest_first(counts: Tensor) -> Tensor:
    """Ranking: the least-used experts first (ablation HELLoRA_C, §4.5.1)."""
    return -counts


def random_ranking(counts: Tensor, seed: int) -> Tensor:
    """Ranking: float32 in [0, 1). It is the control that MoE-Sieve has and the HELLoRA paper lacks."""
    return torch.from_numpy(uniform(seed, "select_experts", counts.numel())).view(counts.shape)


def topped_up(counts: Tensor, num_hot: int, seed: int) -> Tensor:
    """Ranking: the num_hot / 2 hottest experts, then random ones, of which the other hot ones come last.

    It tests whether cold experts only add noise, as MoE-Sieve supposes.
    """
    place = counts.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)  # [L, E] 0: the hottest
    chance = random_ranking(counts, seed)
    chance = torch.where(place < num_hot, chance - 1, chance)
    return chance.masked_fill(place < num_hot // 2, math.inf)


def shares(counts: Tensor) -> Tensor:
    """counts / their sum over the layer.  [L, E] -> float64 [L, E]"""
    return counts.double() / counts.double().sum(-1, keepdim=True)


def covering(counts: Tensor, coverage: float) -> Tensor:
    """Set: per layer the fewest experts whose share of the counts reaches `coverage`.  -> bool [L, E]

    Of counts this is ESFT-Token (arXiv 2407.01906) and MoE-Sieve's ablation, of gate mass ESFT-Gate. The share is of
    the layer's sum; ESFT's released script divides by the sum over layers, which is not what its paper says.
    """
    share, order = shares(counts).sort(dim=-1, descending=True, stable=True)
    share_of_hotter = share.cumsum(-1) - share
    return torch.zeros_like(counts, dtype=torch.bool).scatter(-1, order, share_of_hotter < coverage - 1e-12)


def greedy(counts: Tensor, num_hot: int) -> Tensor:
    """Set: num_hot experts per layer on average, where their shares are largest (MoE-Sieve's ablation).  -> [L, E]"""
    order = shares(counts).flatten().argsort(descending=True, stable=True)
    chosen = torch.zeros(counts.numel(), dtype=torch.bool)
    chosen[order[: num_hot * len(counts)]] = True
    return chosen.view(counts.shape)
