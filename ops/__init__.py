"""Optimized versions of the reference formulas in model.py and lora.py: same names, arguments, values and gradients.

    HELLORA_PLAIN=1 python train.py        # every command can run on the formulas as they stand

The layers call ops.NAME. tests/test_ops.py checks that each optimised version equals its formula.
"""

import os
from collections.abc import Callable

from ops.attention import attend, attend_to_batch
from ops.experts import grouped_linear, weighted_swiglu
from ops.head import target_loss
from ops.lora import lora_down, lora_gate_up

__all__ = [
    "attend",
    "attend_to_batch",
    "grouped_linear",
    "lora_down",
    "lora_gate_up",
    "target_loss",
    "weighted_swiglu",
]
PLAIN = os.environ.get("HELLORA_PLAIN") == "1"


def reference(formula: Callable) -> Callable:
    """Marks the reference formula of ops.NAME, which it replaces if HELLORA_PLAIN=1."""
    if PLAIN:
        globals()[formula.__name__] = formula
    return formula
