"""Conversations to token ids: a chat template (Jinja, as tokenizers provide it), and which tokens belong to an answer.

    [{role, content}, …] --template, turn by turn--> text --tokenizer--> ids, and whether each is a target

An answer is what the template adds between its generation prompt (add_generation_prompt) and the token that ends the
answer, inclusive. Prompt and answer are tokenized separately, so that a prompt has the same ids with and without an
answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roots_dist.errors import DataError, Problem, missing_package
from roots_dist.learning.data.tokenizer import Codec

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser


DEFAULT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""`user: QUESTION`, `assistant: ANSWER` and the end token, for tokenizers without a template and without role tokens.
"""
DEFAULT_NAME = "the default template"
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class PromptAndAnswer:
    """A part of a conversation: a prompt and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True, eq=False)
class Chat:
    """The chat format of one tokenizer."""

    name: str
    """Name of the template, for error messages."""
    render: Callable[..., str]
    """(messages, add_generation_prompt) -> text"""

    def prompt(self, messages: Messages) -> str:
        """The text up to the beginning of the next answer."""
        return self.render(messages, True)

    def turns(self, messages: Messages) -> list[PromptAndAnswer]:
        """Split a conversation into prompts and answers; text after the last answer is dropped.

        Raises ValueError if the template renders earlier messages differently when more follow, so that they cannot be
        split.
        """
        turns, done = [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, whole = self.render(messages[:i], True), self.render(messages[: i + 1], False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise ValueError(f"{self.name} writes a conversation differently when it goes on")
            turns.append(PromptAndAnswer(prompt[len(done) :], whole[len(prompt) :]))
            done = whole
        return turns


def encode_turns(turns: Sequence[PromptAndAnswer], codec: Codec, ends: frozenset[int]) -> tuple[list[int], list[bool]]:
    """Token ids of all turns, and whether each is a target. ends: special tokens that may close an answer; tokens after
    the last one of them are not targets."""
    ids: list[int] = []
    learned: list[bool] = []
    for turn in turns:
        given, answer = codec.encode_with_specials(turn.prompt), codec.encode_with_specials(turn.answer)
        last = max((k for k, i in enumerate(answer) if i in ends), default=len(answer) - 1)
        ids += given + answer
        learned += [False] * len(given) + [k <= last for k in range(len(answer))]
    return ids, learned


def open_chat(template: str | None, tokenizer: str, end_token: str) -> Chat:
    """Load a chat template: `template` is a file; without it, the template next to the tokenizer (chat_template.jinja,
    tokenizer_config.json), or DEFAULT.

    Raises DataError if it cannot be read or is not a template. Templates are code, so they run in a sandbox, as in
    transformers.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise missing_package("jinja2", "finetune") from error

    class Generation(Extension):
        """Accept {% generation %}, which marks answers for transformers, and ignore it."""

        tags = {"generation"}  # noqa: RUF012 # declared in Extension

        def parse(self, parser: Parser) -> Node | list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(words: str) -> None:
        raise TemplateError(words)

    name, text, tokens = find_template(template, Path(tokenizer))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = refuse
    try:
        compiled = environment.from_string(text)
    except TemplateError as error:
        raise _error(name, error) from error

    def render(messages: Messages, add_generation_prompt: bool) -> str:
        try:
            return compiled.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **{"eos_token": end_token, **tokens},
            )
        except Exception as error:  # a template is code and may raise anything
            raise ValueError(f"{name} refuses it: {error}") from error

    return Chat(name, render)


def find_template(template: str | None, tokenizer: Path) -> tuple[str, str, dict[str, str]]:
    """Name and text of the template, and the special tokens that the tokenizer's config names."""
    config = _read_config(tokenizer.with_name("tokenizer_config.json"))
    both = _read_config(tokenizer.with_name("special_tokens_map.json")), config
    named = {
        key: value["content"] if isinstance(value, dict) else value
        for file in both
        for key, value in file.items()
        if key.endswith("_token") and value is not None
    }
    tokens = {key: value for key, value in named.items() if isinstance(value, str)}
    beside = tokenizer.with_name("chat_template.jinja")
    file = template or (str(beside) if beside.is_file() else None)
    if file is not None:
        try:
            return file, Path(file).read_text(encoding="utf-8"), tokens
        except (OSError, UnicodeDecodeError) as error:
            raise _error(file, error) from error
    given = config.get("chat_template")
    if isinstance(given, list):
        given = {t["name"]: t["template"] for t in given}.get("default")
    return ("the tokenizer's template", given, tokens) if given else (DEFAULT_NAME, DEFAULT, tokens)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _error(str(path), error) from error
    if not isinstance(found, dict):
        raise _error(str(path), ValueError("the settings of a tokenizer are an object"))
    return found


def _error(name: str, error: Exception) -> DataError:
    return DataError(
        Problem(
            key="finetune.chat_template", found=name, expected=f"a chat template in Jinja ({error})", fix="correct it"
        )
    )
