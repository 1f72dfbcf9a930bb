"""HELLoRA: LoRA on the experts that a task really uses.

    hot = select_experts("hot", counts, num_hot=8)      # the 8 most-routed experts of every layer: bool [L, E]
    attach(model, hot, r=32, alpha=64)                  # freeze the model; LoRA on them, attention and router
    ...                                                 # train whatever still requires a gradient
    merge(model)                                        # the adapter becomes part of the weights

`select_experts` turns routing counts (or gate mass) into a mask. `attach` puts the LoRA pairs of lora.py where the
mask says, and moves the hot experts to the front of the stacks. The rows that they compute are then one contiguous
prefix, and cold experts cost nothing extra.

Dimensions: L layers with experts, E experts per layer.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn as nn
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from command.cli import InputError
from hub.weights import full_tensor
from lora import KINDS, LoRAExperts, LoRALinear, StackedLoRA, hot_weights, init_A, uniform
from model import Experts, MoEConfig, MoETransformer
from ops import Dropout

ALL = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
TARGETS = {  # what gets an adapter besides the chosen experts, where a layer has it
    "shared": ALL + SHARED,  # MoE-Sieve's choice: also the shared expert, which every token passes
    "all": ALL,  # the paper's recommendation (§4.5.2)
    "gate": ("mlp.gate",),
    "pure": (),
}


# ------------------------------------------------------------------------------------------------ which experts


def hot_first(scores: Tensor) -> Tensor:
    """Expert ids by descending score; of equal scores the lower id comes first.  [..., E] -> [..., E]"""
    return scores.argsort(dim=-1, descending=True, stable=True)


def hottest(scores: Tensor, num_hot: int) -> Tensor:
    """The `num_hot` most-used experts of every layer: HELLoRA (§3); MoE-Sieve with a quarter of E."""
    return _mask(scores, hot_first(scores)[:, :num_hot])


def hottest_of_model(scores: Tensor, num_hot: int) -> Tensor:
    """One set for all layers: the ids with the largest scores summed over layers (ablation HELLoRA_M, §4.5.1)."""
    return _mask(scores, hot_first(scores.sum(0))[:num_hot].expand(len(scores), -1))


def coldest(scores: Tensor, num_hot: int) -> Tensor:
    """The `num_hot` least-used experts of every layer (ablation HELLoRA_C, §4.5.1)."""
    return _mask(scores, scores.argsort(dim=-1, stable=True)[:, :num_hot])


def any_experts(scores: Tensor, num_hot: int, seed: int) -> Tensor:
    """`num_hot` random experts of every layer: the control that MoE-Sieve has and the paper lacks."""
    return hottest(_noise(scores, seed), num_hot)


def topped_up(scores: Tensor, num_hot: int, seed: int) -> Tensor:
    """The num_hot / 2 hottest experts of every layer, and random ones that are not among the `num_hot` hottest.

    It tests whether cold experts only add noise, as MoE-Sieve supposes.
    """
    hot, kept = hottest(scores, num_hot), hottest(scores, num_hot // 2)
    return hottest(_noise(scores, seed) + 3 * kept.float() - hot.float(), num_hot)  # kept: above 2; cold: 0..1


def covering(scores: Tensor, coverage: float) -> Tensor:
    """Per layer the smallest set whose share of the scores reaches `coverage`.

    Of counts this is ESFT-Token (arXiv 2407.01906) and MoE-Sieve's ablation, of gate mass ESFT-Gate. The share is of
    the layer's sum; ESFT's released script divides by the sum over layers, which is not what its paper says.
    """
    share = scores.double() / scores.double().sum(-1, keepdim=True)
    order = hot_first(share)
    before = share.gather(-1, order).cumsum(-1) - share.gather(-1, order)  # share of the hotter experts
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, before < coverage - 1e-12)


def greedy(scores: Tensor, num_hot: int) -> Tensor:
    """`num_hot` experts a layer on average, spent where they cover the largest shares (MoE-Sieve's ablation)."""
    share = scores.double() / scores.double().sum(-1, keepdim=True)
    chosen = hot_first(share.flatten())[: num_hot * len(scores)]
    return torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, chosen, True).view(scores.shape)


def _noise(scores: Tensor, seed: int) -> Tensor:
    """float32 in [0, 1) of the shape of `scores`."""
    return torch.from_numpy(uniform(seed, "select_experts", scores.numel())).view(scores.shape)


def _mask(scores: Tensor, ids: Tensor) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, ids, True)


SCORED = {"hot": hottest, "model-hot": hottest_of_model, "cold": coldest, "greedy": greedy}
SEEDED = {"random": any_experts, "topup": topped_up}
POLICIES = (*SCORED, "coverage", *SEEDED, "all")


def select_experts(
    policy: str, scores: Tensor, num_hot: int | None, *, coverage: float | None = None, seed: int = 0
) -> Tensor:
    """Which experts get an adapter.  scores [L, E] -> hot [L, E] bool

    num_hot: experts per layer, the paper's k; None for `all` and `coverage`. coverage: in (0, 1], for `coverage`.
    Raises InputError for an unknown policy, a num_hot or coverage out of range, and scores that no routing gives.
    """
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r} is unknown; choose from {', '.join(POLICIES)}")
    E = scores.shape[-1]
    if not bool(torch.isfinite(scores.double()).all()) or bool((scores < 0).any()):
        raise InputError("scores hold a negative or non-finite number; profile again")
    if policy == "all":
        return torch.ones_like(scores, dtype=torch.bool)
    if bool((scores.sum(-1) == 0).any()):
        raise InputError("scores of a layer are all zero: no token was routed; profile on more text")
    if policy == "coverage":
        if coverage is None or not 0 < coverage <= 1:
            raise InputError(f"coverage is {coverage}; want a share above 0 and at most 1")
        return covering(scores, coverage)
    if num_hot is None or not 1 <= num_hot <= E:
        raise InputError(f"k is {num_hot}; want 1..{E}, the experts of a layer")
    if policy in SEEDED:
        return SEEDED[policy](scores, num_hot, seed)
    return SCORED[policy](scores, num_hot)


# ------------------------------------------------------------------------------------- attach, merge, save, load


@dataclass(frozen=True)
class Adapter:
    """What is attached to a model; `adapter.json` holds it."""

    kind: str  # key of lora.KINDS
    r: int
    alpha: float
    targets: str  # key of TARGETS
    seed: int  # of lora_A
    hot: list[list[int]]  # adapted experts of every layer
    sha256_A: str | None = None  # of a frozen lora_A, which is drawn again on loading and not stored
    ranks: list[list[int]] | None = None  # of every expert where they grew (drlora.py); the tensors are `truncate`d


def largest_rank(config: MoEConfig) -> int:
    """The largest rank of a LoRA pair: the smaller side of an expert's matrices."""
    return min(config.hidden_size, config.intermediate_size)


def check_rank(config: MoEConfig, r: int) -> None:
    """Raise InputError for a rank that no pair of this model's experts can have."""
    if not 1 <= r <= largest_rank(config):
        raise InputError(f"rank {r}; want 1..{largest_rank(config)}, the smaller side of an expert's matrices")


def attach(
    model: MoETransformer,
    hot: Tensor,
    r: int,
    alpha: float,
    *,
    kind: str = "lora",
    targets: str = "all",
    seed: int = 0,
    r_max: int | None = None,
    dropout: Dropout | None = None,
) -> None:
    """Freeze the model, then put LoRA pairs on the hot experts (hot [L, E] bool) and on the modules of `targets`.

    The model's function does not change, since B starts at zero. r_max: the rank of the experts' pairs, if it is not r;
    their scale is still alpha / r. dropout: of what the factors A see in training. On the meta device the factors stay
    empty, and `init_factors` fills them once the weights are read. Raises InputError for a wrong r, targets or shape,
    and if the model already has an adapter.
    """
    L, E = len(model.config.moe_layers), model.config.num_experts
    if model.adapter is not None:
        raise InputError("the model has an adapter already; merge or detach it first")
    if tuple(hot.shape) != (L, E):
        raise InputError(f"the expert list is for {tuple(hot.shape)} (layers, experts), the model has {(L, E)}")
    if targets not in TARGETS:
        raise InputError(f"targets {targets!r} is unknown; choose from {', '.join(TARGETS)}")
    reserved = r_max or r
    check_rank(model.config, reserved)
    linear_pair, stacked_pair = KINDS[kind]
    model.requires_grad_(False)
    for name in adapted_linears(model.config, targets):
        drop = dropout and partial(dropout, matrix=name)
        model.set_submodule(name, linear_pair(model.get_submodule(name), r, alpha, drop))
    for i, row in zip(model.config.moe_layers, hot, strict=True):
        moe, ids = model.layers[i].mlp, row.nonzero().flatten().tolist()
        if ids:  # `greedy` may leave a layer without
            move_to_front(moe.experts, ids)
            drop = dropout and partial(dropout.of_rows, i)
            moe.experts = LoRAExperts(moe.experts, len(ids), stacked_pair, reserved, alpha * reserved / r, drop)
    if kind == "lori":
        for name, parameter in model.named_parameters():
            if name.endswith("lora_A"):
                parameter.requires_grad_(False)
    model.adapter = Adapter(kind, r, alpha, targets, seed, [row.nonzero().flatten().tolist() for row in hot])
    if not model.embed_tokens.weight.is_meta:
        init_factors(model)


def adapted_paths(config: MoEConfig, targets: str) -> list[str]:
    """The linear layers that `targets` names within a layer: without those of a shared expert if there is none."""
    return [path for path in TARGETS[targets] if config.shared_intermediate_size or path not in SHARED]


def adapted_linears(config: MoEConfig, targets: str) -> list[str]:
    """The linear layers that `targets` names, in all layers that have them."""
    paths, layers = adapted_paths(config, targets), range(config.num_hidden_layers)
    return [f"layers.{i}.{p}" for i in layers for p in paths if i in config.moe_layers or p.startswith("self_attn.")]


@torch.no_grad()
def init_factors(model: MoETransformer) -> None:
    """Fill the factors: A drawn by (seed, matrix name), B zero, DoRA's m the row norms of W (a collective under FSDP).

    Frozen A's are not stored but drawn again; the SHA-256 over all of them goes into `model.adapter` (LoRI, §3.1).
    """
    adapter, digest = model.adapter, hashlib.sha256()
    for name, module in sorted(model.named_modules()):
        if not isinstance(module, LoRALinear | StackedLoRA):
            continue
        A = torch.empty(module.lora_A.shape)
        matrices = [name]
        if isinstance(module, StackedLoRA):
            ids = model.get_submodule(name.rsplit(".lora.")[0]).expert_ids[: len(A)]
            matrices = [name.replace(".lora.", f".{e}.") for e in ids]
        for matrix, rows in zip(matrices, A.view(-1, *A.shape[-2:]), strict=True):
            init_A(rows, adapter.seed, matrix)
        digest.update(A.numpy().astype("<f4").tobytes())
        fill(module.lora_A, A)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.zero_()
    if adapter.kind == "dora":
        for module in model.modules():
            if isinstance(module, LoRALinear):
                fill(module.lora_m, full_tensor(module.weight).float().norm(dim=-1))
            elif isinstance(module, LoRAExperts):
                hot = hot_weights(full_tensor(module.gate_up_proj), full_tensor(module.down_proj), module.num_hot)
                for name, W in hot.items():
                    fill(module.lora[name].lora_m, W.float().norm(dim=-1))
    if adapter.kind == "lori":
        model.adapter = replace(adapter, sha256_A=digest.hexdigest())


def fill(parameter: Tensor, values: Tensor) -> None:
    """Set a parameter, or the part of it that this process holds."""
    if isinstance(parameter, DTensor):
        mesh, places = parameter.device_mesh, parameter.placements
        values = distribute_tensor(values.to(parameter.device), mesh, places, src_data_rank=None)
    parameter.copy_(values)


def move_to_front(experts: Experts, ids: list[int]) -> None:
    """Reorder the stacks: first the experts `ids`, then the others by rising id."""
    order = ids + [e for e in range(len(experts.expert_ids)) if e not in set(ids)]
    if order != experts.expert_ids:
        rows = experts.position[order]
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack.data = stack.data[rows]
        experts.set_order(order)


@torch.no_grad()
def detach(model: MoETransformer) -> None:
    """Remove the adapters. The model is the base again; its experts keep their storage order."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            with torch.device("meta"):
                base = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            base.weight, base.bias = module.weight, module.bias
            model.set_submodule(name, base)
        elif isinstance(module, LoRAExperts):
            with torch.device("meta"):
                base = Experts(model.config)
            base.gate_up_proj, base.down_proj, base.position = module.gate_up_proj, module.down_proj, module.position
            base.expert_ids = module.expert_ids
            model.set_submodule(name, base)
    model.adapter = None


@torch.no_grad()
def merge(model: MoETransformer) -> None:
    """Add every adapter to its weight (W + (alpha / r) B A for LoRA) in float32, and remove the adapters."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.weight.copy_(module.merged())
        elif isinstance(module, LoRAExperts):
            for name, W in module.hot_weights().items():  # views of the stacks
                W.copy_(module.lora[name].merged(W))
    detach(model)


def count_parameters(model: MoETransformer) -> tuple[int, int]:
    """(trainable, total), frozen adapter tensors included in the total: the convention of the paper and of PEFT."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trains in sizes if trains), sum(size for size, _ in sizes)


def report(model: MoETransformer) -> Iterator[str]:
    """Lines that say what trains: the adapted experts of every layer, other modules, the number of parameters."""
    trainable, total = count_parameters(model)
    adapter, E = model.adapter, model.config.num_experts
    if adapter is not None:
        for i, ids in zip(model.config.moe_layers, adapter.hot, strict=True):
            shown = "all" if len(ids) == E else " ".join(map(str, ids))
            yield f"layer {i:2d}: {len(ids)} of {E} experts adapted: {shown}"
        paths = (path.split(".", 1)[1] for path in adapted_paths(model.config, adapter.targets))
        modules = ", ".join(paths) or "none"
        yield f"rank {adapter.r}, alpha {adapter.alpha:g}; other modules adapted in every layer: {modules}"
    yield f"trainable {trainable:,} of {total:,} parameters ({100 * trainable / total:.4f} %)"
