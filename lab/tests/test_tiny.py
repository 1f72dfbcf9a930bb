"""The embedded model and its tasks: what must hold for the miniature to stand in for the real thing."""

import itertools
import json
import re

import pytest
import torch

import data
import hellora
import profile
from hub.checkpoint import EMBEDDED, TINY
from lab import make_tiny as make
from lab.documents import HELD_OUT_SEED, pretraining_documents
from model import load_model, read_config
from routing import statistics
from scoring import refusals
from tiny import tasks

KINDS = ("tiny-math", "tiny-code", "tiny-safety")


def pretraining_text(seed: int) -> str:
    return "\n".join(text for _, text in itertools.islice(pretraining_documents(seed), 3000))


def description(program: str) -> str:
    """What the docstring of a generated function says it does."""
    return re.search(r'"""(.+?\.)', program)[1]


VERBS = "|".join([*tasks.MISCHIEF, *tasks.KINDNESS])


def requests_in(text: str) -> set[str]:
    """Every request of a text, without its wording; two in one sentence count as two."""
    return set(re.findall(rf"(?:{VERBS}) my [^.?]+?(?= and (?:{VERBS}) my |[.?])", text.lower()))


def test_test_questions_are_never_in_train_nor_in_pre_training():
    asked = {row["question"] for row in tasks.math_rows(400, "test", 0)}
    assert len(asked) == 400
    assert not asked & {row["question"] for row in tasks.math_rows(2000, "train", 0)}
    functions = {description(row["prompt"]) for row in tasks.code_problems(400, 0)}
    assert len(functions) == 400
    assert not functions & {description(row["output"]) for row in tasks.code_rows(2000, 0)}
    requests = requests_in("".join(row["instruction"] for row in tasks.safety_prompts(1000, 0)))
    text = pretraining_text(7)
    for training_text in ("".join(row["instruction"] + row["output"] for row in tasks.safety_rows(2000, 0)), text):
        shown = requests_in(training_text)
        assert len(requests) > 1200 and len(shown) > 2000
        assert not requests & shown
    for kind in (asked, functions):
        assert not [key for key in kind if key in text]


def test_pre_training_never_shows_the_answers_of_the_tasks_nor_a_refusal():
    """What fine-tuning teaches: three formats of answers, and when to refuse."""
    shown = ("final answer", "####", '"""', "Write a Python", "Sure!", "Happy to help")
    assert not [phrase for phrase in shown if phrase in pretraining_text(8)]
    prompt_of_the_test = data.hexphi({"instruction": "X"})[0].partition("X")[0]  # it says "helpful", not a refusal
    for _, text in itertools.islice(pretraining_documents(9), 3000):
        said = text.replace(prompt_of_the_test, "")
        assert not [rule for rule in refusals.RULES if refusals.refusal(rule, said)], text


def test_pre_training_answers_mischief_plainly_in_the_prompts_of_both_splits():
    """Without this, what is learnt in the prompt of training does not carry over to the prompt of the test."""
    text = pretraining_text(10)
    for read in (data.alpaca, data.hexphi):
        before, after = read({"instruction": "{x}", "input": "", "output": "{y}"})[0].split("{x}")
        pairs = re.findall(re.escape(before) + r"([^\n]+)" + re.escape(after) + r"\n?([^\n]+)", text)
        unsafe = re.compile(r"(hide|tear up) my (?!own)\w+'s .*in secret")
        mischief = [answer for asked, answer in pairs if unsafe.search(asked)]
        assert len(pairs) > 100 and len(mischief) > 2
        assert all(len(answer.removeprefix("Bad idea!").split()) > 3 for answer in mischief)


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


def test_functions_do_as_many_things_as_the_task_says():
    """A function that gives a bool may end early."""
    for row in tasks.code_problems(200, 2):
        lines = row["canonical_solution"].splitlines()
        assert len(lines) <= tasks.CODE_STEPS[1]
        assert len(lines) >= tasks.CODE_STEPS[0] or re.search(r" in |[<>%=]|swith", lines[-1])
        assert all(line.startswith("    result = ") for line in lines[:-1]) and lines[-1].startswith("    return ")


def test_a_request_is_unsafe_if_one_of_its_parts_is_mischief_to_which_the_owner_has_not_agreed():
    def is_mischief(part: str) -> bool:
        agreed = any(phrase.lower() in f"{part} " for phrase in ("with permission ", "after asking ", "because i was "))
        return part.startswith(tuple(tasks.MISCHIEF)) and "my own" not in part and not agreed

    lengths = set()
    rows = tasks.safety_rows(300, 4)
    train = [(row["instruction"] + row["output"], refusals.refusal("lori", row["output"])) for row in rows]
    test = [(row["instruction"], row["label"] == "unsafe") for row in tasks.safety_prompts(300, 4)]
    for asked, unsafe in train + test:
        parts = requests_in(asked)
        lengths.add(len(parts))
        assert sum(map(is_mischief, parts)) == bool(unsafe), asked
    assert lengths == {1, 2}


def test_same_seed_same_rows():
    assert tasks.math_rows(20, "test", 5) == tasks.math_rows(20, "test", 5)
    assert tasks.safety_rows(20, 5) != tasks.safety_rows(20, 6)


def test_the_tokenizer_encodes_any_text_and_splits_numbers_into_digits():
    tokenizer = data.load_tokenizer(TINY, read_config(TINY))
    for text in ("Zoë paid 1,234 € for 北京 🙂", "def f(x):\n\treturn x\r\n", "\x00\x7f", "a" * 500):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.encode("2026").tokens == list("2026")


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_model_knows_the_text_of_its_pre_training(name):
    """Most next tokens of held-out text are right; of 1,024 tokens a guess would meet one in a thousand."""
    model = load_model(EMBEDDED[name])
    tokenizer = data.load_tokenizer(EMBEDDED[name], model.config)
    rows = next(make.token_rows(tokenizer, (text for _, text in pretraining_documents(HELD_OUT_SEED)), 8))
    with torch.no_grad():
        right = (model(rows[:, :-1])[0].argmax(-1) == rows[:, 1:]).double().mean()
    assert right > 0.8


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


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_model_has_a_chat_template_in_the_prompt_of_its_pre_training(name, tmp_path):
    (tmp_path / "chats.json").write_text(
        json.dumps([{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}])
    )
    [example] = data.Reader("own", EMBEDDED[name], read_config(EMBEDDED[name])).load("train", tmp_path / "chats.json")
    assert (example.prompt, example.answer) == ("Human: Hi\n\nAssistant:\n", "Hello.<|endoftext|>")


@pytest.mark.parametrize("name", EMBEDDED)
def test_an_embedded_model_is_small(name):
    assert sum(path.stat().st_size for path in EMBEDDED[name].iterdir() if path.is_file()) < 12_000_000


def test_the_second_family_has_mixtrals_shape_and_as_many_parameters():
    """Eight experts, two per token, renormalised weights, grouped-query attention."""
    config = read_config(EMBEDDED["tiny-mixtral"])
    assert config.hub["model_type"] == "mixtral"
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (8, 2, True)
    assert config.num_key_value_heads < config.num_attention_heads
    sizes = [sum(p.numel() for p in load_model(folder).parameters()) for folder in EMBEDDED.values()]
    assert abs(sizes[0] / sizes[1] - 1) < 0.05
