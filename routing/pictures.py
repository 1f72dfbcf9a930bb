"""Pictures of routing: a profile as a heat map and curves, and the overlap of two hot sets as bars.

Dimensions: L layers with experts, E experts per layer.
"""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure  # not pyplot, which brings global state and looks for a display
from torch import Tensor

import hellora
from routing.statistics import chance_overlap, jaccard, shares, top_share


def draw_profile(counts: Tensor, num_hot: int, title: str, path: Path) -> None:
    """Heat map of each expert's share, and each layer's shares in descending order (as HELLoRA, Figures 1 and 4)."""
    L = len(counts)
    figure = Figure(figsize=(10, 4.5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=13)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    ticks = range(0, L, -(-L // 16))
    image = draw_heat_map(left, counts, num_hot)
    left.set(yticks=ticks)
    figure.colorbar(image, ax=left, label="% of the layer's routed tokens", pad=0.01)
    draw_sorted_shares(right, counts, num_hot)
    figure.savefig(path)


def draw_heat_map(axes: Axes, counts: Tensor, num_hot: int) -> ScalarMappable:
    """Each expert's share of its layer as a colour, the hottest experts marked."""
    image = axes.imshow(100 * shares(counts).numpy(), aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    layers, experts = hellora.hottest(counts, num_hot).numpy().nonzero()
    axes.scatter(experts, layers, s=10, c="white", edgecolors="black", linewidths=0.6)
    axes.set(xlabel="expert", ylabel="layer")
    axes.set_title(f"Share of each expert (dots: the {num_hot} hottest of the layer)", fontsize=11)
    return image


def draw_sorted_shares(axes: Axes, counts: Tensor, num_hot: int) -> None:
    """The shares of a layer's experts from the most used to the least: the median and the range of the layers."""
    E = counts.shape[-1]
    values = np.sort(100 * shares(counts).numpy())[:, ::-1]  # [L, E]
    places = range(1, E + 1)
    axes.fill_between(places, values.min(0), values.max(0), color="#00204c", alpha=0.2, linewidth=0)
    axes.plot(places, np.median(values, 0), color="#00204c", marker="o" if E <= 16 else None, markersize=3)
    axes.axvspan(0.5, num_hot + 0.5, color="0.93", zorder=0)
    axes.axvline(num_hot + 0.5, color="0.3", linestyle=":", linewidth=1.2)
    axes.axhline(100 / E, color="0.3", linestyle="--", linewidth=1.2)
    background = dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1.5)
    axes.text(E, 104 / E, f"uniform: {100 / E:.3g} %", ha="right", va="bottom", bbox=background)
    top = 100 * top_share(counts, num_hot)
    note = f"left of the dotted line: the top {num_hot},\n{top.min():.0f} to {top.max():.0f} % of the routed tokens"
    note += f"\n(uniform: {100 * num_hot / E:.3g} %)"
    axes.text(0.98, 0.98, note, ha="right", va="top", transform=axes.transAxes, bbox=background)
    axes.set(xlabel="experts of a layer, most used first", ylabel="% of the layer's routed tokens")
    axes.set(xlim=(0.5, E + 0.5), ylim=(0, None))
    axes.set_title("Median and range of the layers", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)


def draw_overlap(hot_a: Tensor, hot_b: Tensor, title: str, path: Path) -> None:
    """One bar per layer: the overlap of two hot sets, beside that of two random sets (HELLoRA, Figure 3)."""
    overlap, num_hot, E = jaccard(hot_a, hot_b).tolist(), int(hot_a[0].sum()), hot_a.shape[-1]
    mean, chance = sum(overlap) / len(overlap), chance_overlap(num_hot, E)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(overlap)), overlap, width=0.7, color=["#00204c" if x == 1 else "#8a8779" for x in overlap])
    axes.axhline(chance, color="#e69f00", linestyle="--", linewidth=1.2)
    axes.set(xlabel="layer", xticks=range(0, len(overlap), -(-len(overlap) // 16)), ylim=(0, 1.05))
    axes.set(ylabel=f"overlap (Jaccard) of the {num_hot} hottest of {E}")
    legend = f"mean of the layers {mean:.2f}; dark: the same set; dashed: two random sets, {chance:.2f}"
    axes.set_title(f"{title}\n{legend}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def draw_prompt(hot_share: Tensor, tokens: list[str], title: str, path: Path) -> None:
    """Heat map of a text: for each token and layer, the share of its experts that are hot.  hot_share [L, T]"""
    L, T = hot_share.shape
    figure = Figure(figsize=(max(5, 0.28 * T + 2), 1.6 + 0.25 * L), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(100 * hot_share.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=100)
    axes.set(xlabel="token", ylabel="layer", title=title, yticks=range(0, L, -(-L // 16)))
    axes.set_xticks(range(T), tokens, rotation=90, fontsize=7, family="monospace")
    figure.colorbar(image, ax=axes, label="% of the token's experts\nthat are hot", pad=0.01)
    figure.savefig(path)
