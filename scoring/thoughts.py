"""What a reasoning model thinks before it answers, which no rule scores."""

import re

TAG = r"(?:think|thinking|thought|reasoning)[>\]]"  # <think>, [THINK] and the like
THOUGHTS = re.compile(  # all before the last end; a thought that was cut off
    rf"\A.*[<\[]/{TAG}|[<\[]{TAG}.*", re.DOTALL | re.IGNORECASE
)


def without_thoughts(completion: str) -> str:
    """The answer of a completion: what follows the last </think>, up to a <think> that has no end."""
    return THOUGHTS.sub("", completion)
