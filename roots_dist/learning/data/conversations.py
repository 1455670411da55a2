"""Rows to conversations: a table of formats, found by their columns, and one record for a message of any of them.

    Row --find_format--> Format --read_conversation--> Conversation(messages, tools) --> learning/data/turns.py

Nothing of a row is dropped without a word: columns that no one reads are remarks, and a message that cannot be kept as
it is raises a DataError with file and line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from roots_dist.learning.data.chat import BEGIN, END
from roots_dist.learning.data.remarks import Remarks
from roots_dist.learning.data.rows import Row

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip
"""What data sets call a role -> its name in chat templates."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
"""Keys of a message: OpenAI's, ShareGPT's."""
WEIGHT_KEYS = ("weight", "train", "training")
"""Keys of a message that say whether it is learned: 0 or 1, or false or true."""
COMMON_COLUMNS = ("system", "tools")
"""Columns that every format may have: text of a system message, and descriptions of functions."""


@dataclass(frozen=True, kw_only=True)
class Message:
    """One message, in the words of chat templates."""

    role: str
    content: str | None
    """None: the assistant only calls tools."""
    learned: bool = True
    """Of the assistant's messages: whether this one is learned."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else it has, under the names that templates read: tool_calls, tool_call_id, name …"""


class Conversation(NamedTuple):
    messages: list[Message]
    tools: list[dict[str, Any]] | None


class TextColumns(NamedTuple):
    """finetune.text_column and finetune.label_column."""

    text: str = "text"
    label: str = "label"


@dataclass(frozen=True, kw_only=True)
class Format:
    """One way to write conversations in rows."""

    name: str
    """The value of finetune.format."""
    title: str
    needs: Callable[[TextColumns], tuple[str, ...]]
    """The columns that identify it."""
    may: tuple[str, ...] = ()
    """More columns that it reads, besides COMMON_COLUMNS."""
    messages: Callable[[Row, TextColumns], list[Message]]


def find_format(row: Row, columns: TextColumns) -> Format:
    """The format whose columns a row has. Raises DataError if there is none.

    The first in the table, except that columns which the config names come before those which it does not.
    """
    there = set(row.values)
    if _is_messages(row.values.get(columns.text)):
        return FORMATS["messages"]
    if columns != TextColumns() and there.issuperset(columns):
        return next((f for f in FORMATS.values() if set(f.needs(columns)) == set(columns)), FORMATS["columns"])
    for one in FORMATS.values():
        if there.issuperset(one.needs(columns)):
            return one
    known = "; ".join(f"{', '.join(f.needs(columns))} ({f.title})" for f in FORMATS.values())
    fix = "rename the columns, or name yours with finetune.text_column and finetune.label_column"
    raise row.error("columns", ", ".join(map(str, row.values)) or "none", f"those of a conversation: {known}", fix)


def read_conversation(row: Row, form: Format, columns: TextColumns, remarks: Remarks) -> Conversation:
    """Raises DataError for a row that is no conversation, or that teaches nothing."""
    messages = form.messages(row, columns)
    if "system" not in form.needs(columns):
        messages = _with_system(row, messages)
    if not any(message.role == "assistant" and message.learned for message in messages):
        found = f"{len(messages)} messages"
        raise row.error(form.needs(columns)[0], found, "at least one of the assistant, to learn from")
    own = form.needs(columns)
    read = {*((_list_column(row, columns, own[0]),) if form.name in LISTS else own), *form.may, *COMMON_COLUMNS}
    for column in row.unread(read):
        remarks.saw(f"column {column!r} is not read (finetune.format={form.name})", row.place)
    return Conversation(messages, _tools(row))


def _with_system(row: Row, messages: list[Message]) -> list[Message]:
    """After the text of the column `system`, if there is one."""
    system = _optional_text(row, "system")
    if system and messages[0].role == "system":
        raise row.error("system", system, "no system text beside the one in the messages", "remove one of them")
    return [Message(role="system", content=system), *messages] if system else messages


# ── the formats ────────────────────────────────────────────────────────────────────────────────────────────────────


def _from_list(own_column: str) -> Callable[[Row, TextColumns], list[Message]]:
    """Reader of a list of messages in this column, or in finetune.text_column."""

    return lambda row, columns: _messages(row, _list_column(row, columns, own_column))


def _list_column(row: Row, columns: TextColumns, own_column: str) -> str:
    is_named = columns.text != TextColumns().text and columns.text in row.values
    return columns.text if is_named or _is_messages(row.values.get(columns.text)) else own_column


def _is_messages(value: object) -> bool:
    """A list of objects, or JSON text of one: a question may be a list of other things."""
    return any(isinstance(one, Mapping) for one in _list_of(value) or ())


def _from_alpaca(row: Row, columns: TextColumns) -> list[Message]:
    """The input stands below the instruction."""
    asked = "\n".join(text for text in (row.text("instruction"), _optional_text(row, "input")) if text)
    return _question_and_answer(row, asked, row.text("output"))


def _from_prompt(row: Row, columns: TextColumns) -> list[Message]:
    """Texts, or lists of messages, of which only those of the completion are learned."""
    parts = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if _list_of(row.value(column)) is None:
            parts.append([Message(role=role, content=_checked(row, column, row.text(column)))])
        else:
            parts.append(_messages(row, column))
    prompt, completion = parts
    return [*(replace(message, learned=False) for message in prompt), *completion]


def _from_columns(row: Row, columns: TextColumns) -> list[Message]:
    return _question_and_answer(row, row.text(columns.text), row.text(columns.label))


def _question_and_answer(row: Row, question: str, answer: str) -> list[Message]:
    return [
        Message(role="user", content=_checked(row, "question", question)),
        Message(role="assistant", content=_checked(row, "answer", answer)),
    ]


LISTS = ("messages", "sharegpt")
"""Formats that are a list of messages in one column."""
FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        Format(
            name="messages",
            title="OpenAI's messages",
            needs=lambda columns: ("messages",),
            messages=_from_list("messages"),
        ),
        Format(
            name="sharegpt",
            title="ShareGPT's conversations",
            needs=lambda columns: ("conversations",),
            messages=_from_list("conversations"),
        ),
        Format(
            name="alpaca",
            title="Alpaca's instruction, input and output",
            needs=lambda columns: ("instruction", "output"),
            may=("input",),
            messages=_from_alpaca,
        ),
        Format(
            name="prompt",
            title="prompt and completion",
            needs=lambda columns: ("prompt", "completion"),
            messages=_from_prompt,
        ),
        Format(
            name="columns",
            title="a text and its answer",
            needs=lambda columns: tuple(columns),
            messages=_from_columns,
        ),
    )
}
"""finetune.format -> the format."""


# ── values ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _messages(row: Row, column: str) -> list[Message]:
    value = row.value(column)
    found = _list_of(value)
    if not found:
        raise row.error(column, value, "a list of messages, or JSON text of one")
    return [_message(row, column, one) for one in found]


def _list_of(value: object) -> list[Any] | None:
    """A list, or the list that a JSON text holds; None if it is neither."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    return value if isinstance(value, list) else None


def _message(row: Row, column: str, found: object) -> Message:
    values = {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
    role_key, content_key = (next((k for k in keys if k in values), "") for keys in (ROLE_KEYS, CONTENT_KEYS))
    name, content = values.pop(role_key, None), _content(row, column, found, values.pop(content_key, None))
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise row.error(column, found, f"messages with a role, one of {', '.join(ROLES)}")
    weights = [_is_learned(row, column, key, role, values.pop(key)) for key in WEIGHT_KEYS if key in values]
    calls = values.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise row.error(column, calls, "tool_calls that are a list of objects")
    if role == "assistant" and not calls and not (content or "").strip():
        raise row.error(column, found, "messages of the assistant with content that is not empty, or with tool_calls")
    if role == "user" and not (content or "").strip():
        raise row.error(column, found, "messages of the user with content that is not empty")
    if role != "assistant" and content is None:
        content = ""
    return Message(role=role, content=content, learned=all(weights), others=values)


def _content(row: Row, column: str, found: object, content: object) -> str | None:
    """A text, or the texts of its parts, one after the other; None if there is none."""
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict) and part.get("type") == "text"]
        if len(texts) < len(content) or not all(isinstance(text, str) for text in texts):
            expected = "content that is a text, or parts {type: text, text: …}: a model of text reads no others"
            raise row.error(column, found, expected)
        content = "".join(map(str, texts))
    if content is not None and not isinstance(content, str):
        raise row.error(column, found, "content that is a text, null, or a list of parts {type: text, text: …}")
    return None if content is None else _checked(row, column, content)


def _checked(row: Row, column: str, text: str) -> str:
    if BEGIN in text or END in text:
        raise row.error(column, text, "text without U+FDD0 and U+FDD1, which Unicode keeps for programs")
    return text


def _is_learned(row: Row, column: str, key: str, role: str, value: object) -> bool:
    if value not in (0, 1) or isinstance(value, str):
        raise row.error(column, value, f"a {key} of 0 or 1, or of false or true")
    if value and role != "assistant":
        raise row.error(column, value, f"no {key} on messages of {role}: only the assistant's are learned", "remove it")
    return bool(value)


def _optional_text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise row.error(column, value, "a text, or nothing")
    return _checked(row, column, value) if value and value.strip() else ""


def _tools(row: Row) -> list[dict[str, Any]] | None:
    value = row.values.get("tools")
    if value in (None, "", []):
        return None
    found = _list_of(value)
    if found is None or not all(isinstance(tool, dict) for tool in found):
        raise row.error("tools", value, "a list of objects that describe functions, or JSON text of one")
    return found or None


# ── preferences ────────────────────────────────────────────────────────────────────────────────────────────────────


def read_preference(row: Row, remarks: Remarks) -> tuple[Conversation, Conversation]:
    """The conversation with the chosen answer, and the one with the rejected answer: columns chosen and rejected, texts
    or lists of messages, after a prompt or with it at their beginning, as TRL reads them.

    Learned is what follows the messages that both begin with. Raises DataError for a row that is no such pair.
    """
    prompt = [] if row.values.get("prompt") in (None, "", []) else _completion(row, "prompt", "user")
    both = [_completion(row, column, "assistant") for column in ("chosen", "rejected")]
    if not all(messages[: len(prompt)] == prompt for messages in both):  # else whole conversations repeat it
        if any(messages[0].role in ("system", "user") for messages in both) and prompt[-1].role != "system":
            raise row.error(
                "prompt", row.values["prompt"], "the beginning of chosen and rejected, which are whole texts"
            )
        both = [[*prompt, *messages] for messages in both]
    both = [_with_system(row, messages) for messages in both]
    same = 0
    while same < min(map(len, both)) and both[0][same] == both[1][same]:
        same += 1
    pair = [
        [replace(message, learned=message.learned and i >= same) for i, message in enumerate(messages)]
        for messages in both
    ]
    for column, messages in zip(("chosen", "rejected"), pair):
        if not same:
            raise row.error(column, row.value(column), "an answer after a prompt that both answers have")
        if not any(message.role == "assistant" and message.learned for message in messages):
            raise row.error(column, row.value(column), "an answer of the assistant that the other one has not")
    read = {"prompt", "chosen", "rejected", *COMMON_COLUMNS}
    for column in row.unread(read):
        remarks.saw(f"column {column!r} is not read (objective.name=dpo)", row.place)
    tools = _tools(row)
    return Conversation(pair[0], tools), Conversation(pair[1], tools)


def _completion(row: Row, column: str, role: str) -> list[Message]:
    """A list of messages, or a text as one of this role."""
    if _list_of(row.value(column)) is not None:
        return _messages(row, column)
    return [Message(role=role, content=_checked(row, column, row.text(column)))]
