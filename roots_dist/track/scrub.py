"""Take secrets out of what is sent or stored: passwords in URLs, values of *_KEY, *_TOKEN, *_SECRET, *_PASSWORD."""

from __future__ import annotations

import re
from collections.abc import Mapping

HIDDEN = "***"
WORDS = "key|token|secret|password|passwd|credentials"
SECRET_NAME = re.compile(rf"(?i)(^|[_-]|api|access)({WORDS})$")
IN_URL = re.compile(r"(?<=://)[^/\s@:]*:[^/\s@]*(?=@)")
VALUE = r"""("[^"]*"|'[^']*'|[^\s"',;]+)"""
ASSIGNED = re.compile(rf"(?i)\b([\w-]*(?:{WORDS})\s*[=:]\s*){VALUE}")
OPTION_NAME = re.compile(rf"(?i)--[\w-]*(?:{WORDS})")
OPTION = re.compile(rf"(?i)(--[\w-]*(?:{WORDS})\s+){VALUE}")


def scrub(value: object) -> object:
    """The same tree of mappings, lists and texts without its secrets."""
    if isinstance(value, Mapping):
        return {k: HIDDEN if v and SECRET_NAME.search(str(k)) else scrub(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):  # of a command line's words the one after --api-key is the secret
        return [HIDDEN if OPTION_NAME.fullmatch(str(before)) else scrub(v) for before, v in zip(["", *value], value)]
    if isinstance(value, str):
        return scrub_text(value)
    return value


def scrub_text(text: str) -> str:
    text = IN_URL.sub(HIDDEN, text)
    for pattern in (ASSIGNED, OPTION):
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text
