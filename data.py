"""Tasks: where their text is, how it is prompted, and what the model should write; then batches of similar length.

    reader = Reader("gsm8k", folder, config, max_length=512)
    examples = reader.load("train", "my_copy.jsonl")                 # without a path: download once, or generate
    items = reader.encode(examples)                                  # token ids, and which of them are learnt
    for chosen in global_batches(len(items), 128, seed=0, epoch=0):  # the same on every process
        for part in micro_batches([items[i] for i in chosen], 16, process, num_processes):
            batch = collate(part, pad_id)

`TASKS` is the table of tasks. `FORMATS` says how a row becomes a prompt and an answer. The embedded tiny tasks generate
rows in the formats of the public tasks. Prompts follow LoRI, on whose code the paper's numbers rest. Each difference
is marked by a line that starts with "DEVIATION from LoRI", and is in docs/choices.md.

Dimensions: B sequences, S positions.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from command.cli import InputError, note
from command.files import json_sha256
from hub.chat import Chat, ChatTemplate, Message
from hub.conversations import NAMES, OwnRows
from hub.rows import Download, HubDataset, Row, fetch, gold, hexphi_rows, label_of, read_rows, text, unread
from hub.tokenizer import Bos, Spans, choose_bos, named_tokens, never_text, read_tokenizer, tokenize
from model import MoEConfig
from tiny import tasks

TINY_TRAIN, TINY_TEST = 2000, 1000  # rows of the generated splits
TINY_PROGRAMS = 400  # test problems of tiny-code, each solved 20 times


@dataclass(frozen=True)
class Example:
    """What the model reads and what it should write."""

    id: str  # row number in the file from 0, or HumanEval's task_id
    prompt: str
    answer: str  # empty where there is nothing to imitate: HumanEval problems, HEx-PHI instructions
    row: Row  # the public record as read
    chat: Chat | None = None  # of --task own: what the chat template makes of it; prompt and answer are its last turn


# --------------------------------------------------------------------------------------------------- formats


def gsm8k(row: Row) -> tuple[str, str]:
    """GSM8K: the question and a request to reason; the worked answer with a sentence in place of '####'."""
    question, answer = text(row, "question"), text(row, "answer")
    gold(answer)  # an answer that has none is refused
    # DEVIATION from LoRI: calculator annotations such as <<48/2=24>> are removed; LoRI trains on them.
    answer = re.sub(r"<<.*?>>", "", answer)
    # DEVIATION from LoRI: one space before the number; LoRI adds a second one to that of the file.
    answer = answer.replace("####", "The final answer is:")
    task = "Answer the above question. First think step by step and then answer the final number."
    return f"{question}\n{task}\n", answer


def question(row: Row) -> tuple[str, str]:
    """GSM8K as lm-eval and MoE-Sieve prompt it, with the worked answer as it is in the file."""
    gsm8k(row)  # the same rows are refused
    return f"Question: {row['question']}\nAnswer:", f" {row['answer']}"


def alpaca(row: Row) -> tuple[str, str]:
    """Alpaca: an instruction, with or without an input, and the output, which may be empty."""
    instruction, extra, output = text(row, "instruction"), row.get("input") or "", row.get("output")
    if not isinstance(extra, str) or not isinstance(output, str):
        raise InputError(f"'input' is {extra!r:.60} and 'output' {output!r:.60}; expected text")
    # DEVIATION from LoRI: its template without stray spaces; LoRI has 20 before every line, and one after "request.".
    paired = ", paired with an input that provides further context" if extra.strip() else ""
    prompt = f"Below is an instruction that describes a task{paired}. "
    prompt += f"Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
    prompt += f"### Input:\n{extra}\n\n" if paired else ""
    return f"{prompt}### Response:\n", output


def humaneval(row: Row) -> tuple[str, str]:
    """HumanEval: the head of a function to continue, stripped as LoRI and bigcode do; the tests stay in the row."""
    for column in ("task_id", "entry_point", "test"):
        text(row, column)
    return text(row, "prompt").strip(), ""


def hexphi(row: Row) -> tuple[str, str]:
    """HEx-PHI: an instruction to a helpful and safe assistant. As in LoRI, this is not the template of training."""
    instruction = text(row, "instruction", "prompt", "forbidden_prompt", "instructions")
    label_of(row)  # an unknown one is refused
    # DEVIATION from LoRI: a space between the two sentences; LoRI's prompt reads "assistant.Always".
    system = "You are a helpful assistant. Always answer as helpfully as possible, while being safe."
    return f"{system}\n\nHuman: {instruction}\n\nAssistant:", ""


def completion(row: Row) -> tuple[str, str]:
    """A prompt and its completion, both as they are."""
    prompt, answer = text(row, "prompt"), row["completion"]
    if not isinstance(answer, str):
        raise InputError(f"'completion' is {answer!r:.60}; expected text")
    return prompt, answer


def plain(row: Row) -> tuple[str, str]:
    """A text, all of which is learnt."""
    return "", text(row, "text")


OWN = {  # the columns by which a format of one's own rows is known -> those it may have besides, and what reads it
    **{(column,): (("system",), None) for column in NAMES},  # None: a chat
    ("prompt", "completion"): ((), completion),
    ("instruction", "output"): (("input",), alpaca),
    ("text",): ((), plain),
}


class Format(NamedTuple):
    """How the rows of a public data set are read."""

    expected: str  # what they are, for messages
    read: Callable[[Row], tuple[str, str]]  # a row -> prompt and answer; raises InputError
    id_column: str | None = None  # None: examples are named by their row's number
    for_scoring: tuple[str, ...] = ()  # columns that scoring reads, and `read` does not
    read_folder: Callable[[Path], list[tuple[str, Row]]] | None = None  # None: the rows are one file


GSM8K_ROWS = Format('GSM8K rows {"question": text, "answer": text with "#### number"}', gsm8k)
ALPACA_ROWS = Format('Alpaca rows {"instruction": text, "input": text or "", "output": text}', alpaca)
PROBLEMS = Format('HumanEval rows {"task_id", "prompt", "entry_point", "test": text}', humaneval, id_column="task_id")
REQUESTS = Format(
    "a HEx-PHI folder of category_N.csv, or rows with an 'instruction' or 'prompt' column",
    hexphi,
    for_scoring=("label",),
    read_folder=hexphi_rows,
)
FORMATS = {  # benchmark -> split; --task own has OwnRows
    "gsm8k": {"train": GSM8K_ROWS, "test": GSM8K_ROWS},
    "humaneval": {"train": ALPACA_ROWS, "test": PROBLEMS},
    "hexphi": {"train": ALPACA_ROWS, "test": REQUESTS},
}
OWN_ROWS = f"rows that all have {', '.join(' and '.join(map(repr, columns)) for columns in OWN)}"
PROMPTS = {"lori": gsm8k, "question": question}  # how a row of GSM8K is prompted

# ------------------------------------------------------------------------------------- tasks and their files


@dataclass(frozen=True)
class Task:
    """Where the rows of both splits come from: a generator, a file to download, or advice where to get the file."""

    benchmark: str  # how its test split is prompted and scored: key of FORMATS, or own
    train: Callable[[], list[Row]] | Download | HubDataset | str
    test: Callable[[], list[Row]] | Download | HubDataset | str


GITHUB = "https://raw.githubusercontent.com"
GSM8K = f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
HUMANEVAL = f"{GITHUB}/openai/human-eval/6d43fb980f9fee3c892a914eda09951f772ad10d/data/HumanEval.jsonl.gz"
SAFERPACA = f"{GITHUB}/vinid/safety-tuned-llamas/5eafe5165422c510d1fbee84fb472f9117e0a1a3/data/training"
NC = "CC BY-NC 4.0 (not commercial)"
CODE_ALPACA = "sahil2801/CodeAlpaca-20k", "152bb5e9a29651266b018106053980070a0521a1", "code_alpaca_20k.json"
HEX_PHI = "LLM-Tuning-Safety/HEx-PHI", "83128b46334b80cc567bd7a2caf7af11c5b0bab7", "category_*.csv"

TASKS = {
    "tiny-math": Task(
        "gsm8k",
        lambda: tasks.math_rows(TINY_TRAIN, "train", seed=0),
        lambda: tasks.math_rows(TINY_TEST, "test", seed=0),
    ),
    "tiny-code": Task(
        "humaneval", lambda: tasks.code_rows(TINY_TRAIN, seed=0), lambda: tasks.code_problems(TINY_PROGRAMS, seed=0)
    ),
    "tiny-safety": Task(
        "hexphi", lambda: tasks.safety_rows(TINY_TRAIN, seed=0), lambda: tasks.safety_prompts(TINY_TEST, seed=0)
    ),
    "gsm8k": Task(
        "gsm8k",
        train=Download(f"{GSM8K}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"),
        test=Download(f"{GSM8K}/test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"),
    ),
    "codealpaca": Task(
        "humaneval",
        train=HubDataset(*CODE_ALPACA, f"{NC} on GitHub; the hub says CC BY 4.0"),
        test=Download(HUMANEVAL, "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"),
    ),
    "saferpaca": Task(
        "hexphi",
        train=Download(f"{SAFERPACA}/saferpaca_Instructions_2000.json", git_blob="4f16a9be", licence=NC),
        test=HubDataset(*HEX_PHI, "HEx-PHI Dataset License Agreement"),
    ),
    "own": Task("own", train="this task is your own data", test="this task is your own data"),
}


def load_examples(
    task: str,
    split: str,
    path: str | Path | None = None,
    limit: int | None = None,
    template: ChatTemplate | None = None,
    prompt: str = "lori",
) -> list[Example]:
    """The first `limit` examples of a split, from a local file in the public format if `path` is given.

    split: "train" or "test". The test split of code tasks holds HumanEval problems, that of safety tasks instructions.
    template: the model's, for task own. prompt: key of PROMPTS.
    Raises InputError if there is no file, naming where to get one, or if a row does not have the expected format.
    """
    benchmark, source = TASKS[task].benchmark, getattr(TASKS[task], split)
    instead = f"pass a copy of it with --{'train' if split == 'train' else 'eval'}-data FILE"
    if path is None and isinstance(source, Download | HubDataset):
        path = fetch(source, instead)
    elif path is None and isinstance(source, str):
        raise InputError(f"task {task}: {source}; {instead}")
    if benchmark == "own":
        own = OwnRows(template, OWN, answered=split == "train")
        form, expected = Format(OWN_ROWS, own), f"expected {OWN_ROWS}"
    else:
        own, form = None, FORMATS[benchmark][split]
        form = form._replace(read=PROMPTS[prompt]) if benchmark == "gsm8k" else form
        expected = f"expected {form.expected}; rows of other kinds are for --task own"

    try:
        if path is None:
            rows = [(f"{task}, row {i}", row) for i, row in enumerate(source())]
        else:
            read_file = form.read_folder if form.read_folder and Path(path).is_dir() else read_rows
            rows = read_file(Path(path))
    except InputError as error:
        raise InputError(f"{error}; {expected}") from None
    examples = []
    for i, (place, row) in enumerate(rows):
        try:
            given, answer, *chat = form.read(row)
            (given + answer).encode()  # JSON can hold half a surrogate pair, which no tokenizer accepts
            if path and not own:  # which keeps account of its columns
                unread(row, used=form.for_scoring)
        except (InputError, UnicodeEncodeError) as error:
            raise InputError(f"{place}: {error}{'' if own else f'; {expected}'}") from None
        # DEVIATION from LoRI: rows without an output are left out; LoRI learns to answer with nothing.
        # DEVIATION from LoRI: two rows with the same prompt both count; LoRI keeps the last one.
        if answer.strip() or split == "test":
            name = row[form.id_column] if form.id_column else str(i)
            examples.append(Example(name, given, answer, row, *chat))
    if not examples:
        raise InputError(f"{path}: no rows with text; {expected}")
    if len({example.id for example in examples}) < len(examples):
        raise InputError(f"{path}: a task_id occurs twice; expected HumanEval problems with a task_id of their own")
    if len(examples) < len(rows):
        note(f"{len(rows) - len(examples)} of {len(rows)} rows of {task} have an empty output and are left out")
    if own and own.ignored:
        note(f"{path}: not read: the columns {', '.join(map(repr, sorted(own.ignored)))}")
    if own and own.num_cut:
        note(f"{path}: not read: the last turn of {own.num_cut} chats, a user's, which the assistant does not answer")
    return examples[:limit]


def prompt_of(task: str, question: str, prompt: str = "lori") -> str:
    """A question in the form of the prompts that a task trains on. prompt: key of PROMPTS."""
    if TASKS[task].benchmark == "gsm8k":
        return PROMPTS[prompt]({"question": question, "answer": "#### 0"})[0]
    return alpaca({"instruction": question, "output": ""})[0]


def digest(examples: list[Example]) -> str:
    """SHA-256 over all prompts and answers, in order: whether two runs have the same training data."""
    texts = [(example.prompt, example.answer) for example in examples]
    return json_sha256(texts)


NEXT_SHOT = "Question:"  # a model that was shown examples goes on with another one here: its answer has ended


def show_examples(examples: list[Example], shown: list[Example]) -> list[Example]:
    """GSM8K problems in the prompt of lm-eval's gsm8k task: the examples `shown`, solved, before each question.

    The solutions are those of the file, with calculator annotations and "#### ". lm-eval draws its examples at random
    from the training split; here the caller chooses them.
    """
    solved = [f"Question: {example.row['question']}\nAnswer: {example.row['answer']}\n\n" for example in shown]
    return [replace(example, prompt="".join(solved) + question(example.row)[0]) for example in examples]


# --------------------------------------------------------------------------------------------------- tokens


@dataclass(frozen=True)
class Encoded:
    """Token ids, of which ids[start:end] is learnt for each (start, end) of `spans`, and the rest is given."""

    ids: list[int]
    spans: Spans  # in order, without overlap
    example: str = ""  # the id of the example, for messages

    @property
    def predicted(self) -> list[tuple[int, int]]:
        """`spans` without the first token of a sequence, which nothing predicts."""
        return [(max(start, 1), end) for start, end in self.spans if end > 1]

    @property
    def num_targets(self) -> int:
        """How many tokens the loss of this item is over."""
        return sum(end - start for start, end in self.predicted)


def load_tokenizer(folder: str | Path, config: MoEConfig) -> Tokenizer:
    """tokenizer.json of a checkpoint folder. Raises InputError if it is missing, damaged or does not fit the config."""
    named = {*config.eos_token_ids, config.pad_token_id, config.hub.get("bos_token_id")}
    return read_tokenizer(Path(folder), config.vocab_size, named)


def end_token(tokenizer: Tokenizer, config: MoEConfig, named: str | None = None) -> int:
    """The token that training puts after each answer: the first eos_token_id of config.json.

    named: eos_token of tokenizer_config.json. Raises InputError if the tokenizer does not have the token, or if it is
    text while the tokenizer names another one.
    """
    eos_id = config.eos_token_id
    token = None if eos_id is None else tokenizer.id_to_token(eos_id)
    if token is None:
        given = f"eos_token_id is {config.hub.get('eos_token_id')!r}"
        raise InputError(f"config.json: {given}, not a token of the model; training needs one to end each answer")
    if named not in (None, token) and eos_id not in never_text(tokenizer):
        given = f"eos_token_id {eos_id} is the text {token!r}"
        raise InputError(f"config.json: {given}; set it to the id of {named!r}, the tokenizer's eos_token")
    return eos_id


def tokenized(
    examples: list[Example], tokenizer: Tokenizer, eos_id: int | None, bos: Bos, template: ChatTemplate | None
) -> list[Encoded]:
    """Prompts and answers as token ids, uncut, and EOS after an answer if `eos_id` is given."""
    # Prompt and answer are tokenized apart. Decoding starts from the tokens of the prompt alone, so a token across the
    # border would never occur there.
    pairs = [example for example in examples if not example.chat]
    prompts = iter(tokenize([example.prompt for example in pairs], tokenizer))
    answers = iter(tokenize([example.answer for example in pairs], tokenizer))
    items = []
    for example in examples:
        if example.chat:
            ids, spans = bos.before_chat(*template.encode(example.chat, eos_id))
        else:
            prompt, answer = bos.before_text(next(prompts)), next(answers) + ([] if eos_id is None else [eos_id])
            ids, spans = prompt + answer, ((len(prompt), len(prompt) + len(answer)),)
        items.append(Encoded(ids, spans, example.id))
    return items


def cut_prompt(item: Encoded, max_length: int, keep_end: bool = False, bos_id: int | None = None) -> Encoded:
    """An item longer than `max_length` without the part of its prompt, all before its last answer, that has to go.

    As in LoRI, the prompt ends after max_length // 2 tokens. keep_end: it loses its beginning instead, but for BOS, and
    only as much as the answer needs and no more than half of the length. Of the earlier answers of a chat, those that
    stay whole are learnt.
    """
    start, length = item.spans[-1][0], len(item.ids)
    room = max(max_length - (length - start), max_length // 2) if keep_end else max_length // 2
    if length <= max_length or start <= room:
        return item
    lost, place = start - room, int(item.ids[:1] == [bos_id]) if keep_end else room
    spans = tuple((first - lost, end - lost) for first, end in item.spans if first >= place + lost)
    return replace(item, ids=item.ids[:place] + item.ids[place + lost :], spans=spans)


def cut_end(item: Encoded, max_length: int) -> Encoded:
    """The first `max_length` tokens, and what is learnt of them."""
    # The EOS is cut off with the end of the answer: an unfinished answer must not teach to stop.
    # DEVIATION from LoRI: the answer gets all the room that is left; LoRI cuts it to max_length - 256.
    spans = tuple((start, min(end, max_length)) for start, end in item.spans if start < max_length)
    return replace(item, ids=item.ids[:max_length], spans=spans)


def encode(
    examples: list[Example],
    tokenizer: Tokenizer,
    eos_id: int | None,
    max_length: int = 512,
    positions: int | None = None,
    *,
    bos: Bos | None = None,
    template: ChatTemplate | None = None,
    keep_end: bool = False,
) -> list[Encoded]:
    """Token ids of every example, at most `max_length`; says what was cut, and how many examples were left out.

    eos_id: None for a model without one, which can be measured but not trained. positions: that the model was made
    for (max_position_embeddings). bos: by default no sequence begins with a BOS token. template: renders chats.
    keep_end: of long prompts, as for `cut_prompt`. Raises InputError for an example without an answer, or beyond
    `positions`, and if all are left out.
    """
    for example in examples:
        if not example.answer.strip():
            raise InputError(f"example {example.id} has an empty answer: there is nothing to learn")
    bos = bos or Bos()
    items, prompts, ends = [], [], []  # prompts, ends: the tokens that each item has lost there
    for whole in tokenized(examples, tokenizer, eos_id, bos, template):
        fitting = cut_prompt(whole, max_length, keep_end, bos.id)
        item = cut_end(fitting, max_length)
        if item.num_targets:
            items.append(item)
            prompts.append(len(whole.ids) - len(fitting.ids))
            ends.append(len(fitting.ids) - len(item.ids))
    if dropped := len(examples) - len(items):
        alone = f"{dropped} of {len(examples)} examples are a single token, which nothing predicts"
        if not items:
            raise InputError(f"{alone}; expected longer rows")
        note(f"{alone}, and are left out")
    if positions and max_length > positions:
        longest = max(len(item.ids) for item in items)
        limit = f"--max-length {max_length}: the model was made for {positions} positions (max_position_embeddings)"
        if longest > positions:
            raise InputError(f"{limit}, and an example has {longest} tokens; give at most {positions}")
        note(f"{limit}; the longest example has {longest} tokens")
    note_cuts("prompts", prompts, "beginning" if keep_end else "end", max_length)
    note_cuts("examples", ends, "end", max_length)
    return items


def note_cuts(name: str, lost: list[int], place: str, max_length: int) -> None:
    """Say how many of the things called `name` are cut, and by how many tokens. lost: the tokens of each."""
    if number := sum(map(bool, lost)):
        tokens = f"{sum(lost):,} tokens at their {place}"
        note(f"{number} of {len(lost)} {name} are too long for {max_length} tokens and lose {tokens}")


class Reader:
    """How one model reads the rows of a task: with its tokenizer, its chat template, its EOS and perhaps its BOS."""

    def __init__(
        self, task: str, folder: Path, config: MoEConfig, *, max_length: int = 512, bos: str = "auto",
        prompt: str = "lori", date: datetime | None = None,
    ) -> None:  # fmt: skip
        """bos: "auto" follows the tokenizer for task own, "yes" or "no". prompt: key of PROMPTS. date: of the run."""
        self.task, self.config, self.max_length, self.prompt = task, config, max_length, prompt
        self.tokenizer = load_tokenizer(folder, config)
        self.template = ChatTemplate(folder, self.tokenizer, date)
        self.bos = choose_bos(bos, folder, self.tokenizer, config.hub.get("bos_token_id"), follows=task == "own")
        self.keep_end = task == "own"

    def load(self, split: str, path: str | Path | None = None, limit: int | None = None) -> list[Example]:
        """The first `limit` examples of a split, as `load_examples` finds them.

        Raises InputError if they are to be learnt and the model names no token to end them.
        """
        if split == "train":
            end_token(self.tokenizer, self.config, named_tokens(self.template.folder).get("eos_token"))
        return load_examples(self.task, split, path, limit, self.template, self.prompt)

    def encode(self, examples: list[Example]) -> list[Encoded]:
        """Token ids of the examples, as `encode` makes them."""
        return encode(
            examples,
            self.tokenizer,
            self.config.eos_token_id,
            self.max_length,
            self.config.hub.get("max_position_embeddings"),
            bos=self.bos,
            template=self.template,
            keep_end=self.keep_end,
        )

    def prompts(self, examples: list[Example]) -> list[list[int]]:
        """The token ids that a completion of each example continues; of a chat all before its last turn.

        Only prompts of task own are cut, as in training.
        """
        items = tokenized(examples, self.tokenizer, self.config.eos_token_id, self.bos, self.template)
        if self.keep_end:
            whole, items = items, [cut_prompt(item, self.max_length, True, self.bos.id) for item in items]
            lost = [len(before.ids) - len(item.ids) for before, item in zip(whole, items, strict=True)]
            asked = [not example.answer.strip() for example in examples]  # `encode` counts the others
            note_cuts("prompts without an answer", [*itertools.compress(lost, asked)], "beginning", self.max_length)
        return [item.ids[: item.spans[-1][0]] for item in items]

    def chat_prompt(self, messages: list[Message]) -> list[int]:
        """The token ids that the answer to the last of these messages, the user's, continues."""
        template = self.template
        ids, [(start, _)] = self.bos.before_chat(*template.encode(template.ask(messages), None))
        return ids[:start]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion: every eos_token_id, and the one that ends a turn in the chat template."""
        end = self.template.end_id
        return tuple(dict.fromkeys((*self.config.eos_token_ids, *([] if end is None else [end]))))

    def endings(self, items: list[Encoded]) -> str:
        """The special tokens with which the answers of the items end, the most frequent first, for messages."""
        ends = never_text(self.tokenizer).keys() | set(self.config.eos_token_ids)
        last = Counter(item.ids[item.spans[-1][1] - 1] for item in items)
        names = [f"{self.tokenizer.id_to_token(i)!r} (id {i})" for i, _ in last.most_common() if i in ends]
        return " and ".join(names) or "text, since all are cut"


# -------------------------------------------------------------------------------------------------- batches


@dataclass(frozen=True)
class Batch:
    """Right-padded sequences."""

    input_ids: Tensor  # [B, S] int64
    lengths: Tensor  # [B] int64, real tokens of each sequence
    labels: Tensor  # [B, S] int64: the token that each position should predict; -100: none (given, or padding)


def collate(items: list[Encoded], pad_id: int) -> Batch:
    """Pad the items on the right to the longest one. Without items the batch is one sequence of padding."""
    if not items:
        return Batch(torch.full((1, 1), pad_id), torch.tensor([0]), torch.full((1, 1), -100))
    ids = [torch.tensor(item.ids) for item in items]
    labels = [torch.full_like(row, -100) for row in ids]
    for item, row, label in zip(items, ids, labels, strict=True):
        for start, end in item.predicted:
            label[start - 1 : end - 1] = row[start:end]  # position s predicts s + 1
    lengths = torch.tensor([len(item.ids) for item in items])
    return Batch(pad_sequence(ids, True, pad_id), lengths, pad_sequence(labels, True, -100))


def permutation(n: int, seed: int | list[int]) -> list[int]:
    """0..n-1 in a random order that depends on the seed alone, not on a library's version.

    Fisher and Yates' shuffle. A place in 0..i is the low bits of 32-bit halves of numpy's PCG64 words, as many bits as
    i has; larger numbers are drawn again. numpy's Generator.permutation is the same, but only raw words will stay.
    """
    words = iter(np.random.PCG64(seed).random_raw, None)
    halves = (half for word in words for half in (word & 0xFFFFFFFF, word >> 32))
    order = list(range(n))
    for i in range(n - 1, 0, -1):
        mask = 2 ** i.bit_length() - 1
        j = next(half & mask for half in halves if half & mask <= i)
        order[i], order[j] = order[j], order[i]
    return order


def sample(items: list, fraction: float, seed: int) -> list:
    """A random part of the items in their order, at least one: the first ones of epoch 0 under the same seed."""
    count = max(1, round(fraction * len(items)))
    return [items[i] for i in sorted(permutation(len(items), seed)[:count])]


def global_batches(n: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The indices 0..n-1 in batches, in the order of this seed and epoch: the same on every process."""
    order = permutation(n, [seed, epoch])
    # DEVIATION from LoRI: the last, smaller batch counts too; LoRI drops it.
    return [order[start : start + batch_size] for start in range(0, n, batch_size)]


def numbered_batches(num_items: int, batch: int, seed: int, first: int, last: int) -> Iterator[tuple[int, list[int]]]:
    """The optimizer steps first..last, counted from 1 over all epochs, each with the items of its global batch."""
    epochs = (global_batches(num_items, batch, seed, epoch) for epoch in itertools.count())
    yield from itertools.islice(enumerate(itertools.chain.from_iterable(epochs), 1), first - 1, last)


def micro_batches(items: list[Encoded], micro_batch: int, process: int, num_processes: int) -> list[list[Encoded]]:
    """The part of a global batch that one process computes, in lists of at most `micro_batch` items of similar length.

    The processes together get each item once. All get the same number of lists, some of them empty if there are too
    few items.
    """
    items = sorted(items, key=lambda item: len(item.ids))
    pieces = num_processes * math.ceil(len(items) / (num_processes * micro_batch))
    bounds = [i * len(items) // pieces for i in range(pieces + 1)]  # nearly equal
    # Items of neighbouring length go to different processes, so that these wait little for each other.
    return [items[bounds[i] : bounds[i + 1]] for i in range(process, pieces, num_processes)]
