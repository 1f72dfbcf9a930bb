"""The paper's tables re-made, one command for each: its value, what others measured, ours, and a verdict.

    python reproduce.py table4 --jobs 2      # makes the runs that are not there yet, then prints the table
    python reproduce.py table4 --no-run      # prints the table from the runs that are there
    python reproduce.py params               # Tables 2, 3, 5 and 7: what trains, its share, its bytes; no weights

Ours are of the embedded models and tasks. Runs are kept in results/runs, and every table that needs one reads it there.
An interrupted command goes on where it stopped when it is given again. paper/ holds what carries this file.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from command import cli
from command.cli import flag, number
from paper import params
from paper.runner import Needed, Workplace, make, pending, plan_lines
from paper.runs import Records
from paper.tables import SCALES, Column, Row, Table

# ------------------------------------------------------------------------------------- the tables, as the paper prints

MATH = Column("GSM8K", "math", "accuracy")
CODE = tuple(Column(f"HumanEval pass@{k}", "code", f"pass@{k}") for k in (1, 5, 10))
SAFE = Column("HEx-PHI refusals", "safety", "refusal_rate")
ALL = (MATH, *CODE, SAFE)

METHODS = Table(
    "Table 2: methods on three tasks, OLMoE-1B-7B",
    columns=ALL,
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
        Row("MoE-Sieve", {"method": "moe-sieve"}, against="LoRA", sieve="hotk16"),
        Row("DR-LoRA", {"method": "dr-lora"}, against="LoRA"),
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
    "Table 5: which modules beside the experts, OLMoE-1B-7B",
    columns=ALL,
    notes=("_pure: hot experts alone. _gate: and the router. Without suffix: and attention (values of Table 2).",),
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
NUMBER = Table(
    "Table 7: how many hot experts per layer, OLMoE-1B-7B",
    columns=(MATH,),
    seeds=5,
    notes=(
        "The paper prints the rows Accuracy and Throughput of this table swapped; here each stands where it belongs.",
    ),
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
    "table3": MIXTRAL,
    "table4": SELECTION,
    "table5": PLACEMENT,
    "table7": NUMBER,
    "table8": CROSS_TASK,
    "topup": TOP_UP,
}

# --------------------------------------------------------------------------------------------------------- the command

POSITIVE = number(int, 1)
QUICK = {"steps": 20}
QUICK_LIMIT, QUICK_SEEDS = 50, 2


@dataclass(frozen=True)
class Settings:
    """The flags of every table."""

    seeds: int | None = flag(None, "runs of each cell (default: 5 for Tables 2, 4 and 7, else 3)", type=POSITIVE)
    jobs: int = flag(1, "runs made at once", type=POSITIVE)
    quick: bool = flag(False, "short runs, 2 seeds and 50 problems: shows that it works; kept apart, in runs/quick")
    dry_run: bool = flag(False, "say what would run and how long it would take")
    no_run: bool = flag(False, "print what the finished runs say")
    out: str | None = flag(None, "folder of runs and figures (default: results)", metavar="DIR")
    allow_code_execution: bool = flag(False, "run model-written code with limits only")


def tables(names: list[str], argv: list[str]) -> None:
    """Make the runs of some tables that are not there yet, and print the tables."""
    settings = cli.parse(Settings, argv, prog=f"reproduce.py {names[0] if len(names) == 1 else 'all'}")
    out = Path(settings.out or ("runs/quick" if settings.quick else "results"))
    records = Records(out / "runs", limit=QUICK_LIMIT if settings.quick else None, samples=10)
    needed = merged([needed_by(TABLES[name], settings) for name in names])
    left = pending(needed, records)
    cli.say(*plan_lines(left, records, settings.jobs))
    if settings.dry_run:
        cli.say(*(run.title for run in left))
    elif not settings.no_run and left:
        options = {"jobs": settings.jobs, "allow_code_execution": settings.allow_code_execution}
        make(left, Workplace(records, Path("runs/reproduce"), **options))


def needed_by(table: Table, settings: Settings) -> Needed:
    seeds = settings.seeds or (QUICK_SEEDS if settings.quick else table.seeds)
    return table.needed(SCALES["tiny"], seeds, **(QUICK if settings.quick else {}))


def merged(parts: list[Needed]) -> Needed:
    """The runs of several tables, each once, all of one seed before the next."""
    found: Needed = {}
    for part in parts:
        for run, tasks in part.items():
            found[run] = found.get(run, set()) | tasks
    return dict(sorted(found.items(), key=lambda item: item[0].seed))


COMMANDS = {"params": params.params, **{name: partial(tables, [name]) for name in TABLES}}
COMMANDS["all"] = partial(tables, list(TABLES))


def main(argv: list[str] | None = None) -> object:
    argv = sys.argv[1:] if argv is None else argv
    name, flags = cli.subcommand("reproduce.py", COMMANDS, argv, __doc__)
    return COMMANDS[name](flags)


if __name__ == "__main__":
    cli.run(main)
