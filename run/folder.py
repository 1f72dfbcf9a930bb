"""The run folder: which run it belongs to, and config.json.

RUN/config.json            settings as resolved, versions, commit
RUN/profile.json           the routing counts from which the experts were chosen
RUN/log.jsonl, loss.png    one record per step, and its picture (run/log.py)
RUN/adapter.png            how far each expert moved, beside its tokens (diagnosis/)
RUN/checkpoint/step-N/     the state after step N, for --resume (run/state.py)
RUN/adapter-best/          with validation: the adapter with the lowest loss so far (run/validation.py)
RUN/adapter/, result.json  when the run is finished (run/adapters.py)
"""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

from command.cli import InputError, say
from command.files import read_json, remove_folder, write_json

DECIDING_PACKAGES = ("torch", "numpy", "tokenizers", "jinja2", "safetensors")  # they order, cut and compute
# Settings that may differ when a run is repeated or resumed. Some change rounding, --on-nonfinite what follows a bad
# step: a resumed run has the bits of an uninterrupted one if these are the same too.
MAY_CHANGE = {
    "resume", "save_every", "keep", "out", "shard", "micro_batch", "on_nonfinite", "activation_checkpointing",
    "compile", "report_to",
}  # fmt: skip


def check_out(out: Path, settings: dict) -> None:
    """Raise InputError if `out`, which this process has claimed, belongs to something else than this run.

    Settings in MAY_CHANGE may differ from those of the run in the folder, and with --resume the number of steps.
    """
    is_new = all(name.startswith(".") for name in os.listdir(out))  # a lock; a file that a crash cut off
    before = settings if is_new else read_json(out / "config.json", dict, missing={}).get("settings")
    if not isinstance(before, dict):
        raise InputError(f"--out {out} exists and is not a run of train.py; name another folder")
    free = MAY_CHANGE | ({"steps", "epochs"} if settings["resume"] else set())
    if settings["lora_dropout"]:
        free = free - {"micro_batch"}  # it decides which numbers are dropped
    changed = [key for key in settings if key not in free and before.get(key) != settings[key]]
    if changed:
        was = ", ".join(f"{key} {before.get(key)} then, {settings[key]} now" for key in changed)
        raise InputError(f"--out {out} holds another run ({was}); name another folder or remove it")
    if settings["resume"] and is_new:
        say(f"--resume: there is nothing in {out} yet; the run starts with its first step")


def earlier_result(out: Path, content: dict, steps: int, resume: bool) -> dict | None:
    """result.json of the run in `out` if that has done all `steps` already, else None.

    content: digests of the base model, the data and what flags name, as for `write_config`. Raises InputError if the
    run in `out` had others, if it has ended after another number of steps without a checkpoint, or if it has a
    checkpoint and is not to `resume`.
    """
    before = read_json(out / "config.json", dict, missing={})
    if not before:
        return None
    changed = [name for name, digest in content["base"].items() if before["base"].get(name) != digest]
    kinds = {"data": "the training data", "valid": "the validation data"}
    changed += [name for kind, name in kinds.items() if before.get(kind) != content.get(kind)]
    given = before.get("given", {})
    changed += [f"what {flag} names" for flag, digest in content["given"].items() if given.get(flag) != digest]
    if changed:
        names = " and ".join(changed)
        raise InputError(f"{names} changed since the run in --out {out} began; restore it, or name another folder")
    result = read_json(out / "result.json", dict, missing={})
    finished = "steps" in result and any((out / name).is_dir() for name in ("adapter", "model"))
    if finished and result.get("planned_steps", result["steps"]) == steps:
        return result
    if not resume and any(out.glob("**/checkpoint/step-*")):
        raise InputError(f"--out {out} holds the checkpoint of this run; add --resume to continue, or remove it")
    if finished and not any(out.glob("checkpoint/step-*")):
        ended = f"a run that ended after {result['steps']} steps, and no checkpoint to continue from"
        raise InputError(f"--out {out} holds {ended}; name another folder or remove it")
    return None


def remove_results(folder: Path, is_new: bool) -> None:
    """Remove what an earlier run has left at its end, and if a new one starts, also the best results."""
    for name in ("result.json", "loss.png", "ranks.png", "adapter.png"):
        (folder / name).unlink(missing_ok=True)
    for name in ("adapter", "model", *(("adapter-best", "model-best") if is_new else ())):
        remove_folder(folder / name)


def write_config(out: Path, settings: dict, content: dict) -> None:
    """Make the run folder: config.json with the settings as resolved, versions and commit.

    content: {"base": digests of the base model's files, "data" and perhaps "valid": those of the examples, "given":
    those of the files that flags name}
    """
    config = {
        "model": settings["model"],
        "settings": settings,
        **content,
        "versions": {"python": sys.version.split()[0]} | {name: version(name) for name in DECIDING_PACKAGES},
        "commit": commit(),
        "command": sys.argv,
    }
    write_json(out / "config.json", config)


def commit() -> str | None:
    """The commit of this code, if it is in a git repository and git is installed."""
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
