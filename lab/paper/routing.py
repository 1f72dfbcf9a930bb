"""Figures 1, 3, 4 and 6: routing. Real counts of full-size models, which need no GPU, and counts of the embedded ones.

Dimensions: L layers with experts, E experts per layer, K experts per token.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import data
from command.cli import RunError
from command.files import read_json, write_text
from hellora import hottest
from hub.config import HUB_IDS, PRESETS
from lab import ROOT
from lab.markdown import grid
from lab.paper.page import Section
from lab.paper.pictures import draw_coverage, draw_overlaps
from lab.paper.published import FOLDER
from lab.paper.runs import Run, decisive_settings, flags, model_content
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
TASKS = ("tiny-math", "tiny-code", "tiny-safety")
EMBEDDED_MIXTRAL = "embedded Mixtral, tiny-math"
LAYERS = (0, 4, 8, 12, 15)  # of OLMoE-1B-7B, in the text of Figure 4
PAPER_SAVED, PAPER_SAME = 38.7, (11, 16)  # % of adapter FLOPs (abstract); layers with an equal hot set (Figure 3)
SIEVE_TENTH = 0.979  # mean Jaccard overlap (MoE-Sieve, by bootstrap)
A_TENTH, ALL_DATA = "base model, a tenth", "base model, all data"
WAYS = {  # of counting: share of the training data, --count-on of profile.py
    A_TENTH: (0.1, "none"),
    "LoRA warm-up, a tenth": (0.1, "lora"),
    ALL_DATA: (1.0, "none"),
}
COLD = 0.5  # of an even share: what a cold expert receives less than
PAPER_LAYER, PAPER_SHARE = 7, 50.0  # "more than 50 %" of layer 7's tokens reach the top 8 on GSM8K (Figure 1)


def percent_text(value: float | None) -> str:
    """40.7 %, or - if there is none."""
    return "-" if value is None else f"{value:.1f} %"


def real(name: str) -> RoutingProfile:
    """A published profile."""
    return load_profile(FOLDER / f"{name}.json")


def every_real() -> dict[str, RoutingProfile]:
    return {f"OLMoE, {name}": real(file) for name, file in OLMOE.items()} | {
        f"{model}, GSM8K": real(file) for model, file in OTHERS.items()
    }


def counted(out: Path, model: str, task: str, sample: float, warmup: str, *, may_run: bool) -> RoutingProfile | None:
    """The routing of an embedded model, by profile.py; from OUT/profiles if it has been counted. None: not run.

    warmup: "none", "lora", or "tuned": the model after LoRA fine-tuning on the task
    """
    file, origin = out / "profiles" / f"{model}-{task}-{sample:g}-{warmup}.json", made_from(model, task, warmup)
    if file.is_file() and read_json(file).get("made_from") == origin:
        return load_profile(file)
    if not may_run:
        return None
    file.parent.mkdir(parents=True, exist_ok=True)
    name = model
    with tempfile.TemporaryDirectory() as scratch:
        if warmup == "tuned":
            name, run, merged = f"{model} after LoRA on {task}", f"{scratch}/run", f"{scratch}/merged"
            call("train.py", *Run(task, "lora", model=model).train_flags(run))
            call("export.py", run, "--to", "merged", "--out", merged)
            model, warmup = merged, "none"
        given = {"model": model, "task": task, "sample": sample, "warmup": warmup, "dtype": "float32", "out": file}
        call("profile.py", *flags(given))
    write_text(file, json.dumps(read_json(file) | {"model": name, "made_from": origin}) + "\n")
    return load_profile(file)


def count_after_tuning() -> None:
    """Count on tiny-math after LoRA fine-tuning, for a row of the catcher's table (tables.TUNED)."""
    counted(ROOT / "results", "tiny", "tiny-math", 1.0, "tuned", may_run=True)


def made_from(model: str, task: str, warmup: str) -> dict:
    """What decides counts: the model, the data, and where LoRA is trained before or meanwhile its settings."""
    content = model_content(model) | {"data": data.digest(data.load_examples(task, "train"))}
    return content if warmup == "none" else content | decisive_settings(Run(task, "lora", model=model))


def call(script: str, *arguments: str) -> None:
    """Run a script of ours. Raises RunError if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RunError(f"{script} ended with status {done.returncode}: {done.stderr.strip()}")


# ------------------------------------------------------------------------------------------------------- Figure 1


def skew(name: str, profile: RoutingProfile) -> dict:
    """How uneven the use of experts is, in numbers of the paper and of MoE-Sieve."""
    counts, K, E = profile.counts, profile.num_experts_per_tok, profile.counts.shape[1]
    top, quarter, share = 100 * top_share(counts, K), 100 * top_share(counts, E // 4), shares(counts)
    by_layer = float((share.std(-1, correction=0) / share.mean(-1)).mean())
    summed = share.sum(0)
    preset = PRESETS.get(HUB_IDS.get(profile.model))
    config = preset and MoEConfig.from_dict(preset)
    shared = config.shared_intermediate_size / config.intermediate_size if config else 0  # as so many routed experts
    return {
        "name": name,
        "of": f"{K} of {E}",
        "even": 100 * K / E,
        "top": float(top.mean()),
        "range": f"{top.min():.1f}..{top.max():.1f} %",
        "layer 7": float(top[PAPER_LAYER]) if len(top) > PAPER_LAYER else None,
        "quarter": float(quarter.mean()),
        "quarter range": f"{quarter.min():.1f}..{quarter.max():.1f} %",
        "with shared": (100 * shared + K * float(quarter.mean())) / (shared + K),
        "cold": 100 * float((share < COLD / E).double().mean()),
        "cv": by_layer,
        "cv over global": by_layer / float(summed.std(correction=0) / summed.mean()),
        "flops saved": saved(config, profile) if config else None,
    }


def saved(config: MoEConfig, profile: RoutingProfile) -> float:
    """% of LoRA's adapter FLOPs that HELLoRA with k = K saves, on these counts."""
    rows = advice.choices(profile.counts, profile.num_experts_per_tok, advice.adapter_sizes(config, Recipe.r))
    return 100 * (1 - rows[profile.num_experts_per_tok - 1].flops / rows[-1].flops)


def figure1(out: Path, *, may_run: bool) -> Section:
    """The use of experts on GSM8K as a heat map, and how uneven it is on every data set."""
    profiles, gsm8k = every_real(), real(OLMOE["GSM8K"])
    for task in TASKS:
        if profile := counted(out, "tiny", task, 0.1, "none", may_run=may_run):
            profiles[f"embedded, {task}"] = profile
    title = f"Routing of OLMoE-1B-7B on GSM8K: {gsm8k.num_tokens:,} tokens, 8 of 64 experts per token"
    pictures.draw_profile(gsm8k.counts, 8, title, out / "fig1.png")
    rows = [skew(name, profile) for name, profile in profiles.items()]
    on_gsm8k = skew("OLMoE, GSM8K", gsm8k)
    holds = "confirm" if on_gsm8k["layer 7"] > PAPER_SHARE else "do not confirm"
    lines = [
        "![Routing of OLMoE-1B-7B on GSM8K](fig1.png)", "",
        f"The paper says that the 8 hottest experts of layer {PAPER_LAYER} receive more than {PAPER_SHARE:.0f} % of "
        f"GSM8K's routed tokens. These counts, of the base model under another prompt, {holds} it: there they receive "
        f"{on_gsm8k['layer 7']:.1f} %. HELLoRA saves {on_gsm8k['flops saved']:.1f} % of LoRA's adapter FLOPs on these "
        f"counts. The abstract says {PAPER_SAVED} %.", "",
        "CV is the standard deviation divided by the mean of the counts of a layer's experts, averaged over the "
        "layers. The global CV is that of the counts summed over the layers (MoE-Sieve, Table 2). Little used: "
        "the share of a layer's experts that receive less than half of an even share.", "",
        *grid(
            ["", "K of E", "top K, mean", "least..most", "layer 7", "top quarter", "little used", "CV", "/ global CV",
             "FLOPs saved"],
            [
                [
                    row["name"], row["of"], f"{row['top']:.1f} %", row["range"], percent_text(row["layer 7"]),
                    row["quarter range"], f"{row['cold']:.0f} %", f"{row['cv']:.2f}", f"{row['cv over global']:.1f}",
                    percent_text(row["flops saved"]),
                ]
                for row in rows
            ],
        ),
    ]  # fmt: skip
    return Section("Figure 1: which experts a task uses", lines, rows)


# ------------------------------------------------------------------------------------------------------- Figure 3


def figure3(out: Path, *, may_run: bool) -> Section:
    """How far hot sets agree: with those after fine-tuning, of counts and of gate mass, of two tasks."""
    gsm8k = real(OLMOE["GSM8K"])
    pairs = {f"OLMoE, GSM8K and {name}": (gsm8k, real(file)) for name, file in OLMOE.items() if name != "GSM8K"}
    for task in TASKS:
        tuned = counted(out, "tiny", task, 1.0, "tuned", may_run=may_run)
        ways = {way: counted(out, "tiny", task, *how, may_run=may_run) for way, how in WAYS.items()}
        pairs |= {f"embedded, {task}: {way}": (tuned, each) for way, each in ways.items()}
        pairs[f"embedded, {task}: a tenth and all, base model"] = (ways[ALL_DATA], ways[A_TENTH])
    rows, shown = [], []
    for name, (a, b) in pairs.items():
        if a is None or b is None:
            shown.append([name, "not run", "", ""])
            continue
        K, E = a.num_experts_per_tok, a.counts.shape[1]
        overlap = jaccard(hottest(a.counts, K), hottest(b.counts, K))
        mean, chance, same = float(overlap.mean()), chance_overlap(K, E), int((overlap == 1).sum())
        rows.append({"name": name, "mean": mean, "same": same, "chance": chance})
        shown.append([name, f"{mean:.2f}", f"{same} of {len(overlap)}", f"{chance:.2f}"])
    draw_overlaps(rows, "Do two counts name the same hot experts?", out / "fig3.png")
    masses = []
    for name, profile in every_real().items():
        quarter = profile.counts.shape[1] // 4
        overlap = jaccard(hottest(profile.counts, quarter), hottest(profile.gate_mass, quarter))
        masses.append({"name": name, "quarter": quarter, "mean": float(overlap.mean())})
    same, layers = PAPER_SAME
    mean = (same + (layers - same) * 7 / 9) / layers  # in each other layer one of the 8 experts differs
    printed = [
        ["paper: LoRA warm-up on a tenth of GSM8K and all of it", f"{mean:.2f}", f"{same} of {layers}", "-"],
        ["MoE-Sieve: a tenth of the data and all of it, by bootstrap", f"{SIEVE_TENTH:.2f}", "-", "-"],
    ]
    lines = [
        "![Overlap of hot sets](fig3.png)", "",
        "The published counts of OLMoE are of whole training sets. The hot sets of the embedded model are compared "
        "with those after LoRA fine-tuning, counted on all training data. The last row of each "
        "task compares the base model's hot sets on a tenth and on all data. We computed the paper's mean from its "
        f"text: the same set in {same} of {layers} layers, and sets that differ by one expert in the others.", "",
        *grid(["the K hottest experts", "Jaccard", "same set in layers", "by chance"], [*printed, *shown]), "",
        "Counts against sums of routing weights, for the hottest quarter (MoE-Sieve, sections 3.3 and 6.3):", "",
        *grid(["", "Jaccard, mean of the layers"], [[row["name"], f"{row['mean']:.2f}"] for row in masses]),
    ]  # fmt: skip
    return Section("Figure 3: do two samples have the same hot experts?", lines, rows + masses)


# ------------------------------------------------------------------------------------------------- Figures 4 and 6


def figure4(out: Path) -> Section:
    """The share of the tokens that the hottest experts of a layer receive, for OLMoE and four data sets."""
    counts = {name: real(file).counts for name, file in OLMOE.items()}
    draw_coverage(counts, "Share of the tokens that the hottest experts of OLMoE-1B-7B receive", out / "fig4.png")
    covered = {name: 100 * top_share(each, 8) for name, each in counts.items()}
    rows = [{"layer": layer, **{name: float(share[layer]) for name, share in covered.items()}} for layer in LAYERS]
    shown = [[str(row["layer"]), *(f"{row[name]:.1f} %" for name in OLMOE)] for row in rows]
    lines = ["![Share of the hottest experts](fig4.png)", "", "Share of the 8 hottest of 64 experts:", ""]
    title = "Figure 4: how many tokens the hottest experts receive, OLMoE-1B-7B"
    return Section(title, [*lines, *grid(["layer", *OLMOE], shown)], rows)


def figure6(out: Path, *, may_run: bool) -> Section:
    """The same for two real models, and for the embedded model with Mixtral's architecture."""
    mixtral = counted(out, "tiny-mixtral", "tiny-math", 0.1, "none", may_run=may_run)
    profiles = {f"{name}, GSM8K": real(file) for name, file in OTHERS.items()}
    profiles |= {EMBEDDED_MIXTRAL: mixtral} if mixtral else {}
    title = "Use of the experts in other models"
    draw_coverage({name: profile.counts for name, profile in profiles.items()}, title, out / "fig6.png")
    rows = [skew(name, profile) for name, profile in profiles.items()]
    columns = ("top", "even", "quarter", "with shared")
    shown = [[row["name"], row["of"], *(percent_text(row[column]) for column in columns)] for row in rows]
    shown += [] if mixtral else [[EMBEDDED_MIXTRAL, "2 of 8", "not run", "", "", ""]]
    shown.append(["Mixtral-8x7B, GSM8K", "2 of 8", "not run", "25.0 %", "not run", "not run"])
    heads = ["", "K of E", "top K, mean of the layers", "if use were even", "hottest quarter", "with the shared expert"]
    lines = [
        f"![{title}](fig6.png)", "",
        "The shared experts of Qwen1.5-MoE and DeepSeekMoE receive every token. The shares are of the routed tokens. "
        "The last column is MoE-Sieve's coverage (Table 2 there): (s + K c) / (s + K), with c the share of the hottest "
        "quarter, and s the shared expert's size in routed experts.", "",
        *grid(heads, shown),
    ]  # fmt: skip
    return Section("Figure 6: use of the experts in other models", lines, rows)
