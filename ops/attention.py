"""Attention within each sequence of a batch.

Dimensions: T tokens, Hq query heads, Hk key and value heads, Dh head_dim, S tokens of one sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.kernels import one_kernel


def attend_to_batch(q: Tensor, k: Tensor, v: Tensor, layout, scale: float | None) -> Tensor:
    """Every token attends to its own sequence.  q [T, Hq, Dh], k, v [T, Hk, Dh], model.Layout -> [T, Hq * Dh]"""
    by_sequence = layout.mask is None and len(layout.lengths) > 0 and not one_kernel(q.device)
    return attend_by_sequence(q, k, v, layout, scale) if by_sequence else attend_at_once(q, k, v, layout, scale)


def attend_at_once(q: Tensor, k: Tensor, v: Tensor, layout, scale: float | None) -> Tensor:
    """On the padded batch: the fewest kernels."""
    q, k, v = layout.pad(q), layout.pad(k), layout.pad(v)  # [B, H, S, Dh]
    return layout.unpad(attend(q, k, v, layout.mask, scale))


def attend_by_sequence(q: Tensor, k: Tensor, v: Tensor, layout, scale: float | None) -> Tensor:
    """One sequence after the other: on a CPU padding takes as long as tokens do."""
    lengths = layout.lengths.tolist()
    q, k, v = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v))  # [1, H, S, Dh] each
    outputs = [attend(*sequence, None, scale) for sequence in zip(q, k, v, strict=True)]
    return torch.cat([out.transpose(1, 2).flatten(2)[0] for out in outputs])


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(q k^T / sqrt(Dh)) v, causal if there is no mask.  q [B, Hq, S, Dh], k, v [B, Hk, M, Dh] -> as q"""
    if q.is_meta:  # where memory is measured: torch would hold all S * M scores, which no device does
        flash_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash_attention(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)[0]
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=gqa)
