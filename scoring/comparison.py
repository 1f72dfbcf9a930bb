"""Two evaluations of the same examples: is the difference more than chance?"""

import json
from dataclasses import dataclass
from pathlib import Path

from command import cli
from command.cli import InputError, flag, note, say
from command.files import json_sha256, read_json
from hub import rows
from scoring.statistics import describe, mcnemar, share

# What makes two scores differ, besides model and problems: of evaluation.json, and of score.json with defaults.
OF_TEXTS = ("max_new_tokens", "temperature", "top_p", "seed", "stop_ids")  # which no loss depends on
OF_ALL = ("dtype", "prompts")
DEFAULTS = {"code_rule": "extracted", "refusal_rule": "lori", "timeout": 3.0}
RULES = DEFAULTS | {"protection": None}


@dataclass(frozen=True)
class Pair:
    """The arguments of evaluate.py compare."""

    folders: list[str] = flag(help="--out of an evaluation", positional=True, nargs=2, metavar="FOLDER")


def compare(argv: list[str]) -> dict:
    """Two evaluations of the same examples: on which each is better, and how likely chance explains that.

    A problem with several samples goes to the folder where more of them are right, since samples are not independent.
    A row of task own goes to the folder where its loss is lower.
    """
    text = "Exact McNemar test on two evaluations of one task; for task own, a sign test on the loss of each row."
    example = "python evaluate.py compare runs/demo/before runs/demo/after"
    pair = cli.parse(Pair, argv, prog="evaluate.py compare", description=text, example=example)
    a, b = map(Path, pair.folders)
    (task_a, problems_a, ways_a), (task_b, problems_b, ways_b) = read_about(a), read_about(b)
    if task_a != task_b:
        raise InputError(f"{a} is of {task_a} and {b} of {task_b}; expected two of one task")
    is_loss = task_a == "own"
    of_a, of_b = (read_values(folder, is_loss) for folder in (a, b))
    if of_a.keys() != of_b.keys():
        alone = sorted(of_a.keys() ^ of_b.keys())
        raise InputError(f"{len(alone)} ids are in one folder only (first: {alone[0]}); evaluate both on the same")
    if problems_a != problems_b:
        raise InputError(f"{a} and {b} are of different problems; evaluate both on the same")
    for name in sorted(ways_a.keys() & ways_b.keys()):
        if ways_a[name] != ways_b[name]:
            each = f"{ways_a[name]!s:.20} in {a}, {ways_b[name]!s:.20} in {b}"
            each = "by --shots, --prompt, --bos, --max-length or the template" if name == "prompts" else each
            note(f"{name} differs: {each}; the difference of the scores may come from that")
    pairs = [(of_a[example], of_b[example]) for example in of_a]
    only_a, only_b = sum(x > y for x, y in pairs), sum(y > x for x, y in pairs)
    p = mcnemar(only_a, only_b)
    if is_loss:
        counts = {"lower_a": only_a, "lower_b": only_b, "equal": len(pairs) - only_a - only_b}
    else:
        neither = sum(x == y == 0 for x, y in pairs)
        both = len(pairs) - only_a - only_b - neither
        counts = {"both": both, "only_a": only_a, "only_b": only_b, "neither": neither}
    for folder, values in ((a, of_a), (b, of_b)):
        mean = f"mean loss of a row {-sum(values.values()) / len(values):.4f}, {len(values)} rows"
        say(f"{folder}: {mean if is_loss else describe(share(list(values.values())))}")
    say(", ".join(f"{name} {count}" for name, count in counts.items()))
    say(f"{'sign test' if is_loss else 'McNemar'} exact p {p:.4g} on {only_a + only_b} items that differ")
    return counts | {"p": p}


def read_values(folder: Path, is_loss: bool) -> dict[str, float]:
    """{id: what is compared} of an evaluation folder: the share of samples that are correct, or minus the loss.

    Prompts that are labelled safe and rows without an answer are left out.
    """
    values: dict[str, list[float]] = {}
    for place, item in rows.json_rows(folder / "items.jsonl"):
        value = item.get("loss" if is_loss else "correct") if isinstance(item, dict) else None
        if is_loss and isinstance(item, dict) and "reference" in item and value is None:
            continue
        if not isinstance(value, float if is_loss else bool) or "id" not in item:
            raise InputError(f"{place}: not an item of evaluate.py; expected the --out folder of an evaluation")
        if item.get("label") != "safe":
            values.setdefault(str(item["id"]), []).append(-value if is_loss else value)
    if not values:
        raise InputError(f"{folder / 'items.jsonl'}: no item has a verdict or a loss to compare")
    return {name: sum(of_samples) / len(of_samples) for name, of_samples in values.items()}


def problems_digest(problems: dict[str, dict]) -> str:
    """SHA-256 of problems and their solutions by id, however they are put into prompts."""
    texts = sorted((name, json.dumps(row, default=str)) for name, row in problems.items())  # str: a date in Parquet
    return json_sha256(texts)


def read_about(folder: Path) -> tuple[str, str, dict]:
    """The task of an evaluation folder, the digest of its problems, and what else decides a score but for the model."""
    about = read_json(folder / "score.json", dict)
    decoded = read_json(folder / "evaluation.json", dict, missing={})
    try:
        settings = about["settings"]
        if settings.get("completions"):  # of a file, and how that was made is not known
            decoded = {}
        names = OF_ALL if settings["task"] == "own" else OF_ALL + OF_TEXTS
        ways = {name: decoded[name] for name in names if name in decoded}
        ways |= {name: settings.get(name, default) for name, default in RULES.items()}
        return settings["task"], about["problems"], ways
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{folder / 'score.json'}: not a score of evaluate.py; expected its --out folder") from None
