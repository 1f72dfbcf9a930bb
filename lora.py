"""LoRA on a linear layer, and on the hot experts of a stack.

    y = W x + (alpha / r) B A dropout(x)         W [out, in] frozen, A [r, in] and B [out, r] trained

(LoRA, section 4.1; HELLoRA, eq. 3.) A and B of one matrix are a LoRA pair. The paper writes x W + x A B with A [in, r].
As in every checkpoint, ours are the transposes. The pairs of a layer's hot experts are stacked, [n, r, in] and
[n, out, r]. W + B A is never formed in training. Dropout is off unless a run asks for it. A token at a cold expert goes
through W alone: the gradient still reaches its input and, through the routing weight, the router's pair.

Dimensions: n hot experts of a layer, r rank, D hidden_size, F intermediate_size of an expert, R routed rows (sorted,
those of hot experts first), H of them that reach a hot expert, T tokens.
"""

import math
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import ops
from ops.lora import Pair


def uniform(seed: int, name: str, size: int) -> np.ndarray:
    """`size` float32 numbers u in [0, 1) that depend on (seed, name) alone, not on device or library version.

    u = (w >> 40) / 2^24 for the 64-bit words w of numpy's PCG64 seeded with SeedSequence([seed, crc32(name)]): raw
    bits are the one thing numpy promises to keep; torch's generators promise nothing.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, zlib.crc32(name.encode())])).random_raw(size)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def seed_dropout(seed: int, step: int, process: int) -> None:
    """Let the dropout masks to come depend on these alone: a resumed run then drops what an uninterrupted one does."""
    torch.manual_seed(int(np.random.SeedSequence([seed, step, process]).generate_state(1)[0]))


def init_A(A: Tensor, seed: int, name: str) -> None:
    """Fill lora_A [r, in] of one matrix, uniform in +-1 / sqrt(in): Kaiming with a = sqrt(5), as PEFT and LoRI."""
    if not A.is_meta:  # a model that is only counted
        u = torch.from_numpy(uniform(seed, name, A.numel())).view(A.shape)
        A.copy_((2 * u - 1) / math.sqrt(A.shape[1]))


class LoRALinear(nn.Linear):
    """y = W x + bias + (alpha / r) B A dropout(x), with W and bias frozen.  [T, in] -> [T, out]"""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> None:
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
        low = F.linear(F.dropout(x, self.dropout, self.training), A)  # [T, r]
        return F.linear(x, self.weight, self.bias) + self.scaling * F.linear(low, B)

    def merged(self) -> Tensor:
        """The weight that computes the same without an adapter.  float32 [out, in]"""
        return self.weight.float() + self.scaling * self.lora_B @ self.lora_A


def lora_grouped_linear(
    x: Tensor, W: Tensor, pairs: list[Pair], offsets: Tensor, num_rows: int, dropout: float
) -> Tensor:
    """W_e x for rows sorted by expert, plus B_e A_e dropout(x) on the first num_rows, which reach hot experts.

    B_e holds alpha / r already (`StackedLoRA.factors`). Several pairs see the same x: their outputs lie side by side.
    x [R, in], W [E, out, in], offsets [E] ends of the experts' rows -> [R, out]
    """
    y = ops.grouped_linear(x, W, offsets)  # [R, out]
    x = F.dropout(x[:num_rows], dropout)  # [H, in]
    added = []
    for A, B in pairs:
        low = ops.grouped_linear(x, A, offsets[: len(A)])  # [H, r]
        added.append(ops.grouped_linear(low, B, offsets[: len(B)]))
    return torch.cat((y[:num_rows] + torch.cat(added, dim=-1), y[num_rows:]))


@ops.reference
def lora_gate_up(
    x: Tensor, token: Tensor, W: Tensor, gate: Pair, up: Pair, offsets: Tensor, num_rows: int, dropout: float
) -> Tensor:
    """gate and up of every row.  x [T, D], token [R] of each row, W [E, 2F, D] -> [R, 2F]"""
    return lora_grouped_linear(x[token], W, [gate, up], offsets, num_rows, dropout)


@ops.reference
def lora_down(
    gate_up: Tensor, weight: Tensor, W: Tensor, down: Pair, offsets: Tensor, num_rows: int, dropout: float
) -> Tensor:
    """down of every row, scaled by its routing weight.  gate_up [R, 2F], weight [R, 1], W [E, D, F] -> [R, D]"""
    return lora_grouped_linear(ops.weighted_swiglu(gate_up, weight), W, [down], offsets, num_rows, dropout)


class StackedLoRA(nn.Module):
    """W_e + (alpha / r) B_e A_e for the n hot experts of one projection; LoRAExperts multiplies with it."""

    def __init__(self, W: Tensor, r: int, alpha: float) -> None:
        """W [n, out, in]: the hot experts' weights, for their sizes."""
        super().__init__()
        n, fan_out, fan_in = W.shape
        self.lora_A = nn.Parameter(torch.empty(n, r, fan_in, device=W.device))
        self.lora_B = nn.Parameter(torch.zeros(n, fan_out, r, device=W.device))
        self.scaling = alpha / r

    def factors(self, dtype: torch.dtype) -> Pair:
        """A and (alpha / r) B in the dtype in which they multiply."""
        return self.lora_A.to(dtype), (self.scaling * self.lora_B).to(dtype)

    def merged(self, W: Tensor) -> Tensor:
        """The weights that compute the same without an adapter.  float32 [n, out, in]"""
        return W.float() + self.scaling * self.lora_B @ self.lora_A


def hot_weights(gate_up_proj: Tensor, down_proj: Tensor, n: int) -> dict[str, Tensor]:
    """Views of the hot experts' weights, which come first.  [E, 2F, D], [E, D, F] -> [n, F, D] twice, [n, D, F]"""
    gate, up = gate_up_proj[:n].chunk(2, dim=1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down_proj[:n]}


class LoRAExperts(nn.Module):
    """Experts of which the first n in the stack are hot: each of their projections has a pair of its own.

    With HELLORA_PLAIN=1, ops.NAME is the function NAME above; otherwise the one in ops/lora.py.

    The adapters take part in every step, even if no token reaches a hot expert. Their gradient is then zero and not
    None: FSDP2 reduces only parameters that have a gradient on a process, and would mix up parameters silently.
    """

    pair = StackedLoRA  # of one projection

    def __init__(self, base: nn.Module, n: int, r: int, alpha: float, dropout: float = 0.0) -> None:
        """base: model.Experts, with the hot ones first."""
        super().__init__()
        self.gate_up_proj, self.down_proj, self.expert_ids = base.gate_up_proj, base.down_proj, base.expert_ids
        self.register_buffer("position", base.position, persistent=False)
        self.num_hot, self.dropout = n, dropout
        self.lora = nn.ModuleDict({name: self.pair(W, r, alpha) for name, W in self.hot_weights().items()})

    def hot_weights(self) -> dict[str, Tensor]:
        return hot_weights(self.gate_up_proj, self.down_proj, self.num_hot)

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        # The hot experts' rows come first. Reading how many there are is a layer's only wait for the GPU.
        num_rows = len(token) if self.num_hot == len(offsets) else int(offsets[self.num_hot - 1])
        gate_up = self.gate_up(x, token, offsets, num_rows)  # [R, 2F]
        return self.down(gate_up, weight, offsets, num_rows)  # [R, D]

    def gate_up(self, x: Tensor, token: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
        gate, up = self.lora["gate_proj"].factors(x.dtype), self.lora["up_proj"].factors(x.dtype)
        dropout = self.dropout if self.training else 0.0
        return ops.lora_gate_up(x, token, self.gate_up_proj, gate, up, offsets, num_rows, dropout)

    def down(self, gate_up: Tensor, weight: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
        down, dropout = self.lora["down_proj"].factors(gate_up.dtype), self.dropout if self.training else 0.0
        return ops.lora_down(gate_up, weight, self.down_proj, down, offsets, num_rows, dropout)
