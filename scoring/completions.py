"""Where completions come from: a model that writes them now, or a file that holds them.

    model, tokenizer = load_subject("runs/tiny-math-hellora", torch.float32, torch.device("cpu"))
    texts = complete(model, tokenizer, task, examples, default_decoding(task), folder=Path("out"))
    examples, texts = read_completions(Path("FILE.jsonl"), examples, several=False)

Both give a list of texts for each example. `complete` keeps what is finished in generations.jsonl, so that an
interrupted evaluation goes on where it stopped; that file is one that `read_completions` reads.
"""

import json
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

import data
import hellora
from command.cli import InputError, note
from command.files import write_jsonl
from data import Example
from generate import stream
from hub import rows as files
from hub.checkpoint import resolve
from hub.peft import base_of
from model import MoETransformer, load_model, read_config
from run.adapters import load_any_adapter
from scoring import rules as scoring

# ------------------------------------------------------------------------------------------------ from a model


@dataclass(frozen=True)
class Decoding:
    """How text is generated."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0
    samples: int = 1  # completions of each prompt
    seed: int = 0


DECODING = {  # LoRI's scripts; but its 512 tokens of HumanEval include the prompt
    "gsm8k": Decoding(512),
    "humaneval": Decoding(512, temperature=0.2, top_p=0.95, samples=20),
    "hexphi": Decoding(512),
}
TINY_NEW_TOKENS = 160  # answers of the tiny tasks are shorter


def default_decoding(task: str) -> Decoding:
    """How the paper decodes the benchmark of a task, as far as LoRI's scripts tell."""
    decoding = DECODING[data.TASKS[task].benchmark]
    return replace(decoding, max_new_tokens=TINY_NEW_TOKENS) if task.startswith("tiny-") else decoding


def run_config(source: str) -> dict | None:
    """config.json of a run folder of train.py; None if `source` is not one."""
    try:
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
        is_run = isinstance(config["model"], str) and isinstance(config["settings"], dict)
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None
    return config if is_run else None


def locate(source: str) -> tuple[Path, Path | None]:
    """Folders of the checkpoint and of the adapter that `source` stands for; full fine-tuning leaves no adapter."""
    run, folder = run_config(source), Path(source)
    if run is None:
        base = base_of(folder)  # of an adapter that PEFT saved
        return (resolve(base), folder) if base else (resolve(source), None)
    return (folder / "model", None) if (folder / "model").is_dir() else (resolve(run["model"]), folder / "adapter")


def load_subject(source: str, dtype: torch.dtype, device: torch.device) -> tuple[MoETransformer, Tokenizer]:
    """The model and tokenizer of a run folder (its base and adapter), a checkpoint folder, a hub id, or 'tiny'."""
    folder, adapter = locate(source)
    tokenizer = data.load_tokenizer(folder, read_config(folder))
    model = load_model(folder, dtype=dtype, device=device)
    if adapter:
        load_any_adapter(model, adapter)
        if dtype == torch.float32:  # faster, and as LoRI evaluates; in bfloat16 merging would round the update off
            hellora.merge(model)
    return model.eval(), tokenizer


def fingerprint(source: str) -> list:
    """What tells one state of a model's files from another: their names, sizes and times."""
    files = sorted(file for folder in locate(source) if folder for file in folder.glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def complete(
    model: MoETransformer,
    tokenizer: Tokenizer,
    task: str,
    examples: list[Example],
    decoding: Decoding,
    *,
    batch_size: int = 32,
    until: str | None = None,
    folder: Path | None = None,
) -> list[list[str]] | None:
    """The model's completions, `decoding.samples` of each example; None on every process but the main one.

    The processes of torch.distributed share the prompts; each must hold the whole model. A completion ends before
    the text `until`. `folder` is where finished completions are kept and looked for.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    kept = [read_generations(folder) if folder and rank == 0 else {}]
    if world > 1:
        dist.broadcast_object_list(kept)
    done = kept[0]
    prompts = data.tokenize([example.prompt for example in examples], tokenizer)
    positions = model.config.hub.get("max_position_embeddings") or math.inf
    longest = max(map(len, prompts)) + decoding.max_new_tokens
    if longest > positions:
        note(f"prompts and answers of up to {longest} tokens, but the model was made for {positions}")
    todo = [(i, s) for i in range(len(examples)) for s in range(decoding.samples) if (examples[i].id, s) not in done]
    todo.sort(key=lambda pick: len(prompts[pick[0]]))  # neighbours in length go to different processes

    def text(i: int, ids: list[int]) -> str:
        # Not decode(ids): some tokenizers drop the space that a text starts with.
        before = prompts[i][-8:]
        return tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]

    def stop(i: int, ids: list[int]) -> bool:
        if until is not None:
            return until in text(i, ids)
        row = examples[i].row
        return scoring.function_end(row["prompt"], row["entry_point"], text(i, ids))[1] is not None

    ended = stream(
        model,
        prompts,
        todo[rank::world],
        max_new_tokens=decoding.max_new_tokens,
        eos_id=model.config.eos_token_id,
        batch_size=batch_size,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=decoding.seed,
        stop=stop if until is not None or data.TASKS[task].benchmark == "humaneval" else None,
    )
    mine = {}
    with open(folder / f"generations-{rank}.jsonl" if folder else os.devnull, "w", encoding="utf-8") as file:
        for i, s, ids in ended:
            completion = text(i, ids) if until is None else text(i, ids).partition(until)[0]
            record = {"id": examples[i].id, "sample": s, "completion": completion}
            mine[examples[i].id, s] = record | {"cut": len(ids) == decoding.max_new_tokens}
            print(json.dumps(mine[examples[i].id, s]), file=file, flush=True)
    parts = [mine]
    if world > 1:
        parts = [None] * world if rank == 0 else None
        dist.gather_object(mine, parts)
    if rank > 0:
        return None
    for part in parts:
        done |= part
    if folder:
        write_generations(folder, done)
    records = [[done[example.id, s] for s in range(decoding.samples)] for example in examples]
    cut = sum(record["cut"] for samples in records for record in samples)
    if cut:
        note(f"{cut} of {len(examples) * decoding.samples} completions were cut at {decoding.max_new_tokens} tokens")
    return [[record["completion"] for record in samples] for samples in records]


# ------------------------------------------------------------------------------------------------- from a file


def read_generations(folder: Path) -> dict[tuple[str, int], dict]:
    """What an earlier evaluation left in `folder`, gathered into one file. A line that was torn off does not count."""
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
    """All completions into generations.jsonl; the processes' own files go."""
    write_jsonl(folder / "generations.jsonl", list(done.values()))
    for part in folder.glob("generations-*.jsonl"):
        part.unlink()


WANTED = '{"id": ..., "completion": "..."}'


def read_completions(
    path: Path, examples: list[Example], *, limit: int | None = None, partial: bool = False, several: bool
) -> tuple[list[Example], list[list[str]]]:
    """The completions of a file, and the examples they belong to, in the order of the task.

    limit: leave out all but the first examples. partial: the file may leave examples out. several: an id may have
    several lines. Raises InputError, with the number of the line, for any line that is not of this task.
    """
    place = {example.id: i for i, example in enumerate(examples)}
    found: list[list[str]] = [[] for _ in examples]
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            name, text = parse_completion(line)
            if name not in place:
                raise InputError(f"id {name!r:.40} is unknown; the task has {examples[0].id} to {examples[-1].id}")
            if found[place[name]] and not several:
                raise InputError(f"id {name!r} has a completion already; want one for each id")
        except InputError as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        found[place[name]].append(text)
    if not any(found):
        raise InputError(f"{path} holds no completions; want lines of {WANTED}")
    pairs = list(zip(examples, found, strict=True))[:limit]
    missing = [example.id for example, texts in pairs if not texts]
    if missing and not partial:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        advice = "add them, or pass --partial to score only what is there"
        raise InputError(f"{path}: no completion for {len(missing)} of {len(pairs)} ids ({shown}); {advice}")
    pairs = [(example, texts) for example, texts in pairs if texts]
    if not pairs:
        raise InputError(f"{path}: no completion for the first {limit} ids; raise --limit")
    return [example for example, _ in pairs], [texts for _, texts in pairs]


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
