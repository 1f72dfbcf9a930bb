"""Which experts of each layer the scores single out: the paper's rule, its ablations, and the neighbours' rules.

scores [L, E] say how much each expert is used: counts or gate mass (`profile.RoutingProfile`). Ties go to the lower id.

Dimensions: L layers, E experts a layer.
"""

import torch
from torch import Tensor

from lora import uniform


def hot_first(scores: Tensor) -> Tensor:
    """Expert ids by falling score, ties to the lower id.  [..., E] -> [..., E]"""
    return scores.argsort(dim=-1, descending=True, stable=True)


def hottest(scores: Tensor, num_hot: int) -> Tensor:
    """The `num_hot` most-used experts of every layer: HELLoRA (§3); MoE-Sieve with a quarter of E."""
    return _mask(scores, hot_first(scores)[:, :num_hot])


def hottest_of_model(scores: Tensor, num_hot: int) -> Tensor:
    """One set for all layers: the ids with the largest scores summed over layers (ablation HELLoRA_M, §4.5.1)."""
    return _mask(scores, hot_first(scores.sum(0))[:num_hot].expand(len(scores), -1))


def coldest(scores: Tensor, num_hot: int) -> Tensor:
    """The `num_hot` least-used experts of every layer (ablation HELLoRA_C, §4.5.1)."""
    return _mask(scores, scores.argsort(dim=-1, stable=True)[:, :num_hot])


def any_experts(scores: Tensor, num_hot: int, seed: int) -> Tensor:
    """`num_hot` experts of every layer, blind to use: the control that the paper lacks and MoE-Sieve has."""
    noise = torch.from_numpy(uniform(seed, "select_experts", scores.numel())).view(scores.shape)
    return hottest(noise, num_hot)


def covering(scores: Tensor, coverage: float) -> Tensor:
    """Per layer the smallest set whose share of the scores reaches `coverage`.

    Of counts this is ESFT-Token (arXiv 2407.01906) and MoE-Sieve's ablation, of gate mass ESFT-Gate. The share is of
    the layer's sum; ESFT's released script divides by the sum over layers, which is not what its paper says.
    """
    share = scores.double() / scores.double().sum(-1, keepdim=True)
    order = hot_first(share)
    before = share.gather(-1, order).cumsum(-1) - share.gather(-1, order)  # share of the hotter experts
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before < coverage - 1e-12)


def greedy(scores: Tensor, num_hot: int) -> Tensor:
    """`num_hot` experts a layer on average, spent where they cover the largest shares (MoE-Sieve's ablation)."""
    share = scores.double() / scores.double().sum(-1, keepdim=True)
    chosen = hot_first(share.flatten())[: num_hot * len(scores)]
    return torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, chosen, True).view(scores.shape)


def _mask(scores: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids, True)


SCORED = {"hot": hottest, "model-hot": hottest_of_model, "cold": coldest, "greedy": greedy}
POLICIES = (*SCORED, "coverage", "random", "all")
