"""How every command starts and ends: settings as flags, one-line errors, the exit status.

    @dataclass(frozen=True)
    class Settings:
        k: int | None = flag(None, "hot experts per layer", type=number(int, 1))

    settings = parse(Settings, argv, prog="train.py", description="...")      # --k 8 becomes settings.k
    run(main)                                                                 # errors as one line, exit status

Exit status: 0 done; 2 the input is wrong (one line on stderr, no traceback); 1 a run cannot go on (one line), or
there is a bug (traceback).
"""

import argparse
import errno
import math
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import MISSING, field, fields
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import command.standard_profile  # noqa: F401  before anything imports `profile`
from command.errors import InputError, RunError

# ------------------------------------------------------------------------------------------------- what is printed


class Place(NamedTuple):
    """Which process this is of how many, and which of those on its machine, counted from 0."""

    index: int = 0
    count: int = 1
    index_on_machine: int = 0


def place() -> Place:
    """The place that torchrun gave this process in a group; alone without one.

    A shell may have some of torchrun's variables, as in a pod of a cluster. Only all of them together make a group.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    numbers = [int(value) for value in map(os.environ.get, names) if value and value.isdecimal()]
    can_meet = os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")
    if len(numbers) < len(names) or not can_meet or not numbers[0] < numbers[1]:
        return Place()
    return Place(*numbers)


def is_main_process() -> bool:
    """True for the process that prints and writes: the only one, or the first of a group."""
    return place().index == 0


def say(*lines: str) -> None:
    """Print lines to stdout, from the main process only."""
    if is_main_process():
        print_to(sys.stdout, *lines)


def note(*lines: str) -> None:
    """Print remarks to stderr, from the main process only: stdout belongs to the results."""
    if is_main_process():
        print_to(sys.stderr, *lines)


def print_to(stream: TextIO, *lines: str) -> None:
    """Print lines. If the reader is gone, a closed terminal or pipe, these and all later ones go nowhere.

    Raises RunError if they cannot be written for another reason, such as a full disk.
    """
    try:
        print(*lines, sep="\n", file=stream, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise RunError(f"the output cannot be written ({error.strerror})") from None


LOST = ("closed by peer", "reset by peer", "unexpectedly closed", "Broken pipe", "Read error")  # what Gloo says
DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}  # what a disk says that takes no more


def run(main: Callable[[], object]) -> None:
    """Call `main()`. Wrong input becomes one line on stderr and exit status 2; what stops a run, status 1."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # which command/start.py replaced
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started the command
            setattr(sys, name, open(os.devnull, "w"))
    try:
        main()
    except (InputError, RunError) as error:
        end(str(error), 2 if isinstance(error, InputError) else 1)
    except OSError as error:
        if error.errno not in DISK:
            raise
        end(f"{error.filename or 'a file'} cannot be written ({error.strerror})", 1)
    except RuntimeError as error:
        if place().count == 1 or not any(text in str(error) for text in LOST):
            raise
        end("another process ended and closed its connection; its own line says why", 1)
    except KeyboardInterrupt:
        end("interrupted", 130)


def end(message: str, status: int) -> None:
    """Print an error in one line, and exit. Every process of a group says which one it is.

    Before they have met, one process of each machine prints for all: they were given the same flags and files.
    """
    index, count, index_on_machine = place()
    torch_group = sys.modules.get("torch.distributed")
    have_met = torch_group is not None and torch_group.is_initialized()
    if have_met or index_on_machine == 0:
        origin = f" (process {index} of {count})" if have_met and count > 1 else ""
        one_line = " ".join(message.split())  # whatever it quotes
        print_to(sys.stderr, f"error{origin}: {one_line}")
    sys.exit(status)


# ------------------------------------------------------------------------------------------------- settings as flags

T = TypeVar("T")


def flag(default: Any = MISSING, help: str = "", **options: Any) -> Any:
    """A dataclass field that is a flag of the command line. options: as for argparse's add_argument.

    False as default makes a switch. positional=True makes an argument without dashes. group="..." names the section of
    `--help` in which the flag is shown. alias="..." is an older name of the flag, which the help does not show. Without
    a default it is required.
    """
    return field(default=default, metadata={"help": help} | options)


def parse(settings: type[T], argv: list[str] | None, *, example: str = "", **options: Any) -> T:
    """The command line as an instance of a dataclass whose fields were made by `flag`. Raises InputError.

    example: a command with which `--help` ends. options: for argparse's ArgumentParser.
    """
    parser, groups, flags = Parser(**options), {}, []
    if example:
        parser.epilog = f"{parser.epilog}\n\n" if parser.epilog else ""
        parser.epilog += f"example:\n  {example}"
    for f in fields(settings):
        argument = dict(f.metadata)
        group, positional, alias = (argument.pop(key, None) for key in ("group", "positional", "alias"))
        place = groups.setdefault(group, parser.add_argument_group(group)) if group else parser
        if f.default is False:
            argument["action"] = "store_true"
        elif f.default is not MISSING:
            argument["default"] = f.default
        elif not positional:
            argument["required"] = True
        name = f.name if positional else f"--{f.name.replace('_', '-')}"
        place.add_argument(name, **argument)
        flags.append(name)
        if alias:
            hidden = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
            parser.add_argument(alias, dest=f.name, **argument | hidden)
            flags.append(alias)
    argv = sys.argv[1:] if argv is None else argv
    parser.check_flags(argv, flags)
    may_follow = any(f.metadata.get("nargs") == "?" for f in fields(settings))  # a prompt, after the flags
    read = parser.parse_intermixed_args if may_follow else parser.parse_args
    return settings(**vars(read(argv)))


def subcommand(program: str, names: Iterable[str], argv: list[str] | None, help: str) -> tuple[str, list[str]]:
    """The command that stands first on the command line, and the arguments after it. `--help` prints `help`."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if name in ("-h", "--help"):
        print(f"usage: {program} {{{','.join(names)}}} [-h] ...\n\n{help}")
        sys.exit(0)
    if name not in names:
        given = repr(name) if name else "no command"
        expected = f"expected one of {', '.join(names)}{did_you_mean(name, names)}"
        raise InputError(f"got {given}; {expected} (see {program} --help)")
    return name, rest


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows a default only where there is one, and description and examples as they are written."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or action.default is False:
            return action.help
        if isinstance(action.default, tuple):
            return f"{action.help} (default: {' '.join(map(str, action.default))})"
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations. Its errors are one line that points to the help."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        if "" in (sys.argv[1:] if args is None else args):  # `--mask "$RUN"` with RUN unset is not "no mask"
            raise InputError(f"an argument is empty (an unset variable?); leave it out (see {self.prog} --help)")
        return super().parse_known_args(args, namespace)

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        """The arguments in a line of an @FILE: as in a shell, with comments."""
        return shlex.split(line, comments=True)

    def check_flags(self, args: list[str], flags: list[str]) -> None:
        """Raise InputError for an argument that looks like a flag and is none, before anything that follows from it."""
        for arg in takewhile("--".__ne__, args):
            name = arg.partition("=")[0]
            if re.fullmatch(r"--?[a-zA-Z]\S*", name) and name not in (*flags, "-h", "--help"):
                self.error(f"unknown flag {name}{did_you_mean(name, flags)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices))
            raise

    def error(self, message: str):
        raise InputError(f"{message} (see {self.prog} --help)")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known one that is most like it, if any is."""
    return "".join(f"; did you mean {near}?" for near in get_close_matches(name, names, n=1))


LARGEST = 2**31 - 1  # the largest whole number that a flag takes


def number(kind: type, low: float, high: float = math.inf, *, above: bool = False) -> Callable[[str], float]:
    """An argparse type: an int or float in [low, high], or in (low, high] if `above`. No int exceeds LARGEST."""
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
            raise argparse.ArgumentTypeError(f"got {text!r:.40}; expected {name} {bound} {low:g}{upper}")
        return value

    return parse


POSITIVE, SHARE = number(int, 1), number(float, 0, 1, above=True)


def count_or_share(text: str) -> int | float:
    """An argparse type: 8 is a number of things, 0.25 a share of them."""
    try:
        value = int(text) if text.isdecimal() else float(text)
    except ValueError:
        value = 0
    if not (value >= 1 if isinstance(value, int) else 0 < value < 1):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected a whole number at least 1, or a share between 0 and 1"
        )
    return value


PICTURE_FORMATS = (".png", ".pdf", ".svg")


def picture(text: str) -> str:
    """An argparse type: the name of a file that can hold a picture."""
    if Path(text).suffix not in PICTURE_FORMATS:
        raise argparse.ArgumentTypeError(f"got {text!r}; expected a file that ends in {', '.join(PICTURE_FORMATS)}")
    return text
