"""Batched decoding: many prompts in, the token ids each continues with out.

    completions = generate(model, prompts, max_new_tokens=256, eos_id=0, batch_size=32)

A fixed number of rows decodes at once. A sequence that ends leaves its row and a waiting prompt takes it, so
rows do not idle behind the longest answer. Greedy output does not depend on what else is in the batch (up to
exact ties in floating point); sampled output neither, because each sequence draws from a stream of its own.

Dimensions: n rows in use, S new positions, V vocabulary; L, Hk, M, Dh of the cache as in model.py.
"""

import copy
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from command.cli import is_main_process
from model import KVCache, MoETransformer

# Reading a prompt moves every weight once, as a decoding step does, however few prompts are read together. So
# freed rows wait until one in eight is free.
REFILL = 8


@dataclass
class Row:
    """A sequence in flight: row i of the cache belongs to rows[i]."""

    index: int  # of the prompt
    sample: int  # 0..samples - 1
    ids: list[int]  # the prompt, then what was generated
    prompt_length: int
    random: random.Random  # the sequence's own stream
    cached: int = 0  # leading ids whose keys and values are in the cache

    @property
    def completion(self) -> list[int]:
        return self.ids[self.prompt_length :]


def generate(model: MoETransformer, prompts: list[list[int]], *, samples: int = 1, **settings) -> list[list[int]]:
    """The completion of every prompt, without the EOS token; `settings` as in `stream`.

    Returns len(prompts) * samples lists: all samples of the first prompt, then those of the second, ...
    """
    todo = [(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    done = {(index, sample): ids for index, sample, ids in stream(model, prompts, todo, **settings)}
    return [done[pick] for pick in todo]


@torch.no_grad()
def stream(
    model: MoETransformer,
    prompts: list[list[int]],
    todo: Iterable[tuple[int, int]],
    *,
    max_new_tokens: int,
    eos_id: int | None,
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Callable[[int, list[int]], bool] | None = None,
) -> Iterator[tuple[int, int, list[int]]]:
    """Decode the (prompt index, sample) pairs of `todo`; yield (index, sample, completion) as each one ends.

    A sequence ends at EOS (which is dropped), after max_new_tokens, or when stop(index, completion) is true
    (its last token is kept: the caller cuts the text). temperature 0 takes the likeliest token; otherwise
    tokens are drawn from the nucleus of mass top_p, by a stream fixed by (seed, index, sample) alone.
    """
    if not all(prompts):
        raise ValueError("an empty prompt has no last token to continue from")
    # The longest come first: the first step needs the most memory that any will, and padding stays small.
    waiting = sorted(todo, key=lambda pick: len(prompts[pick[0]]))
    if not waiting:
        return
    weight = model.embed_tokens.weight
    size = min(batch_size, len(waiting))
    capacity = len(prompts[waiting[-1][0]]) + max_new_tokens
    cache = KVCache(model.config, size, capacity, dtype=weight.dtype, device=weight.device)
    rows: list[Row] = []  # in use; rows[i] owns row i of the cache
    bar = tqdm(total=len(waiting), unit=" sequences", leave=False, disable=None if is_main_process() else True)
    while waiting or rows:
        first, free = 0, size - len(rows)
        if waiting and free * REFILL >= size:
            first = len(rows)  # read new prompts in this step, and leave the others alone
            for index, sample in (waiting.pop() for _ in range(min(free, len(waiting)))):
                own = random.Random(f"{seed} {index} {sample}")
                rows.append(Row(index, sample, list(prompts[index]), len(prompts[index]), own))
        logits = feed(model, cache, rows, first)  # [n, V]
        if temperature > 0:
            u = torch.tensor([row.random.random() for row in rows[first:]], dtype=torch.float64)
            tokens = nucleus_sample(logits, u.to(logits.device), temperature, top_p).tolist()
        else:
            tokens = logits.argmax(dim=-1).tolist()
        for i in reversed(range(first, len(rows))):
            row, token = rows[i], tokens[i - first]
            if token != eos_id:
                row.ids.append(token)
                if len(row.completion) < max_new_tokens and not (stop and stop(row.index, row.completion)):
                    continue
            free_row(cache, rows, i)
            bar.update()
            yield row.index, row.sample, row.completion
    bar.close()


def feed(model: MoETransformer, cache: KVCache, rows: list[Row], first: int) -> Tensor:
    """Run the ids of rows[first:] that the cache does not hold yet.  -> logits of each one's last, [n, V]"""
    fresh = [row.ids[row.cached :] for row in rows[first:]]  # a whole prompt, or the one token drawn last
    lengths = torch.tensor([len(ids) for ids in fresh])
    S = int(lengths.max())
    input_ids = torch.tensor([ids + [0] * (S - len(ids)) for ids in fresh])  # [n, S]
    part = copy.copy(cache)  # shares memory with it: the forward writes into our rows
    part.keys, part.values = cache.keys[:, first : len(rows)], cache.values[:, first : len(rows)]
    part.lengths = torch.tensor([row.cached for row in rows[first:]])
    logits, _ = model(input_ids.to(cache.keys.device), lengths, cache=part, last_only=True)
    for row in rows[first:]:
        row.cached = len(row.ids)
    return logits


def free_row(cache: KVCache, rows: list[Row], i: int) -> None:
    """Take rows[i] out; the last row moves into its place, so that rows in use stay next to each other."""
    last = rows.pop()
    if i < len(rows):
        rows[i] = last
        for held in (cache.keys, cache.values):
            held[:, i, :, : last.cached] = held[:, len(rows), :, : last.cached]


def nucleus_sample(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token from the smallest set of likeliest tokens whose mass reaches top_p.

    logits [n, V], u [n] uniform in [0, 1) -> [n]. One uniform number picks one token by the inverse of the
    cumulative distribution, so a draw does not depend on the other rows.
    """
    probs, ids = (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    reached = probs.cumsum(dim=-1)  # [n, V]
    inside = reached - probs < top_p  # the token that crosses top_p still belongs: never an empty set
    mass = (probs * inside).sum(dim=-1)  # [n]
    place = (reached <= (u * mass)[:, None]).sum(dim=-1)  # [n] first place beyond u of the nucleus
    place = place.minimum(inside.sum(dim=-1) - 1)  # rounding must not carry it outside
    return ids.gather(-1, place[:, None]).squeeze(-1)
