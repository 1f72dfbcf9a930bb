"""The operations a training step spends its time in, with what each keeps for its backward pass.

Autograd keeps every input of a product, also where it is cheap to make again. The Functions here keep less, and say
what. `grouped_linear` is the product all experts share; the rest is a name for a formula that its docstring gives.

Dimensions: G groups (experts), R rows sorted by group, F intermediate_size of an expert, n hot experts (the first
groups), S rows that are theirs (the first rows), r rank, N targets, D hidden_size, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_ROWS = 256  # targets whose logits exist at once
ONE_KERNEL = ("cuda",)  # device types where grouped_mm is one kernel


def slices(offsets: Tensor) -> list[slice]:
    """The rows of one group after the other.  offsets int32 [G] ends"""
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def fits(*tensors: Tensor) -> bool:
    """Whether grouped_mm takes these: rows of a multiple of 16 bytes (small ranks are not), and not float64."""
    return all(t.dtype != torch.float64 and all(n * t.element_size() % 16 == 0 for n in t.shape[1:]) for t in tensors)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """W_g x for rows sorted by group.  x [R, in], weight [G, out, in], offsets int32 [G] ends -> [R, out]"""
    if fits(weight):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=offsets)
    # Empty groups take part too, so that their gradient is zero, not None.
    return torch.cat([F.linear(x[rows], W_g) for rows, W_g in zip(slices(offsets), weight, strict=True)])


# On a GPU the next two are grouped_mm. On a CPU, where that is a loop anyway, ours makes nothing as large as all rows:
# writing, and paging in, such a tensor takes longer there than the few multiplications of a low rank.


def add_grouped(y: Tensor, x: Tensor, M: Tensor, offsets: Tensor) -> None:
    """y += x M_g in place, for rows sorted by group.  y [R, out], x [R, r], M [G, r, out]"""
    if y.device.type in ONE_KERNEL and fits(M):
        y += F.grouped_mm(x, M, offs=offsets)
        return
    for rows, M_g in zip(slices(offsets), M, strict=True):
        y[rows].addmm_(x[rows], M_g)


def grouped_outer(y: Tensor, x: Callable[[slice], Tensor], offsets: Tensor) -> Tensor:
    """sum y x^T over the rows of each group: a weight's gradient.  y [R, out], x(rows) [rows, in] -> [G, out, in]"""
    # Without any row it refuses its own strides, and of a group without rows some GPUs return what was in memory.
    if len(y) and y.device.type in ONE_KERNEL and fits(y) and fits(every := x(slice(None))):
        empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0  # [G]
        return F.grouped_mm(y.T, every, offs=offsets).masked_fill(empty[:, None, None], 0)
    return torch.stack([y[rows].T @ x(rows) for rows in slices(offsets)])


def made(f: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """f(*sources), and a note on it of how it was made: an operation may then keep the sources and make it again."""
    y = f(*sources)
    y.made_by = f, sources
    return y


class LowRankLinear(torch.autograd.Function):
    """W x + bias + B A x, W and bias frozen.  x [T, in], W [out, in], A [r, in], B [r, out] -> [T, out]

    For A's gradient it keeps not x but what x was `made` of. B is transposed: its gradient then is a product with the
    short side first, several times faster.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
        low = F.linear(x, A)  # [T, r]
        ctx.remake, sources = getattr(x, "made_by", (Tensor.detach, (x,)))
        ctx.save_for_backward(W, A, B, low, *(sources if ctx.needs_input_grad[3] else ()))
        return F.linear(x, W, bias).addmm_(low, B)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B, low, *sources = ctx.saved_tensors
        grad_low = F.linear(grad, B)  # [T, r]
        grad_x = (grad @ W).addmm_(grad_low, A)
        grad_A = grad_low.T @ ctx.remake(*sources) if ctx.needs_input_grad[3] else None
        return grad_x, None, None, grad_A, low.T @ grad


class GroupedLowRankLinear(torch.autograd.Function):
    """W x by group, W frozen, plus B A x on the hot rows.  x [R, in], W [G, out, in] -> [R, out]

    A [n, r, in] and B [n, r, out], transposed as above, belong to the first n groups, and the first S rows to these.
    For A's gradient backward needs those rows of x again, which are large and cheap: `remake(rows, *sources)` gives a
    slice of them, with the sources kept.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, A: Tensor, B: Tensor, offsets: Tensor, S: int, remake, *sources) -> Tensor:
        y, hot = grouped_linear(x, W, offsets), offsets[: len(A)]
        low = grouped_linear(x[:S], A, hot)  # [S, r]
        add_grouped(y[:S], low, B, hot)
        ctx.save_for_backward(W, A, B, low, offsets, *(sources if ctx.needs_input_grad[2] else ()))
        ctx.remake = remake
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B, low, offsets, *sources = ctx.saved_tensors
        hot, S = offsets[: len(A)], len(low)
        grad_low = grouped_linear(grad[:S], B, hot)  # [S, r]
        grad_x = grouped_linear(grad, W.mT, offsets)  # [R, in]
        add_grouped(grad_x[:S], grad_low, A, hot)
        grad_A = None
        if ctx.needs_input_grad[2]:
            grad_A = grouped_outer(grad_low, lambda rows: ctx.remake(rows, *sources), hot)
        grad_B = grouped_outer(low, grad[:S].__getitem__, hot)
        return grad_x, None, grad_A, grad_B, *(None,) * (len(ctx.needs_input_grad) - 4)


def weighted_swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up * weight.  gate_up [R, 2F], weight [R, 1] -> [R, F]"""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up).mul_(weight)


class WeightedSwiGLU(torch.autograd.Function):
    """`weighted_swiglu`, keeping its inputs only."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        return weighted_swiglu(gate_up, weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_up = F.silu(gate).mul_(grad)  # [R, F], but for the weight
        grad_weight = (grad_up * up).sum(-1, keepdim=True)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat((grad_gate, grad_up), dim=-1).mul_(weight), grad_weight


class HeadLoss(torch.autograd.Function):
    """Sum of -log softmax(W x)[target], HEAD_ROWS targets at a time.  x [N, D], W [V, D], target [N] -> []

    The gradients are made on the way forward, while a slice's probabilities exist: [N, V] never does.
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
