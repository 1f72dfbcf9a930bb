"""Accuracy against the number of trained parameters: the rows of Tables 2 and 9 with hot experts or all."""

from pathlib import Path

from lab.markdown import grid
from lab.paper.page import Section, mean_text
from lab.paper.pictures import draw_budgets
from lab.paper.runs import Records
from lab.paper.table import Scale, Table, Tune
from lab.paper.verdicts import estimate
from recipes.methods import METHODS

TITLE = "Accuracy against trained parameters, each method at its best rate"


def points(tables: list[tuple[Table, int]], scale: Scale, records: Records, tune: Tune, **changes) -> list[dict]:
    """name, hot, trainable and accuracy (mean with interval, in %) of the rows with finished runs, each run once."""
    by_run: dict = {}
    for table, seeds in tables:
        column = table.columns[0]
        for row in (row for row in table.rows if "experts" not in row.change):
            rate, first = next(iter(table.runs(row, column, scale, 0, tune, **changes).items()))
            _, record = (first and records.find(first)) or (None, {})
            values = table.values(row, column, scale, seeds, records.scores, tune, **changes)[rate]
            if record.get("trainable") and values:
                family = "HELLoRA" if row.method == "hellora" else "LoRA"
                name = row.name if row.name[0].isupper() else f"{family}, {row.name}"
                by_run.setdefault(
                    first,
                    {
                        "name": name,
                        "hot": METHODS[row.method].experts == "hot",
                        "trainable": record["trainable"],
                        "accuracy": estimate(list(values.values())),
                    },
                )
    return sorted(by_run.values(), key=lambda point: point["trainable"])


def section(
    tables: list[tuple[Table, int]], scale: Scale, records: Records, tune: Tune, out: Path, **changes
) -> Section:
    """The points as a picture and as a table.  tables: each with its number of seeds"""
    rows = points(tables, scale, records, tune, **changes)
    if not rows:
        return Section(TITLE, ["No run is finished yet."], [])
    draw_budgets(rows, f"{TITLE}, {scale.math}, 95 % intervals", out / "budgets.png")
    texts = [[row["name"], f"{row['trainable']:,}", mean_text(row["accuracy"])] for row in rows]
    lines = [f"![{TITLE}](budgets.png)", "", *grid(["method", "trained parameters", "accuracy in %"], texts)]
    return Section(TITLE, lines, [row | {"accuracy": row["accuracy"]._asdict()} for row in rows])
