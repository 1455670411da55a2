"""Objects of JSON, as lines and tables hold them: parsed, and their values found under a key.

bytes --parsed_object--> {key: value, …} --value_at--> text --> readers.py, rows.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any


def parsed_object(data: bytes) -> dict[str, Any] | tuple[str, str]:
    """The JSON object of a line; or what is wrong with it, as (kind, detail)."""
    try:
        value = json.loads(data.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return "bad UTF-8", f"at byte {error.start} of the line"
    except json.JSONDecodeError as error:
        return "corrupt JSON", f"{error.msg} at character {error.pos}"
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or endless brackets
        return "corrupt JSON", str(error)
    if not isinstance(value, dict):
        return "not a JSON object", f"{type(value).__name__}; one object per line is expected"
    return value


MISSING: Any = object()
"""The value under a key that an object does not have."""
TEXT_KEYS = ("text", "content", "body", "document", "article", "raw_content")
"""Keys that corpora often keep a text under."""


def value_at(value: object, key: str) -> Any:
    """The value under a key; where there is none of this name, `a.b` is b of a. MISSING if there is neither."""
    if not isinstance(value, Mapping):
        return MISSING
    if key in value:
        return value[key]
    heads = [key[:i] for i, letter in enumerate(key) if letter == "." and key[:i] in value]
    found = (value_at(value[head], key[len(head) + 1 :]) for head in heads)
    return next((one for one in found if one is not MISSING), MISSING)


def likely_text_key(value: Mapping[str, Any]) -> str:
    """The key of an object that may be meant for its text: a usual name, or that of the longest text."""
    texts = dict(_texts(value))
    usual = (key for name in TEXT_KEYS for key in texts if key.rpartition(".")[2] == name)
    return next(usual, max(texts, key=lambda key: len(texts[key]), default="KEY"))


def _texts(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Each text of an object and of the objects in it, with its key."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _texts(inner, f"{above}{key}.")
        elif isinstance(inner, str):
            yield f"{above}{key}", inner
