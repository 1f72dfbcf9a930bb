"""--report-to: the records of log.jsonl, sent to TensorBoard or Weights & Biases by the package that is installed.

In Weights & Biases, a resumed run is a second run of the same name. In TensorBoard, repeated steps replace old ones.
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from command.cli import InputError

PACKAGES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # what is installed -> what is imported
Send = Callable[[dict], None]


def package(report_to: str) -> ModuleType:
    """The module that reports. Raises InputError if its package is not installed."""
    try:
        return importlib.import_module(PACKAGES[report_to])
    except ImportError:
        how = f"install it (pip install {report_to}), or leave the flag out"
        raise InputError(f"--report-to {report_to}: the package {report_to} is not installed; {how}") from None


@contextmanager
def reporting(report_to: str, folder: Path, settings: dict, first: int) -> Iterator[Send]:
    """Start the report of a run that is named after its folder, at step `first`.  -> what takes each record"""
    if report_to == "none":
        yield lambda record: None
    elif report_to == "tensorboard":
        writer = package(report_to).SummaryWriter(str(folder / "tensorboard"), purge_step=first)
        try:
            yield lambda record: [writer.add_scalar(name, n, record["step"]) for name, n in numbers(record).items()]
        finally:
            writer.close()
    else:
        wandb = package(report_to)
        wandb.init(project="hellora", name=str(folder), dir=str(folder), config=settings)
        try:
            yield lambda record: wandb.log(numbers(record), step=record["step"])
        finally:
            wandb.finish()


def numbers(record: dict) -> dict[str, float]:
    """What can be drawn of a record: not its step, nor the loss of a step that was skipped."""
    return {name: value for name, value in record.items() if name != "step" and isinstance(value, int | float)}
