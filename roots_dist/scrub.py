"""Remove secrets from whatever is sent or stored: by name, by place, by format, and by value.

    names    *_KEY, *_TOKEN, *SECRET*, *PASSWORD … as keys of a mapping, in NAME=value, after --name
    places   https://user:password@host, Authorization: Bearer …, ?token=…&signature=…
    formats  tokens of GitHub, GitLab, Hugging Face, OpenAI, AWS and Slack, and JSON web tokens
    values   the values of environment variables with such names, wherever they occur

Applied to everything that trackers and reports receive besides numbers. A false alarm is better than a leak.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, overload

from roots_dist import environment

HIDDEN = "***"
SHORTEST = 8
"""Shorter values of variables with such names are not searched for: `1` and `true` occur everywhere."""
WORDS = "key|token|secret|password|passwd|passphrase|pwd|credentials?|signature|sig"
SECRET_NAME = re.compile(rf"(?i)(^|[_-]|api|access)({WORDS})$|secret|password|passwd|credential")
IN_URL = re.compile(r"(?<=://)[^/\s]+(?=@)")
VALUE = r"""("[^"]*"|'[^']*'|[^\s"',;]+)"""
ASSIGNED = re.compile(rf"(?i)\b([\w-]*(?:{WORDS})\s*[=:]\s*){VALUE}")
OPTION_NAME = re.compile(rf"(?i)--[\w-]*(?:{WORDS})")
OPTION = re.compile(rf"(?i)(--[\w-]*(?:{WORDS})\s+){VALUE}")
BEARER = re.compile(r"(?i)(\bbearer\s+)([\w.~+/=-]{8,})")
LOOKS = re.compile(
    r"\b(gh[opsur]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|hf_\w{16,}|sk-[\w-]{16,}|AKIA[0-9A-Z]{16}"
    r"|xox[abprs]-[\w-]{10,}|eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*)"
)


def known_secrets() -> frozenset[str]:
    """Values of environment variables whose names look like those of secrets."""
    return frozenset(value for value in environment.values(SECRET_NAME) if len(value) >= SHORTEST)


@overload
def scrub(value: Mapping[str, object], known: Collection[str] = ()) -> dict[str, Any]: ...
@overload
def scrub(value: object, known: Collection[str] = ()) -> object: ...
def scrub(value: object, known: Collection[str] = ()) -> object:
    """Return the same tree of mappings, lists and texts without its secrets."""
    if isinstance(value, Mapping):
        return {
            scrub(k, known): HIDDEN if v and SECRET_NAME.search(str(k)) else scrub(v, known) for k, v in value.items()
        }
    if isinstance(value, (list, tuple)):  # in a command line, the word after --api-key is the secret
        before = ["", *value]
        return [HIDDEN if OPTION_NAME.fullmatch(str(b)) else scrub(v, known) for b, v in zip(before, value)]
    if isinstance(value, str):
        return scrub_text(value, known)
    return value


def scrub_text(text: str, known: Collection[str] = ()) -> str:
    """Replace every secret in a text."""
    for secret in sorted(known, key=len, reverse=True):  # longest first: one secret may contain another
        text = text.replace(secret, HIDDEN)
    text = LOOKS.sub(HIDDEN, IN_URL.sub(HIDDEN, text))
    for pattern in (BEARER, ASSIGNED, OPTION):
        text = pattern.sub(rf"\g<1>{HIDDEN}", text)
    return text
