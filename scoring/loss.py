"""The user's own rows: the loss of their answers, and what the model writes in their place.

The loss is the mean negative log-likelihood of the target tokens, in nats, and the perplexity is exp(loss).
"""

import math

RowLoss = tuple[float, int]  # the loss summed over the target tokens of a row, and their number


def score(items: list[dict], references: list[str], losses: dict[str, RowLoss]) -> tuple[dict, list[dict]]:
    """The contents of score.json and of items.jsonl.

    references: the answers of the rows, empty where there is none. losses: by id, of the rows that have one.
    """
    nats, targets = (sum(part) for part in zip(*losses.values(), strict=True)) if losses else (0.0, 0)
    loss = nats / targets if targets else None
    result = {
        "loss": loss,
        "perplexity": None if loss is None else math.exp(loss),
        "num_total": len(items),
        "num_targets": targets,
    }
    judged = []
    for item, reference in zip(items, references, strict=True):
        row_nats, row_targets = losses.get(item["id"], (0.0, 0))
        about = {"loss": row_nats / row_targets, "num_targets": row_targets} if row_targets else {}
        judged.append(item | {"reference": reference} | about)
    return result | {"num_answers": len(losses), "rule": "mean over the target tokens"}, judged


def describe(result: dict, task: str) -> str:
    """The headline for people."""
    if result["loss"] is None:
        return f"{result['num_total']:,} completions on {task}; no row has an answer whose loss could be measured"
    tokens = f"{result['num_targets']:,} target tokens of {result['num_answers']:,} rows"
    return f"loss {result['loss']:.4f} nats per target token, perplexity {result['perplexity']:.3f} on {task}, {tokens}"
