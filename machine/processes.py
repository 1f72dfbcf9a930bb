"""The processes of a run, as torchrun started them: which one this is, how many there are, and on which device."""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist

from command import cli
from command.cli import InputError

T = TypeVar("T")
DTYPES = ("float32", "bfloat16")  # of a base model and of the products with it
DTYPE_HELP = "dtype of the base model and of matrix products (default: bfloat16 on a GPU, else float32)"


class Processes(NamedTuple):
    """This process among those of the run. (torch calls these numbers rank and world size; rank is LoRA's r here.)"""

    index: int  # of this process, from 0
    count: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.index == 0

    def once(self, function: Callable[[], T]) -> T:
        """What `function` returns on the main process, for all of them. Its InputError ends all of them."""
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except InputError as error:
                outcome[1] = error
        if self.count > 1:
            dist.broadcast_object_list(outcome)
        if outcome[1] and not self.is_main:
            sys.exit(2)  # the main process says why
        if outcome[1]:
            raise outcome[1]
        return outcome[0]

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any of them, by Gloo. Every process must call it."""
        flags = torch.tensor(flag, dtype=torch.int32)
        if self.count > 1:
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        return bool(flags)


def default_dtype() -> str:
    """The element of DTYPES for the device that `start_processes` chooses."""
    return "bfloat16" if torch.cuda.is_available() else "float32"


ALONE = Processes(0, 1, torch.device("cpu"))


def processes_per_machine() -> int:
    """How many processes of the run torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or cli.place().count)


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """On a CPU, glibc keeps the memory of freed tensors for the next ones meanwhile. Without glibc this does nothing.

    By default glibc returns a block above 32 MB to the system. The next tensor of that size gets it back page by page,
    each filled with zeros first. Not for loading: the gaps that freed weights leave are too small for those of the next
    model, which needs memory of its own.
    """
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    if not hasattr(libc, "mallopt"):
        yield
        return
    libc.mallopt(M_MMAP_MAX, 0)
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # never
    try:
        yield
    finally:
        libc.mallopt(M_MMAP_MAX, 65536)  # the defaults
        libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024)
        libc.malloc_trim(0)


def start_processes(backend: str | None = None, timeout: timedelta | None = None) -> Processes:
    """Join the process group that torchrun describes, if any.

    Raises InputError if there are not enough GPUs, or if the environment describes a part of a group.

    backend: of torch.distributed, by default NCCL on GPUs and Gloo otherwise. timeout: how long one waits for another.
    """
    (index, count, local), cuda = cli.place(), torch.cuda.is_available()
    alone = {"RANK": "0", "WORLD_SIZE": "1"}
    told = [f"{name}={value}" for name in alone if (value := os.environ.get(name)) and value != alone[name]]
    if count == 1 and told:
        raise InputError(
            f"the environment sets {' and '.join(told)}, but not all variables of a process group; "
            "start them with torchrun, or unset these variables"
        )
    if cuda and local >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise InputError(f"process {local + 1} of this machine has no GPU, there are {gpus}; start {gpus} processes")
    if cuda:
        torch.cuda.set_device(local)
    if count > 1:
        dist.init_process_group(backend or ("nccl" if cuda else "gloo"), timeout=timeout)
    return Processes(index, count, torch.device("cuda", local) if cuda else torch.device("cpu"))


def end_processes() -> None:
    """Leave the process group, if there is one, after all processes have come to this point.

    A process that leaves while another still communicates would abort that one.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
