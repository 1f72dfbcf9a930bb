"""What a run reports while it trains: log.jsonl, the progress bar, steps that are not finite, signals, the pictures."""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from command.cli import InputError, RunError, say
from command.files import parse_json, write_jsonl
from machine.processes import Processes
from model import MoETransformer
from run.folder import remove_results
from run.inputs import Run
from run.observer import Observer
from run.validation import Losses, out_of_patience
from training_step import Step


@dataclass
class FiniteSteps(Observer):
    """The rule of --on-nonfinite: a step whose loss or gradient is not finite ends the run, or is skipped."""

    skips: bool

    def after(self, number: int, done: Step) -> None:
        """Raises RunError, which names the examples."""
        if done.is_finite:
            return
        values = f"step {number}: loss {done.loss.item()}, gradient norm {done.grad_norm}"
        if not self.skips:
            raise RunError(
                f"{values}, on examples {' '.join(done.examples)}; lower --lr, look at the examples, or pass "
                "--on-nonfinite skip"
            )
        say(f"{values}: skipped")


class IdleExperts:
    """The adapted experts that no token reached in a whole epoch, or in a shorter run: they have learnt nothing."""

    def __init__(self, model: MoETransformer) -> None:
        self.hot = torch.zeros(len(model.config.moe_layers), model.config.num_experts, dtype=torch.bool)
        for row, ids in zip(self.hot, model.adapter.hot if model.adapter else (), strict=False):
            row[ids] = True
        self.counts = torch.zeros(self.hot.shape, dtype=torch.float64)  # [L, E] since the epoch began
        self.missed = torch.zeros_like(self.hot)  # [L, E] in at least one epoch
        self.epochs = 0

    def observe(self, counts: Tensor, end_of_epoch: bool) -> None:
        """Add the counts [L, E] of one step."""
        self.counts += counts
        if end_of_epoch:
            self.missed |= self.hot & (self.counts == 0)
            self.counts.zero_()
            self.epochs += 1

    def names(self) -> list[str]:
        """The idle experts found so far, each as "layer:expert"."""
        missed = self.missed if self.epochs else self.hot & (self.counts == 0)
        return [f"{layer}:{e}" for layer, e in missed.nonzero().tolist()]

    def state_dict(self) -> dict:
        return {"counts": self.counts.tolist(), "missed": self.missed.tolist(), "epochs": self.epochs}

    def load_state_dict(self, state: dict) -> None:
        self.counts.copy_(torch.tensor(state["counts"]))
        self.missed.copy_(torch.tensor(state["missed"]))
        self.epochs = state["epochs"]


class Recorder(Observer):
    """One line of log.jsonl per step, the progress bar, and the totals of the run.

    Only the main process writes. Every process holds the same totals, because checkpoints contain them.
    """

    name = "totals"

    def __init__(self, run: Run, model: MoETransformer, optimizer: torch.optim.Optimizer, folder: Path) -> None:
        self.run, self.optimizer, self.folder = run, optimizer, folder
        self.idle_experts = IdleExperts(model)
        self.totals = {"examples": 0, "tokens": 0, "seconds": 0.0, "skipped": 0}
        self.records = []  # of log.jsonl; after a resume complete on the main process alone
        self.log = None

    def start(self, first: int) -> None:
        """Open log.jsonl, whose records of steps before `first` stay. Start the clock and the progress bar."""
        if self.run.processes.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_results(self.folder, is_new=first == 1)
            path = self.folder / "log.jsonl"
            self.records = read_records(path, first - 1)
            write_jsonl(path, self.records)  # later steps are done again
            self.log = path.open("a", encoding="utf-8")
        shown = self.run.processes.is_main and sys.stderr.isatty()
        self.bar = tqdm(total=self.run.steps, initial=first - 1, disable=not shown, unit="step")
        self.first, self.last, self.began = first, first - 1, time.perf_counter() - self.totals["seconds"]

    def close(self) -> None:
        self.bar.close()
        if self.log:
            self.log.close()

    def after(self, number: int, done: Step) -> None:
        """Add the step to the log and to the totals."""
        self.idle_experts.observe(done.counts, end_of_epoch=number % self.run.steps_per_epoch == 0)
        totals = self.totals
        self.last = number
        totals["examples"] += len(done.examples)
        totals["tokens"] += done.tokens
        totals["skipped"] += not done.is_finite
        totals["seconds"] = seconds = time.perf_counter() - self.began
        done.record = {
            "step": number,
            # nats per target token, mean over the global batch; None: the step was skipped
            "loss": done.loss.item() if done.is_finite else None,
            "grad_norm": done.grad_norm if done.is_finite else None,  # before clipping
            "lr": self.optimizer.param_groups[0]["lr"],
            "target_tokens": done.target_tokens,
            "samples_per_s": totals["examples"] / seconds,
            "tokens_per_s": totals["tokens"] / seconds,
            "seconds": seconds,
        } | done.record
        self.records.append(done.record)
        if self.log:
            print(json.dumps(done.record), file=self.log, flush=True)
        self.show(done)

    def show(self, done: Step) -> None:
        """The progress bar on a terminal; elsewhere one line for every twentieth of the run."""
        record, loss = done.record, done.loss.item()
        number, speed = record["step"], f"{record['samples_per_s']:.1f} samples/s"
        self.bar.set_postfix_str(f"loss {loss:.4f}, {speed}", refresh=False)
        self.bar.update()
        if self.bar.disable and (number == self.first or number % max(1, self.run.steps // 20) == 0):
            left = record["seconds"] / number * (self.run.steps - number)
            say(
                f"step {number:5d}/{self.run.steps}  loss {loss:.4f}  grad norm {done.grad_norm:.3f}  {speed}  "
                f"{record['tokens_per_s']:,.0f} tokens/s  {left:.0f} s left"
            )

    def state_dict(self) -> dict:
        """Asked for when a checkpoint is written, which must not be ahead of the log on the disk."""
        if self.log:
            os.fsync(self.log.fileno())
        return self.totals | {"idle_experts": self.idle_experts.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.idle_experts.load_state_dict(state["idle_experts"])
        self.totals = {name: state[name] for name in self.totals}

    def result(self) -> dict:
        """For result.json: losses, speed, idle experts. Raises RunError if every step was skipped."""
        losses = values(self.records, "loss")
        if self.run.processes.is_main and not losses:
            raise RunError("every step was skipped: nothing has been learnt; lower --lr, or look at the data")
        idle = self.idle_experts.names()
        if idle:
            say(f"{len(idle)} adapted experts (layer:expert) saw no token in an epoch, or in the run: {' '.join(idle)}")
        return {
            "steps": self.last,
            **({"planned_steps": self.run.steps} if self.last < self.run.steps else {}),
            "first_loss": losses[0][1] if losses else None,
            "last_loss": losses[-1][1] if losses else None,
            "samples_per_s": self.totals["examples"] / self.totals["seconds"],
            "tokens_per_s": self.totals["tokens"] / self.totals["seconds"],
            "seconds": self.totals["seconds"],
            "skipped_steps": self.totals["skipped"],
            "idle_hot_experts": idle,
        }

    def draw(self) -> None:
        if self.run.processes.is_main:
            losses = [loss for _, loss in values(self.records, "loss")]
            title = f"{self.run.settings.method} on {self.run.settings.task}"
            draw_loss(losses, values(self.records, "valid_loss"), self.folder / "loss.png", title)


def values(records: list[dict], name: str) -> list[tuple[int, float]]:
    """(step, value) of every record that has a value of this name."""
    return [(record["step"], record[name]) for record in records if record.get(name) is not None]


def check_records(path: Path, steps: int, patience: int | None) -> None:
    """Raise InputError if the log.jsonl of a stage D is neither of `steps` steps nor of a run out of patience."""
    records = read_records(path)
    if len(records) != steps and not out_of_patience(values(records, "valid_loss"), patience):
        raise InputError(
            f"stage D of this run did {len(records)} steps, and its choice of entries of B is of no use after {steps}; "
            f"expected --steps {len(records)}, or another --out"
        )


def read_records(path: Path, steps: int | None = None) -> list[dict]:
    """The records of a log, or those of its first `steps` steps. Raises InputError unless there is one for each."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[:steps] if path.exists() else []
        records = [parse_json(line, f"line {i}", dict) for i, line in enumerate(lines, 1)]
        expected = len(records) if steps is None else steps
        if [record.get("step") for record in records] != list(range(1, expected + 1)):
            raise InputError("steps are missing")
    except (InputError, OSError) as error:
        raise InputError(f"{path}: not the log of a run from its first step on ({error}); start a new run") from None
    return records


def summary(result: dict) -> str:
    """The contents of result.json in one line."""
    losses = f"loss {result['first_loss']:.4f} -> {result['last_loss']:.4f} in {result['steps']} steps"
    speed = f"{result['samples_per_s']:.1f} samples/s, {result['seconds']:.0f} s"
    return f"{result['method']} on {result['task']}: {losses}, {speed}"


class Signals(Observer):
    """Signals to end, the first Ctrl-C among them, let the step finish and then end the training on every process."""

    # A closed terminal sends SIGHUP, and a scheduler can be told to send SIGUSR1 before the time is up.
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.received = 0  # by this process
        self.agreed, self.number = 0, 0  # which signal ends the run, and after which step

    def start(self, first: int) -> None:
        ignored = [number for number in self.numbers if signal.getsignal(number) is signal.SIG_IGN]  # by nohup, say
        self.before = {number: signal.signal(number, self.remember) for number in self.numbers if number not in ignored}

    def remember(self, number: int, frame) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    def after(self, number: int, done: Step) -> None:
        self.agreed, self.number = self.received, number
        if self.processes.count > 1:  # all processes stop after the same step
            anywhere = torch.tensor(self.received, device=self.processes.device)
            dist.all_reduce(anywhere, dist.ReduceOp.MAX)
            self.agreed = int(anywhere)
        self.interrupted = self.agreed > 0

    def close(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def exit_if_interrupted(self) -> None:
        """End the program with the exit status of the signal, if there was one."""
        if self.interrupted:
            name = signal.Signals(self.agreed).name
            say(f"stopped by {name} after step {self.number}; --resume continues from there")
            raise SystemExit(128 + self.agreed)


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
