"""The vectors for ports: ours and the numpy port pass, and each common mistake of a port is caught."""

import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from command.cli import InputError, run
from examples import numpy_moe

ROOT = Path(__file__).resolve().parent.parent
VECTORS = ROOT / "tests/vectors"
sys.path.insert(0, str(VECTORS))

import check  # noqa: E402
import make  # noqa: E402
import ours  # noqa: E402


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """Whatever a check puts on sys.path is gone after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("name", check.functions())
def test_ours_passes_every_vector(name):
    verdict = check.check_function(ours, name)
    assert (verdict.failures, verdict.not_offered) == ((), 0)


def test_the_numpy_port_passes_what_it_offers_and_the_rest_is_not_offered(capsys):
    check.main(["--module", "examples.numpy_moe", "--tolerance", "1e-12"])
    place, *lines = capsys.readouterr().out.splitlines()
    assert place == f"checking {ROOT / 'examples/numpy_moe.py'}"
    found = {line.split()[0]: line for line in lines}
    assert found.keys() == set(check.functions())
    assert {name for name, line in found.items() if not line.endswith(" not offered")} == {"moe_layer", "route"}
    assert "3 passed" in found["moe_layer"]


def test_the_plain_loop_of_the_numpy_port_passes_the_layers_vectors_too():
    plain = SimpleNamespace(moe_layer=lambda **inputs: numpy_moe.moe_layer(**inputs, experts=numpy_moe.one_by_one))
    verdict = check.check_function(plain, "moe_layer", 1e-12)
    assert (verdict.passed, verdict.failures) == (3, ())


def test_the_numpy_port_is_short_and_says_that_its_two_forms_agree(capsys):
    path = ROOT / "examples/numpy_moe.py"
    assert len(path.read_text().splitlines()) <= 120
    runpy.run_path(str(path), run_name="__main__")
    assert "Both forms agree: y and 9 gradients" in capsys.readouterr().out


@pytest.mark.parametrize("writer", make.WRITERS, ids=lambda writer: writer.__name__)
def test_the_files_hold_what_the_plain_formulas_give(writer):
    stored, made = json.loads((VECTORS / f"{writer.__name__}.json").read_text()), json.loads(make.content(writer))
    for one, other in zip(stored["cases"], made["cases"], strict=True):
        found = list(check.errors(check.as_arrays(one.pop("outputs")), check.as_arrays(other.pop("outputs"))))
        assert found and all(error < 1e-12 for _, error in found)  # libraries differ in the last digit of exp
    assert stored == made


def test_the_files_are_small_and_no_other_than_are_made():
    assert check.functions() == sorted(writer.__name__ for writer in make.WRITERS)
    assert sum(path.stat().st_size for path in VECTORS.glob("*.json")) < 150_000


# ------------------------------------------------------------------------------------------- wrong ports

WRONG: dict[str, tuple[str, Callable]] = {}  # what is wrong -> the vectors that must catch it, the wrong function


def wrong(function: str, name: str) -> Callable:
    """Register a port with one mistake. It gets the inputs of the vectors by name."""

    def register(port: Callable) -> Callable:
        WRONG[name] = function, port
        return port

    return register


def changed(function: str, **changes: Callable) -> Callable:
    """Our function with some of its inputs changed: each change gets all inputs, and returns the new one."""
    return lambda **inputs: getattr(ours, function)(
        **inputs | {name: change(SimpleNamespace(**inputs)) for name, change in changes.items()}
    )


def swapped(W: dict) -> dict:
    return W | {"gate_proj": W["up_proj"], "up_proj": W["gate_proj"]}


def reordered(pair: dict) -> dict:
    return {"A": pair["A"][::-1], "B": pair["B"][::-1]}


def ties_to_the_higher_id(scores: np.ndarray, **rest) -> np.ndarray:
    return ours.select_experts(scores=scores[:, ::-1].copy(), **rest)[:, ::-1]


MISREAD = {  # what is wrong -> the vectors, and inputs as a wrong port reads them
    "gate and up swapped, in an expert": ("expert", {"W": lambda i: swapped(i.W)}),
    "gate and up swapped, in a layer": ("moe_layer", {"W": lambda i: swapped(i.W)}),
    "renormalisation left out": ("route", {"norm_topk_prob": lambda i: False}),
    "renormalisation left out, in a layer": ("moe_layer", {"norm_topk_prob": lambda i: False}),
    "top-k before softmax": ("route", {"topk_before_softmax": lambda i: True}),
    "softmax before top-k": (
        "route",
        {
            "norm_topk_prob": lambda i: i.norm_topk_prob or i.topk_before_softmax,
            "topk_before_softmax": lambda i: False,
        },
    ),
    "renormalisation too much, in a layer": ("moe_layer", {"norm_topk_prob": lambda i: True}),
    "scale alpha / r left out": ("linear", {"alpha": lambda i: len(i.factors["A"])}),
    "alpha in place of alpha / r": ("moe_layer", {"alpha": lambda i: i.alpha * len(i.factors["router"]["A"])}),
    "B read as its transpose": (
        "linear",
        {"factors": lambda i: i.factors | {"B": i.factors["B"].reshape(i.factors["B"].shape[::-1]).T}},
    ),
    "factors not in rising order of the ids": (
        "moe_layer",
        {"factors": lambda i: {n: pair if n == "router" else reordered(pair) for n, pair in i.factors.items()}},
    ),
    "adapters on the first experts": ("moe_layer", {"hot": lambda i: np.arange(len(i.hot))}),
    "the hottest for the coldest": (
        "select_experts",
        {"policy": lambda i: i.policy.replace("cold", "hot")},
    ),
    "coverage of the sum over layers": ("select_experts", {"scores": lambda i: i.scores / i.scores.sum(0)}),
    "a constant seed": ("select_experts", {"seed": lambda i: 0}),
    "the same A for every matrix": ("init_A", {"name": lambda i: ""}),
    "LoRI's positions column by column": (
        "expert",
        {"factors": lambda i: {name: by_column(i.kind, pair) for name, pair in i.factors.items()}},
    ),
    "one more entry kept": ("kept_entries", {"share": lambda i: i.share + 0.03}),
    "loss on the prompt": ("batch_loss", {"prompt_lengths": lambda i: np.ones_like(i.prompt_lengths)}),
    "decayed score not divided by the rank": ("dr_lora_observe", {"ranks": lambda i: np.ones_like(i.ranks)}),
    "no cap per growth": ("dr_lora_grow", {"cap": lambda i: i.r_max}),
    "budget ignored": ("dr_lora_grow", {"budget": lambda i: 100}),
    "LoRI's answer rule for all": ("gsm8k_verdict", {"rule": lambda i: "lori"}),
    "phrases in any case": ("refuses", {"completion": lambda i: i.completion.capitalize()}),
    "typographic apostrophes not seen": ("refuses", {"as_published": lambda i: True}),
}


def by_column(kind: str, pair: dict) -> dict:
    if kind != "lori":
        return pair
    r, out = len(pair["A"]), 4
    return pair | {"positions": (pair["positions"] % out) * r + pair["positions"] // out}


WRONG |= {name: (function, changed(function, **changes)) for name, (function, changes) in MISREAD.items()}
WRONG["ties to the higher id"] = "select_experts", ties_to_the_higher_id


@wrong("select_experts", "one hot set for all layers")
def same_in_all_layers(policy, **rest):
    return ours.select_experts(policy="model-hot" if policy == "hot" else policy, **rest)


@wrong("dr_lora_grow", "ties to the higher id, in a growth")
def last_first(saliency, ranks, **rest):
    return ours.dr_lora_grow(saliency[::-1].copy(), ranks[::-1].copy(), **rest)[::-1]


@wrong("moe_layer", "no gradient for an expert without tokens")
def none_for_idle(**inputs):
    found = ours.moe_layer(**inputs)
    return found | {"factors": {n: p if p["A"].any() else {"A": None, "B": None} for n, p in found["factors"].items()}}


@wrong("moe_layer", "router's pair not trained")
def frozen_router(**inputs):
    found = ours.moe_layer(**inputs)
    router = {part: np.zeros_like(gradient) for part, gradient in found["factors"]["router"].items()}
    return found | {"factors": found["factors"] | {"router": router}}


def dora(kind, x, W, bias, factors, alpha, grad_y, norm_is_constant: bool, bias_is_scaled: bool) -> dict:
    """DoRA on a linear layer by autograd, with two mistakes to choose from."""
    if kind != "dora":
        raise NotImplementedError
    x, A, B, m = (torch.tensor(array, requires_grad=True) for array in (x, factors["A"], factors["B"], factors["m"]))
    merged = torch.tensor(W) + alpha / len(A) * B @ A
    norm = merged.norm(dim=1)
    scale, b = m / (norm.detach() if norm_is_constant else norm), torch.tensor(0.0 if bias is None else bias)
    y = (x @ merged.T + b) * scale if bias_is_scaled else x @ merged.T * scale + b
    y.backward(torch.tensor(grad_y))
    gradients = {"A": A.grad.numpy(), "B": B.grad.numpy(), "m": m.grad.numpy()}
    return {"y": y.detach().numpy(), "x": x.grad.numpy(), "factors": gradients}


WRONG["DoRA's norm has a gradient"] = "linear", lambda **i: dora(**i, norm_is_constant=False, bias_is_scaled=False)
WRONG["DoRA scales the bias"] = "linear", lambda **i: dora(**i, norm_is_constant=True, bias_is_scaled=True)


def test_dora_without_the_two_mistakes_passes():
    right = SimpleNamespace(linear=lambda **i: dora(**i, norm_is_constant=True, bias_is_scaled=False))
    verdict = check.check_function(right, "linear", 1e-12)
    assert (verdict.passed, verdict.not_offered, verdict.failures) == (2, 3, ())


@wrong("kept_entries", "a threshold for each matrix")
def own_threshold(matrices, share):
    return {name: found for key, B in matrices.items() for name, found in ours.kept_entries({key: B}, share).items()}


@wrong("batch_loss", "mean of the micro-batches' means")
def mean_of_means(table, sequences, prompt_lengths, micro_batch):
    starts = range(0, len(sequences), micro_batch)
    parts = [slice(start, start + micro_batch) for start in starts]
    found = [ours.batch_loss(table, sequences[part], prompt_lengths[part], micro_batch) for part in parts]
    return {key: sum(one[key] for one in found) / len(found) for key in ("loss", "table")}


@wrong("dr_lora_observe", "dimensions that do not train have a gradient")
def unmasked(grad_B, **rest):
    return ours.dr_lora_observe(grad_B=[gradient.copy() for gradient in grad_B], **rest) | {"grad_B": grad_B}


@wrong("dr_lora_observe", "saliency without the exponent")
def no_exponent(ranks, **rest):
    found = ours.dr_lora_observe(ranks=ranks, **rest)
    return found | {"saliency": found["saliency"] * (ranks + 1.0) ** 0.2}


@wrong("gsm8k_verdict", "answers compared as text")
def as_text(rule, completion, answer):
    found = ours.gsm8k_verdict(rule, completion, answer)["found"]
    return {"found": found, "correct": found == answer}


@wrong("pass_at_k", "pass@k with replacement")
def with_replacement(num_samples, num_passed, k):
    return 1 - (1 - num_passed / num_samples) ** k


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_port_is_caught(name):
    function, port = WRONG[name]
    failures = check.check_function(SimpleNamespace(**{function: port}), function).failures
    assert failures and not any(": raised " in line for line in failures), failures  # wrong, and not merely broken


# ------------------------------------------------------------------------------------------- the command


def test_a_wrong_port_ends_with_status_1_and_names_the_case_and_the_array(tmp_path, monkeypatch, capsys):
    (tmp_path / "half_right_port.py").write_text(
        "def pass_at_k(num_samples, num_passed, k):\n    return num_passed / num_samples\n\n"
        "def route(router_logits, top_k, **rest):\n    return {'weights': router_logits[:, :top_k]}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(lambda: check.main(["--module", "half_right_port"]))
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and err == "error: 9 cases failed\n"
    assert "pass_at_k        2 passed, 4 FAILED" in out and "2 of 5 pass, k 3: the result is off by" in out
    assert "renormalised: selected_experts is missing; weights is off by" in out
    assert "linear           not offered" in out


@pytest.mark.parametrize("module", ["no_such_port", "json", "sys", "examples/numpy_moe.py"])
def test_a_module_without_our_functions_is_wrong_input(module):
    with pytest.raises(InputError, match=module):
        check.main(["--module", module])
