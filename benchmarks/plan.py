"""Memory and communication of a run on machines that are not here: from config.json alone, no weights.

    python bench.py plan --model mixtral-8x7b --method hellora --gpus 2
    python bench.py plan --model allenai/OLMoE-1B-7B-0924 --method lora --gpus 4 --micro-batch 32 --memory 40

A gigabyte is 10^9 bytes; all numbers are per GPU. The terms are those of memory.plan, by which train.py chooses
--shard. Full fine-tuning keeps float32 weights and computes in bfloat16: what it gathers and keeps for the backward
pass takes half of the bytes printed.
"""

from dataclasses import dataclass

import torch

import hellora
from command import cli
from command.cli import InputError, count_or_share, flag
from command.files import writable, write_json
from hub.config import PRESETS
from model import MoEConfig, MoETransformer
from neighbours import drlora
from run import memory
from run.memory import config_of
from run.methods import METHODS, Recipe, num_hot_experts

POSITIVE = cli.number(int, 1)


@dataclass(frozen=True)
class Settings:
    """The flags of `bench.py plan`."""

    model: str = flag("olmoe-1b-7b", f"{', '.join(PRESETS)}, a checkpoint folder or a hub id")
    method: str = flag("hellora", "what trains", choices=list(METHODS))
    k: int | float | None = flag(None, "hot experts per layer (default: experts per token)", type=count_or_share)
    rank: int = flag(Recipe.r, "LoRA rank r", type=POSITIVE)
    targets: str | None = flag(None, "modules beside the experts (default: by method)", choices=list(hellora.TARGETS))
    gpus: int = flag(2, "number of GPUs, one process each", type=POSITIVE)
    batch: int = flag(128, "examples per step, over all GPUs", type=POSITIVE)
    micro_batch: int = flag(16, "examples per forward pass", type=POSITIVE)
    length: int = flag(512, "tokens of the longest examples", type=POSITIVE)
    memory: float = flag(80, "GB of each GPU", type=cli.number(float, 1))
    activation_checkpointing: bool = flag(False, "compute layers twice, to keep less")
    json: str | None = flag(None, "write the rows here", metavar="FILE")


def traffic(plan: memory.Plan, *, full: bool, num_processes: int, sharded: bool, micro_batches: int) -> int:
    """Bytes that each of N processes sends in one optimizer step, by ring collectives.

    Replicated: the gradients are all-reduced, 2 (N - 1) / N of their bytes. Sharded: each process sends its part of
    every weight and factor to the others in the forward and again in the backward pass of each micro-batch, and
    reduce-scatters the gradients once, or in each micro-batch if all weights train (`full`). This is slightly too
    much: embedding and head stay gathered between the two passes.
    """
    others, trained = num_processes - 1, plan.optimizer // 2
    if not sharded:
        return 2 * others * trained // num_processes
    part = plan.weights // 2 if full else plan.weights + plan.adapters  # weights that train are sent in bfloat16
    return others * (2 * micro_batches * part + trained * (micro_batches if full else 1))


def plan_row(settings: Settings, config: MoEConfig, num_hot: int, sharded: bool) -> dict:
    """The terms of the plan, their total, the bytes sent per step, and whether it fits."""
    method = METHODS[settings.method]

    def attach(model: MoETransformer) -> None:
        hot = (torch.arange(config.num_experts) < num_hot).expand(len(config.moe_layers), -1)
        options = {"kind": method.kind, "targets": settings.targets or method.targets}
        r_max = drlora.RESERVED * settings.rank if method.grows else None
        hellora.attach(model, hot, settings.rank, Recipe.alpha, r_max=r_max, **options)

    plan = memory.plan(
        config,
        attach if method.experts else None,
        dtype=torch.bfloat16 if method.experts else torch.float32,
        num_processes=settings.gpus,
        sharded=sharded,
        tokens=settings.micro_batch * settings.length,
        checkpointing=settings.activation_checkpointing,
    )
    passes = -(-settings.batch // (settings.gpus * settings.micro_batch))
    options = {"full": not method.experts, "num_processes": settings.gpus}
    sent = traffic(plan, sharded=sharded, micro_batches=passes, **options)
    row = {"shard": "full" if sharded else "none"} | plan._asdict() | {"total": plan.total, "sent_per_step": sent}
    return row | {"fits": plan.total <= (1 - memory.SPARE) * settings.memory * 1e9}


def main(argv: list[str] | None = None) -> list[dict]:
    about = "Memory that each GPU needs, term by term, and bytes sent per step."
    settings = cli.parse(Settings, argv, prog="bench.py plan", description=about)
    out = settings.json and writable(settings.json)
    config, method = config_of(settings.model), METHODS[settings.method]
    if settings.k and method.experts != "hot":
        raise InputError(f"--k {settings.k} has no meaning with --method {settings.method}; leave it out")
    num_hot = num_hot_experts(settings.k or method.k, config.num_experts, config.num_experts_per_tok)
    num_hot = config.num_experts if method.experts == "all" else num_hot
    ways = (False, True) if method.experts else (True,)  # full fine-tuning is always sharded
    rows = [plan_row(settings, config, num_hot, sharded) for sharded in ways]
    cli.say(f"{settings.model}, {settings.method}, {settings.gpus} GPUs of {settings.memory:g} GB: GB on each")
    cli.say(f"{'':14}" + "".join(f" --shard {row['shard']:>4}" for row in rows))
    for term in (*memory.Plan._fields, "total", "sent_per_step"):
        cli.say(f"{term.replace('_', ' '):14}" + "".join(f" {row[term] / 1e9:12.2f}" for row in rows))
    cli.say(f"{'fits':14}" + "".join(f" {'yes' if row['fits'] else 'no':>12}" for row in rows))
    if out:
        write_json(out, rows)
    return rows
