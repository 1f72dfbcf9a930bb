"""What is wrong with the update itself: how far an adapter, or a merged checkpoint, moves the weights of its base.

Dimensions: L layers with experts, E experts per layer.
"""

import statistics
from collections.abc import Iterator

from torch import Tensor

from diagnosis.findings import AS_READ, REORDERED, Finding
from diagnosis.measure import EMPTY, EXPERTS, MOVED, NO_A, NOT_FINITE, ROUTER, UNMOVED, Matrix, by_expert
from diagnosis.merged import TRANSPOSED, Comparison, Multiple
from hub.peft import Reading
from model import MoEConfig

NEGLIGIBLE = 1e-5  # |dW| / |W|; a step of bfloat16 is 4e-3 of an entry

# ------------------------------------------------------------------------------------------------------- an adapter


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
    row = config.moe_layers.index
    tokens = {key: int(counts[row(m.place.layer), m.place.expert]) for key, m in experts.items()}
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
        means = "Tokens may reach other experts than with the base. In HELLoRA this is intended."
        yield Finding("router-trained", f"the router moved in {len(router)} layers", means, is_fault=False)
    else:
        means = "Tokens choose experts with the base's weights, as far as the hidden states let them."
        yield Finding("router-frozen", "the router did not move", means, is_fault=False)


# ----------------------------------------------------------------------------------------------- merged checkpoints


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
            "The checkpoint comes from another training or another base, or more than this adapter was merged.",
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
