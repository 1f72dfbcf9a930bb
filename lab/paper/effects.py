"""What fine-tuning an embedded model did besides its score: overfitting, forgetting, and tokens that change experts.

    python reproduce.py effects runs/tiny-math-hellora-seed0        # of any run of train.py on an embedded model

Dimensions: L layers with experts, E experts per layer, K experts per token, T tokens.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

import data
from command import cli
from command.cli import InputError, flag
from command.files import writable, write_json
from hellora import hottest
from hub.checkpoint import EMBEDDED
from lab.documents import held_out
from model import MoETransformer
from routing.statistics import jaccard
from run.subject import Subject
from tiny import tasks

ROWS = 200  # of the task, seen in training and not seen
TEXT = ("math", "code", "safety")  # kinds of pre-training text
TEXTS, TEXT_TOKENS = 40, 256  # of each kind of pre-training text; all of them are shorter
UNSEEN_SEED = 1  # the training rows have seed 0
MAKERS: dict[str, Callable[[int], list[dict]]] = {
    "tiny-math": lambda n: tasks.math_rows(n, "train", UNSEEN_SEED),
    "tiny-code": lambda n: tasks.code_rows(n, UNSEEN_SEED),
    "tiny-safety": lambda n: tasks.safety_rows(n, UNSEEN_SEED),
}
Material = dict[str, list[data.Encoded]]  # "seen" and "unseen" rows of a task, and pre-training text of each of TEXT
Reading = dict[str, tuple[float, Tensor]]  # of the same: `read_through`


def material(task: str, reader: data.Reader) -> Material:
    """What every run of a task is read on: rows that it trained on, rows that no run trains on, and held-out text."""
    rows = reader.load("train")
    known, read = {row.prompt for row in rows}, data.FORMATS[data.TASKS[task].benchmark]["train"].read
    fresh = (data.Example(str(i), *read(row), row) for i, row in enumerate(MAKERS[task](2 * ROWS)))
    unseen = [row for row in fresh if row.prompt not in known][:ROWS]
    text = {kind: held_out_text(kind, reader) for kind in TEXT}
    return {"seen": reader.encode(rows[:ROWS]), "unseen": reader.encode(unseen)} | text


def held_out_text(kind: str, reader: data.Reader) -> list[data.Encoded]:
    """Whole documents of a kind, of which every token but the first is predicted, and the end."""
    documents = itertools.islice(held_out(kind), TEXTS)
    encoded = ([*reader.tokenizer.encode(text).ids, reader.config.eos_token_id] for text in documents)
    return [data.Encoded(ids, ((0, len(ids)),)) for ids in encoded if len(ids) <= TEXT_TOKENS]


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


def reading(subject: Subject, material: Material) -> Reading:
    model = subject.load(torch.float32)
    return {name: read_through(model, items) for name, items in material.items()}


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
    base = Subject(trained["model"])
    read = material(trained["settings"]["task"], data.Reader(trained["settings"]["task"], base.folder, base.config))
    before, after = reading(base, read), reading(subject, read)
    on_text = (torch.cat([each[kind][1] for kind in TEXT], 1) for each in (before, after))
    return {
        "seen_loss": after["seen"][0],
        "unseen_loss": after["unseen"][0],
        "text_loss": {
            "before": {kind: before[kind][0] for kind in TEXT},
            "after": {kind: after[kind][0] for kind in TEXT},
        },
        "routing": {
            "task": moved(before["unseen"][1], after["unseen"][1], subject.config.num_experts),
            "text": moved(*on_text, subject.config.num_experts),
        },
    }


@dataclass(frozen=True)
class EffectsSettings:
    """The flags of `reproduce.py effects`."""

    run: str = flag(help="a run folder of train.py", positional=True)
    json: str | None = flag(None, "where to write the numbers", metavar="FILE")


def command(argv: list[str]) -> dict:
    """Print what the fine-tuning in a run folder did besides its score.  -> the numbers"""
    settings = cli.parse(
        EffectsSettings,
        argv,
        prog="reproduce.py effects",
        description="Loss on seen and unseen rows and on pre-training text, and tokens that change experts.",
        example="python reproduce.py effects runs/tiny-math-hellora-seed0",
    )
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
