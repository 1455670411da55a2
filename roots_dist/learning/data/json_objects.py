"""Objects of JSON, as lines and tables hold them: parsed, and their values found under a key.

bytes --parsed_object--> {key: value, …} --value_at--> text --> readers.py, rows.py
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from io import BufferedIOBase
from typing import Any, NamedTuple

BLANK = b" \t\r\n\xef\xbb\xbf"
"""Bytes that may stand before JSON: white space, and UTF-8's byte order mark."""
CHUNK = 1 << 16
"""Bytes of a list that are read at a time."""
AFTER = {"[": "v]", ",": "v", "]": ""}
"""Mark of a list -> what may follow it: a value (v) or other marks."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these keys and values. Raises ValueError for a key that stands twice: the last would win."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_once)


class Wrong(NamedTuple):
    """The reason why JSON cannot be read."""

    kind: str
    detail: str


def parsed_object(data: bytes) -> dict[str, Any] | Wrong:
    """The JSON object of a line; or what is wrong with it."""
    try:
        value = DECODER.decode(data.rstrip().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return Wrong("bad UTF-8", f"at byte {error.start} of the line")
    except json.JSONDecodeError as error:
        return Wrong("corrupt JSON", f"{error.msg} at character {error.pos}")
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or endless brackets
        return Wrong("corrupt JSON", str(error))
    if not isinstance(value, dict):
        return Wrong("not a JSON object", f"{type(value).__name__}; one object per line is expected")
    return value


def listed_objects(content: BufferedIOBase, limit: int) -> Iterator[tuple[int, dict[str, Any] | Wrong]]:
    """The objects of a file that is one JSON list, each with the line on which it begins; where the list is damaged,
    what is wrong comes last. Holds one object at a time, of at most `limit` characters."""
    decode = codecs.getincrementaldecoder("utf-8-sig")()
    text, line, ended, allowed, reason = "", 1, False, "[", "the list does not end"
    while not (ended and (not text or not allowed)):
        stripped = text.lstrip(" \t\r\n")
        line, text = line + text.count("\n", 0, len(text) - len(stripped)), stripped
        if text[:1] in AFTER and text[0] in allowed:
            allowed, text = AFTER[text[0]], text[1:]
            continue
        if text and "v" in allowed:
            try:
                value, end = DECODER.raw_decode(text)
                if ended or end < len(text):  # a number may go on
                    wrong = Wrong("not a JSON object", f"{type(value).__name__} in a list of objects")
                    yield line, value if isinstance(value, dict) else wrong
                    line, text, allowed = line + text.count("\n", 0, end), text[end:], ",]"
                    continue
            except json.JSONDecodeError as error:
                reason = error.msg
            except (ValueError, RecursionError) as error:
                yield line, Wrong("corrupt JSON", str(error))
                return
        elif text:
            reason = "an object is followed by neither a comma nor the end of the list"
            break
        if ended or len(text) > limit:
            break
        try:
            data = content.read(max(CHUNK, len(text)))
            ended, text = not data, text + decode.decode(data, final=not data)
        except UnicodeDecodeError as error:
            yield line, Wrong("bad UTF-8", f"{error.reason} in or after the object of this line")
            return
    if allowed or text:
        yield line, Wrong("corrupt JSON", reason if allowed else "something follows the list")


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
