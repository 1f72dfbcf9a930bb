"""Runs that are killed, stopped, out of disk, resumed or repeated; and NaN losses."""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import call, losses, read_json, same, words, write_json, write_lines
from safetensors.torch import load_file, save_file

import lora
import profile
import train
import training_step
from command.cli import InputError, RunError
from command.files import sha256
from hub.checkpoint import TINY
from machine.processes import Processes
from run.state import Checkpoints, last_state, load_tensors, save_state, states

ROOT = Path(__file__).parent.parent
FORK = multiprocessing.get_context("fork")
SMALL = words("--batch 2 --micro-batch 1 --sample 0.005 --k 3 --rank 4")
SMALL += words("--schedule constant --lr-warmup 0")  # so that a run can be extended


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter/adapter.safetensors")


def start(*flags: str) -> multiprocessing.Process:
    """train.py in a process of its own that has its imports already."""

    def quiet() -> None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        call(train, *flags)

    process = FORK.Process(target=quiet)
    process.start()
    return process


def torchrun(*flags: str) -> list[str]:
    launch = words(sys.executable, "-m torch.distributed.run --standalone --nproc_per_node 2")
    return words(launch, "train.py", *flags)


def contents(out: Path) -> dict[Path, tuple[bytes, int]]:
    """Content and time of every file of a run."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "flags",
    [
        "--method dora --schedule cosine --lr-warmup 0.4 --weight-decay 0.1",
        "--method hellori-s --k 3 --lora-dropout 0.2",
        "--method dr-lora --lora-dropout 0.2",
    ],
)
def test_a_killed_run_ends_with_the_bits_of_one_left_alone_under_any_schedule_and_dropout(tmp_path, flags):
    """Every method is killed and resumed in test_validation.py."""
    flags = words("--batch 2 --micro-batch 1 --sample 0.005 --rank 4 --steps 5", flags)
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    call(train, flags, "--out", uncut)
    once = [*flags, "--save-every", "2", "--out", str(cut)]
    process = start(*once)
    while not states(cut / "checkpoint"):
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (cut / "result.json").exists()
    call(train, once, "--resume")
    assert losses(cut) == losses(uncut) and same(adapter(cut), adapter(uncut))
    assert (cut / "adapter/adapter.json").read_bytes() == (uncut / "adapter/adapter.json").read_bytes()


def test_ten_kills_at_random_moments_also_while_saving_change_no_bit(tmp_path):
    flags = [*SMALL, "--steps", "40"]
    uncut, cut = tmp_path / "uncut", tmp_path / "cut"
    call(train, flags, "--out", uncut)
    rng, while_saving = random.Random(0), 0
    for kill in range(10):
        process = start(*flags, "--save-every 1 --out", str(cut), *["--resume"] * (cut / "config.json").exists())
        # Every other kill comes while a state is being written, at one of its first, or later.
        deadline = time.monotonic() + (10 if kill % 2 else rng.uniform(0.4, 1.2))
        patience = rng.randrange(1, 40)
        while process.is_alive() and time.monotonic() < deadline:
            if kill % 2 and list(cut.glob("checkpoint/.step-*.part")):
                patience -= 1
                if not patience:
                    break
            time.sleep(0.0002)
        with suppress(ProcessLookupError):  # it may just have finished
            os.kill(process.pid, signal.SIGSTOP)
        while_saving += bool(list(cut.glob("checkpoint/.step-*.part")))
        process.kill()
        process.join()
        for state in states(cut / "checkpoint"):  # whatever has its final name is complete
            digests = read_json(state / "state.json")["sha256"]
            assert all(sha256(state / name) == digest for name, digest in digests.items())
    assert while_saving >= 2
    call(train, flags, "--save-every 1 --out", cut, "--resume")
    assert same(adapter(cut), adapter(uncut)) and losses(cut) == losses(uncut)
    assert [state.name for state in states(cut / "checkpoint")] == ["step-00000039", "step-00000040"]  # --keep 2


def test_saved_on_two_processes_and_resumed_on_one_and_back(all_rows, tmp_path):
    flags = words("--batch 5 --micro-batch 2 --sample 0.005 --k 3")
    flags += words("--lr 1e-4 --schedule constant --lr-warmup 0")  # AdamW turns rounding into steps
    call(train, flags, "--steps 6 --out", tmp_path / "uncut")
    out, environment = tmp_path / "run", os.environ | {"OMP_NUM_THREADS": "1"}

    def on_two(*more: str) -> None:
        command = torchrun(*flags, "--out", str(out), "--save-every 2", *more)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr

    on_two("--steps 2 --shard full")
    call(train, flags, "--out", out, "--save-every 2 --steps 4 --resume")
    on_two("--steps 6 --shard none --resume")
    assert losses(out) == pytest.approx(losses(tmp_path / "uncut"), abs=1e-5)
    ours, want = adapter(out), adapter(tmp_path / "uncut")
    assert max((ours[name] - want[name]).abs().max().item() for name in want) < 1e-5


def test_processes_that_see_other_checkpoints_say_so_before_one_waits_for_the_others(tmp_path, monkeypatch):
    trained = {"layers.0.lora_A": torch.nn.Parameter(torch.ones(2, 3))}
    model = Mock(named_parameters=trained.items, adapter=None)
    optimizer = torch.optim.AdamW(trained.values())
    save_state(tmp_path / "checkpoint", 3, trained, optimizer, {}, keep=1)
    observer = Mock()
    # The other process begins with step 1.
    monkeypatch.setattr("torch.distributed.all_reduce", lambda x, op: x.copy_(x.maximum(torch.tensor([1, -1]))))
    run = Mock(items=[], held_out=[], steps=5, processes=Processes(0, 2, torch.device("cpu")))
    checkpoints = Checkpoints(run, model, optimizer, tmp_path, [observer])
    with pytest.raises(InputError, match="resume from steps 1 to 4; expected one --out for all"):
        checkpoints.resume()
    assert not observer.load_state_dict.called


def test_a_process_that_dies_ends_the_job_within_seconds_and_resume_works(all_rows, tmp_path):
    flags = [*SMALL, "--out", str(tmp_path / "run"), "--save-every", "1"]
    job = subprocess.Popen(
        torchrun(*flags, "--steps 1000"),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    checkpoints = tmp_path / "run/checkpoint"
    while not states(checkpoints):
        assert job.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert job.wait(60) != 0
    done = int(last_state(checkpoints).name.removeprefix("step-"))
    result = call(train, flags, "--steps", done + 2, "--resume")
    assert result["steps"] == done + 2 == len(losses(tmp_path / "run"))


def test_what_may_not_change_on_resuming_is_named_and_more_steps_are_welcome(tmp_path):
    out = tmp_path / "run"
    flags = [*SMALL, "--save-every", "1", "--out", str(out)]
    call(train, flags, "--steps 2")
    (out / "result.json").rename(tmp_path / "result.json")  # as if it had been killed just before its end
    with pytest.raises(InputError, match="add --resume to continue"):
        call(train, flags, "--steps 2")
    (tmp_path / "result.json").rename(out / "result.json")
    with pytest.raises(InputError, match="method hellora then, hellori-d now, .*lr 0.006 then, 0.1 now"):
        call(train, flags, "--steps 2 --resume --lr 0.1 --method hellori-d")
    before = contents(out)
    with pytest.raises(InputError, match="1 steps are fewer than the 2"):
        call(train, flags, "--steps 1 --resume")
    assert contents(out) == before
    assert call(train, flags, "--steps 3 --resume")["steps"] == 3


def test_a_nan_loss_stops_the_run_or_is_skipped_and_counted(tmp_path, monkeypatch, capsys):
    real, calls = training_step.batch_gradients, []

    def sometimes(*args, **kwargs):
        done = real(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            done.loss = done.loss * float("nan")
            for parameter in args[0].parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("inf"))
        return done

    monkeypatch.setattr(training_step, "batch_gradients", sometimes)
    flags = words(SMALL, "--steps 4 --save-every 1")
    with pytest.raises(RunError) as caught:
        call(train, flags, "--out", tmp_path / "stop")
    message = str(caught.value)
    assert "step 2: loss nan" in message and "step-00000001" in message and re.search(r"on examples \d+ \d+;", message)
    calls.clear()
    skipping = [*flags, "--out", str(tmp_path / "skip"), "--on-nonfinite", "skip"]
    result = train.main(skipping)
    assert result["skipped_steps"] == 1 and result["steps"] == 4
    assert all(tensor.isfinite().all() for tensor in adapter(tmp_path / "skip").values())
    assert "step 2: loss nan" in capsys.readouterr().out
    result = json.loads((tmp_path / "skip/result.json").read_text(), parse_constant=pytest.fail)  # no NaN in it
    for first in (1, 2):  # cut after the skipped step, which AdamW has not seen
        calls[:] = [1] * (2 - first)
        cut = [*flags, "--out", str(tmp_path / f"cut{first}"), "--on-nonfinite", "skip"]
        with pytest.raises(RunError, match="every step was skipped") if first == 1 else nullcontext():
            call(train, cut, "--steps", first)  # the last --steps counts
        call(train, cut, "--resume")
        calls[:] = [1] * (2 - first)
        call(train, flags, "--out", tmp_path / f"uncut{first}", "--on-nonfinite skip")
        assert same(adapter(tmp_path / f"cut{first}"), adapter(tmp_path / f"uncut{first}"))


def test_an_adapted_expert_that_no_token_reached_is_reported_and_as_drawn(tmp_path, capsys):
    flags = words("--experts cold --batch 1 --steps 2 --sample 0.005 --out", tmp_path / "run")
    idle = train.main(flags)["idle_hot_experts"]
    content = read_json(tmp_path / "run/adapter/adapter.json")
    assert idle and all(int(name.split(":")[1]) in content["hot"][int(name.split(":")[0])] for name in idle)
    A, B = (adapter(tmp_path / "run")[f"layers.0.mlp.experts.lora.up_proj.lora_{part}"] for part in "AB")
    drawn = torch.empty(A.shape[1:])
    for e, A_e, B_e in zip(content["hot"][0], A, B, strict=True):
        if f"0:{e}" in idle:
            lora.init_A(drawn, content["seed"], f"layers.0.mlp.experts.{e}.up_proj")
            assert torch.equal(A_e, drawn) and not B_e.any()
    assert f"{len(idle)} adapted experts" in capsys.readouterr().out


def test_a_resume_of_nothing_says_that_it_starts(tmp_path, capsys):
    call(train, SMALL, "--steps 1 --out", tmp_path / "run", "--resume")
    assert capsys.readouterr().out.startswith(f"--resume: there is nothing in {tmp_path / 'run'} yet")


# ------------------------------------------------------------------------------- what a run learns from, by content


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    """A folder with a base model, training rows, lists of experts, and a run of 2 steps on them."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(TINY, folder / "model", ignore=shutil.ignore_patterns("*.py", "__pycache__", "*.md"))
    rows = ({"question": f"{i} and {i % 7}?", "answer": f"It is\n#### {i + i % 7}"} for i in range(24))
    write_lines(folder / "data.jsonl", rows)
    write_json(folder / "hot.json", [[1, 2], [3, 4], [5, 6], [7, 8]])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HELLORA_CACHE", str(folder / "cache"))
        call(train, ON_DATA, LISTED, "--out run --steps 2")
    return folder


ON_ROWS = "--model model --task gsm8k --train-data data.jsonl --batch 4 --save-every 1".split()
ON_DATA = [*ON_ROWS, "--sample", "0.2"]
LISTED = "--experts hot.json --rank 4"


@pytest.fixture
def copied(begun, tmp_path, monkeypatch) -> Path:
    """A copy of `begun`, which is the current folder: its run goes on under the same relative paths."""
    folder = Path(shutil.copytree(begun, tmp_path / "begun"))
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HELLORA_CACHE", str(tmp_path / "cache"))
    return folder


def reorder(folder: Path, back: bool = False) -> None:
    lines, shift = (folder / "data.jsonl").read_text().splitlines(True), -1 if back else 1
    (folder / "data.jsonl").write_text("".join(lines[shift:] + lines[:shift]))


def edit_a_target(folder: Path) -> None:
    text = (folder / "data.jsonl").read_text()
    (folder / "data.jsonl").write_text(text.replace("#### 9", "#### 8", 1))


def edit_a_weight(folder: Path) -> None:
    """One bit of one weight, in place; size and modification time stay."""
    path = folder / "model/model.safetensors"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit_the_config(folder: Path) -> None:
    config = read_json(folder / "model/config.json")
    write_json(folder / "model/config.json", config | {"rms_norm_eps": 1e-3})


def edit_the_tokenizer(folder: Path) -> None:
    tokenizer = read_json(folder / "model/tokenizer.json")
    write_json(folder / "model/tokenizer.json", tokenizer | {"normalizer": {"type": "Lowercase"}})


def other_experts(folder: Path) -> None:
    """As many as before, so that every tensor fits."""
    write_json(folder / "hot.json", [[1, 2], [3, 4], [5, 9], [7, 8]])


@pytest.mark.parametrize(
    "change, says",
    [
        (reorder, "the training data changed"),
        (edit_a_target, "the training data changed"),
        (edit_a_weight, "weights changed"),
        (edit_the_config, "config.json changed"),
        (edit_the_tokenizer, "tokenizer.json changed"),
        (other_experts, "what --experts names changed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_run_is_not_resumed_on_other_rows_weights_or_experts(copied, change, says):
    change(copied)
    before = contents(copied / "run")
    with pytest.raises(InputError, match=says):
        call(train, ON_DATA, LISTED, "--out run --steps 3 --resume")
    assert contents(copied / "run") == before


def other_adapter(folder: Path) -> None:
    call(train, ON_DATA, LISTED, "--out run2 --steps 3")
    shutil.rmtree(folder / "run/adapter")
    shutil.copytree(folder / "run2/adapter", folder / "run/adapter")


def other_counts(folder: Path) -> None:
    call(profile, ON_DATA[:6], "--sample 0.75 --out counts.json")


@pytest.mark.parametrize(
    "flag, names, change",
    [
        ("--experts", "hot.json", other_experts),
        ("--profile", "counts.json", other_counts),
        ("--init-adapter", "run", other_adapter),
    ],
)
def test_a_finished_run_is_not_taken_for_one_whose_flag_names_other_content(flag, names, change, copied, capsys):
    call(profile, ON_DATA[:6], "--sample 0.5 --out counts.json")
    rows = ON_ROWS if flag == "--profile" else ON_DATA
    again = [*rows, flag, names, *words("--out next --steps 2")]
    call(train, again)
    call(train, again)
    assert "holds this run already" in capsys.readouterr().out
    call(profile, ON_DATA[:6], "--sample 0.5 --out counts.json")  # the same counts, at another time
    call(train, again)
    assert "holds this run already" in capsys.readouterr().out
    change(copied)
    before = contents(copied / "next")
    for more in ("", "--resume"):
        with pytest.raises(InputError, match=f"what {flag} names changed since the run"):
            call(train, again, more)
    assert contents(copied / "next") == before


def test_the_same_content_under_another_time_resumes(copied):
    for name in ("model/model.safetensors", "data.jsonl", "hot.json"):
        (copied / name).write_bytes((copied / name).read_bytes())
    assert call(train, ON_DATA, LISTED, "--out run --steps 3 --resume")["steps"] == 3


def test_an_adapter_to_start_from_must_have_been_trained_on_the_same_weights(copied):
    edit_a_weight(copied)
    for start in ("run", "run/adapter"):
        with pytest.raises(InputError, match="is not the base that this adapter was trained on"):
            call(train, ON_DATA, "--out next --steps 1 --init-adapter", start)
    assert not (copied / "next").exists()


def test_counts_of_other_rows_are_noted_and_counts_of_the_same_are_not(copied, capsys):
    call(profile, ON_DATA[:6], "--sample 0.5 --out counts.json")
    flags = words(ON_ROWS, "--k 2 --steps 1 --profile counts.json")
    call(train, flags, "--out same")
    assert "note:" not in capsys.readouterr().out
    reorder(copied)
    call(train, flags, "--out other")
    assert "note: the profile was counted on other training data of gsm8k" in capsys.readouterr().out
    reorder(copied, back=True)
    edit_a_weight(copied)
    call(train, flags, "--out weights")
    assert "note: the profile was counted on other weights of model" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ a run done again


@pytest.mark.parametrize("saving", [[], ["--save-every", "1"]], ids=["no checkpoint", "checkpoints"])
def test_a_finished_run_is_left_alone_when_its_command_is_repeated(tmp_path, capsys, saving):
    out = tmp_path / "run"
    flags = [*SMALL, "--steps", "2", "--out", str(out)]
    result = call(train, flags, saving)
    before = contents(out)
    others = "--micro-batch 2 --save-every 2 --keep 1 --shard none --activation-checkpointing --on-nonfinite skip"
    for more in (saving, ["--resume"], others.split()):
        capsys.readouterr()
        again = call(train, flags, more)
        assert again == result == read_json(out / "result.json")
        assert "holds this run already, with all its 2 steps: nothing to do" in capsys.readouterr().out
        assert contents(out) == before
    if saving:
        return
    for steps in ("1", "3"):  # there is no checkpoint to continue from, and the results are not thrown away
        with pytest.raises(InputError, match="a run that ended after 2 steps, and no checkpoint to continue from"):
            call(train, flags, "--resume --steps", steps)
    assert contents(out) == before


@pytest.mark.parametrize(
    "steps, saving", [("4", []), ("2", ["--save-every", "1", "--resume"])], ids=["started over", "extended"]
)
def test_results_of_an_earlier_run_are_gone_before_the_first_step_of_the_next(tmp_path, monkeypatch, steps, saving):
    out = tmp_path / "run"
    flags = [*SMALL, *saving, "--out", str(out), "--steps"]
    call(train, flags, steps)
    if not saving:
        (out / "result.json").unlink()  # as if it had been killed before this

    def broken(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_step, "batch_gradients", broken)
        call(train, flags, "4")
    assert not any((out / name).exists() for name in ("result.json", "loss.png", "adapter"))
    call(train, flags, "4")
    call(train, SMALL, "--steps 4 --out", tmp_path / "uncut")
    assert same(adapter(out), adapter(tmp_path / "uncut")) and losses(out) == losses(tmp_path / "uncut")


@pytest.mark.parametrize("name, value", [("lora_B", math.nan), ("lora_A exp_avg", math.inf), ("exp_avg_sq", -math.inf)])
def test_a_state_that_holds_nan_or_infinity_is_refused_by_the_name_of_its_tensor(tmp_path, name, value):
    parameters = {f"layers.0.{factor}": torch.nn.Parameter(torch.rand(3, 4)) for factor in ("lora_A", "lora_B")}
    optimizer = torch.optim.AdamW(parameters.values())
    sum(parameter.sum() for parameter in parameters.values()).backward()
    optimizer.step()
    save_state(tmp_path, 5, parameters, optimizer, {}, keep=1)
    path = last_state(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    key = next(key for key in sorted(tensors) if name in key)
    tensors[key][1, 2] = value
    save_file(tensors, path)  # a checksum does not help: such a state was saved like this
    with pytest.raises(InputError, match=f"model.safetensors: {re.escape(key)} holds NaN or infinity"):
        load_tensors(last_state(tmp_path), parameters, optimizer, updates=1)
