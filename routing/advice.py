"""How many hot experts are enough: what adapting the k hottest experts of each layer covers and costs.

    sizes = adapter_sizes(config, r=32)                         # parameters, counted on a model without weights
    print(*table(choices(counts, 8, sizes), 8, (0.5, 0.9)), sep="\\n")

Dimensions: L layers with experts, E experts per layer, K experts per token.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

import hellora
from model import MoEConfig, MoETransformer
from routing.statistics import chance_overlap, jaccard, top_share

STABLE = 0.8  # Jaccard overlap of two halves: with 8 experts, less than one of them differs


class Sizes(NamedTuple):
    """Adapter parameters, A and B."""

    others: int  # of all modules beside the experts
    expert: int  # of one expert


def without_weights(config: MoEConfig, num_hot: int, r: int, *, kind: str = "lora", targets: str) -> MoETransformer:
    """A model on the meta device with adapters on `num_hot` experts per layer, attached as in training."""
    with torch.device("meta"):
        model = MoETransformer(config)
    hot = torch.arange(config.num_experts).expand(len(config.moe_layers), -1) < num_hot  # any `num_hot` will do
    hellora.attach(model, hot, r, alpha=r, kind=kind, targets=targets)
    return model


def adapter_sizes(config: MoEConfig, r: int, targets: str = "all") -> Sizes:
    """What LoRA of rank r adds: counted with no hot expert, and with one per layer."""
    models = (without_weights(config, num_hot, r, targets=targets) for num_hot in (0, 1))
    none, one = (hellora.count_parameters(model)[0] for model in models)
    return Sizes(none, (one - none) // len(config.moe_layers))


class Choice(NamedTuple):
    """What adapting the k hottest experts of each layer means."""

    k: int
    coverage: float  # share of the routed tokens that reach an adapted expert, mean of the layers
    least: float  # the same share in the layer where it is smallest
    parameters: int  # of the adapters
    flops: float  # of the adapters in a forward pass, per token


def choices(counts: Tensor, num_experts_per_tok: int, sizes: Sizes) -> list[Choice]:
    """What every k from 1 to E covers and costs.  counts [L, E] -> E choices

    parameters = others + L k expert. Each token passes every adapter beside the experts. Of its K experts in layer l,
    the measured share f_l(k) is adapted (`top_share`). A parameter is one multiplication and one addition:
    flops = 2 (others + sum_l K f_l(k) expert). The backward pass to inputs and factors costs twice as much again.
    """
    L, E = counts.shape
    rows = []
    for k in range(1, E + 1):
        covered = top_share(counts, k)  # [L]
        flops = 2 * (sizes.others + num_experts_per_tok * sizes.expert * float(covered.sum()))
        parameters = sizes.others + L * k * sizes.expert
        rows.append(Choice(k, float(covered.mean()), float(covered.min()), parameters, flops))
    return rows


def smallest_k(rows: list[Choice], field: str, target: float) -> int:
    """The smallest k whose coverage (or its least) reaches the target, up to rounding."""
    return next(choice.k for choice in rows if getattr(choice, field) >= target - 1e-12)


def table(rows: list[Choice], num_experts_per_tok: int, targets: tuple[float, ...]) -> Iterator[str]:
    """Lines of text: k = 1, 2, 4, ..., E, and the smallest k that reaches each coverage target."""
    largest, powers = rows[-1], [2**i for i in range(len(rows).bit_length())]
    yield "   k  coverage  least layer  adapter parameters   of all  adapter FLOPs per token   of all"
    for c in rows:
        if c.k in powers or c is largest:
            parameters = f"{c.parameters:18,}  {c.parameters / largest.parameters:7.1%}"
            flops = f"{c.flops:23,.0f}  {c.flops / largest.flops:7.1%}"
            yield f"{c.k:4d}  {c.coverage:8.1%}  {c.least:11.1%}  {parameters}  {flops}"
    for target in targets:
        mean, least = (smallest_k(rows, field, target) for field in ("coverage", "least"))
        yield f"to cover {target:.0%} of the routed tokens: k = {mean} on average, k = {least} in every layer"
    rule = rows[num_experts_per_tok - 1]
    yield f"the paper's rule, k = experts per token: k = {rule.k} covers {rule.coverage:.1%}"


def remarks(counts: Tensor, half_counts: Tensor | None, num_experts_per_tok: int) -> Iterator[str]:
    """The paper's advice on k, whether there is a hot set at all, and whether the text was long enough to find it."""
    yield "the paper (§4.5.3): k = 4 where few experts take most tokens, k = 8 for harder tasks, or a trial of 4, 8, 16"
    k, E = num_experts_per_tok, counts.shape[-1]
    share, even = float(top_share(counts, k).mean()), k / E
    if share < 2 * even:
        yield (
            f"there is hardly a hot set: the {k} hottest of {E} experts receive {share:.1%} of the routed tokens, and "
            f"an even split gives {even:.1%}. Adapt more experts, or all at a lower rank (--method lora-flat)"
        )
    if half_counts is not None and half_counts.any() and not half_counts.equal(counts):
        a, b = hellora.hottest(half_counts, k), hellora.hottest(counts - half_counts, k)
        same, chance = float(jaccard(a, b).mean()), chance_overlap(k, E)
        verdict = "stable" if same >= STABLE else "not stable: count on more text (--sample)"
        yield (
            f"the hot sets of two halves of the text overlap by {same:.2f} (Jaccard; by chance {chance:.2f}): {verdict}"
        )
