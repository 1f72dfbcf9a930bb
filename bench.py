"""Measure: one file of benchmarks/ a command, each a fair comparison within one run.

    python bench.py step                 # a training step beside the frozen model and beside transformers + peft
    python bench.py generate             # decoding beside transformers' generate
    python bench.py load                 # reading a checkpoint beside transformers' from_pretrained
    python bench.py plan --model mixtral-8x7b --method hellora --gpus 2      # memory on machines you do not have

Ratios within a run are what these are for; absolute numbers are the machine's. `--json FILE` keeps the rows.
"""

import importlib
import sys

from command import cli
from command.cli import InputError

COMMANDS = ("step", "generate", "load", "plan")


def main(argv: list[str] | None = None) -> object:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(f"usage: bench.py {'|'.join(COMMANDS)} [flags]\n\n{__doc__}")
        return None
    if not argv or argv[0] not in COMMANDS:
        given = repr(argv[0]) if argv else "nothing"
        raise InputError(f"got {given}; want one of {', '.join(COMMANDS)} (see bench.py --help)")
    return importlib.import_module(f"benchmarks.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    cli.run(main)
