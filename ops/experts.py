"""The products of a layer's experts, with and without LoRA pairs, and what each keeps for its backward pass.

Autograd keeps every input of a product, also where it is cheap to compute again. The Functions here keep less.

Dimensions: G groups (experts), R rows sorted by group, F intermediate_size of an expert, n hot experts (the first
groups), H rows that reach them (the first rows), r rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.kernels import one_kernel

TILE = 16  # rows that a CPU multiplies at once in bfloat16 (AMX)


def slices(offsets: Tensor) -> list[slice]:
    """The rows of each group.  offsets int32 [G] ends"""
    ends = offsets.tolist()
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def whole_tiles(rows: slice, end: int, x: Tensor) -> slice:
    """The rows of a group, and for 16-bit x on a CPU as many of the next ones, up to `end`, as fill its last tile.

    oneDNN compiles a kernel for every number of rows that it has not seen, which takes longer than the product. Whole
    tiles have few sizes, and a product of 9 rows takes as long as one of 16. From 256 rows on, a tile has between a
    sixteenth and an eighth of them. Whoever takes more rows must see to it that a later group overwrites the results,
    or multiply them by zero.
    """
    n = rows.stop - rows.start
    tile = max(TILE, 1 << n.bit_length() >> 4)
    stop = rows.start + -(-n // tile) * tile
    return slice(rows.start, stop) if x.dtype.itemsize == 2 and not one_kernel(x.device) and stop <= end else rows


def group_product(x: Tensor, W: Tensor, rows: slice, y: Tensor) -> None:
    """Write x W to y for the rows of a group. Some rows of later groups get numbers that these must overwrite."""
    rows = whole_tiles(rows, len(x), x)
    torch.mm(x[rows], W, out=y[rows])


def first(x: Tensor, rows: slice) -> Tensor:
    """x with zeros behind as many rows as `rows` has: those that fill a tile."""
    n = rows.stop - rows.start
    return x if len(x) == n else F.pad(x[:n], (0, 0, 0, len(x) - n))


def fits(*tensors: Tensor) -> bool:
    """Whether grouped_mm takes these: rows of a multiple of 16 bytes (small ranks are not), and not float64."""
    return all(t.dtype != torch.float64 and all(n * t.element_size() % 16 == 0 for n in t.shape[1:]) for t in tensors)


def one_call(x: Tensor, *factors: Tensor) -> bool:
    """Whether grouped_mm multiplies all groups: not without a row, and not in 16 bits on a CPU (see `whole_tiles`)."""
    return len(x) > 0 and (one_kernel(x.device) or x.dtype == torch.float32) and fits(*factors)


def grouped_linear(x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    """W_g x for rows sorted by group.  x [R, in], W [G, out, in], offsets int32 [G] ends -> [R, out]"""
    return GroupedLinear.apply(x.contiguous(), W, offsets)  # grouped_mm takes no expanded tensor


class GroupedLinear(torch.autograd.Function):
    """`grouped_linear`, keeping x only where W trains."""

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, W, offsets)
        if one_call(x, W):
            return F.grouped_mm(x, W.mT, offs=offsets)
        y = x.new_empty(len(x), W.shape[1])
        for rows, W_g in zip(slices(offsets), W, strict=True):
            group_product(x, W_g.T, rows, y)
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, offsets = ctx.saved_tensors
        need_x, need_W, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = GroupedLinear.apply(grad, W.mT, offsets) if need_x else None
        if not need_W:
            return grad_x, None, None
        if one_call(grad, W):
            return grad_x, grouped_outer(grad, x, offsets), None
        grad_W = torch.empty_like(W)
        for rows, own in zip(slices(offsets), grad_W, strict=True):  # also of empty groups: zero
            torch.mm(grad[rows].T, x[rows], out=own)
        return grad_x, grad_W, None


def grouped_outer(y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """sum y x^T over the rows of each group, by one kernel.  y [R, out], x [R, in] -> [G, out, in]"""
    empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0  # [G]; for these some GPUs return uninitialised memory
    return F.grouped_mm(y.T, x, offs=offsets).masked_fill_(empty[:, None, None], 0)


def all_of(x: Tensor, rows: slice) -> Tensor:
    """No dropout."""
    return x


def lora_grouped_linear(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, offsets: Tensor, num_rows: int, drop, recompute, *sources: Tensor
) -> Tensor:
    """W_g x by group, plus B_g A_g drop(x) on the rows of the hot groups.  x [R, in], W [G, out, in] -> [R, out]

    A [n, r, in] and B [n, r, out] (transposed and scaled) belong to the first n groups, whose rows are the first
    num_rows. drop(x, rows): what A sees of a slice of these rows (dropout); None: all of x. A's gradient needs these
    rows of x, which are large and cheap: recompute(rows, *sources) gives a slice of them in the backward pass, and only
    the sources are kept.
    """
    x = x.contiguous()
    if not torch.is_grad_enabled():  # nothing is kept, and decoding has few rows per group: the fewest calls are best
        y, hot = grouped_linear(x, W, offsets), offsets[: len(A)]
        seen = drop(x[:num_rows], slice(num_rows)) if drop else x[:num_rows]
        y[:num_rows] += grouped_linear(grouped_linear(seen, A, hot), B.mT, hot)
        return y
    return LoRAGroupedLinear.apply(x, W, A, B, offsets, num_rows, drop, recompute, *sources)


class LoRAGroupedLinear(torch.autograd.Function):
    """`lora_grouped_linear` with W frozen.

    On a GPU each product is one kernel for all groups. On a CPU the loop does all work of a group while its rows are in
    the cache: fetching rows takes longer there than multiplying them by a low rank. B is transposed because its
    gradient is then a product with the short side first, which is several times faster.
    """

    @staticmethod
    def forward(ctx, x, W, A, B, offsets, num_rows: int, drop, recompute, *sources) -> Tensor:
        hot, ctx.recompute, ctx.loops = offsets[: len(A)], recompute, not one_kernel(x.device)
        ctx.one_kernel = num_rows > 0 and not ctx.loops and fits(A, B)
        ctx.drop = drop = drop or all_of  # linear and symmetric: it also takes the gradient back
        y = x.new_empty(len(x), W.shape[1]) if ctx.loops else grouped_linear(x, W, offsets)
        if ctx.one_kernel:
            low = F.grouped_mm(drop(x[:num_rows], slice(num_rows)), A.mT, offs=hot)  # [H, r]
            y[:num_rows] += F.grouped_mm(low, B, offs=hot)
        else:
            low = x.new_empty(num_rows, A.shape[1])
            for g, own in enumerate(slices(offsets if ctx.loops else hot)):
                if ctx.loops:
                    group_product(x, W[g].T, own, y)
                if g < len(A):
                    rows = whole_tiles(own, num_rows, x)
                    torch.mm(drop(x[rows], rows), A[g].T, out=low[rows])
                    y[rows].addmm_(low[rows], B[g])
        ctx.save_for_backward(W, A, B, low, offsets, *(sources if ctx.needs_input_grad[2] else ()))
        return y

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        W, A, B, low, offsets, *sources = ctx.saved_tensors
        need_x, _, need_A, *_ = ctx.needs_input_grad
        hot, num_rows, drop, grad = offsets[: len(A)], len(low), ctx.drop, grad.contiguous()
        grad_x = grad_A = None
        if need_x:
            grad_x = grad.new_empty(len(grad), W.shape[2]) if ctx.loops else grouped_linear(grad, W.mT, offsets)
        if ctx.one_kernel:
            grad_low = F.grouped_mm(grad[:num_rows], B.mT, offs=hot)  # [H, r]
            if need_x:
                grad_x[:num_rows] += drop(F.grouped_mm(grad_low, A, offs=hot), slice(num_rows))
            if need_A:
                seen = drop(ctx.recompute(slice(num_rows), *sources), slice(num_rows))
                grad_A = grouped_outer(grad_low, seen, hot)
            grad_B = grouped_outer(low, grad[:num_rows], hot)
        else:
            grad_A, grad_B = torch.empty_like(A) if need_A else None, torch.empty_like(B)
            for g, own in enumerate(slices(offsets if ctx.loops else hot)):
                if need_x and ctx.loops:
                    group_product(grad, W[g], own, grad_x)
                if g >= len(A):
                    continue
                rows = whole_tiles(own, num_rows, grad)
                grad_low = F.linear(grad[rows], B[g])  # [rows, r]
                if need_x and drop is all_of:
                    grad_x[rows].addmm_(grad_low, A[g])
                elif need_x:
                    grad_x[rows] += drop(grad_low @ A[g], rows)
                if need_A:
                    torch.mm(first(grad_low, own).T, drop(ctx.recompute(rows, *sources), rows), out=grad_A[g])
                torch.mm(first(low[rows], own).T, grad[rows], out=grad_B[g])
        return grad_x, None, grad_A, grad_B, *(None,) * (len(ctx.needs_input_grad) - 4)


def weighted_swiglu(gate_up: Tensor, weight: Tensor) -> Tensor:
    """silu(gate) * up * weight.  gate_up [R, 2F], weight [R, 1] -> [R, F]"""
    return WeightedSwiGLU.apply(gate_up, weight)


class WeightedSwiGLU(torch.autograd.Function):
    """`weighted_swiglu`, keeping only its inputs."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weight)
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up).mul_(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, weight = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_up = F.silu(gate).mul_(grad)  # [R, F], without the weight
        grad_weight = (grad_up * up).sum(-1, keepdim=True)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat((grad_gate, grad_up), dim=-1).mul_(weight), grad_weight
