"""LoRI: A random and frozen; all of B trained (LoRI-D), or a tenth of its entries (LoRI-S).

HELLoRI is LoRI on hot experts.

    attach(model, hot, r, alpha, kind="lori")            # stage D: lora_A is drawn once and stays; all of B trains
    ...
    positions = top_entries(adapter_state(model))        # the largest tenth of |B| over the whole model
    attach(another, hot, r, alpha, kind="lori")          # stage S: the same seed gives the same A; B is zero again
    sparsify(another, positions)                         # only these entries exist, as a vector of values

LoRI (section 3.2) keeps one frozen A. Its released code draws a new A for stage S: the mask was measured under one A
and is used under another. That is a defect, which we do not follow. HELLoRA says "10 % of the entries in each B", while
LoRI takes one threshold for the whole model. We follow LoRI.
"""

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils import parametrize

from command.cli import InputError
from lora import LoRALinear, StackedLoRA

KEPT = 0.1  # of B's entries, in stage S (LoRI, section 3.2: a sparsity of 90 %)


def top_entries(state: dict[str, Tensor], share: float = KEPT) -> dict[str, Tensor]:
    """Where the floor(share * N) largest of all N entries |B| lie, one threshold for the whole model.

    state: tensors by name, of which those named MODULE.lora_B count (`adapters.adapter_state` of a D run).
    -> for every MODULE the int64 positions kept in its flat B, rising; equal values: the earlier one is kept.
    Raises InputError if fewer entries than that ever moved from zero: the D run was too short to say.
    """
    names = sorted(name for name in state if name.endswith(".lora_B"))
    if not names:
        raise InputError("there is no dense lora_B to choose entries from; expected the run of lori-d or hellori-d")
    sizes = [state[name].numel() for name in names]
    flat = torch.cat([state[name].float().abs().flatten() for name in names])  # [N]
    keep, moved = int(share * len(flat)), int((flat > 0).sum())
    if moved < keep:
        raise InputError(f"only {moved:,} entries of B are not zero, expected {keep:,} or more; train stage D longer")
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:keep]] = True
    parts = zip(names, chosen.split(sizes), strict=True)
    return {name.removesuffix(".lora_B"): part.nonzero().flatten() for name, part in parts}


class Scatter(nn.Module):
    """A matrix that is zero except at `positions`: values [m] -> B of the given shape, and back."""

    def __init__(self, positions: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("positions", positions)  # int64 [m] into the flat matrix
        self.shape = shape

    def forward(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape.numel()).index_copy(0, self.positions, values).view(self.shape)

    def right_inverse(self, B: Tensor) -> Tensor:
        return B.flatten()[self.positions]

    def bits(self) -> Tensor:
        """A bit for every entry of the matrix, 1 if it is kept: for the file, where positions would outweigh values."""
        kept = np.zeros(self.shape.numel(), dtype=bool)
        kept[self.positions.cpu()] = True
        return torch.from_numpy(np.packbits(kept))  # uint8 [entries / 8]


def positions_of(bits: Tensor) -> Tensor:
    """What `Scatter.bits` packed.  -> int64 [m], rising"""
    return torch.from_numpy(np.unpackbits(bits.numpy()).nonzero()[0])


def sparsify(model: nn.Module, positions: dict[str, Tensor]) -> None:
    """Keep of every lora_B only the entries at `positions` (by the name of its module), as one vector of values.

    What trains, its gradient, its moments in the optimizer and its file then have the size of the entries kept: a
    mask over a dense B would save none of it. `module.lora_B` stays readable, as the whole matrix.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoRALinear | StackedLoRA):
            continue
        kept = positions.get(name, ())
        if len(kept):
            B = module.lora_B
            scatter = Scatter(kept if B.is_meta else kept.to(B.device), B.shape)
            parametrize.register_parametrization(module, "lora_B", scatter, unsafe=True)  # changes the shape
        else:  # nothing of this matrix trains: it stays zero
            module.lora_B.requires_grad_(False)
