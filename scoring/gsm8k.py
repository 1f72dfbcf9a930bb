"""GSM8K: find the number that a completion gives as its answer, and compare it with the number of the data set.

The rule is part of a result, because the same completions score differently under another rule. The headline rule is
FIRST_MARKED. The public rules stand beside it as published, quirks included: LoRI = juzhengz/LoRI@9183468,
src/eval_model.py (the paper's scores fit it); lm-eval = EleutherAI/lm-evaluation-harness@4e7e0d4, lm_eval/tasks/gsm8k.
"""

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction

from hub.rows import gold
from scoring.statistics import lori_as_published, share
from scoring.thoughts import without_thoughts

# DEVIATION from LoRI: the headline rule takes the first marked answer; LoRI's is reported too.
FIRST_MARKED = "first marked answer"

# ----------------------------------------------------------------------------------------------- the headline rule

# A minus sign counts only where nothing can be subtracted from: "7-5" holds 7 and 5. "3 1/2" and "1e3" are one number.
NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w.)]) - )?
    (?: \\?\$\s? (?P<minus>-)? )?                                       # $5, \$5, $-5
    (?: (?P<whole>\d[\d,]*) (?:[ ]and)? [ ]{1,2} (?=\d/\d{1,2}(?!\d)) )?  # the 3 of 3 1/2
    (?P<number> (?: \d[\d,]*(?:\.\d+)? | \.\d+ ) (?:[eE][-+]?\d{1,3}(?!\d))? )
    (?: / (?P<over>\d+) (?!\d|\.\d) )?
    """,
    re.ASCII | re.VERBOSE,
)
MARKERS = [  # the forms of GSM8K's file, of our training targets and of LaTeX come before a sentence of the reasoning
    re.compile(r"(?P<heading>####)|\b[Tt]he final answer is:|\\boxed(?={)"),
    re.compile(r"\b[Tt]he (?:final )?answer is"),
]
DIRECTLY = re.compile(  # behind ": **" or "{\text{", not behind words
    rf"(?: \\[A-Za-z]+ | [\W_] )*? {NUMBER.pattern}", re.ASCII | re.VERBOSE
)
OPERATION = re.compile(  # behind a number, and behind its unit: "4 apples + 5"
    r"""
    (?: [^\W\d] | [\s%)}] )*?
    (?: [-+*/\u00d7\u00f7] | (?<![A-Za-z])x | \\?(?:times|cdot|div|plus|minus) )
    \s* [\\$({]* \d
    """,
    re.ASCII | re.VERBOSE,
)
TITLE = re.compile(r"[.):]\**[ \t]+[^\W\d]", re.ASCII)  # behind the number of a heading: "#### 1. Add"
END = re.compile(r"[.,;:!?](?=\s|$)|\n|\s(?:\(|because\b|since\b)")  # of what is said to be the answer
THOUSANDS = re.compile(  # 1 250, and LaTeX's 1{,}250 and 1\,250
    r"""
    (?<![\d.,]) \d{1,3}
    (?: (?: [ \u00a0\u2009\u202f'\u2019_~] | ,?\\[!,;:\x20] | \{\\?,\} ) \d{3} )+
    (?! \d | -\w )
    """,
    re.ASCII | re.VERBOSE,
)
MARKER = re.compile(r"####|The final answer is:")  # of GSM8K's file; of our training targets, which are LoRI's
NEXT_QUESTION = re.compile(r"(?<=\S)\s*\n\s*Question:")
SPELLING = str.maketrans(  # dashes, fraction slash, full-width signs
    "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d\u2044\uff0c\uff0e\uff04\uff0f", "-------/,.$/"
)
SPELLING |= {  # 3\u00bd as 3\\frac{1}{2}
    i: rf"\frac{{{unicodedata.normalize('NFKC', chr(i))}}}".replace("\u2044", "}{")
    for i in (*range(0xBC, 0xBF), *range(0x2150, 0x215F))
}
FRACTION = re.compile(r"\\[cdt]?frac\s*(?:\{\s*(-?[\d.]+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", re.ASCII)


def first_marked(completion: str) -> str | None:
    """The first number that a marker marks, else the last number, as plain text.

    Neither thoughts nor what follows another "Question:" belong to the answer.
    """
    text = plainly_spelled(NEXT_QUESTION.split(without_thoughts(completion))[0])
    marks = [mark for marker in MARKERS for mark in marker.finditer(text)]
    marked = [number for mark in marks if (number := marked_by(mark))]
    if marked:
        return plain_number(marked[0])
    numbers = list(NUMBER.finditer(text))
    return plain_number(numbers[-1]) if numbers else None


def plainly_spelled(text: str) -> str:
    """The text with ASCII digits, dashes and signs, "3 1/2" for LaTeX's fractions, and thousands in one piece."""
    text = text.translate(SPELLING)
    text = re.sub(r"\d", lambda digit: str(unicodedata.decimal(digit[0])), text)
    text = re.sub(r"(?<=\d)\s*(?=\\[cdt]?frac)", " ", text)  # 3\frac{1}{2} is 3 1/2, not 31/2
    text = FRACTION.sub(r"\1\2/\3\4", text)
    return THOUSANDS.sub(lambda groups: re.sub(r"\D", "", groups[0]), text)


def marked_by(marker: re.Match) -> re.Match | None:
    """The number that directly follows a marker. Of a calculation, the last side of an "=" that is one number.

    "The answer is 18 apples" and "The answer is 3 x 6 = 18" mark 18; "The answer is 3 x 6" and "#### 1. Add" mark none.
    """
    text = marker.string[marker.end() :]
    number = DIRECTLY.match(text)
    if number is None or (marker.groupdict().get("heading") and TITLE.match(text, number.end())):
        return None
    end = END.search(text, number.end())
    sides = map(DIRECTLY.match, text[: end and end.start()].split("="))
    alone = [side for side in sides if side and not OPERATION.match(side.string, side.end())]
    return alone[-1] if alone else None


def plain_number(found: re.Match) -> str:
    """A match of NUMBER as text: "-1,250.5", "1e3", "1/2" or "3 1/2"."""
    sign = "-" if found["sign"] or found["minus"] else ""
    whole = f"{found['whole']} " if found["whole"] else ""
    return sign + whole + found["number"].rstrip(",") + (f"/{found['over']}" if found["over"] else "")


def equal(found: str, wanted: Decimal) -> bool:
    """True if a number, as `plain_number` writes it, has that value exactly."""
    sign = -1 if found.startswith("-") else 1
    whole, _, part = found.replace(",", "").removeprefix("-").rpartition(" ")
    top, _, over = part.partition("/")
    whole, top, over = (Fraction(Decimal(digits)) for digits in (whole or 0, top, over or 1))
    return over != 0 and sign * (whole * over + top) == over * Fraction(wanted)


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
    rates = {rule: share([correct for _, correct in of_rule]) for rule, of_rule in verdicts.items()}
    rates["has answer marker"] = share([bool(MARKER.search(without_thoughts(text))) for text in texts])
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
