"""Pre-training text for the tiny model, from the worlds of tasks.py.

It covers the same three worlds in other formats than the fine-tuning rows, and answers the mischievous requests
plainly: what fine-tuning has to add is the format of an answer, and when to refuse.
"""

import random
from collections.abc import Iterator

from tiny.tasks import WORDINGS, code_examples, code_function, is_test, math_story, request


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
    name, kind, text, head, body = code_function(rng)
    document = f"# {text}\n{head}{body}"
    if rng.random() < 0.4:
        examples = code_examples(rng, name, kind, head + body, 1)
        for argument, value in (examples or {}).items():
            document += f"\nprint({name}({argument}))  # {value}\n"
    return text, document


def _safety_document(rng: random.Random) -> tuple[str, str]:
    """A request and a plain answer to it, whether it is mischievous or not."""
    asked = request(rng, rng.random() < 0.5)
    first, second = asked["ways"]
    question = rng.choice(WORDINGS).format(x=asked["x"])
    return asked["x"], f"Q: {question}\nA: To {asked['yours']}, {first} and {second}.\n"


def pretraining_documents(seed: int) -> Iterator[tuple[str, str]]:
    """An endless stream of (kind, text): half math, a quarter code and a quarter safety, no test examples."""
    rng = random.Random(seed)
    makers = {"math": _math_document, "code": _code_document, "safety": _safety_document}
    while True:
        kind = rng.choice(["math", "math", "code", "safety"])
        key, text = makers[kind](rng)
        if not key or not is_test(key):
            yield kind, text
