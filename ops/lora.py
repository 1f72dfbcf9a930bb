"""The products of a layer's experts with LoRA pairs on the first of them, and what these keep for the backward pass.

The gradient of a factor A needs the rows of x that A multiplied. They are large, and cheap to make again from the
tensors that they were made from: only those are kept.

Dimensions: G groups (experts), R rows sorted by group, n hot experts (the first groups), H rows that reach them (the
first rows), r rank, D hidden_size, F intermediate_size of an expert, T tokens.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import ops.experts
from ops.experts import fits, group_product, grouped_linear, grouped_outer, slices, weighted_swiglu, whole_tiles
from ops.kernels import one_kernel

Pair = tuple[Tensor, Tensor]  # A [n, r, in] and alpha / r times B [n, out, r], for the first n experts


def lora_gate_up(
    x: Tensor, token: Tensor, W: Tensor, gate: Pair, up: Pair, offsets: Tensor, num_rows: int, dropout: float
) -> Tensor:
    """W x of each row's token, and the products of gate's and up's pairs.  x [T, D], W [G, 2F, D] -> [R, 2F]"""
    (A_gate, B_gate), (A_up, B_up) = gate, up
    F_ = B_gate.shape[1]
    A = torch.cat((A_gate, A_up), dim=1)  # [n, 2r, D]: both multiply the same rows
    B_T = torch.cat((F.pad(B_gate.mT, (0, F_)), F.pad(B_up.mT, (F_, 0))), dim=1)  # [n, 2r, 2F], block-diagonal
    # The gathered rows [R, D] get no name, which would keep them until the end.
    return lora_recomputing(
        x.index_select(0, token), W, A, B_T, offsets, num_rows, dropout, gathered, x.detach(), token[:num_rows]
    )


def gathered(rows: slice, x: Tensor, token: Tensor) -> Tensor:
    """Some rows of what gate and up multiply.  x [T, D], token [H] -> [rows, D]"""
    return x.index_select(0, token[rows])


def lora_down(
    gate_up: Tensor, weight: Tensor, W: Tensor, down: Pair, offsets: Tensor, num_rows: int, dropout: float
) -> Tensor:
    """W h and the products of down's pair, with h the `weighted_swiglu`.  gate_up [R, 2F], W [G, D, F] -> [R, D]"""
    A, B = down
    sources = gate_up[:num_rows].detach(), weight[:num_rows].detach()
    hidden = ops.experts.weighted_swiglu(gate_up, weight)  # [R, F]
    return lora_recomputing(hidden, W, A, B.mT.contiguous(), offsets, num_rows, dropout, activated, *sources)


def activated(rows: slice, gate_up: Tensor, weight: Tensor) -> Tensor:
    """Some rows of what down multiplies.  gate_up [H, 2F], weight [H, 1] -> [rows, F]"""
    # Not the compiled function of `ops.using`: for the few rows of an expert, its checks take longer than it saves.
    return weighted_swiglu(gate_up[rows], weight[rows])


def lora_recomputing(
    x: Tensor, W: Tensor, A: Tensor, B_T: Tensor, offsets: Tensor, num_rows: int,
    dropout: float, recompute: Callable[..., Tensor], *sources: Tensor,
) -> Tensor:  # fmt: skip
    """W_g x by group, plus B_g A_g dropout(x) in the first n groups.  x [R, in], W [G, out, in] -> [R, out]

    The same as lora.lora_grouped_linear with one pair, but what x was made from is kept in the place of x.
    A [n, r, in]. B_T [n, r, out]: alpha / r times B, transposed, since its gradient is then a product with the short
    side first, which is several times faster. num_rows: H. recompute(rows, *sources): a slice of the first H rows of x
    again.
    """
    x = x.contiguous()
    # With dropout, `recompute` would have to drop the same again. Without gradients nothing is kept, and decoding has
    # few rows per group: the fewest calls are best.
    if dropout or not torch.is_grad_enabled():
        y, hot_ends = grouped_linear(x, W, offsets), offsets[: len(A)]
        low = grouped_linear(F.dropout(x[:num_rows], dropout), A, hot_ends)  # [H, r]
        y[:num_rows] += grouped_linear(low, B_T.mT, hot_ends)
        return y
    if not one_kernel(x.device):
        return LoRAByLoop.apply(x, W, A, B_T, offsets, num_rows, recompute, *sources)
    missing = -A.shape[1] % (16 // A.element_size())  # small ranks get zeros: see `fits`
    A, B_T = (F.pad(factor, (0, 0, 0, missing)) for factor in (A, B_T)) if missing else (A, B_T)
    way = LoRAByKernel if num_rows > 0 and fits(W, A, B_T) else LoRAByLoop
    return way.apply(x, W, A, B_T, offsets, num_rows, recompute, *sources)


class LoRAByKernel(torch.autograd.Function):
    """`lora_recomputing` with W frozen, each product by one kernel for all groups: on a GPU."""

    @staticmethod
    def forward(ctx, x, W, A, B_T, offsets, num_rows: int, recompute, *sources) -> Tensor:
        hot_ends, ctx.recompute = offsets[: len(A)], recompute
        y = F.grouped_mm(x, W.mT, offs=offsets)
        low = F.grouped_mm(x[:num_rows], A.mT, offs=hot_ends)  # [H, r]
        y[:num_rows] += F.grouped_mm(low, B_T, offs=hot_ends)
        ctx.save_for_backward(W, A, B_T, low, offsets, *(sources if ctx.needs_input_grad[2] else ()))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B_T, low, offsets, *sources = ctx.saved_tensors
        need_x, _, need_A, *_ = ctx.needs_input_grad
        hot_ends, num_rows, grad = offsets[: len(A)], len(low), grad.contiguous()
        grad_x = F.grouped_mm(grad, W, offs=offsets) if need_x else None
        grad_low = F.grouped_mm(grad[:num_rows], B_T.mT, offs=hot_ends)  # [H, r]
        if need_x:
            grad_x[:num_rows] += F.grouped_mm(grad_low, A, offs=hot_ends)
        grad_A = grouped_outer(grad_low, ctx.recompute(slice(num_rows), *sources), hot_ends) if need_A else None
        grad_B_T = grouped_outer(low, grad[:num_rows], hot_ends)
        return grad_x, None, grad_A, grad_B_T, *(None,) * (len(ctx.needs_input_grad) - 4)


class LoRAByLoop(torch.autograd.Function):
    """`lora_recomputing` with W frozen, one group after the other: on a CPU.

    All work of a group is done while its rows are in the cache: fetching them takes longer than multiplying them by a
    low rank.
    """

    @staticmethod
    def forward(ctx, x, W, A, B_T, offsets, num_rows: int, recompute, *sources) -> Tensor:
        ctx.recompute = recompute
        y, low = x.new_empty(len(x), W.shape[1]), x.new_empty(num_rows, A.shape[1])  # [R, out], [H, r]
        for g, own in enumerate(slices(offsets)):
            group_product(x, W[g].T, own, y)
            if g < len(A):
                rows = whole_tiles(own, num_rows, x)
                torch.mm(x[rows], A[g].T, out=low[rows])
                y[rows].addmm_(low[rows], B_T[g])
        ctx.save_for_backward(W, A, B_T, low, offsets, *(sources if ctx.needs_input_grad[2] else ()))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B_T, low, offsets, *sources = ctx.saved_tensors
        need_x, _, need_A, *_ = ctx.needs_input_grad
        num_rows, grad = len(low), grad.contiguous()
        grad_x = grad.new_empty(len(grad), W.shape[2]) if need_x else None
        grad_A, grad_B_T = torch.empty_like(A) if need_A else None, torch.empty_like(B_T)
        for g, own in enumerate(slices(offsets)):
            if need_x:
                group_product(grad, W[g], own, grad_x)
            if g >= len(A):
                continue
            rows = whole_tiles(own, num_rows, grad)
            grad_low = F.linear(grad[rows], B_T[g])  # [rows, r]
            if need_x:
                grad_x[rows].addmm_(grad_low, A[g])
            if need_A:
                torch.mm(first(grad_low, own).T, ctx.recompute(rows, *sources), out=grad_A[g])
            torch.mm(first(low[rows], own).T, grad[rows], out=grad_B_T[g])
        return grad_x, None, grad_A, grad_B_T, *(None,) * (len(ctx.needs_input_grad) - 4)


def first(x: Tensor, rows: slice) -> Tensor:
    """x with zeros behind as many rows as `rows` has: those that fill a tile."""
    n = rows.stop - rows.start
    return x if len(x) == n else F.pad(x[:n], (0, 0, 0, len(x) - n))
