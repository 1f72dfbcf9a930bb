"""A table of the paper as rows of runs and columns of scores, and which runs it needs at a scale.

Table("Table 4: ...", columns=(Column("GSM8K", "math", "accuracy"),), rows=(Row("HELLoRA", "hellora"),))
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lab.markdown import grid
from lab.paper.page import Section, claim_text, mean_text, number_text
from lab.paper.published import sieve_accuracies
from lab.paper.runner import Needed
from lab.paper.runs import Run, common_rate
from lab.paper.verdicts import Estimate, estimate, paired, verdict

Scores = Callable[[Run, str], dict | None]  # of a run on a task; None: not run
Tune = Callable[[Run], Run | None]  # a run at the best rate of its sweep; None: the sweep is not complete


class Scale(NamedTuple):
    """Which models and tasks stand for those of the paper."""

    olmoe: str
    mixtral: str
    math: str
    code: str
    safety: str
    count_on: str = "base"  # of the paper's own methods: --count-on


SIEVE, BEST, COMMON = "MoE-Sieve, full size", "ours, best rate", "ours, common rate"  # who found a score, and how
SCALES = {
    "tiny": Scale("tiny", "tiny-mixtral", "tiny-math", "tiny-code", "tiny-safety"),
    "paper": Scale(
        "allenai/OLMoE-1B-7B-0924", "mistralai/Mixtral-8x7B-v0.1", "gsm8k", "codealpaca", "saferpaca", "lora"
    ),
}


class Column(NamedTuple):
    """A score: its name in the paper, the task it is of, and its key in score.json."""

    title: str
    task: str  # field of Scale
    metric: str
    tuned: bool = False  # at the best rate of each row's sweep (rates.py), and beside it at the common rate
    change: dict = {}  # other fields of every Run
    note: str = ""  # on these runs


class Row(NamedTuple):
    """A way to fine-tune, and what the paper prints for it."""

    name: str
    method: str  # key of METHODS, or "base"
    paper: tuple[float | None, ...] = ()  # percent, one per column; None: not printed
    against: str | None = None  # the row that it is compared with
    sieve: str | None = None  # the same choice of experts in MoE-Sieve's study
    claims: tuple[float | None, ...] = ()  # a method of another paper: the difference that this claims, one per column
    change: dict = {}  # other fields of Run; `task`, a field of Scale, where it is not the column's


@dataclass(frozen=True)
class Table:
    """A table of the paper, or a question that it leaves open."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    model: str = "olmoe"  # field of Scale
    seeds: int = 3
    notes: tuple[str, ...] = field(default=())
    change: dict = field(default_factory=dict)  # other fields of every Run

    def run(self, row: Row, column: Column, scale: Scale, seed: int, **changes) -> Run:
        """The run whose result stands in a cell, for one seed, at the common rate. The base model has no seed."""
        fields = self.change | column.change | row.change | changes
        task, model = getattr(scale, fields.pop("task", column.task)), getattr(scale, self.model)
        if row.method == "base":
            return Run(task, "base", model=model)
        if row.method == "fft" and "lr" in fields:
            fields["lr"] = round(fields["lr"] / 10, 9)  # a tenth of the adapters' rate, as in Table 1
        counted = fields.pop("count_on", scale.count_on if row.method.startswith("hellor") else "base")
        fields["count_on"] = None if counted == "base" else counted  # train.py's default
        return Run(task, row.method, seed, model, **fields)

    def runs(self, row: Row, column: Column, scale: Scale, seed: int, tune: Tune, **changes) -> dict[str, Run | None]:
        """The runs of a cell for one seed: at the best rate, where the column asks for it, and at the common one."""
        run = self.run(row, column, scale, seed, **changes)
        return {BEST: tune(run), COMMON: run} if column.tuned else {COMMON: run}

    def to_sweep(self, scale: Scale, **changes) -> list[Run]:
        """The runs, of one seed, that stand at the best rates of their sweeps."""
        columns = [column for column in self.columns if column.tuned]
        return [self.run(row, column, scale, 0, **changes) for column in columns for row in self.rows]

    def needed(self, scale: Scale, seeds: int, tune: Tune, **changes) -> Needed:
        """Every run of the table and the tasks that it is scored on, all rows of one seed before the next."""
        needed: Needed = {}
        for seed in range(seeds):
            for column in self.columns:
                for row in self.rows:
                    for run in self.runs(row, column, scale, seed, tune, **changes).values():
                        if run:
                            needed.setdefault(run, set()).add(getattr(scale, column.task))
        return needed

    # --------------------------------------------------------------------------------------------- what is printed

    def section(self, scale: Scale, seeds: int, scores: Scores, tune: Tune, **changes) -> Section:
        """The table with the paper's values, MoE-Sieve's and ours."""
        lines, rows = list(self.notes), []
        for place, column in enumerate(self.columns):
            ours = {row.name: self.values(row, column, scale, seeds, scores, tune, **changes) for row in self.rows}
            cells = [self.cell(row, place, ours) for row in self.rows]
            if column.tuned:
                at_best = {row.name: tune(self.run(row, column, scale, 0, **changes)) for row in self.rows}
                cells = [cell._replace(lr=learning_rate(at_best[cell.row.name])) for cell in cells]
            title = f"{column.title}, ours: {getattr(scale, column.task)}, in %{column.note and f', {column.note}'}"
            lines += ["", title, "", *show(cells)]
            rows += [cell.record(self.title, column) for cell in cells]
        return Section(self.title, lines[0 if self.notes else 1 :], rows)

    def values(
        self, row: Row, column: Column, scale: Scale, seeds: int, scores: Scores, tune: Tune, **changes
    ) -> dict[str, dict[int, float]]:
        """Our scores in %, by rate and by seed, of the seeds that were run."""
        values: dict[str, dict[int, float]] = {}
        for seed in range(seeds):
            for rate, run in self.runs(row, column, scale, seed, tune, **changes).items():
                by_seed = values.setdefault(rate, {})
                score = run and scores(run, getattr(scale, column.task))
                if score and (value := score.get(column.metric, score["rates"].get(column.metric))) is not None:
                    by_seed[seed] = 100 * value
        return values

    def cell(self, row: Row, place: int, ours: dict[str, dict[str, dict[int, float]]]) -> "Cell":
        """The numbers of a row in the column at `place`.  ours: of each row, by rate and by seed"""
        other = next((each for each in self.rows if each.name == row.against), None)
        column = self.columns[place]
        theirs = sieve_accuracies() if self.model == "olmoe" and column.title == "GSM8K" else {}
        place = [each.metric for each in self.columns].index(column.metric)  # the paper has each metric once
        printed, reference = (each.paper[place] if each and place < len(each.paper) else None for each in (row, other))
        claimed = None if None in (printed, reference) else printed - reference
        claimed = row.claims[place] if place < len(row.claims) else claimed
        sides = {}
        if theirs:
            sides[SIEVE] = compared(*(theirs.get(each.sieve, {}) if each else {} for each in (row, other)))
        for rate, by_seed in ours[row.name].items():
            if row.method == "base":  # for every seed the same
                by_seed = dict(list(by_seed.items())[:1])
            sides[rate] = compared(by_seed, ours[other.name][rate] if other else {})
        return Cell(row, printed, claimed, sides)


class Side(NamedTuple):
    """What one study found, in %."""

    values: list[float]  # by seed
    differences: list[float]  # from the row that it is compared with, paired by seed


def compared(values: dict[int, float], others: dict[int, float]) -> Side:
    """The scores of a row by seed, beside those of the row that it is compared with."""
    return Side(list(values.values()), paired(values, others))


class Cell(NamedTuple):
    """One row of one column, in %: the paper's value, MoE-Sieve's and ours."""

    row: Row
    paper: float | None
    claimed: float | None  # the paper's difference from the row that this one is compared with
    sides: dict[str, Side]  # SIEVE, BEST and COMMON, as far as the column has them
    lr: float | None = None  # the best rate

    def record(self, table: str, column: Column) -> dict:
        """The cell for JSON. ours: at the best rate, where the column has it."""
        sides = {name: self.as_dict(side) for name, side in self.sides.items()}
        return {
            "table": table,
            "column": column.title,
            "tuned": column.tuned,
            "row": self.row.name,
            "compared_with": self.row.against,
            "paper": self.paper,
            "paper_difference": self.claimed,
            "sieve": sides.get(SIEVE) or self.as_dict(Side([], [])),
            "ours": sides.get(BEST) or sides[COMMON],
            "lr": self.lr,
            "common": sides[COMMON],
        }

    def as_dict(self, side: Side) -> dict:
        mean, difference = (as_dict(estimate(numbers)) for numbers in side)
        return {"by_seed": side.values, **mean, "difference": difference, "verdict": self.verdict(side)}

    def verdict(self, side: Side) -> str:
        return verdict(side.differences, self.claimed) if self.row.against else "-"

    def texts(self, name: str) -> list[str]:
        """Mean, difference and verdict of one side."""
        side, missing = self.sides[name], "-" if name == SIEVE else "not run"
        mean = mean_text(estimate(side.values), missing=missing)
        if not self.row.against:
            return [mean, "", ""]
        judged = self.verdict(side) if side.values else missing
        return [mean, mean_text(estimate(side.differences), "+.1f", missing), judged]


def learning_rate(run: Run | None) -> float | None:
    """That of a run whose learning rate may be its task's; None for no run, or one of the base model."""
    if run is None or run.method == "base":
        return None
    return run.lr or common_rate(run.task, run.method)


def as_dict(interval: Estimate | None) -> dict:
    return interval._asdict() if interval else {"mean": None, "half": None, "n": 0}


def show(cells: list[Cell]) -> list[str]:
    """The rows of one column as a Markdown table; MoE-Sieve's columns only where it has a number."""
    sides = [name for name in cells[0].sides if name != SIEVE or any(cell.sides[SIEVE].values for cell in cells)]
    heads = ["method", "compared with", "paper", "difference"]
    for name in sides:
        heads += ["rate"] if name == BEST else []
        heads += ["ours" if name == COMMON and BEST not in sides else name, "difference", "verdict"]
    rows = []
    for cell in cells:
        claimed = claim_text(cell.claimed) if cell.row.against else ""
        line = [cell.row.name, cell.row.against or "", number_text(cell.paper), claimed]
        for name in sides:
            line += [number_text(cell.lr, "g")] if name == BEST else []
            line += cell.texts(name)
        rows.append(line)
    return grid(heads, rows)
