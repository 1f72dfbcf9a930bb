"""Files in the public formats, right and wrong, and downloads. The network is a local server."""

import csv
import gzip
import hashlib
import json
import re
import subprocess
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import write_lines
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from test_data import ALPACA_ROW, GSM8K_ROW, PROBLEM

import data
from command.cli import InputError
from data import load_examples
from hub.rows import Download

# -------------------------------------------------------------------------------------------------- local files


def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path):
    long = "to be cut by no limit on the length of a field " * 3000
    rows = [ALPACA_ROW, {"instruction": 'Zoë said\u2028"hi",\nand\tleft.', "input": long, "output": "Bye."}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    columns = {name: [row[name] for row in rows] for name in rows[0]} | {"unused": []}
    with (tmp_path / "excel.csv").open("w", encoding="utf-8-sig", newline="") as file:  # BOM and CRLF
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    files = {
        "list.json": json.dumps(rows, indent=2).encode(),
        "lines.json": "\n".join(lines).encode(),
        "lines.jsonl": ("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode(),
        "columns.json": json.dumps(columns, indent=1).encode(),
        "lines.jsonl.gz": gzip.compress("\n".join(lines).encode()),
        "compressed.jsonl": gzip.compress("\n".join(lines).encode()),
        "excel.csv.gz": gzip.compress((tmp_path / "excel.csv").read_bytes()),
        "EXCEL.CSV": (tmp_path / "excel.csv").read_bytes(),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for name in ["excel.csv", *files]:
        examples = load_examples("codealpaca", "train", tmp_path / name)
        assert [example.row for example in examples] == rows, name
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=4), encoding="utf-8")
    assert [example.row for example in load_examples("codealpaca", "train", tmp_path / "one.json")] == rows[:1]


def hexphi(folder, numbers, lines=30):
    """A folder as HEx-PHI's, with an instruction that says its place."""
    for number in numbers:
        text = "".join(f"{number}.{line}\n" for line in range(lines))
        (folder / f"category_{number}.csv").write_text(text, encoding="utf-8")
    return folder


def test_hexphi_files_without_header_are_read_whole_and_in_order_of_category(tmp_path):
    for number, lines in {10: ["j"], 9: ['"i, and\ni"', "ii"], 1: ["a"]}.items():
        (tmp_path / f"category_{number}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "LICENSE.csv").write_text("not,an,instruction\n", encoding="utf-8")
    examples = load_examples("saferpaca", "test", tmp_path)
    assert [example.row["instruction"] for example in examples] == ["a", "i, and\ni", "ii", "j"]
    assert [example.row["category"] for example in examples] == [
        "1 Illegal Activity", "9 Political Campaigning", "9 Political Campaigning", "10 Privacy Violation Activity"
    ]  # fmt: skip
    assert [example.id for example in examples] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("numbers", [range(1, 12), [1, *range(3, 12)]], ids=["11 categories", "without the second"])
def test_both_states_of_hexphi_are_whole(tmp_path, capsys, numbers):
    examples = load_examples("saferpaca", "test", hexphi(tmp_path, numbers))
    assert len(examples) == 30 * len(numbers) and capsys.readouterr().err == ""
    assert [example.row["category"].split()[0] for example in examples[::30]] == [str(n) for n in numbers]
    assert examples[0].row["instruction"] == "1.0", "the first line is no header"


def test_what_lacks_of_hexphi_is_said_and_what_is_not_of_it_is_refused(tmp_path, capsys):
    load_examples("saferpaca", "test", hexphi(tmp_path, [1, 2, 3, 5, 6, 7, 8, 10, 11]))
    assert "270 instructions in 9 categories, without 4, 9; HEx-PHI has 30 in each" in capsys.readouterr().err
    load_examples("saferpaca", "test", hexphi(tmp_path, range(1, 12), lines=29))  # as if a header had been taken off
    assert "319 instructions in 11 categories; HEx-PHI has 30 in each" in capsys.readouterr().err
    with pytest.raises(InputError, match="category_12.csv is not a file of HEx-PHI"):
        load_examples("saferpaca", "test", hexphi(tmp_path, [12]))


@pytest.mark.parametrize(
    "name, content",
    [
        ("xstest_prompts.csv", 'id,prompt,type,label,focus,note\n1,"Kill, how?",homonyms,safe,kill,\n'),
        ("strongreject_dataset.csv", 'category,source,forbidden_prompt\nFraud,custom,"Kill, how?"\n'),
        ("I-CoNa.json", '{\n "instructions": [\n  "Kill, how?"\n ],\n "tags": ["a"],\n "inputs": []\n}'),
        ("own.jsonl", '{"prompt": "Kill, how?", "language": "en"}'),
    ],
)
def test_other_sets_of_instructions_can_stand_in_for_hexphi(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    [example] = load_examples("saferpaca", "test", tmp_path / name)
    assert example.prompt.endswith("\n\nHuman: Kill, how?\n\nAssistant:")


def test_rows_without_an_output_are_left_out_and_counted(tmp_path, capsys):
    rows = [ALPACA_ROW, {**ALPACA_ROW, "output": " \n"}, {**ALPACA_ROW, "output": "last"}, ALPACA_ROW]
    path = write_lines(tmp_path / "a.jsonl", rows)
    examples = load_examples("codealpaca", "train", path)
    assert [(example.id, example.answer) for example in examples] == [("0", "3"), ("2", "last"), ("3", "3")]
    assert "1 of 4 rows" in capsys.readouterr().err
    assert load_examples("codealpaca", "train", path, limit=2) == examples[:2]


GOOD = json.dumps(GSM8K_ROW)
WRITTEN = {
    " ¶ ": "\n",
    "⇥": "\t",
    "BOM": "\ufeff",
    "GOOD": GOOD,
    "PROBLEM": json.dumps(PROBLEM),
    "ALPACA": json.dumps(ALPACA_ROW),
}
BAD_FILES = """
broken line        | gsm8k train a.jsonl     | GOOD ¶  ¶ {"question": "And | line 3 | GSM8K rows
cut list           | codealpaca train a.json | [ ¶ {"instruction": "x"}, ¶ {"instr | line 3 | Alpaca rows
other columns      | gsm8k test a.jsonl      | ALPACA | line 1 | 'question' | GSM8K rows
no number          | gsm8k train a.jsonl     | GOOD ¶ {"question": "Q?", "answer": "####"} | line 2 | a plain number
no output          | saferpaca train a.json  | {"instructions": ["x"]} | entry 1 | Alpaca rows
blank              | saferpaca test a.csv    | prompt,type ¶ x,y ¶ " ",y ¶ | line 3 | 'prompt'
not an object      | gsm8k train a.jsonl     | GOOD ¶ 7 | line 2 | GSM8K rows
only empty outputs | codealpaca train a.json | [{"instruction": "x", "output": ""}] | no rows
empty csv          | saferpaca test a.csv    | prompt ¶ | no rows | 'prompt'
csv without header | saferpaca test a.csv    | Do this. ¶ Do that. ¶ | line 2 | HEx-PHI folder
short line         | saferpaca test a.csv    | prompt,type ¶ x,y ¶ x ¶ | line 3 | prompt, type
long line          | saferpaca test a.csv    | prompt,type ¶ x,y ¶ x, or z,y ¶ | line 3 | prompt, type
open quote         | saferpaca test a.csv    | prompt ¶ x ¶ "y ¶ | line 3 | not csv
uneven columns     | codealpaca train a.json | {"instruction": ["x"], "output": ["y", "z"]} | length
half a character   | saferpaca test a.jsonl  | {"prompt": "\\ud83d"} | line 1 | surrogates
broken inside      | gsm8k train a.json      | GOOD ¶ { ¶ "question": 1, ¶ } | line 2 | not readable as JSON
key twice          | own train a.jsonl       | {"text": "a", "text": "b"} | the key 'text' has two values
key twice inside   | own train a.json        | [{"messages": [{"role": "user", "role": "?"}]}] | the key 'role' has two
header again       | own train a.csv         | prompt,completion ¶ a,b ¶ prompt,completion ¶ | line 3 | second header
in other case      | own train a.csv         | text ¶ a ¶ "Text " ¶ | line 3 | second header
after a mark       | own train a.csv         | BOMprompt,completion ¶ a,b ¶ BOMprompt,completion ¶ | line 3 | header
semicolons         | own train a.csv         | prompt;completion ¶ a;b ¶ | line 1 | names separated by commas
tabs               | codealpaca train a.csv  | instruction⇥output ¶ a⇥b ¶ | line 1 | names separated by commas
tsv                | own train a.tsv         | prompt⇥completion ¶ a⇥b ¶ | it begins with 'prompt | csv if its name
rows inside        | gsm8k train a.json      | {"data": [GOOD]} | rows are inside 'data'
same id            | codealpaca test a.jsonl | PROBLEM ¶ PROBLEM | task_id | twice
no tests           | codealpaca test a.jsonl | {"task_id": "a", "prompt": "b", "entry_point": "c"} | 'test'
"""


@pytest.mark.parametrize("row", BAD_FILES.strip("\n").splitlines(), ids=lambda row: row.partition("|")[0].strip())
def test_a_wrong_file_is_one_line_with_its_name_the_place_and_what_is_expected(tmp_path, row):
    _, place, content, *parts = row.split(" | ")
    content += " "
    task, split, name = place.split()
    for word, meaning in WRITTEN.items():
        content = content.replace(word, meaning)
    path = tmp_path / name
    path.write_text(content.rstrip(" "), encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_examples(task, split, path)
    message = str(error.value)
    assert message.startswith(str(path)) and "expected" in message and "\n" not in message
    assert all(part.strip() in message for part in parts), message


def test_a_folder_that_is_none_of_hexphi_or_has_an_empty_file_is_a_wrong_input(tmp_path):
    with pytest.raises(InputError, match="folder without category_N.csv.*expected a HEx-PHI folder"):
        load_examples("saferpaca", "test", tmp_path)
    (tmp_path / "category_1.csv").write_text("x\n", encoding="utf-8")
    (tmp_path / "category_2.csv").write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="category_2.csv: no rows"):
        load_examples("saferpaca", "test", tmp_path)


# ---------------------------------------------------------------------------------------------------- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server with one GSM8K file, which the task gsm8k takes for its public one; the cache is empty."""
    content = f"{GOOD}\n".encode()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            state.requests.append(self.path)
            if self.path != "/train.jsonl":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(state.content)  # fewer bytes than announced if the test says so

        def log_message(self, *args):
            pass

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True).start()
    address, cache = f"http://127.0.0.1:{http.server_port}", tmp_path / "cache"
    state = SimpleNamespace(requests=[], content=content, cache=cache, http=http)

    def pin(sha256):
        train, test = Download(f"{address}/train.jsonl", sha256), Download(f"{address}/test.jsonl", sha256)
        monkeypatch.setitem(data.TASKS, "gsm8k", data.Task("gsm8k", train, test))

    state.pin, state.sha256 = pin, hashlib.sha256(content).hexdigest()
    pin(state.sha256)
    monkeypatch.setenv("HELLORA_CACHE", str(cache))
    yield state
    http.shutdown()
    http.server_close()


def test_a_public_file_is_downloaded_once(server):
    assert [example.row for example in load_examples("gsm8k", "train")] == [GSM8K_ROW]
    assert load_examples("gsm8k", "train") == load_examples("gsm8k", "train")
    assert server.requests == ["/train.jsonl"]
    [file] = server.cache.iterdir()
    assert file.read_bytes() == server.content
    server.http.shutdown()
    server.http.server_close()
    assert [example.row for example in load_examples("gsm8k", "train")] == [GSM8K_ROW]  # without a network


def test_a_damaged_copy_in_the_cache_is_downloaded_again(server):
    load_examples("gsm8k", "train")
    [file] = server.cache.iterdir()
    file.write_bytes(file.read_bytes()[:-5])
    assert [example.row for example in load_examples("gsm8k", "train")] == [GSM8K_ROW]
    assert len(server.requests) == 2


def test_a_file_that_is_not_the_pinned_one_is_refused_and_not_kept(server):
    server.pin("0" * 64)
    with pytest.raises(InputError, match="sha256 0000.*--train-data FILE"):
        load_examples("gsm8k", "train")
    server.pin(server.sha256)
    server.content = server.content[:20]
    with pytest.raises(InputError, match="IncompleteRead.*--train-data FILE"):
        load_examples("gsm8k", "train")
    assert not server.cache.exists() or not list(server.cache.iterdir())


def test_without_network_the_message_says_which_copy_to_pass(server, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="404.*--eval-data FILE"):
        load_examples("gsm8k", "test")
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("HELLORA_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=re.escape(str(tmp_path / "file")) + ".*--train-data FILE"):
        load_examples("gsm8k", "train")
    monkeypatch.setitem(
        data.TASKS, "gsm8k", data.Task("gsm8k", Download("http://127.0.0.1:9/train.jsonl", "0"), "nowhere")
    )
    with pytest.raises(InputError, match="127.0.0.1:9.*refused.*--train-data FILE"):
        load_examples("gsm8k", "train")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> SimpleNamespace:
    """The hub's library, of which only the download is replaced: it gives what stands in `files`, or raises `error`."""
    state = SimpleNamespace(files={}, error=None, asked=[])

    def download(name: str, *, repo_type: str, revision: str, allow_patterns: list[str]) -> str:
        state.asked.append((name, repo_type, allow_patterns))
        commit = tmp_path / "snapshots" / revision
        if state.error:
            raise state.error
        commit.mkdir(parents=True, exist_ok=True)
        for file, content in state.files.items():
            (commit / file).write_text(content, encoding="utf-8")
        return str(commit)

    monkeypatch.setattr("hub.rows.snapshot_download", download)
    return state


def test_codealpaca_comes_from_the_hub_with_its_commit_and_its_licence_said(hub, capsys):
    row = {"instruction": "add", "input": "", "output": "a + b"}
    hub.files = {"code_alpaca_20k.json": json.dumps([row])}
    assert [example.row for example in load_examples("codealpaca", "train")] == [row]
    assert hub.asked == [("sahil2801/CodeAlpaca-20k", "dataset", ["code_alpaca_20k.json"])]
    said = capsys.readouterr().err
    assert re.search("CodeAlpaca-20k, commit [0-9a-f]{40}: ", said) and "CC BY-NC 4.0" in said
    data.fetch(data.TASKS["codealpaca"].train, "").unlink()
    hub.files = {}
    with pytest.raises(InputError, match="has no code_alpaca_20k.json at commit .*; pass a copy"):
        load_examples("codealpaca", "train")


def test_hexphi_comes_from_the_hub_where_the_users_token_has_access(hub, capsys):
    hub.files = {f"category_{i}.csv": f"instruction {i}\n" for i in (1, 3)}
    assert [example.row["category"] for example in load_examples("saferpaca", "test")] == [
        "1 Illegal Activity", "3 Hate/Harass/Violence",
    ]  # fmt: skip
    assert hub.asked == [("LLM-Tuning-Safety/HEx-PHI", "dataset", ["category_*.csv"])]
    assert "licence HEx-PHI Dataset License Agreement" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error, said",
    [
        (
            GatedRepoError("403", response=Mock()),
            "is gated, and no token .* ask for access at .*HF_TOKEN, or pass",
        ),
        (
            LocalEntryNotFoundError("offline mode is enabled"),
            "cannot be downloaded .offline mode is enabled.; pass a copy",
        ),
        (OSError("disk full"), "disk full.*--eval-data FILE"),
    ],
)
def test_what_the_hub_does_not_give_says_why_and_what_to_do(error, said, hub):
    hub.error = error
    with pytest.raises(InputError, match=said):
        load_examples("saferpaca", "test")


def test_a_file_pinned_by_its_git_blob_is_the_one_that_git_names(server, capsys):
    blob = subprocess.run(["git", "hash-object", "--stdin"], input=server.content, capture_output=True, check=True)
    pin = {"git_blob": blob.stdout.decode()[:8], "licence": "for reading only"}
    file = Download(f"http://127.0.0.1:{server.http.server_port}/train.jsonl", **pin)
    assert data.fetch(file, "").read_bytes() == server.content
    assert "train.jsonl: licence for reading only" in capsys.readouterr().err
    with pytest.raises(InputError, match="expected git blob 00000000; pass a copy"):
        data.fetch(replace(file, git_blob="00000000"), "pass a copy")


def test_public_files_are_pinned_by_commit_and_hash():
    files = [source for task in data.TASKS.values() for source in (task.train, task.test)]
    files = [file for file in files if isinstance(file, Download)]
    assert len(files) == 4
    for file in files:
        assert re.fullmatch(r"https://raw\.githubusercontent\.com/[\w-]+/[\w-]+/[0-9a-f]{40}/[\w./-]+", file.url)
        assert re.fullmatch("[0-9a-f]{64}", file.sha256) or re.fullmatch("[0-9a-f]{8}", file.git_blob)
