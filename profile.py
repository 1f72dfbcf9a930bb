"""The hot-expert catcher: count how many tokens of a task each expert receives, and with what routing weights.

    python profile.py --model tiny --task tiny-math --out profile.json --plot profile.png
    torchrun --nproc_per_node 2 profile.py --model mistralai/Mixtral-8x7B-v0.1 --task gsm8k --count-on lora --out p.json
    python profile.py compare a.json b.json --plot overlap.png   # do two tasks (or samples) have the same hot experts?
    python profile.py advise profile.json                        # what do k hot experts cover, and what do they cost?
    python profile.py --model runs/x --prompt "2 + 2?"           # which experts does each token of a text reach?

    counts = count_experts(model, batches)                       # int64 [layers, experts]

routing/counting.py counts. `hellora.select_experts` chooses hot sets by the counts. routing/ also holds the file
profile.json, and says what the counts show.
"""

import command.start  # noqa: F401

# This file hides the standard library's `profile`, and torch needs these names of it.
from command.standard_profile import Profile, _Utils, run, runctx  # noqa: F401

# isort: split
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import data
from command import cli
from command.cli import POSITIVE, SHARE, flag
from command.files import writable
from hub.checkpoint import REVISION_HELP, resolve, with_revision
from hub.config import IGNORE_HELP, ignore_keys
from hub.digests import weights_digest
from hub.tokenizer import BOS_HELP
from machine import memory
from machine.processes import DTYPE_HELP, DTYPES, default_dtype, end_processes, start_processes
from model import read_config
from recipes.methods import COUNT_ON_HELP, RECIPES, num_hot_experts
from routing import statistics
from routing.commands import K_HELP, PLOT_HELP, advise, compare
from routing.counting import Warmup, count_experts, count_task  # noqa: F401
from routing.profiles import RoutingProfile, save_profile
from run.prompt import prompt


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `profile.py` without a command."""

    model: str = flag("tiny", "'tiny' or 'tiny-mixtral' (embedded), a checkpoint folder, or a hub id")
    revision: str | None = flag(None, REVISION_HELP)
    task: str = flag("tiny-math", "task whose training data is counted", choices=list(data.TASKS))
    train_data: str | None = flag(None, "your rows, or the task's training file", metavar="FILE")
    bos: str = flag("auto", BOS_HELP, choices=("auto", "yes", "no"))
    sample: float = flag(0.1, "share of the training data to use", type=SHARE)
    count_on: str = flag("base", COUNT_ON_HELP, choices=("base", "lora"))
    k: int | None = flag(None, K_HELP, type=POSITIVE)
    seed: int = flag(0, "seed of every random choice", type=cli.number(int, 0))
    batch: int = flag(16, "examples per forward pass", type=POSITIVE)
    max_length: int = flag(512, "cut-off length of an example, in tokens", type=cli.number(int, 8))
    dtype: str | None = flag(None, DTYPE_HELP, choices=DTYPES)
    shard: str | None = flag(None, memory.SHARD_HELP, choices=tuple(memory.CHOSEN))
    ignore_config_keys: str | None = flag(None, IGNORE_HELP, metavar="KEYS")
    out: str = flag(help="where to write profile.json", metavar="FILE")
    plot: str | None = flag(None, PLOT_HELP, metavar="FILE", type=cli.picture)


def main(argv: list[str] | None = None) -> object:
    argv = sys.argv[1:] if argv is None else argv
    if any(arg.partition("=")[0] == "--prompt" for arg in argv):
        return prompt(argv)
    if not argv or argv[0].startswith("-"):
        return count(argv)
    commands = {"compare": compare, "advise": advise}
    name, flags = cli.subcommand("profile.py", commands, argv, __doc__)
    return commands[name](flags)


def count(argv: list[str]) -> RoutingProfile:
    """The command without a name: count, write profile.json, print the table."""
    settings = cli.parse(
        Settings,
        argv,
        prog="profile.py",
        description="Count how often a task uses each expert of each layer.\n"
        "Also: profile.py compare A B, profile.py advise FILE, profile.py --prompt TEXT.",
        example="python profile.py --model tiny --task tiny-math --out runs/math.json --plot runs/math.png",
    )
    settings = replace(settings, model=with_revision(settings.model, settings.revision))
    ignore_keys(settings.ignore_config_keys)
    folder = resolve(settings.model)
    config = read_config(folder)
    num_hot = num_hot_experts(settings.k, config.num_experts, config.num_experts_per_tok)
    reader = data.Reader(settings.task, folder, config, max_length=settings.max_length, bos=settings.bos)
    examples = reader.load("train", settings.train_data)
    items = reader.encode(data.sample(examples, settings.sample, settings.seed))
    paths = [writable(path) for path in (settings.out, settings.plot) if path]

    processes, recipe = start_processes(), RECIPES[settings.task]
    counted = count_task(
        folder,
        items,
        settings.batch,
        processes,
        dtype=getattr(torch, settings.dtype or default_dtype()),
        shard=settings.shard,
        warmup=Warmup(recipe.r, recipe.alpha, recipe.lr, recipe.batch) if settings.count_on == "lora" else None,
        seed=settings.seed,
    )
    data_digest, weights = processes.once(lambda: (data.digest(examples), weights_digest(folder)))
    counted = replace(
        counted,
        model=settings.model,
        task=settings.task,
        data=data_digest,
        weights=weights,
        began=reader.template.date.isoformat(),
    )
    title = counted.title()
    if dense := config.num_hidden_layers - len(config.moe_layers):
        title += f"; layer 0 is the first with experts, after {dense} without"
    if processes.is_main:
        save_profile(counted, settings.out)
        if settings.plot:
            from routing import pictures  # here, since importing matplotlib takes long

            pictures.draw_profile(counted.counts, num_hot, title, Path(settings.plot))
    cli.say(f"wrote {' and '.join(map(str, paths))}", title, *statistics.table(counted.counts, num_hot))
    end_processes()
    return counted


if __name__ == "__main__":
    cli.run(main)
