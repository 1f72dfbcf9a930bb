"""The verdict of tables.py, its intervals, and the tables that they stand in, on made-up numbers."""

import math
import statistics

import numpy as np
import pytest

from lab.paper import published, tables
from lab.paper.published import sieve_accuracies
from lab.paper.runs import Run
from lab.paper.table import OURS, Column, Row, Table
from lab.paper.verdicts import estimate, is_equivalent, spread_ratio, t_quantile, verdict

T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 7: 2.365, 10: 2.228, 30: 2.042}  # printed in every book of statistics


T90 = {1: 6.314, 2: 2.920, 4: 2.132, 7: 1.895}  # for two-sided 90 %, or one-sided 95 %


@pytest.mark.parametrize("df", T)
def test_the_quantile_of_students_distribution_is_the_one_in_books(df):
    assert t_quantile(df) == pytest.approx(T[df], abs=6e-4)
    assert t_quantile(df, 0.90) == pytest.approx(T90.get(df, t_quantile(df, 0.90)), abs=6e-4)


def test_equivalence_is_two_one_sided_t_tests_worked_out_by_hand():
    """t = (mean +- margin) / (s / sqrt(n)), each beyond the one-sided 95 % quantile."""
    for differences in ([0.5, -0.5, 1.1, -1.3, 0.2], [1.9, 0.1, 2.4, -0.4, 1.2], [3.0, 2.9, 3.1, 3.0, 3.0]):
        error = statistics.stdev(differences) / math.sqrt(5)
        below, above = (statistics.mean(differences) + side for side in (2.0, -2.0))
        expected = below / error > T90[4] and above / error < -T90[4]
        assert is_equivalent(differences, 2.0) == expected
    assert is_equivalent([0.5, -0.5, 1.1, -1.3, 0.2], 2.0) and not is_equivalent([3.0, 2.9, 3.1, 3.0, 3.0], 2.0)


def test_an_estimate_is_the_mean_with_the_t_interval():
    values = [47.0, 49.5, 46.0, 48.5]
    found = estimate(values)
    assert found.mean == pytest.approx(47.75)
    assert found.half == pytest.approx(T[3] * statistics.stdev(values) / math.sqrt(4), rel=1e-3)
    assert estimate([3.5]) == (3.5, None, 1)
    assert estimate([]) == (None, None, 0)


@pytest.mark.parametrize(
    "differences, claimed, says",
    [
        ([1.0, 1.2, 0.9], 3.0, "same direction"),
        ([-1.0, -1.2, -0.9], -0.2, "same direction"),
        ([-1.0, -1.2, -0.9], 3.0, "opposite direction"),
        ([2.0, -1.5, 0.9], 3.0, "undecided"),  # 0.47 +- 4.4
        ([5.0, 5.0], 3.0, "undecided"),  # two seeds
        ([0.0, 0.0, 0.0], 3.0, "equivalent"),
        ([0.0, 0.0], 3.0, "undecided"),
        ([0.9, -0.9, 0.6], 3.0, "equivalent"),  # 0.2 +- 1.63 at 90 %, although +- 2.39 at 95 %
        ([1.2, -0.9, 0.6], 3.0, "undecided"),  # 0.3 +- 1.82 at 90 %
        ([1.0, 1.2, 0.9], None, "higher"),
        ([-1.0, -1.2, -0.9], None, "lower"),
        ([-1.0, -1.2, -0.9], 0.0, "lower"),
        ([], 3.0, "not run"),
    ],
)
def test_the_verdict_follows_its_rule(differences, claimed, says):
    assert verdict(differences, claimed) == says


TABLE = Table(
    "Table 99: made up",
    columns=(Column("GSM8K", "math", "accuracy"), Column("over-refusals", "safety", "over-refusal, lori")),
    rows=(
        Row("base", "base", (1.0,)),
        Row("LoRA", "lora", (26.0, 5.0), "base", "full_lora"),
        Row("HELLoRA", "hellora", (29.0, 3.0), "LoRA", "hotk8"),
        Row("cold", "hellora", (None, 9.0), "LoRA", change={"experts": "cold"}),
    ),
)
SCORES = {  # by method and experts, seeds 0 to 2
    ("base", None): [0.01, 0.01, 0.01],
    ("lora", None): [0.50, 0.52, 0.48],
    ("hellora", None): [0.47, 0.50, 0.46],
    ("hellora", "cold"): [0.40, None, 0.41],
}


def untuned(run: Run) -> Run:
    return run


def made_up(run: Run, task: str) -> dict | None:
    value = SCORES[run.method, run.experts][run.seed]
    if value is None or task == "tiny-safety" and run.method != "lora":
        return None
    return {"accuracy": value, "rates": {"over-refusal, lori": value}}


def test_a_table_has_the_means_and_paired_differences_of_its_runs():
    section = TABLE.section(made_up, untuned)
    math_rows = {row["row"]: row for row in section.rows if row["column"] == "GSM8K"}
    ours = math_rows["HELLoRA"]["ours"]
    assert ours["by_seed"] == pytest.approx({0: 47.0, 1: 50.0, 2: 46.0})
    assert (ours["mean"], ours["n"]) == (pytest.approx(143 / 3), 3)
    differences = [-3.0, -2.0, -2.0]
    assert ours["difference"]["mean"] == pytest.approx(statistics.mean(differences))
    assert ours["difference"]["half"] == pytest.approx(T[2] * statistics.stdev(differences) / math.sqrt(3), rel=1e-3)
    assert (math_rows["HELLoRA"]["paper_difference"], ours["verdict"]) == (3.0, "opposite direction")
    assert math_rows["cold"]["ours"]["difference"]["n"] == 2  # the seeds that both have
    assert math_rows["cold"]["ours"]["verdict"] == "undecided"
    assert math_rows["base"]["ours"]["n"] == 1  # the base model has no seed
    assert math_rows["LoRA"]["ours"]["verdict"] == "same direction"
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.lines]
    [shown] = [line for line in lines if line[0] == "HELLoRA" and "29.00" in line]
    assert shown[1:4] == ["LoRA", "29.00", "+3.00"]
    assert shown[-3:] == ["47.7 ± 5.2 (3)", "-2.3 ± 1.4 (3)", "opposite direction"]
    [not_run] = [line for line in lines if line[0] == "HELLoRA" and "3.00" in line]
    assert not_run[-3:] == ["not run"] * 3


def test_the_interval_of_a_ratio_of_standard_deviations_holds_the_ratios_that_pitmans_test_accepts():
    """x and y have one standard deviation if x + y and x - y are uncorrelated (Pitman 1939): the t-test of that.

    The ends of the interval are the ratios c at which the test of x and c y is just at 5 %.
    """
    values, others = {3: 1.0, 1: 3.0, 2: 2.0, 5: 5.0, 4: 4.0}, {1: 1.5, 2: 2.5, 3: 1.2, 4: 2.7, 5: 2.9, 9: 70.0}
    ratio, least, most = spread_ratio(values, others)
    x, y = (np.array([of[seed] for seed in range(1, 6)]) for of in (values, others))
    assert ratio == pytest.approx(x.std() / y.std())
    for c in (least, most):
        r = np.corrcoef(x + c * y, x - c * y)[0, 1]
        assert abs(r) * math.sqrt(3 / (1 - r**2)) == pytest.approx(T[3], abs=1e-3)
    assert least < ratio < most


def test_moe_sieves_own_seeds_stand_in_the_column_of_gsm8k_with_the_same_rule():
    rows = TABLE.section(made_up, untuned).rows
    [hellora] = [row for row in rows if row["row"] == "HELLoRA" and row["column"] == "GSM8K"]
    assert hellora["sieve"]["n"] == 8
    assert hellora["sieve"]["mean"] == pytest.approx(29.09, abs=0.005)  # the study prints 29.1
    assert hellora["sieve"]["difference"]["mean"] == pytest.approx(-1.35, abs=0.005)
    assert hellora["sieve"]["verdict"] == "undecided"  # -1.35 +- 1.42
    assert all(row["sieve"]["n"] == 0 for row in rows if row["column"] != "GSM8K")


def test_moe_sieve_is_equivalent_to_lora_where_its_paper_says_so_with_the_intervals_that_it_prints():
    printed = {  # the hottest quarter less LoRA on all experts, 95 % interval in points: all four are equivalent
        ("olmoe-gsm8k", "hotk16"): (-0.08, -1.45, 1.30),
        ("olmoe-hellaswag", "hotk16"): (0.17, -0.71, 1.05),
        ("qwen-gsm8k", "hotk15"): (0.20, -0.77, 1.17),
        ("qwen-hellaswag", "hotk15"): (0.73, 0.53, 0.93),
    }
    rows = {(row["study"], row["row"]): row for row in published.section().rows}
    for key, interval in printed.items():
        mean, half, _ = rows[key]["difference"]
        assert (mean, mean - half, mean + half) == pytest.approx(interval, abs=0.006)
        study, lora = published.sieve_accuracies(key[0]), published.sieve_accuracies(key[0])["full_lora"]
        assert is_equivalent([score - lora[seed] for seed, score in study[key[1]].items()], 2.0)
    assert rows["olmoe-gsm8k", "hotk16"]["verdict"] == "equivalent"
    assert rows["olmoe-gsm8k", "hotk8"]["verdict"] == "undecided"
    assert rows["olmoe-gsm8k", "randk8"]["verdict"] == "lower"


def test_the_claims_of_other_papers_stand_where_they_have_no_value_in_this_one():
    rows, (math_, code, *_) = {row.name: row for row in tables.METHODS.rows}, tables.METHODS.columns
    ours = {name: {0: 50.0, 1: 51.0, 2: 49.0} for name in rows}
    ours["DR-LoRA"] = {0: 54.0, 1: 55.1, 2: 53.2}
    cell = tables.METHODS.cell(rows["DR-LoRA"], math_, ours)
    assert (cell.claimed, cell.verdict(cell.sides[OURS])) == (2.2, "same direction")
    cell = tables.METHODS.cell(rows["MoE-Sieve"], math_, ours)
    assert (cell.claimed, cell.verdict(cell.sides[OURS])) == (0.0, "equivalent")
    assert tables.METHODS.cell(rows["MoE-Sieve"], code, ours).claimed is None
    for row in (*tables.HELLORI.rows, *tables.ROUTER.rows):
        assert not row.claims


def test_a_value_that_the_paper_prints_in_two_tables_is_the_same_in_both():
    """In Table 7 this also shows that its rows are the right way round: the paper swaps accuracy and throughput."""
    printed: dict[tuple, set[float]] = {}
    for table in tables.TABLES.values():
        for row in table.rows:
            for column, value in zip(table.columns, row.paper, strict=False):
                task = row.change.get("task", column.task)
                key = (table.model, column.title, task, row.method, *sorted(row.change.items() - {("task", task)}))
                printed.setdefault(key, set()).add(value)
    twice = {key: values - {None} for key, values in printed.items()}
    assert {key: values for key, values in twice.items() if len(values) > 1} == {}
    accuracies = [row.paper[0] for row in tables.NUMBER.rows]
    assert accuracies == sorted(accuracies)  # it grows with k, as the text says


def test_every_row_is_compared_with_a_row_of_its_table_and_with_a_choice_of_the_study():
    for table in tables.TABLES.values():
        names = [row.name for row in table.rows]
        assert len(set(names)) == len(names)
        assert {row.against for row in table.rows} - {None} <= set(names)
        assert {row.sieve for row in table.rows} - {None} <= sieve_accuracies().keys()
        assert all(len(row.paper) <= len(table.columns) for row in table.rows)


@pytest.mark.parametrize("name", ["table2", "hellori"])
def test_the_scores_at_one_rate_stand_beside_the_same_values_of_the_paper(name):
    rows = tables.TABLES[name].section(lambda run, task: None, untuned).rows
    best, one = ({row["row"]: (row["paper"], row["paper_difference"]) for row in rows if row["column"] == column}
                 for column in ("GSM8K", "GSM8K, one rate"))  # fmt: skip
    assert best == one and any(paper for paper, _ in best.values())
    assert not any(row["tuned"] or row["sieve"]["n"] for row in rows if row["column"] == "GSM8K, one rate")
