"""What fine-tuning did besides its score: the losses and the movements against plainer formulas."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import data
import train
from command.cli import InputError
from hub.checkpoint import TINY
from lab.paper import effects, reasons, runner
from lab.paper.command import Settings
from lab.paper.effects import material, moved, read_through
from lab.paper.runs import Records, Run
from lab.paper.tables import TABLES, TUNED
from model import load_model, read_config
from tiny.tasks import is_test


@pytest.fixture
def few(monkeypatch):
    """Rows and texts enough for every branch."""
    monkeypatch.setattr(effects, "ROWS", 7)
    monkeypatch.setattr(effects, "TEXTS", 3)


def test_movements_of_routing_are_counted_by_hand():
    before = torch.tensor([[[0, 1], [0, 2], [0, 1], [2, 3]]])  # one layer, four tokens, two of five experts each
    after = torch.tensor([[[0, 1], [0, 4], [3, 4], [2, 3]]])
    assert moved(before, before, 5) == {"hot_overlap": 1.0, "tokens": 0.0, "choices": 0.0}
    # Hot are {0, 1} before and {0, 3} after. Two of four tokens change, and three of eight choices.
    assert moved(before, after, 5) == {"hot_overlap": pytest.approx(1 / 3), "tokens": 0.5, "choices": 3 / 8}


def prompts(items: list[data.Encoded]) -> set[tuple[int, ...]]:
    return {tuple(item.ids[: item.spans[0][0]]) for item in items}


@pytest.mark.parametrize("task", effects.MAKERS)
def test_material_is_new_to_the_model_and_its_loss_is_that_of_single_sequences(task, few):
    config, model = read_config(TINY), load_model(TINY)
    reader = data.Reader(task, TINY, config)
    read = material(task, reader)
    assert len(read["seen"]) == 7 and 4 < len(read["unseen"]) <= 7
    trained = prompts(reader.encode(reader.load("train")))
    assert not trained & prompts(read["unseen"])
    assert trained >= prompts(read["seen"])
    items = [*read["unseen"], *read["code"]]
    assert [len(read[kind]) for kind in effects.TEXT] == [3, 3, 3]
    loss, experts = read_through(model, items)
    total, targets, tokens = 0.0, 0, 0
    for item in items:
        ids = torch.tensor([item.ids])
        with torch.no_grad():
            logits, _ = model(ids)
        for start, end in item.spans:
            first = max(start, 1)
            total += F.cross_entropy(logits[0, first - 1 : end - 1], ids[0, first:end], reduction="sum").item()
            targets += end - first
        tokens += len(item.ids)
    assert math.isclose(loss, total / targets, rel_tol=1e-5)
    assert experts.shape == (4, tokens, 8)


def test_held_out_text_has_no_test_problem():
    reader = data.Reader("tiny-math", TINY, read_config(TINY))
    questions = [text.split("\n")[0] for text in map(reader.tokenizer.decode, (
        item.ids for item in effects.held_out_text("math", reader)))]  # fmt: skip
    asked = [q.partition(": ")[2] or q for q in questions if "How many" in q or "how many" in q]
    assert asked and not any(map(is_test, asked))


def test_the_record_of_a_run_says_what_it_did_and_one_that_learnt_nothing_did_nothing(few, tmp_path, monkeypatch):
    def call(self, script, arguments, log):
        __import__(script.removesuffix(".py")).main(arguments)
        return 1.0

    monkeypatch.setattr(runner.Workplace, "call", call)
    place = runner.Workplace(Records(tmp_path / "runs", limit=2), tmp_path / "scratch")
    record = runner.make_run(Run("tiny-math", "hellora", steps=2), {"tiny-math"}, place)
    done = record["effects"]
    assert done["seen_loss"] != done["unseen_loss"]
    assert done["text_loss"]["before"].keys() == done["text_loss"]["after"].keys() == {"math", "code", "safety"}
    assert 0 < done["routing"]["task"]["choices"] < done["routing"]["task"]["tokens"] < 1
    assert record["seconds_profile"] > 0
    nothing = str(tmp_path / "nothing")
    train.main(["--steps", "1", "--lr", "1e-30", "--out", nothing])
    same = effects.command([nothing, "--json", str(tmp_path / "x.json")])
    assert json.loads((tmp_path / "x.json").read_text()) == same
    assert same["text_loss"]["after"] == pytest.approx(same["text_loss"]["before"], rel=1e-6)
    assert same["text_loss"]["before"] == done["text_loss"]["before"]
    assert same["routing"]["text"]["choices"] < 1e-3
    with pytest.raises(InputError, match="tiny: expected a run of train.py on an embedded model"):
        effects.effects("tiny")
    config = Path(nothing) / "config.json"
    written = json.loads(config.read_text())
    for changed in ({"data": "another"}, {"settings": written["settings"] | {"valid_share": 0.5}}):
        config.write_text(json.dumps(written | changed))
        with pytest.raises(InputError, match="nothing was trained on other rows than its task's; expected all of them"):
            effects.effects(nothing)


# ------------------------------------------------------------------------------------------------- as tables


def finish(records: Records, run: Run, gap: float, after: float, moved: float, counting: float = 4.0) -> None:
    """The record of a run as if it had been made and measured."""
    change = {"hot_overlap": 0.5, "tokens": 0.9, "choices": moved}
    text = {"before": {"math": 1.0, "code": 2.0}, "after": {"math": 1.0, "code": 2.0 + 2 * after}}
    done = {"seen_loss": 0.25, "unseen_loss": 0.25 + gap, "text_loss": text}
    done["routing"] = {"task": change, "text": change | {"choices": moved / 2}}
    record = {"run": vars(run), "settings": {}, **records.content(run), "scores": {}, "effects": done}
    record |= {"seconds": {"train": 84.0}, "seconds_profile": counting}
    records.folder.mkdir(parents=True, exist_ok=True)
    (records.folder / f"{records.name(run)}.json").write_text(json.dumps(record))


def test_reasons_are_means_of_the_records_and_differences_from_lora_are_paired_by_seed(tmp_path):
    records, table = Records(tmp_path), TABLES["table2"]
    column = table.columns[0]
    rows = {row.name: row for row in table.rows}
    for seed in range(3):
        finish(records, table.run(rows["LoRA"], column, seed), 0.01 * (seed + 1), 0.8, 0.2)
        finish(records, table.run(rows["HELLoRA"], column, seed), 0.01 * (seed + 1), 0.5 + 0.01 * seed, 0.3)
    made = reasons.section(replace(table, seeds=3), records, lambda run: run)
    assert not any("tiny-code" in line for line in made.lines)  # nothing was measured there
    text = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
            for line in made.lines if line.startswith("| HELL")}  # fmt: skip
    by_name = {row["row"]: row["by_seed"] for row in made.rows if row.get("task") == "tiny-math"}
    assert by_name.keys() == {"LoRA", "HELLoRA"}
    assert by_name["HELLoRA"]["text, after - before"] == pytest.approx({0: 0.5, 1: 0.51, 2: 0.52})
    assert by_name["LoRA"]["choices moved, text"] == pytest.approx({0: 10, 1: 10, 2: 10})
    half = 4.302653 * 0.01 / math.sqrt(3)
    assert text["HELLoRA"] == [
        "+0.000 ± 0.000 (3)", "undecided", f"-0.290 ± {half:.3f} (3)", "same direction",
        "+10.0 ± 0.0 (3)", "opposite direction", "+5.0 ± 0.0 (3)", "opposite direction",
    ]  # fmt: skip


def test_double_sparsity_is_what_params_and_the_formula_of_flops_say():
    saved = {row["row"]: row for row in reasons.sparsity()}
    assert (saved["hellori-s"]["trainable"], saved["lora"]["trainable"]) == (2_100_428, 311_459_840)
    assert 100 * (1 - saved["hellora"]["flops"] / saved["lora"]["flops"]) == pytest.approx(48.6, abs=0.05)  # Figure 1
    assert saved["lori-s"]["flops"] == saved["lora"]["flops"]


def test_what_counting_adds_is_relative_to_the_training_without_it(tmp_path):
    records, table = Records(tmp_path), TABLES["catcher"]
    base, warm, *_ = (table.run(row, table.columns[0]) for row in table.rows)
    finish(records, base, 0, 0, 0, counting=4.0)
    finish(records, warm, 0, 0, 0, counting=14.0)
    lines, rows = reasons.cost(table, records)
    assert [row["cost"] for row in rows] == [[pytest.approx(5)], [pytest.approx(20)], [], []]
    assert "16 %" in " ".join(lines) and "1.62 times" in " ".join(lines)


def test_counts_of_the_embedded_model_serve_it_alone_and_are_named_where_they_are_missing(tmp_path, monkeypatch):
    for settings, number in ((Settings(), 4), (Settings(model="x"), 3), (Settings(scale="paper"), 3)):
        assert len(settings.table("catcher").rows) == number
    monkeypatch.chdir(tmp_path)
    run = Run("tiny-math", "hellora", profile=TUNED)
    with pytest.raises(InputError, match="tuned.json is not there; `python reproduce.py fig3` counts it"):
        Records(tmp_path).name(run)
