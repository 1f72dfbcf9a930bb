"""The step that trains, on one process or many, in the order in which it happens.

    model = load_for_process(folder, dtype, device, shard="full", attach=attach)    # wrap with FSDP, read the weights
    done = train_step(model, optimizer, items, micro_batch, processes, clip=1.0)
        batch_gradients     the batch's loss, backward, the reduction over processes
        clip, update

The loss is the mean negative log-likelihood of the target tokens of the whole global batch. The batch is cut into
micro-batches of similar length. Gradients are summed over micro-batches and processes, so how many there are of each
changes the result only by rounding, and with dropout by what is dropped. Sharded (FSDP2), a process holds a part of
every weight and gathers one layer at a time: a part for each process, or with "hybrid" sharding for each process of one
machine. Replicated, it holds the whole frozen base, and only the gradients of what trains are communicated.

Dimensions: L layers with experts, E experts per layer, K experts per token, T real tokens of a micro-batch.
"""

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard

import data
import hellora
from hub.weights import full_tensor, shard_dim
from machine.processes import Processes, processes_per_machine
from model import MoETransformer, load_model

# ------------------------------------------------------------------------------------------------------------ wrapping


def shard_model(
    model: MoETransformer, device: torch.device, compute_dtype: torch.dtype | None = None, parts: int | None = None
) -> None:
    """FSDP2: every decoder layer is gathered, used and dropped as one unit; the root keeps what is left.

    Never per expert or per MoE block: processes hit different experts, and would reduce different gradients.
    compute_dtype: of what is gathered, if the weights themselves are float32 because they train. parts: over how many
    processes a copy of the model is sharded, neighbours by rank (default: all); others hold copies of it.
    """
    count = dist.get_world_size()
    parts = parts or count
    shape = {"copies": count // parts, "parts": parts} if parts < count else {"parts": parts}
    mesh = init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=compute_dtype and torch.float32)
    for module in (*model.layers, model):
        fully_shard(
            module,
            mesh=mesh,
            mp_policy=precision,
            shard_placement_fn=lambda parameter: Shard(shard_dim(parameter.shape, parts)),
        )


def load_for_process(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    shard: str,
    attach: Callable[[MoETransformer], None] | None = None,
    compute_dtype: torch.dtype | None = None,
) -> MoETransformer:
    """The model of a checkpoint with its adapters (`attach`). Each process reads only what it is to hold.

    shard: "none", "full" (over all processes) or "hybrid" (over those of a machine; every machine holds a copy)
    """

    def prepare(model: MoETransformer) -> None:
        if attach is not None:
            attach(model)
        if shard != "none":
            shard_model(model, device, compute_dtype, processes_per_machine() if shard == "hybrid" else None)

    if shard != "none":
        gc.collect()  # FSDP's modules refer to each other: nothing else frees the model that was here before
    model = load_model(folder, dtype, device, prepare)
    if model.adapter is not None:
        hellora.init_factors(model)
    return model


# ---------------------------------------------------------------------------------------------------------- one step


@dataclass
class Step:
    """What one global batch gave, summed over micro-batches and processes."""

    loss: Tensor  # nats per target token
    aux_loss: Tensor  # load-balancing loss; 0 if it is off
    counts: Tensor  # float64 [L, E] tokens that chose each expert; on the CPU
    gate_mass: Tensor  # float64 [L, E] the routing weights they gave it; on the CPU
    target_tokens: int
    tokens: int
    examples: list[str]  # ids of the batch
    grad_norm: float = math.nan  # before clipping
    record: dict = field(default_factory=dict)  # what observers add to its line of log.jsonl

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are finite. If not, nothing is updated."""
        return math.isfinite(self.loss.item()) and math.isfinite(self.grad_norm)


def train_step(
    model: MoETransformer,
    optimizer: torch.optim.Optimizer,
    items: list[data.Encoded],
    micro_batch: int,
    processes: Processes,
    *,
    clip: float,
    aux_weight: float | None = None,
    aux_form: str = "layer",
    on_gradients: Callable[[Step], None] | None = None,
) -> Step:
    """One update of whatever the optimizer holds, on one global batch.

    clip: the largest gradient norm. on_gradients: called with the reduced gradients, before they are clipped.
    """
    done = batch_gradients(model, items, micro_batch, processes, aux_weight=aux_weight, aux_form=aux_form)
    if aux_weight:
        done.record["aux_loss"] = done.aux_loss.item()
    if on_gradients is not None:
        on_gradients(done)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # DEVIATION from LoRI: the norm of the whole gradient is clipped (`--clip`); LoRI clips each tensor by itself.
    done.grad_norm = full_tensor(torch.nn.utils.clip_grad_norm_(trained, clip)).item()
    if done.is_finite:
        optimizer.step()
    optimizer.zero_grad()
    return done


def batch_gradients(
    model: MoETransformer,
    items: list[data.Encoded],
    micro_batch: int,
    processes: Processes,
    *,
    aux_weight: float | None = None,
    aux_form: str = "layer",
) -> Step:
    """Gradients of one global batch: the mean loss of its target tokens, plus aux_weight times the mean balance."""
    config, device = model.config, model.embed_tokens.weight.device
    sharded = isinstance(model, FSDPModule)
    targets = sum(item.num_targets for item in items)
    tokens = sum(len(item.ids) for item in items)
    losses = torch.zeros(2, dtype=torch.float64, device=device)  # loss, auxiliary loss
    routed = torch.zeros(2, len(config.moe_layers), config.num_experts, dtype=torch.float64, device=device)
    mine = data.micro_batches(items, micro_batch, processes.index, processes.count)
    for i, part in enumerate(mine):
        if sharded:
            # Communicate gradients once per step and not once per micro-batch. Until then they are held unsharded,
            # which the gradients of all weights (full fine-tuning) would be too large for.
            model.set_requires_gradient_sync(model.adapter is None or i == len(mine) - 1)
        # A process whose share is empty still takes part, with no token at all: the others wait for it.
        batch = data.collate(part, config.pad_token_id or 0)
        nll, selected, routing = model(
            batch.input_ids.to(device), batch.lengths, labels=batch.labels.to(device), output_routing=True
        )
        chosen = selected[:, selected[0, ..., 0] >= 0]  # [L, B, S, K] -> [L, T, K], without padding
        # DEVIATION from LoRI: the loss is the mean over the target tokens of the global batch; LoRI averages sums.
        loss = nll / targets
        losses[0] += loss.detach()
        routed += tally(chosen, routing.weights, config.num_experts)
        if aux_weight:
            balance = load_balancing_loss(routing.probs, chosen, batch.lengths, aux_form) / tokens
            losses[1] += balance.detach()
            loss = loss + aux_weight * balance
        # FSDP averages gradients over the processes; times their number, that is the sum.
        (loss * processes.count if sharded else loss).backward()
    if processes.count > 1:
        dist.all_reduce(losses)
        dist.all_reduce(routed)
        if not sharded:
            sum_gradients([parameter for parameter in model.parameters() if parameter.requires_grad])
    counts, gate_mass = routed.cpu()
    return Step(losses[0], losses[1], counts, gate_mass, targets, tokens, [item.example for item in items])


@torch.no_grad()
def tally(selected: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """For each expert the number of tokens that chose it, and the sum of the routing weights that they gave it.

    selected int64 [L, T, K], weights [L, T, K] -> float64 [2, L, E]
    """
    added = torch.stack((torch.ones_like(weights), weights)).double().flatten(2)  # [2, L, T * K]
    index = selected.flatten(1).expand_as(added)
    return added.new_zeros(2, len(selected), num_experts).scatter_add_(-1, index, added)


def load_balancing_loss(probs: Tensor, selected: Tensor, lengths: Tensor, form: str = "layer") -> Tensor:
    """Sum over the sequences s of len_s * balance_s; divided by all tokens, the mean balance of a token's sequence.

    probs [L, T, E], selected [L, T, K], lengths [B] -> []. Within a sequence, f_le is the number of selections of
    expert e in layer l per token, and P_le its mean probability.
    "layer": balance = mean_l E sum_e (f_le / K) P_le, which is 1 under uniform routing (Switch; HELLoRA, eq. 1).
    "concat": balance = E sum_e f_e P_e with f and P averaged over the layers, which is K under uniform routing (the
    form of the hub and of OLMoE's pre-training, in which layers may cancel each other).
    A sum over sequences does not depend on how a batch is cut into micro-batches.
    """
    (L, _, E), K = probs.shape, selected.shape[-1]
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths.cpu()).to(probs.device)  # [T]
    lengths = lengths.to(probs.device)
    chosen = torch.zeros_like(probs).scatter(-1, selected, 1.0)  # [L, T, E]
    f, P = (
        x.new_zeros(L, len(lengths), E).index_add(1, sequence, x) / lengths.clamp(min=1)[:, None]  # [L, B, E]
        for x in (chosen, probs)
    )
    balance = E * (f.mean(0) * P.mean(0) if form == "concat" else (f * P).mean(0) / K).sum(-1)  # [B]
    return (lengths * balance).sum()


def sum_gradients(parameters: list[Tensor]) -> None:
    """Replace every gradient by its sum over the processes, all in one message."""
    flat = torch.cat([parameter.grad.flatten() for parameter in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad.copy_(part.view_as(parameter))


# ------------------------------------------------------------------------------------------------------- no training


@torch.no_grad()
def held_out_loss(
    model: MoETransformer, items: list[data.Encoded], micro_batch: int, processes: Processes
) -> tuple[float, int]:
    """The mean loss of the target tokens of `items`, in nats, and their number; the same on every process.

    Every process must call it with the same items.
    """
    was_training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=model.embed_tokens.weight.device)
    for part in data.micro_batches(items, micro_batch, processes.index, processes.count):
        total += summed_loss(model, part)
    model.train(was_training)
    if processes.count > 1:
        dist.all_reduce(total)
    targets = sum(item.num_targets for item in items)
    return total.item() / targets, targets


def summed_loss(model: MoETransformer, items: list[data.Encoded]) -> Tensor:
    """The loss of one micro-batch, summed over its target tokens, in nats."""
    batch, device = data.collate(items, model.config.pad_token_id or 0), model.embed_tokens.weight.device
    return model(batch.input_ids.to(device), batch.lengths, labels=batch.labels.to(device))[0]
