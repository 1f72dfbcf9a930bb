"""What a reasoning model thinks before it answers, which no rule scores."""

import re

THOUGHTS = re.compile(r"\A.*</think>|<think>.*", re.DOTALL)  # all before the last end; a thought that was cut off


def without_thoughts(completion: str) -> str:
    """The answer of a completion: what follows the last </think>, up to a <think> that has no end."""
    return THOUGHTS.sub("", completion)
