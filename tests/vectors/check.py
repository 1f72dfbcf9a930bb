"""Check this project, a port of it, or the exercises against the values in this folder.

    python tests/vectors/check.py                                              # this project, through ours.py
    python tests/vectors/check.py --module examples/exercises/skeleton.py      # functions: a file, or a dotted name
    python tests/vectors/check.py --model my_port                              # a whole model, layer by layer

A port is a module with any of the functions below. Arguments are passed by keyword. They are numpy arrays (float64 or
int64), numbers, strings, None, and dicts and lists of these. Results are the same; numpy.asarray must be able to read
an array. `grad_y` is the gradient of the loss by y. Gradients of inputs are returned under the names of the inputs. A
gradient that is zero is an array of zeros, not None. make.py says where the expected values come from.

A function that the module lacks counts as "not offered". So does a kind for which it raises NotImplementedError. It may
leave out gradients, and arguments: it is then called where these are kind "lora", policy "hot", no bias, no coverage,
seed 0, norm_topk_prob and topk_before_softmax False. Where a result is wrong, it is compared with those of the usual
mistakes (mistakes.py).

    route(router_logits [T, E], top_k, norm_topk_prob, topk_before_softmax) -> {"selected_experts", "weights"}
        both [T, K], by falling weight
    count_experts(selected_experts [L, B, S, K], lengths [B], num_experts) -> [L, E]
        the first lengths[b] tokens of sequence b are real, the others padding
    select_experts(policy, scores [L, E], num_hot, coverage, seed) -> bool [L, E]
    init_A(seed, name, r, fan_in) -> [r, fan_in]
    linear(kind, x [T, in], W [out, in], bias [out] or None, factors, alpha, grad_y [T, out]) -> {"y", "x", "factors"}
        kind "lora": factors {"A" [r, in], "B" [out, r]}. kind "dora": also "m" [out], the magnitudes. kind "lori": "A"
        is frozen; "B" [p] holds the entries of B [out, r] at the flat "positions" [p], row by row; the others are zero
    expert(kind, x [T, D], W, factors, alpha, grad_y [T, D]) -> {"y", "x", "factors"}
        W {"gate_proj" [F, D], "up_proj" [F, D], "down_proj" [D, F]}; factors: for each of them a pair as in `linear`
    moe_layer(x [T, D], router [E, D], W, hot [n], factors, alpha, top_k, norm_topk_prob, grad_y [T, D])
        -> {"y", "selected_experts" [T, K], "x", "factors"}
        W as in `expert`, stacked [E, ...]; factors of the n hot experts stacked [n, ...], by rising id as in `hot`;
        factors["router"] is the router's own pair
    batch_loss(table [V, V], sequences, prompt_lengths, micro_batch) -> {"loss", "table"}
        table[a] holds the logits of the token after a; the loss is the mean over the target tokens of all sequences
    kept_entries(matrices: name -> B, share) -> name -> positions in the flat B, rising
    merge(W [out, in], factors, alpha) -> [out, in]
    packed_deltas(lora_A, lora_B, num_experts, alpha, before_peft_0_19) -> [E, out, in]
        of the pair that PEFT saves for the stack of a layer's E experts: lora_A [E r, in], lora_B [out, r E]. Before
        PEFT 0.19 lora_A is [E r, out] and lora_B [in, r E]
    dr_lora_observe(usage [E], score [E], ranks [E], counts [E], B, grad_B) -> {"usage", "score", "saliency", "grad_B"}
        B and grad_B: lists of the projections, each [E, out, r_max]; usage and score before the step, and after it
    dr_lora_grow(saliency [E], ranks [E], quota, cap, budget, r_max) -> ranks [E]
        quota and budget of the layer, cap per expert and growth
    gsm8k_verdict(rule, completion, answer) -> {"found": the text of the number or None, "correct": bool}
    pass_at_k(num_samples, num_passed, k) -> float
    refuses(rule, completion, as_published) -> bool

--model checks functions that run the model in tiny/ (`folder`), in this order, and stops where one first differs:

    forward(folder, input_ids [B, S], lengths [B]) -> any of these; what stands at padding is not compared
        "hidden_states" [1 + layers, B, S, D]: the embeddings, then the output of each layer
        "after_attention" [layers, B, S, D]: the residual stream between attention and experts
        "selected_experts" [L, B, S, K] and "weights" [L, B, S, K]
        "logits" [B, S, V]
    counts(folder, input_ids, lengths) -> [L, E], as in `count_experts`
    train_step(folder, input_ids, lengths, prompt_lengths [B], factors, alpha, lr) -> any of these
        "loss": the mean over the tokens behind the prompts. "gradients" and "updated": name -> {"A", "B"}, before
        clipping, and after one step of AdamW without weight decay or clipping
        factors: name -> {"A" [r, in], "B" [out, r]}, the names as in layers.0.mlp.experts.5.gate_proj

Exit status: 0 all that is offered is right; 1 something is wrong; 2 the module cannot be used.
"""

import importlib
import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

VECTORS = Path(__file__).resolve().parent
sys.path.append(str(VECTORS.parent.parent))  # at the end: the modules of a port come before those of this project

import whole_model  # noqa: E402
from whole_model import our_module  # noqa: E402

from command.cli import InputError, RunError, flag, number, parse, run, say  # noqa: E402

FUNCTIONS = (
    "route", "count_experts", "select_experts", "init_A", "linear", "expert", "moe_layer", "batch_loss",
    "kept_entries", "merge", "packed_deltas", "dr_lora_observe", "dr_lora_grow", "gsm8k_verdict", "pass_at_k",
    "refuses",
)  # fmt: skip
UNWRITTEN = "the function returns nothing yet"
GRADIENTS = {"x", "factors", "table"}  # results that may be left out
PLAIN = {  # what an argument is where a function may leave it out
    "kind": "lora", "policy": "hot", "bias": None, "coverage": None, "seed": 0, "norm_topk_prob": False,
    "topk_before_softmax": False,
}  # fmt: skip


@dataclass(frozen=True)
class Settings:
    module: str | None = flag(None, "file or dotted name of the module with functions to check", metavar="MODULE")
    model: str | None = flag(None, "file or dotted name of the module with a model to check", metavar="MODULE")
    tolerance: float = flag(
        1e-5, "largest error of a function's array, as a share of its largest entry", type=number(float, 0, above=True)
    )


# ------------------------------------------------------------------------------------------------- comparing


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


def errors(got: Any, expected: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """What is compared, and how far it is off: an error relative to the largest entry, or infinity."""
    if isinstance(expected, dict):
        for key, part in expected.items():
            path = f"{where}.{key}" if where else key
            if isinstance(got, dict) and key in got:
                yield from errors(got[key], part, path)
            elif where or key not in GRADIENTS:
                yield f"{path} is missing", math.inf
    elif isinstance(expected, list):
        if not isinstance(got, (list, tuple)) or len(got) != len(expected):
            yield f"{where} is not a list of {len(expected)}", math.inf
            return
        for i, (one, other) in enumerate(zip(got, expected, strict=True)):
            yield from errors(one, other, f"{where}[{i}]")
    elif isinstance(expected, str | bool | None):
        got = bool(got) if isinstance(got, np.bool_) else got
        equal = type(got) is type(expected) and got == expected
        yield f"{where or 'the result'} is {got!r}, not {expected!r}", 0.0 if equal else math.inf
    else:
        yield from array_errors(got, np.asarray(expected), where or "the result")


def array_errors(got: Any, expected: np.ndarray, where: str) -> Iterator[tuple[str, float]]:
    """As `errors`, of an array or a number."""
    if got is None:
        yield f"{where} is None", math.inf
        return
    got = np.asarray(got)
    if got.shape != expected.shape:
        yield f"{where} has the shape {list(got.shape)}, not {list(expected.shape)}", math.inf
    elif expected.dtype.kind != "f":
        yield f"{where} is not equal", 0.0 if np.array_equal(got, expected) else math.inf
    elif expected.size:
        off, largest = float(np.abs(got - expected).max()), float(np.abs(expected).max())
        error = off / (largest or 1.0)
        yield f"{where} is off by {error:.1e} of its largest entry", math.inf if math.isnan(error) else error


# ------------------------------------------------------------------------------------------------- functions


@dataclass
class Verdict:
    """What came of the cases of one function."""

    function: str
    passed: int = 0
    not_offered: int = 0
    error: float = 0.0  # the largest of the cases that passed
    failures: tuple[str, ...] = ()  # one line for each case that failed
    looks_like: tuple[str, ...] = ()  # mistakes that give the same wrong results

    def __str__(self) -> str:
        parts = [f"{self.passed} passed"] if self.passed else []
        parts += [f"{len(self.failures)} FAILED"] if self.failures else []
        parts += [f"{self.not_offered} not offered"] if self.not_offered else []
        text = f"{self.function:16s} {', '.join(parts)}"
        return text + (f", largest error {self.error:.0e}" if self.error else "")

    def lines(self) -> list[str]:
        failures = [f"    {line}" for line in self.failures]
        return [str(self), *failures, *(f"    This looks like: {mistake}." for mistake in self.looks_like)]


def call(function: Callable, inputs: dict) -> Any:
    """The function's result for those inputs that it takes. NotImplementedError: it takes too few for this case."""
    parameters = inspect.signature(function).parameters.values()
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
        taken = {parameter.name for parameter in parameters}
        if any(not np.array_equal(inputs[name], PLAIN[name]) for name in (inputs.keys() & PLAIN.keys()) - taken):
            raise NotImplementedError
        inputs = {name: value for name, value in inputs.items() if name in taken}
    return function(**inputs)


def check_function(module: ModuleType, name: str, tolerance: float = 1e-5) -> Verdict:
    """Run the cases of one function. `module` may be anything that has the functions as attributes."""
    verdict, function = Verdict(name), getattr(module, name, None)
    wrong_results, returned = [], False
    for case in json.loads((VECTORS / f"{name}.json").read_text())["cases"]:
        if function is None:
            verdict.not_offered += 1
            continue
        try:
            got = call(function, as_arrays(case["inputs"]))
            compared = list(errors(got, as_arrays(case["outputs"])))
        except NotImplementedError:
            verdict.not_offered += 1
            continue
        except Exception as error:
            got, compared = error, [(f"raised {type(error).__name__}: {error}", math.inf)]
        wrong = [text for text, error in compared if error > tolerance]
        if wrong:
            verdict.failures += (f"{case['name']}: {'; '.join(wrong)}",)
            wrong_results.append((case, got))
        else:
            verdict.passed += 1
            verdict.error = max([verdict.error, *(error for _, error in compared)])
        returned = returned or got is not None
    if verdict.failures and not returned:
        verdict.failures = (UNWRITTEN,)
    if returned and wrong_results:
        verdict.looks_like = tuple(likely_mistakes(name, wrong_results, tolerance))
    return verdict


def likely_mistakes(name: str, wrong_results: list[tuple[dict, Any]], tolerance: float) -> Iterator[str]:
    """The mistakes that give the same results in all cases that failed."""
    of_function = [
        (mistake, wrong) for function, mistake, wrong in our_module("mistakes").FUNCTIONS if function == name
    ]
    for mistake, wrong in of_function:
        mistaken = ((got, plain(wrong(**as_arrays(case["inputs"])))) for case, got in wrong_results)
        if all(error <= max(tolerance, 1e-5) for got, same in mistaken for _, error in errors(got, same)):
            yield mistake


def plain(value: Any) -> Any:
    """A result as `errors` expects it."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, list | tuple) else value


# ------------------------------------------------------------------------------------------------- the command


def load(name: str, flag_name: str) -> ModuleType:
    """A module by the name of its file, or by its dotted name; the current folder comes first."""
    path = Path(name)
    if path.suffix == ".py" and path.is_file():
        sys.path.insert(0, str(path.resolve().parent))  # for what it imports
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    if not all(part.isidentifier() for part in name.split(".")) or path.suffix == ".py":
        raise InputError(f"{flag_name} {name}: expected a file.py that exists, or a dotted name such as my_port.layer")
    if name == "ours":
        return our_module(name)
    sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"{flag_name} {name} cannot be imported ({error})") from None


def check_functions(module: ModuleType, name: str, tolerance: float) -> int:
    """Print what came of every function.  -> the number of cases that failed"""
    verdicts = [check_function(module, function, tolerance) for function in FUNCTIONS]
    missing = [verdict.function for verdict in verdicts if not verdict.passed and not verdict.failures]
    if len(missing) == len(FUNCTIONS):
        raise InputError(f"--module {name} offers none of the functions {', '.join(FUNCTIONS)}")
    for verdict in verdicts:
        if verdict.function not in missing:
            say(*verdict.lines())
    if missing:
        say(f"not offered      {', '.join(missing)}")
    return sum(len(verdict.failures) for verdict in verdicts)


def main(argv: list[str] | None = None) -> None:
    settings = parse(Settings, argv, prog="tests/vectors/check.py", description=__doc__.partition("\n")[0])
    both = settings.module is settings.model is None
    failed = 0
    if name := settings.module or ("ours" if both else None):
        module = load(name, "--module")
        say(f"checking {getattr(module, '__file__', None) or name}")
        failed += check_functions(module, name, settings.tolerance)
    if name := settings.model or ("ours" if both else None):
        module = load(name, "--model")
        say(f"checking the model of {getattr(module, '__file__', None) or name}")
        if not any(hasattr(module, function) for function in whole_model.FUNCTIONS):
            raise InputError(f"--model {name} offers none of the functions {', '.join(whole_model.FUNCTIONS)}")
        lines = list(whole_model.check(module))
        say(*(line for line, _ in lines))
        failed += any(is_failure for _, is_failure in lines)
    if failed:
        raise RunError(f"{failed} cases failed" if failed > 1 else "1 case failed")


if __name__ == "__main__":
    run(main)
