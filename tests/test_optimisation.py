"""Settings of training that are off by default on real tasks: schedules, weight decay, what is learnt, dropout."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import call, read_lines, words
from safetensors.torch import load_file

import data
import hellora
import train
from command.cli import InputError
from machine.processes import ALONE
from model import load_model, read_config
from run import adapters
from run.schedule import SCHEDULES, rate, warmup_steps
from run.settings import parse_settings
from training_step import batch_gradients

STEPS, BATCH = 6, 3


def flags(base: Path, out: Path, *more: str) -> list[str]:
    sizes = words("--rank 4 --steps", STEPS, "--batch", BATCH, "--sample 0.005 --lr 0.01")
    return words("--model", base, "--method lora", sizes, "--out", out, *more)


def records(out: Path) -> list[dict]:
    return read_lines(out / "log.jsonl")


# ---------------------------------------------------------------------------------------------- rate and decay


def scheduler(schedule: str, optimizer: torch.optim.Optimizer, warmup: int, steps: int):
    """transformers' own."""
    name = "constant_with_warmup" if schedule == "constant" else schedule
    return transformers.get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


@pytest.mark.parametrize("warmup", [None, 5, 0.3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_rate_of_every_step_is_that_of_transformers_scheduler(schedule, warmup):
    steps, optimizer = 17, torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    arguments = transformers.TrainingArguments(warmup_steps=warmup or 0, use_cpu=True)  # below 1 it is a share
    theirs = scheduler(schedule, optimizer, arguments.get_warmup_steps(steps), steps)
    for step in range(1, steps + 1):
        got = rate(0.3, schedule, step, steps, warmup_steps(warmup, steps))
        assert got == pytest.approx(theirs.get_last_lr()[0], rel=1e-12, abs=1e-18)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_takes_the_steps_of_torchs_adamw_under_transformers_scheduler_and_logs_the_rate(schedule, base, tmp_path):
    chosen = words("--schedule", schedule, "--lr-warmup 2 --weight-decay 0.3 --loss-on all")
    train.main(flags(base, tmp_path / "run", *chosen))
    got = load_file(tmp_path / "run/adapter/adapter.safetensors")

    config, model = read_config(base), load_model(base)
    hellora.attach(model, torch.ones(4, 7, dtype=torch.bool), 4, 16.0)
    tokenizer, examples = data.load_tokenizer(base, config), data.load_examples("tiny-math", "train")
    whole = [data.Encoded(i.ids, ((1, len(i.ids)),)) for i in data.encode(examples, tokenizer, config.eos_token_id)]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.3)
    theirs, logged = scheduler(schedule, optimizer, 2, STEPS), []
    for _, batch in data.numbered_batches(len(whole), BATCH, 0, 1, STEPS):
        done = batch_gradients(model.train(), [whole[i] for i in batch], 16, ALONE)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        logged.append((theirs.get_last_lr()[0], done.loss.item(), done.tokens - BATCH))
        optimizer.step()
        theirs.step()
        optimizer.zero_grad()
    for name, tensor in adapters.adapter_state(model).items():
        torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5)  # a thousandth of one step
    found = [(record["lr"], record["loss"], record["target_tokens"]) for record in records(tmp_path / "run")]
    assert found == [pytest.approx(record, rel=1e-5) for record in logged]


def test_a_run_goes_on_only_under_the_schedule_and_for_the_steps_it_began_with(base, tmp_path):
    given = flags(base, tmp_path / "run", "--schedule linear --save-every 2")
    train.main(given)
    with pytest.raises(InputError, match="schedule linear then, cosine now"):
        call(train, given, "--schedule cosine --resume")
    with pytest.raises(InputError, match="saved with steps 6, now it is 8"):
        call(train, given, "--steps 8 --resume")


@pytest.mark.parametrize("task", ["tiny-math", "tiny-code", "tiny-safety"])
def test_the_rate_of_an_embedded_task_falls_after_a_warm_up_unless_flags_say_otherwise(task):
    settings = parse_settings(["--task", task])
    assert (settings.lr, settings.schedule, settings.lr_warmup) == (6e-3, "linear", 0.1)
    for none in ("0", "0.0", "0."):
        settings = parse_settings(words("--task", task, "--schedule constant --lr-warmup", none))
        assert (settings.schedule, settings.lr_warmup) == ("constant", None)
    assert parse_settings(["--task", task, "--lr-warmup", "20"]).lr_warmup == 20


@pytest.mark.parametrize("task", ["gsm8k", "codealpaca", "saferpaca", "own"])
def test_the_rate_of_other_tasks_is_constant(task):
    settings = parse_settings(["--task", task, "--train-data", "rows.jsonl"])
    assert (settings.schedule, settings.lr_warmup) == ("constant", None)


def test_a_share_of_the_steps_leaves_one_step_after_the_warm_up_and_a_number_must():
    assert [warmup_steps(share, steps) for share, steps in ((0.1, 1), (0.9, 2), (0.99, 10), (0.1, 125))] == [
        0,
        1,
        9,
        13,
    ]
    with pytest.raises(InputError, match="--lr-warmup 3: 3 steps of warm-up in a run of 3"):
        warmup_steps(3, 3)
