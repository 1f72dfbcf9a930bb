"""The command behind reproduce.py: the tables as the paper prints them, their runs, and the page of the results."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

from command import cli
from command.cli import InputError, RunError, flag, number
from command.files import writable, write_json
from lab.paper import params, published, routing, speed
from lab.paper.page import Section, write_page
from lab.paper.runner import Workplace, add, alone, dry_run, make, pending, plan_line
from lab.paper.runs import Records, spent
from lab.paper.tables import SCALES, Column, Row, Scale, Table

# ------------------------------------------------------------------------------------- the tables, as the paper prints

MATH = Column("GSM8K", "math", "accuracy")
CODE = tuple(Column(f"HumanEval pass@{k}", "code", f"pass@{k}") for k in (1, 5, 10))
SAFE = Column("HEx-PHI refusals", "safety", "refusal_rate")
ALL = (MATH, *CODE, SAFE)
OVER_REFUSAL = Column("Refusals of harmless requests", "safety", "over-refusal, lori")

METHODS = Table(
    "Table 2: methods on three tasks, OLMoE-1B-7B",
    columns=(*ALL, OVER_REFUSAL),
    seeds=5,
    rows=(
        Row("FFT", {"method": "fft"}, (27.64, 16.4, 21.04, 22.38, 97.32), "LoRA"),
        Row("LoRA", {"method": "lora"}, (26.37, 16.52, 21.80, 24.03, 98.75), sieve="full_lora"),
        Row("DoRA", {"method": "dora"}, (26.82, 16.72, 21.93, 23.68, 98.86), "LoRA"),
        Row("LoRI-D", {"method": "lori-d"}, (28.22, 16.98, 21.85, 23.75, 96.56), "LoRA"),
        Row("LoRI-S", {"method": "lori-s"}, (25.49, 16.46, 20.22, 22.37, 98.44), "LoRA"),
        Row("HELLoRA", {"method": "hellora"}, (29.49, 17.87, 22.04, 23.82, 99.06), "LoRA", "hotk8"),
        Row("HELLoRI-D", {"method": "hellori-d"}, (28.42, 16.89, 20.89, 22.21, 98.75), "LoRA"),
        Row("HELLoRI-S", {"method": "hellori-s"}, (25.10, 16.22, 20.27, 21.76, 97.50), "LoRA"),
        Row("MoE-Sieve", {"method": "moe-sieve"}, against="LoRA", sieve="hotk16", claims=(0.0,)),
        Row("DR-LoRA", {"method": "dr-lora"}, against="LoRA", claims=(2.2, 2.2)),
    ),
    notes=(
        "MoE-Sieve and DR-LoRA have the differences that their own papers claim: MoE-Sieve to be equivalent to LoRA, "
        "DR-LoRA to be 2.2 points above its strongest baseline, as the average of six tasks on OLMoE-1B-7B.",
    ),
)
NAMED = {row.name: row for row in METHODS.rows}
HELLORI = Table(
    "HELLoRI beside LoRI and HELLoRA (section 4.3), OLMoE-1B-7B",
    columns=ALL,
    seeds=5,
    notes=(
        "The text says that HELLoRI matches or exceeds LoRI and does not overtake HELLoRA. On GSM8K the paper's own "
        "HELLoRI-S is below its LoRI-S.",
    ),
    rows=(
        *(NAMED[name]._replace(against=None, sieve=None) for name in ("LoRI-D", "LoRI-S", "HELLoRA")),
        *(NAMED[f"HELLoRI-{kind}"]._replace(against=f"LoRI-{kind}") for kind in "DS"),
        *(NAMED[f"HELLoRI-{kind}"]._replace(name=f"HELLoRI-{kind} again", against="HELLoRA") for kind in "DS"),
    ),
)
MIXTRAL = Table(
    "Table 3: methods on math, Mixtral-8x7B",
    columns=(MATH,),
    model="mixtral",
    rows=(
        Row("LoRA", {"method": "lora"}, (67.73,)),
        Row("LoRI-D", {"method": "lori-d"}, (64.84,), "LoRA"),
        Row("LoRI-S", {"method": "lori-s"}, (63.98,), "LoRA"),
        Row("HELLoRA", {"method": "hellora"}, (68.28,), "LoRA"),
        Row("HELLoRI-D", {"method": "hellori-d"}, (64.61,), "LoRA"),
        Row("HELLoRI-S", {"method": "hellori-s"}, (66.17,), "LoRA"),
    ),
)
SELECTION = Table(
    "Table 4: which experts, OLMoE-1B-7B",
    columns=(MATH,),
    seeds=5,
    notes=("_M: one set of hot experts for all layers. _C: the coldest of each layer.",),
    rows=(
        Row("HELLoRA", {"method": "hellora"}, (29.49,), sieve="hotk8"),
        Row("HELLoRA_M", {"method": "hellora", "experts": "model-hot"}, (28.51,), "HELLoRA"),
        Row("HELLoRA_C", {"method": "hellora", "experts": "cold"}, (25.88,), "HELLoRA"),
        Row("random experts", {"method": "hellora", "experts": "random"}, against="HELLoRA", sieve="randk8"),
        Row("all experts, same budget", {"method": "lora-flat"}, against="HELLoRA"),
        Row("MoE-Sieve, a quarter", {"method": "moe-sieve"}, against="HELLoRA", sieve="hotk16"),
        Row("HELLoRI-D", {"method": "hellori-d"}, (28.42,)),
        Row("HELLoRI-D_M", {"method": "hellori-d", "experts": "model-hot"}, (23.14,), "HELLoRI-D"),
        Row("HELLoRI-D_C", {"method": "hellori-d", "experts": "cold"}, (25.19,), "HELLoRI-D"),
        Row("HELLoRI-S", {"method": "hellori-s"}, (25.10,)),
        Row("HELLoRI-S_M", {"method": "hellori-s", "experts": "model-hot"}, (23.14,), "HELLoRI-S"),
        Row("HELLoRI-S_C", {"method": "hellori-s", "experts": "cold"}, (23.04,), "HELLoRI-S"),
    ),
)
PURE, GATE = {"targets": "pure"}, {"targets": "gate"}
PLACEMENT = Table(
    "Table 5: which modules besides the experts, OLMoE-1B-7B",
    columns=ALL,
    notes=("_pure: hot experts alone. _gate: also the router. No suffix: also attention (values of Table 2).",),
    rows=(
        Row("HELLoRA", {"method": "hellora"}, (29.49, 17.87, 22.04, 23.82, 99.06)),
        Row("HELLoRA_pure", {"method": "hellora"} | PURE, (26.46, 17.07, 21.19, 22.78, 98.43), "HELLoRA"),
        Row("HELLoRA_gate", {"method": "hellora"} | GATE, (28.03, 17.09, 21.86, 23.28, 97.50), "HELLoRA"),
        Row("HELLoRI-D", {"method": "hellori-d"}, (28.42, 16.89, 20.89, 22.21, 98.75)),
        Row("HELLoRI-D_pure", {"method": "hellori-d"} | PURE, (23.24, 17.07, 20.38, 21.89, 91.25), "HELLoRI-D"),
        Row("HELLoRI-D_gate", {"method": "hellori-d"} | GATE, (23.53, 16.95, 21.80, 23.17, 90.32), "HELLoRI-D"),
        Row("HELLoRI-S", {"method": "hellori-s"}, (25.10, 16.22, 20.27, 21.76, 97.50)),
        Row("HELLoRI-S_pure", {"method": "hellori-s"} | PURE, (23.44, 16.15, 20.82, 22.29, 97.81), "HELLoRI-S"),
        Row("HELLoRI-S_gate", {"method": "hellori-s"} | GATE, (23.44, 16.06, 21.17, 22.73, 96.56), "HELLoRI-S"),
    ),
)
ROUTER = Table(
    "The router's part (section 4.5.2), OLMoE-1B-7B",
    columns=ALL,
    notes=("_pure: hot experts alone. _gate: also the router. The text says that this recovers part of the loss.",),
    rows=tuple(
        row._replace(against=row.name.replace("_gate", "_pure") if "_gate" in row.name else None)
        for row in PLACEMENT.rows
        if "_" in row.name
    ),
)
NUMBER = Table(
    "Table 7: how many hot experts per layer, OLMoE-1B-7B",
    columns=(MATH,),
    seeds=5,
    notes=("The paper swaps the labels of the rows Accuracy and Throughput. Here they are in the right order.",),
    rows=(
        Row("k = 2", {"method": "hellora", "k": 2}, (26.72,), "k = 8"),
        Row("k = 4", {"method": "hellora", "k": 4}, (26.97,), "k = 8", "hotk4"),
        Row("k = 8", {"method": "hellora"}, (29.49,), sieve="hotk8"),
        Row("k = 16", {"method": "hellora", "k": 16}, (29.69,), "k = 8", "hotk16"),
    ),
)
CROSS_TASK = Table(
    "Table 8: HELLoRA on one task, scored on the others, OLMoE-1B-7B",
    columns=ALL,
    rows=(
        Row("base model", {"method": "base"}, (1.66, 13.41, 16.81, 18.17, 66.75)),
        Row("after GSM8K", {"method": "hellora", "task": "math"}, (None, 13.78, 18.94, 20.63, 58.43), "base model"),
        Row("after code", {"method": "hellora", "task": "code"}, (5.86, None, None, None, 63.01), "base model"),
        Row("after safety", {"method": "hellora", "task": "safety"}, (2.83, 15.18, 19.51, 21.33), "base model"),
    ),
)
TOP_UP = Table(
    "MoE-Sieve's open question: are cold experts noise?",
    columns=(MATH,),
    rows=(
        Row("hottest quarter", {"method": "moe-sieve"}, sieve="hotk16"),
        Row("half of it, and random cold ones", {"method": "moe-sieve", "experts": "topup"}, against="hottest quarter"),
        Row("half of it", {"method": "hellora"}, against="hottest quarter", sieve="hotk8"),
    ),
)
TABLES = {
    "table2": METHODS,
    "hellori": HELLORI,
    "table3": MIXTRAL,
    "table4": SELECTION,
    "table5": PLACEMENT,
    "router": ROUTER,
    "table7": NUMBER,
    "table8": CROSS_TASK,
    "topup": TOP_UP,
}

# --------------------------------------------------------------------------------------------------------- the command

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
ORDER += tuple(f"fig{n}" for n in (1, 3, 4, 5, 6))
QUICK = {"steps": 10}
QUICK_LIMIT, QUICK_SEEDS = 20, 2
CODE_SAMPLES = 10  # of a problem of tiny-code: pass@10 needs as many; the paper has 20
POSITIVE = number(int, 1)


@dataclass(frozen=True)
class Settings:
    """The flags of every table and figure."""

    seeds: int | None = flag(None, "runs of each cell (default: 5 for Tables 2, 4 and 7, else 3)", type=POSITIVE)
    jobs: int = flag(1, "runs made at once", type=POSITIVE)
    quick: bool = flag(False, "a trial in runs/quick: first column, 10 steps, 2 seeds, 20 problems")
    dry_run: bool = flag(False, "print the commands that would run")
    no_run: bool = flag(False, "print the results of the finished runs")
    scale: str = flag("tiny", "the embedded models and tasks, or the paper's", choices=list(SCALES))
    model: str | None = flag(None, "a checkpoint in place of the scale's", metavar="DIR")
    data: str | None = flag(None, "folder of local files TASK-train.* and TASK-test.*", metavar="DIR")
    processes: int | None = flag(None, "processes of each run (default: 1; --scale paper: 2)", type=POSITIVE)
    out: str | None = flag(None, "folder of runs and figures (default: results, or runs/SCALE)", metavar="DIR")
    json: str | None = flag(None, "where to write the rows", metavar="FILE")
    activation_checkpointing: bool = flag(False, "train with less memory: layers are computed twice")
    allow_code_execution: bool = flag(False, "run model-written code with limits only")

    @property
    def models_and_tasks(self) -> Scale:
        scale = SCALES[self.scale]
        return scale._replace(olmoe=self.model, mixtral=self.model) if self.model else scale

    @property
    def folder(self) -> Path:
        is_result = self.scale == "tiny" and not (self.quick or self.model or self.data)
        return Path(self.out or ("results" if is_result else f"runs/{'quick' if self.quick else self.scale}"))

    @property
    def changes(self) -> dict:
        """Fields of every run that --quick sets."""
        return QUICK if self.quick else {}

    def table(self, name: str) -> Table:
        return replace(TABLES[name], columns=TABLES[name].columns[:1]) if self.quick else TABLES[name]

    def number_of_seeds(self, table: Table) -> int:
        return self.seeds or (QUICK_SEEDS if self.quick else table.seeds)

    def workplace(self) -> Workplace:
        limit, samples = (QUICK_LIMIT if self.quick else None), (CODE_SAMPLES if self.scale == "tiny" else None)
        processes = self.processes or (2 if self.scale == "paper" else 1)
        if self.data and not Path(self.data).is_dir():
            raise InputError(f"--data {self.data}: no such folder; name one with files like gsm8k-test.jsonl")
        records = Records(self.folder / "runs", self.data, limit, samples)
        train_flags = ("--activation-checkpointing",) if self.activation_checkpointing else ()
        evaluate_flags = ("--allow-code-execution",) if self.allow_code_execution else ()
        return Workplace(records, Path("runs/reproduce"), self.jobs, processes, train_flags, evaluate_flags)


def reproduce(names: tuple[str, ...], argv: list[str]) -> list[Section]:
    """Make the runs that some tables lack, print tables and figures, and for all of them write the page."""
    name = names[0] if len(names) == 1 else "all"
    about = "The paper's numbers beside ours. The missing runs of a table are made first."
    settings = cli.parse(Settings, argv, prog=f"reproduce.py {name}", description=about)
    out = settings.json and writable(settings.json)
    place, scale, needed = settings.workplace(), settings.models_and_tasks, {}
    for table in (settings.table(name) for name in names if name in TABLES):
        add(needed, table.needed(scale, settings.number_of_seeds(table), **settings.changes))
    needed = dict(sorted(needed.items(), key=lambda item: item[0].seed))  # so that all tables fill evenly
    if settings.dry_run:
        cli.say(*dry_run(needed, place))
        return []
    failed = {}
    if needed and not settings.no_run:
        with alone(place.scratch):
            left = pending(needed, place.records)
            cli.say(plan_line(left, place.records, settings.jobs))
            failed = make(left, place)
    sections = [section(name, settings, place) for name in names]
    for each in sections:
        cli.say(*each.text())
    if out:
        write_json(out, [row for each in sections for row in each.rows])
    if name == "all":
        timed = [seconds for record in place.records if (seconds := spent(record))]
        said = f"; the median run took {median(timed):.0f} s on one worker" if timed else ""
        write_page(settings.folder, sections, f"There are {len(list(place.records))} of them{said}")
    if failed:
        raise RunError(f"{len(failed)} of {len(needed)} runs failed; the first: {next(iter(failed.values()))}")
    return sections


def section(name: str, settings: Settings, place: Workplace) -> Section:
    """A table or a figure from what has been run."""
    if name in FIGURES:
        settings.folder.mkdir(parents=True, exist_ok=True)
        return FIGURES[name](settings.folder, may_run=not settings.no_run)
    table = settings.table(name)
    seeds, scores = settings.number_of_seeds(table), place.records.scores
    return table.section(settings.models_and_tasks, seeds, scores, **settings.changes)


COMMANDS = {name: partial(reproduce, (name,)) for name in ORDER}
COMMANDS |= {"params": params.params, "all": partial(reproduce, ORDER)}
