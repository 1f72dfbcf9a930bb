"""The state from which a killed run continues: RUN/checkpoint/step-N/, which is complete if it is there.

model.safetensors holds what trains and AdamW's moments, state.json everything else, with the checksums of both. There
is no pickle in it. It does not depend on the number of processes: each reads its own part.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from command.cli import DISK, InputError, RunError, is_main_process, say
from command.files import atomic_folder, read_json, remove_folder, seal, sha256
from data import Encoded
from hub.checkpoint import SHARD_BYTES, read_slices, stored, write_shards
from hub.weights import full_tensor, held_part
from model import MoETransformer
from run.adapters import placement_digest
from run.inputs import Run
from run.observer import Observer
from training_step import Step


def pinned(run: Run, model: MoETransformer) -> dict:
    """By name, what must be the same when a run continues: also the steps, if something is planned for them."""
    s, kept = run.settings, {"data": amount(run.items)}
    if run.held_out:
        kept["validation"] = amount(run.held_out)
    if run.method.grows or s.schedule != "constant" or s.lr_warmup:
        kept["steps"] = run.steps
    if model.adapter:
        kept["experts or entries of B"] = placement_digest(model)
    return kept


def amount(items: list[Encoded]) -> str:
    return f"{len(items)} examples of {sum(len(item.ids) for item in items)} tokens"


class Checkpoints(Observer):
    """The checkpoints of one training: `resume` continues from the newest, and new ones replace old ones."""

    def __init__(
        self, run: Run, model: MoETransformer, optimizer: torch.optim.AdamW, out: Path, observers: list[Observer]
    ) -> None:
        """observers: those of the training, whose states are kept too."""
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.run, self.optimizer, self.observers = run, optimizer, observers
        self.folder, self.pinned = out / "checkpoint", pinned(run, model)

    def after(self, number: int, done: Step) -> None:
        is_last = number == self.run.steps or any(each.ended for each in self.observers)
        is_due = self.run.settings.save_every and (is_last or number % self.run.settings.save_every == 0)
        if is_due or any(each.interrupted for each in self.observers):
            self.save(number)

    def save(self, number: int) -> None:
        """Write the state after step `number`. Every process must call it."""
        state = {"steps": self.run.steps} | self.pinned
        state |= {each.name: each.state_dict() for each in self.observers if each.name}
        save_state(self.folder, number, self.trained, self.optimizer, state, self.run.settings.keep)

    def resume(self) -> int:
        """Continue from the newest checkpoint, if there is one. Every process must call it.  -> the first step to do

        Raises InputError for a checkpoint that is damaged or does not belong to this run, and if the processes do not
        see the same checkpoints.
        """
        last = last_state(self.folder)
        state = read_state(last) if last else {"step": 0}
        first = state["step"] + 1
        if self.run.processes.count > 1:  # before anything is loaded, for which they may have to wait for each other
            # The maxima are the last step, and minus the first one.
            furthest = torch.tensor([first, -first], device=self.run.processes.device)
            dist.all_reduce(furthest, dist.ReduceOp.MAX)
            if furthest.sum():
                raise InputError(
                    f"processes resume from steps {-furthest[1]} to {furthest[0]}; expected one --out for all"
                )
        if last:
            self.check(state, last)
            load_tensors(last, self.trained, self.optimizer, state["updates"])
            for each in self.observers:
                if each.name:
                    each.load_state_dict(state[each.name])
            say(f"continuing after step {state['step']} from {last}")
        else:
            say(f"no checkpoint in {self.folder} yet: starting from the beginning")
        return first

    def check(self, state: dict, path: Path) -> None:
        """Raise InputError if the state read from `path` is not one of this run."""
        if self.run.steps < state["step"]:
            raise InputError(
                f"{self.run.steps} steps are fewer than the {state['step']} that {path} has done; give more"
            )
        for name, value in self.pinned.items():
            if state.get(name) != value:
                raise InputError(f"{path} was saved with {name} {state.get(name)}, now it is {value}; give the same")

    def result(self) -> dict:
        return {"optimizer_bytes": moment_bytes(self.optimizer)}


def states(folder: Path) -> list[Path]:
    """The complete states of a run, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def last_state(folder: Path) -> Path | None:
    return next(reversed(states(folder)), None)


@contextmanager
def naming_checkpoint(folder: Path) -> Iterator[None]:
    """What stops a training, a full disk for instance, becomes a RunError that names the newest state in `folder`."""
    try:
        yield
    except OSError as error:
        if error.errno not in DISK:
            raise
        reason = f"{error.filename or folder.parent / 'log.jsonl'} cannot be written ({error.strerror})"
        raise RunError(f"{reason}; {last_good(folder)}") from None
    except RunError as error:
        raise RunError(f"{error}; {last_good(folder)}") from None


def last_good(folder: Path) -> str:
    last = last_state(folder)
    return f"the last good checkpoint is {last}" if last else "there is no checkpoint (--save-every N makes them)"


def with_moments(trained: dict[str, Tensor], optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """What trains and AdamW's two moments of it, by name, all sharded alike."""
    state = {}
    for name, parameter in trained.items():
        state[name] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):  # before the first update there are none
            state[f"{name} {moment}"] = optimizer.state[parameter].get(moment, torch.zeros_like(parameter))
    return state


def save_state(
    folder: Path, step: int, trained: dict[str, Tensor], optimizer: torch.optim.AdamW, kept: dict, keep: int
) -> None:
    """Write folder/step-N, then drop all but the `keep` newest. Every process must call it; the main one writes.

    kept: whatever else has to be kept, as JSON. Raises RunError if the disk refuses; older states stay.
    """
    state = with_moments(trained, optimizer)
    updates = max((int(moments.get("step", 0)) for moments in optimizer.state.values()), default=0)  # fewer if skipped

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in state.items():
            yield name, full_tensor(tensor).cpu().contiguous()

    if not is_main_process():
        for _ in tensors():
            pass
        return
    for left in folder.glob(".step-*"):  # by a run that was killed
        shutil.rmtree(left)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    with atomic_folder(folder / f"step-{step:08d}") as part:
        write_shards(part, sizes, tensors(), SHARD_BYTES)
        digests = {path.name: sha256(path) for path in sorted(part.iterdir())}
        content = {"step": step, "updates": updates, "sha256": digests} | kept
        text = json.dumps(content | {"seal": seal(content)})
        (part / "state.json").write_text(text, encoding="utf-8")
    for old in states(folder)[:-keep]:
        remove_folder(old)


def read_state(folder: Path) -> dict:
    """state.json of a state. Raises InputError if it or, on the main process, any other file of it is damaged."""
    try:
        content = read_json(folder / "state.json", dict)
        if content.pop("seal") != seal(content):
            raise ValueError("not as it was saved")
        # One process reads every byte; the others read their parts.
        digests = content["sha256"].items() if is_main_process() else ()
        damaged = [name for name, digest in digests if sha256(folder / name) != digest]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        damaged = [f"state.json ({error})"]
    if damaged:
        raise InputError(f"{folder}: {', '.join(damaged)} is damaged; remove it to continue from the one before")
    return content


@torch.no_grad()
def load_tensors(folder: Path, trained: dict[str, Tensor], optimizer: torch.optim.AdamW, updates: int) -> None:
    """Fill what trains and the optimizer, which has made `updates` updates. Each process reads its part.

    Raises InputError if the tensors are those of another run.
    """
    empty = optimizer.state_dict()
    moments = [{m: torch.zeros_like(p) for m in ("exp_avg", "exp_avg_sq")} for p in trained.values()]
    empty["state"] = {i: {"step": torch.tensor(float(updates))} | pair for i, pair in enumerate(moments)}
    optimizer.load_state_dict(empty)
    state = with_moments(trained, optimizer)
    places = {name: held_part(tensor) for name, tensor in state.items()}
    weights = stored(folder, {name: tuple(tensor.shape) for name, tensor in state.items()})
    for name, tensor in read_slices(weights, {name: part for name, (_, part) in places.items()}):
        places[name][0].copy_(tensor)


def moment_bytes(optimizer: torch.optim.AdamW) -> int:
    """Bytes of AdamW's two moments on this process."""
    tensors = (value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value))
    return sum(held_part(tensor)[0].nbytes for tensor in tensors)
