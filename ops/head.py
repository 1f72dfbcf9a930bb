"""The LM head and its loss, a slice of the targets at a time.

Dimensions: N targets, D hidden_size, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_ROWS = 256  # targets whose logits exist at once


def target_loss(x: Tensor, W: Tensor, target: Tensor) -> Tensor:
    """Sum of -log softmax(W x)[target] in nats.  x [N, D], W [V, D], target [N] -> []"""
    # A Function is not told that gradients are off, and would make W's for nothing: three times the bytes of W.
    return TargetLoss.apply(x, W if torch.is_grad_enabled() else W.detach(), target)


class TargetLoss(torch.autograd.Function):
    """`target_loss`. The gradients are computed in the forward pass, while a slice's probabilities exist.

    The logits of all targets, [N, V], never exist.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, target: Tensor) -> Tensor:
        need_x, need_W, _ = ctx.needs_input_grad
        grad_x = torch.empty_like(x) if need_x else None
        loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        grad_W = torch.zeros_like(W, dtype=loss.dtype) if need_W else None  # a sum over slices
        for start in range(0, len(x), HEAD_ROWS):
            n = slice(start, start + HEAD_ROWS)
            log_p, t = F.linear(x[n], W).to(loss.dtype).log_softmax(-1), target[n, None]  # [n, V], [n, 1]
            loss -= log_p.gather(1, t).sum()
            if need_x or need_W:
                grad = log_p.exp_().scatter_add_(1, t, log_p.new_full(t.shape, -1.0)).to(W.dtype)  # p - one hot
            if need_x:
                grad_x[n] = grad @ W
            if need_W:
                grad_W += grad.T @ x[n]
            log_p = grad = None  # or two slices would exist at once
        ctx.save_for_backward(grad_x, grad_W if grad_W is None else grad_W.to(W.dtype))
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        return *(None if g is None else g * grad.to(g.dtype) for g in ctx.saved_tensors), None
