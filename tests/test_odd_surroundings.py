"""Every command that writes, in every odd surrounding of one table: it does its work, or ends with one line."""

import importlib
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import train
from command import cli

SMALL = "--steps 2 --batch 2 --sample 0.1 --k 3 --rank 4"
COMMANDS = {
    "train": f"train {SMALL} --save-every 1 --out OUT",
    "count": "profile --task tiny-code --sample 0.1 --out OUT/profile.json --plot OUT/profile.png",
    "evaluate": "evaluate tiny --task tiny-math --limit 2 --max-new-tokens 2 --out OUT",
    "merge": "export run --to merged --out OUT",
    "to PEFT": "export run --to peft --out OUT",
}


@contextmanager
def variables(**values: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
        yield


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes: writing answers as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


SURROUNDINGS = {  # the surrounding, and the exit statuses that are right in it
    "a rank without a group": (lambda: variables(RANK="1"), {0, 2}),
    "a world without a group": (lambda: variables(WORLD_SIZE="4", LOCAL_RANK="0"), {0, 2}),
    "variables that are no numbers": (lambda: variables(RANK="", WORLD_SIZE="x"), {0, 2}),
    "a disk that is full at once": (lambda: disk_of(0), {1, 2}),
    "a disk that is full at the weights": (lambda: disk_of(30_000), {0, 1}),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.TINY_TRAIN", 60)
        train.main([*SMALL.split(), "--out", str(out)])
    return out


def outcome(command: str, out: str, run: Path, monkeypatch, capsys) -> tuple[int, str]:
    """Exit status and stderr of a command, called as it calls itself in the folder of a finished run."""
    monkeypatch.chdir(run.parent)
    monkeypatch.setattr("data.TINY_TRAIN", 60)
    name, *flags = command.replace("OUT", out).split()
    capsys.readouterr()
    try:
        cli.run(lambda: importlib.import_module(name).main(flags))
        return 0, capsys.readouterr().err
    except SystemExit as end:
        return end.code, capsys.readouterr().err


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_its_work_or_ends_with_one_line(command, surrounding, run, tmp_path, monkeypatch, capsys):
    enter, statuses = SURROUNDINGS[surrounding]
    with enter():
        status, err = outcome(COMMANDS[command], str(tmp_path / "out"), run, monkeypatch, capsys)
    assert status in statuses, err
    if status:
        *notes, last = err.splitlines()
        assert last.startswith("error: ") and not any(line.startswith("error: ") for line in notes), err
    else:
        assert any((tmp_path / "out").iterdir())
    assert not [name for name in os.listdir(tmp_path) if name != "out"]  # nothing half-written beside it


@pytest.mark.parametrize("command", COMMANDS)
def test_where_nothing_can_be_written_the_place_is_named(command, run, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file/out", "/proc/nothing/out"):
        status, err = outcome(COMMANDS[command], str(place), run, monkeypatch, capsys)
        assert status == 2 and str(place) in err and err.count("\n") == 1, err
