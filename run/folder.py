"""A run folder: whose it is, what is written into it, and the state a killed run goes on from.

    RUN/config.json            settings as resolved, versions, commit
    RUN/log.jsonl, loss.png    a record a step, and its picture
    RUN/checkpoint/step-N/     what training holds after step N: what trains, AdamW's moments, the loop's numbers
    RUN/adapter/, result.json  when it is done

Whatever must be whole is written beside its place, synced, and renamed: a folder that has its name is complete. The
state is safetensors and JSON, never a pickle, and does not depend on the number of processes: each reads its own rows.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from command import cli
from command.cli import InputError, RunError
from command.files import atomic_folder, remove_folder, seal, sha256, write_text
from hub.checkpoint import SHARD_BYTES, read_rows, stored, write_shards
from hub.weights import full_tensor, local_rows

FREE = {"resume", "save_every", "keep", "out", "shard", "micro_batch", "on_nonfinite", "activation_checkpointing"}
# but for micro_batch where a balancing loss is taken in each


# ------------------------------------------------------------------------------------------------ whose it is


def check_out(out: Path, settings: dict, resume: bool) -> None:
    """InputError if `out` belongs to something else, to a run with other settings, or to one that is to be resumed.

    Settings in FREE may differ, and when resuming so may the number of steps.
    """
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"--out {out} cannot be written: {place} is no folder, or not yours; name another folder")
    try:
        before = json.loads((out / "config.json").read_text(encoding="utf-8"))["settings"]
    except FileNotFoundError:
        before = None if out.exists() and (not out.is_dir() or any(out.iterdir())) else settings
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    if not isinstance(before, dict):
        raise InputError(f"--out {out} exists and is not a run of train.py; name another folder")
    free = FREE - ({"micro_batch"} if settings["router_aux_loss"] else set())
    free = free | ({"steps", "epochs"} if resume else set())
    changed = [key for key in settings if key not in free and before.get(key, settings[key]) != settings[key]]
    if changed:
        was = ", ".join(f"{key} {before[key]} then, {settings[key]} now" for key in changed)
        raise InputError(f"--out {out} holds another run ({was}); name another folder or remove it")
    if not resume and any(out.glob("**/checkpoint/step-*")):
        raise InputError(f"--out {out} holds the checkpoint of this run; add --resume to go on, or remove the folder")
    if resume and not out.exists():
        cli.say(f"--resume: there is nothing in {out} yet; the run starts with its first step")


def write_config(out: Path, settings: dict) -> None:
    """Make the run folder: config.json with the settings as resolved, versions and commit."""
    about = {
        "model": settings["model"],
        "settings": settings,
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "commit": commit(),
        "command": sys.argv,
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "config.json", json.dumps(about, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from None


def commit() -> str | None:
    """The commit of this code, if it lies in a git repository and git is there."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


# ---------------------------------------------------------------------------------------- the state of training


def training_state(trained: dict[str, Tensor], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What trains and AdamW's two moments of it, by name; all placed alike."""
    state = {}
    for name, parameter in trained.items():
        state[name] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):  # there are none before the first update
            state[f"{name} {moment}"] = optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
    return state


def save_state(
    folder: Path, step: int, trained: dict[str, Tensor], optimizer: torch.optim.AdamW, numbers: dict, keep: int
) -> None:
    """Write RUN/checkpoint/step-N, then drop all but the `keep` newest. Every process must call it; one writes.

    numbers: whatever else the loop needs, as JSON. Raises RunError if the disk refuses; older states stay.
    """
    state = training_state(trained, optimizer)
    updates = max((int(moments.get("step", 0)) for moments in optimizer.state.values()), default=0)  # fewer if skipped

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state.items():
            yield name, full_tensor(tensor).cpu().contiguous()

    if not cli.is_main_process():
        for _ in tensors():
            pass
        return
    for left in folder.glob(".step-*"):  # by a run that was killed
        shutil.rmtree(left)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    try:
        with atomic_folder(folder / f"step-{step:08d}") as part:
            write_shards(part, sizes, tensors(), SHARD_BYTES)
            digests = {path.name: sha256(path) for path in sorted(part.iterdir())}
            about = {"step": step, "updates": updates, "sha256": digests} | numbers
            text = json.dumps(about | {"seal": seal(about)})
            (part / "state.json").write_text(text, encoding="utf-8")
    except RunError as error:
        last = last_state(folder)
        raise RunError(f"{error}; {f'the last good one is {last}' if last else 'there is none before it'}") from None
    for old in states(folder)[:-keep]:
        remove_folder(old)


def states(folder: Path) -> list[Path]:
    """The complete states of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def last_state(folder: Path) -> Path | None:
    return next(reversed(states(folder)), None)


@torch.no_grad()
def load_state(folder: Path, trained: dict[str, Tensor], optimizer: torch.optim.AdamW) -> dict:
    """Continue from `save_state`: fill what trains and the optimizer, each process its rows.  -> the loop's numbers

    Raises InputError for a state that is damaged or of another run.
    """
    try:
        numbers = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if numbers.pop("seal") != seal(numbers):
            raise ValueError("not as it was saved")
        updates, digests = numbers["updates"], numbers["sha256"]
        # One process reads every byte; the others read their rows.
        checked = digests.items() if cli.is_main_process() else ()
        damaged = [name for name, digest in checked if sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        updates, damaged = 0, [f"state.json ({error})"]
    if damaged:
        raise InputError(f"{folder}: {', '.join(damaged)} is damaged; remove the folder to go on from the one before")
    about = optimizer.state_dict()
    moments = [{m: torch.zeros_like(p) for m in ("exp_avg", "exp_avg_sq")} for p in trained.values()]
    about["state"] = {i: {"step": torch.tensor(float(updates))} | pair for i, pair in enumerate(moments)}
    optimizer.load_state_dict(about)
    state = training_state(trained, optimizer)
    places = {name: local_rows(tensor) for name, tensor in state.items()}
    weights = stored(folder, {name: tuple(tensor.shape) for name, tensor in state.items()})
    rows = {name: slice(first, first + len(held)) for name, (held, first) in places.items()}
    for name, tensor in read_rows(weights, rows):
        places[name][0].copy_(tensor)
    return numbers


# ---------------------------------------------------------------------------------------------- asked to stop


@contextmanager
def asked_to_stop() -> Iterator:
    """SIGTERM and the first Ctrl-C let the step finish.  -> function(world): the signal that came anywhere, or 0"""
    came = [0]

    def remember(number: int, frame) -> None:
        came[0] = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    def stop(world: int) -> int:
        if world == 1:
            return came[0]
        anywhere = torch.tensor(came, device="cuda" if torch.cuda.is_available() else "cpu")
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)  # all processes stop after the same step
        return int(anywhere)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------ the log


def cut_log(path: Path, steps: int, whole: bool = False) -> list[dict]:
    """Drop the records of log.jsonl after the first `steps`, which will be written again.  -> those that stay

    whole: there must be none after them. Raises InputError if it does not hold them.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    lines = lines if whole else lines[:steps]
    try:
        records = [json.loads(line) for line in lines]
        if [record["step"] for record in records] != list(range(1, steps + 1)):
            raise ValueError("steps are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not the log of the first {steps} steps ({error}); start the run anew") from None
    write_text(path, "".join(f"{line}\n" for line in lines))
    return records


def draw_loss(losses: list[float], path: Path, title: str) -> None:
    """The loss of every step and its running mean over a twentieth of the run."""
    from matplotlib.figure import Figure  # pyplot would bring global state, and look for a display

    width = max(1, len(losses) // 20)
    mean = torch.tensor(losses).unfold(0, width, 1).mean(-1)
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=0.8, label="one step")
    axes.plot(range(width, len(losses) + 1), mean, color="tab:blue", label=f"mean of {width} steps")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per target token)", title=title)
    axes.legend(frameon=False)
    figure.savefig(path)
