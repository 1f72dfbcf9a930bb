"""What a run of the real models needs: memory as bench.py plan prints it, and hours at the paper's own speed."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import torch

from lab.benchmarks.plan import GPU_GB, Settings, plan_row
from lab.paper.runner import Needed, Workplace, commands
from lab.paper.runs import Run, flags
from lab.paper.speed import PAPER
from machine.memory import config_of
from model import MoEConfig, MoETransformer
from recipes.methods import METHODS, RECIPES, num_hot_experts

EXAMPLES = {"gsm8k": 7_473, "codealpaca": 20_022, "saferpaca": 22_000}  # of the training sets
SPEED_OF = {"dora": "lora", "dr-lora": "lora", "moe-sieve": "hellora"}  # methods that Table 6 does not have
FFT_SLOWER = 3.5  # than HELLoRA, the paper's text
ASSUMPTION = (
    "Hours are for training alone, at the samples per second of the paper's Table 6 (GSM8K, two A100), for every task. "
    "DoRA and DR-LoRA are taken to be as fast as LoRA, MoE-Sieve as fast as HELLoRA, and full fine-tuning to take "
    f"{FFT_SLOWER:g} times as long as HELLoRA. A larger model is slower in proportion to its "
    "active parameters. Gigabytes are planned, not measured."
)
CHECKPOINTING = {"activation_checkpointing": True}
SAVING = ({}, CHECKPOINTING, *(CHECKPOINTING | {"micro_batch": size} for size in (8, 4, 2, 1)))


def samples_per_second(method: str) -> float:
    """The paper's training speed of a method on OLMoE-1B-7B."""
    if method == "fft":
        return PAPER["hellora"][2] / FFT_SLOWER
    return PAPER[SPEED_OF.get(method, method)][2]


def active_parameters(config: MoEConfig) -> int:
    """Parameters that a token passes: all but those of the experts that it does not choose."""
    with torch.device("meta"):
        total = sum(p.numel() for p in MoETransformer(config).parameters())
    idle = len(config.moe_layers) * (config.num_experts - config.num_experts_per_tok)
    return total - idle * 3 * config.hidden_size * config.intermediate_size


def hours(run: Run) -> float:
    """Hours to train (`ASSUMPTION`); 0 for the base model."""
    if run.method == "base":
        return 0.0
    recipe, olmoe = RECIPES[run.task], config_of("olmoe-1b-7b")
    examples = run.steps * recipe.batch if run.steps else recipe.epochs * EXAMPLES[run.task]
    examples *= 2 if METHODS[run.method].sparse else 1  # two stages
    larger = active_parameters(config_of(run.model)) / active_parameters(olmoe)
    return examples / samples_per_second(run.method) * larger / 3600


def plan(run: Run, gpus: int) -> tuple[list[str], str]:
    """The flags of train.py with which a run fits on GPUs of GPU_GB, and its memory in words.

    They are the first of SAVING that do, and change no result. The base is replicated if that fits, else sharded.
    """
    recipe = RECIPES[run.task]
    batch = recipe.batch if METHODS[run.method].experts else recipe.fft_batch
    about = {"model": run.model, "method": run.method, "targets": run.targets}
    return plan_of(run.k, Settings(**about, gpus=gpus, memory=GPU_GB, batch=batch))


@cache
def plan_of(k: int | None, settings: Settings) -> tuple[list[str], str]:
    """The same for settings of bench.py plan, with k hot experts per layer. None: as the method decides."""
    method, config = METHODS[settings.method], config_of(settings.model)
    k = config.num_experts if method.experts == "all" else k or method.k
    num_hot = num_hot_experts(k, config.num_experts, config.num_experts_per_tok)
    for saving in SAVING:
        changed = replace(settings, **saving)
        for shard in ("none", "full") if method.experts else ("full",):  # full fine-tuning is always sharded
            row = plan_row(changed, config, num_hot, shard)
            where = f"GB on each of {settings.gpus} GPUs of {settings.memory:g} GB (--shard {shard})"
            if row["fits"]:
                return flags(saving), f"{row['total'] / 1e9:.1f} {where}"
    return flags(saving), f"{row['total'] / 1e9:.1f} {where}, which is too much: give more --processes"


def dry_run(needed: Needed, place: Workplace) -> Iterator[str]:
    """The command lines of all runs, the memory that each needs, and the hours."""
    for run, tasks in needed.items():
        yield from commands(run, tasks, place)
        if run.method != "base":
            yield f"# {plan(run, place.processes)[1]}, {hours(run):.2f} h"
    yield f"# {len(needed)} runs, {sum(map(hours, needed)):.1f} hours. {ASSUMPTION}"
