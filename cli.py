"""How every command of this repository starts and ends: strict flags, processes, one-line errors, exit status.

Exit status: 0 done; 2 the input is wrong (one line on stderr, no traceback); 1 a run that cannot go on (one line), or
a bug (traceback).
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

# `python -m cProfile` from another folder, a debugger or IPython load the standard library's `profile` before ours.
_loaded = sys.modules.get("profile")
if _loaded is not None and Path(_loaded.__file__).parent != Path(__file__).parent:
    del sys.modules["profile"]


class InputError(ValueError):
    """Wrong input from the user: the message says what was given, what is allowed and what to do."""


class RunError(RuntimeError):
    """A run cannot go on, and not for its input: a full disk, numbers that are none. One line, exit status 1."""


def start_processes() -> tuple[int, int, torch.device]:
    """Join the process group that torchrun describes, if any.  -> rank, number of processes, device"""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local, cuda = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.is_available()
    if cuda and local >= torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise InputError(f"process {local + 1} of this machine has no GPU, there are {gpus}; want as many processes")
    if cuda:
        torch.cuda.set_device(local)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo")
    return rank, world, torch.device("cuda", local) if cuda else torch.device("cpu")


def say(*lines: str) -> None:
    """Print lines from the main process only."""
    if is_main_process():
        print(*lines, sep="\n", flush=True)


def is_main_process() -> bool:
    """True for the one process that prints and writes (rank 0 under torchrun, or the only one)."""
    return int(os.environ.get("RANK", "0")) == 0


def is_first_here() -> bool:
    """True for one process of every machine: what is wrong may be wrong on that machine alone."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults are shown where there are any."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line and name the way to the help."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        if "" in (sys.argv[1:] if args is None else args):  # `--mask "$RUN"` with RUN unset is not "no mask"
            raise InputError(f"an argument is empty, an unset variable? Leave it out (see {self.prog} --help)")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


LARGEST = 2**31 - 1  # of a whole number on the command line


def number(kind: type, low: float, high: float = float("inf"), *, above: bool = False) -> Callable:
    """An argparse `type`: an int or float in [low, high], or in (low, high] if `above`; no int is beyond LARGEST."""
    top = min(high, LARGEST) if kind is int else high

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= top or value == math.inf or (above and value == low):
            bound = "above" if above else "at least"
            upper = f" and at most {top:,}" if high < math.inf or (value or 0) > top else ""
            name = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r:.40}; want {name} {bound} {low:g}{upper}")
        return value

    return parse


def writable(path: str | Path) -> Path:
    """The path of a file that can be written, its folder made if need be; otherwise an InputError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); name a file in a writable folder") from None
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write")
    return path


def run(main: Callable[[], object]) -> None:
    """Call `main()`; turn wrong input into one line on stderr and exit status 2."""
    try:
        main()
    except InputError as error:
        if is_first_here():
            print("error:", " ".join(str(error).split()), file=sys.stderr)  # one line, whatever it quotes
        sys.exit(2)
    except RunError as error:
        if is_first_here():
            print("error:", " ".join(str(error).split()), file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
