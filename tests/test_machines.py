"""Several machines, as groups of processes on one: torchrun's agents, and `--shard hybrid`."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import call, free_port, losses, on_processes, read_json, words, write_lines
from safetensors.torch import load_file

import evaluate
import train
from hub.checkpoint import TINY
from machine.processes import end_processes, start_processes
from model import load_model
from training_step import load_for_process

ROOT = Path(__file__).parent.parent
FLAGS = "--batch 7 --micro-batch 2 --sample 0.2 --k 3 --lr 1e-4"


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """Few rows, of different lengths: the embedded tasks take each process longer to read than to learn."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [{"prompt": f"{i} and {'one ' * i}", "completion": f" is {i} more"} for i in range(14)]
    write_lines(path, rows)
    return path


@pytest.fixture(scope="module")
def flags(rows) -> list[str]:
    return words(FLAGS, "--task own --train-data", rows)


@pytest.fixture(scope="module")
def alone(flags, tmp_path_factory) -> Path:
    """The run of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    call(train, flags, "--steps 4 --out", out)
    return out


def on_machines(main: Callable, *flags: str, count: int = 4) -> None:
    on_processes(count, main, words(*flags), per_machine=2)


def test_two_agents_of_torchrun_give_the_bits_of_two_processes_of_one(flags, alone, tmp_path):
    at = f"127.0.0.1:{free_port()}"
    launch = words("--nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint", at, "train.py")
    run = words(flags, "--steps 4 --shard full --out")
    command = [sys.executable, "-m", "torch.distributed.run", *launch, *run, str(tmp_path / "agents")]
    options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}, "stdout": subprocess.DEVNULL}
    agents = [subprocess.Popen(command, stderr=subprocess.PIPE, **options) for _ in range(2)]
    ended = [agent.communicate(timeout=300)[1] for agent in agents]
    assert not any(agent.returncode for agent in agents), b"\n".join(ended).decode()
    on_machines(train.main, *run, str(tmp_path / "one"), count=2)
    assert losses(tmp_path / "agents") == losses(tmp_path / "one")
    assert losses(tmp_path / "one") == pytest.approx(losses(alone), abs=1e-5)


def hold(flags: list[str]) -> None:
    """Save what this process holds of the embedded model."""
    processes = start_processes()
    model = load_for_process(TINY, torch.float32, processes.device, shard="hybrid")
    torch.save([parameter.to_local() for parameter in model.parameters()], f"{flags[0]}/{processes.index}.pt")
    end_processes()


def test_each_machine_holds_a_copy_and_each_of_its_processes_half_of_it(tmp_path):
    on_machines(hold, str(tmp_path))
    a, b, *copy = (torch.load(tmp_path / f"{rank}.pt") for rank in range(4))
    assert all(x.equal(y) for held, again in zip((a, b), copy, strict=True) for x, y in zip(held, again, strict=True))
    one = load_model(TINY)
    assert all(torch.cat(parts).equal(whole) for *parts, whole in zip(a, b, one.parameters(), strict=True))


def completions(out: Path) -> dict[str, str]:
    records = map(json.loads, (out / "generations.jsonl").read_text().splitlines())
    return {record["id"]: record["completion"] for record in records}


def test_hybrid_sharding_trains_saves_resumes_and_evaluates_as_one_process_does(flags, rows, alone, tmp_path):
    run = words(flags, "--out", tmp_path / "run", "--save-every 2 --shard hybrid")
    on_machines(train.main, *run, "--steps 2")
    on_machines(train.main, *run, "--steps 4 --resume")
    assert read_json(tmp_path / "run/result.json")["shard"] == "hybrid"
    assert losses(tmp_path / "run") == pytest.approx(losses(alone), abs=1e-5)
    ours, want = (load_file(out / "adapter/adapter.safetensors") for out in (tmp_path / "run", alone))
    assert max((ours[name] - want[name]).abs().max().item() for name in want) < 1e-5
    # Two processes have two prompts and two have one, so that they end at different steps.
    score = words("--eval-data", rows, "--limit 6 --batch 1 --max-new-tokens 7")
    call(evaluate, alone, score, "--out", tmp_path / "one")
    on_machines(evaluate.main, str(alone), *score, "--out", str(tmp_path / "hybrid"), "--shard hybrid")
    scores = [read_json(tmp_path / name / "score.json") for name in ("hybrid", "one")]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], abs=1e-5)
    assert completions(tmp_path / "hybrid") == completions(tmp_path / "one") and len(completions(tmp_path / "one")) == 6
