"""Count how many tokens of a task each expert receives, and with what routing weights.

    counts = count_experts(model, batches)                       # [L, E], of the model as it is
    counted = profile_warmup(model, items, 16, lr=4e-4)          # while LoRA on all experts trains: the paper's way

Every real token counts, in the prompt and in the target. Padding never does.

Dimensions: L layers with experts, E experts per layer, K experts per token, B sequences, S positions.
"""

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
from command.cli import InputError, RunError
from machine import memory
from machine.processes import ALONE, Processes
from model import MoEConfig, MoETransformer, read_config
from routing.profiles import RoutingProfile
from training_step import load_for_process, tally, train_step


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
