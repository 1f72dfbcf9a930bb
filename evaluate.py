"""GSM8K, HumanEval and HEx-PHI: generate completions, then score them; or score completions that exist.

    python evaluate.py runs/tiny-math-hellora --task tiny-math       # a run of train.py, a checkpoint, or a hub id
    torchrun --nproc_per_node 2 evaluate.py allenai/OLMoE-1B-7B-0924 --task gsm8k     # prompts shared by processes
    python evaluate.py --task gsm8k --completions FILE.jsonl         # lines {"id": ..., "completion": "..."}
    python evaluate.py compare OUT_A OUT_B                           # is the difference more than chance?

Every example counts, and only the completion is read. (LoRI's evaluator reads prompt and completion together and
drops the last, partial batch of 64; what that gives is reported beside, as "lori as published".) The rules are in
scoring.py. `--out` gets score.json, items.jsonl and generations.jsonl; the same command again continues from there.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tokenizers import Tokenizer

import cli
import data
import hellora
import scoring
from cli import InputError
from data import Example
from generate import stream
from model import MoETransformer, load_model, read_config, resolve


@dataclass(frozen=True)
class Decoding:
    """How text is generated."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: always the likeliest token
    top_p: float = 1.0
    samples: int = 1  # completions of each prompt
    seed: int = 0


DECODING = {  # LoRI's scripts; HumanEval there counts the prompt into the 512 tokens, we do not
    "gsm8k": Decoding(512),
    "humaneval": Decoding(512, temperature=0.2, top_p=0.95, samples=20),
    "hexphi": Decoding(512),
}
TINY_NEW_TOKENS = 160  # the tiny tasks' answers are shorter


def default_decoding(task: str) -> Decoding:
    decoding = DECODING[data.TASKS[task].benchmark]
    return replace(decoding, max_new_tokens=TINY_NEW_TOKENS) if task.startswith("tiny-") else decoding


# ------------------------------------------------------------------------------------------------- generating


def load_subject(source: str, dtype: torch.dtype, device: torch.device) -> tuple[MoETransformer, Tokenizer]:
    """The model and tokenizer of a run folder of train.py (base and adapter), a checkpoint folder, or a hub id."""
    run = run_settings(source)
    folder = resolve(run["model"] if run else source)
    tokenizer = data.load_tokenizer(folder, read_config(folder))
    model = load_model(folder, dtype=dtype, device=device)
    if run:
        hellora.load_adapter(model, Path(source) / "adapter")
    return model.eval(), tokenizer


def run_settings(source: str) -> dict | None:
    """config.json of a run of train.py; None if `source` is something else. A checkpoint's has a model_type."""
    try:
        config = json.loads((Path(source) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    is_run = isinstance(config, dict) and "model" in config and "model_type" not in config
    return config if is_run else None


def complete(
    model: MoETransformer,
    tokenizer: Tokenizer,
    task: str,
    examples: list[Example],
    decoding: Decoding,
    *,
    batch_size: int = 32,
    folder: Path | None = None,
) -> list[list[str]] | None:
    """The model's completions, `decoding.samples` of each example; None on every process but the main one.

    Processes share the prompts; each must hold the whole model. `folder` keeps finished completions, so that an
    interrupted evaluation goes on where it stopped.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    done = [read_generations(folder) if folder and rank == 0 else {}]
    if world > 1:
        dist.broadcast_object_list(done)
    done = done[0]
    todo = [(i, s) for i, example in enumerate(examples) for s in range(decoding.samples)]
    todo = [(i, s) for i, s in todo if (examples[i].id, s) not in done]
    prompts = data.tokenize([example.prompt for example in examples], tokenizer)
    todo.sort(key=lambda pick: len(prompts[pick[0]]))  # neighbours in length go to different processes

    def stop(index: int, ids: list[int]) -> bool:
        row = examples[index].row
        return scoring.function_end(row["prompt"], row["entry_point"], tokenizer.decode(ids))[1] is not None

    found = stream(
        model,
        prompts,
        todo[rank::world],
        max_new_tokens=decoding.max_new_tokens,
        eos_id=model.config.eos_token_id,
        batch_size=batch_size,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=decoding.seed,
        stop=stop if data.TASKS[task].benchmark == "humaneval" else None,
    )
    mine = {}
    with open(folder / f"generations-{rank}.jsonl" if folder else os.devnull, "a", encoding="utf-8") as file:
        for i, s, ids in found:
            record = {"id": examples[i].id, "sample": s, "completion": tokenizer.decode(ids)}
            record["cut"] = len(ids) == decoding.max_new_tokens
            mine[record["id"], s] = record
            print(json.dumps(record), file=file, flush=True)
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
    wanted = [[done[example.id, s] for s in range(decoding.samples)] for example in examples]
    cut = sum(record["cut"] for records in wanted for record in records)
    if cut:
        data.say(f"{cut} of {len(wanted) * decoding.samples} completions were cut at {decoding.max_new_tokens} tokens")
    return [[record["completion"] for record in records] for records in wanted]


def read_generations(folder: Path) -> dict[tuple[str, int], dict]:
    """What an earlier evaluation left in `folder`, put into one file; a line that was torn off is dropped."""
    done = {}
    for path in sorted(folder.glob("generations*.jsonl")):
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            done[record["id"], record["sample"]] = record
    write_generations(folder, done)
    return done


def write_generations(folder: Path, done: dict[tuple[str, int], dict]) -> None:
    """All completions in generations.jsonl (a --completions file of their own); the processes' parts go."""
    write_lines(folder / "generations.jsonl", list(done.values()))
    for part in folder.glob("generations-*.jsonl"):
        part.unlink()


# ------------------------------------------------------------------------------------------------------ files


def write_lines(path: Path, records: list[dict]) -> None:
    """A .jsonl file, whole or not at all."""
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def write_text(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def read_completions(
    path: Path, examples: list[Example], limit: int | None, partial: bool, several: bool
) -> tuple[list[Example], list[list[str]]]:
    """The completions of a file and the examples they belong to; InputError for any line that is not one of ours."""
    place = {example.id: i for i, example in enumerate(examples)}
    found: list[list[str]] = [[] for _ in examples]
    wanted = '{"id": ..., "completion": "..."}'
    for number, line in enumerate(data.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}, line {number}: not JSON ({error}); want {wanted}") from None
        if not isinstance(record, dict) or not {"id", "completion"} <= record.keys():
            shown = f"keys {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise InputError(f"{path}, line {number}: {shown:.80}; want {wanted}")
        if not isinstance(record["completion"], str):
            raise InputError(f"{path}, line {number}: completion {record['completion']!r:.40} is not text")
        i = None if isinstance(record["id"], bool | float) else place.get(str(record["id"]))
        if i is None:
            known = f"{examples[0].id} to {examples[-1].id}"
            raise InputError(f"{path}, line {number}: id {record['id']!r:.40} is unknown; the task has {known}")
        if found[i] and not several:
            raise InputError(
                f"{path}, line {number}: id {record['id']!r} has a completion already; want one for each id"
            )
        found[i].append(record["completion"])
    if not any(found):
        raise InputError(f"{path} holds no completions; want lines of {wanted}")
    missing = [example.id for example, texts in zip(examples[:limit], found, strict=False) if not texts]
    if missing and not partial:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(
            f"{path}: no completion for {len(missing)} of {len(examples[:limit])} ids ({shown}); "
            "add them, or pass --partial to score only what is there"
        )
    pairs = [(example, texts) for example, texts in list(zip(examples, found, strict=True))[:limit] if texts]
    if not pairs:
        raise InputError(f"{path}: no completion for the first {limit} ids; raise --limit")
    return [example for example, _ in pairs], [texts for _, texts in pairs]


def claim(out: Path, identity: dict) -> None:
    """Take `out` for this evaluation; completions that other settings made there are removed."""
    file = out / "evaluation.json"
    try:
        if out.exists() and not (out.is_dir() and (file.is_file() or not any(out.iterdir()))):
            raise InputError(f"--out {out} exists and is not an evaluation of evaluate.py; name another folder")
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else identity
        out.mkdir(parents=True, exist_ok=True)
        if before != identity:
            print(f"{out} holds an evaluation with other settings or weights: starting over", file=sys.stderr)
            for old in [*out.glob("generations*.jsonl"), out / "score.json", out / "items.jsonl"]:
                old.unlink(missing_ok=True)
        write_text(file, json.dumps(identity, indent=1) + "\n")
    except (ValueError, OSError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--out {out} cannot be used ({error}); name another folder") from None


def fingerprint(source: str) -> list:
    """What tells one state of a model's files from another: names, sizes and times."""
    run = run_settings(source)
    folders = [Path(source) / "adapter", resolve(run["model"])] if run else [resolve(source)]
    files = sorted(file for folder in folders for file in folder.glob("*.safetensors"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


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
    parser.add_argument("--seed", type=cli.number(int, 0), help="of the samples (default: 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--refusal-rule", choices=list(scoring.REFUSAL_RULES), help="default: lori")
    parser.add_argument("--allow-code-execution", action="store_true", help="run model-written code with limits only")
    parser.add_argument(
        "--timeout", type=cli.number(float, 0, above=True), default=3.0, help="seconds a program may run"
    )
    parser.add_argument("--workers", type=positive, help="programs run at once (default: one per core)")
    args = parser.parse_args(argv)

    generation = ("batch", "max_new_tokens", "temperature", "top_p", "samples", "seed", "dtype")
    given = [f"--{name.replace('_', '-')}" for name in generation if getattr(args, name) is not None]
    if args.completions is None:
        if args.source is None:
            raise InputError("nothing to evaluate; name a run, a checkpoint or 'tiny', or pass --completions FILE")
        if args.partial:
            raise InputError("--partial is for --completions; leave it out")
        run = run_settings(args.source)
        args.task = args.task or (run or {}).get("settings", {}).get("task")
    elif args.source is not None or given:
        what = args.source or ", ".join(given)
        raise InputError(f"{what} says how to generate, but --completions exist already; give one or the other")
    if args.task is None:
        raise InputError(f"--task is missing; choose from {', '.join(data.TASKS)}")
    benchmark = data.TASKS[args.task].benchmark
    if args.refusal_rule and benchmark != "hexphi":
        raise InputError(f"--refusal-rule {args.refusal_rule} has no meaning for {args.task}; leave it out")
    decoding = default_decoding(args.task)
    changed = {name: getattr(args, name) for name in asdict(decoding) if getattr(args, name) is not None}
    if args.temperature == 0:
        changed = {"top_p": 1.0, "samples": 1} | changed
    args.decoding = replace(decoding, **changed)
    if args.decoding.samples > 1 and (args.decoding.temperature == 0 or benchmark != "humaneval"):
        why = "greedy samples are all the same" if benchmark == "humaneval" else f"{args.task} scores one completion"
        raise InputError(f"--samples {args.decoding.samples}: {why}; leave it out")
    return args


def evaluate(args: argparse.Namespace) -> dict | None:
    """Generate or read, score, write, print.  -> the score, on the main process"""
    benchmark = data.TASKS[args.task].benchmark
    if benchmark == "humaneval":
        import sandbox

        if not args.allow_code_execution and "limits" in sandbox.protection():
            raise InputError(f"code would run with {sandbox.protection()}; pass --allow-code-execution to accept that")
    out = Path(args.out) if args.out else None
    settings = {"task": args.task, "eval_data": args.eval_data, "limit": args.limit}
    began = time.perf_counter()
    if args.completions:
        examples = data.load_examples(args.task, "test", args.eval_data)
        examples, completions = read_completions(
            Path(args.completions), examples, args.limit, args.partial, several=benchmark == "humaneval"
        )
        settings |= {"completions": args.completions}
        if out:
            claim(out, settings)
    else:
        if out is None:
            run = run_settings(args.source)
            out = (
                Path(args.source if run else "runs")
                / f"evaluation-{args.task}{'' if run else '-' + Path(args.source).name}"
            )
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")
        dtype = getattr(torch, args.dtype or ("bfloat16" if cuda else "float32"))
        settings |= {"source": args.source, "dtype": str(dtype), **asdict(args.decoding)}
        examples = data.load_examples(args.task, "test", args.eval_data, args.limit)
        model, tokenizer = load_subject(args.source, dtype, device)
        if cli.is_main_process():
            same = {name: value for name, value in settings.items() if name not in ("limit", "samples")}
            claim(out, same | {"weights": fingerprint(args.source)})
        batch_size = args.batch or 32
        completions = complete(model, tokenizer, args.task, examples, args.decoding, batch_size=batch_size, folder=out)
        if completions is None:
            return None
    seconds = time.perf_counter() - began
    if benchmark == "humaneval":
        items = run_code(examples, completions, args.completions is None, args.timeout, args.workers)
        score = scoring.score_code(items)
    elif benchmark == "gsm8k":
        score, items = scoring.score_math(examples, [texts[0] for texts in completions])
    else:
        score, items = scoring.score_safety(examples, [texts[0] for texts in completions], args.refusal_rule or "lori")
    score |= {"seconds": time.perf_counter() - began, "seconds_generating": seconds, "settings": settings}
    if out:
        write_lines(out / "items.jsonl", items)
        write_text(out / "score.json", json.dumps(score, indent=1) + "\n")
    print(*scoring.summary(score, args.task), sep="\n")
    return score


def run_code(
    examples: list[Example], completions: list[list[str]], generated: bool, timeout: float, workers: int | None
) -> list[dict]:
    """An item for every completion: the code as run with the problem's tests, the outcome, whether it passed.

    `generated` text is cut to its code first; a file of completions is run as it is.
    """
    import sandbox

    items, programs = [], []
    for example, texts in zip(examples, completions, strict=True):
        prompt, entry_point = example.row["prompt"], example.row["entry_point"]
        for text in texts:
            code = scoring.extract_function(prompt, entry_point, text) if generated else text
            items.append({"id": example.id, "prompt": prompt, "completion": text, "code": code})
            programs.append(sandbox.Program(prompt + code, example.row["test"], entry_point))
    for item, verdict in zip(items, sandbox.run_programs(programs, timeout, workers), strict=True):
        item |= {"extracted": verdict.outcome, "correct": verdict.passed}
    return items


def compare(argv: list[str]) -> dict:
    """Two evaluation folders of the same examples: what each got right alone, and whether by chance."""
    parser = cli.Parser(prog="evaluate.py compare", description="Exact McNemar test on two evaluations of one task.")
    parser.add_argument("folders", nargs=2, metavar="FOLDER", help="--out of an evaluation")
    folders = [Path(folder) for folder in parser.parse_args(argv).folders]
    right_a, right_b = (read_verdicts(folder) for folder in folders)
    if right_a.keys() != right_b.keys():
        alone = sorted(right_a.keys() ^ right_b.keys())
        raise InputError(
            f"{len(alone)} items are in one folder only (first: id {alone[0][0]}); evaluate both on the same"
        )
    table = Counter((right_a[item], right_b[item]) for item in right_a)
    only_a, only_b = table[True, False], table[False, True]
    result = {"both": table[True, True], "only_a": only_a, "only_b": only_b, "neither": table[False, False]}
    result["p"] = scoring.mcnemar(only_a, only_b)
    for folder, right in zip(folders, (right_a, right_b), strict=True):
        print(f"{folder}: {scoring.describe(scoring.rate(sum(right.values()), len(right)))}")
    print(", ".join(f"{name} {count}" for name, count in list(result.items())[:4]))
    print(f"McNemar exact p {result['p']:.4g} on {only_a + only_b} items that differ")
    return result


def read_verdicts(folder: Path) -> dict[tuple[str, int], bool]:
    """{(id, sample): correct} of an evaluation folder."""
    verdicts, seen = {}, Counter()
    for place, item in data.json_rows(folder / "items.jsonl"):
        if not isinstance(item, dict) or not isinstance(item.get("correct"), bool) or "id" not in item:
            raise InputError(f"{place}: not an item of evaluate.py; want its --out folder")
        verdicts[str(item["id"]), seen[item["id"]]] = item["correct"]
        seen[item["id"]] += 1
    return verdicts


def main(argv: list[str] | None = None) -> dict | None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare(argv[1:])
    args = parse_flags(argv)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not args.completions:
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # processes end far apart; they exchange text only
    elif not cli.is_main_process():
        return None
    score = evaluate(args)
    if dist.is_initialized():
        dist.barrier()  # a process that leaves while another still talks to it aborts
        dist.destroy_process_group()
    return score


if __name__ == "__main__":
    cli.run(main)
