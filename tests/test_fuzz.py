"""Anything at all: pure functions keep their promises.

Examples are drawn by hypothesis, always the same ones. Dimensions: L layers, E experts a layer.
"""

import re

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import hellora
from data import Example
from scoring import gsm8k
from scoring.extraction import compiles, extract, finished
from scoring.refusals import ADVBENCH, RULES, plain, refusal

settings.register_profile("fuzz", derandomize=True, database=None, deadline=None, print_blob=False)
EXAMPLES = settings.get_profile("fuzz")


# ------------------------------------------------------------------------------------------------------ selection


@st.composite
def tables(draw) -> torch.Tensor:
    """Counts [L, E], so small that there are ties."""
    E = draw(st.integers(2, 9))
    row = st.lists(st.integers(0, 4), min_size=E, max_size=E)
    counts = torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))
    assume((counts.sum(-1) > 0).all())
    return counts


@settings(EXAMPLES)
@given(tables(), st.data())
def test_selection_has_the_size_asked_for_and_ties_go_to_the_lower_id(counts, more):
    L, E = counts.shape
    k = more.draw(st.integers(1, E))
    found = {
        policy: hellora.select_experts(policy, counts, k, seed=3) for policy in hellora.NUMBERED if policy != "topup"
    }
    for policy, hot in found.items():
        assert hot.shape == (L, E) and hot.dtype == torch.bool and hot.sum() == k * L, policy
    for layer, row in enumerate(counts.tolist()):
        for policy, sign in (("hot", -1), ("cold", 1)):
            by_hand = sorted(sorted(range(E), key=lambda e, row=row, sign=sign: (sign * row[e], e))[:k])
            assert found[policy][layer].nonzero().flatten().tolist() == by_hand
        assert found["random"][layer].sum() == k
        assert found["model-hot"][layer].equal(found["model-hot"][0])


@settings(EXAMPLES)
@given(tables(), st.integers(1, 100))
def test_coverage_is_reached_by_the_hottest_and_not_by_one_fewer(counts, percent):
    hot = hellora.select_experts("coverage", counts, None, coverage=percent / 100)
    for row, chosen in zip(counts.tolist(), hot, strict=True):
        ids = chosen.nonzero().flatten().tolist()
        covered = sum(row[e] for e in ids)
        assert ids and 100 * covered >= percent * sum(row)
        assert 100 * (covered - min(row[e] for e in ids)) < percent * sum(row)
        assert ids == sorted(sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[: len(ids)])


# -------------------------------------------------------------------------------------------------------- scoring

PIECES = [
    "The final answer is: ",
    "#### ",
    "####",
    "$",
    ",",
    ".",
    "-",
    "0",
    "18",
    "3.50",
    "1,000",
    "٣",
    "²",
    "\n",
    " ",
    "x",
]
ANSWERS = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=12).map("".join)
GOLD = st.builds("{}\n#### {}".format, ANSWERS.map(lambda text: text.replace("#", "")), st.integers(-(10**9), 10**9))


@settings(EXAMPLES, max_examples=300)
@given(ANSWERS, GOLD)
def test_every_rule_of_gsm8k_reads_any_text(text, gold):
    for rule in gsm8k.RULES:
        found, right = gsm8k.verdict(rule, text, gold)
        assert found is None or found
        assert found is not None or not right
    found = gsm8k.lori_number(text)
    if found is not None:
        assert gsm8k.lori_number(found) == found  # nothing more to find in it
        assert re.fullmatch(r"-?\d+\.?\d*", found)


@settings(EXAMPLES)
@given(ANSWERS, st.integers(-(10**9), 10**9))
def test_the_right_number_behind_the_marker_is_right_whatever_stands_before(text, number):
    text = text.replace("#", "").replace("The final answer is: ", "")
    for completion in (f"{text}\nThe final answer is: {number} coins, not 7", f"{text}\n#### {number}"):
        for rule in (gsm8k.FIRST_MARKED, "lori", "strict-match"):
            assert gsm8k.verdict(rule, completion, f"#### {number}") == (str(number), True)
            assert not gsm8k.verdict(rule, completion, f"#### {number + 1}")[1]


CODE = st.lists(
    st.sampled_from(
        ["def f(x):\n", "    return x\n", "```", "```python\n", "\nclass A", "\nif", "# a", "Sure", "import os\n", "\n"]
    )
    | st.text(max_size=5),
    max_size=10,
).map("".join)


@settings(EXAMPLES, max_examples=300)
@given(CODE)
def test_code_is_found_in_any_text_and_what_is_found_compiles(text):
    prompt = 'def f(x):\n    """Same."""\n'
    program = extract(prompt, "f", text)
    assert program == prompt + text or compiles(program)
    if finished(prompt, "f", text):
        assert compiles(program) and extract(prompt, "f", text + " = 1\n\nThat is it.") == program


@settings(EXAMPLES)
@given(st.text(max_size=60), st.text(max_size=20), st.sampled_from(ADVBENCH))
def test_a_refusal_is_found_in_any_text_and_words_around_it_change_nothing(before, after, phrase):
    for rule in ("lori", "advbench"):
        assert refusal(rule, f"{before} {phrase} {after}") is not None
    for rule in RULES:
        found = refusal(rule, before)
        assert found is None or found.lower() in plain(before).lower()
    assert refusal("xstest", f" {before}") == refusal("xstest", before)


# ------------------------------------------------------------------------------------------- lengths and batches


@settings(EXAMPLES)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(8, 40))
def test_a_pair_of_any_lengths_keeps_its_beginnings_and_fits(prompt, target, max_length):
    tokenizer = Tokenizer(models.WordLevel({"p": 0, "t": 1, "e": 2}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    [item] = data.encode([Example("0", "p" * prompt, "t" * target, {})], tokenizer, 2, max_length)
    whole = [0] * prompt + [1] * target + [2]
    [(start, _)] = item.spans
    kept = item.ids[start:]
    assert len(item.ids) <= max_length and item.ids[:start] == [0] * start
    if len(whole) <= max_length:
        assert item.ids == whole and start == prompt
    else:
        assert start == min(prompt, max_length // 2)
        assert kept == ([1] * target + [2])[: max_length - start]
