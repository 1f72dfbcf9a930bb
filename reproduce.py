"""The paper's tables and figures beside ours: the paper's value, an independent study's, ours, and a verdict.

    python reproduce.py table4 --jobs 2      # makes the missing runs, then prints the table
    python reproduce.py table4 --no-run      # prints the table from the finished runs
    python reproduce.py params               # Tables 2, 3, 5 and 7: what trains, its share, its bytes; no weights

Our values come from the embedded models and tasks. Runs are kept in results/runs, where every table reads them. An
interrupted command continues where it stopped when it is run again. The code is in lab/paper.
"""

import command.start  # noqa: F401

from command import cli
from lab.paper.command import COMMANDS


def main(argv: list[str] | None = None) -> object:
    name, flags = cli.subcommand("reproduce.py", COMMANDS, argv, __doc__)
    return COMMANDS[name](flags)


if __name__ == "__main__":
    cli.run(main)
