"""A table of the paper as rows of runs and columns of scores, and which runs it needs at a scale.

Table("4", ..., columns=(Column("GSM8K", "math", "accuracy", 100),), rows=(Row("HELLoRA", {"method": "hellora"}, ...),))
"""

from dataclasses import dataclass, field
from typing import NamedTuple

from paper.runner import Needed
from paper.runs import Run


class Scale(NamedTuple):
    """Which models and tasks stand for those of the paper."""

    olmoe: str
    mixtral: str
    math: str
    code: str
    safety: str


SCALES = {
    "tiny": Scale("tiny", "tiny-mixtral", "tiny-math", "tiny-code", "tiny-safety"),
    "paper": Scale("allenai/OLMoE-1B-7B-0924", "mistralai/Mixtral-8x7B-v0.1", "gsm8k", "codealpaca", "saferpaca"),
}


class Column(NamedTuple):
    """A score: its name in the paper, the task it is of, and its key in score.json."""

    title: str
    task: str  # field of Scale
    metric: str


class Row(NamedTuple):
    """A way to fine-tune, and what the paper prints for it."""

    name: str
    run: dict  # fields of Run; `task`, a field of Scale, where it is not the column's
    paper: tuple[float | None, ...] = ()  # percent, one per column; None: not printed
    against: str | None = None  # the row that it is compared with
    sieve: str | None = None  # the same choice of experts in MoE-Sieve's study


@dataclass(frozen=True)
class Table:
    """A table of the paper, or a question that it leaves open."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    model: str = "olmoe"  # field of Scale
    seeds: int = 3
    notes: tuple[str, ...] = field(default=())

    def run(self, row: Row, column: Column, scale: Scale, seed: int, **changes) -> Run:
        """The run whose result stands in a cell, for one seed. The model as it is has no seed."""
        fields = row.run | changes
        task = getattr(scale, fields.pop("task", column.task))
        seed = 0 if row.run["method"] == "base" else seed
        return Run(task, seed=seed, model=getattr(scale, self.model), **fields)

    def needed(self, scale: Scale, seeds: int, **changes) -> Needed:
        """Every run of the table and the tasks that it is scored on, all rows of one seed before the next."""
        found: Needed = {}
        for seed in range(seeds):
            for column in self.columns:
                for row in self.rows:
                    run = self.run(row, column, scale, seed, **changes)
                    found.setdefault(run, set()).add(getattr(scale, column.task))
        return found
