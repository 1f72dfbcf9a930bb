"""LoRA's dropout without a random number generator: whether a number is dropped follows from what it is.

    dropout = Dropout(p, seed)
    dropout.step = step; dropout.see(names, lengths)        # before the forward pass of a micro-batch
    dropout(x, "layers.0.self_attn.q_proj")                 # each entry of x is 0 with probability p, else x / (1 - p)

A generator would give another mask to a token that comes in another micro-batch or on another process. Here the mask is
a hash of (seed, step, example, position, matrix, place in x). It is the same however a batch is cut, and is made again
in the backward pass, where keeping it would take memory. p is rounded to a multiple of 2^-16, and so is 1 - p.

Dimensions: B examples and T tokens of a micro-batch, H rows of hot experts.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor


def signed(word: int) -> int:
    """A word of 64 bits as the int64 with the same bits."""
    return word - (word >> 63 << 64)


GOLDEN = signed(0x9E3779B97F4A7C15)


def mix(x: Tensor) -> Tensor:
    """The finalizer of SplitMix64, in place: a change of any bit of x changes every bit of it in half of all cases."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        x.bitwise_xor_((x >> shift).bitwise_and_(2 ** (64 - shift) - 1)).mul_(signed(factor))  # >> copies the sign
    return x


def word(*what: object) -> int:
    """A hash of text and numbers as an int64."""
    return int.from_bytes(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), "little", signed=True)


class Dropout:
    """Dropout of what the factors A multiply. `step` and `see` say which tokens come next."""

    def __init__(self, p: float, seed: int) -> None:
        self.seed, self.step, self.tokens = seed, 0, torch.empty(0, dtype=torch.int64)
        self.dropped = round(p * 2**16)  # of 2^16 equally likely values
        self.scale = 2**16 / (2**16 - self.dropped)

    def see(self, names: list[str], lengths: Tensor, device: torch.device | str = "cpu") -> None:
        """Say which tokens a micro-batch has.  names: of its B examples in the data set, lengths [B]"""
        positions = torch.cat([torch.arange(n) for n in (0, *lengths.tolist())])  # [T]
        examples = torch.tensor([word(self.seed, self.step, name) for name in names])  # [B]
        self.tokens = mix(examples.repeat_interleave(lengths) + GOLDEN * positions).to(device)  # [T]

    def __call__(self, x: Tensor, matrix: str) -> Tensor:
        """What the A of a matrix sees of x.  [T, in] -> [T, in]"""
        return self.drop(x, mix(self.tokens ^ word(matrix)))

    def of_rows(self, layer: int, projection: str, token: Tensor, expert: Tensor) -> Callable[[Tensor, slice], Tensor]:
        """The same for the hot rows of a layer's experts, a slice of them at a time.

        token, expert [H]: of which of the T tokens a row is, and which expert it reaches.  -> (x [rows, in], rows) -> x
        """
        keys = mix(mix(self.tokens ^ word(layer, projection))[token] + GOLDEN * expert)  # [H]
        return lambda x, rows: self.drop(x, keys[rows])

    def drop(self, x: Tensor, keys: Tensor) -> Tensor:
        """x [R, in], keys [R] -> [R, in]"""
        words = torch.arange(-(-x.shape[1] // 4), device=x.device)  # one hash for four entries of x
        parts = mix(keys.unsqueeze(1) + GOLDEN * words).view(torch.int16)  # [R, in], uniform
        return (x * (parts[:, : x.shape[1]] >= self.dropped - 2**15)).mul_(self.scale)
