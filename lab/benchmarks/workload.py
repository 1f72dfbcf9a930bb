"""What is measured: models shaped like OLMoE-1B-7B, and batches shaped like GSM8K.

Dimensions: B sequences of a batch, S positions.
"""

import numpy as np
import torch

from data import Batch
from hub.config import PRESETS

SMALL = {  # a quarter of the width, depth and vocabulary
    "vocab_size": 12576, "hidden_size": 512, "intermediate_size": 256, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 4, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
SHAPES = {"small": PRESETS["olmoe-1b-7b"] | SMALL, "full": PRESETS["olmoe-1b-7b"]}
# GSM8K's training examples by number of tokens (prompt, answer and end): those in [16 i, 16 i + 16) stand at place i.
LENGTHS = np.array(
    "0 0 0 1 92 538 965 1124 1096 866 794 595 438 336 210 158 95 73 35 16 18 13 3 4 1 1 0 1".split(), dtype=float
)
TARGET_SHARE = 0.51  # of an example's tokens are the answer: 76.7 of 151.6 on average


def make_batches(B: int, n: int, vocab_size: int, device: torch.device) -> list[Batch]:
    """n batches of B sequences, as long as GSM8K's. The same arguments give the same batches."""
    rng, shares = np.random.default_rng(0), LENGTHS / LENGTHS.sum()
    zipf = 1 / np.arange(3, vocab_size + 3)
    batches = []
    for _ in range(n):
        lengths = torch.from_numpy(16 * rng.choice(len(LENGTHS), B, p=shares) + rng.integers(16, size=B))
        S = int(lengths.max())
        ids = torch.from_numpy(rng.choice(vocab_size, (B, S), p=zipf / zipf.sum()))
        place, prompt = torch.arange(S), (lengths * (1 - TARGET_SHARE)).long()
        predicts = (place >= prompt[:, None] - 1) & (place < lengths[:, None] - 1)
        labels = torch.where(predicts, ids.roll(-1, 1), -100)
        batches.append(Batch(ids.to(device), lengths, labels.to(device)))
    return batches
