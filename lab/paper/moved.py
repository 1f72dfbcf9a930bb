"""Where several runs learnt, side by side: how far each expert moved, beside the tokens that it receives.

    python reproduce.py moved RUN RUN --plot moved.png      # any runs of train.py that adapt experts of one model

Dimensions: L layers with experts, E experts per layer.
"""

from dataclasses import dataclass
from math import isnan
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from torch import Tensor

from command import cli
from command.cli import InputError, flag
from command.files import writable
from diagnosis.measure import Table, adapter_changes, by_expert
from diagnosis.report import rank_correlation
from hellora import hottest
from lab.markdown import grid
from lab.paper.pictures import draw_moved
from routing.profiles import load_profile
from run.adapters import read_loosely, weights_of
from run.subject import Subject

HOTTEST = 8  # of each layer, beside all others


class Moved(NamedTuple):
    """One run."""

    name: str
    counts: Tensor  # int [L, E], tokens that chose each expert when the run counted them
    experts: Table

    def correlation(self, chosen: Tensor) -> str:
        """Rank correlation of |dW| / |W| and tokens, of the chosen experts bool [L, E]; mean over the layers.

        - where a layer has too few of the chosen experts.
        """
        rows = zip(self.experts.ratio, self.counts, chosen, strict=True)
        mean = fmean(rank_correlation(ratio[kept][None], counts[kept][None]) for ratio, counts, kept in rows)
        return "-" if isnan(mean) else f"{mean:.2f}"

    @property
    def title(self) -> str:
        """The run in the picture."""
        all_, moved = self.correlation(self.experts.has_pair), self.correlation(self.experts.moved)
        return f"{self.name}: rank correlation with the tokens {all_}; of the experts that moved {moved}"

    def row(self) -> list[str]:
        """The line of the table."""
        ratio, moved = 100 * self.experts.ratio, self.experts.moved
        hot = hottest(self.counts, HOTTEST)
        medians = (ratio[moved & each] for each in (hot, ~hot))
        return [
            self.name,
            f"{int(moved.sum())} of {int(self.experts.has_pair.sum())}",
            *(f"{values.median():.1f} %" if len(values) else "-" for values in medians),
            self.correlation(self.experts.has_pair),
            self.correlation(moved),
        ]


def read_run(run: str) -> Moved:
    """How far the experts of a run moved. Raises InputError for a folder that is no run with an adapter."""
    subject = Subject(run)
    if subject.run is None or subject.adapter is None:
        raise InputError(f"{run}: expected a run folder of train.py with an adapter")
    subject.check_base()
    reading, config = read_loosely(subject.adapter, subject.config), subject.config
    experts = by_expert(adapter_changes(reading, weights_of(subject.folder, config), config), config)
    return Moved(Path(run).resolve().name, load_profile(Path(run) / "profile.json").counts, experts)


@dataclass(frozen=True)
class Settings:
    """The flags of `reproduce.py moved`."""

    runs: list[str] = flag(help="run folders of train.py on one model", positional=True, nargs="+", metavar="RUN")
    plot: str | None = flag(None, "where to draw the picture", metavar="FILE", type=cli.picture)


def command(argv: list[str]) -> list[Moved]:
    """Print how far hot and other experts moved in each run, and draw it."""
    settings = cli.parse(
        Settings,
        argv,
        prog="reproduce.py moved",
        description="How far each expert moved in several runs, beside the tokens that it receives.",
        example="python reproduce.py moved runs/tiny-math-hellora runs/tiny-math-lora --plot moved.png",
    )
    plot = settings.plot and writable(settings.plot)
    runs = [read_run(run) for run in settings.runs]
    if any(run.counts.shape != runs[0].counts.shape for run in runs):
        raise InputError("the runs have different numbers of layers or experts; name runs on one model")
    heads = ["run", "moved", f"the {HOTTEST} hottest", "others that moved", "rank correlation", "of those that moved"]
    cli.say(*grid(heads, [run.row() for run in runs]))
    if plot:
        panels = {run.title: run.experts for run in runs}
        draw_moved(runs[0].counts, panels, plot)
    return runs
