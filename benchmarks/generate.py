"""Decoding: samples per second beside transformers' generate, on the same weights, prompts and answer lengths.

    python bench.py generate                                  # the embedded model, batch 32
    python bench.py generate --model DIR --dtype bfloat16 --prompts 512 --json rows.json

Prompts and answers are as long as those of GSM8K's test set (LENGTHS); the tokens are random. An answer ends where its
length says, on both sides, so both decode the same number of tokens, and greedily the same tokens. transformers gets
the prompts sorted by length, in batches padded on the left that last as long as their longest answer; we refill rows
as they end. The two take turns, in an order that changes, and the ratio is the median of the turns' ratios.
"""

import argparse
import json
import random
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.measure import seconds
from command import cli
from command.cli import InputError
from command.files import writable
from generate import generate
from hub.checkpoint import resolve
from model import MoETransformer, load_model

# Tokens of GSM8K's 1,319 test problems, counted with OLMoE's tokenizer: least, deciles, most.
LENGTHS = {
    "prompt": (40, 53, 58, 63, 67, 73, 78, 84, 92, 106, 201),  # the question and the request to reason
    "answer": (25, 40, 47, 56, 63, 71, 80, 91, 104, 123, 243),
}


def draw_lengths(deciles: tuple[int, ...], count: int, rng: random.Random) -> list[int]:
    """`count` lengths from the distribution with these deciles that is even between them."""
    lengths = []
    for _ in range(count):
        i = rng.randrange(len(deciles) - 1)
        lengths.append(round(rng.uniform(deciles[i], deciles[i + 1])))
    return lengths


def decode_ours(model: MoETransformer, prompts: list[list[int]], lengths: list[int], batch: int) -> list[list[int]]:
    """Greedy tokens after each prompt, as many as its length says."""

    def stop(index: int, ids: list[int]) -> bool:
        return len(ids) == lengths[index]

    return generate(model, prompts, max_new_tokens=max(lengths), eos_id=None, batch_size=batch, stop=stop)


def decode_theirs(hf, prompts: list[list[int]], lengths: list[int], batch: int) -> list[list[int]]:
    """The same by transformers' model `hf`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    found: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.tensor([[0] * (width - len(prompts[i])) + prompts[i] for i in chosen], device=hf.device)
        real = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in chosen])
        ends = torch.tensor([width + lengths[i] for i in chosen], device=hf.device)
        out = hf.generate(
            ids,
            attention_mask=real.to(hf.device),
            max_new_tokens=max(lengths[i] for i in chosen),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[lambda ids, scores, ends=ends, **_: ids.shape[1] >= ends],  # [B] bool
        )
        for i, row in zip(chosen, out[:, width:].tolist(), strict=True):
            found[i] = row[: lengths[i]]
    return found


def load_theirs(folder: Path, dtype: torch.dtype, device: torch.device):
    """transformers' model of a checkpoint folder."""
    try:
        import transformers
    except ImportError:
        raise InputError("the comparison needs transformers: pip install -r requirements-dev.txt") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()


def parse_flags(argv: list[str] | None) -> argparse.Namespace:
    positive = cli.number(int, 1)
    parser = cli.Parser(prog="bench.py generate", description="Decode GSM8K-like lengths, ours and transformers'.")
    parser.add_argument("--model", default="tiny", help="'tiny', a checkpoint folder or a hub id")
    parser.add_argument("--prompts", type=positive, default=128, help="sequences to decode")
    parser.add_argument("--batch", type=positive, default=32, help="sequences decoded at once")
    parser.add_argument("--repeats", type=positive, default=3, help="turns of each side")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seed", type=cli.number(int, 0), default=0, help="of lengths and tokens")
    parser.add_argument("--json", metavar="FILE", help="write the rows to this file")
    args = parser.parse_args(argv)
    args.json = args.json and writable(args.json)
    return args


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and print; -> the rows."""
    args = parse_flags(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    folder, dtype = resolve(args.model), getattr(torch, args.dtype)
    model, hf = load_model(folder, dtype=dtype, device=device), load_theirs(folder, dtype, device)
    rng = random.Random(args.seed)
    lengths = {name: draw_lengths(deciles, args.prompts, rng) for name, deciles in LENGTHS.items()}
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(n)] for n in lengths["prompt"]]
    sides = {
        "hellora": lambda: decode_ours(model, prompts, lengths["answer"], args.batch),
        "transformers": lambda: decode_theirs(hf, prompts, lengths["answer"], args.batch),
    }
    ours, theirs = (side() for side in sides.values())  # warms both up
    same = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(prompts)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in tqdm(range(args.repeats), unit=" turns", leave=False, disable=None):
        for name in list(sides)[:: -1 if turn % 2 else 1]:
            times[name].append(seconds(sides[name], device))
    ratio = statistics.median(b / a for a, b in zip(*times.values(), strict=True))
    rows = []
    for name, spent in times.items():
        rate, over = args.prompts / statistics.median(spent), ratio if name == "hellora" else 1.0
        tokens = rate * sum(lengths["answer"]) / args.prompts
        row = {"name": name, "model": args.model, "batch": args.batch, "dtype": args.dtype, "seconds": spent}
        rows.append(row | {"samples_per_s": rate, "tokens_per_s": tokens, "over_transformers": over})
        print(f"{name:12}  {rate:8.2f} samples/s  {tokens:9.0f} tokens/s  {over:.2f}x")
    agreement = f"{100 * same:.1f} % of {args.prompts} answers are the same token for token"
    print(f"{agreement}; batch {args.batch}, {args.dtype}, {args.repeats} turns")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows
