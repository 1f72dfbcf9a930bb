"""--report-to: the records of log.jsonl, sent to TensorBoard or Weights & Biases by the package that is installed.

In Weights & Biases, a resumed run is a second run of the same name. In TensorBoard, repeated steps replace old ones.
"""

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from command.cli import InputError
from run.observer import Observer
from training_step import Step

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # what is installed -> what is imported


def package(report_to: str) -> ModuleType:
    """The module that reports. Raises InputError if its package is not installed."""
    try:
        return importlib.import_module(PACKAGES[report_to])
    except ImportError:
        how = f"install it (pip install {report_to}), or leave the flag out"
        raise InputError(f"--report-to {report_to}: the package {report_to} is not installed; {how}") from None


@dataclass
class Report(Observer):
    """The report of a run that is named after its folder."""

    report_to: str  # key of PACKAGES
    folder: Path
    settings: dict

    def start(self, first: int) -> None:
        service = package(self.report_to)
        if self.report_to == "tensorboard":
            self.writer = service.SummaryWriter(str(self.folder / "tensorboard"), purge_step=first)
        else:
            self.writer = service
            service.init(project="hellora", name=str(self.folder), dir=str(self.folder), config=self.settings)

    def after(self, number: int, done: Step) -> None:
        if self.report_to == "tensorboard":
            for name, value in numbers(done.record).items():
                self.writer.add_scalar(name, value, number)
        else:
            self.writer.log(numbers(done.record), step=number)

    def close(self) -> None:
        if self.report_to == "tensorboard":
            self.writer.close()
        else:
            self.writer.finish()


def numbers(record: dict) -> dict[str, float]:
    """What can be drawn of a record: not its step, nor the loss of a step that was skipped."""
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
