"""Table 6 and Figure 5: training speed and memory, the paper's beside those of bench.py step and the frozen base."""

import json
from pathlib import Path

import numpy as np

from lab.benchmarks.measure import times_as_fast
from lab.benchmarks.step import EXAMPLES
from lab.markdown import grid
from lab.paper.page import Section, mean_text, number_text
from lab.paper.pictures import draw_speeds
from lab.paper.verdicts import estimate, verdict

PAPER = {  # Table 6, samples per second on GSM8K with two A100; _pure: experts alone, _gate: with the router
    "lora": 10.44, "lori-d": 10.65, "lori-s": 10.00, "hellora": 19.08, "hellori-d": 19.11, "hellori-s": 19.07,
    "lora-pure": 10.01, "lori-d-pure": 10.95, "lori-s-pure": 10.77,
    "hellora-pure": 19.60, "hellori-d-pure": 18.41, "hellori-s-pure": 19.45,
    "lora-gate": 11.97, "lori-d-gate": 10.98, "lori-s-gate": 10.91,
    "hellora-gate": 19.20, "hellori-d-gate": 19.03, "hellori-s-gate": 19.02,
}  # fmt: skip
# Table 7, samples per second with 2, 4, 8 and 16 hot experts per layer
PAPER_BY_NUMBER = {"hellora-k2": 20.99, "hellora-k4": 20.98, "hellora": 20.08, "hellora-k16": 16.49}
BATCHES = (8, 32)
OURS = ("floor", *PAPER, "moe-sieve", "dora", "fft", "peft-all", "peft-attention")
NOTE = (
    "Ours: `python bench.py step --names all --repeats 3 --json results/step.json`, "
    "the shape of OLMoE-1B-7B at a quarter of its width and depth, on CPU cores. The frozen base is the model without "
    "any adapter, forward and backward. -pure: adapters on experts alone. -gate: also on the router. Both are compared "
    "with LoRA at the same places. The masked LoRI-S and HELLoRI-S of the paper are not built: ours train a tenth of "
    "the entries of B and have no mask. The interval is over the repetitions of the benchmark, in which all rows take "
    "turns. MoE-Sieve says that a quarter of the experts saves up to half of LoRA's training time (abstract)."
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


def compared(rows: dict[str, dict], name: str, other: str, paper: dict[str, float]) -> dict:
    """A row beside another: samples per second in the paper, by how much that is more, in %, and the same for ours."""
    faster = [] if name == other else gains(rows, name, other)
    claimed = 100 * (paper[name] / paper[other] - 1) if name in paper and name != other else None
    masked = name.startswith(("lori-s", "hellori-s"))  # in the paper, and not here: another thing is measured
    return {
        "row": name,
        "paper": paper.get(name),
        "paper_over": claimed,
        "samples_per_s": rows[name]["samples_per_s"] if name in rows else None,
        "over": estimate(faster),
        "verdict": "-" if masked or name in ("floor", other) else verdict(faster, claimed, margin=None),
    }


def texts(found: dict) -> list[str]:
    """The numbers of `compared`, and the verdict."""
    missing = "not run" if found["samples_per_s"] is None else "-"
    return [
        number_text(found["paper"]),
        number_text(found["paper_over"], "+.0f"),
        number_text(found["samples_per_s"], missing=missing),
        mean_text(found["over"], "+.0f", missing),
        found["verdict"],
    ]


def heads(other: str) -> list[str]:
    return ["", "paper: samples/s", f"over {other}, %", "ours: samples/s", f"over {other}, %"]


def table6(out: Path) -> Section:
    """The paper's speeds, ours, and both relative to LoRA and to the frozen base; and those of Table 7."""
    lines, kept = [NOTE], []
    for batch in BATCHES:
        rows, shown = speeds(out / "step.json", batch), []
        for name in OURS:
            found, row = compared(rows, name, lora_beside(name), PAPER), rows.get(name, {})
            *numbers, judged = texts(found)
            peak = row["peak_bytes"] / 1e6 if row else None
            beside = [number_text(row.get("over_floor")), number_text(row.get("over_peft-all"))]
            shown.append([named(name), *numbers, *beside, number_text(peak, ",.0f"), judged])
            kept.append({"batch": batch, **found, "over_floor": row.get("over_floor")})
        lines += ["", f"Batches of {batch}", ""]
        lines += grid([*heads("LoRA"), "/ frozen base", "/ peft", "peak MB", "verdict"], shown)
    for batch in BATCHES:
        rows, shown = speeds(out / "step.json", batch), []
        for name in PAPER_BY_NUMBER:
            found = compared(rows, name, "hellora", PAPER_BY_NUMBER)
            label = f"k = {name.partition('-k')[2] or 8}"
            shown.append([label, *texts(found)])
            kept.append({"batch": batch, **found, "row": label})
        lines += ["", f"Table 7, throughput, batches of {batch}", "", *grid([*heads("k = 8"), "verdict"], shown)]
    return Section("Table 6: training speed", lines, kept)


def lora_beside(name: str) -> str:
    """The row of LoRA with adapters at the same places."""
    return next((f"lora-{targets}" for targets in ("pure", "gate") if name.endswith(f"-{targets}")), "lora")


def named(name: str) -> str:
    return "frozen base" if name == "floor" else name


def figure5(out: Path) -> Section:
    """Speed relative to LoRA, the paper's and ours, and memory relative to the frozen base, as bars."""
    measured, rows = speeds(out / "step.json", 8), []
    for name in (name for name in OURS if lora_beside(name) == "lora"):
        over = estimate(gains(measured, name, "lora"))
        rows.append({
            "name": named(name),
            "paper": PAPER[name] / PAPER["lora"] if name in PAPER else None,
            "ours": 1 + over.mean / 100 if over.n else None,
            "half": over.half / 100 if over.half else None,
            "memory": measured[name]["peak_bytes"] / measured["floor"]["peak_bytes"] if name in measured else None,
        })  # fmt: skip
    draw_speeds(rows, "Speed and memory of a training step", out / "fig5.png")
    title = "Figure 5: training speed and memory, beside the frozen base"
    return Section(title, ["![Speed and memory](fig5.png)", "", NOTE], rows)
