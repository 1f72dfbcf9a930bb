"""The products of a layer's experts, one call for all of them where the device has such a kernel.

Autograd keeps every input of a product, also where it is cheap to compute again. The Functions here keep less.

Dimensions: G groups (experts), R rows sorted by group, F intermediate_size of an expert.
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
        return F.grouped_mm(x, W.mT, offs=offsets) if one_call(x, W) else linear_by_loop(x, W, offsets)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W, offsets = ctx.saved_tensors
        need_x, need_W, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = GroupedLinear.apply(grad, W.mT, offsets) if need_x else None
        if not need_W:
            return grad_x, None, None
        return grad_x, (grouped_outer if one_call(grad, W) else outer_by_loop)(grad, x, offsets), None


def linear_by_loop(x: Tensor, W: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_linear`, one group after the other."""
    y = x.new_empty(len(x), W.shape[1])
    for rows, W_g in zip(slices(offsets), W, strict=True):
        group_product(x, W_g.T, rows, y)
    return y


def outer_by_loop(y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_outer`, one group after the other; zero for an empty group."""
    outer = y.new_empty(len(offsets), y.shape[1], x.shape[1])
    for rows, outer_g in zip(slices(offsets), outer, strict=True):
        torch.mm(y[rows].T, x[rows], out=outer_g)
    return outer


def grouped_outer(y: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """sum y x^T over the rows of each group, by one kernel.  y [R, out], x [R, in] -> [G, out, in]"""
    empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0  # [G]; for these some GPUs return uninitialised memory
    return F.grouped_mm(y.T, x, offs=offsets).masked_fill_(empty[:, None, None], 0)


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
