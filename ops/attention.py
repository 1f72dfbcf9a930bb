"""Attention without padding, for devices on which padding takes as long as tokens do.

Dimensions: T tokens, Hq query heads, Hk key and value heads, Dh head_dim, S tokens of one sequence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def attend_by_sequence(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float | None = None) -> Tensor:
    """Causal attention, one sequence after the other.  q [T, Hq, Dh], k, v [T, Hk, Dh], lengths [B] -> [T, Hq * Dh]"""
    gqa = q.shape[1] != k.shape[1]
    parts = (x.transpose(0, 1).unsqueeze(0).split(lengths.tolist(), dim=2) for x in (q, k, v))  # [1, H, S, Dh] each
    options = {"is_causal": True, "scale": scale, "enable_gqa": gqa}
    out = [F.scaled_dot_product_attention(*part, **options) for part in zip(*parts, strict=True)]
    return torch.cat([x.transpose(1, 2).flatten(2)[0] for x in out])
