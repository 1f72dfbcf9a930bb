"""Every file that is read, odd in every way of one table: the outcome is that of the sound file, or one line that says
which file is wrong. READERS holds what reads files, ODD what may be wrong with any file, `retyped` with any JSON."""

import copy
import csv
import gzip
import io
import json
import math
import os
import pickle
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import data
import evaluate
import hellora
from command.cli import InputError
from hub import peft
from hub.chat import ChatTemplate
from hub.checkpoint import TINY
from model import load_model, read_config
from routing import profiles
from run import adapters
from run import state as states
from run.log import read_records
from scoring import completions


class Trap:
    """Unpickling it makes the folder `unpickled`."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


ODD: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "blank": lambda content: b" \n\n",
    "half": lambda content: content[: len(content) * 2 // 5],
    "without its last byte": lambda content: content[:-1],
    "zeros, as after a crash": lambda content: bytes(len(content)),
    "byte order mark": lambda content: b"\xef\xbb\xbf" + content,
    "lines of Windows": lambda content: content.replace(b"\n", b"\r\n"),
    "UTF-16": lambda content: content.decode("latin-1").encode("utf-16"),
    "Latin-1 at the end": lambda content: content + "\nZoë".encode("latin-1"),
    "many blank lines": lambda content: content + b"\n" * 100_000,
    "deeply nested": lambda content: b"[" * 100_000,
    "deeply nested objects": lambda content: b'{"a":' * 100_000,
    "null": lambda content: b"null",
    "a number": lambda content: b"7",
    "an endless number": lambda content: b"1" * 10_000,
    "NaN": lambda content: b"NaN",
    "a string": lambda content: b'"text"',
    "an empty list": lambda content: b"[]",
    "an empty object": lambda content: b"{}",
    "twice": lambda content: content + content,
    "a web page": lambda content: b"\n<!DOCTYPE html>\n<title>404</title>",
    "a pointer of Git LFS": lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n",
    "compressed": gzip.compress,
    "half of a compressed file": lambda content: gzip.compress(content)[:-9],
    "a pickle": lambda content: pickle.dumps(Trap()),
    "a zip archive": lambda content: b"PK\x03\x04\x14\x00\x06\x00\x8f\xff",
    "parquet": lambda content: b"PAR1\x15\x04\x15\x80",
    "huge header": lambda content: b"\xff" * 8 + content[8:],
}
VALUES = (None, True, -1, 10**30, 1.5, math.nan, "", "x", "\ud83d", [], [[]], {}, {"a": 1}, [None])


def retyped(content: bytes, lines: bool) -> Iterator[tuple[str, object, object, bytes]]:
    """(place, value there, another, the file with it) for every value of a JSON file, or of one with rows as lines."""
    whole = [json.loads(line) for line in content.decode().splitlines()] if lines else json.loads(content)

    def places(value: object, path: tuple) -> Iterator[tuple]:
        keys = list(value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ())
        for key in keys[:2] if isinstance(value, list) or len(keys) > 40 else keys:  # which stand for the rest
            yield (*path, key)
            yield from places(value[key], (*path, key))

    for path in places(whole, ()):
        for other in VALUES:
            changed = copy.deepcopy(whole)
            place = changed
            for key in path[:-1]:
                place = place[key]
            value, place[path[-1]] = place[path[-1]], other
            text = "\n".join(map(json.dumps, changed)) if lines else json.dumps(changed)
            yield ".".join(map(str, path)), value, other, text.encode()


class Reader(NamedTuple):
    """A folder of sound files, and what reads it."""

    files: dict[str, bytes]
    read: Callable[[Path], object]
    sealed: bool = False  # a change of any bit is noticed
    sound: tuple[str, ...] = ()  # of ODD: files that hold other rows
    lenient: bool = False  # what is not whole is skipped


def equal(a: object, b: object) -> bool:
    """Bit-equal, tensors too."""
    if isinstance(a, torch.Tensor):
        return a.equal(b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(equal, a, b))
    return a == b


def text(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, indent=1).encode()


def lines(*rows: dict) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def tables(*rows: list[str]) -> bytes:
    table = io.StringIO()
    csv.writer(table).writerows(rows)
    return table.getvalue().encode()


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


def checkpoint(olmoe: Path, folder: Path, *names: str) -> Reader:
    shutil.copytree(olmoe, folder, dirs_exist_ok=True)
    if "model.safetensors.index.json" in names:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        keys = load_file(folder / "part.safetensors").keys()
        (folder / names[0]).write_bytes(text({"weight_map": dict.fromkeys(keys, "part.safetensors")}))
    return Reader(contents(folder, *names), lambda folder: dict(load_model(folder).named_parameters()))


def config(olmoe: Path, folder: Path) -> Reader:
    return Reader(contents(olmoe, "config.json"), read_config)


def tokenizer(olmoe: Path, folder: Path) -> Reader:
    def read(folder: Path) -> object:
        read = data.load_tokenizer(folder, read_config(TINY))
        return data.tokenize(["Two and 2."], read)

    return Reader(contents(TINY, "tokenizer.json"), read)


def adapter(olmoe: Path, folder: Path) -> Reader:
    model = load_model(olmoe)
    hellora.attach(model, hellora.select_experts("random", torch.ones(4, 7), 2), 3, 6.0, kind="lori", seed=4)
    adapters.save_adapter(adapters.adapter_state(model), folder, model.adapter, model="m", method="hellora")
    return Reader(contents(folder, "adapter.json", "adapter.safetensors"), adapters.read_adapter, sealed=True)


def state(olmoe: Path, folder: Path) -> Reader:
    parameter = torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    states.save_state(folder, 5, {"a": parameter}, optimizer, {"numbers": {"tokens": 7}}, 1)

    def read(folder: Path) -> tuple:
        about = states.read_state(folder)
        states.load_tensors(folder, {"a": parameter}, optimizer, about["updates"])
        return about, {name: t.clone() for name, t in states.with_moments({"a": parameter}, optimizer).items()}

    return Reader(contents(states.last_state(folder), "state.json", "model.safetensors"), read, sealed=True)


def routing(olmoe: Path, folder: Path) -> Reader:
    about = {"model": "m", "task": "t", "num_tokens": 14, "num_experts_per_tok": 3}

    def read(folder: Path) -> object:
        read = profiles.load_profile(folder / "profile.json")
        profiles.check_fits(read, read_config(olmoe), folder / "profile.json")
        return read.counts, read.gate_mass, read.num_experts_per_tok

    return Reader({"profile.json": text(about | {"counts": [[6] * 7] * 4, "gate_mass": [[1.25] * 7] * 4})}, read)


def peft_adapter(olmoe: Path, folder: Path) -> Reader:
    q_proj = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight".format
    save_file({q_proj("A"): torch.ones(2, 48), q_proj("B"): torch.ones(48, 2)}, folder / "adapter_model.safetensors")
    about = {"peft_type": "LORA", "r": 2, "lora_alpha": 4.0, "base_model_name_or_path": "tiny", "bias": "none"}
    about |= {"use_dora": False, "rank_pattern": {}}

    def read(folder: Path) -> object:
        peft.base_of(folder)
        return adapters.read_any_adapter(folder, read_config(olmoe))

    files = contents(folder, "adapter_model.safetensors") | {"adapter_config.json": text(about)}
    return Reader(files, read)


def run(olmoe: Path, folder: Path) -> Reader:
    settings = {"task": "tiny-math", "method": "hellora", "train_data": None, "max_length": 64}

    def read(folder: Path) -> object:
        settings, subject = evaluate.read_settings([str(folder), "--task", "tiny-math"])
        return settings.task, settings.train_data, settings.max_length, subject.config

    return Reader({"config.json": text({"model": "tiny", "settings": settings, "commit": None})}, read)


def log(olmoe: Path, folder: Path) -> Reader:
    def read(folder: Path) -> object:
        path = folder / "log.jsonl"
        return [record["step"] for record in read_records(path, 2)]

    return Reader({"log.jsonl": lines({"step": 1, "loss": 2.5}, {"step": 2, "loss": None})}, read)


def experts(olmoe: Path, folder: Path) -> Reader:
    def read(folder: Path) -> object:
        return adapters.read_hot(folder / "hot.json", read_config(olmoe))

    return Reader({"hot.json": text([[0, 3], [6], [2, 1], [5]])}, read)


def rows(task: str, split: str, name: str, content: bytes, **more: object) -> Callable[[Path, Path], Reader]:
    def read(folder: Path) -> object:
        return data.load_examples(task, split, folder if name == "category_1.csv" else folder / name)

    return lambda olmoe, folder: Reader({name: content}, read, **more)


def chats(olmoe: Path, folder: Path) -> Reader:
    (folder / "chat_template.jinja").write_text("{% for turn in messages %}{{ turn.content }}\n{% endfor %}")
    template = ChatTemplate(folder, Tokenizer.from_file(str(TINY / "tokenizer.json")))
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]

    def read(folder: Path) -> object:
        return data.load_examples("own", "train", folder / "a.jsonl", template=template)

    return Reader({"a.jsonl": lines({"messages": turns}, {"messages": turns})}, read, sound=("twice",))


def answers(olmoe: Path, folder: Path) -> Reader:
    def read(folder: Path) -> object:
        return completions.read_completions(
            folder / "answers.jsonl", ["0", "1", "2"], None, partial=True, several=False
        )

    return Reader({"answers.jsonl": lines({"id": 0, "completion": "4 ë"}, {"id": "1", "completion": "5"})}, read)


def generations(olmoe: Path, folder: Path) -> Reader:
    rows = [{"id": str(i), "sample": 0, "completion": "4", "cut": False} for i in range(2)]
    return Reader({"generations.jsonl": lines(*rows)}, completions.read_generations, lenient=True)


def evaluation(olmoe: Path, folder: Path) -> Reader:
    score = text({"accuracy": 0.5, "problems": "d" * 64, "settings": {"task": "tiny-math"}})
    items = lines({"id": "0", "correct": True, "label": None}, {"id": "1", "correct": False})
    return Reader({"score.json": score, "items.jsonl": items}, lambda folder: evaluate.compare([str(folder)] * 2))


QUESTION = {"question": "Zoë has 3.\nHow many?", "answer": "3 + <<1=1>>1\n#### 4"}
ALPACA = {"instruction": "Say hi, Zoë.", "input": "", "output": "Hi."}
PROBLEM = {"task_id": "a/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f): assert f() == 1"}
TABLE = tables(["prompt", "type"], ['Say "a",\nor b', "x"], ["ë", "y"])
OTHER_ROWS = ("half", "without its last byte", "lines of Windows", "twice")  # csv that is sound
READERS: dict[str, Callable[[Path, Path], Reader]] = {
    "config.json": config,
    "weights": lambda olmoe, folder: checkpoint(olmoe, folder, "model.safetensors"),
    "index": lambda olmoe, folder: checkpoint(olmoe, folder, "model.safetensors.index.json"),
    "tokenizer.json": tokenizer,
    "profile.json": routing,
    "adapter": adapter,
    "state": state,
    "adapter of PEFT": peft_adapter,
    "run": run,
    "log.jsonl": log,
    "list of experts": experts,
    "gsm8k.jsonl": rows("gsm8k", "train", "a.jsonl", lines(QUESTION, QUESTION), sound=("twice",)),
    "alpaca.json": rows("codealpaca", "train", "a.json", text([ALPACA, ALPACA])),
    "chats": chats,
    "own": rows("own", "train", "a.jsonl", lines({"prompt": "2 + 2?", "completion": "4"}), sound=("twice",)),
    "HumanEval": rows("codealpaca", "test", "a.jsonl", lines(PROBLEM)),
    "xstest.csv": rows("saferpaca", "test", "a.csv", TABLE, sound=OTHER_ROWS),
    "HEx-PHI": rows("saferpaca", "test", "category_1.csv", tables(["Do this."], ["Zoë"]), lenient=True),
    "completions": answers,
    "generations": generations,
    "evaluation": evaluation,
}


def put(path: Path, content: bytes | Callable[[Path], object]) -> None:
    """A file of this content in this place, or what a function makes there."""
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        content(path)


@pytest.fixture(params=READERS)
def wrong(request, olmoe, tmp_path, monkeypatch) -> Callable[[Callable[[Reader, str, bytes], Iterator]], list[str]]:
    """wrong(odd): every outcome that is neither the sound file's nor one line that names the folder.

    odd(reader, name, content): what to put in place of a sound file, as (label, content, may it be read differently).
    """
    folder = tmp_path / 'the "odd" {} %s ñ 文件'
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    reader = READERS[request.param](olmoe.folder, folder)
    for name, content in reader.files.items():
        (folder / name).write_bytes(content)
    sound_result = copy.deepcopy(reader.read(folder))

    def outcome(may_differ: bool) -> str | None:
        try:
            result = reader.read(folder)
            return None if may_differ or equal(result, sound_result) else "another result"
        except InputError as error:
            message = str(error)
            names = may_differ or folder.name in message
            return None if names and "\n" not in message and len(message) < 3000 else message
        except Exception as error:
            return f"{type(error).__name__}: {error}"

    def run(odd: Callable[[Reader, str, bytes], Iterator]) -> list[str]:
        outcomes = []
        for name, content in reader.files.items():
            for label, other, may_differ in odd(reader, name, content):
                put(folder / name, other)
                if said := outcome(may_differ):
                    outcomes.append(f"{name}, {label}: {said:.200}")
                put(folder / name, content)
        assert not (tmp_path / "unpickled").exists()
        return outcomes

    return run


def test_an_odd_file_is_read_as_the_sound_one_or_is_one_line(wrong):
    def odd(reader: Reader, name: str, content: bytes) -> Iterator[tuple[str, bytes, bool]]:
        for label, change in ODD.items():
            yield label, change(content), label in reader.sound or reader.lenient

    assert not wrong(odd)


def test_what_is_no_file_is_one_line(wrong):
    def odd(reader: Reader, name: str, content: bytes) -> Iterator[tuple[str, Callable[[Path], object], bool]]:
        if not reader.lenient:
            yield "missing", lambda path: None, False
            yield "a folder", Path.mkdir, False
            yield "a link to itself", lambda path: path.symlink_to(path), False

    assert not wrong(odd)


def test_a_value_of_another_type_anywhere_in_a_json_file_is_one_line_or_is_not_used(wrong):
    def odd(reader: Reader, name: str, content: bytes) -> Iterator[tuple[str, bytes, bool]]:
        for place, value, other, text in (
            retyped(content, name.endswith("l")) if ".json" in name and name != "tokenizer.json" else ()
        ):
            number = isinstance(value, float) and isinstance(other, int)
            may_differ = type(value) is type(other) or number or not other or not value or reader.lenient
            yield f"{place} {value!r:.20} -> {other!r:.20}", text, may_differ

    assert not wrong(odd)


def test_a_key_with_two_values_is_one_line(wrong):
    def odd(reader: Reader, name: str, content: bytes) -> Iterator[tuple[str, bytes, bool]]:
        if ".json" in name and content.lstrip().startswith(b"{"):
            key = next(iter(json.loads(content.splitlines()[0] if name.endswith("l") else content)))
            yield key, content.replace(b"{", b'{"%s": "other", ' % key.encode(), 1), False

    assert not wrong(odd)


def test_flipped_bits_are_one_line_or_another_file_that_is_sound(wrong):
    def odd(reader: Reader, name: str, content: bytes) -> Iterator[tuple[str, bytes, bool]]:
        draw = random.Random(0)
        is_weights = name.endswith(".safetensors") and not reader.sealed  # whose header alone can be wrong
        end = 8 + int.from_bytes(content[:8], "little") if is_weights else len(content)
        for _ in range(60):
            place, bits = draw.randrange(end), draw.randrange(1, 256)
            flipped = content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :]
            yield f"byte {place} ^ {bits}", flipped, not (reader.sealed or is_weights)

    assert not wrong(odd)
