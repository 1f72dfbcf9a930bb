"""The runs of reproduce.py: found again by what decides them, made once, gone on with, at both scales."""

import importlib
import json
import shutil
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import with_tokenizer

import data
import evaluate
import reproduce
from command.cli import InputError, RunError
from command.files import claimed
from lab.paper import command, runner, runs
from lab.paper.runner import Workplace
from lab.paper.runs import Records, Run
from lab.paper.table import SCALES
from lab.paper.tables import TABLES
from recipes import methods
from recipes.methods import METHODS
from run.settings import parse_settings

RUN = Run("tiny-math", "hellora", seed=3, k=4)


@pytest.fixture
def contents(monkeypatch) -> dict[str, str]:
    """Digests of models and data, made up: {"tiny": ..., "tiny-math train": ..., "tiny-math test": ...}"""
    found = {}
    monkeypatch.setattr(runs, "model_content", lambda model: {"weights": found.get(model, "w")})
    monkeypatch.setattr(runs, "data_content", lambda task, split, path: found.get(f"{task} {split}", "d"))
    return found


def finish(run: Run, records: Records, **scores: float) -> None:
    """Write the record of a run as if it had been made."""
    tasks = {task.replace("_", "-"): accuracy for task, accuracy in scores.items()}
    found = {t: {"accuracy": a, "rates": {}, "evaluation": records.evaluated(run, t)} for t, a in tasks.items()}
    about = {"settings": runs.decisive_settings(run), "scores": found, "seconds": {"train": 90.0}}
    records.folder.mkdir(parents=True, exist_ok=True)
    file = records.folder / f"{records.name(run)}.json"
    file.write_text(json.dumps({"run": vars(run)} | records.content(run) | about))


# --------------------------------------------------------------------------------------------- what decides a run


@pytest.mark.parametrize("changed", ["tiny", "tiny-math train"])
def test_a_run_on_another_model_or_other_training_data_is_another_run(changed, contents, tmp_path):
    records = Records(tmp_path)
    finish(RUN, records, tiny_math=0.5)
    assert records.scores(RUN, "tiny-math")["accuracy"] == 0.5
    contents[changed] = "another"
    assert records.find(RUN) is None
    contents[changed] = "w" if changed == "tiny" else "d"
    assert records.find(RUN)


def test_other_test_problems_or_another_number_of_them_ask_for_a_new_score_of_the_same_run(contents, tmp_path):
    records = Records(tmp_path)
    finish(RUN, records, tiny_math=0.5)
    contents["tiny-math test"] = "another"
    assert records.find(RUN)
    assert records.scores(RUN, "tiny-math") is None
    contents.clear()
    assert replace(records, limit=20).scores(RUN, "tiny-math") is None
    assert replace(records, samples=5).scores(RUN, "tiny-math")  # the number of samples counts for code alone
    assert records.scores(RUN, "tiny-safety") is None


@pytest.mark.parametrize("field", Run.__dataclass_fields__)
def test_every_field_of_a_run_decides_it(field, contents, tmp_path):
    other = {"task": "tiny-code", "method": "hellori-d", "seed": 4, "k": 5, "experts": "cold", "targets": "gate"}
    other |= {"steps": 7, "model": "another", "rank": 7, "expert_rank": 7, "alpha": 7.0, "lr": 7.0}
    other |= {"schedule": "linear", "lr_warmup": 0.5, "count_on": "lora", "sample": 0.5}
    other |= {"profile": str(tmp_path / "counts.json")}
    (tmp_path / "counts.json").touch()
    assert Records(tmp_path).name(RUN) != Records(tmp_path).name(replace(RUN, **{field: other[field]}))


def test_another_recipe_of_the_task_is_another_run(contents, tmp_path, monkeypatch):
    records = Records(tmp_path)
    finish(RUN, records, tiny_math=0.5)
    before = records.name(RUN)
    monkeypatch.setitem(methods.RECIPES, "tiny-math", replace(methods.RECIPES["tiny-math"], lr=0.5))
    runs.decisive_settings.cache_clear()
    assert records.find(RUN) is None
    assert records.name(RUN) != before  # its unfinished folder is left alone
    monkeypatch.undo()
    runs.decisive_settings.cache_clear()


def test_a_setting_that_is_newer_than_a_record_does_not_make_the_run_again_but_a_changed_one_does(contents, tmp_path):
    records = Records(tmp_path)
    finish(RUN, records, tiny_math=0.5)
    path, record = records.find(RUN)
    del record["settings"]["clip"]
    path.write_text(json.dumps(record))
    assert records.find(RUN)
    record["settings"]["clip"] = 0.5
    path.write_text(json.dumps(record))
    assert records.find(RUN) is None


# ------------------------------------------------------------------------------------------------- command lines


@pytest.mark.parametrize("scale", SCALES)
def test_the_command_lines_of_every_table_are_accepted(scale, tmp_path):
    records, seen = Records(tmp_path, limit=9, samples=10), set()
    for table in TABLES.values():
        for run, tasks in replace(table, scale=SCALES[scale], seeds=2).needed(lambda run: run).items():
            if run.method != "base":
                settings = parse_settings(run.train_flags("out"))
                assert (settings.method, settings.seed, settings.model) == (run.method, run.seed, run.model)
                assert settings.k == run.k
            for task in tasks:
                read, _ = evaluate.read_settings(records.evaluate_flags(run, "tiny", task, "out"))
                seed = run.seed if read.benchmark == "humaneval" else None  # greedy decoding takes none
                assert (read.task, read.limit, read.seed) == (task, 9, seed)
                assert read.samples == (10 if read.benchmark == "humaneval" else None)
            seen.add(run)
    assert len({run.title for run in seen}) == len(seen)  # no two share a folder in --dry-run


def test_at_the_papers_scale_its_own_methods_count_while_lora_trains_as_its_recipe_says():
    rows, column = {row.name: row for row in TABLES["table2"].rows}, TABLES["table2"].columns[0]
    for scale, expected in (("tiny", "base"), ("paper", "lora")):
        table = replace(TABLES["table2"], scale=SCALES[scale])
        runs_ = {name: table.run(rows[name], column) for name in rows}
        counted = {name: parse_settings(run.train_flags("out")).count_on for name, run in runs_.items()}
        assert {counted[name] for name in counted if name.startswith("HELLo")} == {expected}
        assert counted["MoE-Sieve"] == "base"
    recipe = parse_settings(["--recipe", "hellora", "--task", "gsm8k"])
    catcher = replace(TABLES["catcher"], scale=SCALES["paper"])
    assert recipe.count_on == "lora"
    assert catcher.run(catcher.rows[0], column) == Run("gsm8k", "hellora", 0, SCALES["paper"].olmoe)


def test_a_table_with_ranks_of_the_embedded_model_is_refused_for_the_papers_models():
    with pytest.raises(InputError, match="table9 has ranks for the embedded model; leave out --scale paper"):
        reproduce.main(["table9", "--scale", "paper", "--dry-run"])


@pytest.mark.parametrize("settings", [{"scale": "paper"}, {"quick": True}])
def test_a_table_without_sweeps_has_each_score_once(settings):
    for name, table in TABLES.items():
        shown = [column.title for column in command.Settings(**settings).table(name).columns]
        titles = [column.title for column in table.columns if "one rate" not in column.title]
        assert shown == (titles[:1] if "quick" in settings else titles), name


def test_all_rows_of_a_seed_come_before_the_next_seed():
    needed = replace(TABLES["table7"], seeds=3).needed(lambda run: run)
    assert [run.seed for run in needed] == [0] * 4 + [1] * 4 + [2] * 4


def test_a_score_is_found_again_only_if_text_was_decoded_as_now(contents, tmp_path, monkeypatch):
    records = Records(tmp_path)
    finish(RUN, records, tiny_math=0.5)
    assert records.scores(RUN, "tiny-math")
    monkeypatch.setattr(evaluate, "TINY_NEW_TOKENS", 7)
    assert records.scores(RUN, "tiny-math") is None


def test_the_runs_of_an_embedded_model_are_the_same_on_every_device(monkeypatch):
    monkeypatch.setattr("run.settings.default_dtype", lambda: "bfloat16")  # as on a GPU
    runs.decisive_settings.cache_clear()
    assert runs.decisive_settings(RUN)["dtype"] == "float32"
    assert runs.decisive_settings(replace(RUN, model="another"))["dtype"] == "bfloat16"
    assert evaluate.read_settings(Records(Path()).evaluate_flags(RUN, "tiny", "tiny-math", "out"))[0].dtype == "float32"
    runs.decisive_settings.cache_clear()


def test_local_data_is_the_file_with_the_name_of_the_split_and_not_one_like_it(tmp_path):
    for name in ("gsm8k-train-old.jsonl", "gsm8k-train.jsonl.gz", "gsm8k-test.jsonl", "gsm8k-test.json"):
        (tmp_path / name).touch()
    assert runs.data_file(str(tmp_path), "gsm8k", "train") == str(tmp_path / "gsm8k-train.jsonl.gz")
    assert runs.data_file(str(tmp_path), "hexphi", "test") is None
    with pytest.raises(InputError, match="gsm8k-test.json and gsm8k-test.jsonl are the same split; keep one"):
        runs.data_file(str(tmp_path), "gsm8k", "test")
    with pytest.raises(InputError, match="absent: no such folder"):
        reproduce.main(["table3", "--data", str(tmp_path / "absent"), "--dry-run"])


def test_results_with_other_data_do_not_go_to_the_results_folder():
    assert str(command.Settings().folder) == "results"
    assert str(command.Settings(data="x").folder) != "results"


def test_the_real_models_have_the_papers_ten_seeds_unless_a_flag_says_otherwise():
    seeds = {
        flags: command.Settings(**dict(flags)).table("table5").seeds
        for flags in (
            (),
            (("scale", "paper"),),
            (("scale", "paper"), ("quick", True)),
            (("scale", "paper"), ("seeds", 4)),
        )
    }
    assert list(seeds.values()) == [3, 10, 2, 4]


def test_a_run_takes_as_long_as_all_its_parts_and_an_unknown_time_if_one_was_not_timed():
    record = {"scores": {"a": {}, "b": {}}, "seconds": {"train": 1.5, "evaluate a": 2.5, "evaluate b": 4}}
    assert runs.spent(record) == 8
    assert runs.spent(record | {"seconds": {"train": 1.5, "evaluate a": 2.5}}) is None


# --------------------------------------------------------------------------------------------------- making runs


class Inline:
    """A pool that does its work at once, in this thread: train.py handles signals, which only the main thread can."""

    def __init__(self, jobs: int) -> None:
        pass

    def submit(self, function, *arguments) -> Future:
        future = Future()
        try:
            future.set_result(function(*arguments))
        except RunError as error:
            future.set_exception(error)
        return future

    def shutdown(self, **options) -> None:
        pass


@pytest.fixture
def inline(monkeypatch, tmp_path, make_checkpoint) -> list[str]:
    """reproduce.py in this process, in a folder with small models.  -> the scripts that were called"""
    called = []
    runs.split_digests.cache_clear()

    def call(self, script, arguments, log) -> float:
        called.append(script)
        importlib.import_module(script.removesuffix(".py")).main(arguments)
        return 2.0

    monkeypatch.setattr(Workplace, "call", call)
    monkeypatch.setattr(runner, "ThreadPoolExecutor", Inline)
    monkeypatch.setattr(command, "QUICK", {"tiny": {"steps": 2}, "paper": {"steps": 2}})
    monkeypatch.setattr(command, "QUICK_LIMIT", 3)
    monkeypatch.chdir(tmp_path)
    for family, sizes in (("olmoe", {}), ("mixtral", {"intermediate_size": 40})):  # rank 32 must fit
        make_checkpoint(family, **sizes).hf.save_pretrained(tmp_path / family)
        with_tokenizer(tmp_path / family)
    return called


def test_a_quick_table_is_made_once_and_an_interrupted_one_goes_on(inline, capsys, monkeypatch):
    flags = ["topup", "--model", "olmoe", "--quick", "--seeds", "1"]
    evaluated = evaluate.main

    def stop(argv):
        if sum(script == "evaluate.py" for script in inline) == 2:
            raise KeyboardInterrupt
        return evaluated(argv)

    monkeypatch.setattr(evaluate, "main", stop)
    with pytest.raises(KeyboardInterrupt):
        reproduce.main(flags)
    assert len(list(Path("runs/quick/runs").glob("*.json"))) == 1
    monkeypatch.setattr(evaluate, "main", evaluated)
    inline.clear()
    [section] = reproduce.main(flags)
    assert inline == ["train.py", "evaluate.py"] * 2  # the second was trained, which train.py sees
    assert "nothing to do" in capsys.readouterr().out
    assert [row["ours"]["n"] for row in section.rows] == [1, 1, 1]
    record = json.loads(next(Path("runs/quick/runs").glob("*topup*")).read_text())
    assert (record["steps"], record["scores"]["tiny-math"]["num_total"], record["cores"]) == (2, 3, runs.os.cpu_count())
    assert [step for step, _ in record["losses"]] == [1, 2]
    inline.clear()
    reproduce.main(flags)
    assert inline == []
    assert "every run is finished already" in capsys.readouterr().out


@pytest.mark.parametrize("method", (*METHODS, "base"))
def test_the_record_of_every_method_is_found_again(method, inline):
    rank = {"fft": None, "lora-flat": 7, "dr-lora": 2}.get(method, 4)  # 7: k of the 7 experts are hot
    run = Run("tiny-math", method, model="olmoe", **({} if method == "base" else {"rank": rank, "steps": 2}))
    place = Workplace(Records(Path("runs/records"), limit=1), Path("runs/scratch"))
    assert runner.make({run: {"tiny-math"}}, place) == {}


def test_a_run_that_comes_out_otherwise_the_second_time_is_scored_anew_on_every_task(inline):
    flags = ["topup", "--model", "olmoe", "--quick", "--seeds", "1"]
    reproduce.main(flags)
    file = next(Path("runs/quick/runs").glob("*topup*"))
    record = json.loads(file.read_text())
    old = record["scores"].pop("tiny-math")
    record["scores"]["tiny-safety"] = old | {"num_total": 99, "evaluation": {}}
    record["seconds"]["train"] = 1e6
    for same in (True, False):
        record["losses"][0][1] += 0 if same else 1
        file.write_text(json.dumps(record))
        inline.clear()
        reproduce.main(flags)
        found = json.loads(file.read_text())
        assert (found["seconds"]["train"] == 1e6) == same  # as long as it took the first time
        found = found["scores"]
        assert found["tiny-math"]["num_total"] == 3 and (found["tiny-safety"]["num_total"] == 99) == same
        assert inline == ["train.py", *["evaluate.py"] * (1 if same else 2)]


def test_an_unexpected_error_ends_the_command_without_the_runs_that_wait(monkeypatch, tmp_path):
    begun = []

    def make_run(run: Run, *_):
        begun.append(run.seed)
        time.sleep(0.2)
        raise KeyError(run.seed)

    monkeypatch.setattr(runner, "make_run", make_run)
    with pytest.raises(KeyError):
        needed = {replace(RUN, seed=seed): {"tiny-math"} for seed in range(20)}
        runner.make(needed, Workplace(Records(tmp_path), tmp_path, jobs=1))
    assert len(begun) < 10


def test_what_another_commit_has_left_is_made_again(inline, capsys):
    flags = ["topup", "--model", "olmoe", "--quick", "--seeds", "1"]
    reproduce.main(flags)
    for made_by_another in (False, True):
        shutil.rmtree("runs/quick")
        for file in Path("runs/reproduce").glob("*/config.json") if made_by_another else ():
            file.write_text(json.dumps(json.loads(file.read_text()) | {"commit": "another"}))
        capsys.readouterr()
        reproduce.main(flags)
        told = "".join(capsys.readouterr())
        assert ("was made by another; it is made again" in told) == made_by_another
        assert ("nothing to do" in told) != made_by_another


@pytest.mark.parametrize("other", ["before the training", "in the training"])
def test_a_run_that_read_other_data_than_the_table_is_not_recorded(inline, monkeypatch, other):
    load, call = data.load_examples, Workplace.call
    fewer = lambda *args, **options: load(*args, **options)[1:]  # noqa: E731
    monkeypatch.setattr(data, "load_examples", fewer if other == "before the training" else load)

    def change(self, script, arguments, log) -> float:
        monkeypatch.setattr(data, "load_examples", load if other == "before the training" else fewer)
        seconds = call(self, script, arguments, log)
        monkeypatch.setattr(data, "load_examples", load)
        return seconds

    monkeypatch.setattr(Workplace, "call", change)
    with pytest.raises(RunError, match="the training data changed; give the command again"):
        reproduce.main(["topup", "--model", "olmoe", "--quick", "--seeds", "1", "--jobs", "1"])


def test_a_failed_run_does_not_stop_the_others_and_is_reported(inline, capsys, monkeypatch):
    def fail(self, script, arguments, log) -> float:
        raise RunError(f"{script} ended with status 1: no space")

    called = Workplace.call
    monkeypatch.setattr(Workplace, "call", lambda self, *a: (fail if "topup" in a[1] else called)(self, *a))
    with pytest.raises(RunError, match="runs that failed: 1; the first: train.py ended with status 1: no space"):
        reproduce.main(["topup", "--model", "olmoe", "--quick", "--seeds", "1"])
    assert len(list(Path("runs/quick/runs").glob("*.json"))) == 2
    assert "| not run" in capsys.readouterr().out


def test_a_second_command_that_would_make_runs_is_refused(inline):
    with claimed(Path("runs/reproduce")), pytest.raises(InputError, match="runs/reproduce is in use by process"):
        reproduce.main(["topup", "--model", "olmoe", "--quick", "--seeds", "1"])
    assert inline == []


def test_a_child_that_fails_says_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    (tmp_path / "train.py").write_text("import sys; print('first'); print('error: no such task'); sys.exit(2)")
    place = Workplace(Records(tmp_path), tmp_path)
    with pytest.raises(RunError, match="status 2: error: no such task"):
        place.call("train.py", [], tmp_path / "log")


# ------------------------------------------------------------------------------------------- the paper's own scale


def test_a_table_of_the_real_scale_goes_from_end_to_end_on_a_random_mixtral_and_real_formats(
    inline, tmp_path, monkeypatch
):
    (tmp_path / "data").mkdir()
    rows = [{"question": f"{i} + 1 is ?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in range(8)]
    for split in ("train", "test"):
        (tmp_path / "data" / f"gsm8k-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setitem(evaluate.DECODING, "gsm8k", evaluate.Decoding(4))
    flags = ["--model", "mixtral", "--data", "data", "--quick", "--seeds", "1", "--processes", "1"]
    [section] = reproduce.main(["table3", "--scale", "paper", *flags])
    assert [row["ours"]["n"] for row in section.rows] == [1] * 6
    record = json.loads(next(Path("runs/quick/runs").glob("*-hellora-*")).read_text())
    assert record["settings"]["rank"] == 32
    assert record["settings"]["batch"] == 128
