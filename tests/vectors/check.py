"""Check this repository, or a port of it, against the vectors in this folder.

    python tests/vectors/check.py                                # this repository, through ours.py
    python tests/vectors/check.py --module examples.numpy_moe    # a port, found from this or the current folder

A port is a module with any of the functions below. Arguments are passed by keyword. They are numpy arrays (float64 or
int64), numbers, strings, None, and dicts and lists of these. Results are the same; numpy.asarray must be able to read
an array. A function that the module lacks, or that raises NotImplementedError for a kind, counts as "not offered".
`grad_y` is the gradient of the loss by y. The gradients of other inputs are returned under the names of the inputs. A
gradient that is zero is an array of zeros, not None. make.py says where the expected values come from.

    select_experts(policy, scores [L, E], num_hot, coverage, seed) -> bool [L, E]
    init_A(seed, name, r, fan_in) -> [r, fan_in]
    route(router_logits [T, E], top_k, norm_topk_prob, topk_before_softmax) -> {"selected_experts", "weights"}
        both [T, K], by falling weight
    linear(kind, x [T, in], W [out, in], bias [out] or None, factors, alpha, grad_y [T, out]) -> {"y", "x", "factors"}
        kind "lora": factors {"A" [r, in], "B" [out, r]}. kind "dora": also "m" [out], the magnitudes. kind "lori": "A"
        is frozen; "B" [p] holds the entries of B [out, r] at the flat "positions" [p], row by row; the others are zero
    expert(kind, x [T, D], W, factors, alpha, grad_y [T, D]) -> {"y", "x", "factors"}
        W {"gate_proj" [F, D], "up_proj" [F, D], "down_proj" [D, F]}; factors: for each of them a pair as in `linear`
    moe_layer(x [T, D], router [E, D], W, hot [n], factors, alpha, top_k, norm_topk_prob, grad_y [T, D])
        -> {"y", "selected_experts" [T, K], "x", "factors"}
        W as in `expert`, stacked [E, ...]; factors of the n hot experts stacked [n, ...], by rising id as in `hot`;
        factors["router"] is the router's own pair
    kept_entries(matrices: name -> B, share) -> name -> positions in the flat B, rising
    dr_lora_observe(usage [E], score [E], ranks [E], counts [E], B, grad_B) -> {"usage", "score", "saliency", "grad_B"}
        B and grad_B: lists of the projections, each [E, out, r_max]; usage and score before the step, and after it
    dr_lora_grow(saliency [E], ranks [E], quota, cap, budget, r_max) -> ranks [E]
        quota and budget of the layer, cap per expert and growth
    batch_loss(table [V, V], sequences, prompt_lengths, micro_batch) -> {"loss", "table"}
        table[a] holds the logits of the token after a; the loss is the mean over the target tokens of all sequences
    gsm8k_verdict(rule, completion, answer) -> {"found": the text of the number or None, "correct": bool}
    pass_at_k(num_samples, num_passed, k) -> float
    refuses(rule, completion, as_published) -> bool

Exit status: 0 all that is offered is right; 1 something is wrong; 2 the module cannot be used.
"""

import importlib
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

VECTORS = Path(__file__).resolve().parent
sys.path[:0] = [str(VECTORS.parent.parent), str(VECTORS)]  # the repository, and ours.py

from command.cli import InputError, RunError, flag, number, parse, run, say  # noqa: E402


@dataclass(frozen=True)
class Settings:
    module: str = flag("ours", "dotted name of the module to check")
    tolerance: float = flag(
        1e-5, "largest error of an array, as a share of its largest entry", type=number(float, 0, above=True)
    )


def as_arrays(value: Any) -> Any:
    """JSON as a port receives it: rectangular lists of numbers become arrays."""
    if isinstance(value, dict):
        return {key: as_arrays(part) for key, part in value.items()}
    if not isinstance(value, list):
        return value
    try:
        array = np.array(value)
    except ValueError:  # ragged
        return [as_arrays(part) for part in value]
    return array if array.dtype.kind in "bif" else [as_arrays(part) for part in value]


def errors(got: Any, want: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """What is compared, and how far it is off: an error relative to the largest entry, or infinity."""
    if isinstance(want, dict):
        for key, part in want.items():
            path = f"{where}.{key}" if where else key
            if isinstance(got, dict) and key in got:
                yield from errors(got[key], part, path)
            else:
                yield f"{path} is missing", math.inf
    elif isinstance(want, list):
        if not isinstance(got, (list, tuple)) or len(got) != len(want):
            yield f"{where} is not a list of {len(want)}", math.inf
            return
        for i, (one, other) in enumerate(zip(got, want, strict=True)):
            yield from errors(one, other, f"{where}[{i}]")
    elif isinstance(want, str | bool | None):
        got = bool(got) if isinstance(got, np.bool_) else got
        equal = type(got) is type(want) and got == want
        yield f"{where or 'the result'} is {got!r}, not {want!r}", 0.0 if equal else math.inf
    else:
        yield from array_errors(got, np.asarray(want), where or "the result")


def array_errors(got: Any, want: np.ndarray, where: str) -> Iterator[tuple[str, float]]:
    """As `errors`, of an array or a number."""
    if got is None:
        yield f"{where} is None", math.inf
        return
    got = np.asarray(got)
    if got.shape != want.shape:
        yield f"{where} has the shape {list(got.shape)}, not {list(want.shape)}", math.inf
    elif want.dtype.kind != "f":
        yield f"{where} is not equal", 0.0 if np.array_equal(got, want) else math.inf
    elif want.size:
        off, largest = float(np.abs(got - want).max()), float(np.abs(want).max())
        error = off / (largest or 1.0)
        yield f"{where} is off by {error:.1e} of its largest entry", math.inf if math.isnan(error) else error


@dataclass
class Verdict:
    """What came of the cases of one function."""

    function: str
    passed: int = 0
    not_offered: int = 0
    error: float = 0.0  # the largest of the cases that passed
    failures: tuple[str, ...] = ()  # one line for each case that failed

    def __str__(self) -> str:
        parts = [f"{self.passed} passed"] if self.passed else []
        parts += [f"{len(self.failures)} FAILED"] if self.failures else []
        parts += [f"{self.not_offered} not offered"] if self.not_offered and (self.passed or self.failures) else []
        text = f"{self.function:16s} {', '.join(parts) or 'not offered'}"
        return text + (f", largest error {self.error:.0e}" if self.error else "")


def check_function(module: ModuleType, name: str, tolerance: float = 1e-5) -> Verdict:
    """Run the cases of one function. `module` may be anything that has the functions as attributes."""
    verdict, function = Verdict(name), getattr(module, name, None)
    for case in json.loads((VECTORS / f"{name}.json").read_text())["cases"]:
        if function is None:
            verdict.not_offered += 1
            continue
        try:
            got = function(**as_arrays(case["inputs"]))
            found = list(errors(got, as_arrays(case["outputs"])))
        except NotImplementedError:
            verdict.not_offered += 1
            continue
        except Exception as error:
            found = [(f"raised {type(error).__name__}: {error}", math.inf)]
        wrong = [text for text, error in found if error > tolerance]
        if wrong:
            verdict.failures += (f"{case['name']}: {'; '.join(wrong)}",)
        else:
            verdict.passed += 1
            verdict.error = max([verdict.error, *(error for _, error in found)])
    return verdict


def functions() -> list[str]:
    return sorted(path.stem for path in VECTORS.glob("*.json"))


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, prog="tests/vectors/check.py", description=__doc__.partition("\n")[0])
    if not all(part.isidentifier() for part in settings.module.split(".")):
        raise InputError(f"--module {settings.module} is not a dotted name; want one such as examples.numpy_moe")
    if settings.module != "ours":
        sys.path.insert(0, "")  # the current folder comes first
    try:
        module = importlib.import_module(settings.module)
    except ImportError as error:
        raise InputError(f"--module {settings.module} cannot be imported ({error})") from None
    say(f"checking {getattr(module, '__file__', None) or settings.module}")
    verdicts = [check_function(module, name, settings.tolerance) for name in functions()]
    for verdict in verdicts:
        say(str(verdict), *(f"    {line}" for line in verdict.failures))
    if not any(verdict.passed or verdict.failures for verdict in verdicts):
        raise InputError(f"{settings.module} offers none of the functions {', '.join(functions())}")
    if failed := sum(len(verdict.failures) for verdict in verdicts):
        raise RunError(f"{failed} cases failed")


if __name__ == "__main__":
    run(main)
