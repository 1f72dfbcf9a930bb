"""The pictures of the results page. Dark blue is ours or OLMoE on GSM8K, grey what it is compared with.

Dimensions: L layers with experts, E experts per layer.
"""

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which brings global state and looks for a display
from torch import Tensor

from diagnosis.measure import Table
from routing.statistics import shares

OURS, OTHER = "#00204c", "#b0ada0"
MARK = "#e69f00"
COLORS = (OURS, MARK, "#56b4e9", "#009e73")  # of Okabe and Ito: apart without colour vision
STYLES = ("-", "--", "-.", ":")
POINT = {"fmt": "o", "markersize": 4, "capsize": 2}  # with an error bar


def new_figure(title: str, height: float = 4.5, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A picture 900 pixels wide."""
    figure = Figure(figsize=(7.5, height), dpi=120, layout="constrained")
    figure.suptitle(title, fontsize=11)
    axes = figure.subplots(1, panels, squeeze=False, sharey=panels > 1)[0]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def draw_coverage(counts: dict[str, Tensor], title: str, path: Path) -> None:
    """How many of the routed tokens the hottest experts receive: the median layer, and the range of the first."""
    figure, (axes,) = new_figure(title)
    for i, (name, each) in enumerate(counts.items()):
        covered = 100 * shares(each).sort(descending=True).values.cumsum(1).numpy()  # [L, E]
        E = covered.shape[1]
        experts = 100 * np.arange(1, E + 1) / E
        label = f"{name}, {E} experts, median layer"
        axes.plot(experts, np.median(covered, 0), color=COLORS[i], linestyle=STYLES[i], label=label)
        if i == 0:
            label = f"{name}, all layers"
            axes.fill_between(experts, covered.min(0), covered.max(0), color=OURS, alpha=0.15, lw=0, label=label)
    axes.plot([0, 100], [0, 100], color="0.6", linewidth=0.8, label="even use")
    axes.set(xlabel="% of a layer's experts, hottest first", ylabel="% of the layer's routed tokens")
    axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(path)


def draw_overlaps(rows: list[dict], title: str, path: Path) -> None:
    """The mean overlap of the hot sets as bars, and a mark where two random sets would be.  rows: name, mean, chance"""
    figure, (axes,) = new_figure(title, 1.4 + 0.45 * len(rows))
    names = [row["name"] for row in rows]
    bars = axes.barh(names, [row["mean"] for row in rows], 0.6, color=OURS)
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.plot([row["chance"] for row in rows], names, "|", color=MARK, markersize=18, markeredgewidth=3)
    axes.set(xlim=(0, 1.08), xlabel="overlap (orange: two random sets)")
    axes.invert_yaxis()
    figure.savefig(path)


def draw_speeds(rows: list[dict], title: str, path: Path) -> None:
    """Speed relative to LoRA, and memory relative to the frozen base.

    rows: name, paper, ours, half, memory; None: not run
    """
    figure, (left, right) = new_figure(title, 5.5, panels=2)
    places = np.arange(len(rows))
    paper, ours, half, memory = (
        [np.nan if row[key] is None else row[key] for row in rows] for key in ("paper", "ours", "half", "memory")
    )
    left.barh(places - 0.2, paper, 0.38, color=OTHER, label="paper, two A100")
    left.barh(places + 0.2, ours, 0.38, xerr=half, color=OURS, ecolor="0.5", label="ours, CPU, batches of 8")
    left.axvline(1, color="0.3", linestyle="--", linewidth=1)
    left.set(yticks=places, yticklabels=[row["name"] for row in rows], xlabel="speed, times that of LoRA (dashed)")
    left.legend(frameon=False, loc="lower right", fontsize=8)
    right.barh(places, memory, 0.6, color=OURS)
    right.axvline(1, color=MARK, linewidth=2)
    right.set(xlabel="memory, times the frozen base (orange)")
    left.invert_yaxis()
    figure.savefig(path)


def draw_differences(rows: list[dict], margin: float, title: str, path: Path) -> None:
    """Differences with their 95 % intervals, and what the paper claims.  rows: name, mean, half, claimed"""
    figure, (axes,) = new_figure(title, 1.2 + 0.24 * len(rows))
    axes.axvspan(-margin, margin, color="0.92", label=f"within ± {margin:g} points")
    axes.axvline(0, color="0.5", linewidth=0.8)
    names, means, halves, claims = ([row[key] for row in rows] for key in ("name", "mean", "half", "claimed"))
    axes.errorbar(means, names, xerr=halves, color=OURS, label="ours, 95 % interval", **POINT)
    axes.plot(claims, names, "D", color=MARK, markersize=4, label="the paper's difference")
    axes.set(xlabel="points of accuracy")
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, loc="lower left")
    figure.savefig(path)


def draw_rates(panels: dict[str, dict[str, dict[float, float]]], title: str, path: Path) -> None:
    """Score against learning rate, a line per method, its best marked.  panels: title -> name -> rate -> score in %"""
    figure, all_axes = new_figure(title, 5, panels=len(panels))
    for axes, (part, curves) in zip(all_axes, panels.items(), strict=True):
        for i, (name, curve) in enumerate(curves.items()):
            color, style = COLORS[i % len(COLORS)], STYLES[i // len(COLORS) % len(STYLES)]
            axes.plot(list(curve), list(curve.values()), color=color, linestyle=style, marker=".", label=name)
            best = max(curve, key=curve.get)
            axes.plot(best, curve[best], "o", color=color, markersize=8)
        axes.set_xscale("log", base=2)
        rates = sorted({rate for curve in curves.values() for rate in curve})
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize=8)
        axes.minorticks_off()
        axes.set(title=part, xlabel="learning rate (large mark: the best)", ylim=(0, None))
        axes.legend(frameon=False, fontsize=8, loc="best")
    all_axes[0].set(ylabel="score in %")
    figure.savefig(path)


def draw_budgets(rows: list[dict], title: str, path: Path) -> None:
    """Trained parameters, and accuracy with its interval.  rows: name, hot, trainable, accuracy (an Estimate)"""
    figure, (left, right) = new_figure(title, 1.4 + 0.26 * len(rows), panels=2)
    for row in rows:
        name, accuracy, color = row["name"], row["accuracy"], OURS if row["hot"] else MARK
        left.barh(name, row["trainable"], 0.6, color=color)
        right.errorbar(accuracy.mean, name, xerr=accuracy.half or 0.0, color=color, **POINT)
    left.set_xscale("log")
    left.set(xlabel="trained parameters (blue: hot experts)")
    right.grid(axis="x", color="0.9")
    right.set(xlabel="accuracy in %", xlim=(0, None))
    left.invert_yaxis()
    figure.savefig(path)


def draw_moved(counts: Tensor, runs: dict[str, Table], path: Path) -> None:
    """Heat maps, layer by expert: the routed tokens, and |dW| / |W| of each run. White: no pair.  counts [L, E]

    The experts of every layer are in the order of their tokens. All runs have one scale, which the largest may exceed.
    """
    order = counts.argsort(dim=-1, descending=True, stable=True)  # [L, E]
    ratios = {name: 100 * each.ratio.where(each.has_pair, torch.nan).gather(1, order) for name, each in runs.items()}
    top = float(torch.stack(list(ratios.values())).nan_to_num().flatten().quantile(0.99))
    figure = Figure(figsize=(7.5, 0.5 + 1.3 * (1 + len(ratios))), dpi=120, layout="constrained")
    axes = figure.subplots(1 + len(ratios), 1, sharex=True)
    panels = {"routed tokens, % of the layer's": 100 * shares(counts).gather(1, order)} | ratios
    for each, (title, values) in zip(axes, panels.items(), strict=True):
        most = top if title in ratios else float(values.max())
        image = each.imshow(values.numpy(), aspect="auto", cmap="cividis", vmin=0, vmax=most, interpolation="nearest")
        each.set_title(title, fontsize=9, loc="left")
        each.set(ylabel="layer", yticks=range(0, len(values), -(-len(values) // 4)))
        label = "|dW| / |W|, %" if title in ratios else "%"
        figure.colorbar(image, ax=each, label=label, pad=0.01, extend="max" if title in ratios else "neither")
    axes[-1].set_xlabel("experts of the layer, most routed first")
    figure.savefig(path)
