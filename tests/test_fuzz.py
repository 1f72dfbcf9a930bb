"""Anything at all: pure functions keep their promises, and a file with flipped bytes is an error or an equal result.

Examples are drawn by hypothesis, always the same ones. Dimensions: L layers, E experts a layer.
"""

import csv
import gzip
import io
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

import data
import evaluate
import hellora
import lori
import profile
from command.cli import InputError
from data import Example
from hub import peft as peft_files
from hub.checkpoint import TINY
from model import load_model, read_config
from run import adapters
from run import state as states
from scoring import completions, gsm8k
from scoring.extraction import compiles, extract, finished
from scoring.refusals import ADVBENCH, RULES, plain, refusal
from scoring.statistics import mcnemar, pass_at_k, rate

settings.register_profile("fuzz", derandomize=True, database=None, deadline=None, print_blob=False)
EXAMPLES = settings.get_profile("fuzz")
FEW = settings(EXAMPLES, max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


# ------------------------------------------------------------------------------------------------------ selection


@st.composite
def tables(draw, unique: bool = False, least: int = 0) -> torch.Tensor:
    """Counts [L, E]: small, so that there are ties, or all different within a layer."""
    E = draw(st.integers(2, 9))
    row = st.lists(st.integers(least, 10**6 if unique else 4), min_size=E, max_size=E, unique=unique)
    counts = torch.tensor(draw(st.lists(row, min_size=1, max_size=4)))
    assume((counts.sum(-1) > 0).all())
    return counts


@settings(EXAMPLES)
@given(tables(), st.data())
def test_selection_has_the_size_asked_for_and_ties_go_to_the_lower_id(counts, more):
    L, E = counts.shape
    k = more.draw(st.integers(1, E))
    found = {policy: hellora.select_experts(policy, counts, k, seed=3) for policy in (*hellora.SCORED, "random")}
    for policy, hot in found.items():
        assert hot.shape == (L, E) and hot.dtype == torch.bool and hot.sum() == k * L, policy
    for layer, row in enumerate(counts.tolist()):
        for policy, sign in (("hot", -1), ("cold", 1)):
            by_hand = sorted(sorted(range(E), key=lambda e, row=row, sign=sign: (sign * row[e], e))[:k])
            assert found[policy][layer].nonzero().flatten().tolist() == by_hand
        assert found["random"][layer].sum() == k
        assert found["model-hot"][layer].equal(found["model-hot"][0])


@settings(EXAMPLES)
@given(tables(unique=True), st.data())
def test_experts_with_other_numbers_are_selected_all_the_same(counts, more):
    L, E = counts.shape
    k, order = more.draw(st.integers(1, E)), torch.tensor(more.draw(st.permutations(range(E))))
    for policy in ("hot", "cold"):
        hot = hellora.select_experts(policy, counts, k)
        assert hellora.select_experts(policy, counts[:, order], k).equal(hot[:, order])
    half = hellora.select_experts("coverage", counts, None, coverage=0.5)
    assert hellora.select_experts("coverage", counts[:, order], None, coverage=0.5).equal(half[:, order])


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


@settings(EXAMPLES)
@given(tables(), st.floats(), st.data())
def test_scores_that_no_routing_gives_are_refused(counts, value, more):
    assume(not 0 <= value < math.inf)
    scores = counts.double()
    scores[more.draw(st.integers(0, len(counts) - 1)), more.draw(st.integers(0, counts.shape[1] - 1))] = value
    for policy in ("hot", "coverage", "random", "all"):
        with pytest.raises(InputError, match="profile again"):
            hellora.select_experts(policy, scores, 1, coverage=0.5)


@settings(EXAMPLES)
@given(st.lists(st.lists(st.integers(-3, 3), min_size=1, max_size=12), min_size=1, max_size=5), st.floats(0.05, 1))
def test_top_entries_are_the_largest_of_the_whole_model_the_earlier_of_equal_ones(parts, share):
    state = {f"{name}.lora_B": torch.tensor(part).float() for name, part in zip("abcde", parts, strict=False)}
    pairs = [(name, i, abs(x)) for name, part in zip("abcde", parts, strict=False) for i, x in enumerate(part)]
    kept = int(share * len(pairs))
    if sum(size > 0 for _, _, size in pairs) < kept:
        with pytest.raises(InputError, match="train stage D longer"):
            lori.top_entries(state, share)
        return
    wanted = sorted(range(len(pairs)), key=lambda j: (-pairs[j][2], j))[:kept]
    found = lori.top_entries(state, share)
    assert [(name, i) for name, ids in found.items() for i in ids.tolist()] == [pairs[j][:2] for j in sorted(wanted)]


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


@settings(EXAMPLES)
@given(st.integers(1, 60), st.data())
def test_rates_lie_in_their_intervals_and_more_draws_pass_more_often(total, more):
    count, k = more.draw(st.integers(0, total)), more.draw(st.integers(1, total))
    found = rate(count, total)
    assert 0 <= found["low"] <= found["rate"] <= found["high"] <= 1
    assert 0 <= pass_at_k(total, count, 1) <= pass_at_k(total, count, k) <= 1
    assert pass_at_k(total, count, 1) == pytest.approx(count / total)
    p = mcnemar(count, total - count)
    assert 0 < p <= 1 and p == mcnemar(total - count, count)


# ------------------------------------------------------------------------------------------- lengths and batches


@settings(EXAMPLES)
@given(st.integers(1, 80), st.integers(1, 80), st.integers(0, 2**31 - 1), st.integers(0, 50))
def test_an_epoch_holds_every_example_once_in_batches_that_are_full_but_the_last(n, batch, seed, epoch):
    batches = data.global_batches(n, batch, seed, epoch)
    assert sorted(sum(batches, [])) == list(range(n))
    assert [len(part) for part in batches] == [batch] * (n // batch) + [n % batch] * (n % batch > 0)


@settings(EXAMPLES)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 7))
def test_the_processes_share_a_batch_evenly_and_take_it_once(lengths, micro_batch, world):
    items = [data.Encoded([i] * n, ((1, n),)) for i, n in enumerate(lengths)]
    ranks = [data.micro_batches(items, micro_batch, rank, world) for rank in range(world)]
    assert sorted(item.ids[0] for parts in ranks for part in parts for item in part) == list(range(len(items)))
    sizes = [len(part) for parts in ranks for part in parts]
    assert len({len(parts) for parts in ranks}) == 1 and max(sizes) <= micro_batch and max(sizes) - min(sizes) <= 1


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


# ------------------------------------------------------------------------------------------------- damaged files

ROW = {"question": "Zoë has 3.\nHow many?", "answer": "3 + <<1=1>>1\n#### 4"}
PROBLEM = {"task_id": "a/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): assert f() == 1"}
STRANGE = (None, True, -1, 0, 1.5, 10**30, math.nan, math.inf, "", "x", "7", [], [[]], {}, {"a": 1}, [None], 2**40)


def jsonl(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


class Format:
    """Files in a folder, and what reads them. same(a, b): whether two readings that are no errors must be equal."""

    def __init__(self, folder: Path, names: list[str], read: Callable[[Path], object], same: Callable | None = None):
        self.folder, self.read, self.same = folder, read, same
        self.contents = {name: (folder / name).read_bytes() for name in names}
        self.whole = read(folder)

    def check(self, name: str, content: bytes) -> None:
        """Read the folder with this file changed: an InputError, or a result."""
        try:
            (self.folder / name).write_bytes(content)
            found = self.read(self.folder)
            assert self.same is None or self.same(found, self.whole)
        except InputError as error:
            assert len(str(error)) < 3000
        finally:
            (self.folder / name).write_bytes(self.contents[name])


def equal(a: object, b: object) -> bool:
    """Bit-equal, tensors too."""
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.fixture(scope="module")
def formats(tmp_path_factory, olmoe) -> dict[str, Callable[[], Format]]:
    """Every format that is read, made when asked for."""
    ids = torch.tensor([[5, 3, 9, 11]])
    config = read_config(olmoe.folder)

    def folder(**files: str | bytes) -> Path:
        path = tmp_path_factory.mktemp("format")
        for name, content in files.items():
            content = content if isinstance(content, bytes) else content.encode()
            (path / name.replace("__", ".")).write_bytes(content)
        return path

    def checkpoint(*names: str, same: Callable | None) -> Format:
        path = tmp_path_factory.mktemp("format")
        shutil.copytree(olmoe.folder, path, dirs_exist_ok=True)
        if "model.safetensors.index.json" in names:
            (path / "model.safetensors").rename(path / "part.safetensors")
            keys = load_file(path / "part.safetensors").keys()
            (path / names[0]).write_text(json.dumps({"weight_map": dict.fromkeys(keys, "part.safetensors")}))
        return Format(path, list(names), lambda path: load_model(path)(ids)[0], same)

    def adapter() -> Format:
        path = tmp_path_factory.mktemp("format")
        model = load_model(olmoe.folder)
        hot = hellora.select_experts("random", torch.ones(4, 7), 2)
        hellora.attach(model, hot, 3, 6.0, kind="lori", seed=4)
        adapters.save_adapter(adapters.adapter_state(model), path, model.adapter, model="m", method="hellora")
        return Format(path, ["adapter.json", "adapter.safetensors"], adapters.read_adapter, equal)

    def state() -> Format:
        path = tmp_path_factory.mktemp("format")
        parameter = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
        optimizer = torch.optim.AdamW([parameter])
        parameter.sum().backward()
        optimizer.step()
        states.save_state(path, 5, {"a": parameter}, optimizer, {"numbers": {"tokens": 7}}, 1)

        def read(path: Path) -> tuple:
            about = states.read_state(path)
            states.load_tensors(path, {"a": parameter}, optimizer, about["updates"])
            return about, {name: t.clone() for name, t in states.with_moments({"a": parameter}, optimizer).items()}

        return Format(states.last_state(path), ["state.json", "model.safetensors"], read, equal)

    def routing() -> Format:
        about = {"model": "m", "task": "t", "num_tokens": 14, "num_experts_per_tok": 3}
        counts = [[6] * 7] * 4
        path = folder(profile__json=json.dumps(about | {"counts": counts, "gate_mass": [[1.25] * 7] * 4}))

        def read(path: Path):
            found = profile.load_profile(path / "profile.json")
            profile.check_fits(found, config, path)
            hellora.select_experts("hot", found.gate_mass + 1e-9, 2)
            return found.counts, found.num_experts_per_tok

        return Format(path, ["profile.json"], read, equal)

    def peft() -> Format:
        path = tmp_path_factory.mktemp("format")
        q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight".format
        save_file({q("A"): torch.ones(2, 48), q("B"): torch.ones(48, 2)}, path / "adapter_model.safetensors")
        about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "tiny", "bias": "none"}
        (path / "adapter_config.json").write_text(json.dumps(about | {"use_dora": False, "rank_pattern": {}}))

        def read(path: Path):
            peft_files.base_of(path)
            model = load_model(olmoe.folder)
            adapters.load_any_adapter(model, path)
            return model(ids)[0].isfinite().all()

        return Format(path, ["adapter_config.json", "adapter_model.safetensors"], read)

    def run() -> Format:
        about = {"task": "tiny-math", "method": "hellora", "train_data": None, "max_length": 64}
        path = folder(config__json=json.dumps({"model": "tiny", "settings": about, "commit": None}))

        def read(path: Path):
            _, subject = evaluate.read_settings([str(path)])
            return subject.config

        return Format(path, ["config.json"], read)

    def rows(task: str, split: str, name: str, content: str | bytes) -> Callable[[], Format]:
        def make() -> Format:
            path = tmp_path_factory.mktemp("format")
            (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
            return Format(path, [name], lambda path: data.load_examples(task, split, path / name))

        return make

    def hexphi() -> Format:
        path = folder(category_1__csv='Do this.\n"Do, ""that"".\n2"\n', category_9__csv="Zoë\n")
        names = ["category_1.csv", "category_9.csv"]
        return Format(path, names, lambda path: data.load_examples("saferpaca", "test", path))

    def experts() -> Format:
        path = folder(hot__json="[[0, 3], [6], [2, 1], [5]]")
        return Format(path, ["hot.json"], lambda path: adapters.read_hot(path / "hot.json", config))

    def tokenizer() -> Format:
        path = folder(tokenizer__json=(TINY / "tokenizer.json").read_bytes())
        tiny = read_config(TINY)

        def read(path: Path):
            return data.load_tokenizer(path, tiny).decode(
                data.tokenize(["Two and 2."], data.load_tokenizer(path, tiny))[0]
            )

        return Format(path, ["tokenizer.json"], read)

    def answers() -> Format:
        path = folder(answers__jsonl=jsonl({"id": 0, "completion": "4 ë"}, {"id": "1", "completion": ""}))
        options = {"partial": True, "several": True}
        return Format(
            path,
            ["answers.jsonl"],
            lambda path: completions.read_completions(path / "answers.jsonl", ["0", "1", "2"], **options),
        )

    def generations() -> Format:
        path = folder(generations__jsonl=jsonl({"id": "0", "sample": 0, "completion": "4", "cut": False}))
        return Format(path, ["generations.jsonl"], completions.read_generations)

    def evaluation() -> Format:
        score = json.dumps({"accuracy": 0.5, "settings": {"task": "tiny-math"}})
        items = jsonl({"id": "0", "correct": True, "label": None}, {"id": "1", "correct": False})
        path = folder(score__json=score, items__jsonl=items)
        return Format(path, ["score.json", "items.jsonl"], lambda path: evaluate.compare([str(path), str(path)]))

    table = io.StringIO()
    csv.writer(table).writerows([["prompt", "type"], ['Say "a",\nor b', "x"], ["ë", "y"]])
    alpaca = {"instruction": "Say hi.", "input": "", "output": "Hi."}
    return {
        "config.json": lambda: checkpoint("config.json", same=None),
        "safetensors header": lambda: checkpoint("model.safetensors", same=equal),
        "index": lambda: checkpoint("model.safetensors.index.json", same=equal),
        "tokenizer.json": tokenizer,
        "profile.json": routing,
        "adapter": adapter,
        "state": state,
        "adapter of PEFT": peft,
        "run": run,
        "expert list": experts,
        "gsm8k.jsonl": rows("gsm8k", "train", "a.jsonl", jsonl(ROW, ROW)),
        "alpaca.json": rows("codealpaca", "train", "a.json", json.dumps([alpaca, alpaca])),
        "columns.json": rows("saferpaca", "test", "a.json", '{"prompt": ["a", "b"], "tags": ["x", "y"]}'),
        "HumanEval.jsonl.gz": rows("codealpaca", "test", "a.jsonl.gz", gzip.compress(jsonl(PROBLEM).encode())),
        "xstest.csv": rows("saferpaca", "test", "a.csv", table.getvalue()),
        "HEx-PHI": hexphi,
        "completions": answers,
        "generations": generations,
        "evaluation": evaluation,
    }


NAMES = (
    "config.json, safetensors header, index, tokenizer.json, profile.json, adapter, state, adapter of PEFT, run, "
    "expert list, gsm8k.jsonl, alpaca.json, columns.json, HumanEval.jsonl.gz, xstest.csv, HEx-PHI, completions, "
    "generations, evaluation"
).split(", ")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_with_flipped_bytes_is_an_error_or_an_equal_result(name, formats):
    subject = formats[name]()
    ends = {}  # of what may be damaged: a checkpoint's weights have no digest, whatever bits they have
    for file, content in subject.contents.items():
        weights = file.endswith(".safetensors") and name in ("safetensors header", "adapter of PEFT")
        ends[file] = 8 + int.from_bytes(content[:8], "little") if weights else len(content)

    @FEW
    @given(st.data())
    def flip(more):
        file = more.draw(st.sampled_from(sorted(ends)))
        content = bytearray(subject.contents[file])
        places = st.integers(0, ends[file] - 1)
        for place in more.draw(st.lists(places, min_size=1, max_size=1 if subject.same else 3)):
            content[place] ^= more.draw(st.integers(1, 255))
        subject.check(file, bytes(content))

    @FEW
    @given(st.data())
    def cut(more):
        file = more.draw(st.sampled_from(sorted(ends)))
        content = subject.contents[file]
        subject.check(file, content[: more.draw(st.integers(0, ends[file] - 1))])

    flip()
    cut()


JSON = [name for name in NAMES if name not in ("HumanEval.jsonl.gz", "xstest.csv", "HEx-PHI", "tokenizer.json")]


@pytest.mark.parametrize("name", JSON)
def test_a_value_of_another_kind_anywhere_in_a_json_file_is_an_error_or_a_result(name, formats):
    subject = formats[name]()
    subject.same = subject.same if name in ("adapter", "state") else None
    files = sorted(file for file in subject.contents if ".json" in file)
    if not files:
        return

    @FEW
    @given(st.data())
    def swap(more):
        file = more.draw(st.sampled_from(files))
        lines = subject.contents[file].decode().strip().split("\n") if file.endswith("l") else [None]
        whole = [json.loads(line) for line in lines] if lines[0] else json.loads(subject.contents[file])
        place = whole
        while isinstance(place, list | dict) and place:
            key = more.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            if not isinstance(place[key], list | dict) or not place[key] or more.draw(st.booleans()):
                place[key] = more.draw(st.sampled_from(STRANGE))
                break
            place = place[key]
        subject.check(file, (jsonl(*whole) if lines[0] else json.dumps(whole)).encode())

    swap()
