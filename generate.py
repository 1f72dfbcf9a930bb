"""Batched decoding: many prompts in, the token ids that continue each of them out.

    completions = generate(model, prompts, max_new_tokens=256, eos_ids=(0,), batch_size=32)
    for index, sample, text, cut in complete(model, tokenizer, prompts, todo, Decoding(256), batch_size=32): ...

The KV cache has a fixed number of slots. When a sequence ends, a waiting prompt takes its slot, so that no slot idles
until the longest answer is finished. Greedy output does not depend on what else is in the batch, up to exact ties in
floating point. Sampled output does not either, because each sequence draws from its own stream of random numbers.

Dimensions: n slots in use, S new positions, V vocabulary; L, Hk, M, Dh of the cache as in model.py.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

from command.cli import is_main_process, note
from model import KVCache, MoETransformer

# Reading a prompt moves every weight once, as a decoding step does, however few prompts are read together. So new
# prompts are read only once an eighth of the slots is free.
REFILL = 8


@dataclass(frozen=True)
class Decoding:
    """How text is generated."""

    max_new_tokens: int
    temperature: float = 0.0  # 0: always the most likely token
    top_p: float = 1.0
    samples: int = 1  # completions per prompt
    seed: int = 0


@dataclass
class Sequence:
    """A sequence that is being decoded. The sequence active[i] has slot i of the cache."""

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
    """The completion of every prompt, without the EOS token. settings: as for `stream`.

    Returns len(prompts) * samples lists: all samples of the first prompt, then those of the second, ...
    """
    todo = [(index, sample) for index in range(len(prompts)) for sample in range(samples)]
    done = {(index, sample): ids for index, sample, ids in stream(model, prompts, todo, **settings)}
    return [done[pick] for pick in todo]


def complete(
    model: MoETransformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    todo: list[tuple[int, int]],
    decoding: Decoding,
    *,
    stop_ids: tuple[int, ...],
    batch_size: int = 32,
    stop: Callable[[int, str], bool] | None = None,
    proceed: Callable[[bool], bool] = bool,
) -> Iterator[tuple[int, int, str, bool]]:
    """Decode the (prompt index, sample) pairs of `todo` as text.

    Yields (index, sample, completion, cut) as each one ends; cut: it has max_new_tokens tokens. stop, proceed: as for
    `stream`, stop on text.
    """
    positions = model.config.hub.get("max_position_embeddings") or math.inf
    longest = max(map(len, prompts)) + decoding.max_new_tokens
    if longest > positions:
        note(f"prompts and answers have up to {longest} tokens, but the model was made for {positions}")

    if not stop_ids:
        note(f"the model names no eos_token_id: completions end after {decoding.max_new_tokens} tokens")

    def text(index: int, ids: list[int]) -> str:
        # decode(ids) alone loses the space that a text starts with in some tokenizers.
        before = prompts[index][-8:]
        return tokenizer.decode(before + ids)[len(tokenizer.decode(before)) :]

    ended = stream(
        model,
        prompts,
        todo,
        max_new_tokens=decoding.max_new_tokens,
        eos_ids=stop_ids,
        batch_size=batch_size,
        temperature=decoding.temperature,
        top_p=decoding.top_p,
        seed=decoding.seed,
        stop=stop and (lambda index, ids: stop(index, text(index, ids))),
        proceed=proceed,
    )
    for index, sample, ids in ended:
        yield index, sample, text(index, ids), len(ids) == decoding.max_new_tokens


@torch.no_grad()
def stream(
    model: MoETransformer,
    prompts: list[list[int]],
    todo: Iterable[tuple[int, int]],
    *,
    max_new_tokens: int,
    eos_ids: tuple[int, ...] = (),
    batch_size: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: Callable[[int, list[int]], bool] | None = None,
    proceed: Callable[[bool], bool] = bool,
) -> Iterator[tuple[int, int, list[int]]]:
    """Decode the (prompt index, sample) pairs of `todo`; yield (index, sample, completion) as each one ends.

    A sequence ends at one of `eos_ids` (which is dropped), after max_new_tokens, or when stop(index, completion) is
    true (its last token is kept, since the caller cuts the text). Temperature 0 takes the most likely token. Otherwise
    tokens are drawn from the nucleus of mass top_p, from a stream that (seed, index, sample) alone determines.
    proceed(busy): whether to run the model once more, of which this process has use if `busy`. The processes of a
    sharded model gather every layer together, so one that is done runs it without a token until all are.
    """
    # The longest prompts come first: the first step then needs the most memory, and padding stays small.
    waiting = sorted(todo, key=lambda pick: len(prompts[pick[0]]))
    if waiting and not prompts[waiting[0][0]]:
        raise ValueError("an empty prompt has no last token to continue from")
    weight = model.embed_tokens.weight
    size = min(batch_size, len(waiting))
    capacity = max((len(prompts[index]) for index, _ in waiting), default=0) + max_new_tokens
    cache = KVCache(model.config, size, capacity, dtype=weight.dtype, device=weight.device)
    active: list[Sequence] = []
    bar = tqdm(total=len(waiting), unit=" sequences", leave=False, disable=None if is_main_process() else True)
    while proceed(bool(waiting or active)):
        if not (waiting or active):
            model(torch.zeros(0, 1, dtype=torch.int64, device=weight.device))
            continue
        first, free = 0, size - len(active)
        if waiting and free * REFILL >= size:
            first = len(active)  # this step reads new prompts and leaves the other sequences alone
            for index, sample in (waiting.pop() for _ in range(min(free, len(waiting)))):
                own = random.Random(f"{seed} {index} {sample}")
                active.append(Sequence(index, sample, list(prompts[index]), len(prompts[index]), own))
        logits = feed(model, cache, active, first)  # [n, V]
        tokens = choose(logits, active[first:], temperature, top_p)
        for slot in reversed(range(first, len(active))):
            sequence, token = active[slot], tokens[slot - first]
            if token not in eos_ids:
                sequence.ids.append(token)
                full = len(sequence.completion) >= max_new_tokens
                if not full and not (stop and stop(sequence.index, sequence.completion)):
                    continue
            free_slot(cache, active, slot)
            bar.update()
            yield sequence.index, sequence.sample, sequence.completion
    bar.close()


def feed(model: MoETransformer, cache: KVCache, active: list[Sequence], first: int) -> Tensor:
    """Run the ids of active[first:] that are not in the cache yet.  -> logits of each sequence's last id, [n, V]"""
    fresh = [sequence.ids[sequence.cached :] for sequence in active[first:]]  # a whole prompt, or the last token drawn
    lengths = torch.tensor([len(ids) for ids in fresh])
    S = int(lengths.max())
    input_ids = torch.tensor([ids + [0] * (S - len(ids)) for ids in fresh])  # [n, S]
    part = copy.copy(cache)  # a view of the same memory: the forward pass writes into our slots
    part.keys, part.values = cache.keys[:, first : len(active)], cache.values[:, first : len(active)]
    part.lengths = torch.tensor([sequence.cached for sequence in active[first:]])
    logits, _ = model(input_ids.to(cache.keys.device), lengths, cache=part, last_only=True)
    for sequence in active[first:]:
        sequence.cached = len(sequence.ids)
    return logits


def free_slot(cache: KVCache, active: list[Sequence], slot: int) -> None:
    """Remove active[slot]. The last sequence moves into its slot, so that the slots in use stay adjacent."""
    last = active.pop()
    if slot < len(active):
        active[slot] = last
        for held in (cache.keys, cache.values):
            held[:, slot, :, : last.cached] = held[:, len(active), :, : last.cached]


def choose(logits: Tensor, sequences: list[Sequence], temperature: float, top_p: float) -> list[int]:
    """The next token of each sequence. logits [n, V]"""
    if temperature == 0:
        return logits.argmax(dim=-1).tolist()
    u = torch.tensor([sequence.random.random() for sequence in sequences], dtype=torch.float64)
    return nucleus_sample(logits, u.to(logits.device), temperature, top_p).tolist()


def nucleus_sample(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token from the smallest set of most likely tokens whose mass reaches top_p.

    logits [n, V], u [n] uniform in [0, 1) -> [n]. One uniform number picks one token by the inverse of the cumulative
    distribution, so a draw does not depend on the other sequences.
    """
    probs, ids = (logits.double() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    reached = probs.cumsum(dim=-1)  # [n, V]
    inside = reached - probs < top_p  # the token that crosses top_p is inside: the set is never empty
    mass = (probs * inside).sum(dim=-1)  # [n]
    place = (reached <= (u * mass)[:, None]).sum(dim=-1)  # [n] first place beyond u of the nucleus
    place = place.minimum(inside.sum(dim=-1) - 1)  # rounding must not lead outside
    return ids.gather(-1, place[:, None]).squeeze(-1)
