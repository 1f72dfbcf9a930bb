"""Optimised versions of the reference formulas in model.py and lora.py: same names, arguments, values and gradients.

    HELLORA_PLAIN=1 python train.py        # every command can run on the formulas as they stand
    python train.py --compile              # those of ELEMENTWISE, each compiled into one kernel

The layers call ops.NAME. tests/test_ops.py checks that each optimised version equals its formula.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn as nn

from command.errors import InputError, first_line
from ops import attention, experts, head, lora

OPTIMISED = {
    "attend": attention.attend,
    "attend_to_batch": attention.attend_to_batch,
    "grouped_linear": experts.grouped_linear,
    "lora_down": lora.lora_down,
    "lora_gate_up": lora.lora_gate_up,
    "target_loss": head.target_loss,
    "weighted_swiglu": experts.weighted_swiglu,
}
ELEMENTWISE = ("rms_norm", "rotate", "weighted_swiglu")  # formulas on single entries, or on the entries of a row
PLAIN = os.environ.get("HELLORA_PLAIN") == "1"
FORMULAS: dict[str, Callable] = {}


def reference(formula: Callable) -> Callable:
    """Marks the reference formula of ops.NAME. It is ops.NAME with HELLORA_PLAIN=1, or where nothing is faster."""
    FORMULAS[formula.__name__] = formula
    globals()[formula.__name__] = formula if PLAIN else OPTIMISED.get(formula.__name__, formula)
    return formula


def compile_elementwise(device: torch.device, dtype: torch.dtype) -> dict[str, Callable]:
    """The formulas of ELEMENTWISE by name, of each of which torch.compile makes one kernel forward and one backward.

    Their values are the formulas' up to rounding. Raises InputError if this machine cannot compile.
    """
    torch._dynamo.config.recompile_limit = 32  # with and without gradients, for norms of tokens and of heads, ...
    options = {"emulate_precision_casts": True}  # bfloat16 is rounded where the formula rounds
    compiled = {name: torch.compile(FORMULAS[name], dynamic=True, options=options) for name in ELEMENTWISE}
    x = torch.ones(2, 3, 4, dtype=dtype, device=device, requires_grad=True)  # [T, H, Dh]
    frozen = nn.Parameter(torch.ones(4, dtype=dtype, device=device), requires_grad=False)
    cos = torch.ones(2, 1, 4, dtype=dtype, device=device)
    examples = (x[0], frozen, 1e-5), (x, cos, cos), (x[0], x[0, :, :1])
    try:
        for formula, example in zip(compiled.values(), examples, strict=True):
            formula(*example).sum().backward()
    except Exception as error:  # of any kind: compilers fail in many ways
        needed = "Triton" if device.type == "cuda" else "a C++ compiler such as g++"
        raise InputError(
            f"--compile needs {needed}, which does not work here ({first_line(error)}); leave it out"
        ) from None
    return compiled


@contextmanager
def using(functions: dict[str, Callable]) -> Iterator[None]:
    """Meanwhile, ops.NAME is the function of that name."""
    before = {name: globals()[name] for name in functions}
    put(functions)
    try:
        yield
    finally:
        put(before)


def put(functions: dict[str, Callable]) -> None:
    globals().update(functions)
    if "weighted_swiglu" in functions:
        experts.weighted_swiglu = functions["weighted_swiglu"]  # which `lora_down` calls
