"""Why it should work: what the paper's reasons say, measured on runs (effects.py), and what is saved."""

from collections.abc import Callable, Collection
from statistics import mean

from hub.config import PRESETS
from lab.markdown import grid
from lab.paper.page import Section, mean_text
from lab.paper.params import OLMOE, size
from lab.paper.routing import real
from lab.paper.runs import Records
from lab.paper.table import Column, Table, Tune
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


Values = dict[str, dict[str, dict[int, float]]]  # of each method, by measure and by seed


def section(table: Table, records: Records, tune: Tune) -> Section:
    """The measures of a table's methods, task by task, and what double sparsity saves."""
    lines, rows = [], []
    for column in {column.task: column for column in reversed(table.columns)}.values():  # the first of each task
        values = measured(table, column, records, tune)
        if not values:  # older runs have not been measured
            continue
        rate = "each row at its best learning rate" if column.tuned else column.note
        title = f"{table.task(column)}{rate and f', {rate}'}"
        lines += ["", title, "", *grid(["method", *MEASURES], means(values))]
        if "LoRA" in values and len(values) > 1:
            heads = [head for name in CLAIMED for head in (name, "verdict")]
            lines += ["", f"{title}: difference from LoRA", "", *grid(["method", *heads], differences(values))]
        rows += [{"task": table.task(column), "row": name, "by_seed": each} for name, each in values.items()]
    saved = sparsity()
    heads = ["method", "trained", "file, MB", "AdamW, MB", "adapter MFLOPs"]
    cells = [
        [row["row"], f"{row['trainable']:,}", f"{row['adapter_bytes'] / 1e6:.1f}",
         f"{row['optimizer_bytes'] / 1e6:.1f}", f"{row['flops'] / 1e6:.1f}"]
        for row in saved
    ]  # fmt: skip
    lines = lines or ["", "not run"]
    return Section(TITLE, [NOTE, *lines, "", SPARSITY, "", *grid(heads, cells)], [*rows, *saved])


def measured(table: Table, column: Column, records: Records, tune: Tune) -> Values:
    """The measures of every method of a table on the task of a column, without methods that have none."""
    values = {}
    for row in (row for row in table.rows if row.method != "base"):
        found = map(records.record, table.runs(row, column, tune))
        done = {seed: record["effects"] for seed, record in enumerate(found) if "effects" in record}
        if done:
            values[row.name] = {name: {seed: of(each) for seed, each in done.items()} for name, of in MEASURES.items()}
    return values


def text(values: Collection[float], form: str) -> str:
    """0.071 ± 0.004 (5), with as many decimals of the interval as of the mean."""
    return mean_text(estimate(values), form, half_form=form.lstrip("+"))


def means(values: Values) -> list[list[str]]:
    """A row for each method."""
    return [
        [name, *(text(by_measure[measure].values(), form) for measure, form in FORMS.items())]
        for name, by_measure in values.items()
    ]


def differences(values: Values) -> list[list[str]]:
    """A row for each method but LoRA: the differences from it, paired by seed, and whether they are negative."""
    lines = []
    for name in (name for name in values if name != "LoRA"):
        line = [name]
        for measure in CLAIMED:
            found = paired(values[name][measure], values["LoRA"][measure])
            line += [text(found, f"+{FORMS[measure]}"), verdict(found, -1.0, margin=None)]
        lines.append(line)
    return lines


def sparsity() -> list[dict]:
    """Parameters, bytes and FLOPs of the methods with few experts, few entries, or both."""
    counted, config = real("olmoe-gsm8k"), MoEConfig.from_dict(PRESETS[OLMOE])
    by_k = choices(counted.counts, counted.num_experts_per_tok, adapter_sizes(config, Recipe.r))
    rows = []
    for method in ("lora", "lori-d", "lori-s", "hellora", "hellori-d", "hellori-s"):
        k = 8 if METHODS[method].experts == "hot" else None
        counts = size(config, method, k, "all")._asdict()
        rows.append({"row": method, **counts, "flops": by_k[(k or config.num_experts) - 1].flops})
    return rows


# ----------------------------------------------------------------------------------------------- the price of counting


PAPER_COST, PAPER_NET = 16, 1.62  # % of a run that the warm-up adds; times LoRA's throughput after it (§4.4)


def cost(table: Table, records: Records) -> tuple[list[str], list[dict]]:
    """What each way of counting adds to the training, in % of it.  -> lines, rows"""
    shown, rows = [], []
    for row in table.rows:
        is_given = "profile" in row.change
        added = []
        for seed in range(table.seeds):
            record = records.record(table.run(row, table.columns[0], seed))
            if "seconds_profile" in record and not is_given:
                counting = record["seconds_profile"]
                added.append(100 * counting / (record["seconds"]["train"] - counting))
        missing = "a whole LoRA run, and a count on all data" if is_given else "not timed"
        shown.append([row.name, mean_text(estimate(added), missing=missing)])
        rows.append({"way": row.name, "cost": added})
    note = (
        f"What counting adds to the training, in % of its time. The paper says about {PAPER_COST} %, which "
        f"leaves {PAPER_NET} times LoRA's throughput (§4.4)."
    )
    return ["", note, "", *grid(["counted on", "added, %"], shown)], rows
