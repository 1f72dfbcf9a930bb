"""Draw the method: count, choose, attach.

    python -m lab.draw_method            # writes docs/method.png

An illustration with 8 experts, 2 of them hot, and made-up counts. Hatching and line width carry the meaning, so the
picture reads without colour.
"""

import matplotlib

from lab import ROOT

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle

COUNTS = (9, 31, 6, 12, 4, 27, 7, 10)  # tokens per expert
NUM_HOT = 2
CHOSEN = (1, 6)  # the experts of the token that is drawn: a hot one and a cold one
HOT = sorted(sorted(range(len(COUNTS)), key=lambda e: -COUNTS[e])[:NUM_HOT])
INK, GREY, FROZEN, TRAINED = "#1a1a1a", "#6b6b6b", "#ededed", "#9cc3e6"
HATCH = "////"
TOP, STEP, HEIGHT = 8.3, 0.98, 0.66  # of the rows of experts


def row(expert: int) -> float:
    """The middle of an expert's row."""
    return TOP - STEP * expert


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str = "", *, trained: bool = False) -> None:
    """A box with its left edge at x and its middle at y. A trained one is hatched and has a thick edge."""
    style = (
        {"facecolor": TRAINED, "hatch": HATCH, "linewidth": 2.2} if trained else {"facecolor": FROZEN, "linewidth": 0.9}
    )
    shape = FancyBboxPatch(
        (x, y - height / 2), width, height, boxstyle="round,pad=0,rounding_size=0.08", ec=INK, **style
    )
    ax.add_patch(shape)
    label = {"facecolor": "white", "edgecolor": "none", "pad": 1.2} if trained and text else None
    ax.text(x + width / 2, y, text, ha="center", va="center", fontsize=10, color=INK, bbox=label)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], *, used: bool = True) -> None:
    style = {"color": INK, "lw": 1.4} if used else {"color": GREY, "lw": 0.6, "ls": (0, (2, 3))}
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>" if used else "-", "shrinkA": 0, "shrinkB": 0, **style})


def draw_counts(ax: Axes) -> None:
    """Left half: tokens per expert of one layer, the hottest marked."""
    ax.text(0, 9.65, "1  Count", fontsize=13, weight="bold")
    ax.text(0, 9.15, "tokens sent to each expert of a layer", fontsize=10)
    for e, count in enumerate(COUNTS):
        is_hot = e in HOT
        ax.text(0, row(e), f"expert {e}", va="center", fontsize=10, weight="bold" if is_hot else "normal")
        style = {"facecolor": TRAINED, "linewidth": 2.2} if is_hot else {"facecolor": "white", "linewidth": 0.9}
        ax.add_patch(Rectangle((1.15, row(e) - HEIGHT / 2), count / 14, HEIGHT, ec=INK, **style))
        if is_hot:
            ax.text(1.3 + count / 14, row(e), "hot", va="center", fontsize=10, weight="bold")
    ax.text(0, 0.35, "2  Choose", fontsize=13, weight="bold")
    ax.text(0, -0.15, f"the k largest of every layer (here k = {NUM_HOT})", fontsize=10)


def draw_layer(ax: Axes, left: float) -> None:
    """Right half: one token through the layer. Only hot experts, router and attention have an adapter."""
    middle, experts = row(3.5), left + 4.1
    ax.text(left, 9.65, "3  Attach and train", fontsize=13, weight="bold")
    ax.text(left, 9.15, "adapters on hot experts, router and attention; the rest is frozen", fontsize=10)
    box(ax, left, middle, 0.95, 0.8, "token\nx")
    arrow(ax, (left + 0.95, middle), (left + 1.45, middle))
    box(ax, left + 1.45, middle, 1.0, 1.5)
    ax.text(left + 1.95, middle + 0.35, "router", ha="center", va="center", fontsize=10)
    box(ax, left + 1.65, middle - 0.3, 0.6, 0.5, "BA", trained=True)
    for e in range(len(COUNTS)):
        is_hot, is_chosen = e in HOT, e in CHOSEN
        arrow(ax, (left + 2.45, middle), (experts, row(e)), used=is_chosen)
        box(ax, experts, row(e), 0.75, HEIGHT, "W")
        if is_hot:
            ax.text(experts + 0.9, row(e), "+", ha="center", va="center", fontsize=12)
            box(ax, experts + 1.05, row(e), 0.75, HEIGHT, "BA", trained=True)
        name = "hot: $Wx + \\frac{\\alpha}{r}BAx$" if is_hot else "cold: $Wx$"
        ax.text(experts + 1.95 if is_hot else experts + 0.9, row(e), name, va="center", fontsize=10)
        if is_chosen:
            ax.plot([experts + (3.85 if is_hot else 2.1), experts + 4.1], [row(e)] * 2, color=INK, lw=1.4)
            arrow(ax, (experts + 4.1, row(e)), (experts + 4.75, middle))
            ax.text(
                experts + 4.25, row(e), f"$\\times\\; p_{e}$", va="bottom" if row(e) > middle else "top", fontsize=11
            )
    box(ax, experts + 4.75, middle, 1.45, 0.9, "$y=\\sum_e p_e\\,y_e$")


def draw_legend(ax: Axes, left: float) -> None:
    box(ax, left, 0.3, 0.5, 0.42)
    ax.text(left + 0.62, 0.3, "frozen", va="center", fontsize=10)
    box(ax, left + 1.6, 0.3, 0.5, 0.42, trained=True)
    ax.text(left + 2.22, 0.3, "trained", va="center", fontsize=10)
    arrow(ax, (left + 3.3, 0.3), (left + 3.9, 0.3))
    ax.text(left + 4.0, 0.3, "the token's experts", va="center", fontsize=10)
    ax.text(left + 6.5, 0.3, "W: each of an expert's three matrices", va="center", fontsize=10)


def main() -> None:
    figure, ax = plt.subplots(figsize=(12, 5.6))
    draw_counts(ax)
    draw_layer(ax, left=5.3)
    draw_legend(ax, left=5.3)
    ax.axvline(4.85, color=GREY, lw=0.8)
    ax.set_xlim(-0.1, 15.7)
    ax.set_ylim(-0.4, 10.1)
    ax.axis("off")
    figure.savefig(ROOT / "docs/method.png", dpi=110, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
