"""Statistics of routing counts: how skewed they are, and how far two hot sets agree.

    top_share(counts, 8)                        # share of the 8 hottest experts of each layer
    jaccard(hottest(a, 8), hottest(b, 8))       # overlap of two hot sets, layer by layer

Dimensions: L layers with experts, E experts per layer.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from neighbours.policies import shares

# ------------------------------------------------------------------------------------------------------ one profile


def top_share(counts: Tensor, n: int) -> Tensor:
    """Sum of the n largest counts of each layer / sum of all; n / E if use is uniform.  [L, E] -> float64 [L]"""
    counts = counts.double()
    return counts.sort(dim=-1, descending=True).values[:, :n].sum(-1) / counts.sum(-1)


def entropy(counts: Tensor) -> Tensor:
    """-sum_e p_e ln p_e / ln E with p = shares: 1 if use is uniform, 0 if one expert has it all.  [L, E] -> [L]"""
    return torch.special.entr(shares(counts)).sum(-1) / math.log(counts.shape[-1])


def table(counts: Tensor, num_hot: int) -> Iterator[str]:
    """Lines of text: for each layer the share of the `num_hot` hottest experts, entropy, hottest and coldest."""
    E, share = counts.shape[-1], 100 * top_share(counts, num_hot)
    top, shown = f"top {num_hot} of {E}", min(8, E)
    hottest, coldest = (
        counts.argsort(dim=-1, descending=True, stable=True)[:, :shown],
        counts.argsort(dim=-1, stable=True)[:, : shown // 2],
    )
    yield f"layer  {top:>12}  entropy  {'hottest':{4 * shown}}  coldest"
    for layer, h in enumerate(entropy(counts)):
        hot, cold = (" ".join(f"{e:3d}" for e in ids[layer]) for ids in (hottest, coldest))
        yield f"{layer:5d}  {share[layer]:10.1f} %  {h:7.3f}  {hot}  {cold}"
    yield f"{top}: {share.mean():.1f} % of the routed tokens, mean of the layers (uniform {100 * num_hot / E:.1f} %)"


# ----------------------------------------------------------------------------------------------------- two profiles


def jaccard(hot_a: Tensor, hot_b: Tensor) -> Tensor:
    """|A and B| / |A or B| of two hot sets, 1 if both are empty.  bool [L, E] twice -> float64 [L]"""
    both, either = (hot_a & hot_b).sum(-1).double(), (hot_a | hot_b).sum(-1).double()
    return torch.where(either > 0, both / either, 1.0)


def chance_overlap(num_hot: int, num_experts: int) -> float:
    """Expected Jaccard overlap of two random sets of `num_hot` experts: the baseline of an overlap.

    sum_j j / (2k - j) C(k, j) C(E - k, k - j) / C(E, k): the two share j experts with hypergeometric probability.
    """
    k, rest = num_hot, num_experts - num_hot
    ways = ((j, math.comb(k, j) * math.comb(rest, k - j)) for j in range(k + 1))
    return sum(j / (2 * k - j) * n for j, n in ways) / math.comb(num_experts, k)


def overlap_table(hot_a: Tensor, hot_b: Tensor) -> Iterator[str]:
    """Lines of text: for each layer the overlap of two hot sets, and the experts that only one of them has."""
    overlap, E = jaccard(hot_a, hot_b), hot_a.shape[-1]
    only_a, only_b = (
        [" ".join(map(str, row.nonzero().flatten().tolist())) or "-" for row in only]
        for only in (hot_a & ~hot_b, hot_b & ~hot_a)
    )
    width = max(len("only A"), *map(len, only_a))
    yield f"layer  overlap  {'only A':{width}}  only B"
    for layer, value in enumerate(overlap):
        yield f"{layer:5d}  {value:7.3f}  {only_a[layer]:{width}}  {only_b[layer]}"
    chance, same = chance_overlap(int(hot_a[0].sum()), E), int((overlap == 1).sum())
    yield f"Jaccard overlap {overlap.mean():.3f}, mean of the layers (by chance {chance:.3f})"
    yield f"the same set in {same} of {len(overlap)} layers"
