"""Find the code in a model's answer to a HumanEval problem: what a person who reads the answer would run.

    program = extract(prompt, "has_close_elements", completion)     # a whole program, without the tests
    finished(prompt, "has_close_elements", text_so_far)             # may decoding stop?

The answer is read in two ways. A *continuation* goes on with the body of the function whose head the prompt is. A
*program* defines the function anew. Whatever does not compile is not code; nothing is executed here.
"""

import ast
import builtins
import codeop
import re
import symtable
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import NamedTuple

from scoring.thoughts import without_thoughts

FENCE = re.compile(  # indentation, fence, content, and the closing fence, which may stand behind the last line of code
    r"^([ \t]*)(```|~~~)[^\n]*\n(.*?)(^[ \t]*\2|\2[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL
)
CLAUSE = re.compile(r"(?:else|elif|except|finally)\b")  # belongs to the statement above it
DEFINITION = re.compile(r"(?:async\s+def|def|class)\b|@")
ASIDE = re.compile(r"(?:import|from|assert|print)\b")  # changes no value
STATEMENT = re.compile(r"(?:async|def|class|for|while|if|with|try|match)\b|@")
INVISIBLE = {0xA0: " ", 0x200B: None, 0xFEFF: None}  # spaces that are not code
SPECIAL = re.compile(  # tokens that other tools leave in a text; DeepSeek's have wide bars
    r"<\|\w+\|>|<\uff5c[^\uff5c\n]+\uff5c>|</?s>|<(?:eos|pad|unk|file_sep|end_of_turn)>"
)
TRIES = 100  # how often the end of one statement is looked for


class Found(NamedTuple):
    """A program that defines the function."""

    program: str
    complete: bool  # nothing that the function uses is missing, and the text has gone on behind it


# ------------------------------------------------------------------------------------------------ pieces of Python


@lru_cache(maxsize=8192)
def error(source: str) -> int | None:
    """The line at which the text stops being a Python program; None if it is one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # model-written strings hold invalid escapes
        try:
            compile(source, "<completion>", "exec", dont_inherit=True)
        except SyntaxError as wrong:
            return wrong.lineno or 1
        except (ValueError, RecursionError, MemoryError, OverflowError):
            return 1
    return None


def compiles(source: str) -> bool:
    """True if the text is a Python program."""
    return error(source) is None


@lru_cache(maxsize=8192)
def goes_on(source: str) -> bool:
    """True if a text that does not compile could be the beginning of a program: a bracket or a block is open."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return codeop.compile_command(source, symbol="exec") is None
        except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
            return False


class Names(NamedTuple):
    """The global names of a program."""

    binds: frozenset[str]  # defined, assigned or imported; "*": any, by `from x import *`
    reads: frozenset[str]  # read when the program runs
    uses: frozenset[str]  # read then, or when its functions are called


@lru_cache(maxsize=4096)
def names(source: str) -> Names:
    """The global names of a program that compiles."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        top = symtable.symtable(source, "<completion>", "exec")
    binds = {name.get_name() for name in top.get_symbols() if name.is_assigned() or name.is_imported()}
    reads = {name.get_name() for name in top.get_symbols() if name.is_referenced()}
    uses, tables = set(reads), list(top.get_children())
    for table in tables:  # grows: functions within functions
        tables += table.get_children()
        uses |= {name.get_name() for name in table.get_symbols() if name.is_global() and name.is_referenced()}
    if re.search(r"^from\s+[\w.]+\s+import\s+\*", source, re.MULTILINE):
        binds.add("*")
    return Names(frozenset(binds), frozenset(reads), frozenset(uses))


def undefined(read: Iterable[str], bound: set[str]) -> set[str]:
    """The names that nothing defines."""
    return set() if "*" in bound else {name for name in read if name not in bound and not hasattr(builtins, name)}


def starts(lines: list[str]) -> list[int]:
    """The lines at which a statement of the top level can begin, then the number of lines."""
    can = [i for i, line in enumerate(lines) if line.strip() and line[0] not in " \t#)]}" and not CLAUSE.match(line)]
    return [*can, len(lines)]


def longest(source: str, entry_point: str) -> str | None:
    """The longest run of first lines that defines the function: decoding may have stopped within a later line."""
    lines = source.split("\n")
    n = len(lines)
    for _ in range(TRIES // 4):
        part = "\n".join(lines[:n])
        if entry_point not in part:
            break
        wrong = error(part)
        if wrong is None and defines(part, entry_point):
            return part
        n = min(n, wrong or n) - 1  # what is wrong in a line stays wrong in every part with this line
    return None


def statements(text: str, entry_point: str, cut: bool) -> Iterator[str]:
    """The statements of the top level, in order; lines that belong to none are skipped.

    cut: a last definition that decoding has cut off counts up to its last whole line.

    Most statements are compiled once. Those that go on at the start of a later line need more compilations, which are
    limited for the whole text: otherwise a text that opens brackets without end would take hours.
    """
    lines = text.split("\n")
    begins = starts(lines)
    i, spare = 0, 4 * TRIES
    while i < len(begins) - 1:
        found, end = None, i + 1
        for j in range(i + 1, min(len(begins), i + 1 + max(1, min(spare, TRIES)))):
            part = "\n".join(lines[begins[i] : begins[j]]).rstrip()
            if compiles(part):
                found, end = part, j
            if found or not goes_on(part):
                break
            spare -= 1
        if found is None and cut and spare > 0 and DEFINITION.match(lines[begins[i]]):
            found = longest("\n".join(lines[begins[i] :]), entry_point)
            end = len(begins) - 1 if found else end
            spare -= TRIES
        if found is not None:
            yield found
        i = end


def idle(part: ast.stmt) -> bool:
    """True for a statement that a function which is not written yet may hold: `pass`, a docstring, another function."""
    if isinstance(part, ast.Raise):
        return isinstance(part.exc, ast.expr) and ast.unparse(part.exc).startswith("NotImplementedError")
    empty = isinstance(part, (ast.Pass, ast.FunctionDef, ast.AsyncFunctionDef, ast.Import, ast.ImportFrom))
    return empty or (isinstance(part, ast.Expr) and isinstance(part.value, (ast.Constant, ast.Name)))


def definitions(nodes: list[ast.stmt], entry_point: str) -> Iterator[ast.stmt]:
    """The statements that define the function, at the top level or within `if` and `try` there, and are no stub.

    A function that ends with a function of its own name is a program that was indented as a whole.
    """
    for node in nodes:
        if isinstance(node, (ast.If, ast.Try)):
            yield from definitions(node.body + node.orelse, entry_point)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            again = getattr(node.body[-1], "name", None) == node.name
            if node.name == entry_point and not again and not all(map(idle, node.body)):
                yield node
        elif isinstance(node, ast.ClassDef) and node.name == entry_point:
            yield node
        elif isinstance(node, ast.Assign):
            if any(isinstance(target, ast.Name) and target.id == entry_point for target in node.targets):
                yield node


def defines(source: str, entry_point: str) -> bool:
    """True if the program defines the function."""
    return next(definitions(ast.parse(source).body, entry_point), None) is not None


def last_definition(source: str, entry_point: str) -> str:
    """The program with the last of several definitions of the function alone: the one that Python would call."""
    if not compiles(source):
        return source
    body, lines = ast.parse(source).body, source.split("\n")
    found = [node for node in body if isinstance(node, ast.FunctionDef) and any(definitions([node], entry_point))]
    for node in reversed(found[:-1]):
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        del lines[first - 1 : node.end_lineno]
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------- the two ways to read


def as_continuation(prompt: str, entry_point: str, text: str, cut: bool) -> Found | None:
    """Prompt and text as one program: the text begins with the body of the function."""
    lines = text.split("\n")
    for end in starts(lines)[:TRIES]:  # the first line behind the body
        source = prompt + "\n".join(lines[:end])
        if compiles(source):
            if not defines(source, entry_point):
                return None
            body = re.sub(r"(?:\n(?:#.*)?)+\Z", "", source)  # comments behind it
            return join([body], statements("\n".join(lines[end:]), entry_point, cut), entry_point)
        if not goes_on(source):
            break
    source = longest(prompt + text, entry_point) if cut else None
    return join([source], iter(()), entry_point) if source else None


def as_program(prompt: str, entry_point: str, text: str, cut: bool) -> Found | None:
    """The text as a program of its own, behind what the prompt has before the function.

    A statement that reads an undefined name is prose ("Answer: below") or could not run anyway.
    """
    head = re.compile(rf"^(?:@.*\n)*(?:async\s+def|def|class)\s+{re.escape(entry_point)}\b", re.MULTILINE)
    before = head.split(prompt)[0].rstrip()
    kept = [before] if before and compiles(before) else []
    bound = {name for part in kept for name in names(part).binds}
    rest = statements(text, entry_point, cut)
    for statement in rest:
        found = names(statement)
        if undefined(found.reads, bound | found.binds):
            continue
        kept.append(statement)
        bound |= found.binds
        if defines(statement, entry_point):
            return join(kept, rest, entry_point)
    return None


def join(kept: list[str], rest: Iterator[str], entry_point: str) -> Found:
    """The program of statements that end with the function, and those of the rest that it uses.

    Tests, examples and further functions of the rest are left out: they can fail although the function is right.
    """
    bound = {name for part in kept for name in names(part).binds}
    uses = {name for part in kept for name in names(part).uses}
    missing = undefined(uses, bound)
    own = re.compile(rf"{re.escape(entry_point)}(?:\.\w+)?\s*=[^=]")  # total = cache(total), total.calls = 0
    assigned = [node for part in kept for node in ast.parse(part).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    values = {name for node in assigned for name in names(ast.unparse(node)).binds} & uses  # the rest may fill them
    complete = False
    for statement in rest:
        found = names(statement)
        aside = DEFINITION.match(statement) or ASIDE.match(statement) or entry_point in found.reads
        fills = (found.binds | found.reads) & values and not aside
        useful = own.match(statement) or found.binds & missing or fills
        if useful and not undefined(found.reads, bound | found.binds):
            kept.append(statement)
            bound |= found.binds
            missing = undefined(missing | found.uses, bound)
            values |= set() if aside else found.binds
        elif not missing:
            complete = True
            break
    future = [part for part in kept if part.startswith("from __future__")]  # allowed at the start only
    program = "\n\n\n".join([*future, *(part for part in kept if part not in future)])
    return Found(program, complete or not missing | values)


def blocks(text: str, entry_point: str) -> str:
    """The contents of the fenced blocks of a Markdown text, one behind the other, without the fences' indentation."""
    contents = (re.sub(rf"^{block[1]}", "", block[3], flags=re.MULTILINE) for block in FENCE.finditer(text))
    return "\n".join(last_definition(each, entry_point) for each in contents)


@lru_cache(maxsize=256)
def read(prompt: str, entry_point: str, text: str, cut: bool) -> Found | None:
    """The first reading that finds the function: before the first fence, in the fenced blocks, in the whole text."""
    fence = FENCE.search(text)
    parts = [text[: fence.start()], blocks(text, entry_point), text] if fence else [text]
    readings = (way(prompt, entry_point, part, cut) for part in parts for way in (as_continuation, as_program))
    return next(filter(None, readings), None)


# ------------------------------------------------------------------------------------------------- what is used


def extract(prompt: str, entry_point: str, text: str) -> str:
    """The program that a completion means; prompt and answer as they are if no function is found in it."""
    answer = without_thoughts(text)
    found = find(prompt, entry_point, answer.replace("\r\n", "\n"))
    return found.program if found else prompt + answer


def find(prompt: str, entry_point: str, text: str) -> Found | None:
    """The first reading that finds the function, first in the text as it is, then in repaired text."""
    found = read(prompt, entry_point, text, False)
    if not found:
        code = blocks(text, entry_point) or text
        parts = [code, *repaired(code, prompt)]
        readings = (read(prompt, entry_point, part, cut) for cut in (False, True) for part in parts)
        found = next(filter(None, readings), None)
    return found


def repaired(code: str, prompt: str) -> list[str]:
    """The code as it was before tokenizers, chats or editors changed it; the most likely change first."""
    ends = prompt.rstrip().split("\n")
    indent = ends[-1][: len(ends[-1]) - len(ends[-1].lstrip())] or "    "  # of the function's body
    repeated = ("\n".join(ends[i:]) + "\n" for i in range(len(ends)))
    lines = [line for line in code.split("\n") if line.strip()]
    behind = without_prose(code)
    first_alone = len(lines) == 1 or (len(lines) > 1 and lines[1][0] in " \t")
    return [
        next(filter(str.strip, SPECIAL.split(code)), ""),
        code.lstrip("\n").removeprefix(next(filter(code.lstrip("\n").startswith, repeated), "")),
        code.translate(INVISIBLE),
        code.removeprefix(" "),
        code.lstrip(),
        textwrap.dedent(code),
        textwrap.indent(textwrap.dedent(code), indent),
        indent + code.lstrip() if first_alone else "",
        "\n".join(line[4:] for line in code.split("\n") if line.startswith((">>> ", "... "))),
        behind,
        textwrap.dedent("\n".join(line for line in behind.split("\n") if line[:1] in " \t")),  # Markdown's other block
    ]


def without_prose(code: str) -> str:
    """The text from its first indented line on, if nothing before that line is Python."""
    lines = code.split("\n")
    first = next((i for i, line in enumerate(lines) if line.strip() and line[0] in " \t"), len(lines))
    is_code = any(compiles(line) or STATEMENT.match(line) for line in lines[:first] if line.strip())
    return "" if is_code else "\n".join(lines[first:])


def finished(prompt: str, entry_point: str, text: str) -> bool:
    """True if whatever follows the text cannot change the program that `extract` finds: decoding may stop.

    The text must have gone on behind the function, with a line that does not belong to it. In an open fenced block the
    function may be defined again, and what is thought is not yet the answer.
    """
    text = text.rpartition("</think>")[2]
    lines = text.split("\n")
    last = next(reversed(starts(lines)[:-1]), 0)
    if last == 0 or entry_point.startswith(lines[last]) or lines[last].startswith(entry_point):
        return False
    text = "\n".join(lines[:last])
    if "<think>" in text or any(not block[4] for block in FENCE.finditer(text)):
        return False
    found = read(prompt, entry_point, text, False)
    return found is not None and found.complete
