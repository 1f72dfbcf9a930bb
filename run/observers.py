"""The observers of a training: rank growth, validation, log and pictures, reports, checkpoints, signals.

observers = Observers(run, model, optimizer, out)
first = observers.checkpoints.resume()    # continue from the newest checkpoint
with observers.watching(first):
    for number, ... in ...:
        if observers.ended: break
        done = train_step(..., on_gradients=observers.on_gradients)
        observers.after(number, done)
observers.result()                        # for result.json; save what was learnt, then
observers.draw()
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import torch

from command.cli import is_main_process, note
from hellora import count_parameters
from model import MoETransformer
from neighbours.drlora import RankGrowth, draw_ranks
from run.inputs import Run
from run.log import FiniteSteps, Recorder, Signals
from run.observer import Observer
from run.report import Report
from run.state import Checkpoints
from run.validation import Validation
from training_step import Step


class Growth(RankGrowth, Observer):
    """DR-LoRA: the ranks of the experts grow."""

    name = "growth"

    def __init__(self, model: MoETransformer, rank: int, steps: int, folder: Path) -> None:
        super().__init__(model, rank, steps)
        self.folder = folder

    def on_gradients(self, done: Step) -> None:
        self.observe(done.counts.float())

    def after(self, number: int, done: Step) -> None:
        if not done.is_finite:
            self.forget()
        self.grow(number)
        done.record |= self.spent()

    def result(self) -> dict:
        trainable, total = (size - self.unused() for size in count_parameters(self.model))
        return {"trainable": trainable, "trainable_percent": 100 * trainable / total}

    def draw(self) -> None:
        if is_main_process():
            draw_ranks(self.history, self.folder / "ranks.png")


class Observers:
    """All observers of one training, in the order in which they are called."""

    def __init__(self, run: Run, model: MoETransformer, optimizer: torch.optim.AdamW, out: Path) -> None:
        s = run.settings
        growth = Growth(model, s.rank, run.steps, out) if run.method.grows else None
        validation = Validation(run, model, out) if run.held_out else None
        reports = s.report_to != "none" and run.processes.is_main
        service = Report(s.report_to, out, asdict(s)) if reports else None
        finite = FiniteSteps(skips=s.on_nonfinite == "skip")
        self.signals = Signals(run.processes)
        # A step whose gradients are not finite ends the run before anything uses them. The recorder writes what growth
        # and validation put into the step's record, and the service sends what the recorder has made of it.
        recorder = Recorder(run, model, optimizer, out)
        members = (self.signals, finite, growth, validation, recorder, service)
        self.members: list[Observer] = [each for each in members if each is not None]
        self.checkpoints = Checkpoints(run, model, optimizer, out, self.members)
        self.members = [*self.members, self.checkpoints]  # last: it keeps what the others did in this step

    @contextmanager
    def watching(self, first: int) -> Iterator[None]:
        with ExitStack() as started:
            for each in self.members:
                each.start(first)
                started.callback(each.close)
            yield

    @property
    def ended(self) -> bool:
        return any(each.ended or each.interrupted for each in self.members)

    def on_gradients(self, done: Step) -> None:
        for each in self.members:
            each.on_gradients(done)

    def after(self, number: int, done: Step) -> None:
        for each in self.members:
            each.after(number, done)

    def result(self) -> dict:
        return {key: value for each in self.members for key, value in each.result().items()}

    def draw(self) -> None:
        """The pictures. One that fails is a note: what was learnt is saved."""
        for each in self.members:
            try:
                each.draw()
            except Exception as error:
                note(f"a picture could not be drawn ({type(error).__name__}: {error}); the run is not affected")
