"""HumanEval: run the code of completions with the problems' tests, and estimate pass@k.

The rule that makes a program of a completion is part of the result (RULES). It is the same for text that was generated
here and for text from a file. bigcode = bigcode-project/bigcode-evaluation-harness@8fc5bae,
bigcode_eval/tasks/humaneval.py, which LoRI uses unchanged; human-eval = openai/human-eval@6d43fb9,
human_eval/execution.py.
"""

from scoring import extraction, sandbox
from scoring.statistics import pass_at_k, rate

STOP_WORDS = ("\nclass", "\ndef", "\n#", "\n@", "\nprint", "\nif", "\n```", "<file_sep>")  # bigcode's


def cut_at_stop_word(prompt: str, entry_point: str, text: str) -> str:
    """bigcode's rule: the prompt and the text up to the first stop word."""
    ends = [at for word in STOP_WORDS if (at := text.find(word)) >= 0]
    return (prompt + text[: min(ends, default=None)]).rstrip()


RULES = {  # name -> the program that a rule makes of (prompt, entry point, completion)
    "extracted": extraction.extract,
    "bigcode": cut_at_stop_word,
    "uncut": lambda prompt, entry_point, text: prompt + text,  # as human-eval does
}


def finished(prompt: str, entry_point: str, text: str) -> bool:
    """True if decoding may stop: neither "extracted" nor "bigcode" would read on."""
    return any(word in text for word in STOP_WORDS) and extraction.finished(prompt, entry_point, text)


def score(
    items: list[dict], rows: list[dict], rule: str = "extracted", timeout: float = 3.0, workers: int | None = None
) -> tuple[dict, list[dict]]:
    """pass@1, 5 and 10 by `rule` with bigcode's beside it, and the items with the program and its outcome.

    items: {"id", "prompt", "completion"}; items with the same id are samples. rows: the HumanEval problem of each item.
    """
    rules = dict.fromkeys((rule, "bigcode"))
    programs = {name: [program(name, *pair) for pair in zip(items, rows, strict=True)] for name in rules}
    distinct = list(dict.fromkeys(each for of_rule in programs.values() for each in of_rule))  # samples repeat
    verdicts = dict(zip(distinct, sandbox.run_programs(distinct, timeout, workers), strict=True))
    outcomes = {name: [verdicts[each] for each in of_rule] for name, of_rule in programs.items()}
    rates = {}
    for name, of_rule in outcomes.items():
        passed: dict[str, list[bool]] = {}
        for item, verdict in zip(items, of_rule, strict=True):
            passed.setdefault(item["id"], []).append(verdict.passed)
        rates |= {k if name == rule else f"{k}, {name}": estimate for k, estimate in pass_rates(passed).items()}
    judged = [
        item | {"code": each.code, "extracted": verdict.outcome, "correct": verdict.passed}
        for item, each, verdict in zip(items, programs[rule], outcomes[rule], strict=True)
    ]
    summary = {name: estimate["rate"] for name, estimate in rates.items() if "," not in name}
    summary |= {"num_correct": sum(item["correct"] for item in judged), "num_total": len(judged)}
    summary |= {"num_problems": len(passed)}
    return summary | {"rule": rule, "rates": rates}, judged


def program(rule: str, item: dict, row: dict) -> sandbox.Program:
    """The program that a rule makes of an item, with the test of its problem."""
    code = RULES[rule](row["prompt"], row["entry_point"], item["completion"])
    return sandbox.Program(code, row["test"], row["entry_point"])


def pass_rates(passed: dict[str, list[bool]]) -> dict[str, dict]:
    """{"pass@k": rate}, k being 1, 5 and 10 as far as every problem has as many samples.

    pass@k is a mean over problems. Its interval is that of a share of as many problems, since the samples of one
    problem are not independent.
    """
    fewest, rates = min(map(len, passed.values())), {}
    for k in (1, 5, 10):
        if k <= fewest:
            estimates = [pass_at_k(len(samples), sum(samples), k) for samples in passed.values()]
            rates[f"pass@{k}"] = rate(sum(estimates), len(estimates))
    return rates
