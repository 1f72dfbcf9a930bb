"""Validation: the loss on held-out rows, the best result beside the last, --patience, and all of it after a kill."""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import call, on_processes, read_json, read_lines, same, with_tokenizer, words, write_lines
from safetensors.torch import load_file

import data
import evaluate
import export
import train
import training_step
from command.cli import InputError
from machine.processes import ALONE
from model import load_model, read_config
from recipes.methods import METHODS
from run import adapters
from run.inputs import split
from run.subject import BEST, Subject
from run.validation import Validation, best_of, out_of_patience
from training_step import held_out_loss

ROOT = Path(__file__).parent.parent
STEPS = 7
FLAGS = f"--task own --train-data train.jsonl --lr 0.05 --steps {STEPS} --batch 3 --micro-batch 2"
VALID = words("--valid-data valid.jsonl --valid-every 1")

# The last method of each kind that trains differently.
TRAINED_APART = {(m.kind, m.sparse, m.grows, m.experts is None): name for name, m in METHODS.items()}.values()


@pytest.fixture(scope="module")
def folder(make_checkpoint, tmp_path_factory) -> Path:
    """A small random model, rows to train on, and rows whose answers are others, so that their loss soon rises."""
    folder = tmp_path_factory.mktemp("validation")
    with_tokenizer(shutil.copytree(make_checkpoint("olmoe").folder, folder / "base"))
    for name, answer, numbers in (("train", 3, range(10)), ("valid", 7, (1, 2, 3, 4, 6))):
        rows = [{"prompt": f"{i} + {i} =", "completion": f"the {(i * answer) % 10}"} for i in numbers]
        write_lines(folder / f"{name}.jsonl", rows)
    return folder


@pytest.fixture(autouse=True)
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def run(out: Path, *flags: str, method: str = "hellora") -> dict:
    size = "" if METHODS[method].experts is None else f"--sample 1 --rank {7 if METHODS[method].flat else 4}"
    return call(train, "--model base", FLAGS, "--method", method, size, "--out", out, *flags)


def log(out: Path, key: str) -> list:
    return [record.get(key) for record in read_lines(out / "log.jsonl")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def same_weights(a: Path, b: Path) -> bool:
    return same(weights(a), weights(b))


def items_of(folder: Path, name: str) -> list[data.Encoded]:
    reader = data.Reader("own", folder / "base", read_config(folder / "base"))
    return reader.encode(reader.load("train", folder / f"{name}.jsonl"))


# --------------------------------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize("micro_batch", [1, 3, 20])
def test_the_loss_is_the_mean_over_all_target_tokens_as_transformers_has_it(olmoe, folder, micro_batch):
    items = [data.Encoded([5, 9, 3, 8][:n], ((n // 2, n),)) for n in (2, 3, 4)] + items_of(folder, "valid")
    model = load_model(olmoe.folder).train()
    found, targets = held_out_loss(model, items, micro_batch, ALONE)
    total = 0.0
    for item in items:
        [(start, end)] = item.spans
        labels = [-100] * start + item.ids[start:end]
        total += olmoe.hf(torch.tensor([item.ids]), labels=torch.tensor([labels])).loss.item() * (end - start)
    assert targets == sum(end - start for item in items for start, end in item.spans)
    assert found == pytest.approx(total / targets, abs=1e-5)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_rows_of_text_alone_are_evaluated_by_their_loss_which_is_that_of_transformers(olmoe, tmp_path):
    texts = ["1 + 2 = 3", "the 4 is 4 + 0", "7"]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    flags = f"base --task own --eval-data {tmp_path}/text.jsonl --dtype float32 --out {tmp_path}/out".split()
    result = evaluate.main(flags)
    total, targets, words = 0.0, 0, read_json(Path("base/tokenizer.json"))["model"]["vocab"]
    for text in texts:
        ids = torch.tensor([[words[word] for word in text.split()] + [words["<eos>"]]])
        total += olmoe.hf(ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        targets += ids.shape[1] - 1
    assert (result["loss"], result["num_targets"]) == (pytest.approx(total / targets, abs=1e-5), targets)
    items = read_lines(tmp_path / "out" / "items.jsonl")
    assert [(item["prompt"], item["completion"], item["reference"]) for item in items] == [("", "", t) for t in texts]


@pytest.mark.parametrize("method", TRAINED_APART)
def test_a_killed_run_that_is_resumed_has_the_validations_and_the_best_and_last_of_one_left_alone(
    method, tmp_path, monkeypatch
):
    flags = [*VALID, "--save-every", "2"]
    uncut, cut, real = tmp_path / "uncut", tmp_path / "cut", training_step.batch_gradients
    whole = run(uncut, *flags, method=method)
    stages = ["stage-d", "."] if METHODS[method].sparse else ["."]
    for killed, stage in enumerate(stages):  # in each stage, two steps after its first checkpoint
        calls = []

        def broken(*args, calls=calls, stage=stage, **kwargs):
            started = (cut / stage / "checkpoint").is_dir()
            calls.append(started)
            if calls.count(True) == 2:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(training_step, "batch_gradients", broken)
        with pytest.raises(KeyboardInterrupt):
            run(cut, *flags, *["--resume"] * killed, method=method)
    monkeypatch.setattr(training_step, "batch_gradients", real)
    resumed = run(cut, *flags, "--resume", method=method)
    kind = "adapter" if METHODS[method].experts else "model"
    for stage in stages:
        for key in ("loss", "valid_loss"):
            assert log(cut / stage, key) == log(uncut / stage, key)
        for name in (kind, BEST[kind]):
            assert same_weights(cut / stage / name, uncut / stage / name)
        kept = [read_json(out / stage / BEST[kind] / "validation.json") for out in (uncut, cut)]
        losses = log(uncut / stage, "valid_loss")
        assert kept[0] == kept[1] == {"step": 1 + losses.index(min(losses)), "valid_loss": min(losses)}
    names = ("last_valid_loss", "best_valid_loss", "best_step")
    assert [whole[name] for name in names] == [resumed[name] for name in names]
    assert [whole[name] for name in names] == [losses[-1], min(losses), 1 + losses.index(min(losses))]


def test_the_best_result_is_that_of_a_run_which_ends_at_its_step(tmp_path):
    best = run(tmp_path / "long", *VALID)["best_step"]
    assert 1 <= best < STEPS  # or this test would show nothing
    run(tmp_path / "short", "--steps", str(best))
    assert same_weights(tmp_path / "long/adapter-best", tmp_path / "short/adapter")
    assert not same_weights(tmp_path / "long/adapter", tmp_path / "short/adapter")
    assert (tmp_path / "long/adapter-best/adapter.json").read_text() == (
        tmp_path / "short/adapter/adapter.json"
    ).read_text()


def cut_after(step: int, out: Path, monkeypatch, *flags: str) -> None:
    """A run that is killed in the step after this one."""
    real = training_step.batch_gradients

    def broken(*args, **kwargs):
        if (out / "log.jsonl").exists() and len(log(out, "step")) == step:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training_step, "batch_gradients", broken)
        run(out, *flags)


@pytest.mark.parametrize("first, flags", [(3, ["--patience", "1"]), (5, [])])
def test_an_extended_run_is_a_straight_one_also_where_it_first_ended_between_two_validations(first, flags, tmp_path):
    flags = words(VALID[:2], "--valid-every 2 --lr 0.02 --save-every 3", flags)
    straight, extended = tmp_path / "straight", tmp_path / "extended"
    whole = run(straight, *flags)
    short = run(extended, *flags, "--steps", str(first))
    assert short["last_valid_loss"] is not None
    result = run(extended, *flags, "--resume")
    for key in ("step", "loss", "valid_loss"):
        assert log(extended, key) == log(straight, key)
    names = ("steps", "best_step", "best_valid_loss", "last_valid_loss")
    assert [result[name] for name in names] == [whole[name] for name in names]
    for name in ("adapter", "adapter-best"):
        assert same_weights(extended / name, straight / name)


@pytest.mark.parametrize("killed, steps", [(3, 3), (5, 7)])
def test_a_run_that_is_killed_and_ends_sooner_keeps_the_best_of_the_steps_that_it_has(
    killed, steps, tmp_path, monkeypatch
):
    """Every validation is better than the one before; the newest checkpoint is that of step 2 or of step 4."""
    losses = {step: 9.0 - step for step in range(1, 8)}
    monkeypatch.setattr(Validation, "measure", lambda self: losses[self.step])
    out, flags = tmp_path / "run", [*VALID, "--save-every", "2"]
    cut_after(killed, out, monkeypatch, *flags)
    for step in range(killed // 2 * 2 + 1, 8):
        losses[step] = 20.0  # from here on it gets worse: the best is the checkpoint's
    result = run(out, *flags, "--steps", str(steps), "--resume")
    run(tmp_path / "straight", *flags, "--steps", str(killed // 2 * 2))
    assert (result["best_step"], result["last_valid_loss"]) == (killed // 2 * 2, losses[steps])
    assert read_json(out / "adapter-best/validation.json")["step"] == result["best_step"]
    assert same_weights(out / "adapter-best", tmp_path / "straight/adapter")
    assert not list(out.glob(".adapter*"))


def test_two_processes_validate_as_one_does(tmp_path):
    flags = [*VALID, "--lr", "0.001"]  # AdamW turns rounding into steps
    one = run(tmp_path / "one", *flags)
    command = words("--model base", FLAGS, "--sample 1 --rank 4", flags, "--shard full --out", tmp_path / "two")
    on_processes(2, train.main, command)
    two = read_json(tmp_path / "two/result.json")
    assert log(tmp_path / "two", "valid_loss") == pytest.approx(log(tmp_path / "one", "valid_loss"), abs=1e-5)
    assert two["best_step"] == one["best_step"]
    ours, theirs = weights(tmp_path / "one/adapter-best"), weights(tmp_path / "two/adapter-best")
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-5


# -------------------------------------------------------------------------------------------------------- patience


def test_patience_is_the_number_of_validations_after_the_best():
    losses = [(2, 5.0), (4, 3.0), (6, 4.0), (8, 3.0), (10, math.nan)]
    assert best_of(losses) == (4, 3.0) and best_of([(1, math.nan)]) is None
    assert [out_of_patience(losses[:n], 2) for n in range(6)] == [False, False, False, False, True, True]
    assert not out_of_patience(losses, None) and not out_of_patience(losses, 4)
    assert out_of_patience([(1, math.nan), (2, math.inf)], 2)


@pytest.mark.parametrize("method", ["hellora", "lori-s", "fft"])
def test_a_run_out_of_patience_stops_says_so_and_is_finished(method, tmp_path, monkeypatch, capsys):
    out, flags = tmp_path / "run", words(VALID, "--patience 2 --save-every 1")
    losses = itertools.cycle([3.0, 2.0, 4.0, 5.0])  # in each stage
    monkeypatch.setattr("run.validation.held_out_loss", lambda *args: (next(losses), 1))
    result = run(out, *flags, method=method)
    said = capsys.readouterr().out
    assert (result["steps"], result["best_step"], result["planned_steps"]) == (4, 2, STEPS)
    assert f"stopping after step {result['steps']}; the best is that of step {result['best_step']}" in said
    assert len(log(out, "step")) == result["steps"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run(out, *flags, method=method) == result == run(out, *flags, "--resume", method=method)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    # Killed when it had stopped and saved, but not yet written its result, it does no further step.
    for name in ("result.json", "adapter", "model"):
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink(missing_ok=True)
    real, steps = training_step.batch_gradients, []
    monkeypatch.setattr(training_step, "batch_gradients", lambda *a, **k: steps.append(1) or real(*a, **k))
    again = run(out, *flags, "--resume", method=method)
    assert not steps and again["steps"] == result["steps"] and again["best_step"] == result["best_step"]


def test_a_run_that_starts_from_one_with_patience_starts_from_its_best_and_notices_another_best(tmp_path, capsys):
    run(tmp_path / "first", *VALID, "--patience", "2", "--seed", "3")
    once, losses = "--steps 1 --lr 1e-12 --batch 3 --task own --train-data train.jsonl --init-adapter", {}
    for start in ("first", "first/adapter", "first/adapter-best"):
        out = tmp_path / start.replace("/", "-from-")
        losses[start] = call(train, once, tmp_path / start, "--out", f"{out}-next")["first_loss"]
    assert losses["first"] == losses["first/adapter-best"] != losses["first/adapter"]
    again = words(once, tmp_path / "first", "--out", tmp_path / "first-next")
    call(train, again)
    assert "the run starts from the best by validation loss" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "first/adapter-best")
    shutil.copytree(tmp_path / "first/adapter", tmp_path / "first/adapter-best")
    with pytest.raises(InputError, match="what --init-adapter names changed"):
        call(train, again)


def test_with_patience_the_best_is_what_the_other_commands_take_and_without_it_the_last(tmp_path, capsys):
    for flags, name in ((VALID, "adapter"), ([*VALID, "--patience", "2"], "adapter-best")):
        out = tmp_path / name
        run(out, *flags)
        assert Subject(str(out)).adapter == out / name
        for asked, there in ((out, name), (out / "adapter", "adapter"), (out / "adapter-best", "adapter-best")):
            capsys.readouterr()
            subject = Subject(str(asked)).load(torch.float32)
            want = load_model("base")
            adapters.load_adapter(want, out / there)
            ids = torch.arange(2, 14).view(2, 6)
            assert torch.allclose(subject(ids)[0], want(ids)[0], atol=1e-4)
            assert ("the best of the run" in capsys.readouterr().err) == (there == "adapter-best")
        call(export, out, "--to peft --out", tmp_path / f"{name}-peft")
        assert (f"{out / name}: the best of the run" in capsys.readouterr().out) == (name == "adapter-best")


# ------------------------------------------------------------------------------------------------- rows held out


def test_evaluate_measures_the_loss_that_validation_had(tmp_path, capsys):
    result = run(tmp_path / "run", *VALID)
    for name, loss in (("adapter", result["last_valid_loss"]), ("adapter-best", result["best_valid_loss"])):
        flags = words("--eval-data valid.jsonl --max-new-tokens 3 --batch 2 --out", tmp_path / name)
        score = call(evaluate, tmp_path / "run" / name, flags)
        assert score["loss"] == pytest.approx(loss, abs=1e-5)
        assert score["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
        assert (score["num_total"], score["num_targets"]) == (5, sum(x.num_targets for x in items_of(Path(), "valid")))
        kept = read_lines(tmp_path / name / "items.jsonl")
        rows = read_lines(Path("valid.jsonl"))
        assert [(item["prompt"], item["reference"]) for item in kept] == [tuple(row.values()) for row in rows]
        assert all(isinstance(item["completion"], str) for item in kept)
        assert re.search(r"^loss \d+\.\d{4} nats per target token, perplexity ", capsys.readouterr().out, re.M)


def test_a_share_is_held_out_at_random_by_seed_and_is_not_trained_on(tmp_path, monkeypatch):
    items = list(range(40))
    rest, held_out = split(items, 0.1, seed=3)
    assert len(held_out) == 4 and sorted(rest + held_out) == items and held_out != items[:4]
    assert split(items, 0.1, seed=3) == (rest, held_out) != split(items, 0.1, seed=4)
    with pytest.raises(InputError, match="--valid-share 0.5 of 1 examples leaves none to train on"):
        split([0], 0.5, seed=0)
    seen, real = [], training_step.batch_gradients
    step = lambda model, items, *a, **k: seen.extend(items) or real(model, items, *a, **k)  # noqa: E731
    monkeypatch.setattr(training_step, "batch_gradients", step)
    run(tmp_path / "run", "--valid-share 0.2")
    rest, held_out = split(items_of(Path(), "train"), 0.2, seed=0)
    assert {item.example for item in seen} == {item.example for item in rest}
    assert [bool(loss) for loss in log(tmp_path / "run", "valid_loss")] == [False, False, True] * 2 + [False]


def test_rows_that_are_trained_on_are_noted_and_others_are_not(tmp_path, capsys):
    said = "10 of 10 rows to validate on are among the rows to train on"
    Path("copy.jsonl").write_text(Path("train.jsonl").read_text())
    Path("twice.jsonl").write_text(2 * Path("train.jsonl").read_text().splitlines(keepends=True)[0])
    run(tmp_path / "copy", "--valid-data copy.jsonl --steps 1")
    assert said in capsys.readouterr().err
    run(tmp_path / "share", "--train-data twice.jsonl --valid-share 0.5 --steps 1")
    assert "1 of 1 rows to validate on are among" in capsys.readouterr().err
    run(tmp_path / "other", "--valid-data valid.jsonl --steps 1")
    assert "among the rows" not in capsys.readouterr().err


def test_a_run_is_not_resumed_on_other_validation_rows(tmp_path):
    Path("changing.jsonl").write_text(Path("valid.jsonl").read_text())
    flags = "--valid-data changing.jsonl --save-every 1 --steps 1"
    run(tmp_path / "run", flags)
    Path("changing.jsonl").write_text(Path("valid.jsonl").read_text().replace("the 7", "the 8"))
    with pytest.raises(InputError, match="the validation data changed since the run"):
        run(tmp_path / "run", flags, "--steps 2 --resume")
