"""The layout that CONTRIBUTING.md promises: imports go one way, and none goes into the lab but through its doors."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOT_OURS = {"tests", "runs"}  # and hidden folders: environments, caches
DOORS = {"bench", "reproduce"}


def python_files() -> dict[str, Path]:
    """Our modules outside tests by dotted name: hub.config -> hub/config.py, hub -> hub/__init__.py."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if not any(part in NOT_OURS or part.startswith(".") for part in parts):
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


FILES = python_files()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imported_by(name: str, tree: ast.AST) -> set[str]:
    """Which of our modules a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            folder = FILES[name].relative_to(ROOT).parent.parts
            base = ".".join([*folder[: len(folder) + 1 - node.level], *filter(None, [node.module])])
            base = base if node.level else node.module
            # `from hub import config` is the module hub.config, `from hub.config import MoEConfig` is too
            names |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return (names & FILES.keys()) - {name}


IMPORTS = {name: imported_by(name, tree) for name, tree in TREES.items()}


def cycles(edges: dict[str, set[str]]) -> list[str]:
    """The nodes on a cycle or between two: the others import none of those left, or none of those imports them."""
    left = dict(edges)
    while True:
        imported = set().union(*left.values())
        kept = {node for node, targets in left.items() if targets & left.keys() and node in imported}
        if kept == left.keys():
            return sorted(left)
        left = {node: left[node] for node in kept}


def folder_of(name: str) -> str:
    """The node of a module when a folder counts as one. A script that nobody imports counts apart."""
    if "." not in name and FILES[name].name != "__init__.py":
        return name
    is_script = not any(name in targets for targets in IMPORTS.values()) and "__main__" in FILES[name].read_text()
    return name if is_script else f"{name.partition('.')[0]}/"


def test_no_folder_has_a_name_that_says_nothing_or_hides_a_module():
    folders = {FILES[name].parent.name for name in FILES} - {ROOT.name}
    assert not folders & {"utils", "util", "common", "helpers", "misc", "core", "lib"}
    assert not folders & {path.stem for path in ROOT.glob("*.py")}  # a folder hellora/ would shadow hellora.py


def test_files_import_one_way():
    assert cycles(IMPORTS) == []


def test_folders_import_one_way():
    edges: dict[str, set[str]] = {}
    for name, targets in IMPORTS.items():
        edges.setdefault(folder_of(name), set()).update(map(folder_of, targets))
    assert cycles({node: targets - {node} for node, targets in edges.items()}) == []


def test_a_cycle_of_imports_is_found():
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]
    assert "hub.config" in imported_by("model", ast.parse("def f():\n    from hub.config import X"))
    assert "hub.config" in imported_by("model", ast.parse("from hub import config"))
    assert "hub.config" in imported_by("hub.checkpoint", ast.parse("from .config import X\nfrom . import peft"))


def test_only_the_doors_import_the_lab():
    outside = {name for name in FILES if name.partition(".")[0] != "lab"}
    assert {name for name in outside if any(f"{each}.".startswith("lab.") for each in IMPORTS[name])} == DOORS


def test_pre_commit_runs_the_ruff_of_requirements_dev():
    pinned = set(re.findall(r"ruff==[\d.]+", (ROOT / "requirements-dev.txt").read_text()))
    assert len(pinned) == 1
    assert set(re.findall(r"ruff==[\d.]+", (ROOT / ".pre-commit-config.yaml").read_text())) == pinned
