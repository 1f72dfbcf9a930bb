"""Completions in files: those of `evaluate.py --completions FILE`, and those that an evaluation keeps.

    texts = read_completions(Path("FILE.jsonl"), ["0", "1", ...])    # lines {"id": ..., "completion": "..."}
    done = claim(folder, about, date)                                # what an interrupted evaluation has finished

An evaluation's generations.jsonl is also a file that `read_completions` reads.
"""

import json
import os
from datetime import datetime
from pathlib import Path

from command.cli import InputError, note
from command.files import parse_json, read_json, write_json, write_jsonl
from hub.rows import read_text

LINE = '{"id": ..., "completion": "..."}'
RECORD = {"id": str, "sample": int, "completion": str, "cut": bool}  # of generations.jsonl


def read_completions(
    path: Path, ids: list[str], limit: int | None, partial: bool, several: bool
) -> dict[str, list[str]]:
    """The completions of each id of a task, in the order of `ids`.

    limit: leave out all but the first ids. partial: the file may leave ids out. several: an id may have several lines.
    Raises InputError, with the number of the line, for any line that does not belong to the task.
    """
    texts: dict[str, list[str]] = {name: [] for name in ids}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        name, text = parse_completion(line, place)
        if name not in texts:
            raise InputError(f"{place}: id {name!r:.40} is unknown; the task has {ids[0]} to {ids[-1]}")
        if texts[name] and not several:
            raise InputError(f"{place}: id {name!r} has a completion already; expected one for each id")
        texts[name].append(text)
    if not any(texts.values()):
        raise InputError(f"{path} holds no completions; expected lines of {LINE}")
    asked = {name: texts[name] for name in ids[:limit]}
    missing = [name for name in asked if not asked[name]]
    if missing and not partial:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        advice = "add them, or pass --partial to score only what is there"
        raise InputError(f"{path}: no completion for {len(missing)} of {len(asked)} ids ({listed}); {advice}")
    if len(missing) == len(asked):
        raise InputError(f"{path}: no completion for the first {limit} ids; raise --limit")
    return {name: samples for name, samples in asked.items() if samples}


def parse_completion(line: str, place: str) -> tuple[str, str]:
    """Id and text of a line of a completions file. An id is text, or a whole number: the row, from 0."""
    record = parse_json(line, place, dict)
    if not {"id", "completion"} <= record.keys():
        keys = ", ".join(map(repr, record))[:80] or "none"
        raise InputError(f"{place}: its keys are {keys}; expected {LINE}")
    name, text = record["id"], record["completion"]
    if not isinstance(name, str) and type(name) is not int:
        raise InputError(f"{place}: id {name!r:.40} is neither text nor a whole number; expected {LINE}")
    if not isinstance(text, str):
        raise InputError(f"{place}: completion {text!r:.40} is not text; expected {LINE}")
    return str(name), text


# ----------------------------------------------------------------------------------- the folder of an evaluation


def check_folder(out: Path) -> None:
    """Raise InputError if `out` holds anything but an evaluation."""
    is_ours = any(os.path.isfile(out / name) for name in ("evaluation.json", "score.json"))
    is_empty = os.path.isdir(out) and all(name.startswith(".") for name in os.listdir(out))  # a crash leaves these
    if os.path.exists(out) and not is_ours and not is_empty:
        raise InputError(f"--out {out} exists and is not an evaluation of evaluate.py; name another folder")


def claim(folder: Path, about: dict, began: datetime) -> dict[tuple[str, int], dict]:
    """Make `folder` that of the evaluation which `about` identifies.  -> what is finished, as of `read_generations`

    Completions of another evaluation are removed, and so is an earlier score. began: the date in the prompts.
    """
    file = folder / "evaluation.json"
    before = read_json(file, dict, missing={})
    before.pop("began", None)
    if before != about:
        if before:
            changed = sorted(name for name in before.keys() | about.keys() if before.get(name) != about.get(name))
            note(f"{folder} holds completions made with other {', '.join(changed)}: starting over")
        for old in folder.glob("generations*.jsonl"):
            old.unlink()
        write_json(file, about | {"began": began.isoformat()})
    remove_score(folder)
    return read_generations(folder)


def read_generations(folder: Path) -> dict[tuple[str, int], dict]:
    """{(id, sample): record} that an earlier evaluation left in `folder`, gathered into one file.

    A record is {"id", "sample", "completion", "cut"}. A line that is none, as a killed process leaves it, is skipped.
    """
    done = {}
    for path in sorted(folder.glob("generations*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict) and all(type(record.get(name)) is kind for name, kind in RECORD.items()):
                done[record["id"], record["sample"]] = record
    write_generations(folder, done)
    return done


def write_generations(folder: Path, done: dict[tuple[str, int], dict]) -> None:
    """Write all records into generations.jsonl and remove the files of the single processes."""
    write_jsonl(folder / "generations.jsonl", list(done.values()))
    for part in folder.glob("generations-*.jsonl"):
        part.unlink()


def remove_score(folder: Path | None) -> None:
    """Remove the score of an earlier evaluation, perhaps of fewer examples or by another rule, before a new one."""
    for name in ("score.json", "items.jsonl") if folder else ():
        (folder / name).unlink(missing_ok=True)
