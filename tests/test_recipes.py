"""Recipes: a paper's settings all at once, printed, recorded, overridden by flags, and followed by evaluate.py."""

import json
from dataclasses import asdict, replace

import pytest
from conftest import call, read_json, words

import data
import evaluate
import train
from recipes.papers import FILES, PAPERS
from run.settings import parse_settings

PUBLISHED = {  # by hand, from the papers
    ("hellora", "gsm8k"): dict(method="hellora", rank=32, alpha=64, lr=4e-4, batch=128, epochs=3, schedule="constant"),
    ("hellora", "codealpaca"): dict(rank=32, alpha=64, lr=2e-3, batch=128, epochs=2, lora_dropout=0, targets="all"),
    ("hellora", "saferpaca"): dict(rank=32, alpha=64, lr=4e-4, batch=128, epochs=1, sample=0.1, count_on="lora"),
    ("moe-sieve", "gsm8k"): dict(
        method="moe-sieve", rank=32, alpha=64, lr=4e-4, batch=64, epochs=3, schedule="linear", lr_warmup=None,
        lora_dropout=0.05, max_length=2048, loss_on="all", sample=1, count_on="base", prompt="question",
        targets="shared",
    ),
    ("dr-lora", "gsm8k"): dict(
        method="dr-lora", rank=16, alpha=32, lr=2e-5, batch=48, steps=3750, epochs=None, schedule="linear",
        lr_warmup=0.03, lora_dropout=0.1, weight_decay=0,
    ),
}  # fmt: skip


@pytest.mark.parametrize("recipe, task", PUBLISHED)
def test_a_recipe_is_what_its_paper_says(recipe, task):
    settings = asdict(parse_settings(["--recipe", recipe, "--task", task]))
    wanted = PUBLISHED[recipe, task]
    assert {name: settings[name] for name in wanted} == wanted and settings["recipe"] == recipe


@pytest.mark.parametrize("recipe, benchmark", FILES, ids="-".join)
def test_a_recipe_is_accepted_for_every_task_of_its_benchmark_and_as_a_file(recipe, benchmark):
    tasks = [task for task, row in data.TASKS.items() if row.benchmark == benchmark]
    assert len(tasks) == 2  # a real one, and an embedded one
    for task in tasks:
        named = parse_settings(words("--recipe", recipe, "--task", task, "--lr 0.125"))
        assert named.method == recipe
        assert named.lr_warmup == PUBLISHED.get((recipe, "gsm8k"), {}).get("lr_warmup")  # not the embedded task's
        assert parse_settings(["--task", task, f"@{FILES[recipe, benchmark]}", "--lr", "0.125"]) == replace(
            named, recipe=None
        )


def test_any_flag_overrides_a_recipe_also_with_the_value_that_is_otherwise_the_default():
    given = "--method lora --max-length 512 --sample 0.1 --steps 7 --lora-dropout 0"
    settings = parse_settings(words("--recipe moe-sieve --task gsm8k", given))
    found = settings.method, settings.max_length, settings.sample, settings.steps, settings.lora_dropout
    assert found == ("lora", 512, 0.1, 7, 0.0) and settings.epochs is None
    assert (settings.batch, settings.targets, settings.schedule) == (64, "shared", "linear")
    assert parse_settings(words("--recipe dr-lora --task gsm8k --epochs 2")).steps is None


def test_a_recipe_leaves_an_adapter_to_start_from_its_method(tmp_path):
    call(train, "--method lora --rank 3 --steps 1 --batch 3 --out", tmp_path / "run")
    settings = parse_settings(words("--recipe moe-sieve --init-adapter", tmp_path / "run"))
    assert (settings.method, settings.experts, settings.batch) == ("lora", None, 64)


@pytest.mark.parametrize("recipe", PAPERS)
def test_a_recipe_runs_is_printed_and_recorded_and_evaluate_follows_it(recipe, tmp_path, capsys):
    small = "--steps 2 --batch 3 --sample 0.005 --rank 8 --alpha 16"
    call(train, "--recipe", recipe, small, "--out", tmp_path / "run")
    said = capsys.readouterr().out
    assert f"--recipe {recipe}, for tiny-math, sets --method {recipe} " in said and "Not from the paper" in said
    assert "--batch" not in said and "--steps" not in said and "--epochs" not in said  # given otherwise
    about = read_json(tmp_path / "run/config.json")["settings"]
    assert about["recipe"] == recipe and about["loss_on"] == ("all" if recipe == "moe-sieve" else "answer")
    out = words("--limit 2 --max-new-tokens 2 --out", tmp_path / "out")
    call(evaluate, tmp_path / "run", out)
    first = json.loads((tmp_path / "out/items.jsonl").read_text().splitlines()[0])["prompt"]
    assert first.startswith("Question: ") == (about["prompt"] == "question" or recipe == "dr-lora")
    assert first.count("Question: ") == {"dr-lora": 9, "moe-sieve": 1}.get(recipe, 0)


def test_the_question_prompt_is_the_one_that_shown_examples_have_and_the_answer_is_the_files():
    asked, shown = (data.load_examples("tiny-math", "test", prompt=prompt)[0] for prompt in ("question", "lori"))
    assert asked.prompt == data.show_examples([shown], [])[0].prompt
    assert asked.prompt + asked.answer == f"Question: {shown.row['question']}\nAnswer: {shown.row['answer']}"
