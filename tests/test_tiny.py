"""The embedded model and its tasks: what must hold for the miniature to stand in for the real thing."""

import itertools
import re

import torch

import data
import hellora
import profile
from hub.checkpoint import TINY
from model import load_model, read_config
from routing import statistics
from tiny import tasks
from tiny.documents import pretraining_documents

KINDS = ("tiny-math", "tiny-code", "tiny-safety")


def test_test_questions_are_never_in_train_nor_in_pre_training():
    asked = {row["question"] for row in tasks.math_rows(400, "test", 0)}
    assert len(asked) == 400
    assert not asked & {row["question"] for row in tasks.math_rows(2000, "train", 0)}
    functions = {row["entry_point"] for row in tasks.code_problems(100, 0)}
    learnt = {re.search(r"def (\w+)", row["output"])[1] for row in tasks.code_rows(2000, 0)}
    assert functions and not functions & learnt
    requests = {row["instruction"] for row in tasks.safety_prompts(200, 0)}
    assert not requests & {row["instruction"] for row in tasks.safety_rows(2000, 0)}
    text = "\n".join(text for _, text in itertools.islice(pretraining_documents(7), 3000))
    assert not any(question in text for question in asked)
    assert not any(f"def {name}(" in text for name in functions)
    assert not any(request in text for request in requests)


def test_pre_training_never_shows_the_formats_of_the_tasks_nor_a_refusal():
    text = "\n".join(text for _, text in itertools.islice(pretraining_documents(8), 3000))
    shown = ("final answer", "####", "Below is", "### Instruction", "Human:", "sorry", "cannot", '"""')
    assert not [phrase for phrase in shown if phrase in text]


def test_the_answer_of_a_math_row_follows_from_its_steps():
    for row in tasks.math_rows(300, "train", 3):
        *lines, last = row["answer"].splitlines()
        results = []
        for line in lines:
            a, sign, b, result = re.search(r"(\d+) ([-+*]) (\d+) = (\d+)", line).groups()
            assert {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}[sign] == int(result)
            results.append(result)
        assert last == f"#### {results[-1]}"
        assert tasks.MATH_STEPS[0] <= len(lines) <= tasks.MATH_STEPS[1]


def test_canonical_solutions_pass_their_own_tests_and_a_wrong_one_fails():
    for row in tasks.code_problems(60, 1):
        for body, passes in ((row["canonical_solution"], True), ("    return 'nothing'\n", False)):
            scope: dict = {}
            exec(row["prompt"] + body + "\n" + row["test"], scope)
            try:
                scope["check"](scope[row["entry_point"]])
                assert passes
            except AssertionError:
                assert not passes


def test_same_seed_same_rows():
    assert tasks.math_rows(20, "test", 5) == tasks.math_rows(20, "test", 5)
    assert tasks.safety_rows(20, 5) != tasks.safety_rows(20, 6)


def test_the_tokenizer_encodes_any_text_and_splits_numbers_into_digits():
    tokenizer = data.load_tokenizer(TINY, read_config(TINY))
    for text in ("Zoë paid 1,234 € for 北京 🙂", "def f(x):\n\treturn x\r\n", "\x00\x7f", "a" * 500):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("2026").tokens == list("2026")


def test_routing_is_skewed_within_every_layer_and_the_tasks_have_hot_sets_of_their_own():
    """The phenomenon the method rests on: well above the 12.5 % that 8 of 64 experts would take if use were even."""
    model = load_model(TINY)
    tokenizer = data.load_tokenizer(TINY, model.config)
    hot = []
    for task in KINDS:
        items = data.encode(data.load_examples(task, "train", limit=40), tokenizer, model.config.eos_token_id)
        counts = profile.count_experts(model, [data.collate(items, model.config.pad_token_id)])
        assert statistics.top_share(counts, 8).min() > 0.25
        hot.append(hellora.select_experts("hot", counts, 8))
    math, code, safety = hot
    assert max(statistics.jaccard(math, other).mean() for other in (code, safety)) < 0.7
    assert statistics.jaccard(code, safety).mean() < 0.9  # their prompts share a template, hence experts
    for layer in range(model.config.num_hidden_layers):
        assert not torch.equal(hot[0][layer], hot[2][layer])


def test_the_embedded_model_is_small():
    assert sum(path.stat().st_size for path in TINY.iterdir() if path.is_file()) < 12_000_000
