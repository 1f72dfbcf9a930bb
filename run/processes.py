"""The processes of a run, as torchrun started them: which one this is, how many there are, and on which device."""

import os

import torch
import torch.distributed as dist

from command.cli import InputError


def start_processes() -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes, if any.  -> rank, number of processes, device"""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local, cuda = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise InputError(f"process {local + 1} of this machine has no GPU, there are {gpus}; start {gpus} processes")
    if cuda:
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")
