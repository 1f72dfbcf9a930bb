"""Draw the method: count, choose, attach.

    python -m lab.draw_method            # writes docs/method.png

An illustration with 8 experts, 2 of them hot, and made-up counts, which it says. Line width carries the meaning, so
the picture reads without colour.
"""

from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which brings global state and looks for a display
from matplotlib.patches import Rectangle

from lab import ROOT

COUNTS = (9, 31, 6, 12, 4, 27, 7, 10)  # tokens per expert
HOT, CHOSEN = (1, 5), (1, 6)  # the two hottest; the experts of the token that is drawn
INK = "#1a1a1a"
FROZEN = {"facecolor": "#ededed", "edgecolor": INK, "linewidth": 0.9}
TRAINED = {"facecolor": "#9cc3e6", "edgecolor": INK, "linewidth": 2}
USED = {"arrowstyle": "-|>", "color": INK, "lw": 1.4}
UNUSED = {"arrowstyle": "-", "color": "#6b6b6b", "lw": 0.6, "ls": (0, (2, 3))}


def box(axes: Axes, x: float, y: float, width: float, text: str, style: dict) -> None:
    """A box with its left edge at x and its middle at y."""
    axes.add_patch(Rectangle((x, y - 0.35), width, 0.7, **style))
    axes.text(x + width / 2, y, text, ha="center", va="center")


def module(axes: Axes, x: float, y: float, *, has_pair: bool) -> None:
    """A frozen module, with its pair beside it if it has one."""
    box(axes, x, y, 0.75, "W", FROZEN)
    if has_pair:
        axes.text(x + 0.85, y, "+", ha="center", va="center")
        box(axes, x + 0.95, y, 0.75, "BA", TRAINED)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], style: dict) -> None:
    axes.annotate("", end, start, arrowprops={"shrinkA": 0, "shrinkB": 0} | style)


def draw_counts(axes: Axes) -> None:
    """Tokens per expert of one layer, the hottest marked."""
    for expert, count in enumerate(COUNTS):
        axes.barh(f"expert {expert}", count, 0.7, **(TRAINED if expert in HOT else FROZEN))
    axes.set_title("1  Count the tokens of each expert\n(here made up)", loc="left", fontsize=11)
    axes.set_xlabel("2  Choose the k hottest of every layer\n(here k = 2)", loc="left", fontsize=11)
    axes.set_xticks([])
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)


def draw_layer(axes: Axes) -> None:
    """One token through the layer: attention, router and hot experts have a pair."""
    title = "3  Attach pairs to attention, router and hot experts, and train these alone"
    axes.set_title(title, loc="left", fontsize=11)
    middle, experts = 3.5, 6.2
    box(axes, 0, middle, 0.7, "x", FROZEN)
    arrow(axes, (0.7, middle), (1.1, middle), USED)
    for x, name in ((1.1, "attention q, k, v, o"), (3.3, "router")):
        axes.text(x + 0.85, middle + 0.75, name, ha="center")
        module(axes, x, middle, has_pair=True)
    arrow(axes, (2.8, middle), (3.3, middle), USED)
    for expert in range(len(COUNTS)):
        row, is_hot = 7 - expert, expert in HOT
        arrow(axes, (5.0, middle), (experts, row), USED if expert in CHOSEN else UNUSED)
        module(axes, experts, row, has_pair=is_hot)
        formula = "hot: $Wx + \\frac{\\alpha}{r}BAx$" if is_hot else "cold: $Wx$"
        axes.text(experts + (1.9 if is_hot else 0.95), row, formula, va="center")
        if expert in CHOSEN:
            axes.plot([experts + (4.0 if is_hot else 2.1), 10.3], [row, row], color=INK, lw=1.4)
            arrow(axes, (10.3, row), (11.0, middle), USED)
            axes.text(10.45, row, f"$\\times\\; p_{expert}$")
    box(axes, 11.0, middle, 1.6, "$\\sum_e p_e\\,y_e$", FROZEN)
    for x, style, name in ((0, FROZEN, "frozen"), (1.7, TRAINED, "trained")):
        box(axes, x, -1.1, 0.5, "", style)
        axes.text(x + 0.6, -1.1, name, va="center")
    arrow(axes, (3.5, -1.1), (4.1, -1.1), USED)
    axes.text(4.2, -1.1, "the token's experts        W: each of an expert's three matrices", va="center")
    axes.set(xlim=(-0.1, 12.7), ylim=(-1.5, 7.6))
    axes.axis("off")


def main() -> None:
    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 7))
    draw_counts(left)
    draw_layer(right)
    figure.savefig(ROOT / "docs/method.png", metadata={"Software": None})


if __name__ == "__main__":
    main()
