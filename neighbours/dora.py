"""DoRA: LoRA that trains the length of every row of the weight apart from its direction.

    y = m (W x + (alpha / r) B A dropout(x)) / |W + (alpha / r) B A|     m [out] trained, | | per row

(arXiv 2402.09353, equation 5.) W is frozen. The norm is a constant in the backward pass (section 4.3), and m starts as
the norm of W. The bias of a linear layer is added behind it, unscaled.
"""

import torch
import torch.nn as nn
from torch import Tensor

from hub.sharded import fill, full_tensor
from lora import LoRAExperts, LoRALinear, StackedLoRA, hot_weights


def row_norm(W: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Euclidean norm of every row of W + s B A, from low-rank products: BA is never formed.  [..., out]

    |W_i + s (BA)_i|^2 = |W_i|^2 + 2 s (W A^T)_i . B_i + s^2 B_i (A A^T) B_i^T
    """
    W = W.to(A.dtype)
    cross = (W @ A.mT * B).sum(-1)  # [..., out]
    square = (B @ (A @ A.mT) * B).sum(-1)  # [..., out]
    return (W.square().sum(-1) + 2 * scaling * cross + scaling**2 * square).sqrt()


def row_scale(pair: LoRALinear | StackedLoRA, W: Tensor) -> Tensor:
    """m / |W + s B A|, the factor of every row.  [..., out]"""
    with torch.no_grad():
        norm = row_norm(W, pair.lora_A, pair.lora_B, pair.scaling)
    return pair.lora_m / norm


class DoRALinear(LoRALinear):
    """LoRALinear with a magnitude for every output.  [T, in] -> [T, out]"""

    def __init__(self, base: nn.Linear, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(base, r, alpha, dropout)
        self.lora_m = nn.Parameter(base.weight.detach().float().norm(dim=-1))

    def set_magnitude(self) -> None:
        fill(self.lora_m, full_tensor(self.weight).float().norm(dim=-1))

    def forward(self, x: Tensor) -> Tensor:
        y, scale = super().forward(x), row_scale(self, self.weight).to(x.dtype)
        return scale * y if self.bias is None else scale * (y - self.bias) + self.bias

    def merged(self) -> Tensor:
        return row_scale(self, self.weight)[:, None] * super().merged()


class StackedDoRA(StackedLoRA):
    """StackedLoRA with a magnitude for every output of every hot expert."""

    def __init__(self, W: Tensor, r: int, alpha: float) -> None:
        super().__init__(W, r, alpha)
        self.lora_m = nn.Parameter(W.detach().float().norm(dim=-1))  # [n, out]

    def merged(self, W: Tensor) -> Tensor:
        return row_scale(self, W)[..., None] * super().merged(W)


class DoRAExperts(LoRAExperts):
    """LoRAExperts that scale what the hot experts' projections give."""

    pair = StackedDoRA

    def set_magnitude(self) -> None:
        hot = hot_weights(full_tensor(self.gate_up_proj), full_tensor(self.down_proj), self.num_hot)
        for name, W in hot.items():
            fill(self.lora[name].lora_m, W.float().norm(dim=-1))

    def gate_up(self, x: Tensor, token: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
        y = super().gate_up(x, token, offsets, num_rows)
        return self.scaled(y, ("gate_proj", "up_proj"), offsets, num_rows)

    def down(self, gate_up: Tensor, weight: Tensor, offsets: Tensor, num_rows: int) -> Tensor:
        y = super().down(gate_up, weight, offsets, num_rows)
        return self.scaled(y, ("down_proj",), offsets, num_rows)

    def scaled(self, y: Tensor, names: tuple[str, ...], offsets: Tensor, num_rows: int) -> Tensor:
        """y [R, out], the outputs of the projections `names` side by side; only the first num_rows are scaled."""
        weights = self.hot_weights()
        scale = torch.cat([row_scale(self.lora[name], weights[name]) for name in names], dim=1).to(y.dtype)  # [n, out]
        counts = offsets[: self.num_hot].diff(prepend=offsets.new_zeros(1))  # [n] rows of each hot expert
        scale_of_row = scale.repeat_interleave(counts, 0, output_size=num_rows)  # [H, out]
        return torch.cat((y[:num_rows] * scale_of_row, y[num_rows:]))
