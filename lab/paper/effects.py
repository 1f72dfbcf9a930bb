"""What fine-tuning an embedded model did besides its score: overfitting, forgetting, and tokens that change experts.

    python reproduce.py effects runs/tiny-math-hellora-seed0        # of any run of train.py on an embedded model

Dimensions: L layers with experts, E experts per layer, K experts per token, T tokens.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import data
from command import cli
from command.cli import InputError, flag
from command.files import writable, write_json
from hellora import hottest
from hub.checkpoint import EMBEDDED
from lab.documents import pretraining_documents
from model import MoETransformer
from routing.statistics import jaccard
from run.subject import Subject
from tiny import tasks

ROWS = 200  # of the task, seen in training and not seen
TEXTS, TEXT_TOKENS = 40, 256  # of each kind of pre-training text; all of them are shorter
HELD_OUT_SEED = 999_983  # of text that pre-training did not read (lab/make_tiny.py)
UNSEEN_SEED = 1  # the training rows have seed 0
MAKERS: dict[str, Callable[[int], list[dict]]] = {
    "tiny-math": lambda n: tasks.math_rows(n, "train", UNSEEN_SEED),
    "tiny-code": lambda n: tasks.code_rows(n, UNSEEN_SEED),
    "tiny-safety": lambda n: tasks.safety_rows(n, UNSEEN_SEED),
}


class Material(NamedTuple):
    """What a model is read on: rows of its task, and pre-training text."""

    seen: list[data.Encoded]  # rows that the run trained on
    unseen: list[data.Encoded]  # rows of the same kind that no run trains on
    text: dict[str, list[data.Encoded]]  # math, code, safety: held-out pre-training text


def material(task: str, reader: data.Reader) -> Material:
    """The same rows and text for every run of a task."""
    rows = reader.load("train")
    known, read = {row.prompt for row in rows}, data.FORMATS[data.TASKS[task].benchmark]["train"].read
    fresh = (data.Example(str(i), *read(row), row) for i, row in enumerate(MAKERS[task](2 * ROWS)))
    unseen = [row for row in fresh if row.prompt not in known][:ROWS]
    return Material(reader.encode(rows[:ROWS]), reader.encode(unseen), held_out_text(reader))


def held_out_text(reader: data.Reader) -> dict[str, list[data.Encoded]]:
    """Whole documents of each kind, of which every token but the first is predicted, and the end."""
    end, kinds = reader.config.eos_token_id, {}
    for kind in ("math", "code", "safety"):
        documents = (text for k, text in pretraining_documents(HELD_OUT_SEED) if k == kind)
        encoded = ([*reader.tokenizer.encode(text).ids, end] for text in itertools.islice(documents, TEXTS))
        kinds[kind] = [data.Encoded(ids, ((0, len(ids)),)) for ids in encoded if len(ids) <= TEXT_TOKENS]
    return kinds


@torch.no_grad()
def read_through(model: MoETransformer, items: list[data.Encoded]) -> tuple[float, Tensor]:
    """The mean loss of the target tokens, and the experts of every token in rising order.  -> nats, [L, T, K]"""
    total, parts = 0.0, []
    for each in data.micro_batches(items, 50, 0, 1):
        batch = data.collate(each, model.config.pad_token_id or 0)
        nll, selected, _ = model(batch.input_ids, batch.lengths, labels=batch.labels, output_routing=True)
        total += nll.item()
        parts.append(selected[:, selected[0, ..., 0] >= 0])  # without padding
    return total / sum(item.num_targets for item in items), torch.cat(parts, 1).sort(-1).values


def moved(before: Tensor, after: Tensor, num_experts: int) -> dict[str, float]:
    """How far routing moved.  [L, T, K] twice

    hot_overlap: Jaccard overlap of the K hottest experts, mean of the layers. tokens: share of tokens and layers in
    which any of the K experts changes. choices: share of the K choices that go to another expert.
    """
    K = before.shape[-1]
    counts = (torch.stack([layer.flatten().bincount(minlength=num_experts) for layer in x]) for x in (before, after))
    kept = (before[..., :, None] == after[..., None, :]).any(-1).double().mean(-1)  # [L, T]
    return {
        "hot_overlap": float(jaccard(*(hottest(each, K) for each in counts)).mean()),
        "tokens": float((kept < 1).double().mean()),
        "choices": float(1 - kept.mean()),
    }


class Reading(NamedTuple):
    """One model on the material."""

    seen: float  # nats per target token
    unseen: float
    text: dict[str, float]  # nats per token, by kind
    task_experts: Tensor  # [L, T, K] on the unseen rows
    text_experts: Tensor  # [L, T, K] on the text


def reading(subject: Subject, material: Material) -> Reading:
    model = subject.load(torch.float32)
    text = {kind: read_through(model, items) for kind, items in material.text.items()}
    seen, _ = read_through(model, material.seen)
    unseen, task_experts = read_through(model, material.unseen)
    losses = {kind: loss for kind, (loss, _) in text.items()}
    return Reading(seen, unseen, losses, task_experts, torch.cat([experts for _, experts in text.values()], 1))


@cache
def before(base: str, task: str) -> tuple[Material, Reading]:
    """The material of a task, and the embedded model on it."""
    subject = Subject(base)
    read = material(task, data.Reader(task, subject.folder, subject.config))
    return read, reading(subject, read)


def effects(run: str) -> dict:
    """What the fine-tuning in a run folder did. Losses are in nats per token.  Raises InputError for other runs.

    {"seen_loss", "unseen_loss", "text_loss": {"before": {kind: loss}, "after": {kind: loss}},
     "routing": {"task": `moved`, "text": `moved`}}
    """
    subject = Subject(run)
    trained = subject.run
    if trained is None or trained["model"] not in EMBEDDED or trained["settings"]["task"] not in MAKERS:
        raise InputError(f"{run}: expected a run of train.py on an embedded model and an embedded task")
    rows = data.digest(data.load_examples(trained["settings"]["task"], "train"))
    if trained["data"] != rows or trained["settings"]["valid_share"]:
        raise InputError(f"{run} was trained on other rows than its task's; expected all of them")
    read, base = before(trained["model"], trained["settings"]["task"])
    tuned, num_experts = reading(subject, read), subject.config.num_experts
    return {
        "seen_loss": tuned.seen,
        "unseen_loss": tuned.unseen,
        "text_loss": {"before": base.text, "after": tuned.text},
        "routing": {
            "task": moved(base.task_experts, tuned.task_experts, num_experts),
            "text": moved(base.text_experts, tuned.text_experts, num_experts),
        },
    }


EXAMPLE = "python reproduce.py effects runs/tiny-math-hellora-seed0"


@dataclass(frozen=True)
class EffectsSettings:
    """The flags of `reproduce.py effects`."""

    run: str = flag(help="a run folder of train.py", positional=True)
    json: str | None = flag(None, "where to write the numbers", metavar="FILE")


def command(argv: list[str]) -> dict:
    """Print what the fine-tuning in a run folder did besides its score.  -> the numbers"""
    description = "Loss on seen and unseen rows and on pre-training text, and tokens that change experts."
    settings = cli.parse(EffectsSettings, argv, prog="reproduce.py effects", description=description, example=EXAMPLE)
    out = settings.json and writable(settings.json)
    done = effects(settings.run)
    cli.say(f"own task, nats per token: seen rows {done['seen_loss']:.4f}, unseen rows {done['unseen_loss']:.4f}")
    for kind, loss in done["text_loss"]["before"].items():
        cli.say(f"pre-training text, {kind}: {loss:.4f} before, {done['text_loss']['after'][kind]:.4f} after")
    for where, change in done["routing"].items():
        cli.say(
            f"routing on {where}: overlap of hot sets {change['hot_overlap']:.2f}, choices that move "
            f"{change['choices']:.1%}, tokens with a changed expert {change['tokens']:.1%}"
        )
    if out:
        write_json(Path(out), done)
    return done
