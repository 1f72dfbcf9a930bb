"""Runs made one after the other or several at once, each by the commands that a user types: train.py, evaluate.py.

    needed = {Run("tiny-math", "hellora"): {"tiny-math"}, ...}     # runs, and the tasks that each is scored on
    make(pending(needed, records), workplace)                      # Ctrl-C at any moment; the same call continues

A run that another process makes is left to it: a file beside the run's folder is locked meanwhile, and the lock ends
with the last process that holds it, however it ends.
"""

import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import IO

from command import cli
from command.cli import InputError, RunError
from command.files import read_json, writable, write_text
from lab import ROOT
from lab.paper.runs import Records, Run, outdated, summarize
from run.folder import commit

SAVE_EVERY = 50  # steps between checkpoints: what an interruption costs at most
POLL = 5  # seconds between looks at a run that another process makes
# Measured on one idle core with the embedded model: for when there is no finished run to judge by.
TRAIN_SECONDS, EVALUATE_SECONDS, QUICK_SECONDS = 120, {"tiny-math": 60, "tiny-code": 400, "tiny-safety": 60}, 8

Needed = dict[Run, set[str]]  # a run, and the tasks that it is scored on


def add(needed: Needed, more: Needed) -> None:
    """Add the runs of another table to those that are needed."""
    for run, tasks in more.items():
        needed[run] = needed.get(run, set()) | tasks


def pending(needed: Needed, records: Records) -> Needed:
    """What is still missing: the runs that lack scores, and the tasks of these scores."""
    lacking = {run: {task for task in tasks if not records.scores(run, task)} for run, tasks in needed.items()}
    return {run: tasks for run, tasks in lacking.items() if tasks}


# ------------------------------------------------------------------------------------------------ how long it takes


def expected_seconds(needed: Needed, records: Records) -> float:
    """The estimated time of the runs on one worker, from similar finished runs, or from the constants above."""
    finished = list(records)
    total = 0.0
    for run, tasks in needed.items():
        parts = [*(f"evaluate {task}" for task in sorted(tasks)), *(["train"] if run.method != "base" else [])]
        for part in parts:
            default = EVALUATE_SECONDS.get(part.removeprefix("evaluate "), TRAIN_SECONDS)
            total += like(run, part, finished) or (QUICK_SECONDS if run.steps else default)
    return total


def like(run: Run, part: str, finished: list[dict]) -> float | None:
    """Median seconds of a part of finished runs of this model and size: of the same method if there are any."""
    same = ("model", "steps", *(["task"] if part == "train" else []))
    alike = [r for r in finished if part in r["seconds"] and all(r["run"][key] == getattr(run, key) for key in same)]
    closest = [record for record in alike if record["run"]["method"] == run.method] or alike
    return median(record["seconds"][part] for record in closest) if closest else None


def duration(seconds: float) -> str:
    """Seconds as 2 h 05 min, or as 4 min."""
    minutes = max(1, round(seconds / 60))
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"


# ------------------------------------------------------------------------------------------------------ making runs


@dataclass
class Workplace:
    """Where and how runs are made."""

    records: Records
    scratch: Path  # run folders and logs
    jobs: int = 1
    processes: int = 1  # of torchrun for each run
    allow_code_execution: bool = False
    saving: Callable[[Run], list[str]] = lambda run: []  # flags of train.py with which a run fits into memory
    stopped: threading.Event = field(default_factory=threading.Event)
    children: set[subprocess.Popen] = field(default_factory=set)

    def typed(self, script: str, arguments: Iterable[str]) -> str:
        """The command line of a script of ours as a user types it."""
        start = f"torchrun --nproc_per_node {self.processes}" if self.processes > 1 else "python"
        return f"{start} {script} {shlex.join(arguments)}"

    def stop(self) -> None:
        """Ask the children to end. train.py ends after its step, with a checkpoint."""
        self.stopped.set()
        for child in list(self.children):
            child.terminate()

    def call(self, script: str, arguments: list[str], log: Path, lock: IO) -> float:
        """Run a script of ours, its output appended to `log`.  -> seconds. Raises RunError if it fails."""
        began, start = time.perf_counter(), [sys.executable]
        if self.processes > 1:
            start += ["-m", "torch.distributed.run", "--nproc_per_node", str(self.processes)]
        command = [*start, str(ROOT / script), *arguments]
        with log.open("a", encoding="utf-8") as file:
            options = {"stdout": file, "stderr": subprocess.STDOUT, "pass_fds": [lock.fileno()]}
            child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)
        self.children.add(child)
        if self.stopped.is_set():  # meanwhile
            child.terminate()
        status = child.wait()
        self.children.discard(child)
        if status:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RunError(f"{script} ended with status {status}: {' '.join(last)} (see {log})")
        return time.perf_counter() - began


@contextmanager
def locked(path: Path) -> Iterator[IO | None]:
    """The file `path`, locked for this process and its children; None if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield file


def remove_old(folder: Path) -> None:
    """Remove a run folder that another commit of this code has made, and remember the present one beside it."""
    mark, now = folder.with_name(f"{folder.name}.commit"), str(commit())
    if folder.exists() and (before := mark.read_text() if mark.is_file() else "an unknown commit") != now:
        cli.note(f"{folder} was made by {before}; it is made again")
        shutil.rmtree(folder)
    write_text(mark, now)


def make_run(run: Run, tasks: set[str], place: Workplace) -> dict | None:
    """Train and evaluate, and write the record.  -> the record; None if another process makes the run"""
    records, name = place.records, place.records.name(run)
    folder, log = place.scratch / name, place.scratch / f"{name}.log"
    with locked(place.scratch / f"{name}.lock") as lock:
        if lock is None:
            return None
        tasks = pending({run: tasks}, records).get(run)
        if not tasks:
            return records.find(run)[1]
        writable(records.folder / f"{name}.json")
        seconds, scored = {}, {}
        remove_old(folder)
        if run.method != "base":
            arguments = [*run.train_flags(str(folder), records.data), *place.saving(run)]
            arguments += ["--save-every", str(SAVE_EVERY), "--resume"]
            spent = place.call("train.py", arguments, log, lock)
            seconds["train"] = max(spent, read_json(folder / "result.json")["seconds"])  # also those before a stop
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            shutil.rmtree(folder / "stage-d", ignore_errors=True)
            tasks |= outdated(run, records, folder)
        for task in sorted(tasks):
            source, scored[task] = run.model if run.method == "base" else str(folder), folder / f"evaluation-{task}"
            arguments = records.evaluate_flags(run, source, task, str(scored[task]))
            arguments += ["--allow-code-execution"] if place.allow_code_execution else []
            seconds[f"evaluate {task}"] = place.call("evaluate.py", arguments, log, lock)
        return summarize(run, records, folder, seconds, scored)


def make(needed: Needed, place: Workplace) -> dict[Run, Exception]:
    """Make runs, `place.jobs` at a time, in their order.  -> what went wrong in those that failed

    An interruption stops them after their current step.
    """
    failed, total, done, waiting = {}, len(needed), 0, False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    pool = ThreadPoolExecutor(place.jobs)
    try:
        while needed:
            futures = {pool.submit(make_run, run, tasks, place): run for run, tasks in needed.items()}
            for future in as_completed(futures):
                run = futures[future]
                try:
                    record = future.result()
                except (InputError, RunError) as error:
                    failed[run] = error
                    cli.note(f"{run.title}: failed: {error}")
                    continue
                if record:
                    done += 1
                    left = pending({r: needed[r] for r in needed if r not in failed}, place.records)
                    if run in left:
                        failed[run] = RunError("the code, the model or the data changed while it ran")
                    rest = duration(expected_seconds(left, place.records) / place.jobs) if left else "nothing"
                    cli.say(f"[{done}/{total}] {described(run, record)}; {rest} left")
            needed = {run: t for run, t in pending(needed, place.records).items() if run not in failed}
            if needed and not waiting:
                waiting = True
                cli.say(f"waiting for {len(needed)} runs that another process makes")
            time.sleep(POLL if needed else 0)
    except KeyboardInterrupt:
        place.stop()
        pool.shutdown(cancel_futures=True)
        cli.note("stopped; the same command continues from here")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        pool.shutdown()
    return failed


def described(run: Run, record: dict) -> str:
    """A finished run in a line: its scores and the time it took."""
    scores = ", ".join(f"{task} {100 * headline(found):.1f} %" for task, found in record["scores"].items())
    return f"{run.title}: {scores}, {duration(sum(record['seconds'].values()))}"


def headline(found: dict) -> float:
    """The first number of score.json."""
    return next(iter(found.values()))


def plan_line(needed: Needed, records: Records, jobs: int) -> str:
    """What is to be done, in words, before it begins."""
    if not needed:
        return "every run is finished already"
    spent = duration(expected_seconds(needed, records) / jobs)
    return f"{len(needed)} runs to make, {jobs} at a time: about {spent}"


def commands(run: Run, tasks: set[str], place: Workplace) -> Iterator[str]:
    """The command lines of a run, with a folder named by its title."""
    out = str(place.scratch / run.title)
    if run.method != "base":
        yield place.typed("train.py", [*run.train_flags(out, place.records.data), *place.saving(run)])
    for task in sorted(tasks):
        source = run.model if run.method == "base" else out
        yield place.typed("evaluate.py", place.records.evaluate_flags(run, source, task, f"{out}/evaluation-{task}"))


def dry_run(needed: Needed, place: Workplace) -> Iterator[str]:
    """The command lines of the runs that are not there yet, and about how long they take."""
    left = pending(needed, place.records)
    for run, tasks in left.items():
        yield from commands(run, tasks, place)
    yield f"# {plan_line(left, place.records, place.jobs)}"
