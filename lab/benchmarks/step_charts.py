"""The pictures of `bench.py step`: bars for a table, curves for a sweep."""

from pathlib import Path

from matplotlib.figure import Figure  # not pyplot, which brings global state and looks for a display


def bars(rows: list[dict], path: Path) -> None:
    """Samples per second and peak memory of every row as bars, one panel per batch size."""
    run = [row for row in rows if row.get("peak_bytes")]
    batches = sorted({row["batch"] for row in run})
    figure = Figure(figsize=(10, 1 + 0.35 * len(run)), dpi=120, layout="constrained")
    panels = figure.subplots(len(batches), 2, squeeze=False, sharex="col")
    for (speed, memory), batch in zip(panels, batches, strict=True):
        shown = [row for row in run if row["batch"] == batch][::-1]
        names = [row["name"] for row in shown]
        colors = ["0.6" if n == "floor" else "tab:orange" if n.startswith("peft") else "tab:blue" for n in names]
        drawn = speed.barh(names, [row["samples_per_s"] for row in shown], color=colors)
        ratios = ["" if row["over_floor"] is None else f"{row['over_floor']:.2f} of floor" for row in shown]
        speed.bar_label(drawn, ratios, padding=3, fontsize=8)
        speed.set(title=f"batch {batch}: samples per second", xlim=(0, 1.3 * max(r["samples_per_s"] for r in shown)))
        drawn = memory.barh(names, [row["peak_bytes"] / 1e6 for row in shown], color=colors)
        memory.bar_label(drawn, fmt="%.0f", padding=3, fontsize=8)
        memory.set(title=f"batch {batch}: peak memory, MB", yticks=[])
        memory.set(xlim=(0, 1.2 * max(r["peak_bytes"] for r in shown) / 1e6))
    figure.savefig(path)


def lines(rows: list[dict], path: Path) -> None:
    """Samples per second, share of the floor's, and bytes saved for backward as curves over the values swept."""
    figure = Figure(figsize=(13, 4), dpi=120, layout="constrained")
    panels = figure.subplots(1, 3)
    sweep = rows[0]["sweep"]
    for name in dict.fromkeys(row["name"] for row in rows if row.get("saved_bytes")):
        line = [row for row in rows if row["name"] == name]
        values = [row["value"] for row in line]
        for axes, key in zip(panels, ("samples_per_s", "over_floor", "saved_bytes"), strict=True):
            scale = 1e6 if key == "saved_bytes" else 1
            axes.plot(values, [row[key] / scale for row in line], marker="o", label=name)
    for axes, title in zip(
        panels, ("samples per second", "share of the floor's speed", "saved for backward, MB"), strict=True
    ):
        axes.set(title=title, xlabel=sweep, xscale="log", ylim=(0, 1.1 * axes.dataLim.y1))
        axes.set_xticks(values, [str(value) for value in values], minor=False)
        axes.minorticks_off()
    panels[0].legend(frameon=False)
    figure.savefig(path)
