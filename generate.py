"""Text from a model: one prompt token by token, or many prompts at once.

    python generate.py runs/tiny-math-hellora "Mia has 3 marbles and finds 4. How many marbles does Mia have?"
    python generate.py allenai/OLMoE-1B-7B-0924-Instruct             # a chat in the terminal, or a prompt on each line
    for token in tokens(model, prompt, Decoding(256), eos_ids=(0,)): ...
    completions = generate(model, prompts, Decoding(256), eos_ids=(0,), batch_size=32)

`tokens` is the plain loop. `stream` does the same for many prompts. Its KV cache has a fixed number of slots. When a
sequence ends, a waiting prompt takes its slot, so that no slot idles until the longest answer is finished. Greedy
output does not depend on what else is in the batch, up to exact ties in floating point. Sampled output does not either,
because each sequence draws from its own stream of random numbers.

Dimensions: n slots in use, S new positions, V vocabulary; L, Hk, M, Dh of the cache as in model.py.
"""

import command.start  # noqa: F401

import copy
import functools
import math
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

import data
from command import cli, terminal
from command.cli import POSITIVE, SHARE, InputError, flag, is_main_process, note, number
from hub.config import IGNORE_HELP, ignore_keys
from hub.tokenizer import BOS_HELP, tokenize
from machine.processes import ALONE, DTYPE_HELP, DTYPES, default_dtype
from model import KVCache, MoETransformer
from run.subject import Subject, began
from scoring.thoughts import without_thoughts

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


@dataclass(frozen=True, kw_only=True)
class DecodingFlags:
    """The flags of evaluate.py and of generate.py that say how text is generated."""

    max_new_tokens: int | None = flag(
        None, "longest answer, in tokens (default: 512; evaluate.py, tiny tasks: 160)", type=POSITIVE
    )
    temperature: float | None = flag(
        None, "sampling temperature; 0: greedy (default: 0; evaluate.py, code tasks: 0.2)", type=number(float, 0)
    )
    top_p: float | None = flag(
        None,
        "probability mass of nucleus sampling (default: 1; evaluate.py, code tasks: 0.95)",
        type=SHARE,
    )
    seed: int | None = flag(None, "seed of sampling (default: 0)", type=number(int, 0))
    dtype: str | None = flag(None, DTYPE_HELP, choices=DTYPES)
    bos: str | None = flag(None, f"{BOS_HELP} (default: as the run, or auto)", choices=("auto", "yes", "no"))
    ignore_config_keys: str | None = flag(None, IGNORE_HELP, metavar="KEYS")

    def given_to(self, decoding: Decoding) -> Decoding:
        """The decoding with what the flags say. Raises InputError for flags that contradict each other."""
        given = {name: getattr(self, name) for name in ("max_new_tokens", "temperature", "top_p", "seed")}
        decoding = replace(decoding, **{name: value for name, value in given.items() if value is not None})
        for name, value in (("top-p", self.top_p), ("seed", self.seed)):
            if value is not None and decoding.temperature == 0:
                raise InputError(f"--{name} {value:g}: greedy decoding does not sample; add a --temperature above 0")
        return decoding


@dataclass
class Sequence:
    """A sequence that is being decoded. The sequence active[i] has slot i of the cache."""

    index: int  # of the prompt
    sample: int  # 0..samples - 1
    ids: list[int]  # the prompt, then what was generated
    prompt_length: int
    random: random.Random  # the sequence's own stream
    cached: int = 0  # leading ids whose keys and values are in the cache

    @classmethod
    def of(cls, prompt: list[int], index: int, sample: int, seed: int) -> "Sequence":
        return cls(index, sample, list(prompt), len(prompt), random.Random(f"{seed} {index} {sample}"))

    @property
    def completion(self) -> list[int]:
        return self.ids[self.prompt_length :]


# -------------------------------------------------------------------------------------------------------- one prompt


@torch.no_grad()
def tokens(model: MoETransformer, prompt: list[int], decoding: Decoding, eos_ids: tuple[int, ...]) -> Iterator[int]:
    """The tokens that continue a prompt, one by one, up to one of `eos_ids` or decoding.max_new_tokens of them."""
    cache = new_cache(model, 1, len(prompt) + decoding.max_new_tokens)
    sequence = Sequence.of(prompt, 0, 0, decoding.seed)
    while len(sequence.completion) < decoding.max_new_tokens:
        logits = feed(model, cache, [sequence], 0)  # [1, V]
        [token] = choose(logits, [sequence], decoding)
        if token in eos_ids:
            return
        sequence.ids.append(token)
        yield token


def pieces(
    model: MoETransformer, tokenizer: Tokenizer, prompt: list[int], decoding: Decoding, eos_ids: tuple[int, ...]
) -> Iterator[str]:
    """What `tokens` says, as text, in pieces that end with a whole character."""
    text_of, ids, shown = text_behind(tokenizer, prompt), [], ""
    for token in tokens(model, prompt, decoding, eos_ids):
        ids.append(token)
        text = text_of(ids)
        if not text.endswith(UNFINISHED):
            yield text[len(shown) :]
            shown = text
    yield text_of(ids)[len(shown) :]


UNFINISHED = "\ufffd"  # what a tokenizer makes of bytes that are no character, or not yet


def text_behind(tokenizer: Tokenizer, prompt: list[int]) -> Callable[[list[int]], str]:
    """What decodes the ids that follow a prompt.

    Alone they would lose the space that a text begins with in some tokenizers, so that a token stands before them. It
    is a whole piece of text: the bytes of an unfinished character would spoil those that follow.
    """
    for token in (*reversed(prompt), *tokenizer.encode("a", add_special_tokens=False).ids):
        before = tokenizer.decode([token])
        if before.strip() and UNFINISHED not in before:
            return lambda ids: tokenizer.decode([token, *ids])[len(before) :]
    return tokenizer.decode


# ------------------------------------------------------------------------------------------------------ many prompts


def generate(model: MoETransformer, prompts: list[list[int]], decoding: Decoding, **options) -> list[list[int]]:
    """The completions of all prompts, without the EOS token. options: as for `stream`.

    Returns len(prompts) * decoding.samples lists: all samples of the first prompt, then those of the second, ...
    """
    todo = [(index, sample) for index in range(len(prompts)) for sample in range(decoding.samples)]
    done = {(index, sample): ids for index, sample, ids in stream(model, prompts, todo, decoding, **options)}
    return [done[pick] for pick in todo]


def complete(
    model: MoETransformer,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    todo: list[tuple[int, int]],
    decoding: Decoding,
    *,
    batch_size: int = 32,
    stop_ids: tuple[int, ...],
    stop: Callable[[int, str], bool] | None = None,
    proceed: Callable[[bool], bool] = bool,
) -> Iterator[tuple[int, int, str, bool]]:
    """Decode the (prompt index, sample) pairs of `todo` as text.

    Yields (index, sample, completion, cut) as each one ends; cut: it has max_new_tokens tokens. stop_ids: those that
    end a text. stop, proceed: as for `stream`, stop on text.
    """
    longest, positions = max(map(len, prompts)), model.config.hub.get("max_position_embeddings") or math.inf
    if longest + decoding.max_new_tokens > positions:
        lengths = f"prompts of up to {longest} tokens and answers of up to {decoding.max_new_tokens} (--max-new-tokens)"
        note(f"{lengths} may exceed the {positions} positions that the model was made for")
    if not stop_ids:
        note(f"the model names no eos_token_id: completions end after {decoding.max_new_tokens} tokens")

    @functools.cache
    def text_of(index: int) -> Callable[[list[int]], str]:
        return text_behind(tokenizer, prompts[index])

    ended = stream(
        model,
        prompts,
        todo,
        decoding,
        eos_ids=stop_ids,
        batch_size=batch_size,
        stop=stop and (lambda index, ids: stop(index, text_of(index)(ids))),
        proceed=proceed,
    )
    for index, sample, ids in ended:
        yield index, sample, text_of(index)(ids), len(ids) == decoding.max_new_tokens


@torch.no_grad()
def stream(
    model: MoETransformer,
    prompts: list[list[int]],
    todo: Iterable[tuple[int, int]],
    decoding: Decoding,
    *,
    eos_ids: tuple[int, ...] = (),
    batch_size: int,
    stop: Callable[[int, list[int]], bool] | None = None,
    proceed: Callable[[bool], bool] = bool,
) -> Iterator[tuple[int, int, list[int]]]:
    """Decode the (prompt index, sample) pairs of `todo`; yield (index, sample, completion) as each one ends.

    A sequence ends at one of `eos_ids` (which is dropped), after max_new_tokens, or when stop(index, completion) is
    true (its last token is kept, since the caller cuts the text). Temperature 0 takes the most likely token. Otherwise
    tokens are drawn from the nucleus of mass top_p, from a stream that (seed, index, sample) alone determines. How many
    samples a prompt has is said by `todo`.
    proceed(busy): whether to run the model once more, of which this process has use if `busy`. The processes of a
    sharded model gather every layer together, so one that is done runs it without a token until all are.
    """
    # The longest prompts come first: the first step then needs the most memory, and padding stays small.
    waiting = sorted(todo, key=lambda pick: len(prompts[pick[0]]))
    if waiting and not prompts[waiting[0][0]]:
        raise ValueError("an empty prompt has no last token to continue from")
    size = min(batch_size, len(waiting))
    longest = max((len(prompts[index]) for index, _ in waiting), default=0)
    cache = new_cache(model, size, longest + decoding.max_new_tokens)
    active: list[Sequence] = []
    bar = tqdm(total=len(waiting), unit=" sequences", leave=False, disable=None if is_main_process() else True)
    while proceed(bool(waiting or active)):
        if not (waiting or active):
            model(torch.zeros(0, 1, dtype=torch.int64, device=cache.keys.device))
            continue
        first, free = 0, size - len(active)
        if waiting and free * REFILL >= size:
            first = len(active)  # this step reads new prompts and leaves the other sequences alone
            for index, sample in (waiting.pop() for _ in range(min(free, len(waiting)))):
                active.append(Sequence.of(prompts[index], index, sample, decoding.seed))
        logits = feed(model, cache, active, first)  # [n, V]
        tokens = choose(logits, active[first:], decoding)
        for slot in reversed(range(first, len(active))):
            sequence, token = active[slot], tokens[slot - first]
            if token not in eos_ids:
                sequence.ids.append(token)
                full = len(sequence.completion) >= decoding.max_new_tokens
                if not full and not (stop and stop(sequence.index, sequence.completion)):
                    continue
            free_slot(cache, active, slot)
            bar.update()
            yield sequence.index, sequence.sample, sequence.completion
    bar.close()


def new_cache(model: MoETransformer, size: int, capacity: int) -> KVCache:
    """A cache for `size` sequences of up to `capacity` tokens. Raises InputError if memory does not suffice."""
    weight = model.embed_tokens.weight
    try:
        return KVCache(model.config, size, capacity, dtype=weight.dtype, device=weight.device)
    except RuntimeError:
        needed = f"the keys and values of {size} sequences of {capacity} tokens"
        raise InputError(f"no memory for {needed}; lower --max-new-tokens, or decode fewer at once") from None


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


def choose(logits: Tensor, sequences: list[Sequence], decoding: Decoding) -> list[int]:
    """The next token of each sequence. logits [n, V]"""
    if decoding.temperature == 0:
        return logits.argmax(dim=-1).tolist()
    u = torch.tensor([sequence.random.random() for sequence in sequences], dtype=torch.float64)
    return nucleus_sample(logits, u.to(logits.device), decoding.temperature, decoding.top_p).tolist()


def nucleus_sample(logits: Tensor, u: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw a token from the smallest set of most likely tokens whose mass reaches top_p.

    logits [n, V], u [n] uniform in [0, 1) -> [n]. One uniform number picks one token by the inverse of the cumulative
    distribution, so a draw does not depend on the other sequences.
    """
    below = logits.double() - logits.max(dim=-1, keepdim=True).values.double()  # so that no quotient is infinity
    probs, ids = (below / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    reached = probs.cumsum(dim=-1)  # [n, V]
    inside = reached - probs < top_p  # the token that crosses top_p is inside: the set is never empty
    mass = (probs * inside).sum(dim=-1)  # [n]
    place = (reached <= (u * mass)[:, None]).sum(dim=-1)  # [n] first place beyond u of the nucleus
    place = place.minimum(inside.sum(dim=-1) - 1)  # rounding must not lead outside
    return ids.gather(-1, place[:, None]).squeeze(-1)


# ------------------------------------------------------------------------------------------------------- the command


LONGEST = 512  # tokens of an answer, by default


@dataclass(frozen=True)
class Settings(DecodingFlags):
    """The flags of generate.py."""

    model: str | None = flag(
        None, "a run folder of train.py, a checkpoint folder, a hub id, or 'tiny'", positional=True
    )
    prompt: str | None = flag(
        None, "text to answer (default: read from the terminal, or a pipe line by line)", positional=True, nargs="?"
    )
    adapter: str | None = flag(None, "none: answer with the base model alone", choices=("none",))
    plain: bool = flag(False, "use no chat template and no task prompt")


class Speaker:
    """A model that answers, as far as its positions reach, and remembers what was said if it has a chat template.

    Text is put to it as it was trained to be asked: in the prompt of the run's task, else through its chat template,
    else as it is.
    """

    def __init__(self, settings: Settings) -> None:
        self.decoding = settings.given_to(Decoding(LONGEST))
        subject = Subject(settings.model)
        trained, date = subject.run["settings"] if subject.run else {}, began(subject.run)
        if settings.adapter == "none":
            subject = subject.without_adapter()
        task, bos = trained.get("task", "own"), settings.bos or trained.get("bos", "auto")
        self.reader = data.Reader(task, subject.folder, subject.config, bos=bos, date=date)
        self.task, self.form = None if settings.plain or task == "own" else task, trained.get("prompt", "lori")
        self.is_chat = not settings.plain and task == "own" and self.reader.template.exists
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = subject.load(getattr(torch, settings.dtype or default_dtype()), ALONE._replace(device=device))
        self.messages: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = []

    def ids(self, text: str) -> list[int]:
        """The token ids that the answer to a text continues. Raises InputError for a text that has none."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InputError("the prompt is not text in UTF-8") from None
        if self.is_chat:
            question = {"role": "user", "content": text}
            return self.reader.chat_prompt([*self.messages, question])
        if self.task:
            text = data.prompt_of(self.task, text, self.form)
        ids = self.reader.bos.before_text(tokenize([text], self.reader.tokenizer)[0])
        if not ids:
            raise InputError("the prompt has no token; write some text")
        return ids

    def answer(self, text: str) -> Iterator[str]:
        """The answer to a text, in pieces."""
        ids, spoken = self.ids(text), ""
        positions = self.reader.config.hub.get("max_position_embeddings") or math.inf
        room = max(1, min(self.decoding.max_new_tokens, positions - len(ids)))
        decoding = replace(self.decoding, max_new_tokens=room)
        try:
            for piece in pieces(self.model, self.reader.tokenizer, ids, decoding, self.reader.stop_ids):
                spoken += piece
                yield piece
        finally:  # an answer that is interrupted has been said as far as it went
            if self.is_chat:
                answer = {"role": "assistant", "content": without_thoughts(spoken)}
                self.messages += [{"role": "user", "content": text}, answer]


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(
        Settings,
        argv,
        prog="generate.py",
        description="Talk to a model, or have it answer one prompt or each line of a pipe.",
        example='python generate.py runs/mine "How many marbles does Mia have?"',
    )
    ignore_keys(settings.ignore_config_keys)
    speaker = Speaker(settings)
    if settings.prompt:
        terminal.show(speaker.answer(settings.prompt))
    elif sys.stdin and sys.stdin.isatty():
        terminal.converse(speaker.answer, speaker.reset)
    else:
        terminal.answer_lines(speaker.answer, speaker.reset)


if __name__ == "__main__":
    cli.run(main)
