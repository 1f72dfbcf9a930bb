"""How the processes of a run hold the base model: see machine/memory.py."""

from collections.abc import Callable
from functools import partial

import torch.distributed as dist

from command.cli import InputError, say
from machine import memory
from machine.processes import processes_per_machine
from model import MoETransformer
from run.inputs import Run


def choose_sharding(run: Run, attach: Callable[[MoETransformer], None]) -> str:
    """Whether the base model is sharded over the processes (FSDP2) or those of a machine, or replicated on each."""
    s, processes, (dtype, compute_dtype) = run.settings, run.processes, run.dtypes
    if dtype != compute_dtype:
        if s.shard == "none":
            raise InputError(f"--shard none: --method {s.method} in {s.dtype} needs FSDP, which keeps float32 weights")
        say("FSDP keeps the float32 weights that train, and computes in bfloat16")
        if processes.count == 1:
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        return "hybrid" if s.shard == "hybrid" and processes_per_machine() < processes.count else "full"
    tokens = s.micro_batch * max(len(item.ids) for item in run.items)
    plan_of = partial(
        memory.plan,
        run.config,
        attach,
        dtype=dtype,
        tokens=tokens,
        checkpointing=s.activation_checkpointing,
    )
    return memory.choose_shard(s.shard, processes.device, processes.count, plan_of)
