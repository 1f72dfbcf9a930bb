"""LoRA on a linear layer, and on the hot experts of a stack.

    y = W x + (alpha / r) B A dropout(x)         W [out, in] frozen, A [r, in] and B [out, r] trained

(LoRA, section 4.1; HELLoRA, eq. 3.) A and B of one matrix are a LoRA pair. The paper writes x W + x A B with A [in, r].
As in every checkpoint, ours are the transposes. The pairs of a layer's hot experts are stacked, [n, r, in] and
[n, out, r]. W + B A is never formed in training. `lora_grouped_linear` is the reference formula for experts; training
calls the optimized version in ops/. Dropout is off unless a run asks for it. A token at a cold expert passes W alone:
the gradient still reaches its input and, through the routing weight, the router's pair.

Dimensions: n hot experts of a layer, r rank, D hidden_size, F intermediate_size of an expert, R routed rows (sorted,
those of hot experts first), H of them that reach a hot expert, T tokens.
"""

import math
import zlib
from collections.abc import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import ops
from model import Experts, grouped_linear

Dropped = Callable[[Tensor], Tensor]  # x -> what A sees of it in training


def uniform(seed: int, name: str, size: int) -> np.ndarray:
    """`size` float32 numbers u in [0, 1) that depend on (seed, name) alone, not on device or library version.

    u = (w >> 40) / 2^24 for the 64-bit words w of numpy's PCG64 seeded with SeedSequence([seed, crc32(name)]): raw
    bits are the one thing numpy promises to keep; torch's generators promise nothing.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])).random_raw(size)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def init_A(A: Tensor, seed: int, name: str) -> None:
    """Fill lora_A [r, in] of one matrix, uniform in +-1 / sqrt(in): Kaiming with a = sqrt(5), as PEFT and LoRI."""
    if not A.is_meta:  # a model that is only counted
        u = torch.from_numpy(uniform(seed, name, A.numel())).view(A.shape)
        A.copy_((2 * u - 1) / math.sqrt(A.shape[1]))


def row_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Euclidean norm of every row of W + s B A, from low-rank products: BA is never formed.  [..., out]

    |W_i + s (BA)_i|^2 = |W_i|^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T
    """
    W = W.to(A.dtype)
    cross = (W @ A.mT * B).sum(-1)  # [..., out]
    square = (B @ (A @ A.mT) * B).sum(-1)  # [..., out]
    return (W.square().sum(-1) + 2 * scaling * cross + scaling**2 * square).sqrt()


class LoRALinear(nn.Linear):
    """y = W x + bias + (alpha / r) B A dropout(x), with W and bias frozen.  [T, in] -> [T, out]"""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: Dropped | None = None) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        # float32 whatever the base: bfloat16 would round thousands of small updates away
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))  # step 0 is the base model
        self.scaling, self.dropout = alpha / r, dropout

    def forward(self, x: Tensor) -> Tensor:
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        seen = self.dropout(x) if self.dropout and self.training else x
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(F.linear(seen, A), B)

    def merged(self) -> Tensor:
        """The weight that computes the same without an adapter.  float32 [out, in]"""
        return self.weight.float() + self.scaling * self.lora_B @ self.lora_A


class DoRALinear(LoRALinear):
    """y = m (W x + s B A dropout(x)) / |W + s B A| + bias, with norm and magnitude m per output row (DoRA, eq. 5).

    W is frozen. The norm is a constant in the backward pass (DoRA, section 4.3), and m starts as the norm of W.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: Dropped | None = None) -> None:
        super().__init__(base, r, alpha, dropout)
        self.lora_m = nn.Parameter(base.weight.detach().float().norm(dim=-1))

    def scale(self) -> Tensor:
        with torch.no_grad():
            norm = row_norm(self.weight, self.lora_A, self.lora_B, self.scaling)
        return self.lora_m / norm  # [out]

    def forward(self, x: Tensor) -> Tensor:
        y, scale = super().forward(x), self.scale().to(x.dtype)
        return scale * y if self.bias is None else scale * (y - self.bias) + self.bias

    def merged(self) -> Tensor:
        return self.scale()[:, None] * super().merged()


def lora_grouped_linear(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, offsets: Tensor, num_rows: int, drop=None, recompute=None, *sources
) -> Tensor:
    """W_e x + B_e A_e drop(x) for rows sorted by expert; only the first n experts have factors.  x [R, in] -> [R, out]

    W [E, out, in], A [n, r, in], B [n, r, out] (transposed, times alpha / r), offsets [E] ends of the experts' rows,
    num_rows of the hot experts together. drop(x, rows): what A sees of a slice of these rows; None: all of x. recompute
    and sources are used by the optimized version in ops/ alone.
    """
    y, hot = grouped_linear(x, W, offsets), offsets[: len(A)]
    seen = drop(x[:num_rows], slice(num_rows)) if drop else x[:num_rows]
    low = grouped_linear(seen, A, hot)  # A_e drop(x)  [H, r]
    return torch.cat((y[:num_rows] + grouped_linear(low, B.mT, hot), y[num_rows:]))


class StackedLoRA(nn.Module):
    """W_e + (alpha / r) B_e A_e for the n hot experts of one projection; LoRAExperts multiplies with it."""

    def __init__(self, W: Tensor, r: int, alpha: float) -> None:
        """W [n, out, in]: the hot experts' weights, for their sizes."""
        super().__init__()
        n, fan_out, fan_in = W.shape
        self.lora_A = nn.Parameter(torch.empty(n, r, fan_in, device=W.device))
        self.lora_B = nn.Parameter(torch.zeros(n, fan_out, r, device=W.device))
        self.scaling = alpha / r

    def merged(self, W: Tensor) -> Tensor:
        """The weights that compute the same without an adapter.  float32 [n, out, in]"""
        return W.float() + self.scaling * self.lora_B @ self.lora_A


class StackedDoRA(StackedLoRA):
    """DoRA on the n hot experts of one projection: see DoRALinear."""

    def __init__(self, W: Tensor, r: int, alpha: float) -> None:
        super().__init__(W, r, alpha)
        self.lora_m = nn.Parameter(W.detach().float().norm(dim=-1))  # [n, out]

    def scale(self, W: Tensor) -> Tensor:
        with torch.no_grad():
            norm = row_norm(W, self.lora_A, self.lora_B, self.scaling)
        return self.lora_m / norm  # [n, out]

    def merged(self, W: Tensor) -> Tensor:
        return self.scale(W)[..., None] * super().merged(W)


def hot_weights(gate_up_proj: Tensor, down_proj: Tensor, n: int) -> dict[str, Tensor]:
    """Views of the hot experts' weights, which come first.  [E, 2F, D], [E, D, F] -> [n, F, D] twice, [n, D, F]"""
    gate, up = gate_up_proj[:n].chunk(2, dim=1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down_proj[:n]}


class LoRAExperts(Experts):
    """Experts of which the first n in the stack are hot: each of their projections has a pair of its own.

    The adapters take part in every step, even if no token reaches a hot expert. Their gradient is then zero and not
    None: FSDP2 reduces only parameters that have a gradient on a process, and would otherwise mix up experts silently.
    """

    def __init__(
        self, base: Experts, n: int, pair: type[StackedLoRA], r: int, alpha: float, dropout: Callable | None = None
    ) -> None:
        """dropout(projection, token, expert): `ops.Dropout.of_rows` of this layer; None: nothing is dropped."""
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj, self.expert_ids = base.gate_up_proj, base.down_proj, base.expert_ids
        self.register_buffer("position", base.position, persistent=False)
        self.num_hot, self.dropout = n, dropout
        self.lora = nn.ModuleDict({name: pair(W, r, alpha) for name, W in self.hot_weights().items()})

    def hot_weights(self) -> dict[str, Tensor]:
        return hot_weights(self.gate_up_proj, self.down_proj, self.num_hot)

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        # The hot experts' rows come first. How many there are is the one number that a GPU is waited for in a layer.
        num_rows = len(token) if self.num_hot == len(offsets) else int(offsets[self.num_hot - 1])
        both, hot_tokens = ("gate_proj", "up_proj"), token[:num_rows]
        # The gathered rows [R, D] get no name, which would keep them until the end.
        gate_up = self.adapted(
            both, x.index_select(0, token), self.gate_up_proj, offsets, hot_tokens, rows_of_tokens, x, hot_tokens
        )  # [R, 2F]
        hidden = ops.weighted_swiglu(gate_up, weight)  # [R, F]
        sources = gate_up[:num_rows].detach(), weight[:num_rows].detach()
        return self.adapted(("down_proj",), hidden, self.down_proj, offsets, hot_tokens, rows_of_hidden, *sources)

    def adapted(self, names: tuple[str, ...], x: Tensor, W: Tensor, offsets: Tensor, token: Tensor, *made_by) -> Tensor:
        """W x with the pairs `names`, which see the same x. Their outputs lie side by side.  [R, in] -> [R, out]

        token [H]: of the hot rows. made_by: a function and tensors that give these rows of x again, see
        `lora_grouped_linear`.
        """
        pairs, num_rows = [self.lora[name] for name in names], len(token)
        A = torch.cat([pair.lora_A for pair in pairs], dim=1)  # [n, p * r, in]
        out, last = pairs[0].lora_B.shape[1], len(pairs) - 1
        B = [F.pad(pair.lora_B.mT, (i * out, (last - i) * out)) for i, pair in enumerate(pairs)]  # block-diagonal
        B = pairs[0].scaling * torch.cat(B, dim=1)  # [n, p * r, p * out]
        counts, drop = offsets[: self.num_hot].diff(prepend=offsets.new_zeros(1)), None  # [n] rows of each hot expert
        if self.dropout and self.training:
            ids = self.position.argsort()[: self.num_hot]  # expert_ids, on the device
            drop = self.dropout(names[0], token, ids.repeat_interleave(counts, output_size=num_rows))
        y = ops.lora_grouped_linear(x, W, A.to(x.dtype), B.to(x.dtype), offsets, num_rows, drop, *made_by)
        if isinstance(pairs[0], StackedDoRA):
            weights = self.hot_weights()
            scale = torch.cat([self.lora[name].scale(weights[name]) for name in names], dim=1).to(x.dtype)  # [n, out]
            y = torch.cat((y[:num_rows] * scale.repeat_interleave(counts, 0, output_size=num_rows), y[num_rows:]))
        return y


def rows_of_tokens(rows: slice, x: Tensor, token: Tensor) -> Tensor:
    """Some rows of what gate and up multiply.  x [T, D], token [H] -> [rows, D]"""
    return x.index_select(0, token[rows])


def rows_of_hidden(rows: slice, gate_up: Tensor, weight: Tensor) -> Tensor:
    """Some rows of what down multiplies.  gate_up [H, 2F], weight [H, 1] -> [rows, F]"""
    return ops.weighted_swiglu(gate_up[rows], weight[rows])


KINDS = {  # what trains in a pair -> its classes
    "lora": (LoRALinear, StackedLoRA),  # A and B
    "dora": (DoRALinear, StackedDoRA),  # A, B and a magnitude per output row
    "lori": (LoRALinear, StackedLoRA),  # only B: all of it, or a few entries (`lori.sparsify`)
}
