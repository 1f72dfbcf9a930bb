"""A compact mixture-of-experts transformer that reads and writes Hugging Face checkpoints.

    model = load_model("tiny")                     # a folder or a hub id, e.g. allenai/OLMoE-1B-7B-0924
    logits, selected_experts = model(input_ids)    # the prediction, and the experts that computed it

OLMoE, Mixtral, DeepSeekMoE, Qwen and Granite MoE models share the forward pass in this file. They differ in config
values and key names. Only attention uses which sequence a token belongs to. The rest works on a flat list of real
tokens: padding is never routed. The E experts of a layer are stacked, and computed together on rows sorted by expert.
Where a layer calls ops.NAME, the formula NAME is here or in lora.py, marked `@ops.reference`. What runs is an optimised
version with the same values and gradients, where there is one; with HELLORA_PLAIN=1 it is the formula itself.

Dimensions: B sequences, S positions, T real tokens (at most B * S), D hidden_size, F intermediate_size of an expert,
E experts per layer, K experts per token, R = T * K routed rows, L layers with experts, V vocabulary, N target tokens,
Hq query heads, Hk key and value heads, Dh head_dim, M key positions of a KV cache.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import ops
from hub import weights
from hub.checkpoint import SHARD_BYTES, read_config_numbers, resolve, stored
from hub.config import FAMILIES, Family, read_numbers


@dataclass(frozen=True)
class MoEConfig:
    """The numbers of config.json that the forward pass needs, under the hub's names."""

    model_type: str  # key of hub.config.FAMILIES
    vocab_size: int  # V
    hidden_size: int  # D
    intermediate_size: int  # F, of one expert
    num_hidden_layers: int
    num_attention_heads: int  # Hq
    num_key_value_heads: int  # Hk
    head_dim: int  # Dh
    num_experts: int  # E
    num_experts_per_tok: int  # K
    norm_topk_prob: bool  # the K routing weights of a token are divided by their sum
    topk_before_softmax: bool  # softmax over the K largest router logits alone
    rope_theta: float
    rms_norm_eps: float
    num_dense_layers: int = 0  # first layers, which have one MLP for all tokens (first_k_dense_replace)
    dense_intermediate_size: int = 0  # of that MLP
    shared_intermediate_size: int = 0  # of the MLP that every token passes besides its K experts; 0: none
    shared_expert_gate: bool = False  # a sigmoid gate scales that MLP's output
    qk_norm: str | None = None  # RMSNorm of q and k over the whole "projection", or over each "head"
    qkv_bias: bool = False
    clip_qkv: float | None = None  # OLMoE: clamp q, k and v to [-clip, clip]
    sliding_window: int | None = None  # Mixtral derivatives: positions a query sees, itself included
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0  # of what attention and MoE add
    attention_multiplier: float | None = None  # of q k^T; None: 1 / sqrt(Dh)
    logits_scaling: float = 1.0  # logits are divided by it
    tie_word_embeddings: bool = False
    eos_token_ids: tuple[int, ...] = ()  # decoding stops at any of them; the first is trained
    pad_token_id: int | None = None
    hub: dict = field(default_factory=dict, repr=False, compare=False)  # config.json as read, for saving

    @classmethod
    def from_dict(cls, hub: dict) -> "MoEConfig":
        """Read the hub's config.json. Raises InputError for a value that this forward pass does not implement."""
        return cls(**read_numbers(hub))

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def eos_token_id(self) -> int | None:
        return next(iter(self.eos_token_ids), None)

    @property
    def moe_layers(self) -> range:
        """The layers with a router and experts. Their number is the L of counts, masks and selected_experts."""
        return range(self.num_dense_layers, self.num_hidden_layers)


# ------------------------------------------------------------------------------------------------------ attention


@ops.reference
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, normalised in float32 and cast back before the weight, as the hub's models do."""
    return weight * F.rms_norm(x, x.shape[-1:], eps=eps)


class RMSNorm(nn.Module):
    """`rms_norm` with a weight of its own."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)


@ops.reference
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split form: pairs are (i, i + Dh / 2).  [T, H, Dh] -> [T, H, Dh]"""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


@ops.reference
def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v, causal if there is no mask.  q [B, Hq, S, Dh], k, v [B, Hk, M, Dh] -> as q"""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)


@ops.reference
def attend_to_batch(q: Tensor, k: Tensor, v: Tensor, layout: "Layout", scale: float | None) -> Tensor:
    """Every token attends to its own sequence.  q [T, Hq, Dh], k, v [T, Hk, Dh] -> [T, Hq * Dh]"""
    # Right padding comes after every real token, so plain causal attention never sees it.
    return layout.unpad(attend(layout.pad(q), layout.pad(k), layout.pad(v), layout.mask, scale))


class KVCache:
    """Keys and values of B growing sequences: `model(new_ids, lengths, cache=cache)` appends to it."""

    def __init__(self, config: MoEConfig, batch: int, capacity: int, *, dtype: torch.dtype, device) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [layers, B, Hk, M, Dh]
        self.values = torch.zeros(shape, dtype=dtype, device=device)  # [layers, B, Hk, M, Dh]
        self.lengths = torch.zeros(batch, dtype=torch.int64)  # [B] positions filled, on the host

    def append(self, layer: int, layout: "Layout", k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [T, Hk, Dh] at their positions; return this layer's keys and values [B, Hk, M', Dh]."""
        row = layout.index // layout.S  # [T]
        self.keys[layer, row, :, layout.positions], self.values[layer, row, :, layout.positions] = k, v
        visible = layout.S if layout.mask is None else layout.mask.shape[-1]
        return self.keys[layer, :, :, :visible], self.values[layer, :, :, :visible]


@dataclass
class Layout:
    """Where the T real tokens of a right-padded [B, S] batch are, and what each of them may attend to."""

    S: int
    lengths: Tensor  # [B] number of real tokens of each sequence, on the host
    index: Tensor  # [T] places b * S + s of the real tokens
    positions: Tensor  # [T] place of each token in its sequence, counted from 0
    rotary: tuple[Tensor, Tensor]  # cos and sin [T, 1, Dh] of the positions
    mask: Tensor | None  # [B, 1, S, M] bool, True = visible; None: plain causal attention

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, Dh] -> [B, H, S, Dh], zeros at padding."""
        # Of the ways to write rows, this is the one whose backward pass needs only the index.
        x = x.new_zeros(len(self.lengths) * self.S, *x.shape[1:]).index_put((self.index,), x)  # [B * S, H, Dh]
        return x.view(-1, self.S, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, H, S, Dh] -> [T, H * Dh]"""
        return x.transpose(1, 2).flatten(2).flatten(0, 1).index_select(0, self.index)


def lay_out(config: MoEConfig, weight: Tensor, S: int, lengths: Tensor, cache: KVCache | None) -> Layout:
    """The layout of B sequences of `lengths` [B] tokens, padded to S, on the device and in the dtype of `weight`."""
    place = torch.arange(S)  # on the host, as all that follows until it is moved
    past = torch.zeros_like(lengths) if cache is None else cache.lengths  # [B] tokens before these
    queries = past[:, None] + place  # [B, S] positions
    index = (place < lengths[:, None]).flatten().nonzero().flatten()  # [T]
    positions = queries.flatten()[index].to(weight.device, non_blocking=True)  # [T]
    exponent = torch.arange(0, config.head_dim, 2, device=weight.device).float() / config.head_dim
    angle = positions[:, None].float() * (1.0 / config.rope_theta**exponent)  # [T, Dh / 2], rounded as the hub does
    angle = torch.cat((angle, angle), dim=-1)[:, None]  # [T, 1, Dh]
    rotary = angle.cos().to(weight.dtype), angle.sin().to(weight.dtype)
    window = config.sliding_window or math.inf
    mask = None
    if past.any() or window < S:
        num_keys = S if cache is None else int((past + lengths).max())
        distance = queries[:, None, :, None] - torch.arange(num_keys)  # [B, 1, S, M] from a query back to a key
        mask = ((distance >= 0) & (distance < window)).to(weight.device, non_blocking=True)
    return Layout(S, lengths, index.to(weight.device, non_blocking=True), positions, rotary, mask)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; q and k may be normalised; q, k and v clipped or biased."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        D, Dh, self.config = config.hidden_size, config.head_dim, config
        q_size, kv_size = config.num_attention_heads * Dh, config.num_key_value_heads * Dh
        self.q_proj = nn.Linear(D, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(D, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(D, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, D, bias=False)
        if config.qk_norm:
            self.q_norm = RMSNorm(Dh if config.qk_norm == "head" else q_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(Dh if config.qk_norm == "head" else kv_size, config.rms_norm_eps)

    def forward(self, x: Tensor, layout: Layout, layer: int, cache: KVCache | None) -> Tensor:
        """[T, D] -> [T, D]"""
        qk_norm, clip, scale = self.config.qk_norm, self.config.clip_qkv, self.config.attention_multiplier
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [T, Hq * Dh], [T, Hk * Dh] twice
        if qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        if clip is not None:
            q, k, v = (t.clamp(-clip, clip) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, self.config.head_dim)) for t in (q, k, v))  # [T, H, Dh]
        if qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = ops.rotate(q, *layout.rotary), ops.rotate(k, *layout.rotary)
        if cache is None:
            return self.o_proj(ops.attend_to_batch(q, k, v, layout, scale))
        k, v = cache.append(layer, layout, k, v)  # [B, Hk, M, Dh]
        return self.o_proj(layout.unpad(ops.attend(layout.pad(q), k, v, layout.mask, scale)))


# ------------------------------------------------------------------------------------------- mixture of experts


class Routing(NamedTuple):
    """How the router weighs the experts, in float32 or float64."""

    weights: Tensor  # [..., T, K] what the chosen experts' outputs are multiplied by
    probs: Tensor  # [..., T, E] softmax of the logits
    logits: Tensor  # [..., T, E]


def route(router_logits: Tensor, config: MoEConfig) -> tuple[Tensor, Routing]:
    """Softmax, then top-k.  router_logits [T, E] -> selected_experts [T, K], Routing"""
    exact = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))  # bfloat16 merges near-ties
    probs = exact.softmax(-1)
    weights, selected = (exact if config.topk_before_softmax else probs).topk(config.num_experts_per_tok, dim=-1)
    if config.topk_before_softmax:
        weights = weights.softmax(-1)
    elif config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return selected, Routing(weights, probs, router_logits)


@ops.reference
def grouped_linear(x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    """W_g x for rows sorted by group.  x [R, in], W [G, out, in], offsets [G] ends of the groups' rows -> [R, out]"""
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([F.linear(x[start:end], W_g) for start, end, W_g in zip(starts, ends, W, strict=True)])


@ops.reference
def weighted_swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up * weight.  gate_up [R, 2F], weight [R, 1] -> [R, F]"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * weight


class Experts(nn.Module):
    """E SwiGLU MLPs as stacked tensors: down(silu(gate(x)) * up(x)).

    `expert_ids[i]` is the expert at position i of the stacks, `position` the inverse. `attach` moves hot experts first.
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        E, D, F_ = config.num_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * F_, D))  # gate's rows, then up's
        self.down_proj = nn.Parameter(torch.empty(E, D, F_))
        # Never on the meta device, on which models are built: it is known without the weights.
        self.register_buffer("position", torch.empty(E, dtype=torch.int64, device="cpu"), persistent=False)
        self.set_order(list(range(E)))

    def set_order(self, expert_ids: list[int]) -> None:
        """Say which expert each row of the stacks holds. The caller moves the weights."""
        self.expert_ids = expert_ids
        self.position.copy_(torch.tensor(expert_ids, device="cpu").argsort())

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """x [T, D]; token [R] and weight [R, 1] of each row; offsets [E] ends of the experts' rows -> [R, D]"""
        gate_up = ops.grouped_linear(x.index_select(0, token), self.gate_up_proj, offsets)  # [R, 2F]
        # down is linear, so the routing weight can scale its input. Its output is then not kept for the backward pass.
        return ops.grouped_linear(ops.weighted_swiglu(gate_up, weight), self.down_proj, offsets)


class MLP(nn.Module):
    """One SwiGLU MLP for all tokens: in DeepSeekMoE's first layers, or as the shared expert.  [T, D] -> [T, D]"""

    def __init__(self, D: int, size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(D, size, bias=False)
        self.up_proj = nn.Linear(D, size, bias=False)
        self.down_proj = nn.Linear(size, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def sort_by_expert(expert_of_slot: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bring the rows of each expert together, and say where they come from and go back to.

    Slot t * K + k is the k-th choice of token t. Rows are the slots sorted by expert, R = T * K of both.
    -> slot_of_row [R]; offsets int32 [E], where the rows of each expert end; row_of_slot [R]

    T = 3 tokens choose K = 2 of E = 4 experts each:

    >>> selected_experts = torch.tensor([[2, 0], [0, 3], [2, 1]])
    >>> slot_of_row, offsets, row_of_slot = sort_by_expert(selected_experts.flatten(), 4)
    >>> slot_of_row
    tensor([1, 2, 5, 0, 4, 3])
    >>> slot_of_row // 2  # the token that each row computes with
    tensor([0, 1, 2, 0, 2, 1])
    >>> offsets.tolist()  # expert 0 has rows 0 and 1, expert 1 has row 2, expert 2 rows 3 and 4, expert 3 row 5
    [2, 3, 5, 6]
    >>> row_of_slot.view(3, 2)  # token 0 adds up rows 3 and 0
    tensor([[3, 0],
            [1, 5],
            [4, 2]])
    """
    expert_of_row, slot_of_row = expert_of_slot.sort(stable=True)
    experts = torch.arange(num_experts, device=expert_of_slot.device)
    offsets = torch.searchsorted(expert_of_row, experts, right=True, out_int32=True)
    rows = torch.arange(len(slot_of_row), device=expert_of_slot.device)
    row_of_slot = torch.empty_like(slot_of_row).scatter_(0, slot_of_row, rows)
    return slot_of_row, offsets, row_of_slot


class SparseMoE(nn.Module):
    """The weighted sum of a token's K experts' outputs, plus that of a shared expert if there is one."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        D, size = config.hidden_size, config.shared_intermediate_size
        self.gate = nn.Linear(D, config.num_experts, bias=False)  # the router
        self.experts = Experts(config)
        self.shared_expert = MLP(D, size) if size else None
        self.shared_expert_gate = nn.Linear(D, 1, bias=False) if config.shared_expert_gate else None
        self.config = config

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Routing]:
        """x [T, D] -> y [T, D], selected_experts [T, K], Routing"""
        (T, D), K = x.shape, self.config.num_experts_per_tok
        selected_experts, routing = route(self.gate(x), self.config)  # [T, K]
        position_of_slot = self.experts.position[selected_experts].flatten()  # [R] where its expert is in the stacks
        slot_of_row, offsets, row_of_slot = sort_by_expert(position_of_slot, self.config.num_experts)
        weight = routing.weights.to(x.dtype).flatten().index_select(0, slot_of_row).unsqueeze(-1)  # [R, 1]
        out = self.experts(x, slot_of_row // K, weight, offsets)  # [R, D]
        y = out.index_select(0, row_of_slot).view(T, K, D).sum(dim=1)  # [T, D]
        if self.shared_expert is not None:
            shared = self.shared_expert(x)
            y = y + (shared if self.shared_expert_gate is None else self.shared_expert_gate(x).sigmoid() * shared)
        return y, selected_experts, routing


class DecoderLayer(nn.Module):
    """Pre-norm attention and MoE (or one MLP), each added to the residual stream."""

    activation_checkpointing = False  # True: keep only the layer's input, and compute the layer again in backward

    def __init__(self, config: MoEConfig, layer: int) -> None:
        super().__init__()
        D = config.hidden_size
        self.input_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(D, config.rms_norm_eps)
        self.multiplier = config.residual_multiplier
        self.mlp = SparseMoE(config) if layer in config.moe_layers else MLP(D, config.dense_intermediate_size)

    def forward(self, *inputs) -> tuple:
        if self.activation_checkpointing and torch.is_grad_enabled():
            return recompute_in_backward(self.compute, *inputs, use_reentrant=False)
        return self.compute(*inputs)

    def compute(self, x: Tensor, layout: Layout, layer: int, cache: KVCache | None) -> tuple:
        """x [T, D] -> x [T, D]; selected_experts [T, K] and Routing, both None if the layer has no experts"""
        x = x.add(self.self_attn(self.input_layernorm(x), layout, layer, cache), alpha=self.multiplier)  # [T, D]
        h = self.post_attention_layernorm(x)
        y, selected_experts, routing = (self.mlp(h), None, None) if isinstance(self.mlp, MLP) else self.mlp(h)
        return x.add(y, alpha=self.multiplier), selected_experts, routing


@ops.reference
def target_loss(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """Sum of -log softmax(W x)[target] in nats.  x [N, D], W [V, D], target [N] -> []"""
    logits = F.linear(x, W)  # [N, V]
    return F.cross_entropy(logits.to(torch.promote_types(x.dtype, torch.float32)), target, reduction="sum")


class MoETransformer(nn.Module):
    """The whole decoder. Weights are uninitialised until `load_model` or `init_weights` fills them."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.config = config
        self.adapter = None  # the hellora.Adapter that is attached
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
        output_routing: bool = False,
    ) -> tuple:
        """input_ids [B, S] -> logits [B, S, V], selected_experts [L, B, S, K] (-1 at padding).

        lengths [B]: number of real tokens of each sequence, before its padding; None: no padding.
        labels [B, S]: the token that each position should predict, -100 for none. The first result is then the *sum*
        of the targets' negative log-likelihoods in nats; the LM head runs on those positions only.
        cache: the ids continue its sequences. last_only: logits [B, V] of each sequence's last real token.
        output_routing: a third result, the Routing of the real tokens, its tensors [L, T, K] and [L, T, E].
        """
        B, S = input_ids.shape
        lengths = torch.full((B,), S) if lengths is None else lengths.cpu()
        layout = lay_out(self.config, self.embed_tokens.weight, S, lengths, cache)
        x = self.embed_tokens(input_ids.flatten()[layout.index]) * self.config.embedding_multiplier  # [T, D]
        selections, routings = [], []  # of the layers with experts
        for i, layer in enumerate(self.layers):
            x, selected, routing = layer(x, layout, i, cache)
            if selected is not None:
                selections.append(selected)
                routings.append(routing)
        if cache is not None:
            cache.lengths = cache.lengths + lengths
        selected = torch.stack(selections)  # [L, T, K]
        padded = selected.new_full((len(selected), B * S, selected.shape[-1]), -1)
        selected_experts = padded.index_copy(1, layout.index, selected).unflatten(1, (B, S))
        result = self.head(x, layout, labels, last_only)
        if not output_routing:
            return result, selected_experts
        stacked = [torch.stack(of_layers) for of_layers in zip(*routings, strict=True)]
        return result, selected_experts, Routing(*stacked)

    def head(self, x: Tensor, layout: Layout, labels: Tensor | None, last_only: bool) -> Tensor:
        """Final norm and LM head, only where their result is used.  x [T, D] -> see `forward`"""
        if labels is not None:
            labels = labels.flatten()[layout.index]  # [T]
            predicting = (labels != -100).nonzero().flatten()  # [N] the tokens before a target
            return ops.target_loss(self.scaled_norm(x[predicting]), self.lm_head.weight, labels[predicting])
        if last_only:
            last = layout.lengths.cumsum(0) - 1  # the sequences' real tokens lie one after the other
            return self.lm_head(self.scaled_norm(x[last.to(x.device)]))  # [B, V]
        logits = self.lm_head(self.scaled_norm(x))  # [T, V]
        padded = logits.new_zeros(len(layout.lengths) * layout.S, logits.shape[-1])
        return padded.index_copy(0, layout.index, logits).view(-1, layout.S, logits.shape[-1])

    def scaled_norm(self, x: Tensor) -> Tensor:
        """The input of the LM head. logits_scaling divides it here, where it is small."""
        return self.norm(x) / self.config.logits_scaling


# ----------------------------------------------------------------------------------------------- weights in and out


def read_config(folder: Path) -> MoEConfig:
    """config.json of a checkpoint folder. Raises InputError that names the folder."""
    return MoEConfig(**read_config_numbers(folder))


@torch.no_grad()
def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    prepare: Callable[[MoETransformer], None] | None = None,
) -> MoETransformer:
    """The model of a checkpoint: a folder, a hub id or 'tiny'. Raises InputError if files and config.json do not fit.

    prepare(model) may add adapters and shard, before each process reads what it holds. The caller fills the adapters.
    """
    folder = resolve(path)
    config = read_config(folder)
    with torch.device("meta"):
        model = MoETransformer(config).to(dtype)
    files = stored(folder, {key: tuple(view.shape) for key, view in weights.hub_views(model).items()}, config.family)
    if prepare is not None:
        prepare(model)
    weights.materialize(model, device)
    weights.read_weights(model, files)
    return model.eval()


def save_model(
    model: MoETransformer, path: str | Path, dtype: torch.dtype | None = None, shard_bytes: int = SHARD_BYTES
) -> None:
    """Write a checkpoint as transformers does, in files of up to `shard_bytes`. Every process must call it."""
    dtype = dtype or model.lm_head.weight.dtype
    hub = {key: value for key, value in model.config.hub.items() if key != "dtype"}  # the newer name of torch_dtype
    hub["torch_dtype"] = str(dtype).removeprefix("torch.")
    hub["rope_theta"] = model.config.rope_theta  # transformers 4 and vLLM do not read rope_parameters
    weights.write_weights(Path(path), model, hub=hub, dtype=dtype, shard_bytes=shard_bytes)
