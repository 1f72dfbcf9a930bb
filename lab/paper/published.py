"""What others measured at full size: the files of results/published, whose README names their source."""

import json
from functools import cache

from lab import ROOT

FOLDER = ROOT / "results" / "published"


@cache
def sieve_accuracies(study: str = "olmoe-gsm8k") -> dict[str, dict[int, float]]:
    """MoE-Sieve's accuracy in % by choice of experts and seed."""
    found = json.loads((FOLDER / "moe-sieve-accuracy.json").read_text(encoding="utf-8"))["results"][study]
    return {name: {int(seed): 100 * score for seed, score in scores.items()} for name, scores in found.items()}
