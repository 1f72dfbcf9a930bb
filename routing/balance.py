"""The load-balancing loss, which a run may add to its own loss (HELLoRA, equation 1; off by default).

Dimensions: L layers with experts, E experts per layer, K experts per token, B sequences, T real tokens.
"""

import torch
from torch import Tensor


def load_balancing_loss(probs: Tensor, selected: Tensor, lengths: Tensor, form: str = "layer") -> Tensor:
    """Sum over the sequences s of len_s * balance_s; divided by all tokens, the mean balance of a token's sequence.

    probs [L, T, E], selected [L, T, K], lengths [B] -> []. Within a sequence, f_le is the number of selections of
    expert e in layer l per token, and P_le its mean probability.
    "layer": balance = mean_l E sum_e (f_le / K) P_le, which is 1 under uniform routing (Switch; HELLoRA, eq. 1).
    "concat": balance = E sum_e f_e P_e with f and P averaged over the layers, which is K under uniform routing (the
    form of the hub and of OLMoE's pre-training, in which layers may cancel each other).
    A sum over sequences does not depend on how a batch is cut into micro-batches.
    """
    (L, _, E), K = probs.shape, selected.shape[-1]
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths.cpu()).to(probs.device)  # [T]
    lengths = lengths.to(probs.device)
    chosen = torch.zeros_like(probs).scatter(-1, selected, 1.0)  # [L, T, E]
    f, P = (
        x.new_zeros(L, len(lengths), E).index_add(1, sequence, x) / lengths.clamp(min=1)[:, None]  # [L, B, E]
        for x in (chosen, probs)
    )
    balance = E * (f.mean(0) * P.mean(0) if form == "concat" else (f * P).mean(0) / K).sum(-1)  # [B]
    return (lengths * balance).sum()
