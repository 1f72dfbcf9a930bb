"""What routing counts say: how concentrated a task's use of the experts is, how far two agree, how many are enough.

    top_share(counts, 8)                        # share of the 8 hottest experts of every layer
    jaccard(hottest(a, 8), hottest(b, 8))       # overlap of two hot sets, layer by layer
    advice(counts, 8, sizes)                    # what k hot experts cover, and what their adapters cost

`profile.py` counts, and prints and draws what is here.

Dimensions: L layers with experts, E experts a layer, K experts a token.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import hellora
from hub.config import MoEConfig
from model import MoETransformer
from run import adapters

# ----------------------------------------------------------------------------------------------- one profile


@torch.no_grad()
def tally(config: MoEConfig, selected_experts: Tensor, router_logits: Tensor) -> Tensor:
    """What a batch asks of the experts: tokens that chose each, and the routing weights they gave it.

    selected_experts [L, B, S, K] (-1 at padding), router_logits [L, T, E] of the real tokens -> float64 [2, L, E]
    """
    chosen = selected_experts[:, selected_experts[0, ..., 0] >= 0]  # [L, T, K]
    weights = router_logits.softmax(-1, dtype=torch.float32).gather(-1, chosen)  # [L, T, K]
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    added = torch.stack((torch.ones_like(weights), weights)).double().flatten(2)  # [2, L, T * K]
    index = chosen.flatten(1).expand_as(added)
    return added.new_zeros(2, len(chosen), config.num_experts).scatter_add_(-1, index, added)


def top_share(counts: Tensor, n: int) -> Tensor:
    """sum of the n largest counts of a layer / sum of all; n / E if use is uniform.  [L, E] -> float64 [L]"""
    counts = counts.double()
    return counts.sort(dim=-1, descending=True).values[:, :n].sum(-1) / counts.sum(-1)


def entropy(counts: Tensor) -> Tensor:
    """-sum_e p_e ln p_e / ln E with p = counts / their sum: 1 uniform, 0 one expert only.  [L, E] -> float64 [L]"""
    p = counts.double() / counts.double().sum(-1, keepdim=True)
    return torch.special.entr(p).sum(-1) / math.log(counts.shape[-1])


def table(counts: Tensor, num_hot: int) -> Iterator[str]:
    """Lines for the terminal: per layer the share of the `num_hot` hottest experts, entropy, hottest and coldest."""
    E, share = counts.shape[-1], 100 * top_share(counts, num_hot)
    top, shown = f"top {num_hot} of {E}", min(8, E)
    hottest, coldest = hellora.hot_first(counts)[:, :shown], counts.argsort(dim=-1, stable=True)[:, : shown // 2]
    yield f"layer  {top:>12}  entropy  {'hottest':{4 * shown}}  coldest"
    for layer, h in enumerate(entropy(counts)):
        hot, cold = (" ".join(f"{e:3d}" for e in ids[layer]) for ids in (hottest, coldest))
        yield f"{layer:5d}  {share[layer]:10.1f} %  {h:7.3f}  {hot}  {cold}"
    yield f"{top}: {share.mean():.1f} % of the routed tokens, mean of the layers (uniform {100 * num_hot / E:.1f} %)"


def plot(counts: Tensor, num_hot: int, title: str, path: Path) -> None:
    """Heat map of every expert's share, and each layer's shares in falling order (as HELLoRA, Figures 1 and 4)."""
    from matplotlib import colormaps  # here, since most callers want no picture
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure  # pyplot would bring global state, and look for a display

    L, E = counts.shape
    share = (100 * counts.double() / counts.double().sum(-1, keepdim=True)).numpy()  # [L, E] per cent
    figure = Figure(figsize=(12, 5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ticks = range(0, L, -(-L // 16))

    image = left.imshow(share, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    layers, experts = hellora.hottest(counts, num_hot).numpy().nonzero()
    left.scatter(experts, layers, s=10, c="white", edgecolors="black", linewidths=0.6)
    left.set(xlabel="expert", ylabel="layer", yticks=ticks)
    left.set_title(f"Share of each expert (dots: the {num_hot} hottest of the layer)", fontsize=11)
    figure.colorbar(image, ax=left, label="% of the layer's routed tokens", pad=0.01)

    # Both colour maps grow evenly in lightness: they read the same without colour vision.
    colors = ListedColormap(colormaps["viridis_r"]([0.1 + 0.9 * i / L for i in range(L)]))
    for color, row in zip(colors.colors, np.sort(share)[:, ::-1], strict=True):
        right.plot(range(1, E + 1), row, color=color, linewidth=1.6, marker="o" if E <= 16 else None, markersize=3)
    right.axvspan(0.5, num_hot + 0.5, color="0.93", zorder=0)
    right.axvline(num_hot + 0.5, color="0.3", linestyle=":", linewidth=1.2)
    right.axhline(100 / E, color="0.3", linestyle="--", linewidth=1.2)
    paper = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1.5)
    right.text(E, 104 / E, f"uniform: {100 / E:.3g} %", ha="right", va="bottom", bbox=paper)
    top = 100 * top_share(counts, num_hot)
    cut = f"left of the dotted line: the top {num_hot},\n{top.min():.0f} to {top.max():.0f} % of the routed tokens"
    cut += f"\n(uniform: {100 * num_hot / E:.3g} %)"
    right.text(0.98, 0.98, cut, ha="right", va="top", transform=right.transAxes, bbox=paper)
    right.set(xlabel="experts of a layer, most used first", ylabel="% of the layer's routed tokens")
    right.set(xlim=(0.5, E + 0.5), ylim=(0, None))
    right.set_title("The same shares in falling order, one curve a layer", fontsize=11)
    right.spines[["top", "right"]].set_visible(False)
    norm = BoundaryNorm([i - 0.5 for i in range(L + 1)], L)
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=right, label="layer", ticks=ticks, pad=0.01)
    bar.minorticks_off()
    bar.ax.invert_yaxis()  # layer 0 on top, as in the heat map
    figure.savefig(path)


# ---------------------------------------------------------------------------------------------- two profiles


def jaccard(hot_a: Tensor, hot_b: Tensor) -> Tensor:
    """|A and B| / |A or B| of two hot sets, 1 if both are empty.  bool [L, E] twice -> float64 [L]"""
    both, either = (hot_a & hot_b).sum(-1).double(), (hot_a | hot_b).sum(-1).double()
    return torch.where(either > 0, both / either, 1.0)


def chance_overlap(num_hot: int, num_experts: int) -> float:
    """Expected Jaccard overlap of two sets of `num_hot` experts drawn blindly: what an overlap is to be held against.

    sum_j j / (2k - j) C(k, j) C(E - k, k - j) / C(E, k): they share j of k with the hypergeometric probability.
    """
    k, rest = num_hot, num_experts - num_hot
    ways = ((j, math.comb(k, j) * math.comb(rest, k - j)) for j in range(k + 1))
    return sum(j / (2 * k - j) * n for j, n in ways) / math.comb(num_experts, k)


def overlap_table(hot_a: Tensor, hot_b: Tensor) -> Iterator[str]:
    """Lines for the terminal: per layer the overlap of two hot sets, and the experts that only one of them has."""
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
    yield f"overlap {overlap.mean():.3f}, mean of the layers (by chance {chance:.3f})"
    yield f"the same set in {same} of {len(overlap)} layers"


def plot_overlap(hot_a: Tensor, hot_b: Tensor, title: str, path: Path) -> None:
    """The overlap of two hot sets as a bar a layer, beside that of blind choice (HELLoRA, Figure 3)."""
    from matplotlib.figure import Figure  # pyplot would bring global state, and look for a display

    overlap, num_hot, E = jaccard(hot_a, hot_b).tolist(), int(hot_a[0].sum()), hot_a.shape[-1]
    mean, chance = sum(overlap) / len(overlap), chance_overlap(num_hot, E)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(overlap)), overlap, width=0.7, color=["#00204c" if x == 1 else "#8a8779" for x in overlap])
    axes.axhline(chance, color="#e69f00", linestyle="--", linewidth=1.2)
    axes.set(xlabel="layer", xticks=range(0, len(overlap), -(-len(overlap) // 16)), ylim=(0, 1.05))
    axes.set(ylabel=f"overlap (Jaccard) of the {num_hot} hottest of {E}")
    legend = f"mean of the layers {mean:.2f}; dark: the same set; dashed: two blind choices, {chance:.2f}"
    axes.set_title(f"{title}\n{legend}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


# ------------------------------------------------------------------------------------------ how many experts


class Sizes(NamedTuple):
    """Adapter parameters, A and B: of all modules beside the experts, and of one expert."""

    others: int
    expert: int


def without_weights(config: MoEConfig, num_hot: int, r: int, *, kind: str = "lora", targets: str) -> MoETransformer:
    """A model on the meta device with adapters on `num_hot` experts a layer, attached as in training: to be counted."""
    with torch.device("meta"):
        model = MoETransformer(config)
    hot = torch.arange(config.num_experts).expand(len(config.moe_layers), -1) < num_hot  # which ones is all the same
    hellora.attach(model, hot, r, alpha=r, kind=kind, targets=targets)
    return model


def adapter_sizes(config: MoEConfig, r: int, targets: str = "all") -> Sizes:
    """What LoRA of rank r adds: counted with no hot expert, and with one a layer."""
    models = (without_weights(config, num_hot, r, targets=targets) for num_hot in (0, 1))
    none, one = (hellora.count_parameters(model)[0] for model in models)
    return Sizes(none, (one - none) // len(config.moe_layers))


class Choice(NamedTuple):
    """What adapting the k hottest experts of every layer means."""

    k: int
    coverage: float  # share of the routed tokens that reach an adapted expert, mean of the layers
    least: float  # the same of the layer where it is least
    parameters: int  # of the adapters
    flops: float  # of the adapters, a token, forward


def advice(counts: Tensor, num_experts_per_tok: int, sizes: Sizes) -> list[Choice]:
    """Every k from 1 to E: what it covers and costs.  counts [L, E] -> E choices

    parameters = others + L k expert. A token passes every adapter beside the experts, and of its K experts a layer
    the share f_l(k) that is adapted (`top_share`, measured); a parameter is one multiplication and one addition:
    flops = 2 (others + sum_l K f_l(k) expert). With backward passes to input and factors it is three times that.
    """
    L, E = counts.shape
    choices = []
    for k in range(1, E + 1):
        covered = top_share(counts, k)  # [L]
        flops = 2 * (sizes.others + num_experts_per_tok * sizes.expert * float(covered.sum()))
        parameters = sizes.others + L * k * sizes.expert
        choices.append(Choice(k, float(covered.mean()), float(covered.min()), parameters, flops))
    return choices


def advice_table(choices: list[Choice], num_experts_per_tok: int, targets: tuple[float, ...]) -> Iterator[str]:
    """Lines for the terminal: k = 1, 2, 4, ..., E, and the smallest k of every coverage target."""
    every, powers = choices[-1], [2**i for i in range(len(choices).bit_length())]
    yield "   k  coverage  least layer  adapter parameters   of all  adapter FLOPs a token   of all"
    for c in choices:
        if c.k in powers or c is every:
            parameters = f"{c.parameters:18,}  {c.parameters / every.parameters:7.1%}"
            flops = f"{c.flops:21,.0f}  {c.flops / every.flops:7.1%}"
            yield f"{c.k:4d}  {c.coverage:8.1%}  {c.least:11.1%}  {parameters}  {flops}"
    for target in targets:
        mean, least = (
            next(c.k for c in choices if share(c) >= target - 1e-12)
            for share in (lambda c: c.coverage, lambda c: c.least)
        )
        yield f"to cover {target:.0%} of the routed tokens: k = {mean} on average, k = {least} in every layer"
    rule = choices[num_experts_per_tok - 1]
    yield f"the paper's rule, as many as a token has: k = {rule.k} covers {rule.coverage:.1%}"


class HotReach:
    """Which adapted experts saw no token in a whole epoch (or a run that is shorter): these have learnt nothing."""

    def __init__(self, model: MoETransformer) -> None:
        config, adapter = model.config, model.adapter
        self.hot = adapters.hot_mask(adapter.hot if adapter else [[]] * len(config.moe_layers), config)
        self.counts = torch.zeros(self.hot.shape, dtype=torch.float64)  # [L, E] since the epoch began
        self.missed = torch.zeros_like(self.hot)  # [L, E] in some epoch
        self.epochs = 0

    def observe(self, counts: Tensor, end_of_epoch: bool) -> None:
        self.counts += counts
        if end_of_epoch:
            self.missed |= self.hot & (self.counts == 0)
            self.counts.zero_()
            self.epochs += 1

    def idle(self) -> list[str]:
        missed = self.missed if self.epochs else self.hot & (self.counts == 0)
        return [f"{layer}:{e}" for layer, e in missed.nonzero().tolist()]

    def state_dict(self) -> dict:
        return {"counts": self.counts.tolist(), "missed": self.missed.tolist(), "epochs": self.epochs}

    def load_state_dict(self, state: dict) -> None:
        self.counts.copy_(torch.tensor(state["counts"]))
        self.missed.copy_(torch.tensor(state["missed"]))
        self.epochs = state["epochs"]
