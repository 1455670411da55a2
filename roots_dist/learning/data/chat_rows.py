"""Answers to rows of conversations that were given to `roots prepare`, which reads documents.

    row without the text key --chat_fix--> "train on these chats as they are: roots finetune CONFIG ..."

Which columns make a conversation is in conversations.py; here it is enough that they look like one.
"""

from __future__ import annotations

from collections.abc import Mapping
from shlex import quote
from typing import Any

from roots_dist.learning.data.conversations import FORMATS, PAIR, TextColumns
from roots_dist.learning.data.messages import ROLE_KEYS, list_of

ASKED = ("prompt", "instruction", "question", "query", "input", "user", "human", "problem")
ANSWERED = ("completion", "response", "output", "answer", "assistant", "reply", "gpt", "solution", "target")
"""Usual names of the columns of a question and of its answer."""


def _are_messages(value: object) -> bool:
    """True for a list of messages, or JSON text of one."""
    listed = list_of(value) or ()
    return any(isinstance(one, Mapping) and any(key in one for key in ROLE_KEYS) for one in listed)


def chat_fix(row: Mapping[str, Any], file: str) -> str | None:
    """The fix that trains on a row of conversations; None if it is none."""
    columns, beside = {str(key).lower(): str(key) for key in row}, ""
    words = ["objective.name=instruct"]
    if set(PAIR) <= set(columns):
        words = ["objective.name=dpo"]
    elif (lists := [key for key, value in row.items() if _are_messages(value)]) and lists[0] not in _known():
        words.append(f"finetune.text_column={quote(lists[0])}")
    elif not lists:
        asked = next((columns[name] for name in ASKED if name in columns), None)
        answered = next((columns[name] for name in ANSWERED if name in columns), None)
        if asked is None or answered is None:
            return None
        beside = f", or read one of their texts with --text-key {asked}"
        if not any({asked, answered} <= set(form.needs(TextColumns())) for form in FORMATS.values()):
            words += [f"finetune.text_column={quote(asked)}", f"finetune.label_column={quote(answered)}"]
    command = f"roots finetune CONFIG finetune.init_from=RUN data.train={quote(file)} {' '.join(words)}"
    return f"train on these chats as they are, {command}{beside}"


def _known() -> set[str]:
    """Columns that a format finds by itself."""
    return {column for form in FORMATS.values() for column in form.needs(TextColumns())}
