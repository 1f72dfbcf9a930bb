"""The two errors that a command ends with, in one line, and the line of others."""


class InputError(ValueError):
    """Wrong input from the user. The message says what was given, what is allowed and what to do."""


class RunError(RuntimeError):
    """A run cannot continue although its input was right: a full disk, a NaN loss. One line, exit status 1."""


def first_line(error: Exception) -> str:
    """The first line of an error's message; its kind if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
