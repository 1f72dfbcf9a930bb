"""Two evaluations of the same examples: is the difference more than chance?"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from command import cli
from command.cli import InputError, flag, say
from command.files import read_json
from hub import rows
from scoring.statistics import describe, mcnemar, share


@dataclass(frozen=True)
class Pair:
    """The arguments of evaluate.py compare."""

    folders: list[str] = flag(help="--out of an evaluation", positional=True, nargs=2, metavar="FOLDER")


def compare(argv: list[str]) -> dict:
    """Two evaluations of the same examples: what each got right alone, and how likely chance explains that.

    A problem with several samples goes to the folder where more of them are right, since samples are not independent.
    """
    about = "Exact McNemar test on two evaluations of one task."
    a, b = map(Path, cli.parse(Pair, argv, prog="evaluate.py compare", description=about).folders)
    right_a, right_b = read_verdicts(a), read_verdicts(b)
    (task_a, problems_a), (task_b, problems_b) = read_about(a), read_about(b)
    if task_a != task_b:
        raise InputError(f"{a} is of {task_a} and {b} of {task_b}; want two of one task")
    if right_a.keys() != right_b.keys():
        alone = sorted(right_a.keys() ^ right_b.keys())
        raise InputError(f"{len(alone)} ids are in one folder only (first: {alone[0]}); evaluate both on the same")
    if problems_a and problems_b and problems_a != problems_b:  # an older score does not name them
        raise InputError(f"{a} and {b} are of different problems; evaluate both on the same")
    pairs = [(right_a[example], right_b[example]) for example in right_a]
    only_a, only_b = sum(x > y for x, y in pairs), sum(y > x for x, y in pairs)
    neither = sum(x == y == 0 for x, y in pairs)
    counts = {"both": len(pairs) - only_a - only_b - neither, "only_a": only_a, "only_b": only_b, "neither": neither}
    p = mcnemar(only_a, only_b)
    say(f"{a}: {describe(share(list(right_a.values())))}", f"{b}: {describe(share(list(right_b.values())))}")
    say(", ".join(f"{name} {count}" for name, count in counts.items()))
    say(f"McNemar exact p {p:.4g} on {only_a + only_b} items that differ")
    return counts | {"p": p}


def read_verdicts(folder: Path) -> dict[str, float]:
    """{id: share of its samples that are correct} of an evaluation folder, without the prompts labelled safe."""
    verdicts: dict[str, list[bool]] = {}
    for place, item in rows.json_rows(folder / "items.jsonl"):
        if not isinstance(item, dict) or not isinstance(item.get("correct"), bool) or "id" not in item:
            raise InputError(f"{place}: not an item of evaluate.py with a verdict; want --out of any task but own")
        if item.get("label") != "safe":
            verdicts.setdefault(str(item["id"]), []).append(item["correct"])
    if not verdicts:
        raise InputError(f"{folder / 'items.jsonl'}: no item with a verdict; want --out of evaluate.py")
    return {name: sum(found) / len(found) for name, found in verdicts.items()}


def problems_digest(problems: dict[str, dict]) -> str:
    """SHA-256 of problems and their solutions by id, however they are put into prompts."""
    texts = sorted((name, json.dumps(row, default=str)) for name, row in problems.items())  # str: a date in Parquet
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def read_about(folder: Path) -> tuple[str, str | None]:
    """The task of an evaluation folder, and the digest of its problems."""
    about = read_json(folder / "score.json", dict)
    try:
        return about["settings"]["task"], about.get("problems")
    except (TypeError, KeyError):
        raise InputError(f"{folder / 'score.json'}: not a score of evaluate.py; want its --out folder") from None
