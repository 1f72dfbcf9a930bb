"""A run of a table: the commands that make it, and its record, a JSON file that every table reads.

    run = Run("tiny-math", "hellora", seed=3, k=4)
    run.train_flags("runs/x")                      # what one types after train.py
    records.find(run)                              # its record, or None if it has yet to be made

A record is found again by what decides its numbers: the settings, the weights of the base model, the training data and
the test problems, all by content. A changed task or model therefore never reuses an old result. Changed code does: the
record names its commit.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import data
import evaluate
from command.cli import InputError, RunError
from command.files import read_json, sha256, write_text
from hub.checkpoint import EMBEDDED, resolve
from machine.processes import default_dtype
from recipes.methods import METHODS, RECIPES
from run.folder import MAY_CHANGE
from run.settings import parse_settings
from run.subject import base_content

LOSSES = 20  # points of the loss curve that a record keeps
EFFECTS = "effects.json"  # in the folder of a run: what it did besides its score (lab/paper/effects.py)
BATCH = 128  # sequences that an embedded model decodes at once: four times the default, which takes less time


@dataclass(frozen=True)
class Run:
    """One fine-tuning and the evaluations of its result. A field that is None stays as train.py decides."""

    task: str  # key of data.TASKS
    method: str  # key of METHODS, or "base": the model as it is
    seed: int = 0
    model: str = "tiny"
    k: int | None = None
    experts: str | None = None
    targets: str | None = None
    rank: int | None = None
    expert_rank: int | None = None
    alpha: float | None = None
    steps: int | None = None
    lr: float | None = None
    schedule: str | None = None
    lr_warmup: float | None = None
    count_on: str | None = None
    sample: float | None = None
    profile: str | None = None  # a file of counts

    @property
    def title(self) -> str:
        """The run in words that can be a file's name."""
        model = "" if self.model == "tiny" else Path(self.model).name
        numbers = {"k": self.k, "rank": self.rank, "expert-rank": self.expert_rank, "steps": self.steps, "lr": self.lr}
        named = [f"{name}{value:g}" for name, value in numbers.items() if value is not None]
        words = [model, self.task, self.method, self.experts, self.targets, self.schedule]
        if self.count_on or self.sample or self.profile:
            counted = Path(self.profile).stem if self.profile else f"{self.count_on or 'base'}-{self.sample or 0.1:g}"
            named.append(f"counted-{counted}")
        parts = [*words, *named, f"seed{self.seed}"]
        return "-".join(part for part in parts if part)

    @property
    def dtype(self) -> str | None:
        """An embedded model has the same scores on every device."""
        return "float32" if self.model in EMBEDDED else None

    def train_flags(self, out: str, data_folder: str | None = None) -> list[str]:
        """The arguments of train.py."""
        given = asdict(self) | {"dtype": self.dtype, "out": out}
        given["train_data"] = data_file(data_folder, self.task, "train")
        return flags(given)


def common_rate(task: str, method: str) -> float:
    """The learning rate that all methods with an adapter share on a task; full fine-tuning has its own."""
    recipe = RECIPES[task]
    return recipe.lr if METHODS[method].adapts else recipe.fft_lr


def flags(given: dict) -> list[str]:
    """{"train_data": "x", "resume": True} as ["--train-data", "x", "--resume"], without what is None."""
    given = {f"--{name.replace('_', '-')}": value for name, value in given.items() if value is not None}
    return [part for name, value in given.items() for part in ([name] if value is True else [name, str(value)])]


def data_file(folder: str | None, task: str, split: str) -> str | None:
    """The local copy of a task's split: the file or folder in `folder` named TASK-SPLIT, whatever its ending.

    None: a task without one is read as without `folder`. Raises InputError for two.
    """
    inside = sorted(Path(folder).iterdir()) if folder else []
    files = [path for path in inside if path.name.partition(".")[0] == f"{task}-{split}"]
    if len(files) > 1:
        raise InputError(f"--data {folder}: {' and '.join(path.name for path in files)} are the same split; keep one")
    return str(files[0]) if files else None


# ------------------------------------------------------------------------------------------------ what decides a run


@cache
def model_content(model: str) -> dict[str, str]:
    """Digests of a checkpoint: weights, config, tokenizer."""
    return base_content(resolve(model))


@cache
def split_digests(task: str, split: str, path: str | None) -> tuple[str, str]:
    """Of prompts, targets and the rows, which hold what scoring needs; and the one that train.py writes."""
    examples = data.load_examples(task, split, path)
    text = json.dumps([[example.prompt, example.answer, example.row] for example in examples])
    return hashlib.sha256(text.encode()).hexdigest(), data.digest(examples)


def data_content(task: str, split: str, path: str | None) -> str:
    """The digest of a split by which records are found again."""
    return split_digests(task, split, path)[0]


@cache
def decisive_settings(run: Run) -> dict:
    """The settings of train.py that decide the result, resolved; without those of the base model, which has none."""
    if run.method == "base":
        return {}
    settings = asdict(parse_settings(run.train_flags("unused")))
    by_content = {"train_data"}  # see `Records.content`
    return {name: value for name, value in settings.items() if name not in MAY_CHANGE | by_content}


@dataclass(frozen=True)
class Records:
    """The folder of finished runs, and how their results are evaluated."""

    folder: Path
    data: str | None = None  # folder with local copies of the tasks' files
    limit: int | None = None  # problems that are scored; None: all
    samples: int | None = None  # of each problem of code; None: as evaluate.py decides

    def evaluate_flags(self, run: Run, source: str, task: str, out: str) -> list[str]:
        """The arguments of evaluate.py for the model that `source` names."""
        batch = BATCH if run.model in EMBEDDED else None  # no effect on scores
        seed = run.seed if evaluate.default_decoding(task).temperature else None
        given = {"task": task, "seed": seed, "dtype": run.dtype, "batch": batch, "out": out}
        return [source, *flags(self.evaluation(task) | given)]

    def evaluation(self, task: str) -> dict:
        """What decides a score besides the model."""
        samples = self.samples if data.TASKS[task].benchmark == "humaneval" else None
        return {"limit": self.limit, "samples": samples, "eval_data": self.data_file(task, "test")}

    def name(self, run: Run) -> str:
        """A unique name for the run: its title, and a digest of the settings, the model and the data."""
        text = json.dumps([asdict(run), decisive_settings(run), self.content(run)], sort_keys=True)
        return f"{run.title}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def content(self, run: Run) -> dict:
        """Digests of the base model and of the training data."""
        train = None if run.method == "base" else data_content(run.task, "train", self.data_file(run.task, "train"))
        if run.profile and not Path(run.profile).is_file():
            raise InputError(f"{run.profile} is not there; `python reproduce.py fig3` counts it")
        counted = {"counts": sha256(Path(run.profile))} if run.profile else {}
        return {"base": model_content(run.model), "data": train} | counted

    def data_file(self, task: str, split: str) -> str | None:
        return data_file(self.data, task, split)

    def find(self, run: Run) -> tuple[Path, dict] | None:
        """The file of a run's record, and the record. None if there is none that train.py would make again now.

        A setting that the record does not name is newer than the record, and had no effect then.
        """
        files = sorted(self.folder.glob(f"{run.title}-*.json"))
        if not files:  # without a look at the model and the data, which may have to be downloaded
            return None
        content, now = self.content(run), decisive_settings(run)
        for path in files:
            record = read_json(path)
            same_content = all(record.get(name) == value for name, value in content.items())
            if same_content and all(now.get(name) == value for name, value in record["settings"].items()):
                return path, record
        return None

    def record(self, run: Run | None) -> dict:
        """The record of a run; empty if there is none, or no run."""
        _, record = (run and self.find(run)) or (None, {})
        return record

    def scores(self, run: Run, task: str) -> dict | None:
        """What evaluate.py found on a task, if on today's test problems."""
        score = self.record(run).get("scores", {}).get(task)
        if score is None:
            return None
        return score if score["evaluation"] == self.evaluated(run, task) else None

    def evaluated(self, run: Run, task: str) -> dict:
        """What decides a score besides the model, by content."""
        test, flags = data_content(task, "test", self.data_file(task, "test")), self.evaluation(task)
        decoding = asdict(replace(evaluate.default_decoding(task), seed=None))  # the run's
        decoding |= {"samples": flags["samples"]} if flags["samples"] else {}
        return decoding | {"dtype": run.dtype or default_dtype(), **flags, "eval_data": test}

    def __iter__(self) -> Iterator[dict]:
        return (read_json(path) for path in sorted(self.folder.glob("*.json")))


# --------------------------------------------------------------------------------------------------- the record


def spent(record: dict) -> float | None:
    """Seconds of the training and all evaluations; None if one was not timed."""
    parts = ["train", *(f"evaluate {task}" for task in record["scores"])]
    seconds = [record["seconds"].get(part) for part in parts]
    return None if None in seconds else sum(seconds)


def outdated(run: Run, records: Records, folder: Path) -> set[str]:
    """The tasks whose scores in the run's record are of another training than the one in `folder`."""
    earlier = records.record(run)
    return set(earlier.get("scores", ())) if earlier.get("losses") != loss_curve(folder / "log.jsonl") else set()


def check_content(run: Run, records: Records, config: dict) -> None:
    """Raise RunError if train.py has read other weights or data than this program.  config: config.json of the run"""
    if run.method == "base":
        return
    _, digest = split_digests(run.task, "train", records.data_file(run.task, "train"))
    if config["base"] != model_content(run.model) or config["data"] != digest:
        raise RunError(f"{run.title}: the base model or the training data changed; give the command again")


def summarize(run: Run, records: Records, folder: Path, seconds: dict[str, float], scored: dict[str, Path]) -> dict:
    """The record of a run that has ended. folder: of train.py. scored: the folder of each task's evaluation."""
    config, result = (read_json(folder / name, missing={}) for name in ("config.json", "result.json"))  # base: no run
    check_content(run, records, config)
    path, earlier = records.find(run) or (records.folder / f"{records.name(run)}.json", None)
    earlier = None if outdated(run, records, folder) else earlier
    timed = earlier["seconds"] if earlier else {}
    if "train" in timed:  # which train.py has not repeated
        seconds = seconds | {"train": timed["train"]}
    kept = ("steps", "first_loss", "last_loss", "trainable", "trainable_percent", "adapted_share", "adapter_bytes")
    kept += ("optimizer_bytes", "seconds_profile")
    record = {
        "run": asdict(run),
        "settings": decisive_settings(run),
        **records.content(run),
        **{name: result[name] for name in kept if name in result},
        "losses": loss_curve(folder / "log.jsonl"),
        "scores": earlier["scores"] if earlier else {},
        "seconds": timed | seconds,
        **({"effects": read_json(folder / EFFECTS)} if (folder / EFFECTS).is_file() else {}),
        "versions": config.get("versions"),
        "commit": config.get("commit"),
        "cores": os.cpu_count(),
    }
    for task, out in scored.items():
        record["scores"][task] = score(read_json(out / "score.json")) | {"evaluation": records.evaluated(run, task)}
    lines = (f" {json.dumps(name)}: {json.dumps(value)}" for name, value in record.items())
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return record


def score(full: dict) -> dict:
    """score.json without intervals, settings and times; rates as numbers."""
    rates = {name: rate["rate"] for name, rate in full.get("rates", {}).items()}
    plain = {name: value for name, value in full.items() if isinstance(value, int | float | str)}
    return {name: value for name, value in plain.items() if not name.startswith("seconds")} | {"rates": rates}


def loss_curve(log: Path) -> list[list[float]]:
    """[step, loss] of every n-th step and of the last."""
    if not log.is_file():
        return []
    losses = [json.loads(line)["loss"] for line in log.read_text(encoding="utf-8").splitlines()]
    every = max(1, -(-len(losses) // LOSSES))
    steps = sorted({*range(1, len(losses) + 1, every), len(losses)})
    return [[step, losses[step - 1] and round(losses[step - 1], 4)] for step in steps]  # None: skipped
