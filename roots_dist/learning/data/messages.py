"""Messages of a conversation in a row, as OpenAI, ShareGPT and others write them, in the words of chat templates.

value of a column --read_messages--> [ChatMessage] --> learning/data/conversations.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from roots_dist.learning.data.columns import fix_to_rename
from roots_dist.learning.data.message_mistakes import no_list, no_role, no_text
from roots_dist.learning.data.rows import Row
from roots_dist.learning.data.templates import BEGIN, END

ROLES = {
    "system": "system", "developer": "developer", "user": "user", "assistant": "assistant", "tool": "tool",
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "ai": "assistant", "model": "assistant", "observation": "tool", "function": "tool", "function_response": "tool",
}  # fmt: skip
"""Name of a role in data sets, in lower case -> its name in chat templates."""
CALLS = ("function_call", "tool_call")
"""ShareGPT's roles of a message whose text is a call of a function by the assistant."""
OLDER_CALL = "function_call"
"""Key of a message that holds one call, in OpenAI's older messages."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
"""Keys of a message: OpenAI's, ShareGPT's."""
WEIGHT_KEYS = ("weight", "train", "training")
"""Keys of a message that say whether it is learned: 0 or 1, or false or true."""


@dataclass(frozen=True, kw_only=True)
class ChatMessage:
    """One message, in the words of chat templates."""

    role: str
    content: str | None
    """None: the assistant only calls tools."""
    learned: bool = True
    """True if this message is learned, provided that it is the assistant's."""
    others: Mapping[str, Any] = field(default_factory=dict)
    """Other fields of the message, under the names that templates read: tool_calls, tool_call_id, name …"""


def own_text(row: Row, column: str) -> str:
    """The text of a column whose name the format sets."""
    return row.text(column, fix_to_rename)


def read_messages(row: Row, column: str) -> list[ChatMessage]:
    value = row.value(column, fix_to_rename)
    found = list_of(value)
    if not found:
        raise row.error(column, value, *no_list(value))
    return [_message(row, column, one) for one in found]


def list_of(value: object) -> list[Any] | None:
    """A list, or the list that a JSON text holds, or that an object of equally long lists means, as tables of Hugging
    Face hold a list of objects; None if it is none of them."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, Mapping) and value and all(isinstance(column, list) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        return [dict(zip(value, row)) for row in zip(*value.values())] if len(lengths) == 1 else None
    return value if isinstance(value, list) else None


def _message(row: Row, column: str, found: object) -> ChatMessage:
    values = {key: value for key, value in found.items() if value is not None} if isinstance(found, dict) else {}
    role_key, content_key = (next((k for k in keys if k in values), "") for keys in (ROLE_KEYS, CONTENT_KEYS))
    name, content = values.pop(role_key, None), _content(row, column, found, values.pop(content_key, None))
    if name in CALLS:
        values["tool_calls"], name, content = _calls(row, column, content), "assistant", None
    if OLDER_CALL in values and "tool_calls" not in values:
        values["tool_calls"] = _calls(row, column, values.pop(OLDER_CALL))
    role = ROLES.get(name.lower()) if isinstance(name, str) else None
    if role is None:
        raise row.error(column, found, *no_role(found, name, (*ROLES, *CALLS), ROLE_KEYS))
    weights = [_is_learned(row, column, key, role, values.pop(key)) for key in WEIGHT_KEYS if key in values]
    calls = list_of(given := values.get("tool_calls"))
    if given is not None:
        if calls is None or not all(isinstance(call, Mapping) for call in calls):
            raise row.error(column, given, "tool_calls that are a list of objects, or JSON text of one")
        values["tool_calls"] = calls
    if (role == "user" or (role == "assistant" and not calls)) and not (content or "").strip():
        raise row.error(column, found, *no_text(found, role, CONTENT_KEYS))
    if role != "assistant" and content is None:
        content = ""
    return ChatMessage(role=role, content=content, learned=all(weights), others=values)


def _calls(row: Row, column: str, given: object) -> list[dict[str, Any]]:
    """Calls of functions that ShareGPT writes as JSON text and OpenAI's older messages as an object, as chat templates
    read them."""
    value = given
    if isinstance(given, str) or given is None:
        try:
            value = json.loads(given or "")
        except (ValueError, RecursionError):
            value = None
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise row.error(
            column, given, 'a call of a function as JSON text, {"name": …, "arguments": {…}}, or a list of them'
        )
    return [{"type": "function", "function": call} for call in calls]


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
    return None if content is None else checked_text(row, column, content)


def checked_text(row: Row, column: str, text: str) -> str:
    if BEGIN in text or END in text:
        raise row.error(column, text, "text without U+FDD0 and U+FDD1, which Unicode keeps for programs")
    return text


def _is_learned(row: Row, column: str, key: str, role: str, value: object) -> bool:
    if value not in (0, 1) or isinstance(value, str):
        raise row.error(column, value, f"a {key} of 0 or 1, or of false or true")
    if value and role != "assistant":
        raise row.error(column, value, f"no {key} on messages of {role}: only the assistant's are learned", "remove it")
    return bool(value)


def optional_text(row: Row, column: str) -> str:
    value = row.values.get(column)
    if value is not None and not isinstance(value, str):
        raise row.error(column, value, "a text, or nothing")
    return checked_text(row, column, value) if value and value.strip() else ""


def read_tools(row: Row) -> list[dict[str, Any]] | None:
    value = row.values.get("tools")
    if value in (None, "", []):
        return None
    found = list_of(value)
    if found is None or not all(isinstance(tool, dict) for tool in found):
        raise row.error("tools", value, "a list of objects that describe functions, or JSON text of one")
    return found or None
