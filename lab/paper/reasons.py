"""Why it should work: what the paper's reasons say, measured on runs (effects.py), and what is saved."""

from collections.abc import Callable
from statistics import mean

from hub.config import PRESETS
from lab.markdown import grid
from lab.paper.page import Section, mean_text
from lab.paper.params import OLMOE, size
from lab.paper.routing import real
from lab.paper.runs import Records
from lab.paper.table import Scale, Table, Tune
from lab.paper.verdicts import estimate, paired, verdict
from model import MoEConfig
from recipes.methods import METHODS, Recipe
from routing.advice import adapter_sizes, choices

TITLE = "Why it should work: overfitting, forgetting, routing, sparsity"
MEASURES: dict[str, Callable[[dict], float]] = {  # of a record's effects
    "loss, seen rows": lambda done: done["seen_loss"],
    "unseen - seen": lambda done: done["unseen_loss"] - done["seen_loss"],
    "text, after - before": lambda done: forgotten(done["text_loss"]),
    "hot sets kept": lambda done: done["routing"]["task"]["hot_overlap"],
    "choices moved, task": lambda done: 100 * done["routing"]["task"]["choices"],
    "choices moved, text": lambda done: 100 * done["routing"]["text"]["choices"],
}
CLAIMED = ("unseen - seen", "text, after - before", "choices moved, task", "choices moved, text")  # less than LoRA's
FORMS = {name: ".1f" if "choices" in name else ".3f" for name in MEASURES}
NOTE = (
    "The paper's reasons are that fewer parameters regularise and that specialised experts are left alone (abstract, "
    "§4.3). Losses are in nats per token. *unseen - seen*: the loss on rows of the task that no run trains on, minus "
    "that on rows that this run has trained on. *text*: held-out pre-training text of all three kinds, after "
    "fine-tuning minus before. *hot sets kept*: Jaccard overlap of the K hottest experts before and after, on the "
    "task. *choices moved*: share of the K choices of a token and layer that go to another expert than before, in %, "
    "on rows of the task and on the text. Differences from LoRA are paired by seed. The reasons predict negative "
    "differences."
)
SPARSITY = (
    "Double sparsity (§2.2), OLMoE-1B-7B at rank 32: few experts, and few entries of B. The FLOPs are those of the "
    "adapters in a forward pass, per token, on MoE-Sieve's counts of GSM8K. A sparse B saves none: it is multiplied "
    "as a dense one."
)


def forgotten(text_loss: dict[str, dict[str, float]]) -> float:
    """How much larger the loss on pre-training text has become, mean of its kinds."""
    return mean(text_loss["after"][kind] - before for kind, before in text_loss["before"].items())


def section(table: Table, seeds: int, scale: Scale, records: Records, tune: Tune, **changes) -> Section:
    """The measures of a table's methods, task by task, and what double sparsity saves."""
    lines, rows = measured(table, seeds, scale, records, tune, **changes)
    lines = lines or ["", "not run"]
    saved = sparsity()
    heads = ["method", "trained", "file, MB", "AdamW, MB", "adapter MFLOPs"]
    cells = [
        [row["row"], f"{row['trainable']:,}", f"{row['adapter_bytes'] / 1e6:.1f}",
         f"{row['optimizer_bytes'] / 1e6:.1f}", f"{row['flops'] / 1e6:.1f}"]
        for row in saved
    ]  # fmt: skip
    return Section(TITLE, [NOTE, *lines, "", SPARSITY, "", *grid(heads, cells)], [*rows, *saved])


def measured(
    table: Table, seeds: int, scale: Scale, records: Records, tune: Tune, **changes
) -> tuple[list[str], list[dict]]:
    """The measures of every method of a table, task by task.  -> lines, rows"""
    lines, rows = [], []
    for column in {column.task: column for column in reversed(table.columns)}.values():  # the first of each task
        values = {}
        for row in (row for row in table.rows if row.method != "base"):
            done: dict[int, dict] = {}
            for seed in range(seeds):
                run = next(iter(table.runs(row, column, scale, seed, tune, **changes).values()))
                _, record = (run and records.find(run)) or (None, {})
                if "effects" in record:
                    done[seed] = record["effects"]
            values[row.name] = {name: {seed: of(each) for seed, each in done.items()} for name, of in MEASURES.items()}
        values = {name: by_measure for name, by_measure in values.items() if by_measure[CLAIMED[0]]}
        rate = "each row at its best learning rate" if column.tuned else column.note
        title = f"{getattr(scale, column.task)}{rate and f', {rate}'}"
        if not values:  # older runs have not been measured
            continue
        lines += ["", title, "", *grid(["method", *MEASURES], shown(values))]
        if "LoRA" in values and len(values) > 1:
            lines += ["", f"{title}: difference from LoRA", "", *grid(["method", *heads()], compared(values))]
        rows += [
            {"task": getattr(scale, column.task), "row": name, "by_seed": by_measure}
            for name, by_measure in values.items()
        ]
    return lines, rows


def shown(values: dict[str, dict[str, dict[int, float]]]) -> list[list[str]]:
    """A row of means for each method."""
    return [
        [name, *(text(list(by_measure[measure].values()), FORMS[measure]) for measure in MEASURES)]
        for name, by_measure in values.items()
    ]


def text(values: list[float], form: str) -> str:
    """0.071 ± 0.004 (5), with as many decimals of the interval as of the mean."""
    interval = estimate(values)
    if interval is None or interval.half is None:
        return mean_text(interval, form)
    return f"{interval.mean:{form}} ± {interval.half:{form.lstrip('+')}} ({interval.n})"


def heads() -> list[str]:
    return [head for name in CLAIMED for head in (name, "verdict")]


def compared(values: dict[str, dict[str, dict[int, float]]]) -> list[list[str]]:
    """Differences from LoRA, paired by seed, and whether they are negative."""
    lines = []
    for name, by_measure in values.items():
        if name != "LoRA":
            differences = [paired(by_measure[measure], values["LoRA"][measure]) for measure in CLAIMED]
            texts = [
                part
                for measure, each in zip(CLAIMED, differences, strict=True)
                for part in (text(each, f"+{FORMS[measure]}"), verdict(each, -1.0, margin=None))
            ]
            lines.append([name, *texts])
    return lines


def sparsity() -> list[dict]:
    """Parameters, bytes and FLOPs of the methods with few experts, few entries, or both."""
    counted, config = real("olmoe-gsm8k"), MoEConfig.from_dict(PRESETS[OLMOE])
    by_k = choices(counted.counts, counted.num_experts_per_tok, adapter_sizes(config, Recipe.r))
    rows = []
    for method in ("lora", "lori-d", "lori-s", "hellora", "hellori-d", "hellori-s"):
        k = 8 if METHODS[method].experts == "hot" else None
        counts = size(config, method, k, "all")
        flops = by_k[(k or config.num_experts) - 1].flops
        rows.append({"row": method, "trainable": counts.trainable, "adapter_bytes": counts.adapter_bytes})
        rows[-1] |= {"optimizer_bytes": counts.optimizer_bytes, "flops": flops}
    return rows


# ----------------------------------------------------------------------------------------------- the price of counting


PAPER_COST, PAPER_NET = 16, 1.62  # % of a run that the warm-up adds; times LoRA's throughput after it (§4.4)


def cost(table: Table, scale: Scale, seeds: int, records: Records, **changes) -> tuple[list[str], list[dict]]:
    """What each way of counting adds to the training, in % of it.  -> lines, rows"""
    column, shown, rows = table.columns[0], [], []
    for row in table.rows:
        added = []
        for seed in range(seeds):
            run = table.run(row, column, scale, seed, **changes)
            _, record = records.find(run) or (None, {})
            if "seconds_profile" in record and "profile" not in row.change:
                counting = record["seconds_profile"]
                added.append(100 * counting / (record["seconds"]["train"] - counting))
        missing = "a whole LoRA run, and a count on all data" if "profile" in row.change else "not timed"
        shown.append([row.name, mean_text(estimate(added), missing=missing)])
        rows.append({"way": row.name, "cost": added})
    note = (
        f"What counting adds to the training, in % of its time. The paper says about {PAPER_COST} %, after which "
        f"{PAPER_NET} times LoRA's throughput are left (§4.4)."
    )
    return ["", note, "", *grid(["counted on", "added, %"], shown)], rows
