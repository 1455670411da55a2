"""The values that an answer tells to write for a key: never a value that the key itself refuses.

model.layers, "1k" --instead--> "write model.layers=1000 (number of Transformer blocks)"
model.layers, "0"  --instead--> "give model.layers a whole number greater than or equal to 1 (number of ...)"
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from roots_dist.config import text
from roots_dist.config.other_names import value_for
from roots_dist.config.overrides import number_meant
from roots_dist.config.sections import ConfigTree
from roots_dist.errors import ConfigError

SECTION = ("model_type", "model_attributes_type", "dict_type")
"""Kinds of pydantic's errors about what should be a section."""
_WORDS = dict.fromkeys(SECTION, "a section with keys") | {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "missing": "a value",
}
"""Kind of pydantic's error -> expected value, as a writer of YAML says it."""
_NUMBERS = ("int_type", "float_type")
SWITCHES = {
    **dict.fromkeys(("true", "yes", "on", "y", "t", "1", "enable", "enabled"), "true"),
    **dict.fromkeys(("false", "no", "off", "n", "f", "0", "disable", "disabled", "none"), "false"),
}
"""Words for a switch -> the one of YAML."""
_LIMITS = ("greater_than", "greater_than_equal", "less_than", "less_than_equal")


def expected_of(details: ErrorDetails, key: str) -> str:
    """Say what pydantic expected in our words."""
    kind, inner = details["type"], field_of(key)
    if kind == "string_pattern_mismatch" and inner is not None and inner.examples:
        return f"text as {inner.examples[0]}"
    said = details["msg"].removeprefix("Input should be ")
    if kind in _LIMITS:
        return f"a {'whole ' if inner is not None and _is_whole(inner) else ''}number {said}"
    return _WORDS.get(kind) or choices_of(details) or said


def choices_of(details: ErrorDetails) -> str:
    """The words that a key takes, as YAML writes them; empty if it takes others too."""
    return re.sub(r"\b(True|False)\b", lambda word: word[0].lower(), details.get("ctx", {}).get("expected", ""))


def refusal_of(key: str, value: object) -> ErrorDetails | None:
    """Pydantic's error about a value for a key that exists; None if it is taken."""
    tree: Any = value
    for name in reversed(key.split(".")):
        tree = {name: tree}
    try:
        ConfigTree.model_validate_json(json.dumps(tree, default=str), strict=True)
    except ValidationError as error:
        return error.errors(include_url=False)[0]
    return None


def proposal(key: str, written: str) -> str | None:
    """The override that gives a key what was written for it, or what was meant by that; None if it takes neither."""
    try:
        value = text.parse_value(key, written, "")
    except ConfigError:
        return None
    if (refusal := refusal_of(key, value)) is None:
        return f"{key}={written}"
    meant = value_for(key, value, get_args(info.annotation)) if (info := field_of(key)) else None
    if meant is None and refusal["type"] == "bool_type":
        near = difflib.get_close_matches(str(value).lower(), SWITCHES, 1, 0.75)
        meant = SWITCHES[near[0]] if near else None
    if meant is None and refusal["type"] in _NUMBERS:
        meant = number_meant(value, refusal["type"] == "int_type")
    if meant is None or refusal_of(key, text.parse_value(key, meant, "")) is not None:
        return None
    return f"{key}={meant}"


def instead(key: str, written: str) -> str:
    """The fix for what was written for a key: an override that it takes, or what it takes."""
    if (meant := proposal(key, written)) is not None:
        return f"write {meant}"
    try:
        value = text.parse_value(key, written, "")
    except ConfigError:
        return f"write {key}=VALUE"
    refusal = refusal_of(key, value)
    assert refusal is not None, (key, written)
    number = number_meant(value, refusal["type"] == "int_type") if refusal["type"] in _NUMBERS else None
    if number is not None:
        refusal = refusal_of(key, text.parse_value(key, number, "")) or refusal
    return f"give {key} {given(refusal, key)}"


def given(details: ErrorDetails, key: str) -> str:
    """Say what to give a key that refuses a value."""
    if details["type"] == "literal_error":
        return f"one of the values {choices_of(details)}"
    return expected_of(details, key) + described(key)


def another(key: str) -> str:
    """The fix that names a key's default, where it has one."""
    info = field_of(key)
    default = None if info is None or info.is_required() else info.default
    if info is not None and info.examples:
        return f"write {key}={info.examples[0]}, say, or leave it out{described(key)}"
    if default is None or refusal_of(key, default) is not None:
        return f"change {key}{described(key)}"
    return f"write {key}={as_written(default)}, its default, or another value{described(key)}"


def as_written(value: object) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, float) and not math.isfinite(value):
        return f".{value}".replace(".-", "-.")  # as YAML writes them
    return value if isinstance(value, str) else json.dumps(value, default=str)


def field_of(key: str) -> FieldInfo | None:
    model: Any = ConfigTree
    info: FieldInfo | None = None
    for name in key.split("."):
        options = [model, *get_args(model)]
        model = next((option for option in options if hasattr(option, "model_fields")), None)
        info = model.model_fields.get(name) if model is not None else None
        if info is None:
            return None
        model = info.annotation
    return info


def described(key: str) -> str:
    info = field_of(key)
    return f" ({info.description})" if info is not None and info.description else ""


def examples(key: str) -> str:
    """Two values that the list of a key may hold."""
    info = field_of(key)
    options = [info.annotation, *get_args(info.annotation)] if info else []
    items = next((get_args(option)[0] for option in options if get_origin(option) is tuple), None)
    words = get_args(items) if get_origin(items) is Literal else (1, 2) if items is int else ("a", "b")
    return ", ".join(map(str, words[:2]))


def inner_values(key: str) -> str:
    """The keys of a section within a section, with a value that each takes; empty for other keys."""
    info = field_of(key)
    options = [info.annotation, *get_args(info.annotation)] if info is not None and "." in key else []
    model = next((option for option in options if hasattr(option, "model_fields")), None)
    fields = {} if model is None else model.model_fields
    return (
        f"{{{', '.join(f'{name}: {as_written(inner.default)}' for name, inner in fields.items())}}}" if fields else ""
    )


def _is_whole(info: FieldInfo) -> bool:
    return int in (info.annotation, *get_args(info.annotation))


def sizes(tree: Mapping[str, Any]) -> dict[str, object]:
    """The values of a tree, or the defaults, on which answers depend."""
    found: dict[str, object] = {}
    for key in ("train.steps", "train.global_batch", "data.seq_length", "optim.lr"):
        section, _, name = key.partition(".")
        inner = tree.get(section)
        value = inner.get(name) if isinstance(inner, Mapping) else None
        found[key] = ConfigTree().value(key) if value is None else value
    return {key: value for key, value in found.items() if refusal_of(key, value) is None}
