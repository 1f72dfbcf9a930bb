"""The vectors for ports: ours and the numpy port pass, and each common mistake of a port is caught."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import call, read_json

from command.cli import InputError, run
from examples import numpy_moe

ROOT = Path(__file__).resolve().parent.parent
VECTORS = ROOT / "tests/vectors"
sys.path.insert(0, str(VECTORS))

import check  # noqa: E402
import make  # noqa: E402
import make_whole_model  # noqa: E402
import mistakes  # noqa: E402
import ours  # noqa: E402
import whole_model  # noqa: E402

PAGE = (ROOT / "docs/porting.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def own_path(monkeypatch):
    """Whatever a check puts on sys.path is gone after the test."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.parametrize("name", check.FUNCTIONS)
def test_ours_passes_every_vector(name):
    verdict = check.check_function(ours, name)
    assert (verdict.failures, verdict.not_offered) == ((), 0)


def test_the_numpy_port_passes_what_it_offers_and_the_rest_is_not_offered(capsys):
    call(check, "--module examples.numpy_moe --tolerance 1e-12")
    place, *lines = capsys.readouterr().out.splitlines()
    assert place == f"checking {ROOT / 'examples/numpy_moe.py'}"
    found = {line.split()[0]: line for line in lines}
    assert found.keys() == {"moe_layer", "route", "not"}  # not offered: the others
    assert all(name in found["not"] for name in check.FUNCTIONS if name not in found)
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
    stored, made = read_json(VECTORS / f"{writer.__name__}.json"), json.loads(make.content(writer))
    for one, other in zip(stored["cases"], made["cases"], strict=True):
        found = list(check.errors(check.as_arrays(one.pop("outputs")), check.as_arrays(other.pop("outputs"))))
        assert found and all(error < 1e-12 for _, error in found)  # libraries differ in the last digit of exp
    assert stored == made


def test_the_files_are_small_and_no_other_than_are_made():
    assert sorted(check.FUNCTIONS) == sorted(writer.__name__ for writer in make.WRITERS)
    sizes = {path.stem: path.stat().st_size for path in VECTORS.glob("*.json")}
    assert sizes.pop("whole_model") < 100_000
    assert sizes.keys() == set(check.FUNCTIONS) and sum(sizes.values()) < 150_000


# ------------------------------------------------------------------------------------------- wrong ports


def named(value: object) -> str:
    """A test's name, the same in every process: of a function its name, not its address."""
    return value[:60] if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)


@pytest.mark.parametrize("function, name, wrong", mistakes.FUNCTIONS, ids=named)
def test_a_wrong_function_is_noticed_and_named(function, name, wrong):
    verdict = check.check_function(SimpleNamespace(**{function: wrong}), function)
    assert verdict.failures and not any(": raised " in line for line in verdict.failures)  # wrong, not merely broken
    assert name in verdict.looks_like and len(verdict.looks_like) <= 2


def test_dora_without_the_two_mistakes_passes():
    verdict = check.check_function(SimpleNamespace(linear=mistakes.dora), "linear", 1e-12)
    assert (verdict.passed, verdict.not_offered, verdict.failures) == (5, 0, ())


def test_a_wrong_result_that_no_mistake_gives_has_no_name():
    verdict = check.check_function(SimpleNamespace(merge=lambda W, factors, alpha: W + 1), "merge")
    assert len(verdict.failures) == 2 and verdict.looks_like == ()


def test_arguments_and_gradients_may_be_left_out():
    def linear(x, W, factors, alpha):
        return {"y": x @ (W + alpha / len(factors["A"]) * factors["B"] @ factors["A"]).T}

    verdict = check.check_function(SimpleNamespace(linear=linear), "linear")
    assert (verdict.passed, verdict.not_offered, verdict.failures) == (1, 4, ())  # LoRA without bias, and the rest
    verdict = check.check_function(SimpleNamespace(linear=lambda x, W: {"x": x}), "linear")
    assert "y is missing" in verdict.failures[0]


# ------------------------------------------------------------------------------------------- the whole model


@pytest.fixture(scope="module")
def questions() -> dict:
    return whole_model.questions()


@pytest.fixture(scope="module")
def answers(questions) -> dict:
    """What this project's model answers."""
    return {function: getattr(ours, function)(**arguments) for function, (arguments, *_) in questions.items()}


def port(answers: dict) -> SimpleNamespace:
    """A port that gives these answers."""
    return SimpleNamespace(**{name: lambda answer=answer, **_: answer for name, answer in answers.items()})


def test_the_whole_model_has_every_value(answers):
    assert [(line.split(",")[0], failed) for line, failed in whole_model.check(port(answers))] == [
        ("forward: all 18 values agree", False),
        ("counts: all 4 values agree", False),
        ("train_step: all 225 values agree", False),
    ]


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("name", ["after_attention", "selected_experts", "weights", "hidden_states"])
def test_the_first_layer_that_differs_is_named(answers, layer, name, monkeypatch):
    monkeypatch.setattr(whole_model, "likely", lambda *_: ())
    wrong = {key: np.array(array) for key, array in answers["forward"].items()}
    wrong[name][layer + (name == "hidden_states") :] += 1  # and all that follow
    (line, failed), *_ = whole_model.check(port(answers | {"forward": wrong}))
    step = {"selected_experts": "selected experts", "weights": "routing weights", "hidden_states": "output"}
    assert failed and line.startswith(f"forward: layer {layer}, {step.get(name, 'after attention')} is the first value")


@pytest.mark.parametrize("result", [{}, {"hidden": np.zeros((5, 2, 110, 128))}])
def test_a_model_that_returns_nothing_known_fails(result):
    assert list(whole_model.check(port({"forward": result}))) == [
        ("forward returns nothing that could be compared", True)
    ]


@pytest.mark.parametrize("cut", [np.s_[:-1], np.s_[:, :-1], np.s_[:, :, :-1], np.s_[..., :-1]])
def test_an_array_of_another_shape_differs(answers, cut, monkeypatch):
    monkeypatch.setattr(whole_model, "likely", lambda *_: ())
    for name, array in answers["forward"].items():
        (line, failed), *_ = whole_model.check(port({"forward": {name: array[cut]}}))
        assert failed and "is the first value that differs" in line, name


@pytest.mark.parametrize(
    "change", [lambda x: x * 1.001, lambda x: np.roll(x, 1), lambda x: np.where(x == x.max(), 9, x)]
)
def test_a_description_notices_a_change_of_size_of_order_and_of_one_entry(change):
    x = np.random.default_rng(0).normal(size=(7, 40))
    expected = whole_model.described(x, whole_model.NUM_ENTRIES)
    assert whole_model.error_of(x, expected) == 0
    assert whole_model.error_of(change(x), expected) > whole_model.TOLERANCE


def test_the_order_of_a_tokens_experts_does_not_matter(answers, questions):
    _, compare, _ = questions["forward"]
    turned = {name: answers["forward"][name][..., ::-1] for name in ("selected_experts", "weights")}
    assert max(error for _, error in compare(turned)) < whole_model.TOLERANCE


def test_what_stands_at_padding_does_not_matter(answers, questions):
    arguments, compare, _ = questions["forward"]
    padding = np.arange(arguments["input_ids"].shape[1]) >= arguments["lengths"][:, None]
    other = {name: np.where(padding[..., None], 99, array) for name, array in answers["forward"].items()}
    assert max(error for _, error in compare(other)) < whole_model.TOLERANCE


@pytest.mark.parametrize("function, name, wrong", mistakes.MODELS, ids=named)
def test_a_wrong_model_is_noticed_and_named(function, name, wrong, questions, answers):
    arguments, compare, compare_wrong = questions[function]
    result = wrong(**arguments)
    assert any(error > whole_model.TOLERANCE for _, error in compare(result))
    assert all(error < whole_model.TOLERANCE for _, error in compare_wrong(result, result))
    assert any(error > whole_model.TOLERANCE for _, error in compare_wrong(answers[function], result))


def test_only_the_mistake_that_was_made_is_named(questions):
    arguments, *_ = questions["forward"]
    wrong = {name: wrong for function, name, wrong in mistakes.MODELS if function == "forward"}
    lines = list(whole_model.check(port({"forward": wrong["gate and up swapped"](**arguments)})))
    assert lines[1:] == [("    This looks like: gate and up swapped.", True)]
    assert lines[0][0].startswith("forward: layer 0, output is the first value that differs")


def test_a_wrong_model_ends_with_status_1_and_the_name_of_the_mistake(tmp_path, capsys):
    (tmp_path / "padded_port.py").write_text(
        "import numpy as np\nimport ours\n\n\ndef counts(folder, input_ids, lengths):\n"
        "    return ours.counts(folder, input_ids, np.full_like(lengths, input_ids.shape[1]))\n"
    )
    with pytest.raises(SystemExit) as ended:
        run(lambda: call(check, "--model", tmp_path / "padded_port.py"))
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and err == "error: 1 case failed\n"
    assert "counts: layer 0 is the first value that differs (0 before it agree)" in out
    assert "This looks like: padding is counted." in out


def test_the_values_of_the_whole_model_are_those_of_transformers(questions):
    made, stored = make_whole_model.content(), read_json(whole_model.FILE)
    assert made.keys() == stored.keys()
    for key in ("sequences", "prompt_lengths", "count_sequences", "counts", "pairs", "r", "alpha", "lr"):
        assert made[key] == stored[key], key
    assert made["forward"]["selected_experts"] == stored["forward"]["selected_experts"]
    assert made["step"]["loss"] == pytest.approx(stored["step"]["loss"], rel=1e-5)
    for label, expected in stored["step"].items():
        if label != "loss":
            assert made["step"][label]["norm"] == pytest.approx(expected["norm"], rel=1e-3), label


# ------------------------------------------------------------------------------------------- the page


def test_the_page_lists_mistakes_that_the_vectors_find_and_what_finds_them():
    """A trap whose last column names a function is a mistake of that function; the others need transformers."""
    table = PAGE.partition("## Traps")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| .+ \| (.+?) \|$", table, re.M)[1:]  # after the head
    assert len(rows) > 12
    known = {(name, function) for function, name, _ in mistakes.FUNCTIONS + mistakes.MODELS}
    for trap, finders in rows:
        names = re.findall(r"`(\w+)`", finders)
        assert names or finders == "transformers' logits", trap
        assert all((trap, name) in known for name in names), trap


# ------------------------------------------------------------------------------------------- the command


def test_a_wrong_port_ends_with_status_1_and_names_the_case_and_the_array(tmp_path, monkeypatch, capsys):
    (tmp_path / "half_right_port.py").write_text(
        "def pass_at_k(num_samples, num_passed, k):\n    return num_passed / num_samples\n\n"
        "def route(router_logits, top_k, **rest):\n    return {'weights': router_logits[:, :top_k]}\n"
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        run(lambda: call(check, "--module half_right_port"))
    out, err = capsys.readouterr()
    assert ended.value.code == 1 and err == "error: 9 cases failed\n"
    assert "pass_at_k        2 passed, 4 FAILED" in out and "2 of 5 pass, k 3: the result is off by" in out
    assert "renormalised: selected_experts is missing; weights is off by" in out
    assert "not offered      count_experts, select_experts, init_A, linear, " in out


def test_modules_of_a_port_may_have_the_names_of_ours(tmp_path):
    """The port imports its own, and the usual mistakes are still ours."""
    (tmp_path / "model.py").write_text("FACTOR = 3\n")
    (tmp_path / "port.py").write_text(
        "import profile\n\nimport torch\n\nfrom model import FACTOR\n\n"
        "torch.optim.AdamW([torch.zeros(1)])\n\n\ndef merge(W, factors, alpha):\n"
        "    assert FACTOR == 3 and hasattr(profile, 'Profile')\n    return alpha * factors['B'] @ factors['A'] + W\n"
    )
    command = [sys.executable, VECTORS / "check.py", "--module", "port.py"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (1, "error: 2 cases failed\n")
    assert "This looks like: the scale is alpha, not alpha / r." in ran.stdout


@pytest.mark.parametrize("module", ["no_such_port", "json", "sys", "examples/no_such_file.py"])
def test_a_module_without_our_functions_is_wrong_input(module):
    with pytest.raises(InputError, match=module):
        call(check, "--module", module)
