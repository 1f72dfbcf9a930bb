"""The learning rate of every optimizer step: constant or falling to zero, after an optional linear warm-up.

The formulas are those of transformers' schedulers, whose step 0 is our step 1. After a warm-up of W of N steps, with
t = step - 1, the rate is lr t / W for t < W, and then
    constant    lr
    linear      lr (N - t) / (N - W)
    cosine      lr (1 + cos(pi (t - W) / (N - W))) / 2
"""

import math

from command.cli import InputError

SCHEDULES = {  # how much of the rate is left once the share `done` of the steps after the warm-up is over
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}


def warmup_steps(warmup: int | float | None, steps: int) -> int:
    """The steps of --lr-warmup, given as a number or as a share of the run, of which one step is left at least.

    Raises InputError for a number that leaves none.
    """
    count = min(math.ceil(warmup * steps), steps - 1) if isinstance(warmup, float) else warmup or 0
    if count and count >= steps:
        raise InputError(f"--lr-warmup {warmup}: {count} steps of warm-up in a run of {steps}; expected fewer")
    return count


def rate(lr: float, schedule: str, step: int, steps: int, warmup: int) -> float:
    """The learning rate of `step`, counted from 1, of `steps`, the first `warmup` of which warm up."""
    t = step - 1  # so that a warm-up begins with a step at rate 0, as in transformers
    return lr * t / warmup if t < warmup else lr * SCHEDULES[schedule]((t - warmup) / (steps - warmup))
