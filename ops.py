"""The operations a training step spends its time in, with what each keeps for its backward pass.

Autograd keeps every input of a product, also where it is cheap to make again. The Functions here keep less, and say
what. `grouped_linear` is the product all experts share; the rest is a name for a formula that its docstring gives.

Dimensions: G groups (experts), R rows sorted by group, F intermediate_size of an expert, n hot experts (the first
groups), S rows that are theirs (the first rows), T tokens, p projections of one input, r rank, N targets,
D hidden_size, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

HEAD_ROWS = 256  # targets whose logits exist at once
ONE_KERNEL = ("cuda",)  # device types where grouped_mm, and attention to a batch, are one kernel


def one_kernel(device: torch.device) -> bool:
    """Whether one large operation is faster there than many small ones without the padding and the copies."""
    return device.type in ONE_KERNEL


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


def outer(y: Tensor, x: Tensor) -> Tensor:
    """sum y x^T over the rows: a weight's gradient.  y [T, out], x [T, in] -> [out, in]"""
    return y.T @ x


def noted(x: Tensor, gradient: Callable[..., Tensor], *sources: Tensor) -> Tensor:
    """x, and a note on it, true until x is changed in place: gradient(y, *sources) is outer(y, x).  x [T, in]

    Backward may then keep the sources, which it needs anyway, in place of x.
    """
    x.noted = gradient, sources
    return x


class LowRankLinear(torch.autograd.Function):
    """W x + bias + B A x for one or more projections of one input, W and bias frozen.  x [T, in] -> [T, out] each

    A [p * r, in] of the p projections, one below the other; then W [out, in], bias [out] or None and B [r, out] of
    each. The A's share their products, and what every projection gives to x's gradient is added up in one place. For
    A's gradient it keeps not x but the sources `noted` on it. B is transposed: its gradient then is a product with
    the short side first, several times faster.
    """

    @staticmethod
    def forward(ctx, x: Tensor, A: Tensor, *projections: Tensor | None) -> tuple[Tensor, ...]:
        Ws, biases, Bs = projections[0::3], projections[1::3], projections[2::3]
        low = F.linear(x, A)  # [T, p * r]
        ctx.gradient, sources = getattr(x, "noted", (outer, (x,)))
        ctx.p = len(Ws)
        ctx.save_for_backward(A, low, *Ws, *Bs, *(sources if ctx.needs_input_grad[1] else ()))
        parts = zip(Ws, biases, Bs, low.chunk(ctx.p, dim=1), strict=True)
        return tuple(F.linear(x, W, bias).addmm_(low_x, B) for W, bias, B, low_x in parts)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:
        A, low, *rest = ctx.saved_tensors
        Ws, Bs, sources = rest[: ctx.p], rest[ctx.p : 2 * ctx.p], rest[2 * ctx.p :]
        grad_low = torch.cat([F.linear(grad, B) for grad, B in zip(grads, Bs, strict=True)], dim=1)  # [T, p * r]
        grad_x = None
        if ctx.needs_input_grad[0]:  # not in the first layer, whose input comes from a frozen embedding
            grad_x = grad_low @ A
            for grad, W in zip(grads, Ws, strict=True):
                grad_x.addmm_(grad, W)
        grad_A = ctx.gradient(grad_low, *sources) if ctx.needs_input_grad[1] else None
        grad_Bs = map(outer, low.chunk(ctx.p, dim=1), grads)
        return grad_x, grad_A, *(g for grad_B in grad_Bs for g in (None, None, grad_B))


def grouped_outer(y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """`outer` of every group, by one kernel.  y [R, out], x [R, in] -> [G, out, in]"""
    empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0  # [G]; of these some GPUs return what was in memory
    return F.grouped_mm(y.T, x, offs=offsets).masked_fill(empty[:, None, None], 0)


class GroupedLowRankLinear(torch.autograd.Function):
    """W x by group, W frozen, plus B A x on the hot rows.  x [R, in], W [G, out, in] -> [R, out]

    A [n, r, in] and B [n, r, out], transposed as above, belong to the first n groups, and the first S rows to these.
    For A's gradient backward needs those rows of x again, which are large and cheap: `remake(rows, *sources)` gives a
    slice of them, with the sources kept.

    On a GPU each product is one kernel for all groups. On a CPU, where that is a loop anyway, ours does all of a group
    while its rows are in the cache: fetching rows takes longer there than multiplying them by a low rank.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, A: Tensor, B: Tensor, offsets: Tensor, S: int, remake, *sources) -> Tensor:
        y, hot = grouped_linear(x, W, offsets), offsets[: len(A)]
        ctx.remake, ctx.one_kernel = remake, S > 0 and one_kernel(x.device) and fits(A, B)
        if ctx.one_kernel:
            low = F.grouped_mm(x[:S], A.mT, offs=hot)  # [S, r]
            y[:S] += F.grouped_mm(low, B, offs=hot)
        else:
            low = x.new_empty(S, A.shape[1])
            for rows, A_g, B_g in zip(slices(hot), A, B, strict=True):
                torch.mm(x[rows], A_g.T, out=low[rows])
                y[rows].addmm_(low[rows], B_g)
        ctx.save_for_backward(W, A, B, low, offsets, *(sources if ctx.needs_input_grad[2] else ()))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B, low, offsets, *sources = ctx.saved_tensors
        need_x, _, need_A, *_ = ctx.needs_input_grad
        hot, S = offsets[: len(A)], len(low)
        grad_x = grouped_linear(grad, W.mT, offsets) if need_x else None  # [R, in]
        if ctx.one_kernel:
            grad_low = F.grouped_mm(grad[:S], B.mT, offs=hot)  # [S, r]
            if need_x:
                grad_x[:S] += F.grouped_mm(grad_low, A, offs=hot)
            grad_A = grouped_outer(grad_low, ctx.remake(slice(S), *sources), hot) if need_A else None
            grad_B = grouped_outer(low, grad[:S], hot)
        else:
            grad_A, grad_B = torch.empty_like(A) if need_A else None, torch.empty_like(B)
            for g, rows in enumerate(slices(hot)):
                grad_low = F.linear(grad[rows], B[g])  # [rows, r]
                if need_x:
                    grad_x[rows].addmm_(grad_low, A[g])
                if need_A:
                    torch.mm(grad_low.T, ctx.remake(rows, *sources), out=grad_A[g])
                torch.mm(low[rows].T, grad[rows], out=grad_B[g])
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
