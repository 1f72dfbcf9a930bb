"""What a run reports while it trains: log.jsonl, the progress bar, steps that are not finite, signals, the pictures."""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from command.cli import InputError, RunError, say
from command.files import parse_json, write_text
from model import MoETransformer
from routing.statistics import IdleExperts
from run.folder import remove_results
from run.processes import Processes
from run.state import last_state
from run.step import Step
from run.validation import Losses, out_of_patience


class Recorder:
    """The record of a run: one line of log.jsonl per step, and the totals that `result` returns.

        with recorder.recording(first):         # the log is open, records of steps before `first` stay in it
            if recorder.is_finite(step, ...):   # the rule of --on-nonfinite
                ...
            recorder.record(step, ...)
        recorder.result()

    Only the main process writes. Every process holds the same totals, because checkpoints contain them.
    """

    def __init__(
        self, folder: Path, model: MoETransformer, processes: Processes, *, title: str, steps: int,
        steps_per_epoch: int, skips_nonfinite: bool,
    ) -> None:  # fmt: skip
        self.folder, self.processes, self.title = folder, processes, title
        self.steps, self.steps_per_epoch, self.skips_nonfinite = steps, steps_per_epoch, skips_nonfinite
        self.idle_experts = IdleExperts(model)
        self.totals = {"examples": 0, "tokens": 0, "seconds": 0.0, "skipped": 0}
        self.losses = []  # per step, None for a skipped one; after a resume complete on the main process alone
        self.log = None

    @contextmanager
    def recording(self, first: int) -> Iterator[None]:
        """Open log.jsonl, whose records of steps before `first` stay. Start the clock and the progress bar."""
        if self.processes.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_results(self.folder, is_new=first == 1)
            records = keep_records(self.folder / "log.jsonl", first - 1)
            self.losses = [record["loss"] for record in records]
            self.log = (self.folder / "log.jsonl").open("a", encoding="utf-8")
        shown = self.processes.is_main and sys.stderr.isatty()
        self.bar = tqdm(total=self.steps, initial=first - 1, disable=not shown, unit="step")
        self.done = first - 1
        self.first, self.began = first, time.perf_counter() - self.totals["seconds"]
        try:
            yield
        finally:
            self.bar.close()
            if self.log:
                self.log.close()

    def is_finite(self, step: int, loss: float, norm: float, examples: list[str]) -> bool:
        """Whether loss and gradient norm are finite. If not, the step is skipped, or RunError is raised.

        examples: the ids of the batch, for the message.
        """
        if math.isfinite(loss) and math.isfinite(norm):
            return True
        if self.skips_nonfinite:
            self.totals["skipped"] += 1
            say(f"step {step}: loss {loss}, gradient norm {norm}: skipped")
            return False
        good = last_state(self.folder / "checkpoint")
        raise RunError(
            f"step {step}: loss {loss}, gradient norm {norm}, on examples {' '.join(examples)}; "
            f"the last good checkpoint is {good or 'none (--save-every N makes them)'}. Lower --lr, look at "
            "the examples, or pass --on-nonfinite skip"
        )

    def record(self, step: int, done: Step, norm: float, lr: float, batch: int, extra: dict[str, float]) -> dict:
        """Add a step of `batch` examples to the log and to the totals.  -> its record

        norm: of the gradient, before clipping. lr: the rate of this step. extra: further keys of its record.
        """
        self.idle_experts.observe(done.routing[0], end_of_epoch=step % self.steps_per_epoch == 0)
        loss, totals = done.loss.item(), self.totals
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        self.done = step
        totals["examples"] += batch
        totals["tokens"] += done.tokens
        totals["seconds"] = seconds = time.perf_counter() - self.began
        self.losses.append(loss if is_finite else None)
        record = {
            "step": step,
            "loss": self.losses[-1],  # nats per target token, mean over the global batch; None: the step was skipped
            "grad_norm": norm if is_finite else None,  # before clipping
            "lr": lr,
            "target_tokens": done.target_tokens,
            "samples_per_s": totals["examples"] / seconds,
            "tokens_per_s": totals["tokens"] / seconds,
            "seconds": seconds,
        } | extra
        if self.log:
            print(json.dumps(record), file=self.log, flush=True)
        self.show(record, loss, norm)
        return record

    def show(self, record: dict, loss: float, norm: float) -> None:
        """The progress bar on a terminal; elsewhere one line for every twentieth of the run."""
        step, speed = record["step"], f"{record['samples_per_s']:.1f} samples/s"
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed}", refresh=False)
        self.bar.update()
        if self.bar.disable and (step == self.first or step % max(1, self.steps // 20) == 0):
            left = record["seconds"] / step * (self.steps - step)
            say(
                f"step {step:5d}/{self.steps}  loss {loss:.4f}  grad norm {norm:.3f}  {speed}  "
                f"{record['tokens_per_s']:,.0f} tokens/s  {left:.0f} s left"
            )

    def sync(self) -> None:
        """Wait until the log is on the disk: a checkpoint must not be ahead of it."""
        if self.log:
            os.fsync(self.log.fileno())

    def state_dict(self) -> dict[str, float]:
        return self.totals

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.totals |= state

    def result(self, validated: Losses) -> dict:
        """Draw loss.png and sum up the run.  -> for result.json: losses, speed, idle experts

        Raises RunError if every step was skipped.
        """
        losses = [loss for loss in self.losses if loss is not None]
        if self.processes.is_main:
            if not losses:
                raise RunError("every step was skipped: nothing has been learnt; lower --lr, or look at the data")
            draw_loss(losses, validated, self.folder / "loss.png", self.title)
        idle = self.idle_experts.names()
        if idle:
            say(f"{len(idle)} adapted experts (layer:expert) saw no token in an epoch, or in the run: {' '.join(idle)}")
        return {
            "steps": self.done,
            **({"planned_steps": self.steps} if self.done < self.steps else {}),
            "first_loss": losses[0] if losses else None,
            "last_loss": losses[-1] if losses else None,
            "samples_per_s": self.totals["examples"] / self.totals["seconds"],
            "tokens_per_s": self.totals["tokens"] / self.totals["seconds"],
            "seconds": self.totals["seconds"],
            "skipped_steps": self.totals["skipped"],
            "idle_hot_experts": idle,
        }


def keep_records(path: Path, steps: int) -> list[dict]:
    """Drop the records of log.jsonl after the first `steps`: their steps are done again.  -> those that stay

    Raises InputError if it does not hold them.
    """
    records = read_records(path, steps, log_lines(path)[:steps])
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))
    return records


def check_records(path: Path, steps: int, patience: int | None) -> None:
    """Raise InputError if log.jsonl holds neither the records of exactly `steps` steps nor of a run out of patience."""
    lines = log_lines(path)
    records = read_records(path, min(steps, len(lines)) if patience else steps, lines)
    validated = [(record["step"], record["valid_loss"]) for record in records if record.get("valid_loss") is not None]
    if len(records) < steps and not out_of_patience(validated, patience):
        read_records(path, steps, lines)


def log_lines(path: Path) -> list[str]:
    """The lines of log.jsonl; none if there is no such file. Raises InputError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def read_records(path: Path, steps: int, lines: list[str]) -> list[dict]:
    """The records of these lines of a log, one for each of the steps 1..steps. Raises InputError otherwise."""
    try:
        records = [parse_json(line, f"line {i}", dict) for i, line in enumerate(lines, 1)]
        if [record.get("step") for record in records] != list(range(1, steps + 1)):
            raise InputError("steps are missing")
    except InputError as error:
        raise InputError(f"{path}: not the log of the first {steps} steps ({error}); start the run anew") from None
    return records


def summary(result: dict) -> str:
    """The contents of result.json in one line."""
    losses = f"loss {result['first_loss']:.4f} -> {result['last_loss']:.4f} in {result['steps']} steps"
    speed = f"{result['samples_per_s']:.1f} samples/s, {result['seconds']:.0f} s"
    return f"{result['method']} on {result['task']}: {losses}, {speed}"


@contextmanager
def stop_signals(processes: Processes) -> Iterator[Callable[[], int]]:
    """SIGTERM and the first Ctrl-C let the step finish.  -> function: the signal that any process received, or 0"""
    received = [0]

    def remember(number: int, frame) -> None:
        received[0] = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    def signalled() -> int:
        if processes.count == 1:
            return received[0]
        anywhere = torch.tensor(received, device=processes.device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)  # all processes stop after the same step
        return int(anywhere)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield signalled
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(number: int, step: int) -> None:
    """End the program after `step` and its checkpoint, because of the signal `number`, with the exit status for it."""
    say(f"stopped by {signal.Signals(number).name} after step {step}; --resume continues from there")
    raise SystemExit(128 + number)


def draw_loss(losses: list[float], validated: Losses, path: Path, title: str) -> None:
    """The loss of every step, its moving average over a twentieth of the run, and the validation losses."""
    from matplotlib.figure import Figure  # not pyplot: it has global state, and looks for a display

    width = max(1, len(losses) // 20)
    mean = torch.tensor(losses).unfold(0, width, 1).mean(-1)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=0.8, label="one step")
    axes.plot(range(width, len(losses) + 1), mean, color="tab:blue", label=f"mean of {width} steps")
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", color="tab:orange", markersize=3, label="validation")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)", title=title)
    axes.legend(frameon=False)
    figure.savefig(path)
