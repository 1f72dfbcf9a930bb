"""The command behind reproduce.py: the runs that tables need, what is printed, and the page of the results."""

import itertools
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from command import cli
from command.cli import InputError, RunError, flag, number
from command.files import claimed, writable, write_json
from lab.paper import budget, effects, moved, params, published, reasons, routing, speed
from lab.paper.page import Section, write_page
from lab.paper.rates import LIMIT, SAMPLES, SEEDS, Sweeps, swept, write_validation
from lab.paper.runner import Needed, Workplace, dry_run, make, pending
from lab.paper.runs import Records, Run, spent
from lab.paper.table import SCALES, Table
from lab.paper.tables import TABLES

FIGURES = {
    "params": lambda out, may_run: params.section(),
    "sieve": lambda out, may_run: published.section(),
    "table6": lambda out, may_run: speed.table6(out),
    "fig1": routing.figure1,
    "fig3": routing.figure3,
    "fig4": lambda out, may_run: routing.figure4(out),
    "fig5": lambda out, may_run: speed.figure5(out),
    "fig6": routing.figure6,
}
ORDER = ("params", *(f"table{n}" for n in range(2, 9)), "hellori", "router", "topup", "sieve")
ORDER += ("table9", "table9-code", "table9-safety", "rates", "budgets", "catcher", "reasons")
ORDER += tuple(f"fig{n}" for n in (1, 3, 4, 5, 6))
RESTS_ON = {"budgets": ("table2", "table9"), "reasons": ("table2",)}  # tables whose runs it shows
EMBEDDED_RANKS = ("table9", "table9-code", "table9-safety")  # their rows have one budget where the recipe's rank is 8
QUICK = {  # by scale: enough to learn something, or to see that every part works
    "tiny": {"steps": 40, "lr": 1e-2},
    "paper": {"steps": 10},
}
QUICK_LIMIT, QUICK_SEEDS = 100, 2
PAPER_SEEDS = 10  # Table 1
CODE_SAMPLES = 10  # of a problem of tiny-code: pass@10 needs as many; the paper has 20
POSITIVE = number(int, 1)
SCRATCH = Path("runs/reproduce")


@dataclass(frozen=True)
class Settings:
    """The flags of every table and figure."""

    seeds: int | None = flag(
        None, "runs of each cell (default: by table; 10 at --scale paper)", type=number(int, 1, SEEDS[0])
    )
    jobs: int = flag(1, "runs made at once", type=POSITIVE)
    quick: bool = flag(False, "a trial in runs/quick: first column, 40 steps, 2 seeds, 100 problems")
    dry_run: bool = flag(False, "print the commands that would run")
    no_run: bool = flag(False, "print the results of the finished runs")
    scale: str = flag("tiny", "the embedded models and tasks, or the paper's", choices=list(SCALES))
    model: str | None = flag(None, "a checkpoint in place of the scale's", metavar="DIR")
    data: str | None = flag(None, "folder of local files TASK-train.* and TASK-test.*", metavar="DIR")
    processes: int | None = flag(None, "processes of each run (default: 1; --scale paper: 2)", type=POSITIVE)
    out: str | None = flag(None, "folder of runs and figures (default: results, or runs/SCALE)", metavar="DIR")
    json: str | None = flag(None, "where to write the rows", metavar="FILE")
    activation_checkpointing: bool = flag(False, "train with less memory: compute layers twice")
    allow_code_execution: bool = flag(False, "run model-written code even if the sandbox only limits resources")

    @property
    def is_embedded(self) -> bool:
        """Whether the models and the tasks are the embedded ones, whose runs record more than their score."""
        return self.scale == "tiny" and not (self.model or self.data)

    @property
    def folder(self) -> Path:
        folder = "runs/quick" if self.quick else "results" if self.is_embedded else f"runs/{self.scale}"
        return Path(self.out or folder)

    def table(self, name: str) -> Table:
        """A table, without the scores that need a sweep where there are no validation problems or no time for it.

        The rate of a column is for the embedded tasks.
        """
        table, scale = TABLES[name], SCALES[self.scale]
        columns, rows = table.columns, table.rows
        if self.quick or self.scale != "tiny":
            each_once = {}  # at whichever rate
            for column in columns:
                each_once.setdefault((column.task, column.metric), column._replace(tuned=False, change={}, note=""))
            columns = [*each_once.values()]
        elif self.data:
            columns = [column._replace(tuned=False) for column in columns]
        if self.scale == "paper" or self.model:  # the counts in results/profiles are of the embedded model
            rows = tuple(row for row in rows if "profile" not in row.change)
        return replace(
            table,
            columns=tuple(columns[:1] if self.quick else columns),
            rows=rows,
            seeds=self.seeds or (QUICK_SEEDS if self.quick else PAPER_SEEDS if self.scale == "paper" else table.seeds),
            scale=scale._replace(olmoe=self.model, mixtral=self.model) if self.model else scale,
            change=QUICK[self.scale] if self.quick else {},
        )

    def workplace(self) -> Workplace:
        limit, samples = (QUICK_LIMIT if self.quick else None), (CODE_SAMPLES if self.scale == "tiny" else None)
        processes = self.processes or (2 if self.scale == "paper" else 1)
        if self.data and not Path(self.data).is_dir():
            raise InputError(f"--data {self.data}: no such folder; name one with files like gsm8k-test.jsonl")
        records = Records(self.folder / "runs", self.data, limit, samples)
        train_flags = ("--activation-checkpointing",) if self.activation_checkpointing else ()
        evaluate_flags = ("--allow-code-execution",) if self.allow_code_execution else ()
        return Workplace(records, SCRATCH, self.jobs, processes, train_flags, evaluate_flags)

    def sweep_place(self) -> Workplace:
        """Where the runs of sweeps are made: scored on validation problems, with records of their own."""
        records = Records(self.folder / "sweeps", str(SCRATCH / "validation"), LIMIT, SAMPLES)
        return replace(self.workplace(), records=records)


def reproduce(names: tuple[str, ...], argv: list[str]) -> list[Section]:
    """Make the runs that some tables lack, print tables and figures, and for all of them write the page."""
    name = names[0] if len(names) == 1 else "all"
    settings = cli.parse(
        Settings,
        argv,
        prog=f"reproduce.py {name}",
        description="The paper's numbers beside ours. The missing runs of a table are made first.",
        example=f"python reproduce.py {name} --jobs 2",
    )
    if settings.scale == "paper":
        names = tuple(each for each in names if each not in EMBEDDED_RANKS)
        if not names:
            raise InputError(f"{name} has ranks for the embedded model; leave out --scale paper")
    if settings.dry_run and settings.no_run:
        raise InputError("--dry-run and --no-run contradict each other; give one of them")
    out = settings.json and writable(settings.json)
    place, sweep_place = settings.workplace(), settings.sweep_place()
    further = (RESTS_ON.get(name, ()) for name in names if name != "reasons" or settings.is_embedded)
    tables = [settings.table(name) for name in (*names, *itertools.chain(*further)) if name in TABLES]
    to_sweep = [swept(run) for table in tables for run in table.to_sweep()]
    to_sweep += rate_runs(settings).values() if "rates" in names else []
    sweeps, failed = Sweeps(sweep_place.records), {}
    if to_sweep:
        write_validation(Path(sweep_place.records.data))
    if settings.dry_run:
        missing, known = sweeps.missing(to_sweep), needed_by(tables, sweeps)
        if missing:
            cli.say(*dry_run(missing, sweep_place))
            cli.say("# then the runs at the best rates" + (", and:" if known else ""))
        if known or not missing:
            cli.say(*dry_run(known, place))
        return []
    if (tables or to_sweep) and not settings.no_run:
        with claimed(place.scratch):
            while not failed and (missing := sweeps.missing(to_sweep)):
                failed = make(missing, sweep_place)
            if any("profile" in row.change for table in tables for row in table.rows):
                routing.count_after_tuning()
            failed |= make(needed_by(tables, sweeps), place)
    if settings.no_run and (left := sweeps.missing(to_sweep) | pending(needed_by(tables, sweeps), place.records)):
        cli.note(f"--no-run: at least {len(left)} runs are not there; without --no-run they are made")
    sections = [section(name, settings, place, sweeps) for name in names]
    for each in sections:
        cli.say(*each.text())
    if out:
        write_json(out, [row for each in sections for row in each.rows])
    if name == "all":
        timed = [seconds for record in place.records if (seconds := spent(record))]
        typical = f"; the median run took {median(timed):.0f} s" if timed else ""
        write_page(settings.folder, sections, f"There are {len(list(place.records))} of them{typical}")
    if failed:
        raise RunError(f"runs that failed: {len(failed)}; the first: {next(iter(failed.values()))}")
    return sections


def needed_by(tables: list[Table], sweeps: Sweeps) -> Needed:
    """The runs of some tables, by seed, so that all tables fill evenly."""
    needed: Needed = {}
    for table in tables:
        for run, tasks in table.needed(sweeps.at_best).items():
            needed.setdefault(run, set()).update(tasks)
    return dict(sorted(needed.items(), key=lambda item: item[0].seed))


def rate_runs(settings: Settings) -> dict[str, Run]:
    """The sweeps of the figure: those of Tables 2 and 9, each by the name of its first row, and one of random experts.

    HELLoRA on random experts has the rate of HELLoRA's sweep. Its own sweep shows whether that is its best one.
    """
    named: dict[Run, str] = {}
    for table in map(settings.table, RESTS_ON["budgets"]):
        for row, run in zip(table.rows, table.to_sweep(), strict=False):  # or none at all
            named.setdefault(swept(run), row.name)
            if row.change == {"experts": "random"}:
                named.setdefault(replace(swept(run), experts="random"), row.name)
    return {name: run for run, name in named.items()}


def section(name: str, settings: Settings, place: Workplace, sweeps: Sweeps) -> Section:
    """A table or a figure from what has been run."""
    if name == "rates":
        return sweeps.section(rate_runs(settings), settings.folder)
    if name == "budgets":
        tables = [settings.table(each) for each in RESTS_ON[name]]
        return budget.section(tables, place.records, sweeps.at_best, settings.folder)
    if name == "reasons":
        return reasons.section(settings.table("table2"), place.records, sweeps.at_best)
    if name in FIGURES:
        settings.folder.mkdir(parents=True, exist_ok=True)
        return FIGURES[name](settings.folder, may_run=not settings.no_run)
    table = settings.table(name)
    made = table.section(place.records.scores, sweeps.at_best)
    if name == "catcher":
        lines, rows = reasons.cost(table, place.records)
        return made._replace(lines=made.lines + lines, rows=made.rows + rows)
    return made


COMMANDS = {name: partial(reproduce, (name,)) for name in ORDER}
COMMANDS |= {
    "params": params.params,
    "effects": effects.command,
    "moved": moved.command,
    "all": partial(reproduce, ORDER),
}
