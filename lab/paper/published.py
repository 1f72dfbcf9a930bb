"""What others measured at full size: the files of results/published, whose README names their source."""

import json
from functools import cache

from lab import ROOT
from lab.markdown import grid
from lab.paper.page import Section, mean_text
from lab.paper.verdicts import estimate, paired, verdict

FOLDER = ROOT / "results" / "published"
STUDIES = {
    "olmoe-gsm8k": "OLMoE-1B-7B, GSM8K",
    "olmoe-hellaswag": "OLMoE-1B-7B, HellaSwag",
    "qwen-gsm8k": "Qwen1.5-MoE, GSM8K",
    "qwen-hellaswag": "Qwen1.5-MoE, HellaSwag",
}
TEXT = {  # numbers of HELLoRA's text that no table holds
    "abstract of the submission": ("9.24", "88.80", "15.74"),
    "abstract of arXiv 2605.18795": ("9.2", "1.9", "15.7", "23.2", "38.7"),
    "section 4.4": ("1.62", "1.888", "1.16"),  # 1.888 times LoRA's throughput, divided by that of a warm-up of 16 %
}


@cache
def sieve_accuracies(study: str = "olmoe-gsm8k") -> dict[str, dict[int, float]]:
    """MoE-Sieve's accuracy in % by choice of experts and seed."""
    results = json.loads((FOLDER / "moe-sieve-accuracy.json").read_text(encoding="utf-8"))["results"][study]
    return {name: {int(seed): 100 * score for seed, score in scores.items()} for name, scores in results.items()}


def section() -> Section:
    """Every choice of experts that MoE-Sieve published, against its LoRA on all experts, by the rule of our tables."""
    lines = [
        "hotkN: the N hottest experts of each layer. randkN: N random ones. cov60: the smallest set that covers 60 % "
        "of a layer's tokens. budgetp25_bcount: greedy, one budget for the model. Differences from full_lora are "
        "paired by seed, and so are those from its own choice, the hottest quarter (hotk16 of 64, hotk15 of 60). The "
        "study claims that the quarter is within 1 point of LoRA and equivalent within 2, except in one of six pairs "
        "of model and task. A row that is *higher* or *lower* may lie within that margin. The scores of its third "
        "task, Spider, are not among the published files."
    ]
    rows = []
    for study, title in STUDIES.items():
        by_choice, shown = sieve_accuracies(study), []
        lora, quarter = by_choice["full_lora"], by_choice["hotk15" if "qwen" in study else "hotk16"]
        for name in sorted(by_choice, key=lambda name: (name != "full_lora", len(name), name)):
            mean, numbers, texts = estimate(by_choice[name].values()), [], []
            for other in (lora, quarter):
                differences = paired(by_choice[name], other) if by_choice[name] is not other else []
                numbers.append(estimate(differences))
                texts += [mean_text(numbers[-1], "+.2f", ""), verdict(differences, None) if differences else ""]
            shown.append([name, mean_text(mean), *texts])
            rows.append({
                "study": study, "row": name, "mean": mean.mean, "difference": numbers[0], "verdict": texts[1],
                "from_quarter": numbers[1],
            })  # fmt: skip
        heads = ["experts", "MoE-Sieve", "from LoRA", "verdict", "from the quarter", "verdict"]
        lines += ["", f"{title}, accuracy in %", "", *grid(heads, shown)]
    return Section("MoE-Sieve: all its choices of experts, at full size", lines, rows)
