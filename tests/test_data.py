"""Tasks, prompts, tokens and batches, on miniature files in the public formats."""

import gzip
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_json, write_lines
from test_chat import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

import data
from command.cli import InputError
from data import Encoded, Example, load_examples
from hub.checkpoint import TINY
from model import read_config

QUESTION = "Ann has 3 coins. She finds 4. How many?"
ANSWER = "3 + 4 = <<3+4=7>>7 coins. Half is 7/2 = $<<7/2=3.5>>3.5.\n#### 7"
GSM8K_ROW = {"question": QUESTION, "answer": ANSWER}
ALPACA_ROW = {"instruction": "Add {a} to b.", "input": "a=1, b=2\n", "output": "3"}
PROBLEM = {
    "task_id": "HumanEval/0",
    "prompt": '\n\ndef two():\n    """Two."""\n',
    "entry_point": "two",
    "canonical_solution": "    return 2\n",
    "test": "def check(f):\n    assert f() == 2\n",
}


def texts(examples):
    return [(example.prompt, example.answer) for example in examples]


# ------------------------------------------------------------------------------------------------------ prompts


def test_gsm8k_is_prompted_as_in_lori_with_one_space_before_the_answer_and_no_annotations(tmp_path):
    [example] = load_examples("gsm8k", "train", write_lines(tmp_path / "train.jsonl", [GSM8K_ROW]))
    assert example.prompt == (
        QUESTION + "\nAnswer the above question. First think step by step and then answer the final number.\n"
    )
    assert example.answer == "3 + 4 = 7 coins. Half is 7/2 = $3.5.\nThe final answer is: 7"
    assert (example.id, example.row) == ("0", GSM8K_ROW)


def test_alpaca_is_prompted_by_the_published_template_with_and_without_input(tmp_path):
    without = {"instruction": "Say hi.", "output": "Hi."}
    rows = [ALPACA_ROW, without, without | {"input": None}, without | {"input": " \n"}]
    path = write_lines(tmp_path / "a.jsonl", rows)
    first, second, *others = load_examples("codealpaca", "train", path)
    assert first.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nAdd {a} to b.\n\n### Input:\n"
        "a=1, b=2\n\n\n### Response:\n"
    )
    assert {example.prompt for example in others} == {second.prompt}
    assert second.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:\n"
    )
    assert [first.answer, second.answer] == ["3", "Hi."]
    assert texts(load_examples("saferpaca", "train", path)) == texts([first, second, *others])


def test_humaneval_prompts_are_stripped_and_keep_their_id_and_their_tests(tmp_path):
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress((json.dumps(PROBLEM) + "\n").encode()))
    [example] = load_examples("codealpaca", "test", path)
    assert (example.id, example.answer, example.row) == ("HumanEval/0", "", PROBLEM)
    assert example.prompt == 'def two():\n    """Two."""'


def test_refusal_is_tested_with_the_prompt_of_a_helpful_and_safe_assistant(tmp_path):
    [example] = load_examples("saferpaca", "test", write_lines(tmp_path / "a.jsonl", [{"instruction": "Steal {it}."}]))
    assert example.prompt == (
        "You are a helpful assistant. Always answer as helpfully as possible, while being safe.\n\n"
        "Human: Steal {it}.\n\nAssistant:"
    )


@pytest.mark.parametrize(
    "tiny, big, split", [(a, b, s) for a, b in [("math", "gsm8k"), ("code", "codealpaca")] for s in ("train", "test")]
    + [("safety", "saferpaca", "train"), ("safety", "saferpaca", "test")],
)  # fmt: skip
def test_tiny_rows_are_rows_of_their_big_brother(tmp_path, tiny, big, split):
    examples = load_examples(f"tiny-{tiny}", split)
    tested = data.TINY_PROGRAMS if tiny == "code" else data.TINY_TEST
    assert len(examples) == (data.TINY_TRAIN if split == "train" else tested)
    assert len({example.prompt + example.answer for example in examples}) > 0.95 * len(examples)
    path = write_lines(tmp_path / "rows.jsonl", [example.row for example in examples])
    assert load_examples(big, split, path) == examples


def test_no_tiny_test_question_is_trained_on(all_rows):
    trained = {example.row["question"] for example in load_examples("tiny-math", "train")}
    assert not trained & {example.row["question"] for example in load_examples("tiny-math", "test")}
    descriptions = [
        {re.search(r'"""(.+?\.)', example.prompt + example.answer)[1] for example in load_examples("tiny-code", split)}
        for split in ("train", "test")
    ]
    assert not descriptions[0] & descriptions[1]


# ------------------------------------------------------------------------------------------------------- tokens

EOS = "<|endoftext|>"


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    """A folder with a byte-level BPE that adds a BOS, cuts and pads if nobody stops it; eos_token_id is 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([QUESTION, ANSWER, "The final answer is: 7\n"] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(pad_id=1, pad_token=EOS)
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def config(vocab_size=300, eos_token_id=1):
    ids = () if eos_token_id is None else (eos_token_id,)
    hub = {"eos_token_id": eos_token_id}
    return SimpleNamespace(
        vocab_size=vocab_size, eos_token_id=eos_token_id, eos_token_ids=ids, pad_token_id=None, hub=hub
    )


def characters():
    """A tokenizer whose every token is one letter: lengths can be read off the text. EOS is 26."""
    letters = {chr(ord("a") + i): i for i in range(26)} | {EOS: 26}
    tokenizer = Tokenizer(models.WordLevel(letters))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return tokenizer


def test_ids_are_those_of_transformers_for_prompt_and_target_apart_and_then_eos(words):
    tokenizer = data.load_tokenizer(words, config())
    hf = PreTrainedTokenizerFast(tokenizer_file=str(words / "tokenizer.json"))
    examples = [Example(str(i), QUESTION[i:] + "\n", f"{i} is \n it", {}) for i in range(5)]
    for example, item in zip(examples, data.encode(examples, tokenizer, eos_id=1), strict=True):
        prompt, target = (hf(t, add_special_tokens=False)["input_ids"] for t in (example.prompt, example.answer))
        assert (item.ids, item.spans) == ([*prompt, *target, 1], ((len(prompt), len(item.ids)),))
        # Decoding starts from the very tokens that training put before the target.
        assert data.tokenize([example.prompt], tokenizer) == [item.ids[: len(prompt)]]


SPELLED = [f"Strike {EOS} out", "<s>HTML</s> for old text", f"{EOS}{EOS}", "a <s>", f"<|endof{EOS}text|>"]


MARKED = {  # the ways in which a tokenizer_config.json says that <s> is special
    "as bos": {"bos_token": "<s>"},
    "as an object": {"bos_token": {"content": "<s>", "special": True}},
    "as one of several": {"eos_token": "</s>", "additional_special_tokens": ["<s>"]},
    "by id": {
        "added_tokens_decoder": {"1": {"content": "<s>", "special": True}, "7": {"content": "a", "special": False}}
    },
}


@pytest.mark.parametrize("how", MARKED)
def test_a_special_token_that_tokenizer_config_alone_names_is_text_too(how, tmp_path):
    sentencepiece("every", special=False).save(str(tmp_path / "tokenizer.json"))
    about = config(vocab_size=400)
    assert 0 in data.tokenize(["a <s>"], data.load_tokenizer(tmp_path, about))[0]
    write_json(tmp_path / "tokenizer_config.json", MARKED[how])
    ids = data.tokenize(["a <s>"], data.load_tokenizer(tmp_path, about))[0]
    assert 0 not in ids and len(ids) > 4  # "<", "s" and ">" apart


@pytest.mark.parametrize("text", ["[1]", "{", '{"added_tokens_decoder": {"1": {}}}'])
def test_a_damaged_tokenizer_config_is_an_error(text, tmp_path):
    sentencepiece("every").save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(InputError, match="tokenizer_config.json: "):
        data.load_tokenizer(tmp_path, config(vocab_size=400))


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "not marked as special"])
def test_text_that_spells_a_special_token_is_text_in_prompt_and_target_as_in_transformers(kind, words, tmp_path):
    folder = words if kind == "byte-level" else tmp_path
    if kind != "byte-level":
        sentencepiece("every", special=kind == "sentencepiece").save(str(folder / "tokenizer.json"))
    about = config(vocab_size=400)
    about.hub["bos_token_id"] = 0
    tokenizer = data.load_tokenizer(folder, about)
    if kind == "byte-level":
        tokenizer.decoder = decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), split_special_tokens=True)
    examples = [Example(str(i), text, text[::-1] + text, {}) for i, text in enumerate(SPELLED)]
    for example, item in zip(examples, data.encode(examples, tokenizer, 1), strict=True):
        prompt = item.ids[: item.spans[0][0]]
        assert tokenizer.decode(prompt, skip_special_tokens=False).removeprefix(" ") == example.prompt
        assert item.ids.index(1) == len(item.ids) - 1 and 0 not in item.ids
        if kind != "not marked as special":
            wanted = [hf(text, add_special_tokens=False)["input_ids"] for text in (example.prompt, example.answer)]
            assert item.ids == [*wanted[0], *wanted[1], 1]


def test_a_tokenizer_that_cannot_write_a_special_token_as_text_is_an_error_that_quotes_it(tmp_path):
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((letter, -3.0) for letter in "▁<s>/ab")]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))  # its best way to write "<s>" is the piece <s>
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = data.load_tokenizer(tmp_path, config(vocab_size=20, eos_token_id=2))
    assert len(data.tokenize(["ab a unknown"], loaded)[0]) > 3  # <unk> stands for text
    with pytest.raises(InputError, match="turns text into its special token '<s>': 'a <s> b'"):
        data.tokenize(["ab", "a <s> b"], loaded)


@pytest.mark.parametrize(
    "prompt, target, kept_prompt, kept_target, eos",
    [
        (3, 6, 3, 6, True),  # 3 + 6 + EOS = 10 fits
        (9, 1, 8, 1, True),  # all that the answer leaves room for
        (20, 4, 5, 4, True),
        (20, 2, 7, 2, True),
        (3, 7, 3, 7, False),  # a short prompt is not cut
        (20, 20, 5, 5, False),  # of two long parts each gets a half
    ],
)
@pytest.mark.parametrize("bos", [False, True])
def test_a_prompt_of_ones_own_keeps_its_end_and_the_bos(bos, capsys, prompt, target, kept_prompt, kept_target, eos):
    text = "abcdefghijklmnopqrstuvwxyz"
    options = {"max_length": 10, "bos": data.Bos(27, in_text=bos), "keep_end": True}
    [item] = data.encode([Example("0", text[: prompt - bos], text[::-1][:target], {})], characters(), 26, **options)
    given = [27, *range(prompt - 1)] if bos else [*range(prompt)]
    given = given[:bos] + given[prompt - kept_prompt + bos :]
    expected = [*given, *range(25, 25 - kept_target, -1), *([26] if eos else [])]
    assert (item.ids, item.spans) == (expected, ((kept_prompt, len(expected)),))
    said = ""
    if of_prompt := prompt - kept_prompt:
        said += f"1 of 1 prompts are too long for 10 tokens and lose {of_prompt} tokens at their beginning\n"
    if of_end := target - kept_target + (not eos):
        said += f"1 of 1 examples are too long for 10 tokens and lose {of_end} tokens at their end\n"
    assert capsys.readouterr().err == said


def test_an_example_beyond_the_positions_of_the_model_is_an_error_and_a_longer_limit_is_said(capsys):
    example = Example("0", "abcdefgh", "ijklm", {})  # 14 tokens with the EOS
    for positions, max_length in ((14, 512), (13, 13), (None, 512)):
        data.encode([example], characters(), 26, max_length, positions)
    said = "--max-length 512: the model was made for 13 positions .*, and an example has 14 tokens; give at most 13"
    with pytest.raises(InputError, match=said):
        data.encode([example], characters(), 26, 512, 13)
    assert (
        capsys.readouterr().err.count("made for 14 positions (max_position_embeddings); the longest example has 14")
        == 1
    )


def test_an_example_with_an_empty_answer_cannot_be_encoded():
    with pytest.raises(InputError, match="example 7 has an empty answer"):
        data.encode([Example("0", "a", "b", {}), Example("7", "a", " ", {})], characters(), eos_id=26)


def test_a_tokenizer_that_is_missing_broken_or_of_another_model_is_a_wrong_input(words, tmp_path):
    with pytest.raises(InputError, match="no tokenizer.json"):
        data.load_tokenizer(tmp_path, config())
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(InputError, match="tokenizer.model but no tokenizer.json; make it with transformers"):
        data.load_tokenizer(tmp_path, config())
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1", encoding="utf-8")
    with pytest.raises(InputError, match="Git LFS pointer.*git lfs pull"):
        data.load_tokenizer(tmp_path, config())
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"', encoding="utf-8")
    with pytest.raises(InputError, match="not a tokenizer.json"):
        data.load_tokenizer(tmp_path, config())
    size = Tokenizer.from_file(str(words / "tokenizer.json")).get_vocab_size()
    data.load_tokenizer(words, config(vocab_size=size))
    with pytest.raises(InputError, match=f"ids go up to {size - 1}.*vocab_size {size - 1}"):
        data.load_tokenizer(words, config(vocab_size=size - 1))


def test_an_eos_token_that_is_text_is_an_error_where_the_tokenizer_names_another(words):
    tokenizer = data.load_tokenizer(words, config())
    text = tokenizer.token_to_id("!")
    assert data.end_token(tokenizer, config(eos_token_id=text)) == text  # nothing names a better one
    assert data.end_token(tokenizer, config(eos_token_id=0), EOS) == 0  # another special token is a choice
    with pytest.raises(InputError, match=f"eos_token_id {text} is the text '!'; set it to the id of '<.endoftext.>'"):
        data.end_token(tokenizer, config(eos_token_id=text), EOS)


# ------------------------------------------------------------------------------------------------------ batches


def items_of(lengths, vocab=50):
    """Items of these lengths, with different ids and prompts of different lengths; some learn two pieces."""
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, vocab, (n,), generator=generator).tolist() for n in lengths]
    starts = [1 + i % (len(x) - 1) if len(x) > 1 else 1 for i, x in enumerate(ids)]
    pieces = [
        ((s, s + 1), (s + 2, len(x))) if s + 2 < len(x) else ((s, len(x)),) for s, x in zip(starts, ids, strict=True)
    ]
    return [Encoded(x, spans) for x, spans in zip(ids, pieces, strict=True)]


def learnt(item):
    """The ids that are learnt, and -100 for those that are given."""
    return [x if any(start <= i < end for start, end in item.spans) else -100 for i, x in enumerate(item.ids)]


def test_a_batch_equals_that_of_transformers_with_labels_shifted_by_one(words):
    items = items_of([5, 2, 9, 4])
    hf = PreTrainedTokenizerFast(tokenizer_file=str(words / "tokenizer.json"), pad_token="<s>", padding_side="right")
    features = [{"input_ids": x.ids, "attention_mask": [1] * len(x.ids), "labels": learnt(x)} for x in items]
    wanted = DataCollatorForSeq2Seq(hf)(features)
    batch = data.collate(items, pad_id=0)
    assert torch.equal(batch.input_ids, wanted["input_ids"])
    assert torch.equal(batch.lengths, wanted["attention_mask"].sum(1))
    assert torch.equal(batch.labels[:, :-1], wanted["labels"][:, 1:]) and (batch.labels[:, -1] == -100).all()
    assert {t.dtype for t in (batch.input_ids, batch.lengths, batch.labels)} == {torch.int64}


def test_one_token_without_target_makes_a_batch_without_labels():
    batch = data.collate([Encoded([3], ((1, 1),))], pad_id=0)
    assert (batch.input_ids.tolist(), batch.lengths.tolist(), batch.labels.tolist()) == ([[3]], [1], [[-100]])


def test_a_sample_is_a_random_part_in_order_the_same_for_the_same_seed():
    items = list(range(7473))
    sample = data.sample(items, 0.1, seed=3)
    assert len(sample) == 747 and sample == sorted(set(sample))  # as many as the paper counts on
    assert sample == data.sample(items, 0.1, seed=3) != data.sample(items, 0.1, seed=4)
    assert 3000 < sum(sample) / len(sample) < 4500  # not the beginning of the file
    assert len(data.sample(items, 1e-9, seed=0)) == 1 and data.sample(items, 1.0, seed=0) == items


@pytest.mark.parametrize("seed", [0, 7, [3, 0], [2**31 - 1, 12]])
def test_the_random_order_is_that_of_numpy_which_runs_so_far_have_had(seed):
    for n in (1, 2, 3, 64, 65, 1000, 2000, 7473):
        assert data.permutation(n, seed) == np.random.Generator(np.random.PCG64(seed)).permutation(n).tolist()


def test_an_epoch_takes_every_example_once_in_an_order_of_its_own():
    batches = data.global_batches(23, 5, seed=1, epoch=2)
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]
    assert sorted(sum(batches, [])) == list(range(23))
    others = [data.global_batches(23, 5, seed, epoch) for seed, epoch in ((1, 3), (2, 2), (2, 1))]
    assert all(other != batches for other in others)
    # Written down: a run must find the order of its seed again after any update of a library.
    assert data.global_batches(7, 4, seed=1, epoch=2) == [[0, 6, 5, 1], [4, 3, 2]]


def test_every_process_has_a_micro_batch_with_data_when_there_is_enough():
    for n, micro_batch, world in [(2, 4, 2), (3, 1, 3), (5, 2, 2), (128, 16, 8), (49, 16, 3)]:
        ranks = [data.micro_batches(items_of([5] * n), micro_batch, rank, world) for rank in range(world)]
        assert all(part for parts in ranks for part in parts)
    assert sorted(len(data.micro_batches(items_of([5]), 4, rank, 3)[0]) for rank in range(3)) == [0, 0, 1]


def test_at_any_moment_the_processes_work_on_neighbouring_lengths():
    lengths = torch.randperm(90, generator=torch.Generator().manual_seed(0)) + 10  # all different
    ranks = [data.micro_batches(items_of(lengths.tolist()), 5, rank, 3) for rank in range(3)]
    for i in range(6):
        at_work = sorted(len(item.ids) for parts in ranks for item in parts[i])
        assert at_work == list(range(10 + 15 * i, 25 + 15 * i))


def test_no_tiny_row_is_cut(capsys):
    model_config = read_config(TINY)
    tokenizer = data.load_tokenizer(TINY, model_config)
    for task in ("tiny-math", "tiny-code", "tiny-safety"):
        items = data.encode(load_examples(task, "train", limit=300), tokenizer, model_config.eos_token_id)
        assert len(items) == 300 and all(item.ids[-1] == model_config.eos_token_id for item in items)
    assert capsys.readouterr().err == ""
