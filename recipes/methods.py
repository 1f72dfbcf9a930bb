"""The tables of a run: its method as a row (which experts x what trains), and the recipe of its task.

A flag of train.py overrides what a table says.
"""

import argparse
import os
from dataclasses import dataclass

import hellora
from command.cli import InputError


@dataclass(frozen=True)
class Method:
    """Which experts get an adapter, and what trains in it."""

    experts: str | None  # key of hellora.POLICIES ("none": attention and router alone); None: every base weight trains
    kind: str = "lora"  # key of hellora.KINDS
    sparse: bool = False  # a second stage trains a tenth of B, chosen by a first stage that trains all of it
    grows: bool = False  # ranks start at half of --rank and grow where saliency is high (neighbours/drlora.py)
    k: int | float | None = None  # hot experts per layer, as a number or a share; None: experts per token
    targets: str = "all"  # key of hellora.TARGETS
    flat: bool = False  # the parameters of k hot experts spread over all: their rank is r k / E

    @property
    def adapts(self) -> bool:
        """Whether there is an adapter. If not, every base weight trains."""
        return self.experts is not None


METHODS = {
    "fft": Method(experts=None),
    "lora": Method(experts="all"),
    "lora-flat": Method(experts="all", flat=True),
    "dora": Method(experts="all", kind="dora"),
    "lori-d": Method(experts="all", kind="lori"),
    "lori-s": Method(experts="all", kind="lori", sparse=True),
    "hellora": Method(experts="hot"),
    "hellori-d": Method(experts="hot", kind="lori"),
    "hellori-s": Method(experts="hot", kind="lori", sparse=True),
    "moe-sieve": Method(experts="hot", k=0.25, targets="shared"),
    "dr-lora": Method(experts="all", grows=True),
}


@dataclass(frozen=True)
class Recipe:
    """Settings of a task: Table 1 of the paper for the real tasks, ours for one's own data and the embedded tasks."""

    lr: float
    epochs: int
    fft_lr: float  # of full fine-tuning
    batch: int = 128
    fft_batch: int = 256
    r: int = 32
    alpha: float = 64.0
    schedule: str = "constant"
    lr_warmup: float | None = None  # share of the steps


# At a constant rate the score of a seed may depend on the order of summation by ten points, at a falling one far less.
TINY = {"epochs": 1, "fft_lr": 6e-4, "batch": 16, "fft_batch": 16, "r": 8, "alpha": 16.0}
TINY |= {"schedule": "linear", "lr_warmup": 0.1}
RECIPES = {
    "gsm8k": Recipe(lr=4e-4, epochs=3, fft_lr=4e-5),
    "codealpaca": Recipe(lr=2e-3, epochs=2, fft_lr=2e-4),
    "saferpaca": Recipe(lr=4e-4, epochs=1, fft_lr=2e-5),
    "own": Recipe(lr=4e-4, epochs=3, fft_lr=4e-5, batch=8, fft_batch=8),  # small batches: few rows still make steps
    "tiny-math": Recipe(lr=6e-3, **TINY),
    "tiny-code": Recipe(lr=6e-3, **TINY),
    "tiny-safety": Recipe(lr=6e-3, **TINY),
}


def defaults_by_task() -> str:
    """RECIPES as a table for `train.py --help`."""
    heads = "--task --lr (fft) --schedule --lr-warmup --epochs --batch (fft) --rank --alpha".split()
    rows = [
        (task, r.lr, r.fft_lr, r.schedule, r.lr_warmup or "none", r.epochs, r.batch, r.fft_batch, r.r, f"{r.alpha:g}")
        for task, r in RECIPES.items()
    ]
    widths = [max(len(str(row[column])) for row in (heads, *rows)) + 2 for column in range(len(heads))]
    lines = ["".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in (heads, *rows)]
    return "\n  ".join(["defaults by task, for --method fft under (fft):", *(line.rstrip() for line in lines)])


def num_hot_experts(k: int | float | None, num_experts: int, num_experts_per_tok: int) -> int:
    """k hot experts per layer: a number, a share of the layer's experts, or the experts per token (HELLoRA, §4.5.3).

    Raises InputError for more than a layer has.
    """
    if k is None:
        return num_experts_per_tok
    if isinstance(k, float):
        return max(1, int(k * num_experts))
    if k > num_experts:
        raise InputError(f"--k {k}: expected 1..{num_experts}, the experts of a layer")
    return k


def flat_rank(rank: int, num_hot: int, num_experts: int) -> int:
    """The rank at which pairs on all experts have as many parameters as rank `rank` on `num_hot` of them.

    Raises InputError where no whole number does.
    """
    if rank * num_hot % num_experts:
        given = f"--rank {rank} on {num_hot} of {num_experts} experts"
        raise InputError(f"{given} is rank {rank * num_hot / num_experts:g} on all; choose another --rank or --k")
    return rank * num_hot // num_experts


def experts_flag(text: str) -> str:
    """An argparse type: a selection policy, or a file that lists the experts of every layer."""
    if text not in hellora.POLICIES and not os.path.isfile(text):
        allowed = ", ".join(hellora.POLICIES)
        raise argparse.ArgumentTypeError(f"got {text!r}; choose from {allowed}, or name a JSON file of expert lists")
    return text


COUNT_ON_HELP = "base: count with the base model; lora: while LoRA on all experts trains (the paper's warm-up)"


def count_on_flag(text: str) -> str:
    """An argparse type: base or lora. `--warmup none` is the older name of `--count-on base`."""
    return "base" if text == "none" else text
