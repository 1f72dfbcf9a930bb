"""Our parameters and the hub's tensors: one map of names, and weights read and written through it.

A layer's E experts are stacked parameters here, gate_up_proj [E, 2F, D] and down_proj [E, D, F]. `matrices` takes a
stack apart, and `hub_key` gives each matrix the name that its family uses. Some families stack experts in their files
too: hub/checkpoint.py then finds each matrix inside the stack, and `as_stored` stacks them again for writing. Under
FSDP2 a process holds a part of every parameter (`shard_dim`), and reads no other.

Dimensions: E experts per layer, D hidden_size, F intermediate_size of an expert.
"""

import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from command.cli import is_main_process
from hub.checkpoint import WHOLE, Part, Stored, read_slices, write_checkpoint
from hub.config import Family
from hub.sharded import full_tensor

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # of an expert, as we name them
ExpertIds = dict[str, list[int]]  # module path of a stack -> the expert in each of its rows


def hub_key(name: str, family: Family) -> str:
    """Our name of a matrix to the hub's: layers.0.mlp.experts.3.up_proj -> model.layers.0.mlp.experts.3.up_proj"""
    if name.startswith("lm_head"):
        return name
    for ours, theirs in zip(PROJECTIONS, family.projections, strict=True) if ".experts." in name else ():
        name = name.replace(f".{ours}", f".{theirs}")
    name = re.sub(r"\.mlp\.gate(?=\.|$)", f".mlp.{family.router}", name)
    name = name.replace(".mlp.", f".{family.moe}.").replace(".shared_expert.", f".{family.shared_expert}.")
    return f"model.{name}"


def matrices(name: str, parameter: Tensor, expert_ids: ExpertIds) -> Iterator[tuple[str, Tensor, Part]]:
    """What this process holds of a parameter, as matrices under our names. Views, no copies.

    Yields the name of each matrix, the view, and which part of the matrix that is.
    """
    path, _, stack = name.rpartition(".")
    held, part = held_part(parameter)
    if path not in expert_ids:
        yield name, held, part
        return
    projections = PROJECTIONS[:2] if stack == "gate_up_proj" else PROJECTIONS[2:]
    ids = expert_ids[path][part.first : part.end] if part.dim == 0 else expert_ids[path]
    low, high = (part.first, part.end) if part.dim == 1 else (0, parameter.shape[1])  # rows of each expert
    size = parameter.shape[1] // len(projections)
    for e, weight in zip(ids, held, strict=True):
        for i, projection in enumerate(projections):
            first, end = max(low, i * size), min(high, (i + 1) * size)
            if first < end:
                rows = Part(0, first - i * size, end - i * size)
                inside = Part(1, part.first, part.end) if part.dim == 2 else rows
                yield f"{path}.{e}.{projection}.weight", weight[first - low : end - low], inside


def base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters, without adapters. A tied lm_head is listed once, as the hub stores it."""
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name}


def hub_matrices(model: nn.Module, parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor, Part]]:
    """Some parameters of a model, by name, as `matrices`, each with the hub's key."""
    ids = {name: module.expert_ids for name, module in model.named_modules() if hasattr(module, "expert_ids")}
    for name, parameter in parameters:
        for matrix, view, part in matrices(name, parameter, ids):
            yield hub_key(matrix, model.config.family), view, part


def hub_views(model: nn.Module) -> dict[str, Tensor]:
    """The keys of the family's matrices, each with the view of our parameters that holds it."""
    return {key: view for key, view, _ in hub_matrices(model, base_parameters(model).items())}


def as_stored(tensors: Iterable[tuple[str, Tensor]], family: Family, num_experts: int) -> Iterator[tuple[str, Tensor]]:
    """A stream of matrices by key as the family's files hold it: a layer's experts stacked if `family.stacks`."""
    stacks: dict[str, dict[tuple[int, str], Tensor]] = {}
    for key, tensor in tensors:
        match = re.fullmatch(r"(.+)\.experts\.(\d+)\.(\w+)\.weight", key)
        if not (match and family.stacks):
            yield key, tensor
            continue
        is_down = match[3] == family.projections[2]
        leaves = family.projections[2:] if is_down else family.projections[:2]
        name = f"{match[1]}.{family.stacks[is_down]}"
        parts = stacks.setdefault(name, {})
        parts[int(match[2]), match[3]] = tensor
        if len(parts) == num_experts * len(leaves):
            yield name, torch.stack([torch.cat([parts[e, leaf] for leaf in leaves]) for e in range(num_experts)])
            del stacks[name], parts


# ------------------------------------------------------------------------------------------- sharded parameters


UNEVEN = 1.1  # how much larger than the average the largest share may be


def shard_dim(shape: torch.Size, parts: int) -> int:
    """The dimension in which FSDP2 shards a parameter over `parts` processes: 0 if all shares are then about equal.

    8 experts on 16 processes would leave half of them without any. So the next dimension is sharded that divides
    evenly: FSDP2 asks for that in every dimension but 0.
    """
    if -(-shape[0] // parts) * parts <= UNEVEN * shape[0]:
        return 0
    return next((dim for dim, size in enumerate(shape) if size % parts == 0), 0)


def held_part(parameter: Tensor) -> tuple[Tensor, Part]:
    """What this process holds of a parameter, and which part that is."""
    if not isinstance(parameter, DTensor):
        return parameter.data, WHOLE
    mesh, held = parameter.device_mesh, parameter.to_local().data
    (axis, dim), *_ = ((i, place.dim) for i, place in enumerate(parameter.placements) if place.is_shard())
    size = parameter.shape[dim]
    first = min(size, -(-size // mesh.size(axis)) * mesh.get_local_rank(axis))
    return held, Part(dim, first, first + held.shape[dim])


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give the parameters on the meta device uninitialised memory, and move the others. Tied parameters stay tied."""
    made = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.is_meta and parameter not in made:
                made[parameter] = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            setattr(module, name, made.get(parameter, parameter))
    model.to(device)


@torch.no_grad()
def init_weights(model: nn.Module, std: float, seed: int = 0) -> None:
    """Fill every matrix with N(0, std^2), norms with ones and biases with zeros: a model to pre-train or to measure."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.copy_(torch.empty(parameter.shape, device=device).normal_(0.0, std, generator=generator))


# ---------------------------------------------------------------------------------------------- read and write


def read_weights(model: nn.Module, weights: dict[str, Stored]) -> None:
    """Fill the model from the files, one matrix at a time. Each process reads only what it holds."""
    held = list(hub_matrices(model, base_parameters(model).items()))
    views = {key: view for key, view, _ in held}
    for key, tensor in read_slices(weights, {key: part for key, _, part in held}):
        views[key].copy_(tensor)


def write_weights(folder: Path, model: nn.Module, *, hub: dict, dtype: torch.dtype, shard_bytes: int) -> None:
    """Write a checkpoint with the keys of the model's family, and `hub` as its config.json.

    Every process must call it: one parameter after the other is gathered, and the main process writes.
    """
    family, E, base = model.config.family, model.config.num_experts, base_parameters(model)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        gathered = ((name, full_tensor(parameter)) for name, parameter in base.items())
        for key, view, _ in hub_matrices(model, gathered):
            yield key, view.to("cpu", dtype, copy=True).contiguous()

    if not is_main_process():
        for _ in tensors():
            pass
        return
    empty = ((name, torch.empty(parameter.shape, device="meta")) for name, parameter in base.items())
    views = ((key, view) for key, view, _ in hub_matrices(model, empty))
    sizes = {key: tensor.numel() * dtype.itemsize for key, tensor in as_stored(views, family, E)}
    write_checkpoint(folder, sizes, as_stored(tensors(), family, E), hub, shard_bytes)
