"""Each method at its own learning rate: sweeps over rates on validation problems, which no table uses.

    sweeps = Sweeps(records)                 # of runs that are scored on validation problems
    while missing := sweeps.missing(runs):   # the rates of the grid, then further ones beyond its ends
        make(missing, place)
    sweeps.at_best(run)                      # the run at the rate whose mean validation score is largest

The validation problems come from the generators of the test problems, with another seed. Those that are also test
problems are left out.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

import data
from command.files import write_text
from lab.markdown import grid
from lab.paper.page import Section
from lab.paper.pictures import draw_rates
from lab.paper.runner import Needed
from lab.paper.runs import Records, Run, common_rate
from recipes.methods import METHODS
from tiny import tasks

MAIN = "tiny-math"  # whose sweeps begin with GRID rates; those of other tasks with three, around the best rate here
MAIN_MODEL = {"tiny-mixtral": "tiny"}  # likewise, for sweeps of tiny-mixtral
GRID = 5  # rates of a sweep, each twice the one before
SMALLEST = {"fft": 1.5e-4}  # the first of them
SMALLEST_OF_ADAPTERS = 3e-3
SEEDS = (100, 101)  # no table has them; sweeps on other tasks and models have the first alone
PROBLEMS = {
    "tiny-math": lambda: tasks.math_rows(700, "test", seed=1),
    "tiny-code": lambda: tasks.code_problems(240, seed=1),
    "tiny-safety": lambda: tasks.safety_prompts(1000, seed=1),
}
QUESTION = {"tiny-math": "question", "tiny-code": "prompt", "tiny-safety": "instruction"}
LIMIT, SAMPLES = 500, 5  # problems of a validation, and completions of each of tiny-code's


def write_validation(folder: Path) -> None:
    """FOLDER/TASK-test.jsonl: the validation problems of the embedded tasks, in the place of their test problems."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, problems in PROBLEMS.items():
        key = QUESTION[task]
        test = {example.row[key] for example in data.load_examples(task, "test")}
        rows = [row for row in problems() if row[key] not in test]
        write_text(folder / f"{task}-test.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def validation_score(task: str, score: dict) -> float:
    """What a rate is chosen by, in %: accuracy, pass@1, or the mean of refusals and answers where either is right."""
    if task == "tiny-safety":
        return 50 * (1 + score["refusal_rate"] - score["rates"]["over-refusal, lori"])
    return 100 * score["accuracy" if task == "tiny-math" else "pass@1"]


def swept(run: Run) -> Run:
    """The run whose sweep a run uses: of its method and budget, whichever experts and other modules it adapts."""
    return replace(run, seed=0, lr=None, experts=None, targets=None, count_on=None, sample=None, profile=None)


def on_main(run: Run) -> Run:
    """The same run on the main task and model."""
    return replace(run, task=MAIN, model=MAIN_MODEL.get(run.model, run.model))


@dataclass(frozen=True)
class Sweeps:
    """The sweeps that have been made, as records of runs that are scored on validation problems."""

    records: Records

    def runs(self, run: Run, lr: float) -> list[Run]:
        """The runs of a sweep at one rate, a seed each."""
        return [replace(run, lr=lr, seed=seed) for seed in (SEEDS if run == on_main(run) else SEEDS[:1])]

    def score(self, run: Run, lr: float) -> float | None:
        """The mean validation score at a rate; None if a run has yet to be made."""
        scores = [self.records.scores(each, run.task) for each in self.runs(run, lr)]
        return None if None in scores else mean(validation_score(run.task, score) for score in scores)

    def first_rates(self, run: Run) -> list[float]:
        """The rates that a sweep begins with; none while the sweep on the main task and model lacks runs."""
        if run == on_main(run):
            return [SMALLEST.get(run.method, SMALLEST_OF_ADAPTERS) * 2**i for i in range(GRID)]
        best = self.best(on_main(run))
        return [best / 2, best, 2 * best] if best else []

    def curve(self, run: Run) -> dict[float, float | None]:
        """Rate -> mean validation score, for the first rates, and beyond an end that none scores better than."""
        rates = self.first_rates(run)
        scores = [self.score(run, lr) for lr in rates]

        def is_best(end: float | None) -> bool:
            return None not in scores and min(scores) < end == max(scores)

        while scores and is_best(scores[0]):
            rates.insert(0, rates[0] / 2)
            scores.insert(0, self.score(run, rates[0]))
        while scores and is_best(scores[-1]):
            rates.append(rates[-1] * 2)
            scores.append(self.score(run, rates[-1]))
        return dict(zip(rates, scores, strict=True))

    def missing(self, runs: Iterable[Run]) -> Needed:
        """The runs that some sweeps lack. A sweep whose best rate is at an end lacks a further rate.

        runs: one of each sweep, see `swept`
        """
        asked = dict.fromkeys(run for run in runs if run.method != "base")
        needed: Needed = {}
        for run in (*map(on_main, asked), *asked):
            for lr in (lr for lr, score in self.curve(run).items() if score is None):
                lacking = (each for each in self.runs(run, lr) if not self.records.scores(each, run.task))
                needed |= {each: {run.task} for each in lacking}
        return needed

    def best(self, run: Run) -> float | None:
        """The rate with the largest mean score; None while the sweep lacks runs."""
        curve = self.curve(run)
        return max(curve, key=curve.get) if curve and None not in curve.values() else None

    def at_best(self, run: Run) -> Run | None:
        """The run at the best rate of its sweep; None while the sweep lacks runs."""
        if run.method == "base":
            return run
        best, common = self.best(swept(run)), common_rate(run.task, run.method)
        return best and replace(run, lr=None if best == common else best)  # one run where both rates are the same

    # --------------------------------------------------------------------------------------------- what is printed

    def section(self, runs: dict[str, Run], out: Path) -> Section:
        """Validation score against learning rate, as a table and as a picture.  runs: name -> one of each sweep"""
        curves = {name: self.curve(run) for name, run in runs.items()}
        left_out = [name for name, curve in curves.items() if None in curve.values()]
        curves = {name: curve for name, curve in curves.items() if name not in left_out}
        rates = sorted({lr for curve in curves.values() for lr in curve})
        rows = []
        for name, curve in curves.items():
            best = max(curve, key=curve.get)
            texts = {lr: f"**{score:.1f}**" if lr == best else f"{score:.1f}" for lr, score in curve.items()}
            rows.append([name, *(texts.get(lr, "") for lr in rates)])
        rows += [[name, "not run", *[""] * (len(rates) - 1)] for name in left_out]
        title = "Score against learning rate"
        lines = ["No sweep is complete yet."]
        if curves:
            adapters = {name: curve for name, curve in curves.items() if METHODS[runs[name].method].adapts}
            kinds = {name: METHODS[runs[name].method].kind == "lori" for name in adapters}
            panels = {
                part: {name: curve for name, curve in adapters.items() if kinds[name] == frozen}
                for part, frozen in (("A trains", False), ("A is frozen", True))
            }
            draw_rates(panels, f"{title}, validation problems of tiny-math", out / "rates.png")
            lines = [NOTE, "", f"![{title}](rates.png)", "", *grid(["method", *(f"{lr:g}" for lr in rates)], rows)]
        return Section(title, lines, [{"method": name, "scores": curve} for name, curve in curves.items()])


NOTE = (
    "Accuracy on 500 validation problems of tiny-math in %, the mean of two seeds unused in tables, at learning rates "
    "that double. The best of each row is bold. A sweep continues as long as its best rate is the smallest or the "
    "largest. The picture leaves out full fine-tuning, whose rates are far smaller."
)
