"""Chat templates as they lie in files: that of the config, or those beside a tokenizer, which may be several.

    chat_template.jinja and additional_chat_templates/, or else tokenizer_config.json --find_templates--> Templates

A tokenizer with several has one called default and, for conversations with tools, one called tool_use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from roots_dist.errors import DataError, Problem
from roots_dist.files import read_plain, reason

DEFAULT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""`user: QUESTION`, `assistant: ANSWER` and the end token, for tokenizers without a template and without role tokens.
"""
DEFAULT_NAME = "the default template"
OF_TOKENIZER = "the tokenizer's template"
FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"
"""Names under which transformers stores the template called default, and those with other names."""
WITH_TOOLS = "tool_use"
"""Name of the template for conversations with tools."""


class Templates(NamedTuple):
    """The templates of a tokenizer, and the special tokens that they may write."""

    name: str
    """Name of the default one, for error messages."""
    default: str
    named: Mapping[str, str]
    """Templates with other names."""
    tokens: Mapping[str, str]
    """bos_token, eos_token … -> the token, as the tokenizer's files name it."""


def find_templates(template: str | None, tokenizer: Path) -> Templates:
    """The templates of a file, or of a tokenizer.json. Raises DataError if they cannot be read."""
    config = _read_config(tokenizer.with_name("tokenizer_config.json"))
    tokens = _tokens(_read_config(tokenizer.with_name("special_tokens_map.json")), config)
    if template is not None:
        return Templates(template, _text(Path(template)), {}, tokens)
    named = {file.stem: _text(file) for file in sorted(tokenizer.with_name(FOLDER).glob("*.jinja"))}
    beside = tokenizer.with_name(FILE)
    if beside.is_file():
        return Templates(str(beside), _text(beside), named, tokens)
    given = _by_name(config.get("chat_template"), str(tokenizer.with_name("tokenizer_config.json"))) | named
    if not given:
        return Templates(DEFAULT_NAME, DEFAULT, {}, tokens)
    if "default" not in given:
        expected = "a template called default beside the others"
        fix = "choose one: save it as a .jinja file and name that with finetune.chat_template"
        problem = Problem(key="chat_template", found=", ".join(given), expected=expected, fix=fix)
        raise DataError(problem)
    return Templates(OF_TOKENIZER, given.pop("default"), given, tokens)


def _by_name(given: object, file: str) -> dict[str, str]:
    """The templates that a tokenizer_config.json holds: one, or several with names."""
    if isinstance(given, str):
        return {"default": given} if given else {}
    if isinstance(given, list) and all(isinstance(one, dict) for one in given):
        given = {one.get("name"): one.get("template") for one in given}
    pairs = given.items() if isinstance(given, dict) else []
    found = {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    if given is not None and (not isinstance(given, dict) or len(found) < len(given)):
        expected = "a template in Jinja, or a list of {name: …, template: …}"
        raise DataError(Problem(key=f"{file}: chat_template", found=given, expected=expected, fix="correct it"))
    return found


def _tokens(*files: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their names; what stands in a later file counts."""
    named = {
        key: value.get("content") if isinstance(value, dict) else value
        for file in files
        for key, value in file.items()
        if key.endswith("_token") and value is not None
    }
    return {key: value for key, value in named.items() if isinstance(value, str)}


def _text(file: Path) -> str:
    try:
        return read_plain(file).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(str(file), error) from error


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_plain(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _unreadable(str(path), error) from error
    if not isinstance(found, dict):
        raise _unreadable(str(path), ValueError("the settings of a tokenizer are an object"))
    return found


def _unreadable(name: str, error: Exception) -> DataError:
    expected = f"a file that can be read ({reason(error, name)})"
    return DataError(Problem(key="finetune.chat_template", found=name, expected=expected, fix="check the path"))
