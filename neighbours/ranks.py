"""Experts of different ranks: which dimensions of a LoRA pair train, and adapter files without the others.

Dimensions: L layers with experts, E experts per layer, R rank of an expert, r_max reserved rank.
"""

import torch
from torch import Tensor


def trains(ranks: Tensor, r_max: int) -> Tensor:
    """Which dimensions train: the first R.  ranks [...] -> bool [..., r_max]"""
    return torch.arange(r_max) < ranks.unsqueeze(-1)


def rank_rows(state: dict[str, Tensor]) -> dict[str, int]:
    """The row of `ranks` [L, E] for every tensor of experts. (The first layers of a model may have no experts.)"""
    layers = {name: int(name.split(".")[1]) for name in state if ".experts." in name}
    row = {layer: i for i, layer in enumerate(sorted(set(layers.values())))}
    return {name: row[layer] for name, layer in layers.items()}


def truncate(state: dict[str, Tensor], ranks: Tensor) -> dict[str, Tensor]:
    """Keep the R dimensions of every expert that train, one expert after the other. Other modules stay as they are.

    lora_A [E, r_max, in] -> [sum of R, in], lora_B [E, out, r_max] -> [out, sum of R]
    """
    kept = dict(state)
    for name, row in rank_rows(state).items():
        is_A = name.endswith("lora_A")
        stack = state[name] if is_A else state[name].mT  # [E, r_max, in or out]
        rows = stack[trains(ranks[row], stack.shape[1])]  # [sum of R, in or out]
        kept[name] = rows if is_A else rows.mT.contiguous()
    return kept


def pad(state: dict[str, Tensor], ranks: Tensor) -> dict[str, Tensor]:
    """Undo `truncate`: all experts have the largest rank, with zeros. Raises ValueError if the ranks do not fit."""
    padded, largest = dict(state), int(ranks.max())
    for name, row in rank_rows(state).items():
        tensor, is_A = state[name], name.endswith("lora_A")
        rows = tensor if is_A else tensor.mT  # [sum of R, in or out]
        mask = trains(ranks[row], largest)
        if len(rows) != int(mask.sum()):
            raise ValueError(f"{name} is {tuple(tensor.shape)}, its ranks sum to {mask.sum()}")
        stack = rows.new_zeros(*mask.shape, rows.shape[-1])  # [E, largest, in or out]
        stack[mask] = rows
        padded[name] = stack if is_A else stack.mT.contiguous()
    return padded
