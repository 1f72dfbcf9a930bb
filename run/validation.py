"""Validation: the loss on held-out examples every few steps. The best result is kept, and --patience ends a run.

RUN/adapter-best/ (RUN/model-best/ of full fine-tuning) is what had been learnt at the step with the lowest validation
loss, and its validation.json names this step. RUN/adapter/ is what has been learnt at the end.
"""

import math
from pathlib import Path

from command.cli import note, say
from command.files import read_json, remove_folder
from model import MoETransformer
from run.inputs import Run
from run.observer import Observer
from run.output import save
from run.subject import BEST
from training_step import Step, held_out_loss

Losses = list[tuple[int, float]]  # (step, validation loss)


def best_of(losses: Losses) -> tuple[int, float] | None:
    """The step with the lowest loss, the first of several, and this loss."""
    return min((pair for pair in losses if math.isfinite(pair[1])), key=lambda pair: pair[1], default=None)


def out_of_patience(losses: Losses, patience: int | None) -> bool:
    """Whether the last `patience` validations have all failed to be the best."""
    if patience is None or not losses:
        return False
    best = best_of(losses)
    return sum(step > (best[0] if best else 0) for step, _ in losses) >= patience


class Validation(Observer):
    """The validations of one training, whose run holds out examples. Every process must call its methods alike.

    They are due every `every` steps, wherever the training ends: then an extended run is the same as a straight one.
    What is learnt at a last step in between is validated for result.json alone.
    """

    name = "validations"

    def __init__(self, run: Run, model: MoETransformer, out: Path) -> None:
        self.run, self.model, self.patience = run, model, run.settings.patience
        self.every = run.settings.valid_every or run.steps_per_epoch
        self.folder = out / BEST["adapter" if model.adapter else "model"]  # of the best result
        self.losses: Losses = []
        self.kept: tuple[int, float] | None = None  # step and loss of what is in the folder
        self.in_checkpoint: tuple[int, float] | None = None  # those that the newest checkpoint names
        self.earlier = out / f".{self.folder.name}.in-checkpoint"  # holds that result, once there is a better
        self.step = 0

    @property
    def ended(self) -> bool:
        """Whether --patience is used up."""
        return out_of_patience(self.losses, self.patience)

    def after(self, number: int, done: Step) -> None:
        """Validate if it is due, and keep the best."""
        self.step = number
        if number % self.every:
            return
        loss = self.measure()
        self.losses.append((number, loss))
        is_best = best_of(self.losses) == (number, loss)
        if is_best:
            self.keep(number, loss)
        say(f"step {number}: validation loss {loss:.4f}{', the best so far' if is_best else ''}")
        if self.ended:
            best = f"the best is that of step {self.kept[0]}" if self.kept else "none was finite"
            say(f"{self.patience} validations without a better one: stopping after step {number}; {best}")
        done.record["valid_loss"] = loss if math.isfinite(loss) else None

    def measure(self) -> float:
        """The validation loss now."""
        run = self.run
        return held_out_loss(self.model, run.held_out, run.settings.micro_batch, run.processes)[0]

    def keep(self, number: int, loss: float) -> None:
        """Save the best result so far. The one that the newest checkpoint names stays, for who continues from there."""
        if self.run.processes.is_main and self.kept and self.kept == self.in_checkpoint:
            remove_folder(self.earlier)
            self.folder.rename(self.earlier)
        self.kept = (number, loss)
        save(self.run, self.model, self.folder, {"step": number, "valid_loss": loss})

    def result(self) -> dict[str, float | int | None]:
        """For result.json: the validation losses of the last result and of the best, and the step of the best."""
        if self.run.processes.is_main:
            remove_folder(self.earlier)
        is_validated = self.losses and self.losses[-1][0] == self.step
        last = self.losses[-1][1] if is_validated else self.measure()
        if not is_validated:
            say(f"step {self.step}: validation loss {last:.4f}, of the last result")
        best = {"best_valid_loss": self.kept[1], "best_step": self.kept[0]} if self.kept else {}
        return {"last_valid_loss": last if math.isfinite(last) else None} | best

    def state_dict(self) -> dict:
        self.in_checkpoint = self.kept
        return {"step": self.step, "losses": self.losses}

    def load_state_dict(self, state: dict) -> None:
        """Continue. A result that was kept at a later step than that of the checkpoint will be made again."""
        self.step = state["step"]
        self.losses = [(step, loss) for step, loss in state["losses"]]
        best = best_of(self.losses)
        if self.run.processes.once(lambda: self.restore(best)):
            self.kept = self.in_checkpoint = best

    def restore(self, best: tuple[int, float] | None) -> bool:
        """Put the result of the step of `best` where the best one lies.  -> whether it is there"""
        for folder in (self.folder, self.earlier):
            validation = read_json(folder / "validation.json", dict, missing={})
            if best and validation.get("step") == best[0]:
                if folder != self.folder:
                    remove_folder(self.folder)
                    folder.rename(self.folder)
                return True
        remove_folder(self.folder)
        if best:
            note(
                f"{self.folder}, which held the best result (step {best[0]}), is gone; the next better one will be kept"
            )
        return False
