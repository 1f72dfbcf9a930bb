"""The usual mistakes of a port: this project's functions and model, each with one thing wrong.

check.py compares a wrong result with these, to say which mistake it looks like. The tests check that the vectors find
each of them. docs/porting.md lists those that are made most often, under the same names.
"""

from collections.abc import Callable
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import ours
import torch
from torch import nn

from examples.exercises import solutions
from model import MoETransformer, RMSNorm

FUNCTIONS: list[tuple[str, str, Callable]] = []  # (function of the vectors, mistake, the wrong function)
MODELS: list[tuple[str, str, Callable]] = []  # the same for forward, counts and train_step of the whole model


def mistake(function: str, name: str) -> Callable:
    """Register a wrong function, which gets the arguments by name."""
    to = MODELS if function in ("forward", "counts", "train_step") else FUNCTIONS

    def register(wrong: Callable) -> Callable:
        to.append((function, name, wrong))
        return wrong

    return register


def misread(function: str, name: str, /, **changes: Callable) -> None:
    """Register our function with some arguments changed: each change gets all arguments, and returns the new one."""

    @mistake(function, name)
    def wrong(**inputs):
        given = SimpleNamespace(**inputs)
        return getattr(ours, function)(**inputs | {name: change(given) for name, change in changes.items()})


# ------------------------------------------------------------------------------------------------- which experts

misread("select_experts", "the coldest experts in place of the hottest", policy=lambda i: exchanged(i.policy))
misread("select_experts", "coverage of the sum over layers", scores=lambda i: i.scores / i.scores.sum(0))
misread("select_experts", "the seed has no effect", seed=lambda i: 0)
misread("count_experts", "padding is counted", lengths=lambda i: np.full_like(i.lengths, i.selected_experts.shape[2]))


def exchanged(policy: str) -> str:
    return {"hot": "cold", "cold": "hot"}.get(policy, policy)


@mistake("select_experts", "of equal counts the higher id comes first")
def higher_id(scores, **rest):
    return ours.select_experts(scores=scores[:, ::-1].copy(), **rest)[:, ::-1]


@mistake("select_experts", "one hot set for all layers")
def same_in_all_layers(policy, **rest):
    return ours.select_experts(policy="model-hot" if policy == "hot" else policy, **rest)


@mistake("count_experts", "one count per token, for its first expert only")
def first_only(selected_experts, **rest):
    return ours.count_experts(selected_experts[..., :1], **rest)


@mistake("count_experts", "one count for all layers")
def summed_over_layers(**inputs):
    counts = ours.count_experts(**inputs)
    return np.broadcast_to(counts.sum(0), counts.shape)


# ------------------------------------------------------------------------------------------------- PEFT's stacks


def regrouped(columns: np.ndarray, E: int) -> np.ndarray:
    """Columns in the order of [E, r] in that of [r, E]."""
    return columns.reshape(len(columns), E, -1).transpose(0, 2, 1).reshape(columns.shape)


EXPERT_BY_EXPERT = "columns of PEFT's packed lora_B read expert by expert"
misread("packed_deltas", EXPERT_BY_EXPERT, lora_B=lambda i: regrouped(i.lora_B, i.num_experts))
misread(
    "packed_deltas",
    "rows of PEFT's packed lora_A read with the expert innermost",
    lora_A=lambda i: regrouped(i.lora_A.T, len(i.lora_A) // i.num_experts).T.copy(),
)
misread(
    "packed_deltas",
    "the orientation of PEFT's packed stack inferred from its shape, which fails if it is square",
    before_peft_0_19=lambda i: i.before_peft_0_19 and i.lora_A.shape[1] != len(i.lora_B),
)


# ------------------------------------------------------------------------------------------------- routing

NOT_RENORMALISED = "routing weights not renormalised where the family does it"
RENORMALISED = "routing weights renormalised where the family does not"
for function in ("route", "moe_layer"):
    misread(function, NOT_RENORMALISED, norm_topk_prob=lambda i: False)
    misread(function, RENORMALISED, norm_topk_prob=lambda i: True)
misread("route", "top-k before softmax", topk_before_softmax=lambda i: True)
misread(
    "route",
    "softmax before top-k",
    norm_topk_prob=lambda i: i.norm_topk_prob or i.topk_before_softmax,
    topk_before_softmax=lambda i: False,
)
misread("route", "router probabilities in bfloat16", router_logits=lambda i: bfloat16(i.router_logits))


@mistake("route", "a second softmax of the router's output")
def second_softmax(router_logits, **rest):
    result = ours.route(router_logits=router_logits, **rest)
    weights = ours.tensor(router_logits).softmax(-1).softmax(-1).gather(-1, ours.tensor(result["selected_experts"]))
    return result | {
        "weights": (weights / weights.sum(-1, keepdim=True) if rest["norm_topk_prob"] else weights).numpy()
    }


def bfloat16(array: np.ndarray) -> np.ndarray:
    return ours.tensor(array).bfloat16().double().numpy()


# ------------------------------------------------------------------------------------------------- adapters

NO_SCALE, ONLY_ALPHA = "the scale alpha / r is left out", "the scale is alpha, not alpha / r"
TRANSPOSED, SWAPPED = "B read as its transpose", "gate and up swapped"


def rank_of(i: SimpleNamespace) -> int:
    pair = next((pair for pair in i.factors.values() if isinstance(pair, dict)), i.factors)
    return len(i.factors["router"]["A"]) if "router" in i.factors else len(pair["A"])


for function in ("linear", "expert", "moe_layer", "merge"):
    misread(function, NO_SCALE, alpha=rank_of)
    misread(function, ONLY_ALPHA, alpha=lambda i: i.alpha * rank_of(i))
for function in ("linear", "merge"):
    misread(function, TRANSPOSED, factors=lambda i: transposed(i.factors))
for function in ("expert", "moe_layer"):
    misread(function, SWAPPED, W=lambda i: i.W | {"gate_proj": i.W["up_proj"], "up_proj": i.W["gate_proj"]})
misread("expert", "LoRI's positions column by column", factors=lambda i: by_column(i.kind, i.factors))
misread("moe_layer", "adapters on the first experts, not on the hot ones", hot=lambda i: np.arange(len(i.hot)))
misread(
    "moe_layer",
    "rows of a stacked adapter not in ascending order of expert id",
    factors=lambda i: {n: pair if n == "router" else reordered(pair) for n, pair in i.factors.items()},
)
misread("init_A", "the same A for every matrix", name=lambda i: "")


def transposed(pair: dict) -> dict:
    return pair | {"B": pair["B"].reshape(pair["B"].shape[::-1]).T}


def reordered(pair: dict) -> dict:
    return {"A": pair["A"][::-1], "B": pair["B"][::-1]}


def by_column(kind: str, factors: dict) -> dict:
    """LoRI's positions of B [4, r] read as if B were stored by columns."""
    if kind != "lori":
        return factors
    turned = {}
    for name, pair in factors.items():
        r, out = len(pair["A"]), 4
        turned[name] = pair | {"positions": (pair["positions"] % out) * r + pair["positions"] // out}
    return turned


@mistake("init_A", "A zero and B random, with A frozen (LoRI)")
def zero_A(**inputs):
    return np.zeros_like(ours.init_A(**inputs))


@mistake("merge", "B A is not added to W")
def product_alone(W, **rest):
    return ours.merge(W=np.zeros_like(W), **rest)


@mistake("moe_layer", "experts' outputs are not multiplied by the routing weights")
def unweighted(grad_y, **inputs):
    right = solutions.route

    def route(*given):
        chosen = right(*given)["selected_experts"]
        return {"selected_experts": chosen, "weights": np.ones(chosen.shape)}

    with patch.object(solutions, "route", route):
        return solutions.moe_layer(**inputs)


NO_GRADIENT, FROZEN_ROUTER = "idle experts give no gradient", "the router's pair is not trained"


def change_gradients(name: str, change: Callable) -> None:
    """Register a change of the gradients of a pair, which gets the name of the matrix and the gradients."""
    for function, key in (("moe_layer", "factors"), ("train_step", "gradients")):

        @mistake(function, name)
        def wrong(function=function, key=key, **inputs):
            result = getattr(ours, function)(**inputs)
            return result | {key: {matrix: change(matrix, pair) for matrix, pair in result[key].items()}}


change_gradients(NO_GRADIENT, lambda matrix, pair: pair if pair["A"].any() else dict.fromkeys(pair))
change_gradients(FROZEN_ROUTER, lambda matrix, pair: zeros(pair) if matrix.endswith(("router", "gate")) else pair)


def zeros(pair: dict) -> dict:
    return {part: np.zeros_like(gradient) for part, gradient in pair.items()}


def dora(kind, x, W, bias, factors, alpha, grad_y, norm_is_constant: bool = True, bias_is_scaled: bool = False) -> dict:
    """DoRA on a linear layer by autograd, with two mistakes to choose from."""
    if kind != "dora":
        return ours.linear(kind, x, W, bias, factors, alpha, grad_y)
    x, A, B, m = (torch.tensor(array, requires_grad=True) for array in (x, factors["A"], factors["B"], factors["m"]))
    merged = torch.tensor(W) + alpha / len(A) * B @ A
    norm = merged.norm(dim=1)
    scale, b = m / (norm.detach() if norm_is_constant else norm), torch.tensor(0.0 if bias is None else bias)
    y = (x @ merged.T + b) * scale if bias_is_scaled else x @ merged.T * scale + b
    y.backward(torch.tensor(grad_y))
    gradients = {"A": A.grad.numpy(), "B": B.grad.numpy(), "m": m.grad.numpy()}
    return {"y": y.detach().numpy(), "x": x.grad.numpy(), "factors": gradients}


mistake("linear", "DoRA's norm has a gradient")(lambda **inputs: dora(**inputs, norm_is_constant=False))
mistake("linear", "DoRA scales the bias")(lambda **inputs: dora(**inputs, bias_is_scaled=True))


# ------------------------------------------------------------------------------------------------- LoRI, DR-LoRA

misread("kept_entries", "the number of entries is rounded up, not down", share=lambda i: rounded_up(i))
misread("dr_lora_observe", "decayed score not divided by the rank", ranks=lambda i: np.ones_like(i.ranks))
misread("dr_lora_grow", "no cap per growth", cap=lambda i: i.r_max)
misread("dr_lora_grow", "budget ignored", budget=lambda i: 100)


def rounded_up(i: SimpleNamespace) -> float:
    N = sum(B.size for B in i.matrices.values())
    return (np.ceil(i.share * N) + 1e-6) / N


@mistake("kept_entries", "a threshold for each matrix, not one for all")
def own_threshold(matrices, share):
    return {key: kept for name, B in matrices.items() for key, kept in ours.kept_entries({name: B}, share).items()}


@mistake("kept_entries", "the largest entries with their sign, not by magnitude")
def signed(matrices, share):
    return ours.kept_entries({name: np.maximum(B, 1e-9) for name, B in matrices.items()}, share)


@mistake("dr_lora_observe", "dimensions that do not train have a gradient")
def unmasked(grad_B, **rest):
    return ours.dr_lora_observe(grad_B=[gradient.copy() for gradient in grad_B], **rest) | {"grad_B": grad_B}


@mistake("dr_lora_observe", "saliency without the exponent")
def no_exponent(ranks, **rest):
    result = ours.dr_lora_observe(ranks=ranks, **rest)
    return result | {"saliency": result["saliency"] * (ranks + 1.0) ** 0.2}


@mistake("dr_lora_grow", "of equal saliencies the higher id comes first")
def last_first(saliency, ranks, **rest):
    return ours.dr_lora_grow(saliency[::-1].copy(), ranks[::-1].copy(), **rest)[::-1]


# ------------------------------------------------------------------------------------------------- loss, scores

PROMPT, MEANS = "the loss is also over the prompt", "the mean of the micro-batches' means"
misread("batch_loss", PROMPT, prompt_lengths=lambda i: np.ones_like(i.prompt_lengths))
misread("gsm8k_verdict", "LoRI's answer rule for all", rule=lambda i: "lori")
misread("refuses", "phrases in any case", completion=lambda i: i.completion.capitalize())
misread("refuses", "typographic apostrophes are not read as straight ones", as_published=lambda i: True)


@mistake("batch_loss", MEANS)
def mean_of_means(table, sequences, prompt_lengths, micro_batch):
    starts = range(0, len(sequences), micro_batch)
    parts = [slice(start, start + micro_batch) for start in starts]
    results = [ours.batch_loss(table, sequences[part], prompt_lengths[part], micro_batch) for part in parts]
    return {key: sum(one[key] for one in results) / len(results) for key in ("loss", "table")}


@mistake("gsm8k_verdict", "answers compared as text")
def as_text(rule, completion, answer):
    number = ours.gsm8k_verdict(rule, completion, answer)["found"]
    return {"found": number, "correct": number == answer}


@mistake("pass_at_k", "pass@k with replacement")
def with_replacement(num_samples, num_passed, k):
    return 1 - (1 - num_passed / num_samples) ** k


# ------------------------------------------------------------------------------------------------- the whole model


def wrong_model(name: str) -> Callable:
    """Register a change of the model that makes its forward pass wrong."""

    def register(change: Callable) -> Callable:
        mistake("forward", name)(lambda **inputs: ours.forward(**inputs, change=change))
        return change

    return register


def set_config(model: MoETransformer, **changes) -> None:
    for module in model.modules():
        if hasattr(module, "config"):
            module.config = ours.replace(module.config, **changes)


@wrong_model(RENORMALISED)
def renormalise(model: MoETransformer) -> None:
    set_config(model, norm_topk_prob=True)


@wrong_model("a different default for rope_theta")
def other_theta(model: MoETransformer) -> None:
    set_config(model, rope_theta=1e6)


@wrong_model("another default of rms_norm_eps")
def other_eps(model: MoETransformer) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-3


@wrong_model("norms that scale by 1 + w")
def one_plus_w(model: MoETransformer) -> None:
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.weight.add_(1)


@wrong_model(SWAPPED)
def swap_gate_and_up(model: MoETransformer) -> None:
    for layer in model.layers:
        gate, up = layer.mlp.experts.gate_up_proj.chunk(2, dim=1)
        layer.mlp.experts.gate_up_proj.copy_(torch.cat((up, gate), dim=1))


@wrong_model("rotary positions interleaved, not half-split")
def interleave(model: MoETransformer) -> None:
    """To turn neighbours of q and k together is to sort even before odd entries, and turn the halves together."""
    Dh = model.config.head_dim
    order = torch.arange(Dh).view(-1, 2).T.flatten()  # 0, 2, 4, ..., 1, 3, 5, ...
    for layer in model.layers:
        attention = layer.self_attn
        for module in (attention.q_proj, attention.k_proj, attention.q_norm, attention.k_norm):
            module.weight.copy_(module.weight.unflatten(0, (-1, Dh))[:, order].flatten(0, 1))


@wrong_model("no norm of q and k")
def no_qk_norm(model: MoETransformer) -> None:
    for layer in model.layers:
        layer.self_attn.q_norm = layer.self_attn.k_norm = nn.Identity()


def change_logits(name: str, change: Callable) -> None:
    """Register a change of what the router's matrix gives."""

    @wrong_model(name)
    def hook(model: MoETransformer) -> None:
        for layer in model.layers:
            layer.mlp.gate.register_forward_hook(lambda module, args, logits: change(logits))


change_logits("a second softmax of the router's output", lambda logits: logits.softmax(-1))
change_logits("router probabilities in bfloat16", lambda logits: logits.bfloat16().float())

misread("counts", "padding is counted", lengths=lambda i: np.full_like(i.lengths, i.input_ids.shape[1]))
misread("train_step", PROMPT, prompt_lengths=lambda i: np.ones_like(i.prompt_lengths))
misread("train_step", NO_SCALE, alpha=lambda i: len(next(iter(i.factors.values()))["A"]))
misread("train_step", ONLY_ALPHA, alpha=lambda i: i.alpha * len(next(iter(i.factors.values()))["A"]))


@mistake("train_step", "AdamW's default weight decay of 0.01")
def decay(**inputs):
    return ours.train_step(**inputs, weight_decay=0.01)
