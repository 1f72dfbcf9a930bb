"""Rows of the user's own data, and the chats among them, in the format of OpenAI or of ShareGPT.

    read = OwnRows(template, formats)
    prompt, answer, *chat = read({"messages": [{"role": "user", "content": "Hi"}, ...]})
    prompt, answer, *chat = read({"conversations": [{"from": "human", "value": "Hi"}, ...]})

In a chat a system message comes first, if there is one; then user and assistant take turns.
"""

from collections.abc import Callable

from command.cli import InputError
from hub.chat import Chat, ChatTemplate, Message
from hub.rows import Row, text, unread

NAMES = {  # column -> key of the role, key of the text, the role that each name means
    "messages": ("role", "content", {"system": "system", "user": "user", "assistant": "assistant"}),
    "conversations": (
        "from",
        "value",
        {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    ),
}


def read_messages(row: Row) -> list[Message]:
    """The messages of a row.

    Raises InputError, which names a turn that is wrong.
    """
    column = next(column for column in NAMES if column in row)
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{column!r} is {turns!r:.60}; expected a list of one turn or more")
    messages = [read_turn(turn, i, column) for i, turn in enumerate(turns, 1)]
    if row.get("system"):  # some ShareGPT files have it beside the turns
        messages.insert(0, {"role": "system", "content": text(row, "system")})
    roles = [message["role"] for message in messages]
    first = 1 if roles[0] == "system" else 0
    for i, role in enumerate(roles[first:]):
        if role != ("user", "assistant")[i % 2]:
            before = roles[first + i - 1] if i else "the beginning"
            raise InputError(
                f"turn {first + i + 1} has role {role} after {before}; expected user and assistant to alternate"
            )
    if roles[-1] == "system":
        raise InputError("no turn has the role user")
    return messages


def read_turn(turn: object, number: int, column: str) -> Message:
    """One turn as a message."""
    role_key, text_key, roles = NAMES[column]
    if not isinstance(turn, dict):
        raise InputError(f"turn {number} is {turn!r:.60}; expected an object with {role_key!r} and {text_key!r}")
    role, content = turn.get(role_key), turn.get(text_key)
    if further := [key for key, value in turn.items() if key not in (role_key, text_key) and value is not None]:
        raise InputError(
            f"turn {number} has {further[0]!r}, which is not supported; expected {role_key!r} and {text_key!r}"
        )
    if not isinstance(role, str) or role not in roles:
        raise InputError(f"turn {number} has {role_key!r} {role!r:.40}; expected one of {', '.join(roles)}")
    if not isinstance(content, str):
        raise InputError(f"turn {number} has {text_key!r} {content!r:.60}; expected text")
    if not content.strip():
        raise InputError(f"turn {number} ({role}) is empty; remove the row")
    return {"role": roles[role], "content": content}


Read = Callable[[Row], tuple[str, str]]  # a row's prompt and answer
ANSWERS = ("completion", "output")  # the columns that hold answers, of rows that are no chats


class OwnRows:
    """Reads the user's own rows. All rows of a file must have the format of the first."""

    def __init__(
        self,
        template: ChatTemplate,
        formats: dict[tuple[str, ...], tuple[tuple[str, ...], Read | None]],
        answered: bool = True,
    ) -> None:
        """formats: the columns by which a format is known, further ones, and what reads it; None: a chat.

        answered: refuse rows that have no answer. Without it the answer of such a row is empty.
        """
        self.template, self.formats, self.answered, self.columns = template, formats, answered, None
        self.ignored: set[str] = set()  # columns that were not read
        self.num_cut = 0  # chats whose last turn was not read, since the assistant does not answer it

    def __call__(self, row: Row) -> tuple[str, str] | tuple[str, str, Chat]:
        """The prompt and the answer of a row; of a chat those of its last turn, and the chat."""
        if not isinstance(row, dict):
            raise InputError(f"it is {row!r:.60}; expected an object")
        if not self.answered:
            row = row | {name: "" for name in ANSWERS if row.get(name) is None}
        columns = next((columns for columns in self.formats if row.keys() >= set(columns)), None)
        if columns is None:
            names = ", ".join(" and ".join(map(repr, columns)) for columns in self.formats)
            raise InputError(f"its columns are {', '.join(map(repr, row))[:100] or 'none'}; expected one of {names}")
        if self.columns not in (None, columns):
            raise InputError(f"a row of {' and '.join(columns)} after rows of {' and '.join(self.columns)} in one file")
        self.columns = columns
        further, read = self.formats[columns]
        self.ignored.update(unread(row, columns + further))
        if read:
            return read(row)
        messages = read_messages(row)
        has_answer = any(message["role"] == "assistant" for message in messages)
        if has_answer and messages[-1]["role"] == "user":
            messages.pop()
            self.num_cut += 1
        if self.answered and not has_answer:
            raise InputError("no turn has the role assistant: there is nothing to learn")
        chat = self.template.render(messages) if has_answer else self.template.ask(messages)
        start, end = chat.spans[-1]
        return self.template.spelled(chat.text[:start]), self.template.spelled(chat.text[start:end]), chat
