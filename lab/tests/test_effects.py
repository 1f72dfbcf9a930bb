"""What fine-tuning did besides its score: the losses and the movements against plainer formulas."""

import json
import math

import pytest
import torch
import torch.nn.functional as F

import data
import train
from command.cli import InputError
from hub.checkpoint import TINY
from lab.paper import effects, runner
from lab.paper.effects import material, moved, read_through
from lab.paper.runs import Records, Run
from model import load_model, read_config
from tiny.tasks import is_test


@pytest.fixture
def few(monkeypatch):
    """Rows and texts enough for every branch."""
    monkeypatch.setattr(effects, "ROWS", 7)
    monkeypatch.setattr(effects, "TEXTS", 3)
    effects.before.cache_clear()
    yield
    effects.before.cache_clear()


def test_movements_of_routing_are_counted_by_hand():
    before = torch.tensor([[[0, 1], [0, 2], [0, 1], [2, 3]]])  # one layer, four tokens, two of five experts each
    after = torch.tensor([[[0, 1], [0, 4], [3, 4], [2, 3]]])
    assert moved(before, before, 5) == {"hot_overlap": 1.0, "tokens": 0.0, "choices": 0.0}
    # Hot are {0, 1} before and {0, 3} after. Two of four tokens change, and three of eight choices.
    assert moved(before, after, 5) == {"hot_overlap": pytest.approx(1 / 3), "tokens": 0.5, "choices": 3 / 8}


@pytest.mark.parametrize("task", effects.MAKERS)
def test_material_is_new_to_the_model_and_its_loss_is_that_of_single_sequences(task, few):
    config, model = read_config(TINY), load_model(TINY)
    reader = data.Reader(task, TINY, config)
    read = material(task, reader)
    decode = reader.tokenizer.decode
    assert len(read.seen) == 7 and 4 < len(read.unseen) <= 7
    trained = {decode(item.ids) for item in reader.encode(reader.load("train"))}
    assert not trained & {decode(item.ids) for item in read.unseen}
    assert trained >= {decode(item.ids) for item in read.seen}
    items = [*read.unseen, *read.text["code"]]
    assert [len(texts) for texts in read.text.values()] == [3, 3, 3]
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
        item.ids for item in effects.held_out_text(reader)["math"]))]  # fmt: skip
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
