"""Evaluating: a model's own completions or a file of them, in one process or two, whole or interrupted."""

import datetime
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import call, on_processes, read_json, read_lines, words, write_json, write_lines
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import data
import evaluate
import export
import hellora
from command.cli import InputError
from model import load_model, save_model
from run import adapters
from run.settings import parse_settings
from run.subject import base_content
from scoring import statistics
from scoring.comparison import problems_digest

ROOT = Path(evaluate.__file__).parent
SAFETY = "--task saferpaca --eval-data"


def run(*argv) -> dict:
    return call(evaluate, *argv)


@pytest.fixture(scope="module")
def checkpoint(make_checkpoint, tmp_path_factory) -> Path:
    """A random model and a tokenizer whose tokens are bytes: a folder as the hub stores it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<eos>", "<pad>", *alphabet])}, []))
    tokenizer.add_special_tokens(["<eos>", "<pad>"])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    source = make_checkpoint("olmoe", vocab_size=264).folder
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((source / name).read_bytes())
    return folder


@pytest.fixture
def gsm8k(tmp_path) -> Path:
    """Seven problems; the answer of problem i is 10 + i."""
    rows = [{"question": f"What is {i} + 10?", "answer": f"It is 10 + {i}.\n#### {10 + i}"} for i in range(7)]
    return write_lines(tmp_path / "problems.jsonl", rows)


# ------------------------------------------------------------------------------------------- a file of completions


def test_a_file_in_any_order_is_scored_in_the_order_of_the_task(gsm8k, tmp_path, capsys):
    texts = ["The final answer is: 10", "11", "wrong 1", "The final answer is: 13.0", "", "#### 15", "16 or 17"]
    lines = [{"id": i if i % 2 else str(i), "completion": text} for i, text in enumerate(texts)]
    file = write_lines(tmp_path / "completions.jsonl", lines[::-1])
    score = run("--task gsm8k --eval-data", gsm8k, "--completions", file, "--out", tmp_path / "out")
    saved = read_json(tmp_path / "out" / "score.json")
    assert saved["accuracy"] == score["accuracy"] == pytest.approx(4 / 7)
    assert (saved["num_correct"], saved["num_total"]) == (4, 7)
    assert saved["rates"]["strict-match"]["num_correct"] == 2
    assert saved["rates"]["flexible-extract"]["num_correct"] == 3
    items = read_lines(tmp_path / "out" / "items.jsonl")
    assert [item["id"] for item in items] == [str(i) for i in range(7)]
    assert [item["correct"] for item in items] == [True, True, False, True, False, True, False]
    assert [item["extracted"] for item in items] == ["10", "11", "1", "13.0", None, "15", "17"]
    assert [item["completion"] for item in items] == texts
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "accuracy 0.571 (4/7, 95% CI 0.250..0.842) on gsm8k, rule: first marked answer"


def test_partial_and_limit_say_how_many_examples_count(gsm8k, tmp_path):
    file = write_lines(tmp_path / "c.jsonl", [{"id": i, "completion": f"{10 + i}"} for i in (0, 1, 2, 5)])
    task = words("--task gsm8k --eval-data", gsm8k, "--completions", file)
    assert run(*task, "--partial")["num_total"] == 4
    assert run(*task, "--limit 3")["num_total"] == 3
    assert run(*task, "--limit 4 --partial")["num_total"] == 3
    with pytest.raises(InputError, match=r"no completion for 1 of 4 ids \(3\)"):
        run(*task, "--limit 4")


def test_every_rule_can_be_the_one_that_counts_for_refusals(tmp_path):
    rows = tmp_path / "prompts.csv"
    rows.write_text("prompt,type,label\nPop it,theft,unsafe\nEat it,mess,unsafe\nWash it,none,safe\n")
    texts = ["Well, I cannot do that for you", "Here is how to do that", "Here is how to do that"]
    file = write_lines(tmp_path / "c.jsonl", [{"id": i, "completion": text} for i, text in enumerate(texts)])
    for rule, refused in ((None, 1), ("lori", 1), ("advbench", 1), ("xstest", 0)):
        flags = ["--refusal-rule", rule] if rule else []
        score = run(SAFETY, rows, "--completions", file, *flags)
        assert (score["num_correct"], score["num_total"]) == (refused, 2)
        assert score["rule"] == (rule or "lori")


# ------------------------------------------------------------------------------------------------------ programs


PROBLEMS = [
    {
        "task_id": f"own/{name}",
        "prompt": f'def {name}(x):\n    """{name} it."""\n',
        "entry_point": name,
        "test": f"def check(candidate):\n    assert candidate(3) == {value}\n    assert candidate(0) == {zero}\n",
    }
    for name, value, zero in (("double", 6, 0), ("square", 9, 0))
]


T, F = True, False


def test_several_lines_per_id_are_samples_and_bigcodes_rule_is_reported_beside(tmp_path, capsys):
    problems = write_lines(tmp_path / "problems.jsonl", PROBLEMS)
    texts = {
        "own/double": ["    return 2 * x\n", "    return 7\n", "    return x +\n", "    return x + x"]
        + ["    pass"] * 2,
        "own/square": ["    return x * x"] * 4 + ["```python\n    return x * x\n```", "    return x ** 2\nprint(1)"],
    }
    lines = [{"id": name, "completion": text} for name, found in texts.items() for text in found]
    file = write_lines(tmp_path / "c.jsonl", lines)
    task = words("--task codealpaca --eval-data", problems, "--allow-code-execution")
    score = run(*task, "--completions", file, "--out", tmp_path / "out")
    assert score["pass@1"] == pytest.approx((2 / 6 + 6 / 6) / 2)
    assert score["pass@5"] == pytest.approx(1.0)  # 4 of 6 fail: no five samples fail together
    assert (score["num_correct"], score["num_total"], score["num_problems"]) == (8, 12, 2)
    assert score["rates"]["pass@1, bigcode"]["rate"] == pytest.approx((2 / 6 + 5 / 6) / 2)  # the fence is not Python
    assert "pass@10" not in score
    items = read_lines(tmp_path / "out" / "items.jsonl")
    assert [item["correct"] for item in items] == [T, F, F, T, F, F] + [T, T, T, T, T, T]
    assert items[0]["extracted"] == "passed"
    assert "assert candidate(3) == 6" in items[1]["extracted"] and "SyntaxError" in items[2]["extracted"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("pass@1 0.667 (1.3333/2, 95% CI ")


def test_a_text_has_one_score_whether_it_was_generated_or_comes_from_a_file_and_uncut_runs_it_as_it_is(
    checkpoint, tmp_path, monkeypatch
):
    """Every way of writing the answer down, as a model's own text and as a file."""
    good, prompt = "    return 2 * x\n", PROBLEMS[0]["prompt"]
    texts = [
        f"\n{good}\n\ndef check(candidate): pass",
        f"```python\n{good}```\nIt doubles.",
        f"Of course:\n```python\n{prompt}{good}```",
        f"def twice(x):\n{good}\ndef double(x):\n    return twice(x)\n",
        f"\n{prompt}{good}\nif __name__ == '__main__': bad(",
        "\n    return 3",
    ]
    problems = write_lines(tmp_path / "problems.jsonl", PROBLEMS[:1])

    def write(model, tokenizer, prompts, todo, decoding, **options):
        return [(i, sample, texts[sample], False) for i, sample in todo]

    monkeypatch.setattr(evaluate, "complete", write)
    task = words("--task codealpaca --eval-data", problems, "--allow-code-execution")
    run(checkpoint, *task, "--samples", len(texts), "--out", tmp_path / "generated")
    lines = [{"id": "own/double", "completion": text} for text in texts]
    file = write_lines(tmp_path / "c.jsonl", lines)
    run(*task, "--completions", file, "--out", tmp_path / "given")
    items = read_lines(tmp_path / "generated" / "items.jsonl")
    assert items == read_lines(tmp_path / "given" / "items.jsonl")
    assert [item["correct"] for item in items] == [T, T, T, T, T, F]
    for rule, expected in (("uncut", [T, F, F, T, F, F]), ("bigcode", [T, F, F, F, F, F])):
        run(*task, "--completions", file, "--code-rule", rule, "--out", tmp_path / rule)
        assert [item["correct"] for item in read_lines(tmp_path / rule / "items.jsonl")] == expected


def test_without_isolation_code_runs_only_if_the_user_allows_it(tmp_path, monkeypatch):
    problems = write_lines(tmp_path / "problems.jsonl", PROBLEMS[:1])
    file = write_lines(tmp_path / "c.jsonl", [{"id": "own/double", "completion": "    return 2 * x"}])
    task = words("--task codealpaca --eval-data", problems, "--completions", file)
    monkeypatch.setattr("scoring.sandbox.protection", lambda: "limits only")
    with pytest.raises(InputError, match="would run with limits only.*pass --allow-code-execution"):
        run(*task)
    assert run(*task, "--allow-code-execution")["pass@1"] == 1.0

    def no_sandbox():
        raise RuntimeError("no sandbox starts here")

    monkeypatch.setattr("scoring.sandbox.protection", no_sandbox)
    with pytest.raises(InputError, match="programs cannot be run: no sandbox starts here"):
        run(*task, "--allow-code-execution")


# -------------------------------------------------------------------------------------------------------- a model


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def generated(checkpoint, gsm8k, out) -> Callable[..., dict]:
    """generated("--limit 3"): the score of what the model itself answers to the seven problems."""

    def answer(*flags, model: Path = checkpoint) -> dict:
        return run(model, "--task gsm8k --eval-data", gsm8k, "--max-new-tokens 6 --batch 3 --out", out, *flags)

    return answer


def completions(folder: Path) -> list[str]:
    return [item["completion"] for item in read_lines(folder / "items.jsonl")]


@pytest.mark.parametrize("place", ["config.json", "generation_config.json"])
def test_a_completion_ends_at_any_eos_token_of_either_config_as_in_transformers(
    generated, checkpoint, make_checkpoint, tmp_path, capsys, place
):
    generated("--max-new-tokens 12", "--out", tmp_path / "free")
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    hf = make_checkpoint("olmoe", vocab_size=264).hf
    prompts = [item["prompt"] for item in read_lines(tmp_path / "free" / "items.jsonl")]
    inputs = [torch.tensor([tokenizer.encode(prompt).ids]) for prompt in prompts]
    free = [hf.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=1)[0, ids.shape[1] :] for ids in inputs]
    ends = [0, int(free[0][3]), int(free[1][5])]
    shutil.copytree(checkpoint, tmp_path / "model")
    file = tmp_path / "model" / place
    about = read_json(file) if file.exists() else {}
    write_json(file, about | {"eos_token_id": ends if place == "config.json" else ends[1:]})
    generated("--max-new-tokens 12", model=tmp_path / "model")
    for ids, item in zip(inputs, read_lines(tmp_path / "out" / "items.jsonl"), strict=True):
        theirs = hf.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=ends, pad_token_id=1)[0].tolist()
        wanted = tokenizer.decode([token for token in theirs if token not in ends[1:]])
        assert wanted == item["prompt"] + item["completion"]
    assert min(len(item["completion"]) for item in read_lines(tmp_path / "out" / "items.jsonl")) <= 5


def test_a_model_that_names_no_eos_token_is_said_to_run_on(generated, checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "model")
    about = read_json(checkpoint / "config.json")
    del about["eos_token_id"]
    write_json(tmp_path / "model" / "config.json", about | {"eos_token_id": None})
    generated(model=tmp_path / "model")
    assert "names no eos_token_id: completions end after 6 tokens" in capsys.readouterr().err
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": ["</s>"]}')
    with pytest.raises(InputError, match="/generation_config.json: eos_token_id is .*expected token ids from 0 to 263"):
        generated(model=tmp_path / "model")


def test_shots_are_the_first_training_problems_and_the_answer_ends_where_another_question_begins(
    generated, checkpoint, make_checkpoint, tmp_path, monkeypatch, out
):
    rows = [{"question": f"Q{i}?", "answer": f"<<{i}+1={i + 1}>>\n#### {i + 1}"} for i in range(3)]
    train = write_lines(tmp_path / "train.jsonl", rows)
    flags = words("--train-data", train, "--max-new-tokens 40 --shots 2")
    generated(flags)
    free = completions(out)
    word = next(letter for letter in free[0][5:] if letter.isascii() and letter.isprintable())
    monkeypatch.setattr(data, "NEXT_SHOT", word)  # a random model never writes "Question:"
    shown = "Question: Q0?\nAnswer: <<0+1=1>>\n#### 1\n\nQuestion: Q1?\nAnswer: <<1+1=2>>\n#### 2\n\n"
    generated(flags, "--out", tmp_path / "cut")
    for i, item in enumerate(read_lines(tmp_path / "cut" / "items.jsonl")):
        assert item["prompt"] == f"{shown}Question: What is {i} + 10?\nAnswer:"
        assert item["completion"] == free[i].split(word)[0]
    tokenizer, hf = Tokenizer.from_file(str(checkpoint / "tokenizer.json")), make_checkpoint("olmoe", vocab_size=264).hf
    ids = torch.tensor([tokenizer.encode(f"{shown}Question: What is 0 + 10?\nAnswer:").ids])
    found = hf.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=0, pad_token_id=1)[0, ids.shape[1] :]
    assert tokenizer.decode(found.tolist()) == free[0]


def test_no_problem_is_shown_solved_that_is_to_be_solved(generated, gsm8k, tmp_path, capsys):
    rows = [{"question": " what IS 3\n+ 10?", "answer": "#### 13"}, {"question": "Q?", "answer": "#### 2"}]
    train = write_lines(tmp_path / "train.jsonl", rows)
    generated("--shots 1 --limit 2 --train-data", train)
    assert "1 of 2 training problems are not shown: they are test problems" in capsys.readouterr().err
    prompts = [item["prompt"] for item in read_lines(tmp_path / "out" / "items.jsonl")]
    assert all(prompt.startswith("Question: Q?\nAnswer: #### 2\n\nQuestion: What is") for prompt in prompts)
    with pytest.raises(InputError, match="--shots 1: the training data has 0 problems to show"):
        generated("--shots 1 --limit 2 --train-data", gsm8k)


def test_texts_longer_than_the_model_was_made_for_are_said(generated, checkpoint, gsm8k, tmp_path, capsys):
    config = read_json(checkpoint / "config.json")
    for name in ("tokenizer.json", "model.safetensors"):
        (tmp_path / name).write_bytes((checkpoint / name).read_bytes())
    longest = len(data.load_examples("gsm8k", "test", gsm8k)[0].prompt) + 6  # a token is a letter
    for positions, said in ((longest, False), (longest - 1, True)):
        write_json(tmp_path / "config.json", config | {"max_position_embeddings": positions})
        generated(model=tmp_path)
        note = f"prompts of up to {longest - 6} tokens and answers of up to 6 (--max-new-tokens) may exceed the "
        note += f"{positions} positions"
        assert (note in capsys.readouterr().err) == said


def edit(path: Path, **changes) -> None:
    write_json(path, (read_json(path) if path.exists() else {}) | changes)


def edit_a_problem(model: Path, problems: Path) -> None:
    write_lines(problems, [row | {"question": row["question"].replace("1 +", "7 +")} for row in read_lines(problems)])


def edit_weights(model: Path, problems: Path) -> None:
    """In place: same size and same time."""
    path = model / "model.safetensors"
    times, weights = path.stat(), load_file(path)
    weights["lm_head.weight"] = weights["lm_head.weight"].flip(0).contiguous()
    save_file(weights, path, metadata={"format": "pt"})
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def store_in_two_files(model: Path, problems: Path) -> None:
    weights, files = load_file(model / "model.safetensors"), ("model-a.safetensors", "model-b.safetensors")
    (model / "model.safetensors").unlink()
    for i, file in enumerate(files):
        save_file({name: weights[name] for name in list(weights)[i::2]}, model / file)
    index = {name: files[i % 2] for i, name in enumerate(weights)}
    write_json(model / "model.safetensors.index.json", {"weight_map": index})


CHANGES: dict[str | None, Callable[[Path, Path], object]] = {  # what the note must name -> what has changed
    "prompts": edit_a_problem,
    "weights": edit_weights,
    "config.json": lambda model, _: edit(model / "config.json", rms_norm_eps=0.25),
    "generation_config.json, stop_ids": lambda model, _: edit(model / "generation_config.json", eos_token_id=[0, 9]),
    "tokenizer.json": lambda model, _: edit(model / "tokenizer.json", post_processor=None, decoder={"type": "Fuse"}),
    "seed": lambda model, _: "--seed 1",
    None: store_in_two_files,
}


@pytest.mark.parametrize("named", CHANGES)
def test_completions_are_kept_only_if_nothing_that_decides_them_has_changed(
    checkpoint, generated, gsm8k, out, tmp_path, capsys, named
):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    generated("--temperature 1", model=model)
    flags = CHANGES[named](model, gsm8k) or ""
    kept = [record | {"completion": "kept"} for record in read_lines(out / "generations.jsonl")]
    write_lines(out / "generations.jsonl", kept)
    capsys.readouterr()
    generated("--temperature 1", flags, model=model)
    said = capsys.readouterr().err
    assert (f"made with other {named}: starting over" in said) == ("starting over" in said) == bool(named)
    assert set(completions(out)) == {"kept"} if named is None else "kept" not in completions(out)


def test_an_interrupted_evaluation_goes_on_where_it_stopped(generated, out, tmp_path):
    whole = tmp_path / "whole"
    generated("--out", whole)
    generated("--limit 3")
    lines = (out / "generations.jsonl").read_text().splitlines()
    changed = json.loads(lines[0]) | {"completion": "The final answer is: 10"}
    (out / "generations.jsonl").write_text(json.dumps(changed) + "\n" + lines[1] + "\n")
    (out / "generations-0.jsonl").write_text(lines[2][:20])  # torn off by a kill
    score = generated()
    kept = changed["id"]
    found, wanted = read_lines(out / "items.jsonl"), read_lines(whole / "items.jsonl")
    for ours, theirs in zip(found, wanted, strict=True):
        expected = "The final answer is: 10" if ours["id"] == kept else theirs["completion"]
        assert ours["completion"] == expected
    assert score["num_total"] == 7
    assert sorted(path.name for path in out.iterdir()) == [
        "evaluation.json", "generations.jsonl", "items.jsonl", "score.json"
    ]  # fmt: skip


def test_flags_that_change_nothing_keep_the_completions(generated, out, capsys):
    generated()
    kept = [record | {"completion": "kept"} for record in read_lines(out / "generations.jsonl")]
    for flags in ("--shots 0", "--temperature 0", "--bos no", "--batch 2"):
        capsys.readouterr()
        write_lines(out / "generations.jsonl", kept)
        generated(flags)
        assert "starting over" not in capsys.readouterr().err
        assert set(completions(out)) == {"kept"}


@pytest.mark.parametrize("change", [{"cut": None}, {"cut": 0}, {"id": 2}])
def test_a_line_that_is_no_record_of_a_completion_is_made_again(generated, out, change):
    generated()
    file = out / "generations.jsonl"
    first = read_lines(file)
    damaged = {key: value for key, value in (first[2] | change).items() if value is not None}
    write_lines(file, [*first[:2], damaged, *first[3:]])
    generated()
    assert sorted(read_lines(file), key=str) == sorted(first, key=str)


def test_an_earlier_score_is_gone_while_a_folder_is_evaluated_again(generated, gsm8k, tmp_path, monkeypatch, out):
    task = words("--task gsm8k --eval-data", gsm8k, "--out", out)
    texts = write_lines(tmp_path / "texts.jsonl", [{"id": i, "completion": f"#### {10 + i}"} for i in range(7)])

    def stop(*args, **options):
        raise KeyboardInterrupt

    for step, evaluate_again in (("complete", generated), ("score", lambda: run(task, "--completions", texts))):
        generated("--limit 3")
        with pytest.raises(InputError):  # what is refused leaves it
            run(*task, "--completions", write_lines(tmp_path / "few.jsonl", []))
        assert (out / "score.json").exists() and (out / "items.jsonl").exists()
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(evaluate, step, stop)
            evaluate_again()
        assert not (out / "score.json").exists() and not (out / "items.jsonl").exists()
        assert len(read_lines(out / "generations.jsonl")) == 3


def test_answers_that_memory_has_no_room_for_are_one_error_and_leave_what_is_there(generated, out):
    generated()
    before = {path: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match=r"no memory for .* of 3 sequences of 2\d{9} tokens; lower --max-new-tokens"):
        generated("--max-new-tokens", 2**31 - 1)
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_generations_and_items_of_a_folder_are_scored_into_it_again_as_a_file_of_completions(generated, gsm8k, out):
    first = generated()
    for name in ("generations.jsonl", "items.jsonl"):
        again = run("--task gsm8k --eval-data", gsm8k, "--completions", out / name, "--out", out)
        assert again["rates"] == first["rates"] and len(read_lines(out / name)) == 7


def test_a_run_of_training_is_its_base_with_its_adapter_or_the_model_it_wrote(checkpoint, gsm8k, tmp_path):
    lora, full = tmp_path / "lora", tmp_path / "full"
    model = load_model(checkpoint)
    hot = torch.zeros(4, 7, dtype=torch.bool)
    hot[:, :2] = True
    hellora.attach(model, hot, 4, 8.0)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.5, generator=generator)
    adapters.save_adapter(adapters.adapter_state(model), lora / "adapter", model.adapter)
    hellora.merge(model)
    save_model(model, full / "model")
    (full / "model" / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    about = {"model": str(checkpoint), "settings": {"task": "gsm8k"}}
    for folder in (lora, full):
        write_json(folder / "config.json", about)

    flags = ["--eval-data", gsm8k, "--max-new-tokens", 6]
    run(lora, *flags)  # its task and folder follow from the run
    run(lora, *flags, "--dtype bfloat16 --out", tmp_path / "rounded")  # here the adapter stays apart
    run(full, *flags)
    run(full / "model", "--task gsm8k", *flags, "--out", tmp_path / "folder")
    run(checkpoint, "--task gsm8k", *flags, "--out", tmp_path / "base")
    outs = (lora / "evaluation-gsm8k", full / "evaluation-gsm8k", tmp_path / "folder", tmp_path / "base")
    texts = [completions(out) for out in outs]
    assert texts[0] == texts[1] == texts[2] != texts[3]
    rounded = completions(tmp_path / "rounded")
    assert sum(a[:1] == b[:1] for a, b in zip(rounded, texts[0], strict=True)) >= 4, "the adapter got lost"


def test_an_adapter_is_evaluated_and_exported_only_on_the_base_that_it_was_trained_on(
    checkpoint, gsm8k, tmp_path, capsys
):
    base, folder = tmp_path / "base", tmp_path / "run"
    shutil.copytree(checkpoint, base)
    model = load_model(base)
    hellora.attach(model, torch.eye(4, 7, dtype=torch.bool), 4, 8.0)
    adapters.save_adapter(adapters.adapter_state(model), folder / "adapter", model.adapter)
    about = {"model": str(base), "settings": {"task": "gsm8k", "method": "hellora"}, "base": base_content(base)}
    write_json(folder / "config.json", about)
    commands = [
        (evaluate.main, [str(folder), "--eval-data", str(gsm8k), "--max-new-tokens", "2"]),
        (export.main, [str(folder), "--to", "peft", "--out", str(tmp_path / "out")]),
    ]
    config = read_json(base / "config.json")
    for noted in (0, 2):
        for command, argv in commands:
            command(argv)
        write_json(base / "config.json", config | {"rms_norm_eps": 0.25})
        shutil.rmtree(tmp_path / "out")
        note = "config.json changed since the adapter was trained on this base"
        assert capsys.readouterr().err.count(note) == noted
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    for command, argv in commands:
        with pytest.raises(InputError, match="is not the base that this adapter was trained on: the weights differ"):
            command(argv)
    assert not (tmp_path / "out").exists()


def test_two_processes_score_the_same_as_one(checkpoint, tmp_path):
    problems = write_lines(tmp_path / "problems.jsonl", PROBLEMS)
    flags = words("--eval-data", problems, "--max-new-tokens 9 --samples 5 --temperature 1")
    flags = words(checkpoint, "--task codealpaca --allow-code-execution", flags, "--out")
    run(*flags, tmp_path / "one")
    on_processes(2, evaluate.main, [*flags, str(tmp_path / "two")])
    assert read_lines(tmp_path / "two" / "items.jsonl") == read_lines(tmp_path / "one" / "items.jsonl")
    assert len({item["completion"] for item in read_lines(tmp_path / "one" / "items.jsonl")}) > 5


ANSWERLESS = {  # rows that ask -> the rows beside them that have an answer
    '{"prompt": "a", "completion": " "}': {"prompt": "b", "completion": "cd"},
    '{"instruction": "a"}': {"instruction": "b", "output": "cd"},
    '{"messages": [{"role": "user", "content": "a"}]}': {
        "messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "cd"}]
    },
}


@pytest.mark.parametrize("row", ANSWERLESS)
def test_own_rows_without_an_answer_are_completed_and_only_the_others_are_measured(checkpoint, tmp_path, capsys, row):
    model = shutil.copytree(checkpoint, tmp_path / "model")
    template = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[{% endif %}"
    (model / "chat_template.jinja").write_text(template)
    asking, answered = json.loads(row), ANSWERLESS[row]
    flags = words(model, "--task own --max-new-tokens 6 --eval-data")
    for name, rows in {"both": [asking, answered], "answered": [answered], "asking": [asking]}.items():
        write_lines(tmp_path / f"{name}.jsonl", rows)
        run(*flags, tmp_path / f"{name}.jsonl", "--out", tmp_path / name)
        score = read_json(tmp_path / name / "score.json")
        last = capsys.readouterr().out.splitlines()[-1]
        if name == "asking":
            assert (score["loss"], score["num_total"]) == (None, 1)
            assert last == "1 completions on own; no row has an answer whose loss could be measured"
        else:
            assert score["num_answers"] == 1 and score["num_total"] == len(rows) and "target tokens of 1 rows" in last
    both, alone = read_lines(tmp_path / "both" / "items.jsonl"), read_lines(tmp_path / "asking" / "items.jsonl")
    assert both[0] == alone[0] and both[0]["completion"] and "loss" not in both[0]
    measured = read_lines(tmp_path / "answered" / "items.jsonl")[0]
    assert both[1]["loss"] == measured["loss"] > 0 and both[1]["completion"] == measured["completion"]
    if "messages" in row:
        assert both[0]["prompt"] == "[a][" and both[1]["prompt"] == "[b]["


def test_two_evaluations_of_own_rows_are_compared_by_the_loss_of_each_row(checkpoint, tmp_path, capsys):
    rows = [{"prompt": f"{i}", "completion": "abc"[: 1 + i % 3]} for i in range(8)] + [{"prompt": "z"}]
    file = write_lines(tmp_path / "rows.jsonl", rows)
    better = shutil.copytree(checkpoint, tmp_path / "model")
    weights = load_file(better / "model.safetensors")
    weights["lm_head.weight"][Tokenizer.from_file(str(better / "tokenizer.json")).token_to_id("a")] *= 3
    save_file(weights, better / "model.safetensors", metadata={"format": "pt"})
    for model, out in ((checkpoint, "a"), (better, "b")):
        run(model, "--task own --max-new-tokens 2 --eval-data", file, "--out", tmp_path / out)
    losses = [[item["loss"] for item in read_lines(tmp_path / out / "items.jsonl")[:8]] for out in "ab"]
    scores = [read_json(tmp_path / out / "score.json") for out in "ab"]
    targets = [item["num_targets"] for item in read_lines(tmp_path / "a" / "items.jsonl")[:8]]
    assert targets == [2 + i % 3 for i in range(8)]  # EOS too
    mean = sum(map(math.prod, zip(losses[0], targets, strict=True))) / sum(targets)
    assert scores[0]["loss"] == pytest.approx(mean) and scores[0]["num_targets"] == sum(targets)
    lower = [sum(x < y for x, y in zip(*pair, strict=True)) for pair in (losses, losses[::-1])]
    result = run("compare", tmp_path / "a", tmp_path / "b")
    assert result == {"lower_a": lower[0], "lower_b": lower[1], "equal": 0, "p": statistics.mcnemar(*lower)}
    assert f"a: mean loss of a row {sum(losses[0]) / 8:.4f}, 8 rows" in capsys.readouterr().out


def test_tiny_tasks_are_decoded_as_the_full_tasks_with_fewer_tokens():
    for tiny, task in (("tiny-math", "gsm8k"), ("tiny-code", "codealpaca"), ("tiny-safety", "saferpaca")):
        short, long = evaluate.default_decoding(tiny), evaluate.default_decoding(task)
        assert short.max_new_tokens < long.max_new_tokens == 512
        assert (short.temperature, short.top_p, short.samples) == (long.temperature, long.top_p, long.samples)
    code = evaluate.default_decoding("codealpaca")
    assert (code.temperature, code.top_p, code.samples) == (0.2, 0.95, 20)
    assert evaluate.default_decoding("gsm8k").temperature == 0.0


# ------------------------------------------------------------------------------------------------------ comparing


def evaluation(folder: Path, verdicts: list[tuple], problems: str = "") -> Path:
    """A folder with what `compare` reads; verdicts: (id, correct), or (id, correct, label)."""
    folder.mkdir(exist_ok=True)
    write_lines(
        folder / "items.jsonl", [dict(zip(("id", "correct", "label"), item, strict=False)) for item in verdicts]
    )
    write_json(folder / "score.json", {"settings": {"task": "gsm8k"}, "problems": problems})
    return folder


def test_two_evaluations_are_compared_on_the_items_where_they_differ(tmp_path, capsys):
    right = {"a": [T, T, T, T, T, F, F, T, F], "b": [T, F, F, F, F, F, F, F, T]}  # 5 only a, 1 only b
    a = evaluation(tmp_path / "a", [(str(i), correct) for i, correct in enumerate(right["a"])])
    b = evaluation(tmp_path / "b", [(str(i), correct) for i, correct in enumerate(right["b"])][::-1])
    result = run("compare", a, b)
    p = 2 * (math.comb(6, 0) + math.comb(6, 1)) / 2**6
    assert result == {"both": 1, "only_a": 5, "only_b": 1, "neither": 2, "p": pytest.approx(p)}
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == "McNemar exact p 0.2188 on 6 items that differ"
    assert out[0].endswith("a: 0.667 (6/9, 95% CI 0.354..0.879)")


def test_what_else_two_evaluations_differ_in_is_noted(tmp_path, capsys):
    decoded = {"temperature": 0.0, "max_new_tokens": 7, "prompts": "abc", "dtype": "float32", "weights": "x"}
    a, b = (evaluation(tmp_path / name, [("0", T), ("1", F)]) for name in "ab")
    for folder, changes in ((a, {"began": "1"}), (b, {"began": "2", "weights": "y"})):
        write_json(folder / "evaluation.json", decoded | changes)
    run("compare", a, b)
    assert capsys.readouterr().err == ""  # models, and when they were asked, are what is compared
    write_json(b / "evaluation.json", decoded | {"temperature": 0.2, "prompts": "abd", "dtype": "bfloat16"})
    score = read_json(b / "score.json")
    write_json(
        b / "score.json", score | {"settings": score["settings"] | {"code_rule": "lori", "refusal_rule": "lori"}}
    )
    run("compare", a, b)
    noted = capsys.readouterr().err.splitlines()
    said = [
        "code_rule differs: ",
        "dtype differs: ",
        "prompts differs: by --shots",
        f"temperature differs: 0.0 in {a}, 0.2 in {b};",
    ]
    assert len(noted) == 4 and all(text in line for text, line in zip(said, noted, strict=True))
    score["settings"]["completions"] = "given.jsonl"  # scored where an earlier evaluation had generated
    write_json(b / "score.json", score)
    run("compare", a, b)
    assert capsys.readouterr().err == ""


def test_decoding_is_no_reason_for_a_difference_of_losses(tmp_path, capsys):
    folders = [tmp_path / name for name in "ab"]
    for folder, changes in zip(
        folders, ({}, {"temperature": 0.7, "max_new_tokens": 9, "dtype": "bfloat16"}), strict=True
    ):
        evaluation(folder, [("0", T)])
        write_lines(folder / "items.jsonl", [{"id": "0", "loss": 1.5}])
        score = read_json(folder / "score.json")
        write_json(folder / "score.json", score | {"settings": score["settings"] | {"task": "own"}})
        decoded = {"temperature": 0.0, "max_new_tokens": 7, "dtype": "float32"}
        write_json(folder / "evaluation.json", decoded | changes)
    run("compare", *folders)
    [noted] = capsys.readouterr().err.splitlines()
    assert "dtype differs" in noted


def test_evaluations_of_other_problems_with_the_same_ids_are_not_compared(tmp_path):
    problems = {"a": {"question": "3 + 4?", "answer": "7"}, "b": {"question": "2 + 2?", "answer": "4"}}
    same, again = problems_digest(problems), problems_digest(dict(reversed(problems.items())))
    different = problems_digest(problems | {"b": {"question": "2 + 2?", "answer": "5"}})
    assert same == again != different
    assert problems_digest({"c": {"seen": datetime.date(2026, 1, 2), None: ["more"]}})  # of Parquet, and of a long line
    verdicts = [("a", T), ("b", F)]
    a = evaluation(tmp_path / "a", verdicts, problems=same)
    assert run("compare", a, evaluation(tmp_path / "b", verdicts, problems=again))["both"] == 1
    with pytest.raises(InputError, match="a and .*b are of different problems; evaluate both on the same"):
        run("compare", a, evaluation(tmp_path / "b", verdicts, problems=different))


def test_in_a_comparison_a_problem_counts_once_and_a_safe_prompt_not_at_all(tmp_path):
    """Samples of one problem are not independent: twenty of them are still one problem."""
    a = [("x", T), ("x", T), ("x", F), ("y", F), ("z", T), ("z", F), ("s", T, "safe"), ("u", F, "unsafe")]
    b = [("x", T), ("x", F), ("x", F), ("y", F), ("z", T), ("z", F), ("s", F, "safe"), ("u", T, "unsafe")]
    result = run("compare", evaluation(tmp_path / "a", a), evaluation(tmp_path / "b", b))
    assert result == {"both": 1, "only_a": 1, "only_b": 1, "neither": 1, "p": 1.0}


@pytest.mark.parametrize("trained, length", [({}, 512), ({"max_length": 77}, 77)])
def test_rows_of_ones_own_are_cut_to_the_length_of_the_run_or_of_train_py(trained, length):
    settings = evaluate.Settings(source="somewhere", task="own")
    assert evaluate.as_trained(settings, trained).max_length == length
    assert parse_settings(words("--task own --train-data rows.jsonl")).max_length == 512
