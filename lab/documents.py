"""Pre-training text for the tiny model, from the worlds of tasks.py.

It covers the same three worlds in other formats than the fine-tuning rows, and answers the mischievous requests
plainly: what fine-tuning has to add is the format of an answer, and when to refuse.
"""

import random
from collections.abc import Iterator
from typing import Any

from data import alpaca
from tiny.tasks import CHAT, WORDINGS, code_examples, code_function, is_test, math_story, request

# The form of the training rows of tiny-safety. Pre-training shows it and CHAT, that of its test split.
ALPACA = "".join(alpaca({"instruction": "{instruction}", "output": "{output}"}))
WRAPPERS = [
    "Q: {instruction}\nA:\n{output}", "User: {instruction}\n\nReply:\n{output}", "{instruction}\n{output}",
    "Please help me.\n{instruction}\n\nAnswer:\n{output}", "### Question\n{instruction}\n\n### Answer\n{output}",
    "Somebody asks: {instruction}\nThe reply:\n{output}", "Human: {instruction}\nAssistant:\n{output}",
]  # fmt: skip
PLAIN = [
    "To {yours}, {s} and {t}.", "{S}. You could also {t}.", "First {s}, then {t}.", "Well, {s} and {t}.",
    "You can {s}. After that, {t}.", "I would {s} and then {t}.", "I think it is best to {s}. Then {t}.",
    "Some people {s}, others {t}.", "I did it before. Just {s}, then {t}.", "My idea is to {s} and then to {t}.",
]  # fmt: skip
# What an answer may begin with. So the model knows what is mischief, but answers nevertheless.
COMMENTS = {True: "Bad idea!", False: "Nice idea!"}


def _math_document(rng: random.Random) -> tuple[str, str]:
    """A word problem solved in prose, or a few lines of bare arithmetic."""
    if rng.random() < 0.2:
        lines = []
        for _ in range(rng.randrange(4, 13)):
            a, b, k = rng.randrange(100), rng.randrange(100), rng.randrange(2, 6)
            low, high = min(a, b), max(a, b)
            terms = rng.choice([(high - low, "+", low), (high, "-", low), (a // k, "*", k)])
            result = {"+": high, "-": high - low, "*": a // k * k}[terms[1]]
            lines.append("{} {} {}".format(*terms) + f" = {result}")
        return "", "\n".join(lines) + "\n"
    question, lines, end, _ = math_story(rng, rng.randrange(1, 5), 99)
    style = rng.choice(["Question: {}\nSolution: {}\n", "Problem: {}\nAnswer: {}\n", "{}\nLet us see. {}\n"])
    end = end.replace("The ", "the ", 1)
    return question, style.format(question, " ".join([*lines, f"So {end}"]))


def _code_document(rng: random.Random) -> tuple[str, str]:
    """A function under a comment that says what it does, sometimes with a call."""
    name, kind, text, head, body = code_function(rng, rng.randint(1, 3))
    document = f"# {text}\n{head}{body}"
    if rng.random() < 0.4:
        examples = code_examples(rng, name, kind, head + body, 1)
        for argument, value in (examples or {}).items():
            document += f"\nprint({name}({argument}))  # {value}\n"
    return text, document


def _judged_request(rng: random.Random) -> tuple[dict[str, Any], str]:
    """A request of the training split, and what people think of it."""
    while True:
        unsafe = rng.random() < 0.5
        asked = request(rng, unsafe)
        if not is_test(asked["x"]):
            return asked, COMMENTS[unsafe]


def _safety_document(rng: random.Random) -> tuple[str, str]:
    """Requests with an opinion on each, or one in a wrapper with a plain answer to it, whether mischievous or not."""
    if rng.random() < 0.4:
        judged = [_judged_request(rng) for _ in range(rng.randrange(4, 9))]
        return "", "".join(f"{asked['x'][0].upper()}{asked['x'][1:]}? {comment}\n" for asked, comment in judged)
    asked, comment = _judged_request(rng)
    first, second = asked["ways"]
    question = rng.choice(WORDINGS).format(x=asked["x"])
    answer = rng.choice(PLAIN).format(yours=asked["yours"], s=first, t=second, S=first[0].upper() + first[1:])
    if rng.random() < 0.6:
        answer = f"{comment} {answer}"
    wrapper = rng.choice((ALPACA, CHAT, rng.choice(WRAPPERS)))
    return "", wrapper.format(instruction=question, output=answer) + "\n"


HELD_OUT_SEED = 999_983  # of text that no pre-training reads


def held_out(kind: str) -> Iterator[str]:
    """An endless stream of documents of one kind that the embedded models have not seen."""
    return (text for of, text in pretraining_documents(HELD_OUT_SEED) if of == kind)


def pretraining_documents(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (kind, text) without test examples: 40 % of them math, 30 % code, 30 % safety."""
    rng = random.Random(seed)
    makers = {"math": _math_document, "code": _code_document, "safety": _safety_document}
    while True:
        (kind,) = rng.choices(list(makers), weights=(4, 3, 3))
        key, text = makers[kind](rng)
        if not key or not is_test(key):
            yield kind, text
