"""What surrounds a run: other processes of its group, other runs in its folder, disks, signals, terminals."""

import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from command import cli
from hub.checkpoint import TINY

FORK = multiprocessing.get_context("fork")
SMALL = ["--batch", "2", "--micro-batch", "1", "--sample", "0.005", "--k", "3", "--rank", "4", "--steps", "3"]


def group(count: int, main, folder: Path) -> list[tuple[int, str]]:
    """Run `main` on processes that torchrun might have started.  -> exit status and stderr of each"""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]

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
    flags = [*SMALL, "--model", str(damaged), "--shard", "full", "--out", str(tmp_path / "run")]
    (_, other), (status, line) = group(2, lambda: train.main(flags), tmp_path)
    assert status == 2 and line.startswith("error (process 1 of 2): ") and line.count("\n") == 1
    assert "model.layers.1.self_attn.o_proj.weight holds NaN or infinity" in line
    assert other == "error (process 0 of 2): another process ended and closed its connection; its own line says why\n"
    assert not (tmp_path / "run").exists()


def test_a_fault_that_the_main_process_finds_for_all_is_one_line(tmp_path):
    train.main([*SMALL, "--out", str(tmp_path / "run"), "--save-every", "1"])
    (tmp_path / "run/result.json").unlink()
    ended = group(2, lambda: train.main([*SMALL, "--out", str(tmp_path / "run")]), tmp_path)
    assert [status for status, _ in ended] == [2, 2] and ended[1][1] == ""
    assert ended[0][1].startswith("error (process 0 of 2): ") and "add --resume to go on" in ended[0][1]
