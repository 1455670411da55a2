"""Rows to conversations: a table of formats, found by their columns, and one record for a message of any of them.

    Row --find_format--> Format --read_conversation--> Conversation(messages, tools) --> learning/data/turns.py

Nothing of a row is dropped without a word: columns that no one reads are remarks, and a message that cannot be kept as
it is raises a DataError with file and line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from roots_dist.learning.data.columns import fix_of_format, fix_to_rename
from roots_dist.learning.data.messages import (
    ChatMessage,
    checked_text,
    list_of,
    optional_text,
    own_text,
    read_messages,
    read_tools,
)
from roots_dist.learning.data.remarks import Remarks, counted
from roots_dist.learning.data.rows import Row

COMMON_COLUMNS = ("system", "tools")
"""Columns that every format may have: text of a system message, and descriptions of functions."""


PAIR = ("chosen", "rejected")
"""Columns of a pair of answers."""


class Conversation(NamedTuple):
    messages: list[ChatMessage]
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
    messages: Callable[[Row, TextColumns], list[ChatMessage]]


def find_format(row: Row, columns: TextColumns) -> Format:
    """The format whose columns a row has. Raises DataError if there is none.

    The first in the table, except that columns which the config names come before those which it does not.
    """
    filled = {column for column, value in row.values.items() if value is not None}
    there = set(row.values)
    if _is_messages(row.values.get(columns.text)):
        return FORMATS["messages"]
    if columns != TextColumns() and there.issuperset(columns):
        return next((f for f in FORMATS.values() if set(f.needs(columns)) == set(columns)), FORMATS["columns"])
    for given in (filled, there):  # a table has the columns of all its rows
        for one in FORMATS.values():
            if given.issuperset(one.needs(columns)):
                return one
    known = "; ".join(f"{', '.join(f.needs(columns))} ({f.title})" for f in FORMATS.values())
    lists = [column for column, value in row.values.items() if _is_messages(value)]
    fix = fix_of_format(there, lists, [f.needs(columns) for f in FORMATS.values()])
    if there.issuperset(PAIR):
        fix = "set objective.name=dpo, which learns from a chosen and a rejected answer"
    raise row.error("columns", ", ".join(map(str, row.values)) or "none", f"those of a conversation: {known}", fix)


def read_conversation(row: Row, form: Format, columns: TextColumns, remarks: Remarks) -> Conversation:
    """Raises DataError for a row that is no conversation, or that teaches nothing."""
    messages = form.messages(row, columns)
    if "system" not in form.needs(columns):
        messages = _with_system(row, messages)
    if not any(message.role == "assistant" and message.learned for message in messages):
        expected = "at least one message of the assistant that is learned"
        raise row.error(form.needs(columns)[0], counted(len(messages), "message"), expected)
    own = form.needs(columns)
    read = {*((_list_column(row, columns, own[0]),) if form.name in LISTS else own), *form.may, *COMMON_COLUMNS}
    for column in row.unread(read):
        remarks.saw(f"column {column!r} is not read (finetune.format={form.name})", row.place)
    return Conversation(messages, read_tools(row))


def _with_system(row: Row, messages: list[ChatMessage]) -> list[ChatMessage]:
    """Put the text of the column `system`, if there is one, before the messages."""
    system = optional_text(row, "system")
    if system and messages[0].role == "system":
        raise row.error("system", system, "no system text beside the one in the messages", "remove one of them")
    return [ChatMessage(role="system", content=system), *messages] if system else messages


# ── the formats ────────────────────────────────────────────────────────────────────────────────────────────────────


def _from_list(own_column: str) -> Callable[[Row, TextColumns], list[ChatMessage]]:
    """Reader of a list of messages in this column, or in finetune.text_column."""

    return lambda row, columns: read_messages(row, _list_column(row, columns, own_column))


def _list_column(row: Row, columns: TextColumns, own_column: str) -> str:
    is_named = columns.text != TextColumns().text and columns.text in row.values
    return columns.text if is_named or _is_messages(row.values.get(columns.text)) else own_column


def _is_messages(value: object) -> bool:
    """True for a list of objects, or JSON text of one: a question may be a list of other things."""
    return any(isinstance(one, Mapping) for one in list_of(value) or ())


def _from_alpaca(row: Row, columns: TextColumns) -> list[ChatMessage]:
    """The input stands below the instruction."""
    asked = "\n".join(text for text in (own_text(row, "instruction"), optional_text(row, "input")) if text)
    return _question_and_answer(row, asked, own_text(row, "output"))


def _from_prompt(row: Row, columns: TextColumns) -> list[ChatMessage]:
    """Texts, or lists of messages, of which only those of the completion are learned."""
    parts = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if list_of(row.value(column, fix_to_rename)) is None:
            parts.append([ChatMessage(role=role, content=checked_text(row, column, row.text(column)))])
        else:
            parts.append(read_messages(row, column))
    prompt, completion = parts
    return [*(replace(message, learned=False) for message in prompt), *completion]


def _from_columns(row: Row, columns: TextColumns) -> list[ChatMessage]:
    return _question_and_answer(row, row.text(columns.text), row.text(columns.label))


def _question_and_answer(row: Row, question: str, answer: str) -> list[ChatMessage]:
    return [
        ChatMessage(role="user", content=checked_text(row, "question", question)),
        ChatMessage(role="assistant", content=checked_text(row, "answer", answer)),
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


# ── preferences ────────────────────────────────────────────────────────────────────────────────────────────────────


def read_preference(row: Row, remarks: Remarks) -> tuple[Conversation, Conversation]:
    """The conversation with the chosen answer, and the one with the rejected answer: columns chosen and rejected, texts
    or lists of messages, after a prompt or with it at their beginning, as TRL reads them.

    Learned is what follows the messages that both begin with. Raises DataError for a row that is no such pair.
    """
    prompt = [] if row.values.get("prompt") in (None, "", []) else _completion(row, "prompt", "user")
    both = [_completion(row, column, "assistant") for column in PAIR]
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
    for column, messages in zip(PAIR, pair):
        if not same:
            raise row.error(column, row.value(column), "an answer after a prompt that both answers have")
        if not any(message.role == "assistant" and message.learned for message in messages):
            raise row.error(column, row.value(column), "an answer of the assistant that the other one has not")
    read = {"prompt", "chosen", "rejected", *COMMON_COLUMNS}
    for column in row.unread(read):
        remarks.saw(f"column {column!r} is not read (objective.name=dpo)", row.place)
    tools = read_tools(row)
    return Conversation(pair[0], tools), Conversation(pair[1], tools)


def _completion(row: Row, column: str, role: str) -> list[ChatMessage]:
    """A list of messages, or a text as one of this role."""
    if list_of(row.value(column, fix_to_rename)) is not None:
        return read_messages(row, column)
    return [ChatMessage(role=role, content=checked_text(row, column, row.text(column)))]
