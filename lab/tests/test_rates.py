"""Sweeps over learning rates: validation problems that nothing else uses, the rate that scores best, Table 9."""

import json
import shutil
from dataclasses import replace

import pytest
import torch

import data
import hellora
import reproduce
from command.cli import InputError
from hub.checkpoint import resolve
from lab import ROOT
from lab.paper import budget
from lab.paper.page import Section
from lab.paper.rates import LIMIT, QUESTION, SEEDS, Sweeps, swept, validation_score, write_validation
from lab.paper.runs import Run
from lab.paper.table import Row
from lab.paper.tables import K2, K8, ONE_RATE, TABLES
from model import MoETransformer, read_config
from recipes.methods import METHODS, flat_rank

RUN = Run("tiny-math", "hellora", k=4, schedule="linear")


class MadeUp:
    """Records whose accuracy halves with each doubling away from the best rate. known: the rates that have been run."""

    def __init__(self, best: float = 6e-3, known: set[float] | None = None) -> None:
        self.best, self.known = best, known

    def scores(self, run: Run, task: str) -> dict | None:
        if self.known is not None and run.lr not in self.known:
            return None
        far = max(run.lr / self.best, self.best / run.lr)
        score = 0.5 / far + 0.01 * (run.seed == SEEDS[0])
        return {"accuracy": score, "pass@1": score, "rates": {}}


@pytest.mark.parametrize("task", QUESTION)
def test_validation_problems_are_no_problems_of_a_table_and_were_not_trained_on(task, tmp_path):
    write_validation(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / f"{task}-test.jsonl").read_text().splitlines()]
    key = QUESTION[task]
    asked = [row[key] for row in rows]
    assert len(set(asked)) == len(asked) >= (LIMIT if task != "tiny-code" else 200)
    assert not set(asked) & {example.row[key] for example in data.load_examples(task, "test")}
    trained = "\0".join(text for example in data.load_examples(task, "train") for text in example.row.values())
    assert not [question for question in asked if question in trained]
    assert data.load_examples(task, "test", tmp_path / f"{task}-test.jsonl", limit=3)  # evaluate.py reads them


def test_the_best_rate_is_that_of_the_largest_mean_score_over_the_seeds_of_the_sweep():
    sweeps = Sweeps(MadeUp())
    assert sweeps.at_best(replace(RUN, seed=7)) == replace(RUN, seed=7)  # the common rate: one run for both
    assert Sweeps(MadeUp(best=1.2e-2)).at_best(replace(RUN, seed=7)) == replace(RUN, seed=7, lr=1.2e-2)
    curve = sweeps.curve(RUN)
    assert curve[6e-3] == pytest.approx(50.5) and curve[1.2e-2] == pytest.approx(25.5)
    assert sweeps.missing([RUN]) == {}


@pytest.mark.parametrize("best", [7.5e-4, 0.096])
def test_a_sweep_whose_best_rate_is_at_an_end_goes_on(best):
    grid, beyond = {3e-3 * 2**i for i in range(5)}, 1.5e-3 if best < 3e-3 else 0.096
    unfinished = Sweeps(MadeUp(best, grid))
    assert unfinished.at_best(RUN) is None
    assert {(run.lr, run.seed) for run in unfinished.missing([RUN])} == {(beyond, s) for s in SEEDS}
    sweeps = Sweeps(MadeUp(best))
    assert sweeps.at_best(RUN).lr == pytest.approx(best)
    rates = list(sweeps.curve(RUN))
    assert rates == sorted(rates) and best not in (rates[0], rates[-1])


@pytest.mark.parametrize(("scores", "best"), [((60, 60, 40, 30, 20), 1.5e-3), ((20, 30, 40, 60, 60), 0.096)])
def test_a_sweep_goes_on_while_its_end_is_as_good_as_the_best(scores, best):
    class Tied(MadeUp):
        def scores(self, run: Run, task: str) -> dict:
            known = dict(zip((3e-3 * 2**i for i in range(5)), scores, strict=True))
            beyond = 70 if run.lr == pytest.approx(best) else 10
            return {"accuracy": known.get(run.lr, beyond) / 100, "rates": {}}

    assert Sweeps(Tied()).at_best(RUN).lr == pytest.approx(best)


@pytest.mark.parametrize("elsewhere", [{"task": "tiny-code"}, {"model": "tiny-mixtral"}])
def test_other_tasks_and_models_try_the_rates_around_the_best_on_math(elsewhere):
    run = replace(RUN, **elsewhere)
    assert list(Sweeps(MadeUp(best=1.2e-2)).curve(run)) == [6e-3, 1.2e-2, 2.4e-2]
    assert [each.seed for each in Sweeps(MadeUp()).runs(run, 6e-3)] == [SEEDS[0]]
    unfinished = Sweeps(MadeUp(known={3e-3}))
    assert unfinished.at_best(run) is None
    assert {(each.task, each.model) for each in unfinished.missing([run])} == {("tiny-math", "tiny")}


def test_a_sweep_in_which_no_rate_is_better_than_the_others_ends():
    class Zeros(MadeUp):
        def scores(self, run: Run, task: str) -> dict:
            return {"accuracy": 0.0, "rates": {}}

    assert len(Sweeps(Zeros()).curve(RUN)) == 5
    assert Sweeps(Zeros()).at_best(RUN).lr == 3e-3


def test_a_sweep_that_lacks_runs_is_shown_as_not_run(tmp_path):
    half = MadeUp()
    scores = half.scores
    half.scores = lambda run, task: None if run.method == "dora" else scores(run, task)
    section = Sweeps(half).section({"LoRA": RUN, "DoRA": replace(RUN, method="dora")}, tmp_path)
    assert [row["method"] for row in section.rows] == ["LoRA"]
    assert any(line.startswith("| DoRA") and "not run" in line for line in section.lines)


def test_placements_of_one_method_share_a_sweep_and_budgets_do_not():
    sweeps = Sweeps(MadeUp(known=set()))
    placed = [replace(RUN, experts=experts, seed=3) for experts in (None, "random", "cold")]
    assert len(sweeps.missing(map(swept, placed))) == 5 * len(SEEDS)
    assert len(sweeps.missing([RUN, replace(RUN, k=8), replace(RUN, expert_rank=2)])) == 15 * len(SEEDS)
    assert sweeps.missing([Run("tiny-math", "base")]) == {}


def test_a_model_that_refuses_everything_is_half_right():
    answered = {"refusal_rate": 0.75, "rates": {"over-refusal, lori": 0.25}}
    assert validation_score("tiny-safety", answered) == 75
    assert validation_score("tiny-safety", {"refusal_rate": 1.0, "rates": {"over-refusal, lori": 1.0}}) == 50
    assert validation_score("tiny-code", {"pass@1": 0.25}) == 25


def test_a_cell_has_the_score_at_the_best_rate_and_the_rate():
    table = replace(TABLES["table9"], seeds=2)
    tune = lambda run: replace(run, lr=0.012)  # noqa: E731
    scores = lambda run, task: {"accuracy": run.lr or 0.006, "rates": {}}  # noqa: E731
    section = table.section(scores, tune)
    assert {(round(row["ours"]["mean"], 9), row["lr"]) for row in section.rows} == {(1.2, 0.012)}
    [line] = [line for line in section.lines if line.startswith("| 8 at random")]
    assert line.index("0.012") < line.index("1.2 ± 0.0 (2)")
    rows = table.section(scores, lambda run: None).rows  # no sweep is complete
    assert {(row["ours"]["n"], row["lr"]) for row in rows} == {(0, None)}
    assert table.needed(lambda run: None) == {}
    assert len(table.needed(tune)) == 2 * len(table.rows)


def test_full_fine_tuning_has_a_tenth_of_the_rate_of_a_table():
    table = TABLES["table2"]
    fast = replace(table, change={"lr": 0.01})
    rates = {row.method: fast.run(row, table.columns[0]).lr for row in table.rows}
    assert rates.pop("fft") == 0.001 and set(rates.values()) == {0.01}
    code = {row.method: table.run(row, ONE_RATE[1]).lr for row in table.rows}
    assert code.pop("fft") == 3e-4 and set(code.values()) == {3e-3}


def trained(row: Row) -> int:
    """The parameters that a row of Table 9 trains on the embedded model."""
    with torch.device("meta"):
        model = MoETransformer(read_config(resolve("tiny")))
    K = model.config.num_experts
    k, method, change = row.change.get("k", 8), METHODS[row.method], row.change
    hot = torch.arange(K).expand(len(model.config.moe_layers), -1) < (K if method.experts == "all" else k)
    flat = flat_rank(8, k, K) if method.flat else None
    rank = change.get("rank", 8)
    hellora.attach(model, hot, rank, alpha=16.0, targets="all", expert_rank=change.get("expert_rank") or flat or rank)
    return hellora.count_parameters(model)[0]


def test_the_rows_of_table_9_have_the_parameters_that_it_says():
    sizes = {row.name: trained(row) for row in TABLES["table9"].rows}
    per_expert, beside = 3 * (128 + 48), 4 * (128 + 128) + (128 + 64)  # of rank 1: an expert; attention and router
    eight, two = (4 * (8 * k * per_expert + 8 * beside) for k in (8, 2))  # four layers, rank 8
    named = {K8: eight, K2: two, "all 64, rank 8 (over the budget)": 4 * (8 * 64 * per_expert + 8 * beside)}
    others = {row.name: named[row.against] for row in TABLES["table9"].rows if row.against}
    del others["DR-LoRA, rank 2"], sizes["DR-LoRA, rank 2"]  # grows: 4 * (2 * 64 * per_expert + 2 * beside) at its end
    assert sizes == others | named


def test_a_table_with_a_sweep_shows_its_commands_first(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reproduce.main(["table2", "--dry-run", "--out", str(tmp_path), "--seeds", "1"])
    lines = capsys.readouterr().out.splitlines()
    [end_of_sweeps, further, end] = [i for i, line in enumerate(lines) if line.startswith("# ")]
    assert further == end_of_sweeps + 1 and "best rates, and:" in lines[further]
    assert "validation/tiny-math-test.jsonl" in lines[end_of_sweeps - 1] and "-seed101 " in lines[end_of_sweeps - 1]
    assert "-seed0 " in lines[end - 1] and "--lr 0.003 --schedule constant" in lines[end - 2]  # the one rate
    reproduce.main(["table9", "--dry-run", "--out", str(tmp_path), "--seeds", "1"])
    assert capsys.readouterr().out.splitlines()[-1] == "# then the runs at the best rates"
    with pytest.raises(InputError):
        reproduce.main(["table10", "--dry-run"])


class Finished:
    """Records in which a run trained as many parameters as its method has letters, and scored by its seed."""

    def record(self, run: Run) -> dict:
        return {"trainable": len(run.method)}

    def scores(self, run: Run, task: str) -> dict:
        return {"accuracy": 0.1 * run.seed, "rates": {}}


def test_methods_are_ordered_by_what_they_train_and_a_run_of_two_tables_is_one_point(tmp_path):
    tables = [replace(TABLES[name], seeds=seeds) for name, seeds in (("table2", 3), ("table9", 5))]
    tune = lambda run: replace(run, lr=0.012) if run.method == "lora" else run  # noqa: E731
    rows = budget.points(tables, Finished(), tune)
    sizes = [row["trainable"] for row in rows]
    assert sizes == sorted(sizes)
    names = [row["name"] for row in rows]
    assert (
        names.count("HELLoRA") == 1
        and "HELLoRA, 2 hottest, rank 8" in names
        and not [each for each in names if "coldest" in each]
    )
    assert {row["name"]: row["hot"] for row in rows}["MoE-Sieve"]
    of_both = {"HELLoRA", "LoRA", "HELLoRA, 2 hottest, rank 8"}  # a run of both tables has the seeds of the larger
    accuracies = {row["name"]: round(row["accuracy"].mean, 9) for row in rows}
    assert {accuracies[name] for name in of_both} == {20.0} and accuracies["DoRA"] == 10.0  # seeds 0 to 4, 0 to 2
    budget.section(tables, Finished(), tune, tmp_path)
    assert (tmp_path / "budgets.png").stat().st_size > 10_000


@pytest.mark.parametrize("flags", [["--quick"], ["--scale", "paper"], []])
@pytest.mark.parametrize("name", ["rates", "budgets", "reasons", "table2"])
def test_what_rests_on_sweeps_says_so_where_there_are_none(name, flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # as in a new clone: no validation problems yet
    if flags[1:]:  # which would download the paper's models
        monkeypatch.setattr(
            "lab.paper.command.Table.section", lambda *args, **changes: Section("Table 2", ["not run"], [])
        )
    reproduce.main([name, "--no-run", "--out", str(tmp_path / "out"), *flags])
    text = capsys.readouterr().out
    assert "not run" in text or "No sweep is complete yet" in text or "No run is finished yet" in text


def test_no_run_says_how_many_runs_its_tables_lack(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    reproduce.main(["table8", "--no-run", "--seeds", "3", "--out", str(tmp_path / "out")])
    base, trained = 3, 3 * 3  # on each of three tasks: the base model, and a run of each seed
    assert f"at least {base + trained} runs are not there" in capsys.readouterr().err
    reproduce.main(["rates", "--no-run", "--out", str(tmp_path / "out")])  # where sweeps come first
    assert "runs are not there; without --no-run they are made" in capsys.readouterr().err


def test_committed_sweeps_are_read_in_a_new_clone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # where the validation problems have not been written yet
    for name in ("sweeps", "runs"):
        shutil.copytree(ROOT / "results" / name, tmp_path / "out" / name)
    reproduce.main(["budgets", "--no-run", "--out", str(tmp_path / "out")])
    assert "| LoRA " in capsys.readouterr().out


def test_the_base_model_is_one_run_whatever_the_rate_of_a_table():
    table = TABLES["table8"]
    base = [table.run(table.rows[0], column, 3) for column in table.columns]
    assert {(run.lr, run.schedule, run.lr_warmup, run.seed) for run in base} == {(None, None, None, 0)}
    assert Run("tiny-math", "base") in base
