"""examples/minimal.py computes what the rest of this project does: counts, hot experts, losses, weights, answers."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import call, read_json, read_lines

import data
import hellora
import lora
import train
from examples import minimal
from generate import Decoding, generate
from model import load_model
from scoring import gsm8k
from tiny import tasks

sys.path.insert(0, str(minimal.ROOT / "tests/vectors"))

import ours  # noqa: E402

STEPS = 10


def test_it_trains_on_as_many_rows_as_train_py(all_rows):
    assert minimal.num_train == data.TINY_TRAIN


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """Ten steps of train.py with the settings of minimal.py, and ten of minimal.py on the same rows."""
    out = tmp_path_factory.mktemp("minimal") / "run"
    call(train, f"--steps {STEPS} --sample 0.05 --out", out)
    W = minimal.load_weights()
    rows = [minimal.encode(row) for row in tasks.math_rows(data.TINY_TRAIN, seed=0, split="train")]
    counts = minimal.count([prompt + target for prompt, target in data.sample(rows, 0.05, seed=0)], W)
    hot = minimal.choose(counts)
    pairs = minimal.attach(hot, W)
    for name, (A, _) in pairs.items():
        lora.init_A(A.detach(), 0, name)
    numbered = data.numbered_batches(len(rows), minimal.batch_size, seed=0, first=1, last=STEPS)
    losses = minimal.train([[rows[i] for i in batch] for _, batch in numbered], W, pairs)
    return SimpleNamespace(out=out, W=W, rows=rows, counts=counts, hot=hot, pairs=pairs, losses=losses)


@pytest.fixture(scope="module")
def merged(trained):
    """The model of this project with the pairs that minimal.py has trained, merged by hellora.merge."""
    factors = {name: {"A": A.detach().numpy(), "B": B.detach().numpy()} for name, (A, B) in trained.pairs.items()}
    model = ours.adapted_model("tiny", factors, minimal.alpha)
    hellora.merge(model)
    return model


def test_rows_become_the_same_token_ids(trained):
    reader = data.Reader("tiny-math", minimal.ROOT / "tiny", load_model("tiny").config)
    items = reader.encode(reader.load("train"))
    assert [item.ids for item in items] == [prompt + target for prompt, target in trained.rows]
    assert [item.spans[0][0] for item in items] == [len(prompt) for prompt, _ in trained.rows]


def test_counts_and_hot_experts_are_those_of_the_run(trained):
    assert trained.counts.tolist() == read_json(trained.out / "profile.json")["counts"]
    assert trained.hot == read_json(trained.out / "adapter/adapter.json")["hot"]


def test_of_equal_counts_the_experts_are_chosen_that_hellora_selects():
    counts = torch.randint(0, 9, (minimal.L, minimal.E), generator=torch.Generator().manual_seed(0))
    mask = hellora.select_experts("hot", counts, num_hot=minimal.num_hot)
    assert minimal.choose(counts) == [row.nonzero().flatten().tolist() for row in mask]


def test_the_same_number_of_parameters_trains(trained):
    result = read_json(trained.out / "result.json")
    assert sum(factor.numel() for pair in trained.pairs.values() for factor in pair) == result["trainable"]


def test_the_losses_are_those_of_train_py(trained):
    records = read_lines(trained.out / "log.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    torch.testing.assert_close(trained.losses, losses, rtol=0, atol=1e-4)


@torch.no_grad()
def test_merged_weights_compute_what_the_pairs_do_and_what_hellora_merges(trained, merged):
    ids, real = minimal.pad([prompt + target for prompt, target in trained.rows[:3]])
    weights = minimal.merge(trained.W, trained.pairs)
    x, chosen = minimal.forward(ids, real, weights, {})
    apart = minimal.forward(ids, real, trained.W, trained.pairs)[0]
    torch.testing.assert_close(x[real], apart[real], rtol=0, atol=1e-4)
    assert not torch.allclose(x[real], minimal.forward(ids, real, trained.W, {})[0][real], atol=0.1)
    logits, selected_experts = merged(ids, real.sum(1))
    torch.testing.assert_close(x[real] @ weights["lm_head.weight"].T, logits[real], rtol=0, atol=1e-4)
    assert torch.equal(chosen, selected_experts[:, real])


def test_answers_are_those_of_generate(trained, merged, monkeypatch):
    monkeypatch.setattr(minimal, "max_new_tokens", 20)
    prompts = [prompt for prompt, _ in trained.rows[:5]]
    answers = minimal.complete(prompts, trained.W, trained.pairs)
    expected = generate(merged, prompts, Decoding(20), eos_ids=(minimal.EOS,), batch_size=2)
    assert answers == [minimal.TOKENIZER.decode(ids) for ids in expected]


def test_an_answer_is_right_where_the_scorer_says_so():
    row = {"answer": "2 + 3 = 5\n#### -5"}
    texts = ["The final answer is: -5", "The final answer is: 5", "It is -5, The final answer is: 12", ""]
    expected = [gsm8k.verdict(gsm8k.FIRST_MARKED, text, row["answer"])[1] for text in texts]
    assert [minimal.accuracy([row], [text]) == 1 for text in texts] == expected == [True, False, False, False]


def test_the_file_runs_by_itself_and_imports_only_the_rows_from_this_project(tmp_path):
    """On fewer rows. sys.path is that of `python examples/minimal.py`, from another folder."""
    program = f"""
import sys
sys.path[0] = {str(minimal.ROOT / "examples")!r}
import minimal
minimal.num_train, minimal.num_test, minimal.max_new_tokens = 40, 3, 4
minimal.main()
files = {{name: str(getattr(module, "__file__", "")) for name, module in sys.modules.items()}}
ours = [name for name, file in files.items() if file.startswith({str(minimal.ROOT)!r}) and "-packages/" not in file]
print(*sorted(ours))
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    *lines, imported = ran.stdout.splitlines()
    assert imported == "minimal tiny tiny.tasks"
    assert "3. attached 116 pairs of rank 8: 174,080 parameters train" in lines
    assert "accuracy: base 0%, HELLoRA" in ran.stdout
