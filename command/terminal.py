"""Questions from the terminal or from a pipe, and answers that are printed while they are made."""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress

from command.cli import InputError, note

Answer = Callable[[str], Iterator[str]]  # a question -> its answer, in pieces


def show(pieces: Iterator[str]) -> None:
    """Print the pieces of an answer as they come, and an end of line."""
    try:
        with closing(pieces):  # an answer that is interrupted ends where it is
            for piece in pieces:
                print(piece, end="", flush=True)
    finally:
        print(flush=True)


def converse(answer: Answer, reset: Callable[[], None]) -> None:
    """Answer what is typed: `/reset` forgets what was said, Ctrl-C stops an answer, Ctrl-D ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  (lines that are typed can be edited, and recalled)
    note("/reset forgets what was said, Ctrl-C stops an answer, Ctrl-D ends")
    while True:
        try:
            line = input("> ")
            if line.strip() == "/reset":
                reset()
            elif line.startswith("/") and len(line.split()) == 1:
                note(f"{line.strip()} is not a command; the only one is /reset")
            elif line.strip():
                show(answer(line))
        except EOFError:
            return print()
        except KeyboardInterrupt:
            print()
        except InputError as error:  # a question that cannot be put to the model
            note(f"error: {error}")


def answer_lines(answer: Answer, reset: Callable[[], None]) -> None:
    """Answer each line of a pipe by itself."""
    try:
        for line in sys.stdin or ():
            if line.strip():
                reset()
                show(answer(line.rstrip("\r\n")))
    except UnicodeDecodeError:
        raise InputError("the input is not text in UTF-8; convert it") from None
