"""GSM8K, HumanEval and HEx-PHI: generate completions, then score them; or score completions that exist.

    python evaluate.py runs/tiny-math-hellora --task tiny-math       # a run of train.py, a checkpoint, or a hub id
    torchrun --nproc_per_node 2 evaluate.py allenai/OLMoE-1B-7B-0924 --task gsm8k     # processes share the prompts
    python evaluate.py allenai/OLMoE-1B-7B-0924 --task gsm8k --shots 8                # a base model, shown how
    python evaluate.py --task gsm8k --completions FILE.jsonl         # lines {"id": ..., "completion": "..."}
    python evaluate.py compare OUT_A OUT_B                           # is the difference more than chance?

Every example counts, and only the completion is read. (LoRI's evaluator reads prompt and completion together and
drops the last, partial batch of 64; what that gives is reported beside, as "lori as published".) The rules are in
scoring.py. `--out` gets score.json, items.jsonl and generations.jsonl; the same command again goes on from there.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import data
from command import cli
from command.cli import InputError, note
from command.files import write_jsonl, write_text
from data import Example
from hub import rows as files
from scoring import completions, sandbox
from scoring import rules as scoring


def score(
    task: str,
    examples: list[Example],
    texts: list[list[str]],
    *,
    generated: bool = True,
    shots: int = 0,
    refusal_rule: str = "lori",
    timeout: float = 3.0,
    workers: int | None = None,
) -> tuple[dict, list[dict]]:
    """The score of a task, as in score.json, and its items, as in items.jsonl. Code of HumanEval problems is run.

    generated: code is cut out of the texts first; text of others is run as it is. shots: solved problems in a prompt.
    """
    benchmark = data.TASKS[task].benchmark
    if benchmark == "humaneval":
        items = run_code(examples, texts, generated, timeout, workers)
        return scoring.score_code(items), items
    single = [samples[0] for samples in texts]
    if benchmark == "gsm8k":
        return scoring.score_math(examples, single, shots)
    return scoring.score_safety(examples, single, refusal_rule)


def run_code(
    examples: list[Example], texts: list[list[str]], generated: bool, timeout: float, workers: int | None
) -> list[dict]:
    """An item for every completion: the code as run with the problem's tests, the outcome, whether it passed.

    `generated` text is cut to its code first; a file of completions is run as it is.
    """
    items, programs = [], []
    for example, samples in zip(examples, texts, strict=True):
        prompt, entry_point = example.row["prompt"], example.row["entry_point"]
        for text in samples:
            code = scoring.extract_function(prompt, entry_point, text) if generated else text
            items.append({"id": example.id, "prompt": prompt, "completion": text, "code": code})
            programs.append(sandbox.Program(prompt + code, example.row["test"], entry_point))
    distinct = list(dict.fromkeys(programs))  # at a low temperature many samples are the same
    verdicts = dict(zip(distinct, sandbox.run_programs(distinct, timeout, workers), strict=True))
    for item, program in zip(items, programs, strict=True):
        item |= {"extracted": verdicts[program].outcome, "correct": verdicts[program].passed}
    return items


def check_protection(allowed: bool) -> str:
    """What protects from model-written code; InputError where only limits do and the user did not allow that."""
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


# ------------------------------------------------------------------------------------------- the folder of --out


def check_folder(out: Path) -> None:
    """InputError if `out` holds something else than an evaluation, or cannot be written to."""
    try:
        ours = not out.exists() or (out / "evaluation.json").is_file() or (out / "score.json").is_file()
        if not ours and not (out.is_dir() and not any(out.iterdir())):
            raise InputError(f"--out {out} exists and is not an evaluation of evaluate.py; name another folder")
        tempfile.TemporaryFile(dir=next(path for path in (out, *out.parents) if path.exists())).close()
    except OSError as error:
        raise InputError(f"--out {out} cannot be written to ({error.strerror}); name another folder") from None


def claim(out: Path, identity: dict) -> None:
    """Make `out` the folder of this evaluation; completions made there with other settings or weights are removed."""
    file = out / "evaluation.json"
    try:
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except ValueError:
        before = {}
    out.mkdir(parents=True, exist_ok=True)
    if before != identity:
        if before is not None:
            note(f"{out} holds an evaluation with other settings or weights: starting over")
        for old in [*out.glob("generations*.jsonl"), out / "score.json", out / "items.jsonl"]:
            old.unlink(missing_ok=True)
        file.write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- commands


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    parser = cli.Parser(
        description="Generate completions of a task and score them, or score completions that exist.",
        epilog="evaluate.py compare A B compares two evaluation folders of the same task.",
    )
    positive = cli.number(int, 1)
    parser.add_argument("source", nargs="?", help="a run folder of train.py, a checkpoint folder, a hub id, or 'tiny'")
    parser.add_argument("--task", choices=list(data.TASKS), help="default: the task of the run")
    parser.add_argument("--eval-data", help="a local copy of the task's test file")
    parser.add_argument("--limit", type=positive, help="only the first examples")
    parser.add_argument("--out", help="folder for score.json and items.jsonl; default: none with --completions")
    parser.add_argument("--completions", help='score this file of {"id": ..., "completion": "..."} lines')
    parser.add_argument("--partial", action="store_true", help="let --completions leave examples out")
    parser.add_argument("--batch", type=positive, help="sequences decoded at once (default: 32)")
    parser.add_argument("--max-new-tokens", type=positive, help="where a completion is cut (default: by task)")
    parser.add_argument("--temperature", type=cli.number(float, 0), help="0: greedy (default: by task)")
    parser.add_argument("--top-p", type=cli.number(float, 0, 1, above=True), help="nucleus (default: by task)")
    parser.add_argument("--samples", type=positive, help="completions of each problem (default: by task)")
    parser.add_argument("--shots", type=positive, help="show this many solved problems, the first of the training data")
    parser.add_argument("--train-data", help="a local copy of the training file, for --shots")
    parser.add_argument("--seed", type=cli.number(int, 0), help="of the samples (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--refusal-rule", choices=list(scoring.REFUSAL_RULES), help="default: lori")
    parser.add_argument("--allow-code-execution", action="store_true", help="run model-written code with limits only")
    parser.add_argument(
        "--timeout", type=cli.number(float, 0, above=True), default=3.0, help="seconds a program may run"
    )
    parser.add_argument("--workers", type=positive, help="programs run at once (default: one per core)")
    args = parser.parse_args(argv)

    generation = ("batch", "max_new_tokens", "temperature", "top_p", "samples", "shots", "seed", "dtype")
    given = [f"--{name.replace('_', '-')}" for name in generation if getattr(args, name) is not None]
    if args.completions is None:
        if args.source is None:
            raise InputError("nothing to evaluate; name a run, a checkpoint or 'tiny', or pass --completions FILE")
        if args.partial:
            raise InputError("--partial is for --completions; leave it out")
        args.task = args.task or (completions.run_config(args.source) or {"settings": {}})["settings"].get("task")
    elif args.source is not None or given:
        what = args.source or ", ".join(given)
        raise InputError(f"{what} says how to generate, but --completions exist already; give one or the other")
    if args.completions and not Path(args.completions).is_file():  # before anything is downloaded to compare it with
        raise InputError(f"--completions {args.completions}: no such file; name one of JSON lines")
    if args.task not in list(data.TASKS):  # a run's settings may say anything
        given = "is missing" if args.task is None else f"{args.task!r} is unknown"
        raise InputError(f"--task {given}; choose from {', '.join(data.TASKS)}")
    benchmark = data.TASKS[args.task].benchmark
    if args.refusal_rule and benchmark != "hexphi":
        raise InputError(f"--refusal-rule {args.refusal_rule} has no meaning for {args.task}; leave it out")
    if args.shots and benchmark != "gsm8k":
        raise InputError(f"--shots {args.shots} has no meaning for {args.task}; leave it out")
    if args.train_data and not args.shots:
        raise InputError(f"--train-data {args.train_data} is read only for --shots N; leave it out, or add that")
    decoding = completions.default_decoding(args.task)
    changed = {name: getattr(args, name) for name in asdict(decoding) if getattr(args, name) is not None}
    if args.temperature == 0:
        changed = {"top_p": 1.0, "samples": 1} | changed
    args.decoding = replace(decoding, **changed)
    if args.decoding.top_p < 1 and args.decoding.temperature == 0:
        raise InputError(f"--top-p {args.top_p:g}: greedy decoding draws from no nucleus; want a --temperature above 0")
    if args.decoding.samples > 1 and (args.decoding.temperature == 0 or benchmark != "humaneval"):
        why = "greedy samples are all the same" if benchmark == "humaneval" else f"{args.task} scores one completion"
        raise InputError(f"--samples {args.decoding.samples}: {why}; leave it out")
    return args


def generate(args: argparse.Namespace, out: Path, settings: dict) -> tuple[list[Example], list[list[str]] | None]:
    """The examples, and the completions of the model that args.source names (None: not on the main process)."""
    examples = data.load_examples(args.task, "test", args.eval_data, args.limit)
    if args.shots:
        shown = data.load_examples(args.task, "train", args.train_data, args.shots)
        if len(shown) < args.shots:
            raise InputError(
                f"--shots {args.shots}: the training data has {len(shown)} problems; want as many or fewer"
            )
        examples = data.show_examples(examples, shown)
        settings |= {"shots": args.shots, "train_data": args.train_data}
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    model, tokenizer = completions.load_subject(args.source, getattr(torch, dtype), device)
    settings |= {"source": args.source, "dtype": dtype} | asdict(args.decoding)
    if cli.is_main_process():
        # More examples or samples of the same kind continue what is there.
        same = {name: value for name, value in settings.items() if name not in ("limit", "samples")}
        claim(out, same | {"weights": completions.fingerprint(args.source)})
    found = completions.complete(
        model,
        tokenizer,
        args.task,
        examples,
        args.decoding,
        batch_size=args.batch or 32,
        until=data.NEXT_SHOT if args.shots else None,
        folder=out,
    )
    return examples, found


def evaluate(args: argparse.Namespace) -> dict | None:
    """Generate or read, score, write, print.  -> the score; None if not on the main process"""
    runs_code = data.TASKS[args.task].benchmark == "humaneval"
    protection = check_protection(args.allow_code_execution) if runs_code and cli.is_main_process() else None
    out = Path(args.out) if args.out else None
    if args.source and out is None:
        name = f"evaluation-{args.task}"
        is_run = completions.run_config(args.source) is not None
        out = Path(args.source, name) if is_run else Path("runs", f"{name}-{Path(args.source).resolve().name}")
    if out:
        check_folder(out)
    began = time.perf_counter()
    settings = {"task": args.task, "eval_data": args.eval_data, "limit": args.limit}
    if args.source:
        examples, texts = generate(args, out, settings)
        if texts is None:
            return None
    else:
        examples = data.load_examples(args.task, "test", args.eval_data)
        settings |= {"completions": args.completions, "partial": args.partial}
        examples, texts = completions.read_completions(
            Path(args.completions), examples, limit=args.limit, partial=args.partial, several=runs_code
        )
    seconds = {"seconds_completing": time.perf_counter() - began}
    result, items = score(
        args.task,
        examples,
        texts,
        generated=args.source is not None,
        shots=args.shots or 0,
        refusal_rule=args.refusal_rule or "lori",
        timeout=args.timeout,
        workers=args.workers,
    )
    settings |= {"timeout": args.timeout, "protection": protection} if runs_code else {}
    result |= {"seconds": time.perf_counter() - began} | seconds | {"settings": settings}
    if out:
        out.mkdir(parents=True, exist_ok=True)
        write_jsonl(out / "items.jsonl", items)
        write_text(out / "score.json", json.dumps(result, indent=1) + "\n")
    if protection:
        print(f"programs ran with {protection}")
    print(*scoring.summary(result, args.task), sep="\n")
    return result


def compare(argv: list[str]) -> dict:
    """Two evaluation folders of the same examples: what each got right alone, and whether by chance.

    A problem with several samples goes to the folder where more of them are right; samples are not independent.
    """
    parser = cli.Parser(prog="evaluate.py compare", description="Exact McNemar test on two evaluations of one task.")
    parser.add_argument("folders", nargs=2, metavar="FOLDER", help="--out of an evaluation")
    folders = [Path(folder) for folder in parser.parse_args(argv).folders]
    right_a, right_b = (read_verdicts(folder) for folder in folders)
    tasks = [read_task(folder) for folder in folders]
    if tasks[0] != tasks[1]:
        raise InputError(f"{folders[0]} is of {tasks[0]} and {folders[1]} of {tasks[1]}; want two of one task")
    if right_a.keys() != right_b.keys():
        alone = sorted(right_a.keys() ^ right_b.keys())
        raise InputError(f"{len(alone)} ids are in one folder only (first: {alone[0]}); evaluate both on the same")
    pairs = [(right_a[example], right_b[example]) for example in right_a]
    only_a, only_b = sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)
    neither = sum(a == b == 0 for a, b in pairs)
    result = {"both": len(pairs) - only_a - only_b - neither, "only_a": only_a, "only_b": only_b, "neither": neither}
    result["p"] = scoring.mcnemar(only_a, only_b)
    for folder, right in zip(folders, (right_a, right_b), strict=True):
        print(f"{folder}: {scoring.describe(scoring.rate(sum(right.values()), len(right)))}")
    print(", ".join(f"{name} {count}" for name, count in list(result.items())[:4]))
    print(f"McNemar exact p {result['p']:.4g} on {only_a + only_b} items that differ")
    return result


def read_verdicts(folder: Path) -> dict[str, float]:
    """{id: share of its samples that are correct} of an evaluation folder, without the prompts labelled safe."""
    verdicts: dict[str, list[bool]] = {}
    for place, item in files.json_rows(folder / "items.jsonl"):
        if not isinstance(item, dict) or not isinstance(item.get("correct"), bool) or "id" not in item:
            raise InputError(f"{place}: not an item of evaluate.py; want its --out folder")
        if item.get("label") != "safe":
            verdicts.setdefault(str(item["id"]), []).append(item["correct"])
    return {name: sum(found) / len(found) for name, found in verdicts.items()}


def read_task(folder: Path) -> str:
    """The task of an evaluation folder."""
    try:
        return json.loads(files.read_text(folder / "score.json"))["settings"]["task"]
    except (ValueError, TypeError, KeyError):
        raise InputError(f"{folder / 'score.json'}: not a score of evaluate.py; want its --out folder") from None


def main(argv: list[str] | None = None) -> dict | None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    args = parse_flags(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not args.completions:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # processes end far apart; they exchange text only
    elif not cli.is_main_process():
        return None
    result = evaluate(args)
    if dist.is_initialized():
        dist.barrier()  # a process that leaves while another still talks to it aborts
        dist.destroy_process_group()
    return result


if __name__ == "__main__":
    cli.run(main)
