"""One model on one process or many: loaded in parts, and the gradients of one global batch.

    model = load_shared(folder, dtype, device, sharded=True, attach=lambda model: hellora.attach(model, hot, r, alpha))
    step = global_step(model, items, micro_batch, processes)     # the loss, and p.grad of whatever trains

What a step computes does not depend on the number of processes: a global batch is cut into micro-batches of similar
length, its loss is the mean over the target tokens of the whole batch, and the gradients of all processes are summed.
Sharded (FSDP2), every process holds its rows of every weight and gathers a layer when it is its turn; unsharded, every
process holds the frozen base whole, and only the gradients of what trains travel.

Dimensions: L layers with experts, E experts a layer, T real tokens of a micro-batch.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

import data
import hellora
from model import MoETransformer, load_balancing_loss, load_model
from routing.statistics import tally
from run.processes import Processes


def shard(model: MoETransformer, device: torch.device, compute_dtype: torch.dtype | None = None) -> None:
    """FSDP2: every decoder layer is gathered, used and dropped as one; the root keeps what is left.

    Never per expert or per MoE block: processes hit different experts, and would reduce different gradients.
    compute_dtype: of what is gathered, where the weights themselves are float32 because they train.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=compute_dtype and torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def load_shared(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    sharded: bool,
    attach: Callable[[MoETransformer], None] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> MoETransformer:
    """The model of a checkpoint with its adapters (`attach`), of which this process reads what it is to hold."""

    def prepare(model: MoETransformer) -> None:
        if attach is not None:
            attach(model)
        if sharded:
            shard(model, device, compute_dtype)

    if sharded:
        gc.collect()  # FSDP's modules refer to each other: nothing else frees the model that was here before
    model = load_model(folder, dtype, device, prepare)
    if model.adapter is not None:
        hellora.init_factors(model)
    return model


@dataclass
class Step:
    """What one global batch gave, summed over micro-batches and processes."""

    loss: Tensor  # nats per target token
    aux_loss: Tensor  # load-balancing loss, mean over the tokens; 0 if it is off
    routing: Tensor  # float64 [2, L, E] tokens that chose each expert, and the routing weights they gave it; on the CPU
    target_tokens: int
    tokens: int


def global_step(
    model: MoETransformer,
    items: list[data.Encoded],
    micro_batch: int,
    processes: Processes,
    *,
    aux_loss: float | None = None,
    aux_form: str = "layer",
) -> Step:
    """Gradients of one global batch: the mean loss of its target tokens, plus aux_loss times the balance."""
    config, device = model.config, model.embed_tokens.weight.device
    sharded = isinstance(model, FSDPModule)
    targets = sum(len(item.ids) - item.prompt_length for item in items)
    tokens = sum(len(item.ids) for item in items)
    losses = torch.zeros(2, dtype=torch.float64, device=device)  # loss, auxiliary loss
    routed = torch.zeros(2, len(config.moe_layers), config.num_experts, dtype=torch.float64, device=device)
    mine = data.micro_batches(items, micro_batch, processes.index, processes.count)
    for i, part in enumerate(mine):
        if sharded:
            # Once a step, not once a micro-batch; but until then gradients are held whole, and those of all weights
            # would be too many.
            model.set_requires_gradient_sync(model.adapter is None or i == len(mine) - 1)
        # A process whose share is empty still takes part, since the others wait for it: with no token at all.
        batch = data.collate(part, config.pad_token_id or 0)
        nll, selected, router_logits = model(
            batch.input_ids.to(device), batch.lengths, labels=batch.labels.to(device), output_router_logits=True
        )
        loss = nll / max(1, targets)
        losses[0] += loss.detach()
        routed += tally(config, selected, router_logits)
        if aux_loss and part:  # a mean over micro-batches by tokens: each is balanced by itself, as in the hub
            share = int(batch.lengths.sum()) / tokens
            balance = share * load_balancing_loss(router_logits, config.num_experts_per_tok, aux_form)
            losses[1] += balance.detach()
            loss = loss + aux_loss * balance
        (
            loss * processes.count if sharded else loss
        ).backward()  # FSDP averages over processes: times their number is the sum
    if processes.count > 1:
        dist.all_reduce(losses)
        dist.all_reduce(routed)
        if not sharded:
            sum_gradients([parameter for parameter in model.parameters() if parameter.requires_grad])
    return Step(losses[0], losses[1], routed.cpu(), targets, tokens)


def sum_gradients(parameters: list[Tensor]) -> None:
    """Replace every gradient by its sum over the processes, all in one message."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))
