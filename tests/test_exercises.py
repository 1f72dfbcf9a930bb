"""examples/exercises/: nothing passes before it is written, the solutions do, and usual mistakes are named."""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import call

from command.cli import run

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = ROOT / "examples/exercises"
SOLUTIONS = (EXERCISES / "solutions.py").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "tests/vectors"))

import check  # noqa: E402

NAMES = ["route", "count_experts", "select_experts", "linear", "moe_layer", "batch_loss", "kept_entries", "merge"]


def written(source: str) -> SimpleNamespace:
    functions: dict = {}
    exec(source, functions)
    return SimpleNamespace(**functions)


def check_file(file: Path, capsys) -> tuple[int, str]:
    """Exit status and output of the command."""
    with pytest.raises(SystemExit) as ended:
        run(lambda: call(check, "--module", file) or sys.exit(0))
    return ended.value.code, capsys.readouterr().out


def test_the_skeleton_fails_each_exercise(capsys):
    status, out = check_file(EXERCISES / "skeleton.py", capsys)
    assert status == 1
    assert {line.split()[0] for line in out.splitlines() if "1 FAILED" in line} == set(NAMES)
    assert out.count(check.UNWRITTEN) == len(NAMES)


def test_the_solutions_pass_each_exercise(capsys):
    status, out = check_file(EXERCISES / "solutions.py", capsys)
    assert status == 0
    assert {line.split()[0] for line in out.splitlines() if " passed" in line} == set(NAMES)


def test_the_skeleton_and_the_solutions_have_the_same_functions():
    skeleton = (EXERCISES / "skeleton.py").read_text(encoding="utf-8")
    signatures = [
        {node.name: ast.unparse(node.args) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
        for source in (skeleton, SOLUTIONS)
    ]
    assert signatures[0] == signatures[1] and set(NAMES) < set(signatures[0])


SCALE = 'alpha / len(factors["A"])'
STACKS = "name, stack in W.items()"
WRONG = [  # exercise, code of its solution, the same with a mistake, what the check calls it
    ("route", "if norm_topk_prob:", "if True:", "routing weights renormalised where the family does not"),
    ("route", "    weights = np", "    p = np.exp(p) / np.exp(p).sum(1, keepdims=True)\n    weights = np",
     "a second softmax of the router's output"),
    ("count_experts", "layer[real].ravel()", "layer.ravel()", "padding is counted"),
    ("select_experts", "np.argsort(-scores,", "np.argsort(-scores.sum(0) + 0 * scores,", "one hot set for all layers"),
    ("select_experts", 'np.argsort(-scores, axis=1, kind="stable")',
     'scores.shape[1] - 1 - np.argsort(-scores[:, ::-1], axis=1, kind="stable")',
     "of equal counts the higher id comes first"),
    ("linear", SCALE, "alpha", "the scale is alpha, not alpha / r"),
    ("linear", 'factors["B"].T', 'factors["B"].reshape(factors["B"].shape[::-1])', "B read as its transpose"),
    ("moe_layer", 'factors[name]["A"][i], "B": factors[name]["B"][i]',
     'factors[name]["A"][::-1][i], "B": factors[name]["B"][::-1][i]',
     "rows of a stacked adapter not in ascending order of expert id"),
    ("moe_layer", STACKS, 'name, stack in (W | {"gate_proj": W["up_proj"], "up_proj": W["gate_proj"]}).items()',
     "gate and up swapped"),
    ("moe_layer", "weights[token, place, None] * ", "",
     "experts' outputs are not multiplied by the routing weights"),
    ("moe_layer", 'return {"y": y,', 'return {"y": y * 2,', None),
    ("batch_loss", "    log_p =", "    prompt_lengths = np.ones_like(prompt_lengths)\n    log_p =",
     "the loss is also over the prompt"),
    ("batch_loss", ".sum() / targets",
     ".sum() / sum(len(i) - m for i, m in zip(sequences[part], prompt_lengths[part])) / np.ceil(5 / micro_batch)",
     "the mean of the micro-batches' means"),
    ("batch_loss", "len(ids) - n for", "len(ids) - 1 for", None),
    ("kept_entries", "np.abs(matrices[name])", "matrices[name]",
     "the largest entries with their sign, not by magnitude"),
    ("merge", "return W + ", "return ", "B A is not added to W"),
]  # fmt: skip


@pytest.mark.parametrize("name, right, wrong, mistake", WRONG)
def test_a_mistake_in_an_exercise_is_named(name, right, wrong, mistake):
    start = SOLUTIONS.index(f"def {name}(")
    head, body = SOLUTIONS[:start], SOLUTIONS[start:]
    assert right in body
    verdict = check.check_function(written(head + body.replace(right, wrong, 1)), name)
    assert verdict.failures and not any("raised" in line for line in verdict.failures), verdict.failures
    if mistake is None:
        assert verdict.looks_like == ()
    else:  # softmax over the K largest is the same as renormalising, so two mistakes may give one result
        assert mistake in verdict.looks_like and len(verdict.looks_like) <= 2
