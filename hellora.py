"""HELLoRA: LoRA on the experts that a task uses most.

    hot = select_experts("hot", counts, num_hot=8)      # the 8 most-routed experts of every layer: bool [L, E]
    attach(model, hot, r=32, alpha=64)                  # freeze the model; LoRA on them, attention and router
    ...                                                 # train whatever still requires a gradient
    merge(model)                                        # the adapter becomes part of the weights

`select_experts` turns routing counts (or gate mass) into a mask. `attach` puts the LoRA pairs of lora.py where the
mask says, and moves the hot experts to the front of the stacks. The rows that they compute are then one contiguous
prefix, and cold experts cost nothing extra.

model is a model.MoETransformer, config its model.MoEConfig: this module uses both and depends on neither.

Dimensions: L layers with experts, E experts per layer.
"""

import hashlib
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
from torch import Tensor

from command.errors import InputError
from hub.sharded import fill
from lora import LoRAExperts, LoRALinear, StackedLoRA, init_A
from neighbours import policies
from neighbours.dora import DoRAExperts, DoRALinear

KINDS = {  # what trains in a pair -> the classes of a linear layer and of a layer's experts
    "lora": (LoRALinear, LoRAExperts),  # A and B
    "dora": (DoRALinear, DoRAExperts),  # A, B and a magnitude per output row
    "lori": (LoRALinear, LoRAExperts),  # only B: all of it, or a few entries (`lori.sparsify`)
}
ALL = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate")
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj")
TARGETS = {  # what gets an adapter besides the chosen experts, where a layer has it
    "shared": ALL + SHARED,  # MoE-Sieve's choice: also the shared expert, which every token passes
    "all": ALL,  # attention and router: the paper's recommendation (§4.5.2)
    "attention": ALL[:4],  # the router stays frozen
    "gate": ("mlp.gate",),  # the router alone
    "pure": (),
}
RANKED = {  # policies that rank the experts of each layer (counts [L, E], num_hot, seed -> [L, E]) and take the first
    "hot": lambda counts, num_hot, seed: counts,
    "model-hot": lambda counts, num_hot, seed: policies.model_wide(counts),
    "cold": lambda counts, num_hot, seed: policies.coldest_first(counts),
    "random": lambda counts, num_hot, seed: policies.random_ranking(counts, seed),
    "topup": policies.topped_up,
}
NUMBERED = (*RANKED, "greedy")  # policies that take a number of experts
POLICIES = (*NUMBERED, "coverage", "all", "none")


# ------------------------------------------------------------------------------------------------ which experts


def hottest(counts: Tensor, num_hot: int) -> Tensor:
    """The `num_hot` most-used experts of every layer; of equal counts the lower id (HELLoRA, §3).  [L, E] -> bool"""
    order = counts.argsort(dim=-1, descending=True, stable=True)  # expert ids
    return torch.zeros_like(counts, dtype=torch.bool).scatter(-1, order[:, :num_hot], True)


def select_experts(
    policy: str, counts: Tensor, num_hot: int | None, *, coverage: float | None = None, seed: int = 0
) -> Tensor:
    """Which experts get an adapter.  counts [L, E], of tokens or of gate mass -> hot bool [L, E]

    num_hot: experts per layer, the paper's k; None for `all`, `none` and `coverage`. coverage: in (0, 1], for that.
    Raises InputError for an unknown policy, a num_hot or coverage out of range, and counts that no routing gives.
    """
    check_choice(policy, counts, num_hot, coverage)
    if policy in ("all", "none"):
        return torch.full_like(counts, policy == "all", dtype=torch.bool)
    if policy == "coverage":
        return policies.covering(counts, coverage)
    if policy == "greedy":
        return policies.greedy(counts, num_hot)
    return hottest(RANKED[policy](counts, num_hot, seed), num_hot)


def check_choice(policy: str, counts: Tensor, num_hot: int | None, coverage: float | None) -> None:
    """Raise InputError for what `select_experts` cannot choose by."""
    if policy not in POLICIES:
        raise InputError(f"policy {policy!r} is unknown; choose from {', '.join(POLICIES)}")
    if not bool(torch.isfinite(counts.double()).all()) or bool((counts < 0).any()):
        raise InputError("the counts hold a negative or non-finite number; profile again")
    if policy not in ("all", "none") and bool((counts.sum(-1) == 0).any()):
        raise InputError("the counts of a layer are all zero: no token was routed; profile on more text")
    if policy == "coverage" and (coverage is None or not 0 < coverage <= 1):
        raise InputError(f"coverage is {coverage}; expected a share above 0 and at most 1")
    E = counts.shape[-1]
    if policy in NUMBERED and (num_hot is None or not 1 <= num_hot <= E):
        raise InputError(f"k is {num_hot}; expected 1..{E}, the experts of a layer")


# ------------------------------------------------------------------------------------- attach, merge, save, load


@dataclass(frozen=True)
class Adapter:
    """What is attached to a model; `adapter.json` holds it."""

    kind: str  # key of KINDS
    r: int
    alpha: float
    targets: str  # key of TARGETS
    seed: int  # of lora_A
    hot: list[list[int]]  # adapted experts of every layer
    sha256_A: str | None = None  # of a frozen lora_A, which is drawn again on loading and not stored
    ranks: list[list[int]] | None = None  # of every expert where they grew (drlora.py); the tensors are `truncate`d
    expert_rank: int | None = None  # of the experts' pairs, if it is not r; their scale is alpha / r all the same


def largest_rank(config) -> int:
    """The largest rank of a LoRA pair: the smaller side of an expert's matrices."""
    return min(config.hidden_size, config.intermediate_size)


def check_rank(config, r: int) -> None:
    """Raise InputError for a rank that no pair of this model's experts can have."""
    if not 1 <= r <= largest_rank(config):
        raise InputError(f"rank {r}; expected 1..{largest_rank(config)}, the smaller side of an expert's matrices")


def attach(
    model: nn.Module,
    hot: Tensor,
    r: int,
    alpha: float,
    *,
    kind: str = "lora",
    targets: str = "all",
    seed: int = 0,
    expert_rank: int | None = None,
    dropout: float = 0.0,
) -> None:
    """Freeze the model, then put LoRA pairs on the hot experts (hot [L, E] bool) and on the modules of `targets`.

    The model's function does not change, since B starts at zero. expert_rank: that of the experts' pairs, if it is not
    r; their scale is alpha / r all the same. dropout: the share of what the factors A see that is set to zero in
    training. On the meta device the factors stay empty, and `init_factors` fills them once the weights are read.
    Raises InputError for a wrong rank, targets or shape, and if the model already has an adapter.
    """
    L, E = len(model.config.moe_layers), model.config.num_experts
    if model.adapter is not None:
        raise InputError("the model has an adapter already; merge or detach it first")
    if tuple(hot.shape) != (L, E):
        raise InputError(f"the expert list is for {tuple(hot.shape)} (layers, experts), the model has {(L, E)}")
    if targets not in TARGETS:
        raise InputError(f"targets {targets!r} is unknown; choose from {', '.join(TARGETS)}")
    for rank in (r, expert_rank or r):
        check_rank(model.config, rank)
    linear_class, experts_class = KINDS[kind]
    model.requires_grad_(False)
    for name in adapted_linears(model.config, targets):
        model.set_submodule(name, linear_class(model.get_submodule(name), r, alpha, dropout))
    for i, is_hot in zip(model.config.moe_layers, hot, strict=True):
        moe, ids = model.layers[i].mlp, is_hot.nonzero().flatten().tolist()
        if ids:  # `greedy` may leave a layer without
            move_to_front(moe.experts, ids)
            rank = expert_rank or r
            moe.experts = experts_class(moe.experts, len(ids), rank, alpha * rank / r, dropout)
    if kind == "lori":
        for name, parameter in model.named_parameters():
            if name.endswith("lora_A"):
                parameter.requires_grad_(False)
    adapted = [row.nonzero().flatten().tolist() for row in hot]
    model.adapter = Adapter(kind, r, alpha, targets, seed, adapted, expert_rank=expert_rank)
    if not model.embed_tokens.weight.is_meta:
        init_factors(model)


def adapted_paths(config, targets: str) -> list[str]:
    """The linear layers that `targets` names within a layer: without those of a shared expert if there is none."""
    return [path for path in TARGETS[targets] if config.shared_intermediate_size or path not in SHARED]


def adapted_linears(config, targets: str) -> list[str]:
    """The linear layers that `targets` names, in all layers that have them."""
    paths, layers = adapted_paths(config, targets), range(config.num_hidden_layers)
    return [f"layers.{i}.{p}" for i in layers for p in paths if i in config.moe_layers or p.startswith("self_attn.")]


@torch.no_grad()
def init_factors(model: nn.Module) -> None:
    """Fill the factors: A drawn by (seed, matrix name), B zero, DoRA's m the row norms of W (a collective under FSDP).

    Frozen A's are not stored but drawn again; the SHA-256 over all of them goes into `model.adapter` (LoRI, §3.1).
    """
    digest = hashlib.sha256()
    for name, module in sorted(model.named_modules()):
        if isinstance(module, LoRALinear | StackedLoRA):
            A = draw_A(model, name, module.lora_A.shape)
            digest.update(A.numpy().astype("<f4").tobytes())
            fill(module.lora_A, A)
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            parameter.zero_()
    for module in model.modules():
        if isinstance(module, DoRALinear | DoRAExperts):
            module.set_magnitude()
    if model.adapter.kind == "lori":
        model.adapter = replace(model.adapter, sha256_A=digest.hexdigest())


def draw_A(model: nn.Module, name: str, shape: torch.Size) -> Tensor:
    """The initial lora_A of the module `name`: [r, in], or [n, r, in] of a layer's hot experts."""
    A = torch.empty(shape)
    path, is_stack, projection = name.partition(".lora.")
    if not is_stack:
        init_A(A, model.adapter.seed, name)
        return A
    for expert, A_e in zip(model.get_submodule(path).expert_ids, A, strict=False):  # the hot ones come first
        init_A(A_e, model.adapter.seed, f"{path}.{expert}.{projection}")
    return A


def move_to_front(experts: nn.Module, ids: list[int]) -> None:
    """Reorder the stacks: first the experts `ids`, then the others by rising id."""
    order = ids + [e for e in range(len(experts.expert_ids)) if e not in set(ids)]
    if order != experts.expert_ids:
        rows = experts.position[order]
        # A model whose weights have yet to be read has nothing to move: they are read in the order of `expert_ids`.
        for stack in (experts.gate_up_proj, experts.down_proj):
            stack.data = stack.data[rows]
        experts.set_order(order)


@torch.no_grad()
def detach(model: nn.Module) -> None:
    """Remove the adapters. The model is the base again; its experts keep their storage order."""
    with torch.device("meta"):
        base = type(model)(model.config)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear | LoRAExperts):
            plain = base.get_submodule(name)
            for key, _ in list(plain.named_parameters()):
                setattr(plain, key, getattr(module, key))
            if isinstance(module, LoRAExperts):
                plain.position, plain.expert_ids = module.position, module.expert_ids
            model.set_submodule(name, plain)
    model.adapter = None


@torch.no_grad()
def folded(W: Tensor, factors: dict[str, Tensor], kind: str, scaling: float) -> Tensor:
    """The weight that computes by itself what W [out, in] computes with one pair.  -> float32 [out, in]

    factors: lora_A [r, in], lora_B [out, r]; for DoRA also lora_m [out].
    """
    r = len(factors["lora_A"])
    pair = KINDS[kind][1].pair(W.unsqueeze(0), r, scaling * r)
    pair.load_state_dict({name: factor.unsqueeze(0) for name, factor in factors.items()})
    return pair.merged(W.unsqueeze(0))[0]


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add every adapter to its weight (W + (alpha / r) B A for LoRA) in float32, and remove the adapters."""
    for module in model.modules():
        if isinstance(module, LoRALinear):
            module.weight.copy_(module.merged())
        elif isinstance(module, LoRAExperts):
            for name, W in module.hot_weights().items():  # views of the stacks
                W.copy_(module.lora[name].merged(W))
    detach(model)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total), frozen adapter tensors included in the total: the convention of the paper and of PEFT."""
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return trainable, sum(parameter.numel() for parameter in model.parameters())
