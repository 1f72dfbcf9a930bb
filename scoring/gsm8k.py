"""GSM8K: find the number that a completion gives as its answer, and compare it with the number of the data set.

The rule is part of a result, because the same completions score differently under another rule. The headline rule is
FIRST_MARKED. The public rules stand beside it as published, quirks included: LoRI = juzhengz/LoRI@9183468,
src/eval_model.py (the paper's scores fit it); lm-eval = EleutherAI/lm-evaluation-harness@4e7e0d4, lm_eval/tasks/gsm8k.
"""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from scoring.statistics import lori_as_published, share

HELP = """GSM8K: a completion ends where a line begins with another "Question:". The answer is the first number that
directly follows "####" or "The final answer is:", else the first that directly follows "The answer is", else the last
number. Numbers are compared as numbers."""
FIRST_MARKED = "first marked answer"

# ----------------------------------------------------------------------------------------------- the headline rule

# A minus sign counts only where nothing can be subtracted from: "7-5" holds 7 and 5.
NUMBER = (
    r"(?P<sign>(?<![\w.)])-)?(?:\\?\$\s?(?P<minus>-)?)?"
    r"(?P<number>\d[\d,]*(?:\.\d+)?|\.\d+)(?:/(?P<over>\d+)(?![\d.]))?"
)
ANSWER = re.compile(NUMBER, re.ASCII)
MARKED = [  # the forms of GSM8K's file and of our training targets come before a sentence of the reasoning
    re.compile(rf"{marker}[\s:*=]*{NUMBER}", re.ASCII)
    for marker in (r"(?:####|\b[Tt]he final answer is:)", r"\b[Tt]he (?:final )?answer is")
]
OPERATOR = re.compile(r"\s*[-+*/\u00d7\u00f7=]\s*\$?\d", re.ASCII)  # "The answer is 5 + 3 = 8" marks no number
MARKER = re.compile(r"####|The final answer is:")  # of GSM8K's file; of our training targets, which are LoRI's
NEXT_QUESTION = re.compile(r"(?<=\S)\s*\n\s*Question:")
SPELLING = str.maketrans(  # dashes, fraction slash, full-width signs
    "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d\u2044\uff0c\uff0e\uff04\uff0f", "-------/,.$/"
)
SPACED = re.compile(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3}\b)")  # 1 250
GOLD = re.compile(r"\$?(-?)((?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?)", re.ASCII)


def gold(answer: str) -> Decimal:
    """The number behind "####" in an answer of the data set.

    Raises ValueError for anything that one of the rules would read as another number, such as ".5", "1/2" or "5 of 9".
    """
    _, marker, text = answer.partition("####")
    found = GOLD.fullmatch(text.strip())
    if not found:
        given = repr(text.strip()[:40]) if marker else "no '####'"
        raise ValueError(f"'answer' has {given}; want '#### ' and a plain number such as 5, -5, 1,250 or 0.5")
    return Decimal((found[1] + found[2]).replace(",", ""))


def first_marked(completion: str) -> str | None:
    """The first number that follows a marker, else the last number, before the next question; as plain text."""
    text = re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), completion.translate(SPELLING))
    text = SPACED.sub("", NEXT_QUESTION.split(text)[0])
    marked = (found for marker in MARKED for found in marker.finditer(text) if not OPERATOR.match(text, found.end()))
    if found := next(marked, None):
        return plain_number(found)
    found = list(ANSWER.finditer(text))
    return plain_number(found[-1]) if found else None


def plain_number(found: re.Match) -> str:
    """A match of NUMBER as text: "-1,250.5" or "1/2"."""
    sign = "-" if found["sign"] or found["minus"] else ""
    return sign + found["number"].rstrip(",") + (f"/{found['over']}" if found["over"] else "")


def equal(found: str, wanted: Decimal) -> bool:
    """True if a number, as `plain_number` writes it, has that value exactly."""
    top, _, over = found.replace(",", "").partition("/")
    top, over = Fraction(Decimal(top)), Fraction(Decimal(over or 1))
    return over != 0 and top == over * Fraction(wanted)


# ----------------------------------------------------------------------------------------------- the published rules

LORI_NUMBER = re.compile(r"-?\d+\.?\d*")
STRICT = re.compile(r"(?:#### |The final answer is: +)(-?[0-9.,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


def lori_number(text: str) -> str | None:
    """LoRI's extract_answer_gsm8k: the first number after the first "The final answer is: ", else the last of all.

    Commas are removed first. The part after the marker ends at a second marker. "7-5" holds the numbers 7 and -5.
    """
    text = text.replace(",", "")
    parts = text.split("The final answer is: ")
    after = LORI_NUMBER.findall(parts[1]) if len(parts) > 1 else []
    if after:
        return after[0]
    everywhere = LORI_NUMBER.findall(text)
    return everywhere[-1] if everywhere else None


def lori_equal(found: str, wanted: str) -> bool:
    """LoRI compares as floats: 18.0 equals 18."""
    return float(found) == float(lori_number(wanted))


def strict_number(text: str) -> str | None:
    """lm-eval's strict-match (first match). Beside its "#### " it takes the marker of our targets."""
    match = STRICT.search(text)
    return match[1] if match else None


def flexible_number(text: str) -> str | None:
    """lm-eval's flexible-extract: the last match of its pattern, which may be two dots."""
    matches = FLEXIBLE.findall(text)
    return next(group for group in matches[-1] if group) if matches else None


def lm_eval_equal(found: str, wanted: str) -> bool:
    """lm-eval's exact_match: equal as lower-case strings once IGNORED is removed. 18.0 does not equal 18."""
    for pattern in IGNORED:
        found, wanted = re.sub(pattern, "", found), re.sub(pattern, "", wanted)
    return found.lower() == wanted.lower()


RULES = {  # name -> how to find the answer in a completion, how to compare it with the text behind "####"
    FIRST_MARKED: (first_marked, lambda found, wanted: equal(found, gold(f"####{wanted}"))),
    "lori": (lori_number, lori_equal),
    "strict-match": (strict_number, lm_eval_equal),
    "flexible-extract": (flexible_number, lm_eval_equal),
}


def verdict(rule: str, completion: str, answer: str) -> tuple[str | None, bool]:
    """The answer that a rule finds in a completion, and whether it is that of the data set's `answer` text."""
    extract, same = RULES[rule]
    found = extract(completion)
    return found, found is not None and same(found, answer.split("####", 1)[1].strip())


def score(items: list[dict], answers: list[str], shots: int = 0) -> tuple[dict, list[dict]]:
    """`accuracy` by FIRST_MARKED with the published rules beside it, and the items with "extracted" and "correct".

    items: {"id", "prompt", "completion"}. answers: the `answer` text of each problem. shots: solved problems in the
    prompts. LoRI shows none, so that what it would have printed is given only without shots.
    """
    texts = [item["completion"] for item in items]
    verdicts = {rule: [verdict(rule, *pair) for pair in zip(texts, answers, strict=True)] for rule in RULES}
    rates = {rule: share([correct for _, correct in found]) for rule, found in verdicts.items()}
    rates["has answer marker"] = share([bool(MARKER.search(text)) for text in texts])
    if not shots:  # LoRI reads the prompt too
        read = [item["prompt"] + item["completion"] for item in items]
        rates |= lori_as_published([verdict("lori", *pair)[1] for pair in zip(read, answers, strict=True)])
    main = rates[FIRST_MARKED]
    summary = {"accuracy": main["rate"], "num_correct": main["num_correct"], "num_total": len(items)}
    judged = [
        item | {"extracted": found, "correct": correct}
        for item, (found, correct) in zip(items, verdicts[FIRST_MARKED], strict=True)
    ]
    return summary | {"rule": FIRST_MARKED, "rates": rates}, judged
