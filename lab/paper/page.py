"""A section of the results (a title, lines of Markdown, the same numbers as rows for JSON), and the page of all."""

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch

from command.files import write_text
from lab.markdown import grid
from lab.paper.pictures import draw_differences
from lab.paper.verdicts import LEAST_SEEDS, MARGIN, RULE, Estimate, spread_ratio


class Section(NamedTuple):
    """A table or a figure of the paper, as printed and as kept."""

    title: str
    lines: list[str]  # Markdown
    rows: list[dict]  # the numbers

    def text(self) -> list[str]:
        """The section as Markdown."""
        return [f"## {self.title}", "", *self.lines, ""]


def mean_text(interval: Estimate, form: str = ".1f", missing: str = "not run", half_form: str = ".1f") -> str:
    """47.6 ± 1.2 (5): mean, half width of the 95 % interval, number of values."""
    if not interval.n:
        return missing
    half = "" if interval.half is None else f" ± {interval.half:{half_form}}"
    return f"{interval.mean:{form}}{half} ({interval.n})"


def number_text(value: float | None, form: str = ".2f", missing: str = "-") -> str:
    """A number, if there is one."""
    return missing if value is None else f"{value:{form}}"


# ---------------------------------------------------------------------------------------------------- the whole page


def write_page(out: Path, sections: list[Section], made: str) -> None:
    """OUT/README.md: all tables and figures, the rule of the verdicts, and how they were made.

    made: how many runs there are, and the time they took.
    """
    cores, torch_ = os.cpu_count(), torch.__version__
    lines = [
        "# The paper's tables and figures, beside ours", "",
        "Written by `python reproduce.py all`. Our values come from the embedded models and tasks, which replace the "
        "paper's. They show whether a difference has the same sign, not how large it is. Each run is a file in "
        "`runs/`. "
        f"{made}. Written with torch {torch_} on {cores} CPU cores.", "",
        f"47.6 ± 1.2 (5) is a mean, its 95 % t-interval, and the number of seeds. {RULE}", "",
        "MoE-Sieve is an independent study at full size ([published](published/README.md)).", "",
        *summary(sections, out),
        *(f"- [{each.title}](#{anchor(each.title)})" for each in sections), "",
    ]  # fmt: skip
    for each in sections:
        lines += each.text()
    write_text(out / "README.md", "\n".join(lines).rstrip() + "\n")


CLAIMS = (  # what is claimed of a row's difference, its table, the row
    ("HELLoRA beats LoRA on all experts", "Table 2", "HELLoRA"),
    ("a quarter of the experts equals LoRA on all (MoE-Sieve)", "Table 2", "MoE-Sieve"),
    ("LoRI-D beats LoRA", "Table 2", "LoRI-D"),
    ("HELLoRI-D beats LoRA", "Table 2", "HELLoRI-D"),
    ("ranks that grow beat LoRA (DR-LoRA, against its strongest baseline, six tasks)", "Table 2", "DR-LoRA"),
    ("one set of hot experts for all layers is worse than one for each", "Table 4", "HELLoRA_M"),
    ("the coldest are worse than the hottest", "Table 4", "HELLoRA_C"),
    ("without attention and router it is worse", "Table 5", "HELLoRA_pure"),
    ("2 hot experts are worse than 8", "Table 7", "k = 2"),
    (
        "the same budget on all experts, against the 8 hottest (no paper claims this)",
        "Table 9 (ours)",
        "all 64, rank 1",
    ),
)


def summary(sections: list[Section], out: Path) -> list[str]:
    """A line for each claim on GSM8K, and a picture of all differences of Tables 2 to 7."""
    cells = {
        (row["table"].partition(":")[0], row["row"]): row
        for each in sections
        for row in each.rows
        if row.get("column") == "GSM8K"
    }
    lines = []
    for claim, table, name in CLAIMS:
        if row := cells.get((table, name)):
            sieve, ours = (mean_text(Estimate(**row[side]["difference"]), "+.1f", "-") for side in ("sieve", "ours"))
            lines.append([claim, claim_text(row["paper_difference"]), sieve, ours, row["ours"]["verdict"]])
    shown = []
    for (table, name), row in cells.items():
        difference = row["ours"]["difference"]
        if re.match("Table [2-7]", table) and row["compared_with"] and difference["half"] is not None:
            label = f"{table}: {name} - {row['compared_with']}"
            shown.append({"name": label, "claimed": row["paper_difference"], **difference})
    draw_differences(shown, MARGIN, "Differences on tiny-math, and on GSM8K in the paper", out / "differences.png")
    note = (
        "The claims on math, in points, each method at its best learning rate. Other choices of experts and modules "
        "share the rate of their method."
    )
    heads = ["claim", "paper", "full size (MoE-Sieve)", "ours", "verdict"]
    return [note, "", *grid(heads, lines), "", "![Differences with intervals](differences.png)", "", *spread(cells)]


def claim_text(difference: float | None) -> str:
    """+3.12, equal for a claim of no difference, or - for none."""
    return "equal" if difference == 0 else number_text(difference, "+.2f")


def spread(cells: dict[tuple[str, str], dict]) -> list[str]:
    """Whether the seeds of hot experts alone lie closer together than those of all experts, as MoE-Sieve asks."""
    lines = []
    for name, experts in (("HELLoRA", "the 8 hottest"), ("MoE-Sieve", "the hottest quarter")):
        for side, where in (("sieve", "MoE-Sieve's study at full size"), ("ours", "our runs")):
            found = (cells.get(("Table 2", each)) for each in (name, "LoRA"))
            values, others = (row[side]["by_seed"] if row else {} for row in found)
            if len(values.keys() & others.keys()) >= LEAST_SEEDS:
                ratio, least, most = spread_ratio(values, others)
                lines.append(f"{experts} {ratio:.2f} ({least:.2f} to {most:.2f}) in {where}")
    intro = "Standard deviation over seeds on math, relative to LoRA on all experts, with its 95 % interval: "
    return [f"{intro}{'; '.join(lines)}.", ""] if lines else []


def anchor(title: str) -> str:
    """A heading's name in a link."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
