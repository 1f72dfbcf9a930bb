"""Optimized versions of the reference formulas in model.py and lora.py, under the same names.

Each gives the values and gradients of its reference (tests/test_ops.py) in less time or memory. The reference of
`attend_by_sequence` is `model.attend` on the padded batch.
"""

from ops.attention import attend_by_sequence
from ops.dropout import Dropout
from ops.experts import grouped_linear, lora_grouped_linear, weighted_swiglu
from ops.head import target_loss
from ops.kernels import one_kernel

__all__ = [
    "Dropout",
    "attend_by_sequence",
    "grouped_linear",
    "lora_grouped_linear",
    "one_kernel",
    "target_loss",
    "weighted_swiglu",
]
