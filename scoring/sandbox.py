"""Runs model-written Python programs against their tests, HumanEval style, and says what it does not protect from.

    verdicts = run_programs([Program(code, test, entry_point), ...])  # one Verdict each, in the same order
    print(protection())                                               # which of the two levels below is in force

Verdicts are those of openai/human-eval (human_eval/execution.py): `code`, `test` and `check(<entry point>)` run as one
file in a Python of their own, and pass if nothing is raised. A program that ends itself, prints, or closes its files
does not pass: only a key that is drawn for it and written behind the last line counts. As in the reference, a program
that sets out to deceive its test can do so, since they share an interpreter.

Protection, tried for real before it is claimed:

- always: limits on time, CPU, memory per process, file size, open files, processes and (on Linux) threads; no
  privileges, and as root a user id of its own; an empty environment but for a folder to write to, which is removed
  afterwards; nothing to read from; output is thrown away;
- "namespaces": no network; of the disk only the interpreter's folders, read-only, and a small /tmp in memory; a program
  sees and signals only its own processes, and the kernel ends them all with the supervisor;
- "limits only" (Linux without namespaces; macOS, untested): os.remove, os.kill and the like are taken away against
  accidents, as in the reference; a program that calls one is "not supported". A program has the user's files and
  network; under root, those of a user without rights. Without root it can also signal and debug other processes of that
  user, this one included.

No protection from bugs in the kernel (system calls are not filtered), from side channels, or from many processes that
fill the memory together. Code that is hostile, and not just wrong, belongs in a virtual machine.
"""

import functools
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tqdm import tqdm

from scoring import sandbox_inside

STARTUP = 30.0  # seconds beyond the program's own after which the sandbox itself counts as hung
FIRST_UID, NUM_UIDS = 60578, 600  # for root: ids that belong to nobody (systemd.io/UIDS-GIDS)
LINUX = sys.platform == "linux"


class Program(NamedTuple):
    """A candidate solution and the test that judges it."""

    code: str  # prompt + completion
    test: str  # defines check(candidate)
    entry_point: str


class Verdict(NamedTuple):
    """`outcome`: "passed", "failed: <reason>", "not supported: <what>", "timed out" or "crashed: <signal>"."""

    passed: bool
    outcome: str


class Level(NamedTuple):
    """A way to start a sandbox."""

    tool: str  # "bubblewrap", "unshare", or "" where there are only limits
    command: list[str]  # what comes before the interpreter


def run_programs(programs: list[Program], timeout: float = 3.0, workers: int | None = None) -> list[Verdict]:
    """Run each program in its own sandbox, for `timeout` seconds, `workers` (default: all cores) at a time.

    A bar on stderr shows how far it is, if that is a terminal. Raises RuntimeError if no sandbox starts on this system.
    """
    level = _level()
    pool = ThreadPoolExecutor(workers or (len(os.sched_getaffinity(0)) if LINUX else os.cpu_count()))
    try:
        verdicts = pool.map(lambda program: _run(level, program, timeout), programs)
        return list(tqdm(verdicts, "running programs", len(programs), disable=None))
    finally:
        pool.shutdown(cancel_futures=True)


def protection() -> str:
    """The level in force: "namespaces: no network, private mounts and pids (<tool>)" or "limits only"."""
    tool = _level().tool
    return f"namespaces: no network, private mounts and pids ({tool})" if tool else "limits only"


@functools.cache
def _level() -> Level:
    """The strongest level that holds: a probe inside finds no file, port or process of ours."""
    with tempfile.NamedTemporaryFile() as ours, socket.create_server(("127.0.0.1", 0)) as server:
        connect = f"socket.socket().connect_ex({server.getsockname()!r})"
        probe = f"import os, socket\ndef look(): return os.path.exists({ours.name!r}), {connect} == 0, os.getppid()"
        for level in _levels():
            expected = "== (False, False, 1)" if level.tool else "is not None"
            verdict = _run(level, Program(probe, f"def check(look): assert look() {expected}", "look"), 10.0)
            if verdict.passed:
                return level
    hint = f" (root must let everyone enter the folders above {sys.base_prefix} and {tempfile.gettempdir()}: chmod o+x)"
    raise RuntimeError(f"no sandbox starts here: {verdict.outcome}{hint if os.geteuid() == 0 else ''}")


def _visible_paths() -> list[str]:
    """What a Python needs of the disk, without folders inside others of the list."""
    paths = {sys.prefix, sys.base_prefix, "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store"}
    paths = [path for path in {*paths, "/etc/ld.so.cache", "/usr/share/zoneinfo"} if os.path.exists(path)]
    return sorted(path for path in paths if not any(path.startswith(f"{other}/") for other in paths))


def _levels() -> list[Level]:
    """What may work on this system, strongest first."""
    levels = []
    if LINUX and (bwrap := shutil.which("bwrap")):
        spaces = "--unshare-net --unshare-pid --unshare-ipc --unshare-uts --as-pid-1 --die-with-parent"
        command = f"{spaces} --dev /dev --size {sandbox_inside.DISK} --tmpfs /tmp".split()
        for path in [*_visible_paths(), sandbox_inside.__file__]:
            command += ["--dir", os.path.dirname(path), "--ro-bind", path, path]  # --dir: for everyone to enter
        levels.append(Level("bubblewrap", [bwrap, *command]))
    if LINUX and (unshare := shutil.which("unshare")):
        # root does without a user namespace, so that every program can get a user id, and its limits, of its own
        user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
        spaces = "--net --pid --ipc --uts --mount --fork --kill-child".split()
        levels.append(Level("unshare", [unshare, *spaces, *user]))
    return [*levels, Level("", [])]


_counter = itertools.count(os.getpid())  # sandboxes that run at the same time get different user ids


def _run(level: Level, program: Program, timeout: float) -> Verdict:
    """Start one sandbox and wait for its verdict."""
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        uid = FIRST_UID + 2 * next(_counter) % NUM_UIDS
        inside = [sandbox_inside.__file__, level.tool, folder, str(timeout), str(uid), *_visible_paths()]
        # numpy's threads would not fit the limits; an interpreter may need its loader path
        env = {"OMP_NUM_THREADS": "1", "TMPDIR": folder, "LD_LIBRARY_PATH": os.environ.get("LD_LIBRARY_PATH", "")}
        with subprocess.Popen(
            [*level.command, sys.executable, "-I", *inside],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
            cwd="/",
            start_new_session=True,
        ) as process:
            try:
                outcome, errors = process.communicate(json.dumps(program).encode(), timeout + STARTUP)
            except subprocess.TimeoutExpired:
                outcome = b"timed out"
                os.killpg(process.pid, signal.SIGKILL)
    if not outcome:  # the supervisor died: of the program, or of what this system lacks
        last_line = errors.decode(errors="replace").strip().rpartition("\n")[2][:200]
        outcome = f"crashed: {sandbox_inside.ending(process.returncode)} {last_line}".strip().encode()
    return Verdict(outcome == b"passed", outcome.decode())
