"""The check as a table, a record and a picture: layer by layer, what has a pair, what moved, and by how much.

Dimensions: L layers with experts, E experts per layer.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from diagnosis.findings import Finding
from diagnosis.measure import ATTENTION, EMPTY, OTHER, ROUTER, Matrix, Table, by_expert
from model import MoEConfig
from neighbours.policies import shares


def table(matrices: dict[str, Matrix], config: MoEConfig, counts: Tensor | None) -> Iterator[str]:
    """A line per layer. counts: int [L, E], tokens that chose an expert, if a profile is given."""
    experts, E = by_expert(matrices, config), config.num_experts
    yield f"|dW| / |W| of the adapted experts: least, median, largest ({E} experts per layer)"
    tokens_title = "" if counts is None else "   tokens"
    yield f"layer  pairs  moved     least    median   largest{tokens_title}    router  attention"
    for i, layer in enumerate(config.moe_layers):
        ratio = experts.ratio[i][experts.has_pair[i]]
        sizes = [f"{x:.2e}" for x in (ratio.min(), ratio.median(), ratio.max())] if len(ratio) else ["-"] * 3
        tokens = "" if counts is None else f"{100 * shares(counts)[i][experts.has_pair[i]].sum():7.1f} %"
        others = [largest(matrices, layer, part) for part in (ROUTER, ATTENTION)]
        counted = f"{layer:5d}  {len(ratio):5d}  {int(experts.moved[i].sum()):5d}"
        yield counted + "".join(f" {size:>9}" for size in sizes) + tokens + "".join(f" {size:>9}" for size in others)
    if others := [m for m in matrices.values() if m.place.part == OTHER and m.state != EMPTY]:
        yield f"other modules: {len(others)} matrices, at most {max(m.ratio for m in others):.2e}"


def largest(matrices: dict[str, Matrix], layer: int, part: str) -> str:
    """The largest ratio of a layer's matrices of one part, as text; "-": none has a pair."""
    ratios = [m.ratio for m in matrices.values() if (m.place.layer, m.place.part) == (layer, part) and m.state != EMPTY]
    return f"{max(ratios):.2e}" if ratios else "-"


def record(matrices: dict[str, Matrix], findings: list[Finding], config: MoEConfig) -> dict:
    """The check as JSON: the experts' ratios [L][E] (0: no pair; null: not finite) and the findings."""
    experts = by_expert(matrices, config)
    return {
        "layers": list(config.moe_layers),
        "has_pair": experts.has_pair.int().tolist(),
        "moved": experts.moved.int().tolist(),
        "ratio": [[float(f"{x:.6g}") if math.isfinite(x) else None for x in row] for row in experts.ratio.tolist()],
        "findings": [asdict(finding) for finding in findings],
    }


def rank_correlation(ratio: Tensor, counts: Tensor) -> float:
    """Spearman's correlation of two tables [L, E], ranked within each layer, mean over the layers."""
    ranks = [ranked(values).sub(ranked(values).mean(-1, keepdim=True)) for values in (ratio.double(), counts.double())]
    a, b = ranks
    norms = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return float(((a * b).sum(-1)[norms > 0] / norms[norms > 0]).mean())


def ranked(values: Tensor) -> Tensor:
    """Ranks in each row from 0; equal values share the mean of their ranks.  [L, E] -> [L, E]"""
    below = (values.unsqueeze(-1) > values.unsqueeze(-2)).sum(-1)
    equal = (values.unsqueeze(-1) == values.unsqueeze(-2)).sum(-1)
    return below + (equal - 1) / 2


def headline(experts: Table, counts: Tensor | None) -> str:
    """One line: how many experts moved and by how much, and whether those with more tokens moved more."""
    values = experts.ratio[experts.has_pair]
    if not len(values):
        return "no expert is adapted"
    line = (
        f"{int(experts.moved.sum())} of {int(experts.has_pair.sum())} adapted experts moved, "
        f"|dW| / |W| {values.median():.1e} at the median, {values.max():.1e} at most"
    )
    if counts is not None and experts.has_pair.all():
        line += f"; rank correlation with their tokens {rank_correlation(experts.ratio, counts):.2f}"
    return line


def draw(experts: Table, counts: Tensor | None, title: str, path: Path) -> None:
    """Heat maps, layer by expert: |dW| / |W|, and beside it the routed tokens. Experts without a pair stay white."""
    from matplotlib.figure import Figure  # not pyplot: it has global state, and looks for a display

    panels = [("|dW| / |W|, %", 100 * experts.ratio.where(experts.has_pair, torch.nan))]
    if counts is not None:
        panels.append(("% of the layer's routed tokens", 100 * shares(counts)))
    figure = Figure(figsize=(6.5 * len(panels), 4.5), dpi=150, layout="constrained")
    figure.suptitle(title, fontsize=12)
    for axes, (label, values) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        image = axes.imshow(values.numpy(), aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
        axes.set(xlabel="expert", ylabel="layer", yticks=range(0, len(values), -(-len(values) // 16)))
        figure.colorbar(image, ax=axes, label=label, pad=0.01)
    figure.savefig(path)
