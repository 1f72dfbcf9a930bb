"""The two errors that a command ends with, in one line."""


class InputError(ValueError):
    """Wrong input from the user. The message says what was given, what is allowed and what to do."""


class RunError(RuntimeError):
    """A run cannot continue although its input was right: a full disk, a NaN loss. One line, exit status 1."""
