"""Runs made one after the other or several at once, each by the commands that a user types: train.py, evaluate.py.

needed = {Run("tiny-math", "hellora"): {"tiny-math"}, ...}     # runs, and the tasks that each is scored on
make(needed, workplace)                                        # Ctrl-C at any moment; the same call continues
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from command import cli
from command.cli import InputError, RunError
from command.files import claimed, read_json, writable
from hub.checkpoint import EMBEDDED
from lab import ROOT
from lab.paper.runs import EFFECTS, Records, Run, outdated, spent, summarize
from run.folder import commit

SAVE_EVERY = 50  # steps between checkpoints: what an interruption costs at most

Needed = dict[Run, set[str]]  # a run, and the tasks that it is scored on


def pending(needed: Needed, records: Records) -> Needed:
    """What is still missing: the runs that lack scores, and the tasks of these scores."""
    lacking = {run: {task for task in tasks if not records.scores(run, task)} for run, tasks in needed.items()}
    return {run: tasks for run, tasks in lacking.items() if tasks}


def plan_line(needed: Needed, records: Records, jobs: int) -> str:
    """What is to be done, and the time it takes if every run takes as long as the median of the finished ones."""
    if not needed:
        return "every run is finished already"
    times = [seconds for record in records if (seconds := spent(record))]
    minutes = round(median(times) * len(needed) / jobs / 60) if times else None
    estimate = "" if minutes is None else f", about {minutes // 60} h {minutes % 60:02} min"
    return f"{len(needed)} runs to make, {jobs} at a time{estimate}"


@dataclass
class Workplace:
    """Where and how runs are made."""

    records: Records
    scratch: Path  # run folders and logs
    jobs: int = 1
    processes: int = 1  # of torchrun for each run
    train_flags: tuple[str, ...] = ()  # that change no result, for every run
    evaluate_flags: tuple[str, ...] = ()
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

    def call(self, script: str, arguments: list[str], log: Path) -> float:
        """Run a script of ours, its output appended to `log`.  -> seconds. Raises RunError if it fails."""
        began, start = time.perf_counter(), [sys.executable]
        if self.processes > 1:
            start += ["-m", "torch.distributed.run", "--nproc_per_node", str(self.processes)]
        command, environment = [*start, str(ROOT / script), *arguments], os.environ | {"OMP_NUM_THREADS": "1"}
        with log.open("a", encoding="utf-8") as file:
            child = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)
        self.children.add(child)
        if self.stopped.is_set():  # meanwhile
            child.terminate()
        status = child.wait()
        self.children.discard(child)
        if status:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise RunError(f"{script} ended with status {status}: {' '.join(last)} (see {log})")
        return time.perf_counter() - began


def remove_old(folder: Path) -> None:
    """Remove a run folder that another commit of this code has made."""
    try:
        made_by = read_json(folder / "config.json").get("commit")
    except InputError:  # there is none
        return
    if made_by != commit():
        with claimed(folder):  # or a train.py that has outlived its reproduce.py still writes there
            cli.note(f"{folder} was made by {made_by}; it is made again")
        shutil.rmtree(folder)


def make_run(run: Run, tasks: set[str], place: Workplace) -> dict:
    """Train and evaluate, and write the record.  -> the record"""
    records, name = place.records, place.records.name(run)
    folder, log = place.scratch / name, place.scratch / f"{name}.log"
    writable(records.folder / f"{name}.json")
    seconds, scored = {}, {}
    remove_old(folder)
    if run.method != "base":
        arguments = [*run.train_flags(str(folder), records.data), *place.train_flags]
        passed = place.call("train.py", [*arguments, "--save-every", str(SAVE_EVERY), "--resume"], log)
        seconds["train"] = max(passed, read_json(folder / "result.json")["seconds"])  # also those before a stop
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
        shutil.rmtree(folder / "stage-d", ignore_errors=True)
        tasks = tasks | outdated(run, records, folder)
    for task in sorted(tasks):
        source, scored[task] = run.model if run.method == "base" else str(folder), folder / f"evaluation-{task}"
        arguments = [*records.evaluate_flags(run, source, task, str(scored[task])), *place.evaluate_flags]
        seconds[f"evaluate {task}"] = place.call("evaluate.py", arguments, log)
    if run.model in EMBEDDED and run.method != "base" and not records.data:  # what a sweep's runs did, no one asks
        seconds["effects"] = place.call("reproduce.py", ["effects", str(folder), "--json", f"{folder}/{EFFECTS}"], log)
    return summarize(run, records, folder, seconds, scored)


def make(needed: Needed, place: Workplace) -> dict[Run, Exception]:
    """Make the runs that are missing, `place.jobs` at a time, in their order.  -> what went wrong in those that failed

    An interruption stops them after their current step.
    """
    left = pending(needed, place.records)
    cli.say(plan_line(left, place.records, place.jobs))
    failed, pool, began = {}, ThreadPoolExecutor(place.jobs), time.perf_counter()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        futures = {pool.submit(make_run, run, tasks, place): run for run, tasks in left.items()}
        for done, future in enumerate(as_completed(futures), 1):
            run = futures[future]
            try:
                scores = future.result()["scores"].items()
            except (InputError, RunError) as error:
                failed[run] = error
                cli.note(f"{run.title}: failed: {error}")
            else:
                texts = [f"{task} {100 * next(iter(score.values())):.1f} %" for task, score in scores]
                remaining = (time.perf_counter() - began) / done * (len(left) - done)
                cli.say(f"[{done}/{len(left)}] {run.title}: {', '.join(texts)}  {remaining / 60:.0f} min left")
    except KeyboardInterrupt:
        place.stop()
        pool.shutdown(cancel_futures=True)
        cli.note("stopped; the same command continues from here")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        pool.shutdown(cancel_futures=True)
    for run in pending(left, place.records).keys() - failed:
        failed[run] = RunError(f"{run.title}: the code, the model or the data changed; give the command again")
    return failed


def dry_run(needed: Needed, place: Workplace) -> Iterator[str]:
    """The command lines of the runs that are not there yet, with folders named by title, and how many there are."""
    left = pending(needed, place.records)
    for run, tasks in left.items():
        out = str(place.scratch / run.title)
        if run.method != "base":
            yield place.typed("train.py", [*run.train_flags(out, place.records.data), *place.train_flags])
        for task in sorted(tasks):
            source = run.model if run.method == "base" else out
            flags = place.records.evaluate_flags(run, source, task, f"{out}/evaluation-{task}")
            yield place.typed("evaluate.py", [*flags, *place.evaluate_flags])
    yield f"# {plan_line(left, place.records, place.jobs)}"
