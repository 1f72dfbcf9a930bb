"""Chats through a model's own chat template, as transformers renders them, and which of their tokens are learnt.

    template = ChatTemplate(folder, tokenizer)      # chat_template.jinja, or chat_template of tokenizer_config.json
    chat = template.render(messages)                # one turn or more of the assistant
    ids, spans = template.encode(chat)              # as `Encoded`: ids[start:end] is learnt, for each of the spans

The special tokens that the template itself writes become special tokens. A message that spells one is text, as all
text of users is. To keep the two apart, a rendered chat holds the id of a special token between two code points that no
text has (Unicode noncharacters), and the tokenizer of `encode` knows these marks.

What is learnt is what the assistant writes: the text from where a generation prompt ends to the end-of-turn token.
"""

import copy
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from command.cli import InputError
from command.files import read_json
from hub.tokenizer import Spans, named_tokens, never_text, refuse_special

SPECIAL, SPELLED = "\ufdd0{}\ufdd1", "\ufdd2{}\ufdd3"  # a special token of the template; one that a message spells
A_SPECIAL, A_SPELLED = SPECIAL.format(r"\d+"), SPELLED.format(r"\d+")  # any of them, as patterns
MARK = re.compile("[\ufdd0-\ufdd3]")
Message = dict[str, str]  # role and content


# ------------------------------------------------------------------------------------------------ the template's text


class Generation(Extension):
    """{% generation %} marks what the assistant writes, for tools that mask the rest. It is rendered as its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def compile_template(source: str, date: datetime) -> jinja2.Template:
    """A template with the settings, filters and functions that templates of the hub are written for (transformers)."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = date.strftime
    return environment.from_string(source)


def template_source(folder: Path) -> str | None:
    """The chat template of a checkpoint; None if it has none. Raises InputError if it is not one, or has no default."""
    file, path = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: cannot be read ({error})") from None
    template = read_json(path, dict, missing={}).get("chat_template")
    if isinstance(template, list):  # several, with names
        named = {each.get("name"): each.get("template") for each in template if isinstance(each, dict)}
        if "default" not in named:
            raise InputError(f"{path}: chat_template has {', '.join(map(str, named))}; expected one called default")
        template = named["default"]
    if not isinstance(template, str | None):
        raise InputError(f"{path}: chat_template is {template!r:.40}; expected text")
    return template


# ------------------------------------------------------------------------------------------------------------- a chat


@dataclass(frozen=True)
class Chat:
    """A rendered chat, its special tokens as marks, and the spans of its characters that the assistant writes."""

    text: str
    spans: Spans


class Token(NamedTuple):
    """A token of a text, and the characters that it stands for."""

    id: int
    start: int
    end: int


class ChatTemplate:
    """The chat template of a checkpoint, and the special tokens of its tokenizer."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, date: datetime | None = None) -> None:
        """date: what `strftime_now` of a template takes for now; by default the present, once for all rows."""
        self.folder, self.tokenizer, self.date = Path(folder), tokenizer, date or datetime.now()
        added = tokenizer.get_added_tokens_decoder()
        self.special = {token.content: i for i, token in added.items() if token.special and token.content}
        self.names = {str(i): token for token, i in self.special.items()}
        longest_first = sorted(self.special, key=len, reverse=True)
        self.spelling = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    @property
    def exists(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return template_source(self.folder) is not None

    @cached_property
    def write(self) -> Callable[..., str]:
        """What renders `messages`, with the special tokens that a template may name. Raises InputError without one."""
        source = template_source(self.folder)
        if source is None:
            where = "chat_template.jinja, or chat_template in tokenizer_config.json"
            raise InputError(
                f"{self.folder} has no chat template ({where}), and rows of chats need one; use the model's chat "
                "version, or write your rows as prompt and completion"
            )
        try:
            template = compile_template(source, self.date)
        except jinja2.TemplateError as error:
            raise InputError(f"{self.folder}: its chat template is damaged ({error})") from None
        variables = named_tokens(self.folder)

        def write(messages: list[Message], add_generation_prompt: bool = False) -> str:
            try:
                return template.render(
                    messages=copy.deepcopy(messages),
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **variables,
                )
            except Exception as error:  # a template may do anything
                raise InputError(f"the model's chat template refuses it: {error or type(error).__name__}") from None

        return write

    def marked(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The rendered messages, special tokens of the template as marks, and those that messages spell as text."""

        def mark(text: str, form: str) -> str:
            return self.spelling.sub(lambda spelled: form.format(self.special[spelled[0]]), text)

        plain = self.write(messages, add_generation_prompt)
        if MARK.search(plain):
            raise InputError("it has one of the characters U+FDD0 to U+FDD3, which no text has; remove them")
        safe = [message | {"content": mark(message["content"], SPELLED)} for message in messages]
        written = self.write(safe, add_generation_prompt) if safe != messages else plain
        if self.spelled(written, A_SPELLED) != plain:
            raise InputError("a message spells a special token, and the model's chat template reads it; remove it")
        return self.spelled(mark(written, SPECIAL), A_SPELLED)

    def spelled(self, text: str, marks: str = A_SPECIAL) -> str:
        """A part of a chat's text with its special tokens spelled in place of the marks."""
        return re.sub(marks, lambda mark: self.names[mark[0][1:-1]], text)

    def render(self, messages: list[Message]) -> Chat:
        """The messages, the last of which is the assistant's, as the template writes them, and the assistant's part.

        Raises InputError if the template refuses the messages, leaves one out, or writes an earlier part differently
        once more follows.
        """
        text, spans = self.marked(messages), []
        for i, message in enumerate(messages):
            if message["content"].strip() not in text:
                longer = message | {"content": message["content"] + "."}
                if self.write([*messages[:i], longer, *messages[i + 1 :]]) == self.write(messages):
                    turn = f"turn {i + 1} ({message['role']})"
                    raise InputError(f"the model's chat template leaves out {turn}, or the end of it; remove that turn")
            if message["role"] == "assistant":
                given = self.marked(messages[:i], add_generation_prompt=True)
                if not text.startswith(given):
                    raise InputError(
                        f"the model's chat template writes turns 1 to {i} differently when turn {i + 1} follows, so "
                        "that the model would learn from a prompt that it never sees; end the row earlier"
                    )
                spans.append((len(given), self.end_of_turn(text, messages[: i + 1], len(given))))
        return Chat(text, tuple(spans))

    def ask(self, messages: list[Message]) -> Chat:
        """Messages that end with the user's, and the beginning of the assistant's part, which is not written yet."""
        text = self.marked(messages, add_generation_prompt=True)
        return Chat(text, ((len(text), len(text)),))

    def end_of_turn(self, text: str, messages: list[Message], start: int) -> int:
        """Where the last of these messages ends in the whole text: behind its end-of-turn token, if it has one.

        White space that the template writes after the token is not the assistant's.
        """
        until = self.marked(messages)
        if text.startswith(until):
            mark = re.search(rf"({A_SPECIAL})\s*\Z", until[start:])
            return start + mark.end(1) if mark else len(until)
        # The template writes the last turn differently from those before it, as Qwen3 does with its reasoning.
        mark = re.compile(A_SPECIAL).search(text, start)
        if not mark or not messages[-1]["content"].strip().endswith(text[start : mark.start()].strip()):
            raise InputError(
                f"the model's chat template writes turn {len(messages)} differently when more turns follow, and no "
                "special token ends it; end the row after this turn"
            )
        return mark.end()

    @cached_property
    def end_id(self) -> int | None:
        """The special token that ends a turn of the assistant; None if the template has none, or there is none."""
        try:
            chat = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        except InputError:
            return None
        [(start, end)] = chat.spans
        mark = re.search(rf"{A_SPECIAL}\Z", chat.text[start:end])
        return int(mark[0][1:-1]) if mark else None

    # ------------------------------------------------------------------------------------------------------- tokens

    @cached_property
    def marking(self) -> tuple[Tokenizer, dict[int, int]]:
        """The tokenizer, which takes the marks as tokens, and what their ids stand for."""
        tokenizer = Tokenizer.from_str(self.tokenizer.to_str())
        tokenizer.encode_special_tokens = True  # all that is spelled is text
        tokenizer.post_processor = None  # some take white space out of the offsets
        meaning = {}
        for i, token in self.tokenizer.get_added_tokens_decoder().items():
            if token.content in self.special:
                mark = SPECIAL.format(i)
                tokenizer.add_tokens([AddedToken(mark, normalized=False, lstrip=token.lstrip, rstrip=token.rstrip)])
                meaning[tokenizer.token_to_id(mark)] = i
        return tokenizer, meaning

    def encode(self, chat: Chat, eos_id: int | None) -> tuple[list[int], Spans]:
        """Token ids of a chat, and the spans of them that are learnt.

        They are those of the whole text, unless they would be others before an answer than the generation prompt alone
        has: then what follows is tokenized apart from it, as answers are when the model is prompted.
        eos_id: of the token that is put behind the last turn if the template ends it with no special token.
        """
        tokens, meaning = self.pieces(chat), self.marking[1]
        refuse_special(chat.text, [token.id for token in tokens], never_text(self.tokenizer))
        ids = [meaning.get(token.id, token.id) for token in tokens]
        spans = []
        for start, end in chat.spans:
            inside = [i for i, (_, first, last) in enumerate(tokens) if first < end and last > start]
            spans.append((inside[0], inside[-1] + 1) if inside else (len(ids), len(ids)))
        start, end = spans[-1]
        if eos_id is not None and end == len(ids) and ids[-1] not in self.special.values():
            ids, spans[-1] = [*ids, eos_id], (start, end + 1)
        return ids, tuple(spans)

    def pieces(self, chat: Chat) -> list[Token]:
        """The tokens of a chat's text, divided where an answer begins."""
        text, divided = chat.text, 0  # divided: the last place where tokens were
        tokens = self.tokens(text, 0, len(text))
        for start, _ in chat.spans:
            begin = max(text.rfind(SPECIAL[0], divided, start), divided)  # no token reaches across a special one
            first = sum(token.end <= begin for token in tokens) if begin else 0
            last = sum(token.start < start for token in tokens)
            given = self.tokens(text, begin, start)
            if [token.id for token in tokens[first:last]] != [token.id for token in given]:
                tokens, divided = [*tokens[:first], *given, *self.tokens(text, start, len(text))], start
        return tokens

    def tokens(self, text: str, start: int, end: int) -> list[Token]:
        """The tokens of a part of a text.

        Some tokenizers put a space before a text. A part that is inside therefore gets a character in front that has no
        token in common with it.
        """
        is_inside = start > 0 and text[start] != SPECIAL[0]
        for before in ("\n", "a", "0", "") if is_inside else ("",):
            encoding = self.marking[0].encode(before + text[start:end], add_special_tokens=False)
            if not any(first < len(before) < last for first, last in encoding.offsets):
                break
        shift, pairs = start - len(before), zip(encoding.ids, encoding.offsets, strict=True)
        return [Token(i, first + shift, last + shift) for i, (first, last) in pairs if not before or last > len(before)]
