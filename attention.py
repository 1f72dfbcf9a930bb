"""Attention within every sequence of a batch, and the cache that decoding appends to.

Everything else in the model sees a flat list of real tokens; attention alone needs to know which sequence a token is
of. A `Layout` says so once for all layers. A GPU attends to the whole batch at once, padded; a CPU, where padding
takes as long as tokens, to one sequence after the other, unless there is a cache or a window to mind.

Dimensions: B sequences, S positions, T real tokens (<= B * S), D hidden_size, Hq query heads, Hk key and value heads,
Dh head_dim, M key positions of a KV cache, L layers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from model import MoEConfig
from ops import noted, one_kernel, outer


def outer_of_rows(y: Tensor, x: Tensor, rows: Tensor) -> Tensor:
    """y^T x[rows].  y [T, out], x [B * S, in], rows [T] -> [out, in]"""
    return outer(y, x.index_select(0, rows))


def outer_of_parts(y: Tensor, *parts: Tensor) -> Tensor:
    """y^T cat(parts).  y [T, out], parts [S, in] with S of T rows each -> [out, in]"""
    return outer(y, torch.cat(parts))


@dataclass
class Layout:
    """Where the T real tokens of a right-padded [B, S] batch sit, and what each may attend to."""

    B: int
    S: int
    index: Tensor | None  # [T] places b * S + s of the real tokens; None: no padding, T = B * S
    positions: Tensor  # [T] place of each token in its sequence, counted from 0
    cos: Tensor  # [T, 1, Dh]
    sin: Tensor  # [T, 1, Dh]
    mask: Tensor | None  # [B or 1, 1, S, M] bool, True = visible; None: plain causal attention
    lengths: list[int] | None  # [B] tokens of the sequences, to attend to them one by one; None: all at once

    def pad(self, x: Tensor) -> Tensor:
        """[T, H, Dh] -> [B, H, S, Dh], zeros at padding."""
        if self.index is not None:
            # Of the ways to write rows, the one whose backward pass needs the index alone.
            x = x.new_zeros(self.B * self.S, *x.shape[1:]).index_put((self.index,), x)  # [B * S, H, Dh]
        return x.view(self.B, self.S, *x.shape[1:]).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """[B, H, S, Dh] -> [T, H * Dh]"""
        x = x.transpose(1, 2).flatten(2).flatten(0, 1)
        return x if self.index is None else noted(x.index_select(0, self.index), outer_of_rows, x, self.index)


class KVCache:
    """Keys and values of B growing sequences: `model(new_ids, lengths, cache=cache)` appends to it."""

    def __init__(self, config: MoEConfig, batch: int, capacity: int, *, dtype: torch.dtype, device) -> None:
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, capacity, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)  # [L, B, Hk, M, Dh]
        self.values = torch.zeros(shape, dtype=dtype, device=device)  # [L, B, Hk, M, Dh]
        self.lengths = torch.zeros(batch, dtype=torch.int64)  # [B] positions filled, on the host

    def append(self, layer: int, layout: Layout, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v [T, Hk, Dh] at their positions; return this layer's keys and values [B, Hk, M', Dh]."""
        row = torch.arange(layout.B, device=k.device).repeat_interleave(layout.S)  # [B * S]
        row = row if layout.index is None else row[layout.index]  # [T]
        self.keys[layer, row, :, layout.positions] = k
        self.values[layer, row, :, layout.positions] = v
        visible = layout.S if layout.mask is None else layout.mask.shape[-1]
        return self.keys[layer, :, :, :visible], self.values[layer, :, :, :visible]


def lay_out(
    config: MoEConfig, embedding: Tensor, B: int, S: int, lengths: Tensor | None, cache: KVCache | None
) -> Layout:
    """The layout of a batch, on the device and in the dtype of `embedding`. lengths, cache: see `MoETransformer`."""
    device, dtype = embedding.device, embedding.dtype
    past = torch.zeros(B, dtype=torch.int64) if cache is None else cache.lengths
    positions = (past[:, None] + torch.arange(S)).to(device, non_blocking=True)  # [B, S]
    index = mask = None
    if lengths is not None and bool((lengths < S).any()):
        real = torch.arange(S) < lengths[:, None].cpu()  # [B, S], on the host: no wait for the device
        index = real.flatten().nonzero().flatten().to(device, non_blocking=True)  # [T]
    window = config.sliding_window or math.inf
    if past.any() or window < S:
        filled = past + (S if lengths is None else lengths.cpu())  # [B]
        keys = torch.arange(S if cache is None else int(filled.max()), device=device)  # [M]
        ago = (positions if past.any() else positions[:1])[:, None, :, None] - keys  # [B or 1, 1, S, M]
        mask = (ago >= 0) & (ago < window)
    apart = index is not None and mask is None and cache is None and not one_kernel(device)
    flat = positions.flatten() if index is None else positions.flatten()[index]  # [T]
    exponent = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    angle = flat[:, None].float() * (1.0 / config.rope_theta**exponent)  # [T, Dh / 2], rounded as the hub does
    angle = torch.cat((angle, angle), dim=-1)[:, None]  # [T, 1, Dh]
    lengths = lengths.tolist() if apart else None
    return Layout(B, S, index, flat, angle.cos().to(dtype), angle.sin().to(dtype), mask, lengths)


class RMSNorm(nn.Module):
    """x / rms(x) * weight, normalised in float32 and cast back before the weight, as the hub's models do."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return noted(self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps), self.gradient, x)

    def gradient(self, y: Tensor, x: Tensor) -> Tensor:
        """y^T forward(x), its two scales on the small sides of the product.  y [T, out], x [T, in] -> [out, in]"""
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)  # [T, 1]
        return outer((y * (norm.square() / x.shape[-1] + self.eps).rsqrt()).to(y.dtype), x) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding, half-split form: pairs are (i, i + Dh / 2).  [T, H, Dh] -> [T, H, Dh]"""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v, causal without a mask.  q [B, Hq, S, Dh], k, v [B, Hk, M, Dh] -> [B, Hq, S, Dh]"""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=gqa)


def attend_apart(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """Causal attention within one sequence after the other.  q [T, Hq, Dh], k, v [T, Hk, Dh] -> [T, Hq * Dh]"""
    parts = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v))  # [1, H, S, Dh] each
    out = [attend(*part).transpose(1, 2).flatten(2)[0] for part in zip(*parts, strict=True)]  # [S, Hq * Dh] each
    return noted(torch.cat(out), outer_of_parts, *out)


class Linear(nn.Linear):
    """nn.Linear, also together with others of the same input: what an adapter does for all of them is done once."""

    def together(self, x: Tensor, *others: nn.Linear) -> list[Tensor]:
        """The outputs of this one and of the others.  [T, in] -> [T, out] each

        Adapted ones are not called one by one: a hook on one of them, or a shard of its own, would be passed by.
        """
        return [linear(x) for linear in (self, *others)]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; q and k may be normalised, q, k and v clipped or biased."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        D, Dh = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_attention_heads * Dh, config.num_key_value_heads * Dh
        self.q_proj = Linear(D, q_size, bias=config.family.qkv_bias)
        self.k_proj = Linear(D, kv_size, bias=config.family.qkv_bias)
        self.v_proj = Linear(D, kv_size, bias=config.family.qkv_bias)
        self.o_proj = nn.Linear(q_size, D, bias=False)
        self.qk_norm, self.clip, self.head_dim = config.family.qk_norm, config.clip_qkv, Dh
        if self.qk_norm:
            per_head = self.qk_norm == "head"
            self.q_norm = RMSNorm(Dh if per_head else q_size, config.rms_norm_eps)
            self.k_norm = RMSNorm(Dh if per_head else kv_size, config.rms_norm_eps)

    def forward(self, x: Tensor, layout: Layout, layer: int, cache: KVCache | None) -> Tensor:
        q, k, v = self.q_proj.together(x, self.k_proj, self.v_proj)  # [T, Hq * Dh], [T, Hk * Dh] twice
        if self.qk_norm == "projection":
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip is not None:
            q, k, v = (t.clamp(-self.clip, self.clip) for t in (q, k, v))
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, v))  # [T, H, Dh]
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, layout.cos, layout.sin), rotate(k, layout.cos, layout.sin)
        if layout.lengths is not None:
            return self.o_proj(attend_apart(q, k, v, layout.lengths))
        q = layout.pad(q)  # [B, Hq, S, Dh]
        k, v = cache.append(layer, layout, k, v) if cache else (layout.pad(k), layout.pad(v))  # [B, Hk, M, Dh]
        # Right padding comes after every real token, so plain causal attention never sees it.
        return self.o_proj(layout.unpad(attend(q, k, v, layout.mask)))
