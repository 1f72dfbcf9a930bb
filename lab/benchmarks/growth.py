"""How the time of a step grows with k, E, the rank and the batch, as multiples of the frozen base's.

    OMP_NUM_THREADS=2 python bench.py growth --json results/growth.json --plot docs/growth.png

Each point is a ratio within one run: all rows of a point are timed in turn, on the same batches (step.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from command import cli
from command.cli import flag, say
from command.files import writable, write_json
from lab.benchmarks import step
from lab.benchmarks.measure import times_as_fast
from lab.benchmarks.subjects import BY_NUMBER
from lab.markdown import grid
from lab.paper.pictures import COLORS, POINT, new_figure
from lab.paper.verdicts import Estimate, estimate

LINES = ("hellora", "lora")
BATCH = 8
SERIES = {"experts": (16, 64, 128), "rank": (2, 8, 32), "batch": (2, 8, 32)}  # of each, the others as in step.py


@dataclass(frozen=True)
class Settings:
    """The flags of `bench.py growth`."""

    repeats: int = flag(5, "times each row is timed", type=cli.number(int, 2))
    json: str | None = flag(None, "write the points", metavar="FILE")
    plot: str | None = flag(None, "draw them", metavar="FILE.png")


def ratios(settings: step.Settings, batch: int = BATCH, **changes: int) -> dict[str, Estimate]:
    """The time of a step over that of the frozen base, by row, with the interval over the repetitions."""
    rows = {row["name"]: row for row in step.measure(settings, batch, **changes) if row.get("seconds")}
    times = {name: np.reshape(row["seconds"], (settings.repeats, -1)) for name, row in rows.items()}
    return {
        name: estimate([1 / times_as_fast(a[None], b[None]) for a, b in zip(of, times["floor"], strict=True)])
        for name, of in times.items()
        if name != "floor"
    }


def points(repeats: int) -> Iterator[dict]:
    """series, line, value, and the ratio."""
    basis = step.Settings(rank=step.RANKS["small"], dtype="float32", repeats=repeats, names=("floor", *LINES))
    by_k = {**BY_NUMBER, "hellora": 8, "lora": 64}
    for name, ratio in ratios(replace(basis, names=("floor", *by_k))).items():
        yield {"series": "k", "line": "hellora", "value": by_k[name], **ratio._asdict()}
    for series, values in SERIES.items():
        for value in values:
            for name, ratio in measured(basis, series, value).items():
                yield {"series": series, "line": name, "value": value, **ratio._asdict()}


def measured(basis: step.Settings, series: str, value: int) -> dict[str, Estimate]:
    """The ratios with one thing changed. Of more experts, as many are hot."""
    if series == "experts":
        return ratios(basis, num_experts=value)
    if series == "rank":
        return ratios(replace(basis, rank=value))
    return ratios(basis, value)


def draw(made: list[dict], path: Path) -> None:
    """A panel for each series."""
    series = list(dict.fromkeys(point["series"] for point in made))
    figure, panels = new_figure("Time of a training step, times the frozen base", 3.2, panels=len(series))
    for axes, name in zip(panels, series, strict=True):
        for i, line in enumerate(LINES):
            own = sorted((p for p in made if (p["series"], p["line"]) == (name, line)), key=lambda p: p["value"])
            values, means, halves = ([p[key] for p in own] for key in ("value", "mean", "half"))
            axes.errorbar(values, means, halves, color=COLORS[i], linestyle="-", label=line, **POINT)
        ticks = sorted({p["value"] for p in made if p["series"] == name})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("k (64: LoRA on all experts)" if name == "k" else name)
        axes.axhline(1, color="0.6", linewidth=0.8)
    figure.legend(*panels[-1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path)


def main(argv: list[str]) -> list[dict]:
    """Measure, print and draw; -> the points."""
    settings = cli.parse(
        Settings,
        argv,
        prog="bench.py growth",
        description="How the time of a step grows with k, with the number of experts, the rank and the batch.",
        example="OMP_NUM_THREADS=2 python bench.py growth --plot growth.png",
    )
    out, picture = (name and writable(name) for name in (settings.json, settings.plot))
    made = list(points(settings.repeats))
    say(*grid(
        ["", "value", "row", "time / frozen base"],
        [[p["series"], str(p["value"]), p["line"], f"{p['mean']:.2f} ± {p['half']:.2f}"] for p in made],
    ))  # fmt: skip
    if out:
        write_json(out, made)
    if picture:
        draw(made, picture)
    return made
