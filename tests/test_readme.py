"""The README and the pages of docs/ against the code: commands, names, paths, links, printed lines, numbers."""

import importlib
import json
import re
import statistics
from pathlib import Path

import pytest
from conftest import call, read_json

import evaluate
import hellora
import reproduce
import train
from hub.config import FAMILIES
from lab.benchmarks import plan
from lab.paper.verdicts import estimate
from recipes.methods import METHODS, RECIPES
from scoring.statistics import rate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in sorted(
        [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("tiny/*.md"), *ROOT.glob("results/**/*.md")]
    )
}


# -------------------------------------------------------------------------------------------------- commands


def commands(page: str) -> list[tuple[str, str]]:
    """(script, what follows it) of every command of ours in a page's bash blocks."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", page, re.S)).replace("\\\n", " ")
    return re.findall(r"(?:python|torchrun [^\n#]*?) ((?:tiny/)?\w+\.py)([^\n#)]*)", blocks)


COMMANDS = [command for page in PAGES.values() for command in commands(page)]
SUBCOMMANDS = {"advise", "check", "compare", "full", "generate", "gpu", "load", "plan", "step", *reproduce.COMMANDS}
WITH_SUBCOMMAND = [(script, *SUBCOMMANDS & set(rest.split()[:1]), rest) for script, rest in COMMANDS]


def test_the_pages_have_commands_of_every_script():
    scripts = {"train.py", "evaluate.py", "generate.py", "export.py"}
    assert {script for script, _ in commands(README)} >= scripts
    assert {script for script, _ in COMMANDS} >= scripts | {"profile.py", "bench.py", "reproduce.py"}


@pytest.mark.parametrize("script", sorted({c[:-1] for c in WITH_SUBCOMMAND if "/" not in c[0]}), ids=" ".join)
def test_every_flag_of_a_command_exists(script, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(script[0].removesuffix(".py")).main([*script[1:], "--help"])
    said = capsys.readouterr().out
    flags = {flag for *about, rest in WITH_SUBCOMMAND if tuple(about) == script for flag in rest.split()}
    assert said.startswith("usage: ")
    assert not [flag for flag in flags if flag.startswith("--") and not re.search(rf"{flag}\b", said)]


COMMANDS_WITH_HELP = {
    "train": "", "evaluate": " compare", "generate": "", "export": " check", "profile": " compare advise --prompt",
    "reproduce": "params table4 effects moved all", "bench": "step generate plan full gpu",
}  # fmt: skip
HELPS = [(script, *name.split()) for script, names in COMMANDS_WITH_HELP.items() for name in names.split(" ")]


@pytest.mark.parametrize("command", HELPS, ids=" ".join)
def test_every_help_ends_with_an_example_whose_flags_exist(command, capsys):
    script, *name = command
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(script).main([*name, *(["text"] if name == ["--prompt"] else []), "--help"])
    explained, _, example = capsys.readouterr().out.partition("example:\n")
    flags = re.findall(r"--[\w-]+", example)
    assert re.search(" ".join([rf"\b{script}\.py", *(part for part in name if part[0] != "-")]), example)
    assert not [flag for flag in flags if flag != "--nproc_per_node" and not re.search(rf"{flag}\b", explained)]


def test_training_commands_are_accepted():
    training = [rest for script, rest in COMMANDS if script == "train.py"]
    assert len(training) > 5
    for rest in training:
        train.parse_settings(rest.split())


# ------------------------------------------------------------------------------------------ names, paths, links


@pytest.mark.parametrize("page", PAGES)
def test_every_link_and_picture_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_every_file_and_function_that_is_named_exists(page):
    named = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.S)))
    paths = [name for name in named if re.fullmatch(r"[A-Za-z_.][\w/.-]*/[\w.-]*|\w+\.py", name)]
    written_by_a_run = r"(runs|RUN)/.*|(adapter|model)(-best)?/|checkpoint/.*|stage-d/"
    paths = [path for path in paths if not re.fullmatch(written_by_a_run, path)]
    assert not [path for path in paths if not (ROOT / path).exists() and not ((ROOT / page).parent / path).exists()]
    modules = {path.stem for path in ROOT.glob("*.py")}
    for name in named:
        module, _, function = name.partition(".")
        if module in modules and re.fullmatch(r"(?!(py|json|jsonl|png|safetensors)$)[A-Za-z_]\w*", function):
            assert hasattr(importlib.import_module(module), function), name


def test_every_top_level_module_and_every_folder_is_in_the_reading_path():
    folders = {f"{path.parent.name}/" for path in ROOT.glob("*/*.py")} - {"tests/", "tiny/"}
    assert not [name for name in {path.name for path in ROOT.glob("*.py")} | folders if name not in README]


def test_docs_are_twelve_short_pages_and_the_readme_is_short_and_leads_to_each():
    assert len(README.split()) <= 1200
    docs = {page: text for page, text in PAGES.items() if page.startswith("docs/")}
    assert len(docs) <= 12
    assert not {page: len(text.split()) for page, text in docs.items() if len(text.split()) > 900}
    assert not [page for page in docs if f"]({page}" not in README]
    assert not [page for page, text in docs.items() if not text.partition("\n\n")[2].startswith("This page is for ")]


def test_every_method_policy_task_and_family_is_described():
    described = {
        "docs/methods.md": (*METHODS, *hellora.POLICIES, *hellora.TARGETS),
        "docs/reproduce.md": (*RECIPES, *reproduce.COMMANDS),
        "docs/when-to-use.md": FAMILIES,
    }
    for page, names in described.items():
        assert not [name for name in names if f"`{name}`" not in PAGES[page]], page


# ------------------------------------------------------------------------------------------------ what is printed


def shape(line: str) -> str:
    """A printed line with # for every number and X for every path and command."""
    return re.sub(r"\d[\d,.]*", "#", re.sub(r"runs/[\w/-]+|/\S+", "X", line)).rstrip()


def test_what_the_readme_says_the_demo_prints_is_what_is_printed(all_rows, tmp_path, capsys):
    excerpt = re.search(r"```\n(python evaluate\.py tiny.*?)```", README, re.S)[1].splitlines()
    call(train, "--method hellora --k 8 --steps 2 --batch 4 --out", tmp_path / "run")
    call(evaluate, tmp_path / "run", "--task tiny-math --limit 2 --max-new-tokens 4")
    printed = capsys.readouterr().out.replace("1 process\n", "2 processes\n").splitlines()
    makefile = (ROOT / "Makefile").read_text().replace("$(RUN)", "runs/demo")
    for line in excerpt:
        if line.startswith(("python ", "torchrun ")):
            assert line in makefile.replace("$(VENV)/bin/", "")
        elif re.search(r"steps|accuracy", line):  # the loss, the speed, the score: the machine's
            assert shape(line) in map(shape, printed)
        elif line:
            assert line in printed


def test_the_scores_in_the_readme_agree_with_their_counts():
    found = re.findall(r"accuracy ([\d.]+) \((\d+)/(\d+), 95% CI ([\d.]+)\.\.([\d.]+)\)", README)
    assert found
    for accuracy, correct, total, low, high in found:
        exact = rate(int(correct), int(total))
        assert [f"{exact[key]:.3f}" for key in ("rate", "low", "high")] == [accuracy, low, high]


def finished(task: str, method: str, seed: int = 0, flags: str = "") -> tuple[dict, dict]:
    """The record of a finished run of the tables, and its scores on its own task. flags: as in the file's name."""
    (path,) = (ROOT / "results/runs").glob(f"{task}-{method}{flags}-seed{seed}-????????.json")
    record = read_json(path)
    return record, record["scores"][task]


def test_the_table_of_methods_is_that_of_the_finished_runs():
    rows = re.findall(r"^\| `([\w-]+)` \| ([\d.e-]+) \|[^|]*\| ([\d,]+) \| ([\d.]+ ± [\d.]+) % \|$", README, re.M)
    assert {"fft", "lora", "lora-flat", "hellora", "moe-sieve"} <= {method for method, *_ in rows}
    for method, lr, *stated in rows:
        recipe = RECIPES["tiny-math"]
        common = recipe.fft_lr if method == "fft" else recipe.lr
        flags = "" if float(lr) == common else f"-lr{float(lr):g}"
        records, scores = zip(*(finished("tiny-math", method, seed, flags) for seed in range(5)), strict=True)
        accuracy = estimate([100 * score["accuracy"] for score in scores])
        assert stated == [f"{records[0]['trainable']:,}", f"{accuracy.mean:.1f} ± {accuracy.half:.1f}"], method
        at_best = rf"\| *{float(lr):g} \| *{re.escape(stated[1])} \("  # where the page of results has the best rate
        assert re.search(at_best, PAGES["results/README.md"]), method


def test_the_scores_of_the_embedded_tasks_are_those_of_the_finished_runs():
    keys = {"accuracy": "accuracy", "pass@1": "pass@1", "refusals of unsafe instructions": "refusal_rate"}
    page = PAGES["tiny/README.md"]
    rows = re.findall(r"^\| `(tiny-\w+)` \| ([^|]+) \| [^|]+ \| ([^|]+) \| ([^|]+) \|$", page, re.M)
    assert len(rows) == 4
    for task, what, *columns in rows:
        for method, column in zip(("lora", "hellora"), columns, strict=True):
            for seed, stated in enumerate(re.findall(r"[\d.]+ %", column)):
                _, found = finished(task, method, seed, "" if task == "tiny-math" else "-lr0.012")
                share = found[keys[what]] if what in keys else found["rates"]["over-refusal, lori"]
                assert stated == f"{100 * share:.1f} %", (task, method, seed)


def test_the_published_accuracies_are_those_of_the_file():
    found = read_json(ROOT / "results/published/moe-sieve-accuracy.json")["results"]["olmoe-gsm8k"]
    head, values = re.search(r"^\| (all 64 \(LoRA\).*) \|\n.*\n\| (.*) \|$", PAGES["docs/methods.md"], re.M).groups()
    stated = dict(zip(head.split(" | "), values.split(" | "), strict=True))
    assert len(stated) == 6
    for experts, value in stated.items():
        number, kind = experts.split()[:2]
        name = "full_lora" if number == "all" else f"{'hotk' if kind == 'hottest' else 'randk'}{number}"
        scores = [100 * score for score in found[name].values()]
        assert value == f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}", name


def test_the_table_of_planned_memory_is_what_bench_plans(capsys):
    page = PAGES["docs/speed.md"]
    olmoe, mixtral_2, mixtral_16 = (
        plan.main(rest.split()[1:]) for script, rest in commands(page) if "plan --model" in rest
    )
    planned = [
        [row["total"], row["sent_per_step"], row.get("sent_between_machines", 0)]
        for row in (mixtral_2[1], mixtral_16[1], *olmoe)
    ]
    rows = re.findall(r"^\| (?:Mixtral|OLMoE).*", page, re.M)
    stated = [[float(cell) for cell in row.strip("| ").split(" | ")[1:]] for row in rows]
    assert stated == [[round(value / 1e9, 1) for value in row] for row in planned]


def test_every_number_that_a_run_writes_is_in_the_glossary(tmp_path, capsys):
    flags = "--method dr-lora --router-aux-loss 0.01 --steps 2 --batch 2 --sample 0.01 --valid-share 0.002"
    call(train, flags, "--out", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    result = read_json(tmp_path / "run" / "result.json")
    page = PAGES["docs/glossary.md"]
    log, rest = page.split("## log.jsonl")[1].split("## result.json")
    assert not [key for key in record if f"`{key}`" not in log]
    assert not [key for key in result if f"`{key}`" not in rest]
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert not [name for name in files if name not in page]
