"""Table 6 and Figure 5: training speed and memory, the paper's beside those of bench.py step and the frozen floor."""

import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure  # not pyplot, which brings global state and looks for a display

from lab.benchmarks.step import EXAMPLES, times_as_fast
from lab.paper.page import Section, grid, mean_text, number_text
from lab.paper.verdicts import Estimate, estimate, verdict

PAPER = {  # Table 6, samples per second on GSM8K with two A100: hot experts alone, with the router, with attention too
    "lora": (10.01, 11.97, 10.44),
    "lori-d": (10.95, 10.98, 10.65),
    "lori-s": (10.77, 10.91, 10.00),
    "hellora": (19.60, 19.20, 19.08),
    "hellori-d": (18.41, 19.03, 19.11),
    "hellori-s": (19.45, 19.02, 19.07),
}
OURS = ("floor", *PAPER, "dora", "fft", "peft-all", "peft-attention")
NOTE = (
    "Ours: `python bench.py step --json results/step.json`, the shape of OLMoE-1B-7B at a quarter of its width and "
    "depth, on CPU cores. *floor*: the frozen model without any adapter, forward and backward. The interval is over "
    "the repetitions of the benchmark, in which all rows take turns."
)


def speeds(file: Path, batch: int) -> dict[str, dict]:
    """The rows of bench.py step of one batch size, by name; empty if there is no file."""
    if not file.is_file():
        return {}
    rows = json.loads(file.read_text(encoding="utf-8"))
    return {row["name"]: row for row in rows if row["batch"] == batch and row.get("seconds")}


def gains(rows: dict[str, dict], name: str, other: str) -> list[float]:
    """How much faster a row is than another, in %, in each repetition."""
    if name not in rows or other not in rows:
        return []
    batches = max(1, EXAMPLES // rows[name]["batch"])
    mine, theirs = (np.reshape(rows[key]["seconds"], (-1, batches)) for key in (name, other))
    return [100 * (times_as_fast(a[None], b[None]) - 1) for a, b in zip(mine, theirs, strict=True)]


def table6(out: Path) -> Section:
    """The paper's speeds, ours, and both relative to LoRA and to the frozen floor."""
    lines, kept = [NOTE], []
    for batch in (8, 32):
        rows, shown = speeds(out / "step.json", batch), []
        for name in OURS:
            paper, found = PAPER.get(name), rows.get(name)
            claimed = 100 * (paper[2] / PAPER["lora"][2] - 1) if paper else None
            faster = [] if name == "lora" else gains(rows, name, "lora")
            said = "-" if name in ("floor", "lora") else verdict(faster, claimed)
            shown.append([
                name, *(number_text(value) for value in paper or (None,) * 3), number_text(claimed or None, "+.0f"),
                number_text(found["samples_per_s"]) if found else "not run",
                mean_text(estimate(faster), "+.0f", "-" if found else "not run"),
                number_text(found and found["over_floor"]),
                number_text(found and found.get("over_peft-all")),
                number_text(found and found["peak_bytes"] / 1e6, ",.0f"), said,
            ])  # fmt: skip
            kept.append({"batch": batch, "row": name, "paper": paper, "paper_over_lora": claimed, "verdict": said})
            kept[-1] |= {"over_lora": estimate(faster), "over_floor": found and found["over_floor"]}
        heads = ["", "paper: _pure", "_gate", "all", "over LoRA, %", "ours: samples/s", "over LoRA, %"]
        lines += ["", f"Batches of {batch}", "", *grid([*heads, "/ floor", "/ peft", "peak MB", "verdict"], shown)]
    return Section("Table 6: training speed", lines, kept)


def figure5(out: Path) -> Section:
    """Speed relative to LoRA, the paper's and ours, and memory relative to the frozen floor, as bars."""
    rows = speeds(out / "step.json", 8)
    names = [name for name in OURS if name in PAPER or name in rows]
    found: dict[str, Estimate | None] = {name: estimate(gains(rows, name, "lora")) for name in names}
    figure = Figure(figsize=(11, 4.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(names))
    paper = [PAPER[name][2] / PAPER["lora"][2] if name in PAPER else 0 for name in names]
    mean = [1 + found[name].mean / 100 if found[name] else 0 for name in names]
    half = [(found[name].half or 0) / 100 if found[name] else 0 for name in names]
    left.barh(places - 0.2, paper, 0.38, color="#e69f00", hatch="//", edgecolor="white", label="paper, two A100")
    left.barh(places + 0.2, mean, 0.38, xerr=half, color="#00204c", ecolor="0.5", label="ours, CPU, batches of 8")
    left.axvline(1, color="0.3", linestyle="--", linewidth=1.2)
    left.set(yticks=places, yticklabels=names, xlabel="training speed, relative to LoRA of the same code")
    left.invert_yaxis()
    left.legend(frameon=False, loc="lower right")
    memory = [rows[name]["peak_bytes"] / rows["floor"]["peak_bytes"] if name in rows else 0 for name in names]
    right.barh(places, memory, 0.6, color="#8a8779")
    right.axvline(1, color="0.3", linestyle="--", linewidth=1.2)
    right.set(xlabel="peak memory of a step, relative to the frozen floor")
    for place, name in enumerate(names):
        if name not in rows:
            right.text(0.05, place, "not run", va="center", color="0.4")
            left.text(0.02, place + 0.22, "not run", va="center", color="0.4")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out / "fig5.png")
    title = "Figure 5: training speed and memory, beside the frozen floor"
    lines = ["![Speed and memory](fig5.png)", "", NOTE]
    return Section(title, lines, [{"row": name, "over_lora": found[name]} for name in names])
