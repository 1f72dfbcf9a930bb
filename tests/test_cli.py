"""command/cli.py: what every command accepts, refuses and answers."""

import argparse
import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import export
import train
from command import cli
from command.cli import InputError, Parser, RunError, number
from command.files import read_json
from machine.processes import start_processes

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)


def make_parser() -> Parser:
    parser = Parser(prog="cook.py", description="Cook.")
    parser.add_argument("--steps", type=number(int, 1), default=30, help="how often to stir")
    parser.add_argument("--salt", type=number(float, 0, 2, above=True), default=0.5, help="in spoons")
    parser.add_argument("--dish", choices=["soup", "stew"], default="soup", help="what to cook")
    return parser


@pytest.mark.parametrize(
    "limits, text, value",
    [
        ((int, 1), "1", 1),
        ((int, 0, 5), "5", 5),
        ((int, -3), "-3", -3),
        ((float, 0), "0", 0.0),
        ((float, 0, 1), "1e-3", 0.001),
        ((float, 0, 1), "1", 1.0),
    ],
)
def test_number_accepts_what_lies_within_its_limits(limits, text, value):
    parsed = number(*limits)(text)
    assert parsed == value and type(parsed) is limits[0]


@pytest.mark.parametrize(
    "limits, above, text",
    [
        ((int, 1), False, "0"),
        ((int, 1), False, "1.5"),
        ((int, 1), False, "1e3"),
        ((int, 1), False, "many"),
        ((int, 1), False, ""),
        ((int, 0, 5), False, "6"),
        ((float, 0), True, "0"),
        ((float, 0, 1), True, "0.0"),
        ((float, 0, 1), False, "1.001"),
        ((float, 0), False, "-1e-9"),
        ((float, 0), False, "nan"),
        ((float, 0), False, "inf"),
        ((float, -1), False, "-inf"),
    ],
)
def test_number_refuses_everything_else_and_says_what_is_allowed(limits, above, text):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        number(*limits, above=above)(text)
    message = str(caught.value)
    assert repr(text) in message and str(limits[1]) in message
    assert ("whole number" in message) == (limits[0] is int)
    assert ("above" in message) == above
    assert len(limits) < 3 or f"at most {limits[2]}" in message


@pytest.mark.parametrize(
    "argv, named",
    [
        (["--step", "3"], "--step"),  # no abbreviation
        (["--steps"], "--steps"),
        (["--steps", "0"], "'0'"),
        (["--salt", "0"], "'0'"),
        (["--dish", "cake"], "cake"),
        (["--pepper", "1"], "--pepper"),
        (["--dish", "soop"], "did you mean soup?"),
        (["extra"], "extra"),
    ],
    ids=str,
)
def test_a_wrong_flag_is_one_line_that_names_it_and_the_help(argv, named):
    with pytest.raises(InputError) as caught:
        make_parser().parse_args(argv)
    message = str(caught.value)
    assert "\n" not in message and named in message and "cook.py --help" in message


def test_right_flags_are_parsed_and_the_help_shows_the_defaults(capsys):
    args = make_parser().parse_args(["--steps", "7", "--dish", "stew"])
    assert vars(args) == {"steps": 7, "salt": 0.5, "dish": "stew"}
    with pytest.raises(SystemExit) as end:
        make_parser().parse_args(["--help"])
    assert end.value.code == 0
    assert "how often to stir (default: 30)" in capsys.readouterr().out


def stop(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize("text", ["salt is 9; want at most 2", "two\nlines\n  of it"])
def test_wrong_input_ends_a_command_with_status_2_and_one_line_on_stderr(capsys, text):
    with pytest.raises(SystemExit) as end:
        cli.run(stop(InputError(text)))
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert (out, err) == ("", f"error: {' '.join(text.split())}\n")


GROUP = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "changes, index, prints_errors",
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, 0, True),
        ({}, 1, False),
        ({"RANK": "2", "LOCAL_RANK": "0"}, 2, True),  # the first process of the second machine
        # What a shell may have without being one of several processes:
        ({"LOCAL_RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None, "WORLD_SIZE": None}, 0, True),
        ({"LOCAL_RANK": None}, 0, True),
        ({"MASTER_PORT": ""}, 0, True),
        ({"RANK": "first"}, 0, True),
        ({"RANK": "7"}, 0, True),
    ],
    ids=str,
)
def test_the_main_process_prints_and_of_errors_one_process_of_every_machine(
    changes, index, prints_errors, capsys, monkeypatch
):
    for name, value in (GROUP | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert cli.place().index == index
    cli.say("first", "second")
    with pytest.raises(SystemExit) as end:
        cli.run(stop(InputError("wrong")))
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert (out, err) == ("" if index else "first\nsecond\n", "error: wrong\n" if prints_errors else "")


@pytest.mark.parametrize("given", [{"RANK": "1"}, {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}, {"RANK": "x"}])
def test_a_part_of_a_group_is_refused_where_processes_would_have_to_meet(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="but not all that makes a group of processes; start them with torchrun"):
        start_processes()


def test_export_writes_for_a_shell_that_has_a_rank(monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match="is not a run folder"):  # it does something, instead of nothing
        export.main([str(tmp_path), "--to", "peft", "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_reader_that_is_gone_ends_nothing_and_a_full_disk_does(number, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    with open(os.devnull, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr("builtins.print", fails)
        if number == errno.ENOSPC:
            with pytest.raises(RunError, match="the output cannot be written .No space left on device."):
                cli.say("line")
        else:
            cli.say("line")


def test_a_closed_pipe_and_closed_streams_are_no_reason_to_stop():
    body = "for i in range(9999): cli.say('x' * 99)\n    cli.note('end')"
    code = f"from command import cli\ndef main():\n    {body}\ncli.run(main)"
    program = f'{sys.executable} -c "{code}"'
    piped = subprocess.run(f"{program} | head -1", shell=True, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (piped.stdout, piped.stderr) == ("x" * 99 + "\n", "end\n")
    closed = subprocess.run(f"{program} >&- 2>&-", shell=True, cwd=ROOT, timeout=60)
    assert closed.returncode == 0


@pytest.mark.parametrize(
    "error, line",
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "a/log"),
            "error: a/log cannot be written (No space left on device)\n",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "error: a file cannot be written (Disk quota exceeded)\n"),
        (RunError("the loss is NaN"), "error: the loss is NaN\n"),
    ],
)
def test_what_stops_a_run_is_one_line_and_status_1(error, line, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(stop(error))
    assert end.value.code == 1 and capsys.readouterr().err == line


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("program", ["train.py", "evaluate.py", "profile.py"])
def test_an_interrupt_while_a_command_is_imported_leaves_no_traceback(program):
    process = subprocess.Popen(
        [sys.executable, program, "--help"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    modules = f"/proc/{process.pid}/maps"
    while "libtorch" not in Path(modules).read_text():  # torch is being imported
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[1] == b"" and process.returncode == -signal.SIGINT


def test_importing_a_command_elsewhere_leaves_interrupts_alone():
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_bug_keeps_its_traceback_and_a_finished_command_returns():
    with pytest.raises(ZeroDivisionError):
        cli.run(lambda: 1 / 0)
    assert cli.run(lambda: {"loss": 1.0}) is None


def test_an_interrupted_command_ends_with_the_status_of_an_interrupt():
    with pytest.raises(SystemExit) as end:
        cli.run(stop(KeyboardInterrupt()))
    assert end.value.code == 130


def test_without_torchrun_there_is_one_process():
    index, count, device = start_processes()
    assert (index, count) == (0, 1)
    assert device.type in ("cpu", "cuda")


@pytest.mark.parametrize("body, status, said", [("raise cli.InputError('no')", 2, "error: no\n"), ("1 / 0", 1, None)])
def test_the_exit_status_of_a_command_tells_wrong_input_from_a_bug(body, status, said):
    code = f"from command import cli\ndef main():\n    {body}\ncli.run(main)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == status
    assert done.stderr == said if said else "Traceback" in done.stderr


@pytest.mark.parametrize(
    "argv, line",
    [
        (["--epoch", "3"], "unknown flag --epoch; did you mean --epochs? (see train.py --help)"),
        (["--savevery=3"], "unknown flag --savevery; did you mean --save-every?"),
        (["-k", "3"], "unknown flag -k; did you mean --k?"),
        (["--xyz"], "unknown flag --xyz (see"),
        (["--method", "helora"], "did you mean hellora?"),
    ],
)
def test_a_flag_that_does_not_exist_is_named_beside_the_one_that_was_meant(argv, line):
    with pytest.raises(InputError, match=re.escape(line)):
        train.main(argv)


def test_an_unknown_flag_is_named_before_what_is_missing_without_it():
    with pytest.raises(InputError, match="unknown flag --too; did you mean --to?"):
        export.main(["run", "--too", "peft", "--out", "x"])


def test_help_names_defaults_where_there_are_any(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        train.main(["--help"])
    said = capsys.readouterr().out
    assert "(default: tiny-math)" in said and "default: None" not in said and "default: False" not in said


@pytest.mark.parametrize(
    "text, says",
    [
        (b"", "not readable as JSON"),
        (b'{"a": 1', "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON"),  # deeper than Python's stack
        (b'{"a": "\xff"}', "not readable as JSON"),
        (b'{"b": {"a": 1, "a": 2}}', "the key 'a' has two values"),
        (b"[1]", r"it holds \[1\]; expected an object"),
    ],
)
def test_a_json_file_that_cannot_be_used_is_one_line_that_names_it(text, says, tmp_path):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(InputError, match=f"a.json: {says}" if "key" not in says else says):
        read_json(tmp_path / "a.json", dict)


def test_json_is_read_with_a_byte_order_mark_and_with_a_key_that_says_the_same_twice(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert read_json(tmp_path / "b.json", missing={}) == {}
    with pytest.raises(InputError, match="b.json is missing"):
        read_json(tmp_path / "b.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)
