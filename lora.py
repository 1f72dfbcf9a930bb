"""Factor pairs beside frozen weights: LoRA on a linear layer, and on the hot experts of a stack.

y = W x + (alpha / r) B A x with W frozen (LoRA, section 4.1; HELLoRA, eq. 3). The paper writes x W + x A B, with
A [in, r]; as in every checkpoint ours are the transposes: lora_A [r, in], lora_B [out, r]. The factors of a layer's
hot experts are stacked, [n, r, in] and [n, out, r]; W + BA is never formed in training.

Dimensions: n hot experts of a layer, r rank, D hidden_size, F intermediate_size of an expert, R rows routed (sorted,
the hot experts' first), S of them that reach a hot expert.
"""

import math
import zlib

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import parametrize

from attention import Linear
from model import Experts
from ops import GroupedLowRankLinear, LowRankLinear, WeightedSwiGLU, weighted_swiglu


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


class LoRALinear(Linear):
    """y = W x + (alpha / r) B A x, W frozen.  [T, in] -> [T, out]"""

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        device = base.weight.device
        # float32 whatever the base: thousands of small updates would be lost in bfloat16
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=device))  # step 0 is the base model
        self.scaling = alpha / r

    def forward(self, x: Tensor) -> Tensor:
        return self.together(x)[0]

    def together(self, x: Tensor, *others: nn.Linear) -> list[Tensor]:
        if not all(isinstance(linear, LoRALinear) for linear in others):
            return super().together(x, *others)
        pairs, weights = (self, *others), []
        for pair in pairs:
            # by rows: some matrix products are half as fast by a narrow matrix that lies by columns
            B = (pair.scaling * pair.lora_B.T.contiguous()).to(x.dtype)  # [r, out]
            weights += [pair.weight, pair.bias, B]
        A = torch.cat([pair.lora_A for pair in pairs]).to(x.dtype)  # [p * r, in]
        return [pair.scaled(y) for pair, y in zip(pairs, LowRankLinear.apply(x, A, *weights), strict=True)]

    def scaled(self, y: Tensor) -> Tensor:
        """DoRA's scale, of which LoRA has none.  [T, out] -> [T, out]"""
        return y

    def merged(self) -> Tensor:
        """The weight that computes the same without an adapter.  float32 [out, in]"""
        return self.weight.float() + self.scaling * self.lora_B @ self.lora_A


class DoRALinear(LoRALinear):
    """y = m (W + s B A) x / |W + s B A|, norm and magnitude m per output row (DoRA, eq. 5), W frozen.

    The norm is a constant in the backward pass (DoRA, section 4.3), and m starts as the norm of W.
    """

    def __init__(self, base: nn.Linear, r: int, alpha: float) -> None:
        super().__init__(base, r, alpha)
        self.lora_m = nn.Parameter(base.weight.detach().float().norm(dim=-1))

    def scale(self) -> Tensor:
        with torch.no_grad():
            norm = row_norm(self.weight, self.lora_A, self.lora_B, self.scaling)
        return self.lora_m / norm  # [out]

    def scaled(self, y: Tensor) -> Tensor:
        if self.bias is None:
            return self.scale().to(y.dtype) * y
        return self.scale().to(y.dtype) * (y - self.bias) + self.bias

    def merged(self) -> Tensor:
        return self.scale()[:, None] * super().merged()


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
    """Views of the n hot experts' weights, which come first.  [E, 2F, D], [E, D, F] -> [n, F, D] twice, [n, D, F]"""
    gate, up = gate_up_proj[:n].chunk(2, dim=1)
    return {"gate_proj": gate, "up_proj": up, "down_proj": down_proj[:n]}


class LoRAExperts(Experts):
    """Experts whose first n rows of the stack are hot and adapted, each projection by a pair of its own.

    The adapters take part in every step, even when no token reaches a hot expert: their gradient is then zero, not
    None. FSDP2 reduces only parameters that have a gradient on a rank; skipping would silently mix up experts.
    """

    def __init__(self, base: Experts, n: int, pair: type[StackedLoRA], r: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.gate_up_proj, self.down_proj, self.expert_ids = base.gate_up_proj, base.down_proj, base.expert_ids
        self.register_buffer("rows", base.rows, persistent=False)
        self.num_hot = n
        self.lora = nn.ModuleDict({name: pair(W, r, alpha) for name, W in self.hot_weights().items()})

    def hot_weights(self) -> dict[str, Tensor]:
        return hot_weights(self.gate_up_proj, self.down_proj, self.num_hot)

    def adapted(self, names: tuple[str, ...], x: Tensor, W: Tensor, offsets: Tensor, S: int, *made_by) -> Tensor:
        """W x [R, out], on the S hot rows with the pairs `names`, whose outputs lie side by side.

        made_by: a function and tensors that give the hot rows of x again, see GroupedLowRankLinear.
        """
        pairs = [self.lora[name] for name in names]
        A = torch.cat([pair.lora_A for pair in pairs], dim=1)  # [n, p * r, in]
        out, last = pairs[0].lora_B.shape[1], len(pairs) - 1
        B = [F.pad(pair.lora_B.mT, (i * out, (last - i) * out)) for i, pair in enumerate(pairs)]  # each writes its own
        B = pairs[0].scaling * torch.cat(B, dim=1)  # [n, p * r, p * out]
        y = GroupedLowRankLinear.apply(x, W, A.to(x.dtype), B.to(x.dtype), offsets, S, *made_by)
        if isinstance(pairs[0], StackedDoRA):
            weights = self.hot_weights()
            scale = torch.cat([self.lora[name].scale(weights[name]) for name in names], dim=1).to(x.dtype)  # [n, out]
            counts = offsets[: self.num_hot].diff(prepend=offsets.new_zeros(1))
            y = torch.cat((y[:S] * scale.repeat_interleave(counts, 0, output_size=S), y[S:]))
        return y

    def forward(self, x: Tensor, token: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        S = int(offsets[self.num_hot - 1])  # the hot rows come first
        # The gathered rows [R, D] get no name: it would keep them until the end.
        gate_up = self.adapted(
            ("gate_proj", "up_proj"),
            x.index_select(0, token),
            self.gate_up_proj,
            offsets,
            S,
            rows_of_tokens,
            x,
            token[:S],
        )  # [R, 2F]
        hidden = WeightedSwiGLU.apply(gate_up, weight)  # [R, F]
        made_from = gate_up[:S].detach(), weight[:S].detach()
        return self.adapted(("down_proj",), hidden, self.down_proj, offsets, S, rows_of_hidden, *made_from)


def rows_of_tokens(rows: slice, x: Tensor, token: Tensor) -> Tensor:
    """What gate and up multiply, on some rows.  x [T, D], token [S] -> [rows, D]"""
    return x.index_select(0, token[rows])


def rows_of_hidden(rows: slice, gate_up: Tensor, weight: Tensor) -> Tensor:
    """What down multiplies, on some rows.  gate_up [S, 2F], weight [S, 1] -> [rows, F]"""
    return weighted_swiglu(gate_up[rows], weight[rows])


KINDS = {  # what trains in a pair -> its classes
    "lora": (LoRALinear, StackedLoRA),  # A and B
    "dora": (DoRALinear, StackedDoRA),  # A, B and a magnitude per output row
    "lori": (LoRALinear, StackedLoRA),  # B alone: all of it, or a few entries (`sparsify`)
}


class Scatter(nn.Module):
    """A matrix that is zero except at `positions`: values [m] -> B of the given shape, and back."""

    def __init__(self, positions: Tensor, shape: torch.Size) -> None:
        super().__init__()
        self.register_buffer("positions", positions)  # int64 [m] into the flat matrix
        self.shape = shape

    def forward(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.shape.numel()).index_copy(0, self.positions, values).view(self.shape)

    def right_inverse(self, B: Tensor) -> Tensor:
        return B.flatten()[self.positions]

    def bits(self) -> Tensor:
        """A bit for every entry of the matrix, 1 if it is kept: for the file, where positions would outweigh values."""
        kept = np.zeros(self.shape.numel(), dtype=bool)
        kept[self.positions.cpu()] = True
        return torch.from_numpy(np.packbits(kept))  # uint8 [entries / 8]


def positions_of(bits: Tensor) -> Tensor:
    """What `Scatter.bits` packed.  -> int64 [m], rising"""
    return torch.from_numpy(np.unpackbits(bits.numpy()).nonzero()[0])


def sparsify(model: nn.Module, positions: dict[str, Tensor]) -> None:
    """Keep of every lora_B only the entries at `positions` (by the name of its module), as one vector of values.

    What trains, its gradient, its moments in the optimizer and its file then have the size of the entries kept: a
    mask over a dense B would save none of it. `module.lora_B` stays readable, as the whole matrix.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, LoRALinear | StackedLoRA):
            continue
        kept = positions.get(name, ())
        if len(kept):
            B = module.lora_B
            scatter = Scatter(kept if B.is_meta else kept.to(B.device), B.shape)
            parametrize.register_parametrization(module, "lora_B", scatter, unsafe=True)  # changes the shape
        else:  # nothing of this matrix trains: it stays zero
            module.lora_B.requires_grad_(False)


def trains(ranks: Tensor, r_max: int) -> Tensor:
    """Which dimensions have grown.  ranks [...] -> bool [..., r_max]"""
    return torch.arange(r_max) < ranks.unsqueeze(-1)


def rank_rows(state: dict[str, Tensor]) -> dict[str, int]:
    """For every tensor of experts the row of `ranks` [L, E] that is its layer's; first layers may have no experts."""
    layers = {name: int(name.split(".")[1]) for name in state if ".experts." in name}
    row = {layer: i for i, layer in enumerate(sorted(set(layers.values())))}
    return {name: row[layer] for name, layer in layers.items()}


def truncate(state: dict[str, Tensor], ranks: Tensor) -> dict[str, Tensor]:
    """Drop what never grew: an expert's pair keeps its R dimensions, and the experts lie one after the other.

    lora_A [E, r_max, in] -> [sum of R, in], lora_B [E, out, r_max] -> [out, sum of R]; other modules stay as they are.
    """
    kept = dict(state)
    for name, row in rank_rows(state).items():
        is_A = name.endswith("lora_A")
        stack = state[name] if is_A else state[name].mT  # [E, r_max, in or out]
        rows = stack[trains(ranks[row], stack.shape[1])]  # [sum of R, in or out]
        kept[name] = rows if is_A else rows.mT.contiguous()
    return kept


def pad(state: dict[str, Tensor], ranks: Tensor) -> dict[str, Tensor]:
    """Fill up what `truncate` left: a plain adapter of the largest rank. Raises ValueError if ranks do not fit."""
    padded, largest, rows_of = {}, int(ranks.max()), rank_rows(state)
    for name, tensor in state.items():
        rows = tensor if name.endswith("lora_A") else tensor.mT  # [r or sum of R, in or out]
        if name in rows_of:
            mask = trains(ranks[rows_of[name]], largest)
            if len(rows) != int(mask.sum()):
                raise ValueError(f"{name} is {tuple(tensor.shape)}, its ranks sum to {mask.sum()}")
            stack = rows.new_zeros(*mask.shape, rows.shape[-1])  # [E, largest, in or out]
            stack[mask] = rows
        else:
            stack = F.pad(rows, (0, 0, 0, largest - len(rows)))  # [largest, in or out]
        padded[name] = stack if name.endswith("lora_A") else stack.mT.contiguous()
    return padded
