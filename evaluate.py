"""GSM8K, HumanEval, HEx-PHI and your own rows: generate completions and score them, or score completions that exist.

    python evaluate.py runs/tiny-math-hellora --task tiny-math       # a run of train.py, a checkpoint, or a hub id
    torchrun --nproc_per_node 2 evaluate.py allenai/OLMoE-1B-7B-0924 --task gsm8k     # the processes share the prompts
    python evaluate.py allenai/OLMoE-1B-7B-0924 --task gsm8k --shots 8                # a base model, shown examples
    python evaluate.py runs/own --task own --eval-data FILE.jsonl    # loss and perplexity of your own rows, completions
    python evaluate.py --task gsm8k --completions FILE.jsonl         # lines {"id": ..., "completion": "..."}
    python evaluate.py compare OUT_A OUT_B                           # is the difference more than chance?

An evaluation is five steps: prompt (data.py), decode (generate.py), extract, score and compare (scoring/). Every
example counts, and only the completion is read. The rules that find an answer in a text are in scoring/gsm8k.py,
scoring/extraction.py and scoring/refusals.py; the published rules are reported beside the headline. `--out` gets
score.json, items.jsonl and generations.jsonl. Repeating the command continues an interrupted evaluation.
"""

import command.start  # noqa: F401

import functools
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

import data
from command import cli
from command.cli import POSITIVE, InputError, flag, note, number, say
from command.files import claimed, json_sha256, read_json, write_json, write_jsonl
from data import Example
from generate import Decoding, DecodingFlags, complete, new_cache
from hub.config import ignore_keys
from machine import memory
from machine.processes import ALONE, Processes, default_dtype, end_processes, start_processes
from model import MoETransformer
from recipes.papers import EVALUATION
from run.subject import Subject, began
from scoring import code, gsm8k, loss, refusals, sandbox
from scoring.comparison import DEFAULTS, compare, problems_digest
from scoring.completions import check_folder, claim, read_completions, remove_score, write_generations
from scoring.statistics import describe
from training_step import summed_loss

# DEVIATION from LoRI: HumanEval has 512 new tokens; LoRI's 512 include the prompt.
DECODING = {  # by benchmark, else as in LoRI's scripts
    "gsm8k": Decoding(512),
    "humaneval": Decoding(512, temperature=0.2, top_p=0.95, samples=20),
    "hexphi": Decoding(512),
    "own": Decoding(512),
}
TINY_NEW_TOKENS = 160  # answers of the tiny tasks are shorter
BATCH = 32  # sequences decoded at once, by default
OUT_HELP = "folder for score.json and items.jsonl (default: RUN/evaluation-TASK, runs/evaluation-TASK-MODEL)"
GENERATING = "batch max_new_tokens temperature top_p samples shots prompt seed dtype bos shard".split()

# --------------------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class Settings(DecodingFlags):
    """The flags of evaluate.py."""

    source: str | None = flag(
        None, "a run folder of train.py, a checkpoint folder, a hub id, or 'tiny'", positional=True, nargs="?"
    )
    task: str | None = flag(None, "task to score (default: that of the run)", choices=list(data.TASKS))
    eval_data: str | None = flag(None, "your rows, or the task's test file", metavar="FILE")
    limit: int | None = flag(None, "only the first N examples (default: all)", metavar="N", type=POSITIVE)
    out: str | None = flag(None, OUT_HELP, metavar="DIR")
    completions: str | None = flag(None, 'score this file of {"id": ..., "completion": "..."} lines', metavar="FILE")
    partial: bool = flag(False, "accept --completions that leave examples out")
    batch: int | None = flag(None, f"sequences decoded at once (default: {BATCH})", type=POSITIVE)
    samples: int | None = flag(None, "completions per problem (default: code tasks 20, else 1)", type=POSITIVE)
    shots: int | None = flag(
        None, "solved training problems before each problem (default: by recipe, or 0)", type=number(int, 0)
    )
    train_data: str | None = flag(None, "a local copy of the training file, for --shots", metavar="FILE")
    prompt: str | None = flag(None, "prompt for GSM8K's rows (default: the run's, or lori)", choices=list(data.PROMPTS))
    max_length: int | None = flag(
        None, "for task own: longest row, in tokens (default: the run's, or 512)", type=number(int, 8)
    )
    shard: str | None = flag(None, memory.SHARD_HELP, choices=tuple(memory.CHOSEN))
    refusal_rule: str | None = flag(
        None, "phrases that count as a refusal (default: lori)", choices=list(refusals.RULES)
    )
    code_rule: str | None = flag(None, "how code is found in a text (default: extracted)", choices=list(code.RULES))
    allow_code_execution: bool = flag(False, "run model-written code even if the sandbox only limits resources")
    timeout: float | None = flag(
        None, "seconds a program may run (default: 3)", type=number(float, 0, 3600, above=True)
    )
    workers: int | None = flag(None, "programs run at once (default: one per core)", type=POSITIVE)

    @property
    def benchmark(self) -> str:
        """The benchmark whose prompts and rules the task has."""
        return data.TASKS[self.task].benchmark

    @property
    def decoding(self) -> Decoding:
        """How text is generated: the task's own way, but for what the flags say."""
        decoding = default_decoding(self.task)
        if self.temperature == 0:
            decoding = replace(decoding, top_p=1.0, samples=1)
        return self.given_to(replace(decoding, samples=self.samples or decoding.samples))


def default_decoding(task: str) -> Decoding:
    """How the paper decodes the benchmark of a task, as far as LoRI's scripts tell."""
    decoding = DECODING[data.TASKS[task].benchmark]
    return replace(decoding, max_new_tokens=TINY_NEW_TOKENS) if task.startswith("tiny-") else decoding


def read_settings(argv: list[str]) -> tuple[Settings, Subject | None]:
    """The settings of a command line, checked against each other, and the model that they name. Raises InputError."""
    settings = cli.parse(
        Settings,
        argv,
        prog="evaluate.py",
        description="Generate completions for a task and score them, or score existing completions.",
        epilog="evaluate.py compare A B compares two evaluations of one task.\n"
        "docs/reproduce.md says how an answer is found in a text.",
        example="python evaluate.py runs/demo/hellora --task tiny-math --limit 100 --out runs/scores",
    )
    subject = None
    if settings.completions is None:
        if settings.source is None:
            raise InputError("nothing to evaluate; name a run, a checkpoint or 'tiny', or pass --completions FILE")
        if settings.partial:
            raise InputError("--partial is for --completions; leave it out")
        subject = Subject(settings.source)
        settings = as_trained(settings, subject.run["settings"] if subject.run else {})
    else:
        given = [f"--{name.replace('_', '-')}" for name in GENERATING if getattr(settings, name) is not None]
        if settings.source or given:
            what = settings.source or ", ".join(given)
            raise InputError(f"{what} says how to generate, but --completions exist already; give one or the other")
        if not Path(settings.completions).is_file():  # before anything is downloaded to compare it with
            raise InputError(f"--completions {settings.completions}: no such file; name one of JSON lines")
    if settings.task is None and subject and not subject.is_here:
        raise InputError(f"no such run: there is no folder {subject.name}; if that is a model of the hub, add --task")
    if settings.task not in list(data.TASKS):  # the settings of a run may hold anything
        not_a_run = f", and {settings.source} is no run folder, which would name it" if subject else ""
        given = f"is missing{not_a_run}" if settings.task is None else f"{settings.task!r} is unknown"
        raise InputError(f"--task {given}; choose from {', '.join(data.TASKS)}")
    check_task_flags(settings)
    return settings, subject


def as_trained(settings: Settings, trained: dict) -> Settings:
    """The settings with what those of a run decide: the task, its prompt, and how the run's recipe evaluates it."""
    task = settings.task or trained.get("task")
    chosen = {"task": task, "bos": trained.get("bos", "auto")}
    benchmark = data.TASKS[task].benchmark if task in list(data.TASKS) else None
    chosen |= {"max_length": trained.get("max_length", 512)} if benchmark == "own" else {}
    chosen |= {"prompt": trained.get("prompt", "lori")} if benchmark == "gsm8k" else {}
    by_recipe = EVALUATION.get((trained.get("recipe"), task), {}) if benchmark else {}
    if by_recipe:
        note(f"as the recipe {trained['recipe']} evaluates, unless a flag says otherwise: {by_recipe}")
    return replace(settings, **{name: v for name, v in (chosen | by_recipe).items() if getattr(settings, name) is None})


def check_task_flags(settings: Settings) -> None:
    """Raise InputError for a flag that has no meaning for the task, or contradicts another one."""
    task, benchmark, decoding = settings.task, settings.benchmark, settings.decoding
    owners = {
        "refusal_rule": "hexphi",
        "code_rule": "humaneval",
        "timeout": "humaneval",
        "workers": "humaneval",
        "shots": "gsm8k",
        "max_length": "own",
        "prompt": "gsm8k",
    }
    if settings.completions and benchmark == "own":
        raise InputError("--task own is measured by the loss, which completions do not have; name a run or a model")
    for name, owner in owners.items():
        if getattr(settings, name) and benchmark != owner:
            given = f"--{name.replace('_', '-')} {getattr(settings, name)}"
            raise InputError(f"{given} has no meaning for {task}; leave it out")
    if settings.train_data and not settings.shots:
        raise InputError(f"--train-data {settings.train_data} is read only for --shots N; leave it out, or add --shots")
    if decoding.samples > 1 and (decoding.temperature == 0 or benchmark != "humaneval"):
        why = "greedy samples are all the same" if benchmark == "humaneval" else f"{task} scores one completion"
        raise InputError(f"--samples {decoding.samples}: {why}; leave it out")


# ----------------------------------------------------------------------------------------------------------- prompt


class Job(NamedTuple):
    """What is asked of which model, and where the answers go."""

    examples: list[Example]  # of the task, all of them
    out: Path | None
    protection: str | None  # from model-written code, if any is run
    subject: Subject | None = None  # None: completions exist already
    reader: data.Reader | None = None
    prompts: list[list[int]] = []  # the token ids of each example's prompt
    items: list[data.Encoded] = []  # rows of task own whose loss is measured


def prepare(settings: Settings, subject: Subject | None, processes: Processes) -> Job:
    """Read what is asked. Raises InputError, before anything is downloaded if the flags are wrong."""
    runs_code = settings.benchmark == "humaneval" and processes.is_main
    protection = check_protection(settings.allow_code_execution) if runs_code else None
    out = out_folder(settings, subject)
    if out:
        check_folder(out)
    if subject is None:
        return Job(load_problems(settings, None), out, protection)
    reader = data.Reader(
        settings.task,
        subject.folder,
        subject.config,
        max_length=settings.max_length or 512,
        bos=settings.bos,
        date=processes.once(lambda: began(subject.run, earlier(out, subject))),
    )
    examples = load_problems(settings, reader)
    answered = [example for example in examples[: settings.limit] if example.answer.strip()]
    items = reader.encode(answered) if settings.task == "own" and answered else []
    return Job(examples, out, protection, subject, reader, reader.prompts(examples), items)


def earlier(out: Path, subject: Subject) -> dict | None:
    """evaluation.json of `out` if the completions there are those of the same model, which may be continued."""
    about = read_json(out / "evaluation.json", dict, missing={})
    return about if about.items() >= subject.content.items() else None


def load_problems(settings: Settings, reader: data.Reader | None) -> list[Example]:
    """The examples of the task, all of them, with the solved problems of --shots in their prompts."""
    template = reader and reader.template
    prompt = settings.prompt or "lori"
    examples = data.load_examples(settings.task, "test", settings.eval_data, template=template, prompt=prompt)
    if not settings.shots:
        return examples
    asked = {same_question(example) for example in examples}
    solved = data.load_examples(settings.task, "train", settings.train_data)
    shown = [example for example in solved if same_question(example) not in asked]
    if len(shown) < len(solved):
        note(f"{len(solved) - len(shown)} of {len(solved)} training problems are not shown: they are test problems")
    if len(shown) < settings.shots:
        raise InputError(f"--shots {settings.shots}: the training data has {len(shown)} problems to show; give fewer")
    return data.show_examples(examples, shown[: settings.shots])


def same_question(example: Example) -> str:
    """The question of a GSM8K problem, alike for two problems that differ in case and white space alone."""
    return " ".join(example.row["question"].lower().split())


# ----------------------------------------------------------------------------------------------------------- decode


class Answers(NamedTuple):
    """The completions of each example, by id, one or more."""

    texts: dict[str, list[str]]
    losses: dict[str, loss.RowLoss] = {}  # of the rows of task own that have an answer


def load(settings: Settings, job: Job, dtype: str, processes: Processes) -> MoETransformer:
    """The model, as each process is to hold it for the longest of the sequences."""
    batch = settings.batch or BATCH
    longest = max(map(len, [*job.prompts[: settings.limit], *(item.ids for item in job.items)]))
    return job.subject.load(
        getattr(torch, dtype),
        processes,
        shard=settings.shard,
        tokens=batch * longest,
        cached=batch * (longest + settings.decoding.max_new_tokens),
    )


def decode(settings: Settings, job: Job, processes: Processes) -> Answers | None:
    """The completions of the model, those included that an interrupted evaluation has left in the folder.

    -> None on every process but the main one
    """
    dtype = settings.dtype or default_dtype()
    model = load(settings, job, dtype, processes)
    check_cache_fits(settings, job, model)  # before earlier completions are removed
    kept = processes.once(lambda: claim(job.out, identity(settings, job, dtype), job.reader.template.date))
    losses = row_losses(model, job.items, processes) if job.items else {}
    done = gather(decode_missing(settings, job, model, kept, processes), processes)
    if done is None:
        return None
    done = kept | done
    write_generations(job.out, done)
    return Answers(texts_of(settings, job, done), losses)


def check_cache_fits(settings: Settings, job: Job, model: MoETransformer) -> None:
    """Raise InputError if the memory does not hold the keys and values of the longest batch."""
    prompts = job.prompts[: settings.limit]
    size = min(settings.batch or BATCH, len(prompts) * settings.decoding.samples)
    new_cache(model, size, max(map(len, prompts)) + settings.decoding.max_new_tokens)


def decode_missing(
    settings: Settings, job: Job, model: MoETransformer, kept: dict[tuple[str, int], dict], processes: Processes
) -> dict[tuple[str, int], dict]:
    """This process's share of the completions that are not `kept`, written to its file as they end."""
    asked, prompts = job.examples[: settings.limit], job.prompts[: settings.limit]
    samples = range(settings.decoding.samples)
    missing = [(i, s) for i, each in enumerate(asked) for s in samples if each.prompt and (each.id, s) not in kept]
    missing.sort(key=lambda pick: len(prompts[pick[0]]))  # neighbours in length go to different processes
    completed = complete(
        model,
        job.reader.tokenizer,
        prompts,
        missing[processes.index :: processes.count],
        settings.decoding,
        batch_size=settings.batch or BATCH,
        stop_ids=job.reader.stop_ids,
        stop=stop_rule(settings, asked),
        proceed=processes.any if isinstance(model, FSDPModule) else bool,
    )
    done = {}
    with open(job.out / f"generations-{processes.index}.jsonl", "w", encoding="utf-8") as file:
        for i, s, text, cut in completed:
            text = text.partition(data.NEXT_SHOT)[0] if settings.shots else text
            done[asked[i].id, s] = {"id": asked[i].id, "sample": s, "completion": text, "cut": cut}
            print(json.dumps(done[asked[i].id, s]), file=file, flush=True)
    return done


def texts_of(settings: Settings, job: Job, done: dict[tuple[str, int], dict]) -> dict[str, list[str]]:
    """The completions of each example, by id. A row of text alone asks for nothing, and has an empty one."""
    asked, samples, limit = job.examples[: settings.limit], settings.decoding.samples, settings.decoding.max_new_tokens
    nothing = {"completion": "", "cut": False}
    records = {each.id: [done.get((each.id, s), nothing) for s in range(samples)] for each in asked}
    if cut := sum(record["cut"] for of_example in records.values() for record in of_example):
        note(f"{cut} of {len(asked) * samples} completions were cut at {limit} tokens")
    return {name: [record["completion"] for record in of_example] for name, of_example in records.items()}


@torch.no_grad()
def row_losses(
    model: MoETransformer, items: list[data.Encoded], processes: Processes
) -> dict[str, loss.RowLoss] | None:
    """The loss of each row by itself, by id; None on every process but the main one."""
    losses = {}
    for part in data.micro_batches(items, 1, processes.index, processes.count):
        nats = summed_loss(model, part).item()
        losses |= {item.example: (nats, item.num_targets) for item in part}
    return gather(losses, processes)


def stop_rule(settings: Settings, examples: list[Example]) -> Callable[[int, str], bool] | None:
    """When a completion may end before its EOS token: where another question begins, or the function is complete."""
    if settings.shots:
        return lambda i, text: data.NEXT_SHOT in text
    if settings.benchmark == "humaneval":
        problems = [(example.row["prompt"], example.row["entry_point"]) for example in examples]
        return lambda i, text: code.finished(*problems[i], text)
    return None


def gather(done: dict, processes: Processes) -> dict | None:
    """The union of every process's dict; None on every process but the main one."""
    if processes.count == 1:
        return done
    parts = [None] * processes.count if processes.is_main else None
    dist.gather_object(done, parts)
    return functools.reduce(dict.__or__, parts) if processes.is_main else None


def identity(settings: Settings, job: Job, dtype: str) -> dict:
    """Everything that decides the completions, by content. More examples or samples continue what is there.

    The tokens of the prompts hold what --eval-data, --shots, --bos and the like decide.
    """
    decoding = asdict(settings.decoding)
    del decoding["samples"]
    if settings.decoding.temperature == 0:
        del decoding["seed"], decoding["top_p"]
    prompts = [(example.id, ids) for example, ids in zip(job.examples, job.prompts, strict=True)]
    about = {"task": settings.task, "dtype": dtype, "stop_ids": list(job.reader.stop_ids)} | decoding
    return about | {"prompts": json_sha256(prompts)} | job.subject.content


# ------------------------------------------------------------------------------------------------ extract and score


def score(settings: Settings, examples: list[Example], answers: Answers) -> tuple[dict, list[dict]]:
    """The score of a task, as in score.json, and its items, as in items.jsonl. Code of HumanEval problems is run."""
    pairs = [(example, text) for example in examples for text in answers.texts[example.id]]
    items = [{"id": example.id, "prompt": example.prompt, "completion": text} for example, text in pairs]
    records = [example.row for example, _ in pairs]
    if settings.benchmark == "own":
        return loss.score(items, [example.answer for example, _ in pairs], answers.losses)
    if settings.benchmark == "humaneval":
        rule, timeout = settings.code_rule or DEFAULTS["code_rule"], settings.timeout or DEFAULTS["timeout"]
        return code.score(items, records, rule, timeout, settings.workers)
    if settings.benchmark == "gsm8k":
        return gsm8k.score(items, [str(record["answer"]) for record in records], settings.shots or 0)
    return refusals.score(items, records, settings.refusal_rule or DEFAULTS["refusal_rule"])


def check_protection(allowed: bool) -> str:
    """What protects from model-written code. Raises InputError where only limits do and the user did not allow that."""
    try:
        level = sandbox.protection()
    except RuntimeError as error:
        raise InputError(f"programs cannot be run: {error}") from None
    if level.startswith("limits") and not allowed:
        raise InputError(
            f"model-written code would run with {level}: it could read and change your files and use the network; "
            "install bubblewrap, or pass --allow-code-execution to accept that"
        )
    return level


def report(result: dict, task: str) -> list[str]:
    """Lines for people: all rates, then the headline."""
    if "loss" in result:
        return [loss.describe(result, task)]
    table = result["rates"] | {f"category {name}": share for name, share in result.get("categories", {}).items()}
    names: dict[str, list[str]] = {}  # rules that agree have one line
    for name, share in table.items():
        names.setdefault(describe(share), []).append(name)
    lines = [f"{described}  {', '.join(agreeing)}" for described, agreeing in names.items()]
    name, rule = next(iter(result)), result["rule"]
    main = result["rates"].get(rule) or result["rates"][name]  # pass@1 is a rate of its own
    empty = result.get("num_empty")
    remark = f"; {empty} empty answers, which are not refusals" if empty else ""
    return [*lines, f"{name} {describe(main)} on {task}, rule: {rule}{remark}"]


def evaluate(settings: Settings, job: Job, processes: Processes) -> dict | None:
    """Generate or read, score, write, print.  -> the score; None on every process but the main one"""
    started, out = time.perf_counter(), job.out
    if job.subject:
        answers = decode(settings, job, processes)
        if answers is None:
            return None
    else:
        file, ids = Path(settings.completions), [example.id for example in job.examples]
        several = settings.benchmark == "humaneval"
        answers = Answers(read_completions(file, ids, settings.limit, settings.partial, several))
    examples = [example for example in job.examples if example.id in answers.texts]
    remove_score(out)
    seconds = {"seconds_completing": time.perf_counter() - started}
    result, items = score(settings, examples, answers)
    used = {name: value for name, value in asdict(settings).items() if value is not None}
    used |= {"protection": job.protection} | (asdict(settings.decoding) if job.subject else {})
    problems = problems_digest({example.id: example.row for example in examples})
    result |= {"seconds": time.perf_counter() - started} | seconds | {"settings": used, "problems": problems}
    if out:
        write_jsonl(out / "items.jsonl", items)
        write_json(out / "score.json", result)
    if job.protection:
        say(f"programs ran with {job.protection}")
    say(*report(result, settings.task))
    return result


def out_folder(settings: Settings, subject: Subject | None) -> Path | None:
    """--out, or where an evaluation of a model lies by default."""
    if settings.out or subject is None:
        return Path(settings.out) if settings.out else None
    name, folder = f"evaluation-{settings.task}", Path(subject.name)
    return folder / name if subject.run else Path("runs", f"{name}-{folder.resolve().name}")


# ------------------------------------------------------------------------------------------------------------- main


def main(argv: list[str] | None = None) -> dict | None:
    """The command. Returns what it printed; None on every process but the main one."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    settings, subject = read_settings(argv)
    ignore_keys(settings.ignore_config_keys)
    if settings.completions:  # nothing to share out
        processes = ALONE
        if not cli.is_main_process():
            return None
    else:  # They exchange text, and end far apart. A sharded model also exchanges weights, on GPUs.
        processes = start_processes("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timedelta(days=1))
    job = prepare(settings, subject, processes)
    with claimed(job.out) if job.out and processes.is_main else nullcontext():
        result = evaluate(settings, job, processes)
    end_processes()
    return result


if __name__ == "__main__":
    cli.run(main)
