"""Means with intervals over seeds, and the verdict on a difference that the paper reports.

estimate([47.1, 48.0, 46.5])                      # Estimate(mean=47.2, half=1.88, n=3): 47.2 +- 1.88
verdict([-4.9, -4.1, -5.3], claimed=+3.12)        # "opposite direction"
"""

import math
from collections.abc import Collection
from statistics import correlation, mean, stdev
from typing import NamedTuple

LEAST_SEEDS = 3
MARGIN = 2.0  # points between which a mean difference counts as none: MoE-Sieve's
RULE = (
    f"A row's differences from the row that it is compared with are paired by seed. If their 95 % t-interval excludes "
    f"zero, the verdict is *same direction* or *opposite direction*, by the sign of the paper's difference. Where the "
    f"paper has no value, or no difference, it is *higher* or *lower*. If the interval contains zero, two one-sided "
    f"t-tests at 5 % decide whether the mean difference lies within ± {MARGIN:g} points: *equivalent*. Otherwise, and "
    f"with fewer than {LEAST_SEEDS} seeds, the verdict is *undecided*. Of a hundred differences that are zero, about "
    f"five get a direction by chance. Seeds change the training. The test problems stay the same."
)


class Estimate(NamedTuple):
    """A mean, and half the width of its 95 % interval."""

    mean: float | None  # None without values
    half: float | None  # None for fewer than two
    n: int


def paired(values: dict[int, float], others: dict[int, float]) -> list[float]:
    """Differences at the seeds that both have."""
    return [values[seed] - others[seed] for seed in values if seed in others]


def estimate(values: Collection[float]) -> Estimate:
    """mean +- t s / sqrt(n) with the 97.5th percentile t of Student's distribution."""
    n = len(values)
    half = t_quantile(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(mean(values) if values else None, half, n)


def is_equivalent(differences: list[float], margin: float) -> bool:
    """Two one-sided t-tests at 5 % reject that the mean lies beyond -margin and beyond margin (TOST).

    The same as a 90 % t-interval within +-margin. False with fewer than LEAST_SEEDS values.
    """
    n = len(differences)
    if n < LEAST_SEEDS:
        return False
    return abs(mean(differences)) + t_quantile(n - 1, 0.90) * stdev(differences) / math.sqrt(n) < margin


def verdict(differences: list[float], claimed: float | None, *, margin: float | None = MARGIN) -> str:
    """What the paired differences of a row say about the difference that is claimed (`RULE`).  margin None: no TOST"""
    interval = estimate(differences)
    if not interval.n:
        return "not run"
    if interval.n < LEAST_SEEDS or abs(interval.mean) <= interval.half:
        return "equivalent" if margin and is_equivalent(differences, margin) else "undecided"
    if not claimed:  # not printed, or printed as equal
        return "higher" if interval.mean > 0 else "lower"
    return "same direction" if interval.mean * claimed > 0 else "opposite direction"


def spread_ratio(values: dict[int, float], others: dict[int, float]) -> tuple[float, float, float]:
    """How the standard deviation over seeds compares with that of others: the ratio, and its 95 % interval.

    The seeds that both have are pairs, whose correlation r counts (Pitman 1939, Morgan 1939): the square of the ratio
    lies within its estimate times K -+ sqrt(K^2 - 1), with K = 1 + 2 (1 - r^2) t^2 / (n - 2).
    """
    pairs = [(values[seed], others[seed]) for seed in values if seed in others]
    mine, theirs = zip(*pairs, strict=True)
    ratio, n = stdev(mine) / stdev(theirs), len(pairs)
    K = 1 + 2 * (1 - correlation(mine, theirs) ** 2) * t_quantile(n - 2) ** 2 / (n - 2)
    factor = math.sqrt(K + math.sqrt(K**2 - 1))
    return ratio, ratio / factor, ratio * factor


def t_quantile(df: int, inside: float = 0.95) -> float:
    """The t with P(|T| < t) = inside for Student's T with `df` degrees of freedom, by bisection."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_inside(middle, df) < inside else (low, middle)
    return low


def t_inside(t: float, df: int) -> float:
    """P(|T| < t) for a whole number of degrees of freedom (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    With theta = atan(t / sqrt(df)): for odd df 2/pi (theta + sin cos (1 + 2/3 cos^2 + 2/3 4/5 cos^4 + ...)), for even
    df sin (1 + 1/2 cos^2 + 1/2 3/4 cos^4 + ...), up to the power df - 3 or df - 2 of the cosine.
    """
    theta, odd = math.atan(t / math.sqrt(df)), df % 2
    term, total = 1.0, 0.0
    for i in range(df // 2):
        total += term
        term *= (2 * i + 1 + odd) / (2 * i + 2 + odd) * math.cos(theta) ** 2
    if odd:
        return 2 / math.pi * (theta + math.sin(theta) * math.cos(theta) * total)
    return math.sin(theta) * total
