"""The user's own rows: the loss of the targets, and what the model writes in their place.

The loss is the mean negative log-likelihood of the target tokens, in nats, and the perplexity is exp(loss).
"""

import math


def score(items: list[dict], references: list[str], loss: float, num_targets: int) -> tuple[dict, list[dict]]:
    """The contents of score.json and of items.jsonl. references: what the rows have in place of each completion."""
    result = {"loss": loss, "perplexity": math.exp(loss), "num_total": len(items), "num_targets": num_targets}
    result["rule"] = "mean over the target tokens"
    return result, [item | {"reference": text} for item, text in zip(items, references, strict=True)]


def describe(result: dict, task: str) -> str:
    """The headline for people."""
    tokens = f"{result['num_targets']:,} target tokens of {result['num_total']:,} rows"
    return f"loss {result['loss']:.4f} nats per target token, perplexity {result['perplexity']:.3f} on {task}, {tokens}"
