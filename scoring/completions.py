"""Completions in files: those of `evaluate.py --completions FILE`, and those that an evaluation keeps.

    texts = read_completions(Path("FILE.jsonl"), ["0", "1", ...])    # lines {"id": ..., "completion": "..."}
    done = read_generations(folder)                                  # what an interrupted evaluation has finished

An evaluation's generations.jsonl is also a file that `read_completions` reads.
"""

import json
from pathlib import Path

from command.cli import InputError
from command.files import write_jsonl
from hub.rows import read_text

WANTED = '{"id": ..., "completion": "..."}'


def read_completions(
    path: Path, ids: list[str], *, limit: int | None = None, partial: bool = False, several: bool
) -> dict[str, list[str]]:
    """The completions of each id of a task, in the order of `ids`.

    limit: leave out all but the first ids. partial: the file may leave ids out. several: an id may have several lines.
    Raises InputError, with the number of the line, for any line that does not belong to the task.
    """
    found: dict[str, list[str]] = {name: [] for name in ids}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            name, text = parse_completion(line)
            if name not in found:
                raise InputError(f"id {name!r:.40} is unknown; the task has {ids[0]} to {ids[-1]}")
            if found[name] and not several:
                raise InputError(f"id {name!r} has a completion already; want one for each id")
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        found[name].append(text)
    if not any(found.values()):
        raise InputError(f"{path} holds no completions; want lines of {WANTED}")
    wanted = {name: found[name] for name in ids[:limit]}
    missing = [name for name, texts in wanted.items() if not texts]
    if missing and not partial:
        listed = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        advice = "add them, or pass --partial to score only what is there"
        raise InputError(f"{path}: no completion for {len(missing)} of {len(wanted)} ids ({listed}); {advice}")
    if len(missing) == len(wanted):
        raise InputError(f"{path}: no completion for the first {limit} ids; raise --limit")
    return {name: texts for name, texts in wanted.items() if texts}


def parse_completion(line: str) -> tuple[str, str]:
    """Id and text of a line of a completions file. An id is text, or a whole number: the row, from 0."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}); want {WANTED}") from None
    if not isinstance(record, dict):
        raise InputError(f"a {type(record).__name__}, not an object; want {WANTED}")
    if not {"id", "completion"} <= record.keys():
        raise InputError(f"its keys are {', '.join(map(repr, record))[:80] or 'none'}; want {WANTED}")
    name, text = record["id"], record["completion"]
    if not isinstance(name, str) and type(name) is not int:
        raise InputError(f"id {name!r:.40} is neither text nor a whole number; want {WANTED}")
    if not isinstance(text, str):
        raise InputError(f"completion {text!r:.40} is not text; want {WANTED}")
    return str(name), text


def read_generations(folder: Path) -> dict[tuple[str, int], dict]:
    """{(id, sample): record} that an earlier evaluation left in `folder`, gathered into one file.

    A record is {"id", "sample", "completion", "cut"}. An incomplete line, as a killed process leaves it, is skipped.
    """
    done = {}
    for path in sorted(folder.glob("generations*.jsonl")):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            try:
                record = json.loads(line)
                done[record["id"], record["sample"]] = record
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
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
