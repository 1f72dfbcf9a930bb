"""command/cli.py: what every command accepts, refuses and answers."""

import argparse
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import generate
import train
from command import cli
from command.cli import InputError, RunError, number
from command.files import read_json
from machine.processes import start_processes

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    for name in GROUP:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "parse, right, wrong, expected",
    [
        (number(int, 1), {"1": 1}, ["0", "1.5", "1e3", ""], "a whole number at least 1"),
        (number(int, 0, 5), {"0": 0, "5": 5}, ["6"], "a whole number at least 0 and at most 5"),
        (number(float, 0, 1), {"1": 1.0, "1e-3": 0.001}, ["1.001", "nan"], "a number at least 0 and at most 1"),
        (number(float, 0, above=True), {"1e-9": 1e-9}, ["0", "-1", "inf"], "a number above 0"),
    ],
)
def test_a_number_within_its_limits_is_taken_and_any_other_is_told_them(parse, right, wrong, expected):
    for text, value in right.items():
        assert parse(text) == value and type(parse(text)) is type(value)
    for text in wrong:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^got {text!r}; expected {expected}$"):
            parse(text)


def stop(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    "error, status, line",
    [
        (InputError("two\nlines\n  of it"), 2, "error: two lines of it\n"),
        (RunError("the loss is NaN"), 1, "error: the loss is NaN\n"),
        (OSError(errno.ENOSPC, "Disk full", "a/log"), 1, "error: a/log cannot be written (Disk full)\n"),
        (OSError(errno.EDQUOT, "Quota exceeded"), 1, "error: a file cannot be written (Quota exceeded)\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
    ],
)
def test_what_ends_a_command_is_one_line_on_stderr_and_an_exit_status(error, status, line, capsys):
    with pytest.raises(SystemExit) as end:
        cli.run(stop(error))
    assert end.value.code == status
    assert capsys.readouterr() == ("", line)


GROUP = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "changes, index, prints_errors",
    [
        ({"RANK": "0", "LOCAL_RANK": "0"}, 0, True),
        ({}, 1, False),
        ({"RANK": "2", "LOCAL_RANK": "0"}, 2, True),  # the first process of the second machine
        # What a shell may have without being one of several processes:
        ({"LOCAL_RANK": None, "MASTER_ADDR": None, "MASTER_PORT": None, "WORLD_SIZE": None}, 0, True),
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


@pytest.mark.parametrize("given", [{"RANK": "x"}, {"RANK": "0", "WORLD_SIZE": "2"}])
def test_a_part_of_a_group_is_refused_where_processes_would_have_to_meet(given, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="but not all variables of a process group; start them with torchrun"):
        start_processes()


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


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
@pytest.mark.parametrize("program", ["train.py", "profile.py"])
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


def test_help_names_defaults_where_there_are_any(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        train.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "(default: tiny-math)" in shown and "seed of every random choice (default: 0)" in shown
    assert "default: None" not in shown and "default: False" not in shown


def test_an_argument_that_may_be_left_out_may_stand_before_the_flags_and_after_them():
    expected = cli.parse(generate.Settings, ["RUN", "a prompt", "--adapter", "none"])
    assert cli.parse(generate.Settings, ["RUN", "--adapter", "none", "a prompt"]) == expected
    assert cli.parse(generate.Settings, ["--adapter", "none", "RUN"]).prompt is None


def test_an_older_name_of_a_flag_is_accepted_and_not_shown(capsys):
    with pytest.raises(SystemExit, match="^0$"):
        train.main(["--help"])
    assert "--warmup" not in capsys.readouterr().out
    assert train.parse_settings(["--warmup", "lora"]).count_on == "lora"
    assert train.parse_settings(["--warmup", "none"]) == train.parse_settings(["--count-on", "base"])


def test_json_is_read_with_a_byte_order_mark_and_with_a_key_that_says_the_same_twice(tmp_path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1, "a": 1}')
    assert read_json(tmp_path / "a.json") == {"a": 1}
    assert read_json(tmp_path / "b.json", missing={}) == {}
    with pytest.raises(InputError, match="b.json is missing"):
        read_json(tmp_path / "b.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_json(tmp_path)
