"""Table 6 and Figure 5: training speed and memory, the paper's beside those of bench.py step and the frozen base."""

import json
from pathlib import Path

import numpy as np

from lab.benchmarks.step import EXAMPLES, times_as_fast
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
BY_NUMBER = {2: 20.99, 4: 20.98, 8: 20.08, 16: 16.49}  # Table 7, samples per second by hot experts per layer
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


def table6(out: Path) -> Section:
    """The paper's speeds, ours, and both relative to LoRA and to the frozen base."""
    lines, kept = [NOTE], []
    for batch in (8, 32):
        rows, shown = speeds(out / "step.json", batch), []
        for name in OURS:
            row, lora = rows.get(name), lora_beside(name)
            claimed = 100 * (PAPER[name] / PAPER[lora] - 1) if name in PAPER else None
            faster = [] if name == lora else gains(rows, name, lora)
            masked = name.startswith(("lori-s", "hellori-s"))  # in the paper, and not here: another thing is measured
            judged = "-" if masked or name in ("floor", lora) else verdict(faster, claimed, margin=None)
            missing = "-" if row else "not run"
            shown.append([
                named(name),
                number_text(PAPER.get(name)),
                number_text(claimed or None, "+.0f"),
                number_text(row["samples_per_s"]) if row else missing,
                mean_text(estimate(faster), "+.0f", missing),
                number_text(row and row["over_floor"]),
                number_text(row and row.get("over_peft-all")),
                number_text(row and row["peak_bytes"] / 1e6, ",.0f"),
                judged,
            ])  # fmt: skip
            kept.append({"batch": batch, "row": name, "paper": PAPER.get(name), "paper_over_lora": claimed})
            kept[-1] |= {"over_lora": estimate(faster), "over_floor": row and row["over_floor"], "verdict": judged}
        heads = ["", "paper: samples/s", "over LoRA, %", "ours: samples/s", "over LoRA, %"]
        lines += [
            "",
            f"Batches of {batch}",
            "",
            *grid([*heads, "/ frozen base", "/ peft", "peak MB", "verdict"], shown),
        ]
    by_number, rows = table7(out)
    return Section("Table 6: training speed", lines + by_number, kept + rows)


def table7(out: Path) -> tuple[list[str], list[dict]]:
    """Speed by the number of hot experts, relative to 8.  -> lines, rows"""
    lines, kept = [], []
    for batch in (8, 32):
        rows, shown = speeds(out / "step.json", batch), []
        for k, printed in BY_NUMBER.items():
            row = rows.get(named_k(k))
            claimed = None if k == 8 else 100 * (printed / BY_NUMBER[8] - 1)
            faster = [] if k == 8 else gains(rows, named_k(k), named_k(8))
            missing = "-" if k == 8 else "not run"
            shown.append([
                f"k = {k}",
                number_text(printed),
                number_text(claimed, "+.0f"),
                number_text(row["samples_per_s"]) if row else "not run",
                mean_text(estimate(faster), "+.0f", missing),
                "-" if k == 8 else verdict(faster, claimed, margin=None),
            ])  # fmt: skip
            kept.append({"batch": batch, "row": f"k = {k}", "paper": printed, "over_k8": estimate(faster)})
        heads = ["", "paper: samples/s", "over k = 8, %", "ours: samples/s", "over k = 8, %", "verdict"]
        lines += ["", f"Table 7, throughput, batches of {batch}", "", *grid(heads, shown)]
    return lines, kept


def named_k(k: int) -> str:
    """The row of bench.py step for HELLoRA with k hot experts."""
    return "hellora" if k == 8 else f"hellora-k{k}"


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
