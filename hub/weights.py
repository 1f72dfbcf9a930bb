"""Our parameters and the hub's tensors: one map of names, and weights read and written through it.

A layer's E experts are stacked parameters here, gate_up_proj [E, 2F, D] and down_proj [E, D, F]. The files hold the
keys of the model's family, a matrix per expert and projection. `matrices` takes a stack apart, `hub_key` renames.
Under FSDP2 a process holds some rows of every parameter, and reads no others.

Dimensions: E experts per layer, D hidden_size, F intermediate_size of an expert.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor

from command.cli import is_main_process
from hub.checkpoint import Stored, read_slices, write_checkpoint
from hub.config import Family

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")  # of an expert, as we name them
ExpertIds = dict[str, list[int]]  # module path of a stack -> the expert in each of its rows


def hub_key(name: str, family: Family) -> str:
    """Our name of a matrix to the hub's: layers.0.mlp.experts.3.up_proj -> model.layers.0.mlp.experts.3.up_proj"""
    if name.startswith("lm_head"):
        return name
    for ours, theirs in zip(PROJECTIONS, family.projections, strict=True) if ".experts." in name else ():
        name = name.replace(f".{ours}", f".{theirs}")
    name = name.replace(".mlp.", f".{family.moe}.").replace(".shared_expert.", f".{family.shared_expert}.")
    return f"model.{name}"


def matrices(name: str, rows: Tensor, expert_ids: ExpertIds, first: int = 0) -> Iterator[tuple[str, Tensor]]:
    """A parameter, or its rows from number `first` on, as matrices under our names. Views, no copies."""
    path, _, stack = name.rpartition(".")
    if path not in expert_ids:
        yield name, rows
        return
    for e, weight in zip(expert_ids[path][first : first + len(rows)], rows, strict=True):
        parts = weight.chunk(2) if stack == "gate_up_proj" else (weight,)
        for projection, part in zip(PROJECTIONS[:2] if len(parts) == 2 else PROJECTIONS[2:], parts, strict=True):
            yield f"{path}.{e}.{projection}.weight", part


def hub_views(parameters: dict[str, Tensor], expert_ids: ExpertIds, family: Family) -> dict[str, Tensor]:
    """The hub's keys, each with the view of our parameters that holds its weight."""
    named = ((name, parameter.data) for name, parameter in parameters.items())
    return {hub_key(key, family): view for name, data in named for key, view in matrices(name, data, expert_ids)}


# ------------------------------------------------------------------------------------------- sharded parameters


def full_tensor(parameter: Tensor) -> Tensor:
    """The full parameter. If it is sharded, this is a collective: every process must call it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def local_rows(parameter: Tensor) -> tuple[Tensor, int]:
    """The rows of a parameter that this process holds, and the number of the first. FSDP2 shards rows evenly."""
    if not isinstance(parameter, DTensor):
        return parameter.data, 0
    per_process = -(-len(parameter) // parameter.device_mesh.size())
    return parameter.to_local().data, min(len(parameter), per_process * parameter.device_mesh.get_local_rank())


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
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.copy_(torch.empty(parameter.shape).normal_(0.0, std, generator=generator))


# ---------------------------------------------------------------------------------------------- read and write


def read_weights(
    parameters: dict[str, Tensor], expert_ids: ExpertIds, family: Family, weights: dict[str, Stored]
) -> None:
    """Fill the parameters from the files, one matrix at a time; each process reads only the rows that it holds."""
    destinations, rows = {}, {}
    for name, parameter in parameters.items():
        held, first = local_rows(parameter)
        is_stack = name.rpartition(".")[0] in expert_ids
        for matrix, view in matrices(name, held, expert_ids, first):
            key = hub_key(matrix, family)
            destinations[key] = view
            rows[key] = slice(None) if is_stack else slice(first, first + len(held))
    for key, tensor in read_slices(weights, rows):
        destinations[key].copy_(tensor)


def write_weights(
    folder: Path,
    parameters: dict[str, Tensor],
    expert_ids: ExpertIds,
    family: Family,
    *,
    hub: dict,
    dtype: torch.dtype,
    shard_bytes: int,
) -> None:
    """Write a checkpoint under the hub's keys, with `hub` as its config.json.

    Every process must call it: one parameter after the other is gathered, and the main process writes.
    """

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, parameter in parameters.items():
            for matrix, view in matrices(name, full_tensor(parameter).detach(), expert_ids):
                yield hub_key(matrix, family), view.to("cpu", dtype, copy=True).contiguous()

    if not is_main_process():
        for _ in tensors():
            pass
        return
    empty = {name: torch.empty(parameter.shape, device="meta") for name, parameter in parameters.items()}
    sizes = {key: view.numel() * dtype.itemsize for key, view in hub_views(empty, expert_ids, family).items()}
    write_checkpoint(folder, sizes, tensors(), hub, shard_bytes)
