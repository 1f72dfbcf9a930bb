"""What is wrong with an adapter or a merged checkpoint, in words: what it is, what it means, what to do.

Faults come first, the worst of them first; then remarks, which are not faults.

Dimensions: L layers with experts, E experts per layer.
"""

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from diagnosis.measure import (
    EMPTY,
    EXPERTS,
    MOVED,
    NO_A,
    NOT_FINITE,
    ROUTER,
    UNMOVED,
    Matrix,
    by_expert,
    place_of,
    spread,
    state_of,
)
from diagnosis.merged import AS_READ, REORDERED, TRANSPOSED, Comparison, Multiple
from hub.peft import Reading
from model import MoEConfig

NEGLIGIBLE = 1e-5  # |dW| / |W|; a step of bfloat16 is 4e-3 of an entry
UNUSABLE = ("unread", "not-finite", "empty")  # names of the faults for which an adapter is refused
CLEARER = 2.0  # how many times the spread of one order must exceed that of the other
SURE = 3.0  # how many standard errors the losses of the two orders must differ by
BASE = "base"  # the model without the adapter, beside AS_READ and REORDERED


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (a fault) or worth knowing."""

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


# ------------------------------------------------------------------------------- from the adapter's files alone


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
            "not reach them, and the training goes on without a word.",
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


# --------------------------------------------------------------------------------------------- with the base's weights


def of_changes(
    reading: Reading, matrices: dict[str, Matrix], config: MoEConfig, counts: Tensor | None
) -> Iterator[Finding]:
    """What the size of the update shows. counts: int [L, E], tokens that chose an expert, if a profile is given."""
    experts = {key: m for key, m in matrices.items() if m.place.part == EXPERTS and m.state != EMPTY}
    yield from some_unmoved(experts, reading, config, counts)
    moved = [m for m in experts.values() if m.state == MOVED]
    yield from of_sizes(moved, float(max(reading.scales.values(), default=0)))
    if moved and reading.kind == "lora" and all(m.is_A_as_drawn for m in moved):
        yield Finding(
            "A-untrained",
            f"no entry of A on any of {len(moved)} experts' matrices is outside the range that A is drawn from",
            "A does not seem to have trained on the experts. That is right for a frozen A, but not where A trained in "
            "other modules.",
            "check which parameters the optimizer had",
            is_fault=any(m.state == MOVED and not m.is_A_as_drawn for m in matrices.values()),
        )
    has_pair = by_expert(matrices, config).has_pair
    if reading.layout and not reading.packed and has_pair.any() and not has_pair.all():
        yield Finding(
            "some-experts",
            f"{int(has_pair.sum())} of {has_pair.numel()} experts have a pair",
            "A file of PEFT without zeros for the others loads under transformers 4 and in SGLang, but not in vLLM or "
            "under transformers 5.",
            is_fault=False,
        )
    yield from of_router(matrices)


def of_sizes(moved: list[Matrix], scale: float | None = None) -> Iterator[Finding]:
    """Whether the experts' update is far too small or too large. scale: the largest by which B A is multiplied."""
    largest = max((m.ratio for m in moved), default=0)
    if moved and largest < NEGLIGIBLE:
        yield Finding(
            "negligible",
            f"the experts move by at most {largest:.1e} of their weights",
            "The update is lost in the rounding of a 16-bit model. The learning rate, the scale alpha / r or the "
            "number of steps was far too small.",
            "train longer or with a larger learning rate, and look at the scale",
        )
    if largest > 1:
        above = sum(m.ratio > 1 for m in moved)
        are_most = 2 * above > len(moved)  # in a small model a few hot ones go that far
        advice = "check lora_alpha, r and use_rslora against the training, then lower the learning rate"
        yield Finding(
            "larger-than-weight",
            f"{above} of {len(moved)} experts' matrices move by more than their norm, by up to {largest:.1f} times",
            "There the update drowns the base."
            + (f" The scale that B A is multiplied by goes up to {scale:g}." if scale else ""),
            advice if are_most else "",
            is_fault=are_most,
        )


def some_unmoved(
    experts: dict[str, Matrix], reading: Reading, config: MoEConfig, counts: Tensor | None
) -> Iterator[Finding]:
    """Some of the experts' pairs did not move: a fault if all of a stack did not, or experts with many tokens."""
    idle = {key: m for key, m in experts.items() if m.state in (UNMOVED, NO_A)}
    if not idle or len(idle) == len(experts):
        return
    what = f"{len(idle)} of {len(experts)} pairs on experts never moved, the first {next(iter(idle))}"
    if reading.kind == "lori":
        means = "LoRI-S keeps the largest tenth of all entries of B; these matrices have none of them."
        yield Finding("some-unmoved", what, means, is_fault=False)
        return
    moving = {(m.place.layer, m.place.projection) for m in experts.values() if m.state == MOVED}
    if still := {(m.place.layer, m.place.projection) for m in idle.values()} - moving:
        layer, projection = min(still)
        where = f"stacks of which no expert moved: {len(still)}, the first {projection} of layer {layer}"
        advice = "check that these factors have a gradient after the first backward pass, then train again"
        yield Finding("stacks-unmoved", where, "The training passed over these matrices.", advice)
    if counts is None:
        means = "Their experts received no token in training, or the training passed over them."
        yield Finding("some-unmoved", what, means, "give --profile FILE to see how many they receive", is_fault=False)
        return
    row = {layer: i for i, layer in enumerate(config.moe_layers)}
    tokens = {key: int(counts[row[m.place.layer], m.place.expert]) for key, m in experts.items()}
    most = max(tokens[key] for key in idle)
    usual = statistics.median_high(tokens[key] for key in experts.keys() - idle.keys())
    means = f"In the profile their experts receive up to {most:,} tokens; those that moved {usual:,} at the median."
    advice = "check that the training computes gradients for every expert"
    is_fault = most >= usual / 2
    yield Finding("some-unmoved", what, means, advice if is_fault else "", is_fault=is_fault)


def of_router(matrices: dict[str, Matrix]) -> Iterator[Finding]:
    """Whether the router moved, which is not wrong either way."""
    router = [m for m in matrices.values() if m.place.part == ROUTER and m.state == MOVED]
    if router:
        means = "Tokens reach other experts than in the base; HELLoRA trains it so."
        yield Finding("router-trained", f"the router moved in {len(router)} layers", means, is_fault=False)
    else:
        means = "Tokens choose experts with the base's weights, as far as the hidden states let them."
        yield Finding("router-frozen", "the router did not move", means, is_fault=False)


# ------------------------------------------------------------------------------------------- merged checkpoints


def of_merged(comparison: Comparison, readings: dict[str, Reading], config: MoEConfig) -> Iterator[Finding]:
    """What a merged checkpoint holds of its adapter. readings: {} if no adapter is given."""
    if keys := [key for key, m in comparison.matrices.items() if m.state == NOT_FINITE]:
        yield Finding(
            "not-finite",
            f"weights that hold NaN or infinity: {len(keys)}, the first {keys[0]}",
            "The merge went beyond the range of its dtype (float16 ends at 65,504), the training diverged, or the file "
            "is damaged. The model computes NaN.",
            "merge again in bfloat16 or float32; if the adapter itself holds NaN, train again",
        )
    changed = [m for m in comparison.matrices.values() if m.state in (MOVED, NOT_FINITE)]
    moved = [m for m in changed if m.place.part == EXPERTS]
    of_adapter = comparison.experts.get(AS_READ, Multiple())
    if not changed and not of_adapter.is_lost:
        yield Finding(
            "is-the-base",
            "every weight is that of the base",
            "Nothing was merged, or another folder was saved.",
            "merge the adapter again: export.py RUN --to merged, or merge_and_unload() in PEFT",
        )
        return
    if of_adapter.square:
        yield from of_multiples(comparison, of_adapter)
    elif not moved:
        yield Finding(
            "experts-unchanged",
            f"no expert differs from the base; what changed is {', '.join(sorted({m.place.part for m in changed}))}",
            "The experts' deltas were dropped on merging, or the adapter has none.",
            "check the adapter itself, then merge it with a tool that knows stacked experts",
        )
    elif comparison.unchanged_share > 0.5:
        yield Finding(
            "mostly-unchanged",
            f"{100 * comparison.unchanged_share:.0f} % of the entries of the changed weights are those of the base",
            "A small update is lost to rounding in 16 bits; a sparse one (LoRI-S) looks the same.",
            "name the adapter with --adapter to tell them apart",
            is_fault=False,
        )
    if not readings:
        yield from of_sizes([m for m in moved if m.state == MOVED])
    if comparison.unexplained:
        keys = comparison.unexplained
        yield Finding(
            "unexplained",
            f"weights that changed although the adapter has no pair for them: {len(keys)}, the first {keys[0]}",
            "The checkpoint is of another training, another base, or more than this adapter was merged.",
            "name the base that the adapter was trained on",
        )
    yield from of_router(comparison.matrices)


def of_multiples(comparison: Comparison, experts: Multiple) -> Iterator[Finding]:
    """How many times the experts hold their deltas, and whether another reading of the adapter explains them.

    experts: of the adapter as it was read.
    """
    share = f"{100 * comparison.unchanged_share:.0f} % of the entries are those of the base"
    times = f"the experts hold the adapter's delta {experts.times:.2f} times"
    better = [name for name, multiple in comparison.experts.items() if multiple.times > 0.9 * multiple.most > 0]
    if better and AS_READ not in better:
        name = better[0]
        order = {
            REORDERED: "with the columns of lora_B in the other order",
            TRANSPOSED: "with the square stack of gate and up transposed",
        }
        yield Finding(
            "merged-" + name,
            f"{times}, and {comparison.experts[name].times:.2f} times {order[name]}",
            "The tool that merged read the packed stacks differently from how they are read here. One of the two is "
            "not what was trained.",
            "merge with the tool and version that trained, or state the order (lora_B_layout) and check again",
        )
    elif experts.is_lost:
        yield Finding(
            "lost-to-rounding",
            f"{times}, of {experts.most:.2f} that its dtype can hold; {share}",
            "The update is smaller than the steps of 16 bits and is rounded away.",
            "merge in float32 (--dtype float32), or serve base and adapter apart",
        )
    elif experts.times < 0.1:
        yield Finding(
            "experts-not-merged",
            f"{times}",
            "The experts' deltas were dropped on merging.",
            "merge with a tool that knows stacked experts: export.py RUN --to merged",
        )
    elif 1.8 < experts.times < 2.2:
        yield Finding(
            "merged-twice",
            f"{times}",
            "The adapter was merged into a base that held it already.",
            "merge once, into the base that the adapter was trained on",
        )
    elif abs(experts.times - experts.most) > 0.1:
        yield Finding(
            "other-multiple",
            f"{times}, expected {experts.most:.2f}",
            "Another scale (alpha / r, rsLoRA) was used for merging, or the adapter is not the one that was merged.",
            "compare the scale of adapter_config.json with that of the training",
        )
    elif comparison.without:
        yield Finding(
            "some-not-merged",
            f"weights that lack their delta: {len(comparison.without)}, the first {comparison.without[0]}",
            "The merge passed over them.",
            "merge again with a tool that knows these modules",
        )
    else:
        yield Finding(
            "merged-once",
            f"{times} (its dtype can hold {experts.most:.2f}); {share}",
            "This is base + delta, rounded to the checkpoint's dtype.",
            is_fault=False,
        )
