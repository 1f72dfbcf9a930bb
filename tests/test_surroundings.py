"""What surrounds a run: other processes of its group, other runs in its folder, disks, signals, terminals."""

import importlib
import itertools
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import call, free_port, read_json, same, words
from safetensors.torch import load_file, save_file

import evaluate
import export
import profile
import run.log
import train
from command import cli
from command.cli import InputError, RunError
from command.files import LOCK, claimed
from hub.checkpoint import TINY
from machine.processes import Processes
from run.log import Signals
from run.state import states
from run.subject import Subject

FORK = multiprocessing.get_context("fork")
SMALL = words("--batch 2 --micro-batch 1 --sample 0.005 --k 3 --rank 4")
SMALL += words("--schedule constant --lr-warmup 0 --steps 3")  # so that a run can be extended

# ------------------------------------------------------------------------- every command that writes, in each of many

COMMANDS = {
    "train": f"train {' '.join(SMALL)} --save-every 1 --out OUT",
    "count": "profile --task tiny-code --sample 0.005 --out OUT/profile.json --plot OUT/profile.png",
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


SURROUNDINGS = {  # the surrounding, and the exit status of each of COMMANDS in it
    "a rank without a group": (lambda: variables(RANK="1"), (2, 2, 2, 0, 0)),
    "a world without a group": (lambda: variables(WORLD_SIZE="4", LOCAL_RANK="0"), (2, 2, 2, 0, 0)),
    "variables that are no numbers": (lambda: variables(RANK="", WORLD_SIZE="x"), (2, 2, 2, 0, 0)),
    "a disk that is full at once": (lambda: disk_of(0), (2, 1, 2, 2, 2)),
    "a disk that is full at the weights": (lambda: disk_of(30_000), (1, 1, 0, 1, 1)),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("runs") / "run"
    call(train, SMALL, "--out", out)
    return out


def outcome(command: str, out: Path, finished: Path, monkeypatch, capsys) -> tuple[int, str]:
    """Exit status and stderr of one of COMMANDS, called as it calls itself."""
    monkeypatch.chdir(finished.parent)
    name, *flags = COMMANDS[command].replace("OUT", str(out)).split()
    capsys.readouterr()
    try:
        cli.run(lambda: importlib.import_module(name).main(flags))
        return 0, capsys.readouterr().err
    except SystemExit as end:
        return end.code, capsys.readouterr().err


@pytest.mark.parametrize("surrounding", SURROUNDINGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_does_its_work_or_ends_with_one_line(command, surrounding, finished, tmp_path, monkeypatch, capsys):
    enter, statuses = SURROUNDINGS[surrounding]
    with enter():
        status, err = outcome(command, tmp_path / "out", finished, monkeypatch, capsys)
    assert status == statuses[list(COMMANDS).index(command)], err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert errors == (err.splitlines()[-1:] if status else [])
    assert any((tmp_path / "out").iterdir()) if status == 0 else not list(tmp_path.rglob("*.part"))
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}  # nothing half-written beside it


# --------------------------------------------------------------------------------------------- processes of a group


def group(count: int, main, folder: Path) -> list[tuple[int, str]]:
    """Run `main` on processes that torchrun might have started.  -> exit status and stderr of each"""
    port = free_port()

    def work(index: int) -> None:
        torch.set_num_threads(1)
        numbers = {"RANK": index, "LOCAL_RANK": index, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
        sys.stdout = open(os.devnull, "w")
        sys.stderr = (folder / f"{index}.txt").open("w", buffering=1)
        cli.run(main)

    processes = [FORK.Process(target=work, args=(index,)) for index in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(100)
    return [(process.exitcode, (folder / f"{i}.txt").read_text()) for i, process in enumerate(processes)]


@pytest.fixture
def damaged(tmp_path) -> Path:
    """A model with a NaN in the last row of a matrix, which the second of two processes reads."""
    folder = tmp_path / "damaged"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("mixtral", "*.py"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.self_attn.o_proj.weight"][-1, -1] = torch.nan
    save_file(weights, folder / "model.safetensors")
    return folder


def test_the_process_that_finds_a_fault_names_it(damaged, tmp_path):
    flags = words(SMALL, "--model", damaged, "--shard full --out", tmp_path / "run")
    (_, other), (status, line) = group(2, lambda: train.main(flags), tmp_path)
    assert status == 2 and line.startswith("error (process 1 of 2): ") and line.count("\n") == 1
    assert "model.layers.1.self_attn.o_proj.weight holds NaN or infinity" in line
    assert other == "error (process 0 of 2): another process ended and closed its connection; its own line says why\n"
    assert not (tmp_path / "run").exists()


def test_a_fault_that_the_main_process_finds_for_all_is_one_line(tmp_path):
    call(train, SMALL, "--out", tmp_path / "run", "--save-every 1")
    (tmp_path / "run/result.json").unlink()
    ended = group(2, lambda: call(train, SMALL, "--out", tmp_path / "run"), tmp_path)
    assert [status for status, _ in ended] == [2, 2] and ended[1][1] == ""
    assert ended[0][1].startswith("error (process 0 of 2): ") and "add --resume to continue" in ended[0][1]


# ------------------------------------------------------------------------------------------- two runs in one folder


def in_background(main) -> multiprocessing.Process:
    def quiet() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell takes from what runs in its background
        sys.stdout = sys.stderr = open(os.devnull, "w")
        main()

    process = FORK.Process(target=quiet)
    process.start()
    return process


def steps_done(out: Path) -> int:
    return (out / "log.jsonl").read_text().count("\n") if (out / "log.jsonl").exists() else 0


def wait_for_steps(process: multiprocessing.Process, out: Path, steps: int = 1) -> None:
    while steps_done(out) < steps:
        assert process.is_alive()
        time.sleep(0.01)


def test_a_second_training_in_a_folder_ends_at_once_and_a_killed_one_leaves_no_lock(tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL, "--out", str(out), "--save-every", "1"]
    first = in_background(lambda: call(train, flags, "--steps 500"))
    wait_for_steps(first, out, 2)  # by now there is a checkpoint of the first
    for more in ([], ["--resume"], ["--seed", "1"]):
        with pytest.raises(InputError, match=f"run is in use by process {first.pid} on .*; wait for its end"):
            call(train, flags, more)
    first.kill()
    first.join()
    assert (out / LOCK).exists()
    done = int(states(out / "checkpoint")[-1].name.removeprefix("step-"))
    call(train, flags, "--steps", done + 1, "--resume")
    assert not (out / LOCK).exists()


def test_of_many_processes_one_at_a_time_has_a_folder(tmp_path):
    folder, marks = tmp_path / "new/folder", tmp_path / "marks"
    marks.mkdir()

    def enter(index: int) -> None:
        for turn in range(200):
            with suppress(InputError), claimed(folder):
                (folder / "alone").mkdir()  # fails if it is there
                (marks / f"{index}-{turn}").touch()
                (folder / "alone").rmdir()

    processes = [FORK.Process(target=enter, args=(index,)) for index in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(list(marks.iterdir())) > 20


def test_a_folder_that_stays_empty_goes_with_those_that_were_made_for_it_and_no_other(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "mine/new/newer"):
        with claimed(tmp_path / name):
            assert (tmp_path / name / LOCK).exists()
        assert [path.name for path in tmp_path.iterdir()] == ["mine"] and not list((tmp_path / "mine").iterdir())


def test_a_second_evaluation_into_a_folder_ends_at_once_and_a_killed_one_does_not_matter(tmp_path):
    out = tmp_path / "out"
    flags = words("tiny --task tiny-math --limit 2 --max-new-tokens 2 --out", out)
    with claimed(out), pytest.raises(InputError, match=f"out is in use by process {os.getpid()} on "):
        evaluate.main(flags)
    out.mkdir()
    (out / LOCK).write_text("process 7 on elsewhere")
    assert evaluate.main(flags)["num_total"] == 2 and not (out / LOCK).exists()


@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_a_second_export_into_a_folder_ends_at_once_and_a_killed_one_does_not_matter(
    kind, finished, tmp_path, monkeypatch
):
    out, lock = tmp_path / "new/out", tmp_path / f"new/.out{LOCK}"
    flags = [str(finished), "--to", kind, "--out", str(out)]
    in_between = Mock(side_effect=lambda *_: pytest.raises(InputError, export.main, flags).match("out is in use by"))
    with monkeypatch.context() as patch:
        patch.setattr(Subject, "check_base", in_between)  # which the first does after it has claimed the folder
        export.main(flags)
    assert in_between.call_count == 1 and [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    shutil.rmtree(out)
    lock.write_text("process 7 on elsewhere")
    (tmp_path / "new/.out.part/half").mkdir(parents=True)
    export.main(flags)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"] and not (out / "half").exists()


# ----------------------------------------------------------------------------------------------------------- disks


@pytest.mark.parametrize(
    "flags, held", [([], "0 checkpoints, 1 results and the log"), (["--save-every", "1"], "3 checkpoints")]
)
def test_a_disk_without_room_for_the_results_is_named_before_the_first_step(flags, held, tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    # Rank 4 on 3 experts: about 170 kB of factors, three times that in each checkpoint.
    monkeypatch.setattr("run.output.shutil.disk_usage", lambda path: usage(600_000 if not flags else 1_400_000))
    with pytest.raises(InputError, match=f"MB free, and this run writes up to .*{held}.* or lower --keep"):
        call(train, SMALL, flags, "--out", tmp_path / "runs/run")
    assert not (tmp_path / "runs").exists()


def test_a_disk_that_is_full_during_the_run_is_one_line_that_names_the_last_checkpoint(tmp_path, monkeypatch):
    real = run.log.write_jsonl

    def on_a_full_disk(path: Path, records: list[dict]) -> None:
        real(path, records)
        path.rename(tmp_path / "log.jsonl")
        path.symlink_to("/dev/full")

    flags = [*SMALL, "--save-every", "1", "--out", str(tmp_path / "run")]
    call(train, flags, "--steps 2")
    monkeypatch.setattr(run.log, "write_jsonl", on_a_full_disk)
    says = "log.jsonl cannot be written .No space left on device.; the last good checkpoint is .*step-00000002$"
    with pytest.raises(RunError, match=says):
        call(train, flags, "--resume")
    monkeypatch.setattr(run.log, "write_jsonl", real)
    (tmp_path / "log.jsonl").rename(tmp_path / "run/log.jsonl")
    assert call(train, flags, "--resume")["steps"] == 3


def test_a_picture_that_fails_is_a_note_and_the_run_is_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("run.log.draw_loss", Mock(side_effect=OSError("no room")))
    call(train, SMALL, "--out", tmp_path / "run")
    assert "a picture could not be drawn (OSError: no room)" in capsys.readouterr().err
    assert (tmp_path / "run/result.json").exists() and (tmp_path / "run/adapter/adapter.json").exists()


# --------------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_lets_the_step_finish_saves_and_ends(number, tmp_path):
    out = tmp_path / "run"
    process = in_background(lambda: call(train, SMALL, "--steps 400 --out", out))
    wait_for_steps(process, out)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    (state,) = states(out / "checkpoint")
    assert steps_done(out) == read_json(state / "state.json")["step"]


def test_a_signal_that_is_ignored_stays_ignored_as_nohup_asks(tmp_path, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr("run.log.Recorder.show", lambda *args: os.kill(os.getpid(), signal.SIGHUP))  # in every step
    try:
        assert call(train, SMALL, "--out", tmp_path / "run")["steps"] == 3
    finally:
        signal.signal(signal.SIGHUP, before)


# ------------------------------------------------------------------------------------------------- what is written


def test_a_sparse_run_is_extended_in_its_first_stage_and_not_in_the_second(tmp_path, monkeypatch):
    flags = words(SMALL[:-2], "--method hellori-s --save-every 1 --out")  # without --steps 3
    step, numbers = train.train_step, itertools.count(1)

    def interrupt_in_step(last: int) -> None:
        def broken(*args, **options):
            if next(numbers) == last:
                raise KeyboardInterrupt
            return step(*args, **options)

        monkeypatch.setattr(train, "train_step", broken)

    cut, straight = tmp_path / "cut", tmp_path / "straight"
    interrupt_in_step(3)  # the last of stage D
    with pytest.raises(KeyboardInterrupt):
        call(train, flags, cut, "--steps 3")
    interrupt_in_step(7)  # two more steps of stage D, and the first of stage S
    with pytest.raises(KeyboardInterrupt):
        call(train, flags, cut, "--resume --steps 4")
    monkeypatch.setattr(train, "train_step", step)
    before = {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()}
    for more in (["--steps", "5"], ["--steps", "3"], ["--epochs", "1"]):
        with pytest.raises(InputError, match="stage D of this run did 4 steps, .*; expected --steps 4, or another"):
            call(train, flags, cut, "--resume", more)
    assert {path: path.read_bytes() for path in cut.rglob("*") if path.is_file()} == before
    call(train, flags, cut, "--resume --steps 4")
    call(train, flags, straight, "--steps 4")
    for stage in ("stage-d", "."):
        ours, theirs = (load_file(out / stage / "adapter/adapter.safetensors") for out in (cut, straight))
        assert same(ours, theirs)


# ------------------------------------------------------------------------------------------------- names of models


def test_the_revision_of_a_hub_id_is_asked_for_and_recorded(tmp_path, monkeypatch):
    snapshot = tmp_path / "models--a--b/snapshots/0123abcd"
    shutil.copytree(TINY, snapshot, ignore=shutil.ignore_patterns("mixtral", "*.py"))
    asked = []

    def download(name: str, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        return str(snapshot)

    monkeypatch.setattr("hub.checkpoint.snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    call(profile, "--model a/b --revision v2 --sample 0.005 --out counts.json")
    assert read_json(Path("counts.json"))["model"] == "a/b@v2"
    call(train, SMALL, "--steps 1 --model a/b@v2 --out run")
    config = read_json(Path("run/config.json"))
    assert (config["model"], config["hub_commit"]) == ("a/b@v2", "0123abcd")
    assert set(asked) == {("a/b", "v2")}
    with pytest.raises(InputError, match="model a/b@v2 then, a/b now"):
        call(train, SMALL, "--steps 1 --model a/b --out run")
    call(export, "run --to peft --out adapter")
    config = read_json(Path("adapter/adapter_config.json"))
    assert (config["base_model_name_or_path"], config["revision"]) == ("a/b", "v2")
    assert Subject("adapter").base == "a/b@v2"


def test_a_signal_that_arrives_while_processes_agree_is_not_lost(monkeypatch):
    """It ends the run one step later."""
    signals = Signals(Processes(0, 2, torch.device("cpu")))
    signals.start(1)
    try:
        monkeypatch.setattr("run.log.dist.all_reduce", lambda tensor, op: os.kill(os.getpid(), signal.SIGTERM))
        signals.after(1, None)
        assert not signals.interrupted
        monkeypatch.setattr("run.log.dist.all_reduce", lambda tensor, op: None)
        signals.after(2, None)
        assert signals.interrupted
    finally:
        signals.close()
