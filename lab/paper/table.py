"""A table of the paper as rows of runs and columns of scores, and which runs it needs at a scale.

Table("Table 4: ...", columns=(Column("GSM8K", "math", "accuracy"),), rows=(Row("HELLoRA", "hellora"),))
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lab.markdown import grid
from lab.paper.page import Section, claim_text, mean_text, number_text
from lab.paper.published import sieve_accuracies
from lab.paper.runner import Needed
from lab.paper.runs import Run, common_rate
from lab.paper.verdicts import estimate, paired, verdict

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


SIEVE, OURS = "MoE-Sieve, full size", "ours"  # who found a score
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
    tuned: bool = False  # at the best rate of each row's sweep (rates.py), and not at one common rate
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
    notes: tuple[str, ...] = ()
    scale: Scale = SCALES["tiny"]
    change: dict = field(default_factory=dict)  # other fields of every Run

    def task(self, column: Column) -> str:
        """The task of a column."""
        return getattr(self.scale, column.task)

    def run(self, row: Row, column: Column, seed: int = 0) -> Run:
        """The run whose result stands in a cell, for one seed, at the common rate. The base model has no seed."""
        fields = column.change | row.change | self.change
        task, model = getattr(self.scale, fields.pop("task", column.task)), getattr(self.scale, self.model)
        if row.method == "base":
            return Run(task, "base", model=model)
        if row.method == "fft" and "lr" in fields:
            fields["lr"] = round(fields["lr"] / 10, 9)  # a tenth of the adapters' rate, as in Table 1
        counted = fields.pop("count_on", self.scale.count_on if row.method.startswith("hellor") else "base")
        fields["count_on"] = None if counted == "base" else counted  # train.py's default
        return Run(task, row.method, seed, model, **fields)

    def runs(self, row: Row, column: Column, tune: Tune) -> list[Run | None]:
        """The run of each seed: at the best rate, if the column asks for it; None while its sweep lacks runs."""
        runs = [self.run(row, column, seed) for seed in range(self.seeds)]
        return [tune(run) for run in runs] if column.tuned else runs

    def to_sweep(self) -> list[Run]:
        """The runs, of one seed, that stand at the best rates of their sweeps."""
        columns = [column for column in self.columns if column.tuned]
        return [self.run(row, column) for column in columns for row in self.rows]

    def needed(self, tune: Tune) -> Needed:
        """Every run of the table and the tasks that it is scored on, all rows of one seed before the next."""
        needed: Needed = {}
        cells = list(itertools.product(self.columns, self.rows))
        by_cell = [self.runs(row, column, tune) for column, row in cells]
        for of_seed in zip(*by_cell, strict=True):
            for run, (column, _) in zip(of_seed, cells, strict=True):
                if run:
                    needed.setdefault(run, set()).add(self.task(column))
        return needed

    # --------------------------------------------------------------------------------------------- what is printed

    def section(self, scores: Scores, tune: Tune) -> Section:
        """The table with the paper's values, MoE-Sieve's and ours."""
        lines, rows = list(self.notes), []
        for column in self.columns:
            ours = {row.name: self.values(row, column, scores, tune) for row in self.rows}
            cells = [self.cell(row, column, ours) for row in self.rows]
            if column.tuned:
                cells = [cell._replace(lr=learning_rate(tune(self.run(cell.row, column)))) for cell in cells]
            title = f"{column.title}, ours: {self.task(column)}, in %{column.note and f', {column.note}'}"
            lines += ["", title, "", *show(cells)]
            rows += [cell.record(self.title, column) for cell in cells]
        return Section(self.title, lines[0 if self.notes else 1 :], rows)

    def values(self, row: Row, column: Column, scores: Scores, tune: Tune) -> dict[int, float]:
        """Our scores in %, by seed, of the seeds that were run."""
        values = {}
        for seed, run in enumerate(self.runs(row, column, tune)):
            score = run and scores(run, self.task(column))
            if score and (value := score.get(column.metric, score["rates"].get(column.metric))) is not None:
                values[seed] = 100 * value
        return values

    def cell(self, row: Row, column: Column, ours: dict[str, dict[int, float]]) -> "Cell":
        """The numbers of a row in a column.  ours: of each row, by seed"""
        other = next((each for each in self.rows if each.name == row.against), None)
        place = [each.metric for each in self.columns].index(column.metric)  # the paper has each metric once
        printed, reference = (each.paper[place] if each and place < len(each.paper) else None for each in (row, other))
        claimed = None if None in (printed, reference) else printed - reference
        claimed = row.claims[place] if place < len(row.claims) else claimed
        sides = {}
        if self.model == "olmoe" and column.title == "GSM8K":
            theirs = sieve_accuracies()
            values, others = (theirs.get(each.sieve, {}) if each else {} for each in (row, other))
            sides[SIEVE] = Side(values, paired(values, others))
        by_seed = ours[row.name]
        if row.method == "base":  # for every seed the same
            by_seed = dict(list(by_seed.items())[:1])
        sides[OURS] = Side(by_seed, paired(by_seed, ours[other.name] if other else {}))
        return Cell(row, printed, claimed, sides)


class Side(NamedTuple):
    """What one study found, in %."""

    values: dict[int, float]  # by seed
    differences: list[float]  # from the row that it is compared with, paired by seed


class Cell(NamedTuple):
    """One row of one column, in %: the paper's value, MoE-Sieve's and ours."""

    row: Row
    paper: float | None
    claimed: float | None  # the paper's difference from the row that this one is compared with
    sides: dict[str, Side]  # OURS, and SIEVE if the column has it
    lr: float | None = None  # the best rate

    def record(self, table: str, column: Column) -> dict:
        """The cell for JSON."""
        sides = {name: self.as_dict(side) for name, side in self.sides.items()}
        return {
            "table": table,
            "column": column.title,
            "tuned": column.tuned,
            "row": self.row.name,
            "compared_with": self.row.against,
            "paper": self.paper,
            "paper_difference": self.claimed,
            "sieve": sides.get(SIEVE) or self.as_dict(Side({}, [])),
            "ours": sides[OURS],
            "lr": self.lr,
        }

    def as_dict(self, side: Side) -> dict:
        mean, difference = estimate(side.values.values())._asdict(), estimate(side.differences)._asdict()
        return {"by_seed": side.values, **mean, "difference": difference, "verdict": self.verdict(side)}

    def verdict(self, side: Side) -> str:
        return verdict(side.differences, self.claimed) if self.row.against else "-"

    def texts(self, name: str) -> list[str]:
        """Mean, difference and verdict of one side."""
        side, missing = self.sides[name], "-" if name == SIEVE else "not run"
        mean = mean_text(estimate(side.values.values()), missing=missing)
        if not self.row.against:
            return [mean, "", ""]
        judged = self.verdict(side) if side.values else missing
        return [mean, mean_text(estimate(side.differences), "+.1f", missing), judged]


def learning_rate(run: Run | None) -> float | None:
    """That of a run whose learning rate may be its task's; None for no run, or one of the base model."""
    if run is None or run.method == "base":
        return None
    return run.lr or common_rate(run.task, run.method)


def show(cells: list[Cell]) -> list[str]:
    """The rows of one column as a Markdown table; MoE-Sieve's columns and the rate only where there is one."""
    sides = [name for name in cells[0].sides if name != SIEVE or any(cell.sides[SIEVE].values for cell in cells)]
    heads = ["method", "compared with", "paper", "difference"]
    has_rate = any(cell.lr for cell in cells)
    for name in sides:
        heads += ["rate"] if name == OURS and has_rate else []
        heads += [name, "difference", "verdict"]
    rows = []
    for cell in cells:
        claimed = claim_text(cell.claimed) if cell.row.against else ""
        line = [cell.row.name, cell.row.against or "", number_text(cell.paper), claimed]
        for name in sides:
            line += [number_text(cell.lr, "g")] if name == OURS and has_rate else []
            line += cell.texts(name)
        rows.append(line)
    return grid(heads, rows)
