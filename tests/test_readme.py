"""The README against the code: every command names a script and flags that exist, and every module is in the map."""

import importlib
import re
from pathlib import Path

import pytest

from run import settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)).replace("\\\n", " ")
COMMANDS = re.findall(r"^\s*(?:python|torchrun[^\n]*?) (\w+\.py)([^\n#]*)", BLOCKS, re.M)


def test_the_readme_has_commands():
    assert {script for script, _ in COMMANDS} >= {"train.py", "evaluate.py", "profile.py", "export.py"}


SUBCOMMANDS = {"advise", "compare", "generate", "load", "params", "plan", "step"}
SCRIPTS = {(script, *SUBCOMMANDS & set(rest.split()[:1])) for script, rest in COMMANDS}


@pytest.mark.parametrize("script", sorted(SCRIPTS), ids=" ".join)
def test_every_flag_of_a_readme_command_exists(script, capsys):
    with pytest.raises(SystemExit, match="^0$"):
        importlib.import_module(script[0].removesuffix(".py")).main([*script[1:], "--help"])
    said = capsys.readouterr().out
    flags = {
        flag
        for name, rest in COMMANDS
        if (name, *SUBCOMMANDS & set(rest.split()[:1])) == script
        for flag in re.findall(r"--[a-z-]+", rest)
    }
    assert said.startswith("usage: ")
    assert not [flag for flag in flags if not re.search(rf"{flag}\b", said)]


def test_every_picture_of_the_readme_is_there():
    assert not [path for path in re.findall(r"!\[[^]]*\]\(([^)]*)\)", README) if not (ROOT / path).exists()]


def test_training_commands_of_the_readme_are_accepted():
    for script, rest in COMMANDS:
        if script == "train.py":
            settings.parse_flags(rest.split())


def test_every_module_is_in_the_file_map_and_every_method_in_the_table():
    modules = {path.name for path in ROOT.glob("*.py")}
    assert not [name for name in modules if f"`{name}`" not in README]
    assert not [name for name in settings.METHODS if f"`{name}`" not in README]


def test_in_the_order_of_the_file_map_every_module_imports_only_those_above_it():
    order = re.findall(r"`(\w+)\.py`", README.split("## Read it")[1].split("## Fine-tune")[0])
    for i, name in enumerate(order):
        source = (ROOT / f"{name}.py").read_text(encoding="utf-8")
        imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.M)) & set(order)
        allowed = {*order[:i], "sandbox_inside"}  # beside sandbox.py, in one row of the map
        assert imported <= allowed, f"{name}.py imports {imported - allowed}"
