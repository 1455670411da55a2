"""Mistakes in the messages of a conversation -> what was expected instead, and how to mend it.

    {'role': 'user', 'text': 'hi'} --no_text--> "messages of the user with content …", "rename text to content …"

messages.py reads messages, and asks here when it cannot.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

THIS_LINE = "correct this line"
MEANT = {
    "bot": "assistant", "chatbot": "assistant", "agent": "assistant", "answer": "assistant", "output": "assistant",
    "response": "assistant", "claude": "assistant", "llm": "assistant", "person": "user", "prompter": "user",
    "customer": "user", "client": "user", "question": "user", "instruction": "user", "input": "user", "prompt": "user",
    "instructor": "system", "context": "system", "sys": "system",
}  # fmt: skip
"""Name of a role that no common format has, in lower case -> the role that it may mean. It is proposed, not taken."""
ROLES_MEANT = ("speaker", "sender", "author", "name", "type", "who")
"""Keys that other programs use for a role."""
TEXTS_MEANT = ("text", "message", "msg", "utterance", "body", "contents", "data")
"""Keys that other programs use for a text."""


class Mistake(NamedTuple):
    """The expected value, and the fix."""

    expected: str
    fix: str = THIS_LINE


def no_list(value: object) -> Mistake:
    """A value that is no list of messages, or an empty one."""
    if value == [] or (isinstance(value, str) and value.strip() in ("", "[]")):
        return Mistake("at least one message", "remove this line")
    if isinstance(value, Mapping):
        return Mistake("a list of messages, or JSON text of one; this is one object", "put it into a list: [{…}, …]")
    expected = "a list of messages, or JSON text of one"
    if isinstance(value, str) and _is_python(value):
        return Mistake(f"{expected}; this text is Python's", "write the column with json.dumps instead of str")
    return Mistake(expected)


def no_role(found: object, name: object, roles: Collection[str], keys: Collection[str]) -> Mistake:
    """A message without a role that is known. name: what stands for it. keys: those of a role, and of a text."""
    role_key = next(iter(keys))
    if not isinstance(found, Mapping):
        return Mistake("messages that are objects with role and content", 'write {"role": "user", "content": "…"}')
    expected = "messages with a role: system, developer, user, assistant or tool (or human, gpt and others of ShareGPT)"
    if isinstance(name, str):
        plain = name.strip().lower()
        near = difflib.get_close_matches(plain, [*roles, *MEANT], 1, 0.8)
        right = plain if plain in roles else MEANT.get(plain) or (MEANT.get(near[0], near[0]) if near else None)
        return Mistake(expected, f"write {right} for {name!r} in all lines" if right else THIS_LINE)
    if name is not None:
        return Mistake(expected)
    if (pair := next((key for key in found if str(key).lower() in roles), None)) is not None:
        return Mistake(expected, f'write {{"role": "{pair}", "content": …}} for {{"{pair}": …}} in all lines')
    other = next((key for key in found if str(key).lower() in ROLES_MEANT), None) or _misspelt(found, keys, role_key)
    return Mistake(expected, f"rename {other} to {role_key} in all lines" if other else THIS_LINE)


def no_text(found: object, role: str, keys: Collection[str]) -> Mistake:
    """A message of a user or an assistant without text. keys: those of a text."""
    assert isinstance(found, Mapping), "what has a role is an object"
    expected = f"messages of the {role} with content that is not empty"
    if role == "assistant":
        expected += ", or with tool_calls"
    text_key = next(iter(keys))
    if any(key in found for key in keys):
        return Mistake(expected, "correct or remove this line")
    other = next((key for key in found if str(key).lower() in TEXTS_MEANT), None) or _misspelt(found, keys, text_key)
    return Mistake(expected, f"rename {other} to {text_key} in all lines" if other else THIS_LINE)


def _misspelt(found: Mapping[str, Any], keys: Collection[str], right: str) -> str | None:
    """The key of a message that is another spelling of `right`; None if there is none."""
    others = {str(key).strip().lower(): str(key) for key in found if key not in keys}
    near = difflib.get_close_matches(right, others, 1, 0.7)
    return others[near[0]] if near else None


def _is_python(text: str) -> bool:
    """True for the text of a list as Python prints it."""
    try:
        return isinstance(ast.literal_eval(text.strip()), list)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return False
