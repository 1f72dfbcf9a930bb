"""Does a test fail when a line of the code is wrong? A seeded sample of mutants against the tests that call the line.

    python tests/mutate.py --sample 60 --seed 0                  # prints each mutant, and the test that killed it
    python tests/mutate.py model.py lora.py -- --ignore tests/test_fuzz.py      # after --: flags of pytest

A mutant changes one expression or drops one statement. First every test runs on the code as it is: that records which
functions it calls and how long it takes. A mutant then meets the quickest tests of its function, about a minute's
worth. The sample depends on the seed and on the text of the lines, not on where they stand: a line that has moved to
another file keeps its mutants, so that samples before and after a change can be compared.
"""

import argparse
import ast
import copy
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
OUTSIDE = ("lab/", "tests/", "examples/", "bench.py", "reproduce.py")
SECONDS = 60  # of processor time: what the tests of one mutant take on the code as it is
PAIRS = [(ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot)]
PAIRS += [(ast.Add, ast.Sub), (ast.Mult, ast.Div), (ast.BitAnd, ast.BitOr), (ast.And, ast.Or)]
PAIRS += [("max", "min"), ("any", "all"), (".sum", ".mean"), (".max", ".min"), (".any", ".all"), (".argmax", ".argmin")]
OTHER = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}


class Mutant(NamedTuple):
    file: str
    line: int
    function: str  # its qualified name; of a class or "" where the line runs when the module is imported
    before: str
    after: str


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """The wrong versions of one expression or statement."""
    wrong = copy.deepcopy(node)
    match wrong:
        case ast.Compare(ops=[operator]) if type(operator) in OTHER:
            wrong.ops = [OTHER[type(operator)]()]
        case ast.BinOp(op=operator) | ast.BoolOp(op=operator) if type(operator) in OTHER:
            wrong.op = OTHER[type(operator)]()
        case ast.UnaryOp(operand=operand):
            wrong = operand
        case ast.Constant(value=bool(value)):
            wrong = ast.Constant(not value)
        case ast.Constant(value=int(value)):
            wrong = ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            wrong = ast.Constant(2 * value or 1.0)
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Break() | ast.Continue():
            wrong = ast.Pass()
        case ast.Call(func=ast.Name(id=name)) if name in OTHER:
            wrong.func.id = OTHER[name]
        case ast.Call(func=ast.Attribute(attr=name)) if f".{name}" in OTHER:
            wrong.func.attr = OTHER[f".{name}"].removeprefix(".")
        case ast.Call(args=[ast.Name() | ast.Attribute(), ast.Name() | ast.Attribute(), *_]):
            wrong.args[:2] = wrong.args[1::-1]
        case _:
            return
    yield wrong


def mutants(path: Path) -> Iterator[Mutant]:
    """All mutants of a file that lie within one line."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()

    def visit(node: ast.AST, scope: str) -> Iterator[Mutant]:
        if getattr(node, "lineno", 0) == getattr(node, "end_lineno", None):
            line = lines[node.lineno - 1].encode()
            head, tail = line[: node.col_offset].decode(), line[node.end_col_offset :].decode()
            for wrong in variants(node):
                simple = isinstance(wrong, ast.stmt | ast.Constant)
                text = ast.unparse(wrong) if simple else f"({ast.unparse(wrong)})"
                yield Mutant(str(path.relative_to(ROOT)), node.lineno, scope, line.decode(), head + text + tail)
        if isinstance(node, ast.JoinedStr | ast.Raise | ast.arg):  # messages and annotations
            return
        parts = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts = [*node.body, node.args] if isinstance(node, ast.FunctionDef) else node.body
            scope = f"{scope}.{node.name}".lstrip(".")
        for part in parts:
            if part is not getattr(node, "annotation", None):
                yield from visit(part, scope)

    yield from visit(ast.parse(source), "")


def draw(paths: list[Path], size: int, seed: int) -> list[Mutant]:
    """The mutants with the lowest digests of seed and text."""
    times, ranked = Counter(), []
    for mutant in (mutant for path in sorted(paths) for mutant in mutants(path)):
        text = json.dumps([mutant.before.strip(), mutant.after.strip()])
        times[text] += 1
        ranked.append((hashlib.sha256(f"{seed} {times[text]} {text}".encode()).hexdigest(), mutant))
    return sorted(mutant for _, mutant in sorted(ranked)[:size])


class Recorder:
    """A plugin of pytest: the functions of the tree that each test calls, how long it takes, and what fails."""

    def __init__(self, tree: Path) -> None:
        self.prefix, self.calls, self.seconds, self.failed = f"{tree}/", {}, {}, []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        codes, start = set(), sum(os.times()[:4])
        sys.settrace(lambda frame, event, argument: codes.add(frame.f_code))
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.seconds[item.nodeid] = sum(os.times()[:4]) - start
            names = [f"{code.co_filename}:{code.co_qualname}".replace(".<locals>", "") for code in codes]
            self.calls[item.nodeid] = [name[len(self.prefix) :] for name in names if name.startswith(self.prefix)]

    def pytest_runtest_logreport(self, report) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def run_tests(tree: Path, arguments: list[str], seconds: int, deadline: float) -> dict | None:
    """Run pytest in a fork of this process, which has the large packages loaded. None: it did not end in time."""
    answer = tree.parent / "answer.json"
    answer.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        os.setpgid(0, 0)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
        with (tree.parent / "output.txt").open("wb") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        os.chdir(tree)
        sys.path[0] = str(tree)
        sys.modules.pop("profile", None)  # the standard library's: the tree has its own
        recorder = Recorder(tree)
        flags = ["-q", "-p", "no:cacheprovider", f"--basetemp={tree.parent}/tmp"]
        status = pytest.main([*flags, *arguments], plugins=[recorder])
        answer.write_text(json.dumps({"status": int(status), **vars(recorder)}))
        os._exit(0)
    while os.waitpid(child, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.1)
    return json.loads(answer.read_text()) if answer.exists() else None


def relevant(mutant: Mutant, recorded: dict) -> list[str]:
    """The tests that call the mutant's function, or where none does, any of its file; the quickest first."""
    tests = {test: calls for test, calls in recorded["calls"].items() if test not in recorded["failed"]}
    near = [test for test, calls in tests.items() if f"{mutant.file}:{mutant.function}" in calls]
    near = near or [test for test, calls in tests.items() if any(call.startswith(f"{mutant.file}:") for call in calls)]
    total, chosen = 0.0, []
    for test in sorted(near, key=recorded["seconds"].get):
        total += recorded["seconds"][test]
        if not chosen or total <= SECONDS:
            chosen.append(test)
    return chosen


def try_mutant(mutant: Mutant, tree: Path, recorded: dict, flags: list[str]) -> tuple[str, str]:
    """killed or survived, and by or of which tests."""
    tests = relevant(mutant, recorded)
    if not tests:
        return "survived", "no test calls it"
    file = tree / mutant.file
    right = file.read_text(encoding="utf-8")
    lines = right.splitlines()
    lines[mutant.line - 1] = mutant.after
    file.write_text("\n".join(lines), encoding="utf-8")
    outcome = "survived", f"{len(tests)} tests"
    for part in (tests[:8], tests[8:]):  # most mutants end with the first, and few files are read for it
        ended = run_tests(tree, ["-x", *flags, *part], 4 * SECONDS, time.monotonic() + 15 * SECONDS) if part else None
        if part and (ended is None or ended["status"]):
            outcome = "killed", ended["failed"][0] if ended else "timeout"
            break
    file.write_text(right, encoding="utf-8")
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="what to change (default: all but lab/ and examples/)")
    parser.add_argument("--sample", type=int, default=60, help="how many mutants (default: 60)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: 0)")
    parser.add_argument("--list", action="store_true", help="print the sample alone")
    parser.add_argument("--record", type=Path, help="where what the tests call is kept, or lies from an earlier time")
    split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, flags = parser.parse_args(sys.argv[1:split]), sys.argv[split + 1 :]
    tracked = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]
    core = [ROOT / name for name in tracked if name.endswith(".py") and not name.startswith(OUTSIDE)]
    sample = draw([ROOT / name for name in args.files] or core, args.sample, args.seed)

    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder).resolve() / "tree"
        for name in tracked:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
        if not args.list:
            if args.record and args.record.exists():
                recorded = json.loads(args.record.read_text())
            else:
                recorded = run_tests(tree, flags, seconds=3 * 3600, deadline=float("inf"))
            if args.record:
                args.record.write_text(json.dumps(recorded))
            print(f"{len(recorded['calls'])} tests; they fail on the code as it is: {recorded['failed']}", flush=True)
        outcomes = Counter()
        for mutant in sample:
            outcome = ("", "") if args.list else try_mutant(mutant, tree, recorded, flags)
            outcomes[outcome[0]] += 1
            print(f"{mutant.file}:{mutant.line}  {'  '.join(outcome)}")
            print(f"    {mutant.before.strip()}\n    {mutant.after.strip()}", flush=True)
        print(f"{outcomes['killed']} of {len(sample)} killed")


if __name__ == "__main__":
    sys.dont_write_bytecode = True  # two versions of a file may be written within one second
    os.environ.update(PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    import peft  # noqa: F401  once, for all forks
    import transformers  # noqa: F401

    main()
