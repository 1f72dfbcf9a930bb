"""Figures and speed tables of reproduce.py: numbers against plainer formulas and printed values, pictures drawn."""

import json
import math
import statistics
from dataclasses import replace

import pytest

from lab.benchmarks import step
from lab.paper import command as reproduce
from lab.paper import routing, runs, speed
from recipes import methods

OUT = ("fig1", "fig3", "fig4", "fig5", "fig6")


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    """The sections without any run, and the folder with their pictures."""
    out = tmp_path_factory.mktemp("results")
    steps = []
    for batch, repeats in ((8, 3), (32, 4)):
        for name, pace in (
            ("floor", 1.0),
            ("lora", 2.0),
            ("hellora", 1.6),
            ("peft-all", 5.0),
            ("lora-pure", 3.0),
            ("hellora-pure", 1.5),
            ("hellora-k16", 2.5),
        ):
            turns = [pace * (1 + 0.01 * turn) for turn in range(repeats * max(1, 32 // batch))]
            about = {"samples_per_s": batch / pace, "over_floor": 1 / pace, "peak_bytes": int(pace * 1e9)}
            steps.append({"name": name, "batch": batch, "seconds": turns} | about)
    (out / "step.json").write_text(json.dumps(steps))
    names = ("table6", *OUT)
    found = {name: reproduce.FIGURES[name](out, may_run=False) for name in names}
    return found | {"folder": out}


def test_every_figure_is_drawn_and_linked(sections):
    for name in OUT:
        assert (sections["folder"] / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert any(f"]({name}.png)" in line for line in sections[name].lines)


def test_the_flops_saved_are_those_of_the_formula_on_the_published_counts(sections):
    """Per token and layer of OLMoE-1B-7B at rank 32: attention 524,288, router 67,584, an expert 294,912 parameters."""
    experts, others = 8 * 294_912, 524_288 + 67_584
    for row in sections["fig1"].rows[:4]:
        counts = routing.real(routing.OLMOE[row["name"].removeprefix("OLMoE, ")]).counts.tolist()
        covered = statistics.mean(sum(sorted(layer)[-8:]) / sum(layer) for layer in counts)
        assert row["top"] == pytest.approx(100 * covered)
        assert row["flops saved"] == pytest.approx(100 * (1 - covered) * experts / (experts + others))


def test_the_skew_of_olmoe_is_what_moe_sieve_prints(sections):
    rows = {row["name"]: row for row in sections["fig1"].rows}
    row, counts = rows["OLMoE, GSM8K"], routing.real("olmoe-gsm8k").counts.double()
    by_layer = [statistics.pstdev(layer) / statistics.mean(layer) for layer in counts.tolist()]
    assert row["cv"] == pytest.approx(statistics.mean(by_layer))
    assert 4.0 <= round(row["cv over global"], 1) <= 4.9
    cold = [sum(64 * count < 0.5 * sum(layer) for count in layer) / 64 for layer in counts.tolist()]
    assert row["cold"] == pytest.approx(100 * statistics.mean(cold)) and 30 < row["cold"] < 60
    assert "do not confirm it" in " ".join(sections["fig1"].lines)  # more than 50 % in layer 7
    masses = {row["name"]: row["mean"] for row in sections["fig3"].rows if "quarter" in row}
    assert masses["OLMoE, GSM8K"] > 0.92
    assert masses["DeepSeekMoE, GSM8K"] == pytest.approx(0.646, abs=0.03)


def test_what_was_not_counted_says_so(sections):
    assert sum("not run" in line for line in sections["fig3"].lines) == 12
    assert sum("not run" in line for line in sections["fig6"].lines) == 2


def test_a_speed_is_compared_with_lora_in_the_same_turns(sections):
    rows = {(row["batch"], row["row"]): row for row in sections["table6"].rows}
    found = rows[8, "hellora"]
    assert found["over"].mean == pytest.approx(100 * (2.0 / 1.6 - 1))
    assert found["over"].n == 3
    assert (found["verdict"], rows[8, "peft-all"]["verdict"]) == ("same direction", "lower")
    assert (rows[8, "floor"]["verdict"], rows[8, "dora"]["verdict"]) == ("-", "not run")
    assert found["paper_over"] == pytest.approx(82.76, abs=0.01)  # 19.08 / 10.44
    assert math.isclose(rows[32, "hellora"]["over_floor"], 1 / 1.6)
    pure = rows[8, "hellora-pure"]  # beside LoRA at the same places
    assert pure["over"].mean == pytest.approx(100) and pure["paper_over"] == pytest.approx(95.80, abs=0.01)
    assert rows[8, "lora-pure"]["verdict"] == "-"
    assert speed.speeds(sections["folder"] / "none.json", 8) == {}


def test_table_7_has_the_speed_of_every_k_beside_that_of_8(sections):
    rows = {(row["batch"], row["row"]): row for row in sections["table6"].rows if row["row"].startswith("k = ")}
    assert [row["paper"] for row in rows.values()] == [20.99, 20.98, 20.08, 16.49] * 2
    assert rows[8, "k = 16"]["over"].mean == pytest.approx(100 * (1.6 / 2.5 - 1))
    lines = [line for line in sections["table6"].lines if line.startswith("| k = ")]
    assert "not run" in lines[0] and "same direction" in lines[3] and " -18 |" in lines[3]


def test_one_command_measures_every_row_that_the_page_prints():
    assert {*speed.OURS, *speed.PAPER_BY_NUMBER} == {*step.EVERY}


def test_counts_of_a_warm_up_are_not_used_after_its_settings_changed(tmp_path, monkeypatch):
    file = tmp_path / "profiles/tiny-tiny-math-0.1-lora.json"
    file.parent.mkdir()
    kept = json.loads((routing.ROOT / "results/profiles" / file.name).read_text())

    def found() -> bool:
        runs.decisive_settings.cache_clear()
        return routing.counted(tmp_path, "tiny", "tiny-math", 0.1, "lora", may_run=False) is not None

    for other in ({"data": "another"}, {"weights": "other"}, {"lr": 3e-3}, {"schedule": "constant"}):
        file.write_text(json.dumps(kept | {"made_from": kept["made_from"] | other}))
        assert not found()
    file.write_text(json.dumps({name: value for name, value in kept.items() if name != "made_from"}))
    assert not found()
    file.write_text(json.dumps(kept))
    assert found()
    recipe = replace(methods.RECIPES["tiny-math"], lr=0.5)
    monkeypatch.setitem(methods.RECIPES, "tiny-math", recipe)
    assert not found()
    monkeypatch.undo()
    runs.decisive_settings.cache_clear()
