"""LoRI: random, frozen A; B trained (LoRI-D), or only a tenth of its entries (LoRI-S). HELLoRI: this on hot experts.

    attach(model, hot, r, alpha, kind="lori")            # stage D: lora_A is drawn once and stays, all of B trains
    ...
    positions = top_entries(adapter_state(model))        # stage S: the largest tenth of |B|, over the whole model
    attach(another, hot, r, alpha, kind="lori")          # the same seed, so the same A; B is zero again
    lora.sparsify(another, positions)                    # only these entries exist, as a vector of values

LoRI (section 3.2) keeps one frozen A. Its released code draws a new A for stage S, so that the mask was measured under
one A and used under another: a defect, not followed here. HELLoRA says "10 % of the entries in each B" where LoRI
takes one threshold for the whole model; we follow LoRI.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor

from command.cli import InputError
from hellora import Adapter
from run.adapters import read_adapter

KEPT = 0.1  # of B's entries, in stage S (LoRI, section 3.2: a sparsity of 90 %)


def top_entries(state: dict[str, Tensor], share: float = KEPT) -> dict[str, Tensor]:
    """Where the floor(share * N) largest of all N entries |B| lie, one threshold for the whole model.

    state: tensors by name, of which those named MODULE.lora_B count (`adapters.adapter_state` of a D run).
    -> for every MODULE the int64 positions kept in its flat B, rising; equal values: the earlier one is kept.
    Raises InputError if fewer entries than that ever moved from zero: the D run was too short to say.
    """
    names = sorted(name for name in state if name.endswith(".lora_B"))
    if not names:
        raise InputError("there is no dense lora_B to choose entries from; want the run of lori-d or hellori-d")
    sizes = [state[name].numel() for name in names]
    flat = torch.cat([state[name].float().abs().flatten() for name in names])  # [N]
    keep, moved = int(share * len(flat)), int((flat > 0).sum())
    if moved < keep:
        raise InputError(f"only {moved:,} entries of B are not zero and {keep:,} are wanted; train stage D longer")
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[flat.argsort(descending=True, stable=True)[:keep]] = True
    parts = zip(names, chosen.split(sizes), strict=True)
    return {name.removesuffix(".lora_B"): part.nonzero().flatten() for name, part in parts}


def read_mask(args: argparse.Namespace) -> tuple[Adapter, dict[str, Tensor]]:
    """The finished D run of --mask: its Adapter and tensors. Raises InputError if stage S would not continue it."""
    adapter, state = read_adapter(Path(args.mask) / "adapter")
    if adapter.kind != "lori":
        raise InputError(f"--mask {args.mask} is a run of kind {adapter.kind}; want one of lori-d or hellori-d")
    asked = {"rank": args.rank, "alpha": args.alpha, "targets": args.targets, "seed": args.seed}
    there = {"rank": adapter.r, "alpha": adapter.alpha, "targets": adapter.targets, "seed": adapter.seed}
    for name, value in asked.items():
        if value != there[name]:
            raise InputError(f"--mask {args.mask} has {name} {there[name]}, this run {value}; they must agree")
    return adapter, state
