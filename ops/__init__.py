"""Optimized versions of the reference formulas in model.py and lora.py: same names, arguments, values and gradients.

    HELLORA_PLAIN=1 python train.py        # every command can run on the formulas as they stand
    python train.py --compile              # the elementwise formulas, each compiled into one kernel

The layers call ops.NAME. tests/test_ops.py checks that each optimised version equals its formula.
"""

import os
from collections.abc import Callable

import torch

from command.errors import InputError
from ops import experts
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
ELEMENTWISE = ("rms_norm", "rotate", "weighted_swiglu")  # formulas on single entries or rows
FORMULAS: dict[str, Callable] = {}


def reference(formula: Callable) -> Callable:
    """Marks the reference formula of ops.NAME, which it is itself with HELLORA_PLAIN=1 or where nothing is faster."""
    FORMULAS[formula.__name__] = formula
    if PLAIN or formula.__name__ not in __all__:
        globals()[formula.__name__] = formula
    return formula


def compile_elementwise(device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """The formulas of ELEMENTWISE by name, of each of which torch.compile makes one kernel forward and one backward.

    `use` puts them to use. Raises InputError if this machine cannot compile.
    """
    compiled = {name: torch.compile(FORMULAS[name], dynamic=True) for name in ELEMENTWISE}
    x = torch.ones(2, 3, 4, dtype=dtype, device=device)  # [T, H, Dh]
    examples = (x[0], x[0, 0], 1e-5), (x, x[:, :1], x[:, :1]), (x[0], x[0, :, :1])
    try:
        for formula, (x, *others) in zip(compiled.values(), examples, strict=True):
            formula(x.clone().requires_grad_(), *others).sum().backward()
    except Exception as error:  # of any kind: compilers fail in many ways
        needed = "Triton" if device.type == "cuda" else "a C++ compiler such as g++"
        [why, *_] = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(f"--compile needs {needed}, which does not work here ({why}); leave it out") from None
    return compiled


def use(functions: dict[str, Callable]) -> None:
    """Let ops.NAME be these functions from now on."""
    globals().update(functions)
    experts.weighted_swiglu = weighted_swiglu  # which ops/lora.py calls
