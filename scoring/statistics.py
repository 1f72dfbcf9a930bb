"""Shares with their intervals, pass@k, and the paired test of two evaluations."""

import math

Z = 1.959963984540054  # 97.5th percentile of the normal distribution
LORI_BATCH = 64  # of LoRI's evaluation scripts


def rate(count: float, total: int) -> dict:
    """A share with its Wilson 95 % interval, as score.json holds it. The rate is None if there is nothing to count.

    centre = (p + z^2 / 2n) / (1 + z^2 / n), half width = z sqrt(p (1 - p) / n + z^2 / 4n^2) / (1 + z^2 / n)
    """
    if total == 0:
        return {"rate": None, "num_correct": 0, "num_total": 0, "low": 0.0, "high": 1.0}
    p = count / total
    centre = p + Z * Z / (2 * total)
    half = Z * math.sqrt(p * (1 - p) / total + Z * Z / (4 * total * total))
    scale = 1 + Z * Z / total
    low, high = max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)
    return {"rate": p, "num_correct": count, "num_total": total, "low": min(low, p), "high": max(high, p)}


def share(verdicts: list[bool]) -> dict:
    """The rate of True among the verdicts."""
    return rate(sum(verdicts), len(verdicts))


def lori_as_published(verdicts: list[bool]) -> dict[str, dict]:
    """{name: rate} as LoRI's evaluator prints it: it drops the last, partial batch. Empty below one batch."""
    full = verdicts[: len(verdicts) // LORI_BATCH * LORI_BATCH]
    return {"lori as published": share(full)} if full else {}


def describe(estimate: dict) -> str:
    """A rate as text: 0.412 (165/400, 95% CI 0.365..0.461)."""
    if estimate["rate"] is None:
        return "n/a (nothing to score)"
    interval = f"95% CI {estimate['low']:.3f}..{estimate['high']:.3f}"
    return f"{estimate['rate']:.3f} ({estimate['num_correct']:.5g}/{estimate['num_total']}, {interval})"


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """The unbiased estimate of pass@k: the chance that k of the samples, drawn without replacement, hold a passing one.

    1 - C(n - c, k) / C(n, k) (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", eq. 1).
    """
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


def mcnemar(only_a: int, only_b: int) -> float:
    """Two-sided exact McNemar test: the chance that a fair coin splits the discordant pairs at least as unevenly."""
    n, fewer = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(fewer + 1)) / 2**n)
