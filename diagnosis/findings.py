"""What is wrong with an adapter, in words, as far as its files tell without the base's weights.

Faults come first, the worst of them first; then remarks, which are not faults.

Dimensions: L layers with experts, E experts per layer.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from diagnosis.measure import EMPTY, EXPERTS, NO_A, NOT_FINITE, UNMOVED, place_of, spread, state_of
from hub.peft import Reading
from model import MoEConfig

UNUSABLE = ("unread", "not-finite", "empty")  # names of the faults for which an adapter is refused
CLEARER = 2.0  # how many times the spread of one order must exceed that of the other
SURE = 3.0  # how many standard errors the losses of the two orders must differ by
# Models beside each other: without the adapter; with it as it is read; with packed lora_B in the other order.
BASE, AS_READ, REORDERED = "base", "as read", "reordered"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (a fault) or worth knowing: what it is, what it means, what to do."""

    name: str
    what: str
    means: str
    do: str = ""
    is_fault: bool = True

    def lines(self) -> Iterator[str]:
        yield f"{'FAULT' if self.is_fault else 'note'}: {self.what}"
        yield f"    {self.means}"
        if self.do:
            yield f"    To do: {self.do}"


def of_pairs(reading: Reading, config: MoEConfig) -> Iterator[Finding]:
    """What the factors alone show, without the base's weights."""
    states = {key: state_of(pair) for key, pair in reading.pairs.items()}
    if reading.problems:
        more = f" (and {len(reading.problems) - 1} more)" if reading.problems[1:] else ""
        yield Finding("unread", reading.problems[0] + more, "This is not examined here, and other tools may drop it.")
    if bad := [key for key, state in states.items() if state == NOT_FINITE]:
        yield Finding(
            "not-finite",
            f"pairs that hold NaN or infinity: {len(bad)}, the first {bad[0]}",
            "The training diverged, or the file is damaged. The model computes NaN.",
            "train again with a smaller learning rate or with gradient clipping, or take an earlier checkpoint",
        )
    parts = {key: place_of(key, config.family).part for key, state in states.items() if state != EMPTY}
    experts = [states[key] for key, part in parts.items() if part == EXPERTS]
    if reading.problems and not reading.pairs:
        return  # nothing could be read
    if parts and reading.missing:
        yield Finding(
            "missing",
            f"modules that adapter_config.json names and that have no pair: {len(reading.missing)}, the first "
            f"{reading.missing[0]}",
            "They compute what the base computes. The file is damaged, or the training did not save them.",
            "save the adapter again, or name in adapter_config.json only what it adapts",
        )
    if not parts:
        yield Finding(
            "empty",
            "it adapts nothing: no pair differs from zero",
            "The model is the base. The training did not save what it trained, or trained nothing.",
            "train again",
        )
    elif not experts:
        yield Finding(
            "no-expert-pair",
            f"no expert has a LoRA pair; the adapter has {len(parts)} pairs, on {', '.join(sorted({*parts.values()}))}",
            "The experts are those of the base. Where they are stacked parameters (transformers 5), target_modules may "
            "not reach them, and the training continues without a warning.",
            "train again, with target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj']",
        )
    elif all(state in (UNMOVED, NO_A) for state in experts):
        second = "B" if (UNMOVED in experts) != reading.is_swapped else "A"  # as the file names it
        yield Finding(
            "unmoved",
            f"none of the {len(experts)} pairs on experts moved: {second} is zero",
            "The experts compute what the base computes. Their factors got no gradient: the forward pass did not use "
            "them, or they were not given to the optimizer.",
            "check that the experts' factors have a gradient after the first backward pass, then train again",
        )


def of_layout(reading: Reading, config: MoEConfig) -> Iterator[Finding]:
    """Whether newer versions of PEFT would read the packed stacks otherwise than they were written."""
    if reading.is_swapped and 2 * config.intermediate_size == config.hidden_size:
        has_down = any(name.endswith("down_proj") for name in reading.packed)
        yield Finding(
            "square-stack",
            "the stack of gate and up is square, and the file has A and B in each other's place (PEFT before 0.19)",
            "PEFT 0.19 and later refuse it, by the shapes of down."
            if has_down
            else "PEFT 0.19 and later load it without an error, and add the transposed delta.",
            "merge it with the PEFT that wrote it, or export it from here",
            is_fault=not has_down,
        )


def of_order(
    readings: dict[str, Reading], config: MoEConfig, losses: dict[str, Tensor] | None = None
) -> Iterator[Finding]:
    """Whether the columns of packed lora_B are read in the right order.

    readings: AS_READ and, of packed stacks that moved, REORDERED. losses: of rows of text [N], with each of them and
    for the BASE alone; without these the norms of the columns tell.
    """
    if REORDERED not in readings:
        return
    reading = readings[AS_READ]
    is_right, evidence = order_by_loss(losses) if losses else order_by_norms(readings, config)
    order = "expert by expert" if reading.layout.by_expert else "with the expert innermost, as PEFT packs them"
    if is_right is None:
        more = "" if losses else "give rows that it was trained on (--data FILE), or "
        yield Finding(
            "packed-order-unknown",
            f"{len(reading.packed)} packed stacks are read {order}; whether that is right cannot be told",
            f"Evidence: {evidence}.",
            f"{more}compare with a checkpoint that the tool merged: export.py check MERGED --base MODEL --adapter DIR",
            is_fault=False,
        )
    elif is_right:
        what = f"{len(reading.packed)} packed stacks are read {order}, which is right"
        yield Finding("packed-order-seen", what, f"Evidence: {evidence}.", is_fault=False)
    else:
        yield Finding(
            "packed-order",
            f"the columns of lora_B in packed stacks are in the other order than read ({order})",
            f"Evidence: {evidence}. Each expert would get columns of many others, with the right norm: quality drops "
            "without an error. Unsloth packed them expert by expert until September 2026.",
            "state the order that the training used in adapter_config.json: lora_B_layout 'grouped_by_expert' or "
            "'rank_major'; then read it again with this check",
        )


def order_by_norms(readings: dict[str, Reading], config: MoEConfig) -> tuple[bool | None, str]:
    """Whether the columns' norms speak for the order as read (None: for neither), and the evidence in words."""
    F_read, F_other = (spread(readings[name], config.family) for name in (AS_READ, REORDERED))
    evidence = (
        f"the variance of the column norms between experts is {F_read:.2f} times that within an expert, and in the "
        f"other order {F_other:.2f} times"
    )
    if max(F_read, F_other) <= CLEARER * max(min(F_read, F_other), 1.0):
        return None, evidence
    return F_read > F_other, evidence


def order_by_loss(losses: dict[str, Tensor]) -> tuple[bool | None, str]:
    """Whether the loss speaks for the order as read (None: for neither), and the evidence in words.

    The right order must have the lower loss by several standard errors, and lower the base's: the loss of any change
    differs from that of another, and only what was trained on such rows lowers it.
    """
    read, other, base = (losses[name].mean() for name in (AS_READ, REORDERED, BASE))
    difference = losses[REORDERED] - losses[AS_READ]  # [N]
    error = float(difference.std()) / len(difference) ** 0.5 if len(difference) > 1 else math.inf
    evidence = (
        f"the loss is {read:.4f} as read, {other:.4f} in the other order and {base:.4f} of the base (rows: "
        f"{len(difference)}; difference of the orders {difference.mean():.4f}, standard error {error:.4f})"
    )
    if difference.mean().abs() > SURE * error and min(read, other) < base:
        return bool(read < other), evidence
    return None, evidence
