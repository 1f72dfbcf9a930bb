"""--recipe NAME: the flags that a paper published for a task, in the file recipes/NAME-BENCHMARK.txt.

`train.py @FILE` takes the flags of a file too: copy one, and change what you like.
"""

import shlex
from pathlib import Path

import data
from command.cli import InputError
from recipes.methods import METHODS

FILES = {tuple(path.stem.rsplit("-", 1)): path for path in sorted(Path(__file__).parent.glob("*.txt"))}
PAPERS = tuple(dict.fromkeys(paper for paper, benchmark in FILES))
EVALUATION = {  # recipe, task -> how its paper evaluates, by the names of evaluate.py's settings
    ("dr-lora", "gsm8k"): {"shots": 8, "temperature": 0.2},
    ("dr-lora", "tiny-math"): {"shots": 8, "temperature": 0.2},
    ("moe-sieve", "gsm8k"): {"max_new_tokens": 1024},  # as in its code
}
INSTEAD = {  # given flags that exclude flags of a recipe
    "init_adapter": ("--method", "--targets", "--rank", "--alpha"),
    "steps": ("--epochs",),
    "epochs": ("--steps",),
    "profile": ("--sample", "--count-on"),
}


def recipe_flags(given: dict, argv: list[str]) -> tuple[list[str], list[str]]:
    """What the recipe adds to the flags of `argv`, whose settings are `given`.  -> flags, comments of the file

    Raises InputError if the paper has no settings for the task, or none for full fine-tuning.
    """
    name, task = given["recipe"], given["task"]
    path = FILES.get((name, data.TASKS[task].benchmark))
    if path is None:
        known = ", ".join(task for task, row in data.TASKS.items() if (name, row.benchmark) in FILES)
        raise InputError(f"--recipe {name} has no settings for {task}; it has some for {known}")
    if not METHODS[given["method"]].adapts:
        raise InputError(f"--recipe {name} sets an adapter's rank, and --method fft has no adapter; leave one out")
    excluded = {arg.partition("=")[0] for arg in argv}
    excluded |= {flag for key, flags in INSTEAD.items() if given[key] for flag in flags}
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [shlex.split(line, comments=True) for line in lines]
    flags = [part for pair in pairs if pair and pair[0] not in excluded for part in pair]
    return flags, [line.removeprefix("# ") for line in lines if line.startswith("#")]
