"""The hot-expert catcher: count how many tokens of a task each expert receives, and with what routing weights.

    python profile.py --model tiny --task tiny-math --out profile.json --plot profile.png
    torchrun --nproc_per_node 2 profile.py --model mistralai/Mixtral-8x7B-v0.1 --task gsm8k --count-on lora --out p.json
    python profile.py compare a.json b.json --plot overlap.png   # do two tasks (or samples) have the same hot experts?
    python profile.py advise profile.json                        # what do k hot experts cover, and what do they cost?
    python profile.py --model runs/x --prompt "2 + 2?"           # which experts does each token of a text reach?

    counts = count_experts(model, batches)                       # [L, E], of the model as it is
    counted = profile_warmup(model, items, 16, lr=4e-4)          # while LoRA on all experts trains: the paper's way

Every real token counts, in the prompt and in the target. Padding never does. `hellora.select_experts` chooses hot sets
by the counts; routing/ holds the file profile.json, and says what the counts show.

Dimensions: L layers with experts, E experts per layer, K experts per token, B sequences, S positions.
"""

import command.start  # noqa: F401

# This file hides the standard library's `profile`, and torch needs these names of it.
from command.standard_profile import Profile, _Utils, run, runctx  # noqa: F401

# isort: split
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import data
import hellora
from command import cli
from command.cli import InputError, RunError, flag
from command.files import writable
from hub.checkpoint import REVISION_HELP, resolve, with_revision
from hub.config import IGNORE_HELP, ignore_keys
from hub.digests import weights_digest
from hub.tokenizer import BOS_HELP
from machine import memory
from machine.processes import ALONE, DTYPE_HELP, DTYPES, Processes, default_dtype, end_processes, start_processes
from model import MoEConfig, MoETransformer, read_config
from recipes.methods import COUNT_ON_HELP, RECIPES, count_on_flag, num_hot_experts
from routing import statistics
from routing.commands import K_HELP, PLOT_HELP, POSITIVE, SHARE, advise, compare
from routing.profiles import RoutingProfile, save_profile
from run.prompt import prompt
from training_step import load_for_process, tally, train_step

# --------------------------------------------------------------------------------------------------------- counting


def count_experts(model: MoETransformer, batches: Iterable[data.Batch]) -> Tensor:
    """counts[l, e] = number of real tokens that layer l sends to expert e.  -> int64 [L, E], see `profile_routing`"""
    return profile_routing(model, batches).counts


@torch.no_grad()
def profile_routing(model: MoETransformer, batches: Iterable[data.Batch]) -> RoutingProfile:
    """Count the experts that the unchanged model chooses (HELLoRA §4.3, MoE-Sieve: the base model, no gradient).

    Under torch.distributed each process passes its own batches and gets the totals of all. A sharded model gathers its
    weights in every forward pass, so all processes must then pass equally many batches. Raises as `finish` does.
    """
    was_training = model.training
    model.eval()
    device = model.embed_tokens.weight.device
    totals = torch.zeros(3, len(model.config.moe_layers), model.config.num_experts, dtype=torch.float64, device=device)
    try:
        for i, batch in enumerate(batches):
            ids = batch.input_ids.to(device)
            no_labels = torch.full_like(ids, -100)  # the LM head runs only where there is a label: nowhere
            _, selected, routing = model(ids, batch.lengths, labels=no_labels, output_routing=True)
            chosen = selected[:, selected[0, ..., 0] >= 0]  # [L, T, K], without padding
            counts, gate_mass = tally(chosen, routing.weights, model.config.num_experts)  # [L, E] each
            totals += torch.stack((counts, gate_mass, counts * (i % 2)))
    finally:
        model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(totals)
    return finish(model.config, totals)


def profile_warmup(
    model: MoETransformer,
    items: list[data.Encoded],
    batch: int,
    *,
    lr: float,
    seed: int = 0,
    processes: Processes = ALONE,
    micro_batch: int | None = None,
) -> RoutingProfile:
    """Count the experts chosen while everything that requires a gradient trains, one step per `batch` items.

    The model has LoRA on all experts, attention and router (HELLoRA §3). It keeps what it has learnt: drop it
    afterwards. Raises RunError if loss or gradients become non-finite, and as `finish` does.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.0)
    totals = torch.zeros(2, len(model.config.moe_layers), model.config.num_experts, dtype=torch.float64)
    for chosen in progress(data.global_batches(len(items), batch, seed, epoch=0), processes):
        done = train_step(model, optimizer, [items[i] for i in chosen], micro_batch or batch, processes, clip=1.0)
        if not done.is_finite:
            raise RunError(f"warm-up: loss {done.loss:.3g}, gradient norm {done.grad_norm:.3g}; use --count-on base")
        totals += torch.stack((done.counts, done.gate_mass))
    return finish(model.config, totals)


def finish(config: MoEConfig, totals: Tensor) -> RoutingProfile:
    """Counts, gate mass and perhaps the counts of every second batch, [2 or 3, L, E], as a profile.

    Raises InputError without any token, RunError for non-finite routing weights.
    """
    counts, gate_mass, *half = totals.cpu()
    num_tokens = round(counts[0].sum().item()) // config.num_experts_per_tok
    if num_tokens == 0:
        raise InputError("there is no token to count experts on; give at least one example")
    finite = gate_mass.isfinite().all(-1)
    if not finite.all():
        layer = int((~finite).nonzero()[0])
        raise RunError(f"routing weights of layer {layer} are NaN or infinite; does the model overflow in this dtype?")
    profile = RoutingProfile(counts.long(), gate_mass, num_tokens, config.num_experts_per_tok)
    return replace(profile, half_counts=half[0].long()) if half else profile


@dataclass(frozen=True)
class Warmup:
    """The LoRA on all experts that trains while they are counted."""

    r: int
    alpha: float
    lr: float
    batch: int  # examples per step

    def attach(self, model: MoETransformer, seed: int) -> None:
        all_experts = torch.ones(len(model.config.moe_layers), model.config.num_experts, dtype=torch.bool)
        hellora.attach(model, all_experts, self.r, self.alpha, seed=seed)


def count_task(
    folder: Path,
    items: list[data.Encoded],
    micro_batch: int,
    processes: Processes,
    *,
    dtype: torch.dtype,
    shard: str | None,
    warmup: Warmup | None,
    seed: int,
) -> RoutingProfile:
    """Load a model as this process is to hold it, count the experts that `items` use, and drop it.

    micro_batch: examples per forward pass. shard: as for `load_for_process`, or None to let the memory plan decide.
    """
    config, device = read_config(folder), processes.device
    attach = partial(warmup.attach, seed=seed) if warmup else None
    tokens = micro_batch * max((len(item.ids) for item in items), default=0)
    plan_of = partial(memory.plan, config, attach, dtype=dtype, tokens=tokens, trains=warmup is not None)
    shard = memory.choose_shard(shard, device, processes.count, plan_of)
    model = load_for_process(folder, dtype, device, shard=shard, attach=attach)
    if warmup:
        return profile_warmup(
            model, items, warmup.batch, lr=warmup.lr, seed=seed, processes=processes, micro_batch=micro_batch
        )
    parts = data.micro_batches(items, micro_batch, processes.index, processes.count)
    batches = [data.collate(part, config.pad_token_id or 0) for part in parts]
    return profile_routing(model, progress(batches, processes))


def progress(batches: list, processes: Processes) -> Iterable:
    """The batches, with a progress bar on the main process if it has a terminal."""
    return tqdm(batches, unit="batch", disable=None if processes.is_main else True)


# ------------------------------------------------------------------------------------------------------ the command


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The flags of `profile.py` without a command."""

    model: str = flag("tiny", "'tiny' or 'tiny-mixtral' (embedded), a checkpoint folder, or a hub id")
    revision: str | None = flag(None, REVISION_HELP)
    task: str = flag("tiny-math", "task on whose training data experts are counted", choices=list(data.TASKS))
    train_data: str | None = flag(None, "your rows, or the task's training file", metavar="FILE")
    bos: str = flag("auto", BOS_HELP, choices=("auto", "yes", "no"))
    sample: float = flag(0.1, "share of the training data to use", type=SHARE)
    count_on: str = flag("base", COUNT_ON_HELP, choices=("base", "lora"), type=count_on_flag, alias="--warmup")
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
