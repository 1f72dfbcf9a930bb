"""Attention within each sequence of a batch.

Dimensions: T tokens, Hq query heads, Hk key and value heads, Dh head_dim, S tokens of one sequence.
"""

import torch
from torch import Tensor

import ops
from ops.kernels import one_kernel


def attend_to_batch(q: Tensor, k: Tensor, v: Tensor, layout, scale: float | None) -> Tensor:
    """Every token attends to its own sequence.  q [T, Hq, Dh], k, v [T, Hk, Dh], model.Layout -> [T, Hq * Dh]"""
    by_sequence = layout.mask is None and len(layout.lengths) > 0 and not one_kernel(q.device)
    return attend_by_sequence(q, k, v, layout, scale) if by_sequence else attend_at_once(q, k, v, layout, scale)


def attend_at_once(q: Tensor, k: Tensor, v: Tensor, layout, scale: float | None) -> Tensor:
    """On the padded batch: the fewest kernels."""
    q, k, v = layout.pad(q), layout.pad(k), layout.pad(v)  # [B, H, S, Dh]
    return layout.unpad(ops.attend(q, k, v, layout.mask, scale))


def attend_by_sequence(q: Tensor, k: Tensor, v: Tensor, layout, scale: float | None) -> Tensor:
    """One sequence after the other: on a CPU padding takes as long as tokens do."""
    lengths = layout.lengths.tolist()
    q, k, v = (x.transpose(0, 1).unsqueeze(0).split(lengths, dim=2) for x in (q, k, v))  # [1, H, S, Dh] each
    outputs = [ops.attend(*sequence, None, scale) for sequence in zip(q, k, v, strict=True)]
    return torch.cat([out.transpose(1, 2).flatten(2)[0] for out in outputs])
