"""--recipe NAME: all settings that a paper published for a task.

A flag that is given overrides the recipe. Each setting is the paper's or, where `unsaid` names it, our choice.
"""

from dataclasses import dataclass, field

import data
from command.cli import InputError
from recipes.methods import METHODS, RECIPES

REAL = {"gsm8k": "gsm8k", "humaneval": "codealpaca", "hexphi": "saferpaca"}  # benchmark -> the paper's task


@dataclass(frozen=True)
class Paper:
    """The settings of a paper, by the names of train.py's flags and of evaluate.py's."""

    source: str
    benchmarks: tuple[str, ...]  # those it was run for
    train: dict
    unsaid: str  # what the paper does not say or does differently, and the source of ours
    evaluate: dict[str, dict] = field(default_factory=dict)  # by benchmark; what is not here is evaluate.py's default


PLAIN = {"weight_decay": 0.0, "count_on": "base"}
PAPERS = {
    "hellora": Paper(
        "arXiv 2605.18795",
        ("gsm8k", "humaneval", "hexphi"),
        {"method": "hellora", "targets": "all", "sample": 0.1, "schedule": "constant", "lora_dropout": 0.0, **PLAIN}
        | {"prompt": "lori", "loss_on": "answer", "max_length": 512},
        "schedule, decay, dropout, prompt, loss and length are those of LoRI's code, which the scores fit",
    ),
    "moe-sieve": Paper(
        "arXiv 2603.24044",
        ("gsm8k",),
        {"method": "moe-sieve", "targets": "shared", "sample": 1.0, "rank": 32, "alpha": 64.0, "lora_dropout": 0.05}
        | {"lr": 4e-4, "schedule": "linear", "epochs": 3, "batch": 64, "prompt": "question", "loss_on": "all", **PLAIN}
        | {"max_length": 2048},
        "the paper names no weight decay and no clipping",
    ),
    "dr-lora": Paper(
        "arXiv 2601.04823",
        ("gsm8k", "humaneval"),
        {"method": "dr-lora", "targets": "gate", "rank": 16, "alpha": 32.0, "lora_dropout": 0.1, "lr": 2e-5}
        | {"schedule": "linear", "lr_warmup": 0.03, "steps": 3750, "batch": 48, "prompt": "question", **PLAIN}
        | {"loss_on": "answer", "max_length": 512},
        "the paper names no prompt and no loss, and lengths of 512 to 4096. It trains on MetaMathQA "
        "and not from GSM8K, adapts up and down alone, and trains the router's own weights",
        {"gsm8k": {"shots": 8, "temperature": 0.2}},
    ),
}
OF_AN_ADAPTER = ("targets", "rank", "alpha")  # which --init-adapter brings


def settings_of(given: dict) -> dict:
    """The recipe's settings for the task in `given` (the fields of run.settings.Settings), where they have a meaning.

    Raises InputError if the paper has none for the task, or none for full fine-tuning.
    """
    name, paper, benchmark = given["recipe"], PAPERS[given["recipe"]], data.TASKS[given["task"]].benchmark
    if benchmark not in paper.benchmarks:
        known = ", ".join(task for task, about in data.TASKS.items() if about.benchmark in paper.benchmarks)
        raise InputError(f"--recipe {name} has no settings for {given['task']}; its paper has some for {known}")
    chosen = dict(paper.train)
    if name == "hellora":  # Table 1
        table = RECIPES[REAL[benchmark]]
        chosen |= {"rank": table.r, "alpha": table.alpha, "lr": table.lr, "epochs": table.epochs, "batch": table.batch}
    if METHODS[given["method"]].experts is None:
        raise InputError(f"--recipe {name} sets an adapter's rank, and --method fft has no adapter; leave one out")
    dropped = OF_AN_ADAPTER if given["init_adapter"] else ()
    dropped += () if benchmark == "gsm8k" else ("prompt",)
    dropped += ("epochs",) if given["steps"] else ("steps",) if given["epochs"] else ()
    return {key: value for key, value in chosen.items() if key not in dropped}


def evaluation_of(name: str | None, task: str) -> dict:
    """How the paper of a recipe evaluates a task, by the names of evaluate.py's settings."""
    return PAPERS[name].evaluate.get(data.TASKS[task].benchmark, {}) if name in PAPERS else {}


def described(settings: dict) -> list[str]:
    """Lines that say what a recipe has set, and which flags override it."""
    paper, chosen = PAPERS[settings["recipe"]], settings_of(settings)
    flags = {key: f"--{key.replace('_', '-')} {settings[key]}" for key in chosen}
    kept = [flag for key, flag in flags.items() if settings[key] == chosen[key]]
    instead = [flag for flag in flags.values() if flag not in kept]
    said = [f"recipe {settings['recipe']} ({paper.source}): {' '.join(kept)}", f"not from the paper: {paper.unsaid}"]
    return said + ([f"given instead: {' '.join(instead)}"] if instead else [])
