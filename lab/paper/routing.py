"""Figures 1, 3, 4 and 6: routing. Real counts of full-size models, which need no GPU, and counts of the embedded ones.

Dimensions: L layers with experts, E experts per layer, K experts per token.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which brings global state and looks for a display
from torch import Tensor

import data
from command.cli import InputError, RunError
from hellora import hottest
from hub.config import PRESETS
from lab import ROOT
from lab.paper.page import Section, grid
from lab.paper.published import FOLDER
from lab.paper.runs import model_content
from model import MoEConfig
from recipes.methods import Recipe
from routing import advice, pictures
from routing.profiles import RoutingProfile, load_profile
from routing.statistics import chance_overlap, jaccard, shares, top_share

OLMOE = {
    "GSM8K": "olmoe-gsm8k",
    "CodeAlpaca": "olmoe-codealpaca",
    "MBPP": "olmoe-mbpp",
    "WikiText": "olmoe-wikitext",
}
OTHERS = {"Qwen1.5-MoE": "qwen1.5-moe-gsm8k", "DeepSeekMoE": "deepseek-moe-gsm8k"}
PRESET_OF = {"olmoe": "olmoe-1b-7b", "qwen1.5": "qwen1.5-moe-a2.7b", "deepseek": "deepseek-moe-16b"}
LAYERS = (0, 4, 8, 12, 15)  # of OLMoE-1B-7B, in Figure 4
# of Okabe and Ito, and cividis: apart without colour vision
COLORS = ("#00204c", "#e69f00", "#56b4e9", "#8a8779", "#009e73", "#cc79a7")
STYLES = ("-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1)), (0, (1, 1)))
PAPER_SAVED, PAPER_SAME = 38.7, (11, 16)  # % of adapter FLOPs (abstract); layers with an equal hot set (Figure 3)
PAPER_LAYER, PAPER_SHARE = 7, 50.0  # "more than 50 %" of layer 7's tokens reach the top 8 on GSM8K (Figure 1)


def real(name: str) -> RoutingProfile:
    """A published profile."""
    return load_profile(FOLDER / f"{name}.json")


def every_real() -> dict[str, RoutingProfile]:
    return {f"OLMoE, {name}": real(file) for name, file in OLMOE.items()} | {
        f"{model}, GSM8K": real(file) for model, file in OTHERS.items()
    }


def counted(out: Path, model: str, task: str, sample: float, warmup: str, *, may_run: bool) -> RoutingProfile | None:
    """The routing of an embedded model, by profile.py; from OUT/profiles if it has been counted. None: not run."""
    file = out / "profiles" / f"{model}-{task}-{sample:g}-{warmup}.json"
    try:
        found = load_profile(file)
        origin = data.digest(data.load_examples(task, "train")), model_content(model)["weights"]
        if (found.data, found.weights) == origin:
            return found
    except InputError:
        pass  # not there
    if not may_run:
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    flags = {"model": model, "task": task, "sample": sample, "warmup": warmup, "out": file}
    command = [sys.executable, str(ROOT / "profile.py")]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"profile.py ended with status {done.returncode}: {done.stderr.strip()}")
    return load_profile(file)


# ------------------------------------------------------------------------------------------------------- Figure 1


def skew(name: str, found: RoutingProfile) -> dict:
    """How uneven the use of experts is, in numbers of the paper and of MoE-Sieve."""
    counts, K, E = found.counts, found.num_experts_per_tok, found.counts.shape[1]
    top, quarter, share = top_share(counts, K), top_share(counts, E // 4), shares(counts)
    by_layer = float((share.std(-1, correction=0) / share.mean(-1)).mean())
    summed = share.sum(0)
    return {
        "name": name,
        "K": K,
        "E": E,
        "top": 100 * float(top.mean()),
        "least": 100 * float(top.min()),
        "most": 100 * float(top.max()),
        "layer 7": 100 * float(top[PAPER_LAYER]) if len(top) > PAPER_LAYER else None,
        "quarter least": 100 * float(quarter.min()),
        "quarter most": 100 * float(quarter.max()),
        "cv": by_layer,
        "cv over global": by_layer / float(summed.std(correction=0) / summed.mean()),
        "flops saved": saved(name, found),
    }


def saved(name: str, found: RoutingProfile) -> float | None:
    """% of LoRA's adapter FLOPs that HELLoRA with k = K saves, on these counts. None for a model without a preset."""
    preset = next((preset for key, preset in PRESET_OF.items() if name.lower().startswith(key)), None)
    if preset is None:
        return None
    sizes = advice.adapter_sizes(MoEConfig.from_dict(PRESETS[preset]), Recipe.r)
    rows = advice.choices(found.counts, found.num_experts_per_tok, sizes)
    return 100 * (1 - rows[found.num_experts_per_tok - 1].flops / rows[-1].flops)


def figure1(out: Path, *, may_run: bool) -> Section:
    """The use of experts on GSM8K as a heat map, and how uneven it is on every data set."""
    found, gsm8k = every_real(), real(OLMOE["GSM8K"])
    for task in ("tiny-math", "tiny-code", "tiny-safety"):
        if profile := counted(out, "tiny", task, 0.1, "none", may_run=may_run):
            found[f"embedded, {task}"] = profile
    title = f"Routing of OLMoE-1B-7B on GSM8K: {gsm8k.num_tokens:,} tokens, 8 of 64 experts per token"
    pictures.draw_profile(gsm8k.counts, 8, title, out / "fig1.png")
    rows = [skew(name, profile) for name, profile in found.items()]
    layer7 = next(row["layer 7"] for row in rows if row["name"] == "OLMoE, GSM8K")
    holds = "holds" if layer7 > PAPER_SHARE else "does not hold"
    flops = next(row["flops saved"] for row in rows if row["name"] == "OLMoE, GSM8K")
    lines = [
        "![Routing of OLMoE-1B-7B on GSM8K](fig1.png)", "",
        f"The paper says that the 8 hottest experts of layer {PAPER_LAYER} receive more than {PAPER_SHARE:.0f} % of "
        f"the tokens of GSM8K. In these counts they receive {layer7:.1f} %, so the statement {holds}. HELLoRA saves "
        f"{flops:.1f} % of LoRA's adapter FLOPs on these counts. The paper says {PAPER_SAVED} %.", "",
        "CV is the standard deviation divided by the mean of the counts of a layer's experts, averaged over the "
        "layers. The global CV is that of the counts summed over the layers (MoE-Sieve, Table 2).", "",
        *grid(
            ["", "K of E", "top K, mean", "least..most", "layer 7", "top quarter", "CV", "/ global CV", "FLOPs saved"],
            [
                [
                    row["name"], f"{row['K']} of {row['E']}", f"{row['top']:.1f} %",
                    f"{row['least']:.1f}..{row['most']:.1f} %",
                    "-" if row["layer 7"] is None else f"{row['layer 7']:.1f} %",
                    f"{row['quarter least']:.1f}..{row['quarter most']:.1f} %", f"{row['cv']:.2f}",
                    f"{row['cv over global']:.1f}",
                    "-" if row["flops saved"] is None else f"{row['flops saved']:.1f} %",
                ]
                for row in rows
            ],
        ),
    ]  # fmt: skip
    return Section("Figure 1: which experts a task uses", lines, rows)


# ------------------------------------------------------------------------------------------------------- Figure 3


def sampled(found: RoutingProfile, fraction: float, seed: int = 0) -> Tensor:
    """Counts of a sample of the tokens, drawn as if the choices of experts were independent.  -> int64 [L, E]"""
    draws = np.random.default_rng(seed)
    total = round(fraction * found.num_tokens) * found.num_experts_per_tok
    return torch.from_numpy(np.stack([draws.multinomial(total, share) for share in shares(found.counts).numpy()]))


def figure3(out: Path, *, may_run: bool) -> Section:
    """How far the hot sets agree: of a sample and of all data, of counts and of gate mass, of two tasks."""
    gsm8k = real(OLMOE["GSM8K"])
    pairs = {"OLMoE, GSM8K: a tenth of the tokens, drawn independently": (gsm8k, sampled(gsm8k, 0.1))}
    pairs |= {f"OLMoE, GSM8K and {name}": (gsm8k, real(file).counts) for name, file in OLMOE.items() if name != "GSM8K"}
    whole = counted(out, "tiny", "tiny-math", 1.0, "none", may_run=may_run)
    for warmup in ("none", "lora"):
        tenth = counted(out, "tiny", "tiny-math", 0.1, warmup, may_run=may_run)
        way = {"none": "base model", "lora": "LoRA warm-up"}[warmup]
        pairs[f"embedded, tiny-math: a tenth of the data ({way})"] = (whole, tenth and tenth.counts)
    rows, bars = [], {}
    for name, (a, counts) in pairs.items():
        if a is None or counts is None:
            rows.append({"name": name})
            continue
        K, E = a.num_experts_per_tok, a.counts.shape[1]
        overlap = jaccard(hottest(a.counts, K), hottest(counts, K))
        bars[name] = overlap
        row = {"name": name, "K": K, "mean": float(overlap.mean()), "chance": chance_overlap(K, E)}
        rows.append(row | {"same": int((overlap == 1).sum()), "layers": len(overlap)})
    draw_overlaps(bars, out / "fig3.png")
    shown = [
        [row["name"], f"{row['mean']:.2f}", f"{row['same']} of {row['layers']}", f"{row['chance']:.2f}"]
        if "mean" in row
        else [row["name"], "not run", "", ""]
        for row in rows
    ]
    masses = [
        {"name": name, "quarter": profile.counts.shape[1] // 4, "mean": float(agreement(profile).mean())}
        for name, profile in every_real().items()
    ]
    paper = ["paper: LoRA warm-up on a tenth of GSM8K and all of it", "-", f"{PAPER_SAME[0]} of {PAPER_SAME[1]}", "-"]
    lines = [
        "![Overlap of hot sets](fig3.png)", "",
        "The published counts are of whole training sets. The tenth of OLMoE's tokens is drawn from them as if tokens "
        "chose experts independently. Tokens of one example are alike, so the overlap of a real sample would be "
        "smaller.", "",
        *grid(["the K hottest experts", "Jaccard", "same set in layers", "by chance"], [paper, *shown]), "",
        "Counts against sums of routing weights, for the hottest quarter (MoE-Sieve, Table 9):", "",
        *grid(["", "Jaccard, mean of the layers"], [[row["name"], f"{row['mean']:.2f}"] for row in masses]),
    ]  # fmt: skip
    return Section("Figure 3: do two samples have the same hot experts?", lines, rows + masses)


def agreement(found: RoutingProfile) -> Tensor:
    """Jaccard overlap of the hottest quarter by counts and by gate mass.  -> [L]"""
    quarter = found.counts.shape[1] // 4
    return jaccard(hottest(found.counts, quarter), hottest(found.gate_mass, quarter))


def draw_overlaps(bars: dict[str, Tensor], path: Path) -> None:
    """The overlap of each layer, one line per pair."""
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    marks = "os^DvPX"
    for i, (name, overlap) in enumerate(bars.items()):
        style = {"color": COLORS[i % 6], "linestyle": STYLES[i % 6], "marker": marks[i % 7], "markersize": 5}
        axes.plot(range(len(overlap)), overlap, linewidth=1.5, label=name, **style)
    axes.set(xlabel="layer", ylabel="overlap (Jaccard) of the hottest experts", ylim=(0, 1.05))
    axes.set_xticks(range(max(map(len, bars.values()))))
    figure.legend(loc="outside lower center", frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


# ------------------------------------------------------------------------------------------------- Figures 4 and 6


def figure4(out: Path) -> Section:
    """The shares of a layer's experts in descending order, for OLMoE's layers and four data sets."""
    profiles = {name: real(file) for name, file in OLMOE.items()}
    panels = {f"layer {layer}": {name: p.counts[layer] for name, p in profiles.items()} for layer in LAYERS}
    draw_sorted(panels, 8, out / "fig4.png")
    rows = [
        {"layer": layer, **{name: 100 * float(top_share(p.counts, 8)[layer]) for name, p in profiles.items()}}
        for layer in LAYERS
    ]
    shown = [[str(row["layer"]), *(f"{row[name]:.1f} %" for name in OLMOE)] for row in rows]
    lines = ["![Shares of the experts of five layers](fig4.png)", "", "Share of the 8 hottest of 64 experts:", ""]
    title = "Figure 4: shares of the experts in descending order, OLMoE-1B-7B"
    return Section(title, [*lines, *grid(["layer", *OLMOE], shown)], rows)


def figure6(out: Path, *, may_run: bool) -> Section:
    """The same for two real models, and for the embedded model with Mixtral's architecture."""
    mixtral = counted(out, "tiny-mixtral", "tiny-math", 0.1, "none", may_run=may_run)
    found = {f"{name}, GSM8K": real(file) for name, file in OTHERS.items()}
    found |= {"embedded Mixtral, tiny-math": mixtral} if mixtral else {}
    panels = {name: {f"layer {i}": p.counts[i] for i in spread(len(p.counts))} for name, p in found.items()}
    draw_sorted(panels, None, out / "fig6.png")
    rows = [skew(name, profile) for name, profile in found.items()]
    shown = [[row["name"], f"{row['K']} of {row['E']}", f"{row['top']:.1f} %", f"{100 * row['K'] / row['E']:.1f} %"]
             for row in rows]  # fmt: skip
    shown += [] if mixtral else [["embedded Mixtral, tiny-math", "2 of 8", "not run", ""]]
    shown.append(["Mixtral-8x7B, GSM8K", "2 of 8", "not run", f"{100 * 2 / 8:.1f} %"])
    lines = ["![Shares of the experts of other models](fig6.png)", ""]
    lines += grid(["", "K of E", "top K, mean of the layers", "if use were even"], shown)
    return Section("Figure 6: shares of the experts in other models", lines, rows)


def spread(num_layers: int) -> list[int]:
    """Four layers from the first to the last, or all of fewer."""
    return sorted({round(i * (num_layers - 1) / 3) for i in range(4)})


def draw_sorted(panels: dict[str, dict[str, Tensor]], num_hot: int | None, path: Path) -> None:
    """A panel per layer or model: curves of the experts' shares in descending order."""
    figure = Figure(figsize=(3.2 * len(panels), 3.8), dpi=150, layout="constrained")
    grid_of_axes = figure.subplots(1, len(panels), squeeze=False, sharey=num_hot is not None)
    for axes, (title, curves) in zip(grid_of_axes[0], panels.items(), strict=True):
        for i, (name, counts) in enumerate(curves.items()):
            draw_curve(axes, counts, name, i)
        E = len(counts)
        axes.axhline(100 / E, color="0.6", linewidth=0.8, label="even use")
        if num_hot:
            axes.axvline(num_hot + 0.5, color="0.3", linestyle=":", linewidth=1.2, label=f"left: the top {num_hot}")
        axes.set(title=title, xlabel=f"experts, most used first (of {E})", xlim=(0.5, E + 0.5))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    for axes in figure.axes:  # after all curves: the panels may share their scale
        axes.set_ylim(bottom=0)
    figure.axes[0].set_ylabel("% of the layer's routed tokens")
    figure.savefig(path)


def draw_curve(axes: Axes, counts: Tensor, name: str, i: int) -> None:
    values = np.sort(100 * shares(counts[None])[0].numpy())[::-1]
    marker = "o" if len(values) <= 16 else None
    style = {"color": COLORS[i % 6], "linestyle": STYLES[i % 6], "marker": marker, "markersize": 4}
    axes.plot(range(1, len(values) + 1), values, linewidth=1.5, label=name, **style)
