"""Planned memory and communication of a run on other machines, from config.json alone.

    python bench.py plan --model mixtral-8x7b --method hellora --gpus 2
    python bench.py plan --model mixtral-8x7b --method hellora --gpus 16 --machines 2
    python bench.py plan --cpu --micro-batch 4 --tokens-per-s 40     # without a GPU: memory, and hours
    python bench.py plan --model allenai/OLMoE-1B-7B-0924 --method lora --gpus 4 --micro-batch 32 --memory 40

A gigabyte is 10^9 bytes. All numbers are per GPU, except what a machine sends to the others. The terms are those of
memory.plan, by which train.py chooses --shard. Full fine-tuning keeps float32 weights and computes in bfloat16: what it
gathers and keeps for the backward pass takes half of the bytes printed.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

import hellora
from command import cli
from command.cli import InputError, count_or_share, flag
from command.files import writable, write_json
from hub.config import PRESETS
from lab.benchmarks.workload import LENGTHS
from machine import memory
from machine.memory import config_of
from model import MoEConfig, MoETransformer
from neighbours import drlora
from recipes.methods import METHODS, Recipe, num_hot_experts

POSITIVE = cli.number(int, 1)
GPU_GB, MACHINE_GB = 80, 24  # memory, unless a flag says otherwise
CPU_SPARE = 0.25  # share of a machine's memory, for the interpreter and gaps between tensors (docs/speed.md)


@dataclass(frozen=True)
class Settings:
    """The flags of `bench.py plan`."""

    model: str = flag("olmoe-1b-7b", f"{', '.join(PRESETS)}, a checkpoint folder or a hub id")
    method: str = flag("hellora", "what trains", choices=list(METHODS))
    k: int | float | None = flag(None, "hot experts per layer (default: experts per token)", type=count_or_share)
    rank: int = flag(Recipe.r, "LoRA rank r", type=POSITIVE)
    targets: str | None = flag(None, "modules beside the experts (default: by method)", choices=list(hellora.TARGETS))
    cpu: bool = flag(False, "a machine without a GPU: one process, in bfloat16")
    tokens_per_s: float | None = flag(
        None,
        "with --cpu: speed of training, as bench.py full prints it; adds hours",
        type=cli.number(float, 0, above=True),
    )
    gpus: int | None = flag(None, "number of GPUs, one process each (default: 2)", type=POSITIVE)
    machines: int = flag(1, "machines that hold the GPUs, the same number in each", type=POSITIVE)
    batch: int = flag(128, "examples per step, over all GPUs", type=POSITIVE)
    micro_batch: int = flag(16, "examples per forward pass", type=POSITIVE)
    length: int = flag(512, "tokens of the longest examples", type=POSITIVE)
    memory: float | None = flag(
        None,
        f"GB of each GPU (default: {GPU_GB}), or of the machine (default: {MACHINE_GB})",
        type=cli.number(float, 1),
    )
    activation_checkpointing: bool = flag(False, "keep only each layer's input, and compute the layer twice")
    json: str | None = flag(None, "write the rows here", metavar="FILE")


def traffic(plan: memory.Plan, shard: str, settings: Settings, *, full: bool) -> tuple[int, int]:
    """Bytes sent in one optimizer step, by ring collectives: by each process, and by each machine to the others.

    Replicated: the gradients are all-reduced, 2 (N - 1) / N of their bytes by each of N processes. Sharded: each
    process sends its part of every weight and factor to the others in the forward and again in the backward pass of
    each micro-batch, and reduce-scatters the gradients once, or in each micro-batch if all weights train (`full`).
    This is slightly too much: embedding and head stay gathered between the two passes. In a ring over all processes,
    one of each machine sends to another machine. Hybrid: all that leaves a machine is an all-reduce of the gradients,
    of each process's part with the same part on the other machines.
    """
    N, M, trained = settings.gpus, settings.machines, plan.optimizer // 2
    if shard == "none":
        sent = 2 * (N - 1) * trained // N
        return sent, sent if M > 1 else 0
    micro_batches = -(-settings.batch // (N * settings.micro_batch))
    reductions = micro_batches if full else 1
    part = plan.weights // 2 if full else plan.weights + plan.adapters  # weights that train are sent in bfloat16
    ring = N // M if shard == "hybrid" else N
    sent = (ring - 1) * (2 * micro_batches * part + reductions * trained)
    if shard == "full":
        return sent, sent if M > 1 else 0
    reduced = reductions * 2 * (M - 1) * trained // M
    return sent + reduced, ring * reduced


def plan_row(settings: Settings, config: MoEConfig, num_hot: int, shard: str) -> dict:
    """The terms of the plan, their total, the bytes sent per step, and whether it fits."""
    method = METHODS[settings.method]

    def attach(model: MoETransformer) -> None:
        hot = (torch.arange(config.num_experts) < num_hot).expand(len(config.moe_layers), -1)
        r_max = drlora.RESERVED * settings.rank if method.grows else None
        targets = settings.targets or method.targets
        hellora.attach(model, hot, settings.rank, Recipe.alpha, kind=method.kind, targets=targets, expert_rank=r_max)

    plan = memory.plan(
        config,
        attach if method.adapts else None,
        dtype=torch.bfloat16 if method.adapts else torch.float32,
        num_processes=settings.gpus // settings.machines if shard == "hybrid" else settings.gpus,
        sharded=shard != "none",
        tokens=settings.micro_batch * settings.length,
        checkpointing=settings.activation_checkpointing,
    )
    sent, between = traffic(plan, shard, settings, full=not method.adapts)
    row = {"shard": shard} | plan._asdict() | {"total": plan.total, "sent_per_step": sent}
    row |= {"sent_between_machines": between} if settings.machines > 1 else {}
    spare = CPU_SPARE if settings.cpu else memory.SPARE
    return row | {"fits": plan.total <= (1 - spare) * settings.memory * 1e9}


def hours(tokens_per_s: float) -> float:
    """How long one pass over GSM8K's training examples takes."""
    middle = 16 * np.arange(len(LENGTHS)) + 7.5  # tokens of an example, by place in the histogram
    return float(LENGTHS @ middle) / tokens_per_s / 3600


def main(argv: list[str] | None = None) -> list[dict]:
    settings = cli.parse(
        Settings,
        argv,
        prog="bench.py plan",
        description="Memory that each GPU, or a CPU, needs, term by term, and bytes sent per step.",
        example="python bench.py plan --model mixtral-8x7b --method hellora --gpus 2 --micro-batch 8",
    )
    if settings.cpu and (settings.gpus or settings.machines > 1):
        raise InputError("--cpu plans one process without a GPU; leave out --gpus and --machines")
    if settings.tokens_per_s and not settings.cpu:
        raise InputError("--tokens-per-s needs --cpu; add --cpu, or leave it out")
    gpus, size = (1, MACHINE_GB) if settings.cpu else (2, GPU_GB)
    settings = replace(settings, gpus=settings.gpus or gpus, memory=settings.memory or size)
    out = settings.json and writable(settings.json)
    config, method = config_of(settings.model), METHODS[settings.method]
    if settings.gpus % settings.machines:
        raise InputError(
            f"--gpus {settings.gpus} do not divide into --machines {settings.machines}; expected as many in each"
        )
    if settings.k and method.experts != "hot":
        raise InputError(f"--k {settings.k} has no meaning with --method {settings.method}; leave it out")
    num_hot = num_hot_experts(settings.k or method.k, config.num_experts, config.num_experts_per_tok)
    num_hot = config.num_experts if method.experts == "all" else num_hot
    ways = ("none", "hybrid", "full") if settings.machines > 1 else ("none", "full")
    ways = ways if method.adapts else ways[1:]  # full fine-tuning is always sharded
    ways = ways[:1] if settings.cpu else ways
    rows = [plan_row(settings, config, num_hot, shard) for shard in ways]
    machines = f" in {settings.machines} machines" if settings.machines > 1 else ""
    gpus = f"{settings.gpus} GPUs of {settings.memory:g} GB{machines}: GB on each"
    where = f"a CPU and {settings.memory:g} GB of memory: GB" if settings.cpu else gpus
    cli.say(f"{settings.model}, {settings.method}, {where}")
    cli.say(f"{'':21}" + "".join(f" --shard {row['shard']:>6}" for row in rows))
    for term in [key for key in rows[0] if key not in ("shard", "fits")]:
        cli.say(f"{term.replace('_', ' '):21}" + "".join(f" {row[term] / 1e9:14.3g}" for row in rows))
    cli.say(f"{'fits':21}" + "".join(f" {'yes' if row['fits'] else 'no':>14}" for row in rows))
    if settings.tokens_per_s:
        rows[0]["hours"] = hours(settings.tokens_per_s)
        passes = f"8 hours are enough for {8 / rows[0]['hours']:.2f} passes"
        cli.say(f"one pass over GSM8K's {LENGTHS.sum():,.0f} examples takes {rows[0]['hours']:.1f} hours; {passes}")
    if out:
        write_json(out, rows)
    return rows
