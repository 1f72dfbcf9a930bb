"""What a run writes: config.json and profile.json at its start, the adapter or the checkpoint at its end."""

import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from command.cli import InputError, note, say
from command.files import atomic_folder, write_json
from diagnosis import report
from diagnosis.measure import adapter_changes, by_expert
from hub.checkpoint import copy_beside, hub_commit
from hub.tokenizer import write_stop_ids
from model import MoETransformer, save_model
from neighbours.ranks import truncate
from routing.profiles import save_profile
from run import adapters
from run.folder import write_config
from run.inputs import Run

LOG_LINE, OTHER_FILES = 400, 500_000  # bytes: a record of log.jsonl; counts and pictures


def write_inputs(run: Run) -> None:
    """config.json and profile.json. Not earlier than the first step: by then any fault of the input has been found."""
    if run.processes.is_main:
        write_config(run.out, asdict(run.settings), run.content | {"hub_commit": hub_commit(run.folder)})
        if run.counted:
            save_profile(run.counted, run.out / "profile.json")


def check_space(run: Run, model: MoETransformer) -> None:
    """Raise InputError if the disk has no room for all that a training will write. Call it on one process."""
    s = run.settings
    trained = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)  # float32
    learnt = trained if model.adapter else sum(p.numel() for p in model.parameters()) * saved_dtype(run).itemsize
    # A new best result is written beside the old one, and a new checkpoint before the oldest is removed.
    results = 1 + (3 if run.held_out else 0)
    checkpoints = s.keep + 1 if s.save_every else 0
    needed = results * learnt + checkpoints * 3 * trained  # a checkpoint has AdamW's moments
    needed += run.steps * LOG_LINE + OTHER_FILES
    there = sum(path.stat().st_size for path in run.out.rglob("*") if path.is_file())  # a resumed run replaces it
    free = shutil.disk_usage(run.out).free + there
    if free < needed:
        written = f"{checkpoints} checkpoints, {results} results and the log"
        raise InputError(
            f"--out {run.out} has {free / 1e6:,.1f} MB free, and this run writes up to {needed / 1e6:,.1f} MB "
            f"({written}); free some, name a folder on another disk, or lower --keep"
        )


def saved_dtype(run: Run) -> torch.dtype:
    """Of the checkpoint that full fine-tuning writes."""
    return getattr(torch, run.settings.save_dtype or "float32")


def save(run: Run, model: MoETransformer, folder: Path, validated: dict | None = None) -> dict[str, Tensor]:
    """Write what has been learnt so far: an adapter, or the checkpoint of full fine-tuning.  -> the adapter's tensors

    validated: the validation that chose it, for validation.json. Of ranks that grow, what never grew is not kept.
    Every process must call it.
    """
    is_main, adapter = run.processes.is_main, model.adapter
    state = adapters.adapter_state(model) if adapter else {}
    if adapter and adapter.ranks is not None:
        state = truncate(state, torch.tensor(adapter.ranks))
    with atomic_folder(folder) if is_main else nullcontext(folder) as part:
        if adapter is None:
            save_model(model, part, saved_dtype(run))
        if is_main:
            if adapter is None:
                copy_beside(run.folder, part)
                write_stop_ids(part, run.content["stop_ids"])
            else:
                adapters.save_adapter(state, part, adapter, model=run.settings.model, method=run.settings.method)
            if validated:
                write_json(part / "validation.json", validated)
    return state


def draw_adapter(run: Run) -> None:
    """adapter.png: how far each expert moved, beside the tokens that it received. Prints it in one line.

    For the main process, at the very end: it reads the adapted weights of the base once more. A failure is a note.
    """
    try:
        weights = adapters.weights_of(run.folder, run.config)
        reading = adapters.read_loosely(run.out / "adapter", run.config)
        experts = by_expert(adapter_changes(reading, weights, run.config), run.config)
        say(report.headline(experts, run.counted.counts))
        title = f"{run.settings.method} on {run.settings.task}: where the weights moved"
        report.draw(experts, run.counted.counts, title, run.out / "adapter.png")
    except Exception as error:
        note(f"adapter.png could not be drawn ({type(error).__name__}: {error}); the run is not affected")
