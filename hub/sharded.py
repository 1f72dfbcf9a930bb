"""Parameters that FSDP2 may have sharded: each process holds a part, as a DTensor."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(parameter: Tensor) -> Tensor:
    """The full parameter. If it is sharded, this is a collective: every process must call it."""
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def fill(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter, or the part of it that this process holds."""
    if isinstance(parameter, DTensor):
        mesh, places = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values.to(parameter.device), mesh, places, src_data_rank=None)
    parameter.copy_(values)
