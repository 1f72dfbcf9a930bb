"""Measure speed and memory: one file of lab/benchmarks per command, each a fair comparison within one run.

    python bench.py step                 # a training step, beside the frozen base and beside transformers + peft
    python bench.py growth               # how a step's time grows with k, the number of experts, the rank and the batch
    python bench.py generate             # decoding, beside transformers' generate
    python bench.py full                 # OLMoE-1B-7B's full size on this machine, with random weights
    python bench.py gpu                  # checks and measures a GPU (--device cpu --shape small: the rehearsal)
    python bench.py plan --model mixtral-8x7b --method hellora --gpus 2      # memory on machines you do not have

Compare the ratios within one run: the absolute numbers depend on the machine. `--json FILE` keeps the rows.
"""

import command.start  # noqa: F401

from command import cli
from lab.benchmarks import full, generate, gpu, growth, plan, step

COMMANDS = {each.__name__.rpartition(".")[2]: each.main for each in (step, growth, generate, plan, full, gpu)}


def main(argv: list[str] | None = None) -> object:
    name, flags = cli.subcommand("bench.py", COMMANDS, argv, __doc__)
    return COMMANDS[name](flags)


if __name__ == "__main__":
    cli.run(main)
