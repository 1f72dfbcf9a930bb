"""Accuracy against the number of trained parameters: the rows of Tables 2 and 9 with hot experts or all."""

from pathlib import Path

from lab.markdown import grid
from lab.paper.page import Section, mean_text
from lab.paper.pictures import draw_budgets
from lab.paper.runs import Records
from lab.paper.table import Table, Tune
from lab.paper.verdicts import estimate
from recipes.methods import METHODS

TITLE = "Accuracy against trained parameters, each method at its best rate"


def points(tables: list[Table], records: Records, tune: Tune) -> list[dict]:
    """name, hot, trainable and accuracy (mean with interval, in %) of the rows with finished runs, each run once."""
    by_run: dict = {}
    for table in tables:
        column = table.columns[0]
        for row in (row for row in table.rows if "experts" not in row.change):
            first = table.runs(row, column, tune)[0]
            trainable = records.record(first).get("trainable")
            values = table.values(row, column, records.scores, tune)
            if trainable and values:
                family = "HELLoRA" if row.method == "hellora" else "LoRA"
                point = {
                    "name": row.name if row.name[0].isupper() else f"{family}, {row.name}",
                    "hot": METHODS[row.method].experts == "hot",
                    "trainable": trainable,
                    "accuracy": estimate(values.values()),
                }
                known = by_run.setdefault(first, point)  # by the name in the first table, with the most seeds
                known["accuracy"] = max(known["accuracy"], point["accuracy"], key=lambda estimate: estimate.n)
    return sorted(by_run.values(), key=lambda point: point["trainable"])


def section(tables: list[Table], records: Records, tune: Tune, out: Path) -> Section:
    """The points as a picture and as a table."""
    rows = points(tables, records, tune)
    if not rows:
        return Section(TITLE, ["No run is finished yet."], [])
    draw_budgets(rows, f"{TITLE}, {tables[0].scale.math}, 95 % intervals", out / "budgets.png")
    texts = [[row["name"], f"{row['trainable']:,}", mean_text(row["accuracy"])] for row in rows]
    lines = [f"![{TITLE}](budgets.png)", "", *grid(["method", "trained parameters", "accuracy in %"], texts)]
    return Section(TITLE, lines, [row | {"accuracy": row["accuracy"]._asdict()} for row in rows])
