"""Decoding: samples per second beside transformers' generate, on the same weights, prompts and answer lengths.

    python bench.py generate                                  # the embedded model, batch 32
    python bench.py generate --model DIR --dtype bfloat16 --prompts 512 --json rows.json
    python bench.py generate --shape full                     # random weights of OLMoE-1B-7B's size

Prompts and answers are as long as those of GSM8K's test set (LENGTHS); the tokens are random. Each answer ends at a
length fixed beforehand, so both sides decode the same number of tokens, and greedily the same tokens. transformers
gets the prompts sorted by length, in batches padded on the left; each batch runs until its longest answer ends. We
refill a row of the batch as soon as its answer ends. The two sides take turns in alternating order, and the ratio is
the median of the turns' ratios.
"""

from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from command import cli
from command.cli import InputError, flag
from command.files import writable, write_json
from generate import Decoding, generate
from hub.checkpoint import resolve
from lab.benchmarks.measure import take_turns, times_as_fast
from lab.benchmarks.subjects import our_model, transformers_model
from lab.benchmarks.workload import SHAPES
from machine.processes import DTYPE_HELP, DTYPES, default_dtype
from model import MoETransformer, load_model

# Tokens of GSM8K's 1,319 test problems, counted with OLMoE's tokenizer: least, deciles, most.
LENGTHS = {
    "prompt": (40, 53, 58, 63, 67, 73, 78, 84, 92, 106, 201),  # the question and the request to reason
    "answer": (25, 40, 47, 56, 63, 71, 80, 91, 104, 123, 243),
}


def draw_lengths(deciles: tuple[int, ...], count: int, rng: np.random.Generator) -> list[int]:
    """`count` lengths from the distribution with these deciles, uniform between two of them."""
    places = rng.uniform(0, len(deciles) - 1, count)
    return np.interp(places, range(len(deciles)), deciles).round().astype(int).tolist()


def decode_ours(model: MoETransformer, prompts: list[list[int]], lengths: list[int], batch: int) -> list[list[int]]:
    """Greedy tokens after each prompt, lengths[i] of them after prompt i."""

    def stop(index: int, ids: list[int]) -> bool:
        return len(ids) == lengths[index]

    return generate(model, prompts, Decoding(max(lengths)), batch_size=batch, stop=stop)


def decode_theirs(hf, prompts: list[list[int]], lengths: list[int], batch: int) -> list[list[int]]:
    """The same by transformers' model `hf`."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]), reverse=True)
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        rows = [torch.tensor(prompts[i], device=hf.device) for i in chosen]
        ids = pad_sequence(rows, batch_first=True, padding_value=-1, padding_side="left")
        width = ids.shape[1]
        ends = torch.tensor([width + lengths[i] for i in chosen], device=hf.device)
        out = hf.generate(
            ids.clamp(min=0),
            attention_mask=(ids >= 0).long(),
            max_new_tokens=max(lengths[i] for i in chosen),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[lambda ids, scores, ends=ends, **_: ids.shape[1] >= ends],  # [B] bool
        )
        for i, row in zip(chosen, out[:, width:].tolist(), strict=True):
            answers[i] = row[: lengths[i]]
    return answers


@dataclass(frozen=True)
class Settings:
    """The flags of `bench.py generate`."""

    model: str = flag("tiny", "'tiny', a checkpoint folder or a hub id")
    shape: str | None = flag(None, "random weights in place of --model, as in bench.py step", choices=list(SHAPES))
    prompts: int = flag(128, "sequences to decode", type=cli.number(int, 1))
    batch: int = flag(32, "sequences decoded at once", type=cli.number(int, 1))
    repeats: int = flag(3, "turns of each side", type=cli.number(int, 1))
    dtype: str | None = flag(None, DTYPE_HELP, choices=DTYPES)
    seed: int = flag(0, "seed of lengths and tokens", type=cli.number(int, 0))
    json: str | None = flag(None, "write the rows to this file", metavar="FILE")


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and print; -> the rows."""
    settings = cli.parse(
        Settings,
        argv,
        prog="bench.py generate",
        description="Decode sequences as long as GSM8K's, by this code and by transformers.",
        example="OMP_NUM_THREADS=1 python bench.py generate --prompts 32",
    )
    out = settings.json and writable(settings.json)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = replace(settings, dtype=settings.dtype or default_dtype())
    dtype = getattr(torch, settings.dtype)
    if not find_spec("transformers"):
        raise InputError("the comparison needs transformers: pip install -r requirements-dev.txt")
    if settings.shape:
        model = our_model(SHAPES[settings.shape], device, dtype)
        hf = transformers_model(model).eval()
    else:
        from transformers import AutoModelForCausalLM

        folder = resolve(settings.model)
        model = load_model(folder, dtype=dtype, device=device)
        hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    rng = np.random.default_rng(settings.seed)
    lengths = {name: draw_lengths(deciles, settings.prompts, rng) for name, deciles in LENGTHS.items()}
    prompts = [rng.integers(model.config.vocab_size, size=n).tolist() for n in lengths["prompt"]]
    sides = {
        "hellora": lambda prompts: decode_ours(model, prompts, lengths["answer"], settings.batch),
        "transformers": lambda prompts: decode_theirs(hf, prompts, lengths["answer"], settings.batch),
    }
    ours, theirs = (side(prompts) for side in sides.values())  # also warms up both
    same = sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(prompts)
    times = take_turns(sides, [prompts], settings.repeats, device)
    rows = []
    for name, spent in times.items():
        rate, over = settings.prompts / float(np.median(spent)), times_as_fast(spent, times["transformers"])
        tokens = rate * sum(lengths["answer"]) / settings.prompts
        rows.append({
            "name": name,
            "model": settings.shape or settings.model,
            "batch": settings.batch,
            "dtype": settings.dtype,
            "seconds": spent.flatten().tolist(),
            "samples_per_s": rate,
            "tokens_per_s": tokens,
            "over_transformers": over,
        })  # fmt: skip
        cli.say(f"{name:12}  {rate:8.2f} samples/s  {tokens:9.0f} tokens/s  {over:.2f}x")
    agreement = f"{100 * same:.1f} % of {settings.prompts} answers are the same token for token"
    cli.say(f"{agreement}; batch {settings.batch}, {settings.dtype}, {settings.repeats} turns")
    if out:
        write_json(out, rows)
    return rows
