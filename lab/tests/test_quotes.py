"""Numbers of the papers that the pages quote are those of the tables that hold them."""

import itertools
import re

import pytest

from lab import ROOT
from lab.paper import params, speed
from lab.paper.published import TEXT, sieve_accuracies
from lab.paper.tables import MATH, TABLES
from lab.paper.verdicts import estimate, paired

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *ROOT.glob("results/published/*.md")]
OF_A_PAPER = re.compile(r"\bpaper(?!s)|\bTables? [1-9]|\babstract|§")
NUMBER = re.compile(r"(?<![\w.,§/-])[+-]?\d{1,3}\.\d+(?!\.?\d|\w| ±)")
MEASURED = re.compile(r"[+-]?[\d.]+ ± [\d.]+")


def on_math() -> set[float]:
    """The differences that the paper's tables have on math, from the row that each is compared with."""
    differences = set()
    for table in TABLES.values():
        titles = [column.title for column in table.columns]
        if MATH.title in titles:
            place = titles.index(MATH.title)
            printed = {row.name: row.paper[place] for row in table.rows if len(row.paper) > place}
            for row in table.rows:
                pair = printed.get(row.name), printed.get(row.against)
                differences |= {pair[0] - pair[1], pair[1] - pair[0]} if None not in pair else set()
    return differences


def in_the_paper() -> set[str]:
    """Every number with decimals that HELLoRA prints, the differences of its tables, and what follows from two."""
    rows = [row for table in TABLES.values() for row in table.rows]
    values = [value for row in rows for value in row.paper if value is not None]
    values += [*speed.PAPER.values(), *speed.PAPER_BY_NUMBER.values()]
    values += [value for value in on_math() if value > 0]
    lora = {row.name: row.paper for row in TABLES["table2"].rows if row.paper}
    losses = [abs(b - a) for paper in lora.values() for a, b in zip(paper, lora["LoRA"], strict=True)]
    relative = 100 * (lora["HELLoRA"][0] / lora["LoRA"][0] - 1)
    shares = [100 * params.size(params.MoEConfig.from_dict(params.PRESETS[model]), "hellora", k, "all").trainable
              / params.size(params.MoEConfig.from_dict(params.PRESETS[model]), "lora", None, "all").trainable
              for model, k in ((params.OLMOE, 8), (params.DEEPSEEK, 6))]  # fmt: skip
    texts = {f"{value:.2f}" for value in values} | {f"{value:.1f}" for value in (*losses, relative, *shares)}
    texts |= {f"{row.paper:g}" for row in params.ROWS if row.paper}
    return texts | {number for numbers in TEXT.values() for number in numbers}


def sentences(page: str) -> list[str]:
    """Sentences and cells of tables, without code."""
    text = re.sub(r"```.*?```", "", page, flags=re.S)
    parts = re.split(r"(?<=[.!?])\s+(?=[A-Z\d(\[*-])|\n\n|\n- |\|", text)
    return [" ".join(part.split()) for part in parts]


def quoted(page: str) -> list[tuple[str, str]]:
    """(number, sentence) of the numbers with decimals in sentences on the paper, without what was measured."""
    said = [MEASURED.sub("", sentence) for sentence in sentences(page) if OF_A_PAPER.search(sentence)]
    return [(number.lstrip("+-"), sentence) for sentence in said for number in NUMBER.findall(sentence)]


def columns(page: str, name: str) -> list[str]:
    """The cells of the columns of this name in a page's tables."""
    cells, place = [], None
    for line in page.splitlines():
        row = [cell.strip() for cell in line.strip("| ").split(" | ")] if line.startswith("|") else []
        if not row:
            place = None
        elif place is None:
            place = row.index(name) if name in row else -1
        elif place >= 0 and len(row) > place:
            cells.append(row[place])
    return cells


def test_a_number_that_a_sentence_ascribes_to_the_paper_is_one_of_the_papers():
    known, found = in_the_paper(), 0
    for page in PAGES:
        for number, sentence in quoted(page.read_text(encoding="utf-8")):
            assert number in known, f"{page.name}: {number} in {sentence!r} is in no table of lab/paper"
            found += 1
    assert found > 15


def test_the_findings_have_the_differences_of_the_paper_and_those_of_moe_sieves_scores():
    page = (ROOT / "docs/findings.md").read_text(encoding="utf-8")
    paper = [cell for cell in columns(page, "paper") if re.match(r"[+-]\d", cell)]
    assert len(paper) >= 3 and not set(paper) - {f"{difference:+.2f}" for difference in on_math()}
    scores = sieve_accuracies()
    pairs = [estimate(paired(scores[a], scores[b])) for a, b in itertools.permutations(scores, 2)]
    sieve = [cell for cell in columns(page, "MoE-Sieve") if re.match(r"[+-]\d", cell)]
    assert len(sieve) >= 3 and not set(sieve) - {f"{pair.mean:+.1f} ± {pair.half:.1f}" for pair in pairs}


@pytest.mark.parametrize("right, wrong", [("29.49", "29.48"), ("20.08", "20.09"), ("1.62", "1.63")])
def test_a_wrong_quote_is_seen(right, wrong):
    known = in_the_paper()
    for number in (right, wrong):
        [(seen, _)] = quoted(f"Ours is 12.34. In the paper it is {number} % here, or 1.2 ± 0.3 in §4.4.\n\nAnd 5.67.")
        assert (seen == number) and (seen in known) == (number == right)
