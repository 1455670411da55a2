"""Conversations to tokens: a chat template (Jinja, as tokenizers bring one), and which tokens are somebody's answer.

    [{role, content}, …] --template, turn by turn--> text --tokenizer--> ids, and of each: is it to be learned?

An answer is what the template adds between its prompt for one (add_generation_prompt) and the token that ends it, that
token included. Question and answer are tokenised apart, so that a question has the same ids whether or not it is
answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from roots_dist.errors import DataError, Problem, needs
from roots_dist.learning.data.tokenizer import Codec

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser


DEFAULT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""user: QUESTION / assistant: ANSWER and the end, for tokenizers without a template and without tokens for roles."""
DEFAULT_NAME = "the default template"
Messages = Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Turn:
    """A stretch of a conversation: what is given, then what is answered."""

    given: str
    answer: str


@dataclass(frozen=True, eq=False)
class Chat:
    """How conversations are written for one tokenizer."""

    name: str
    """of the template, for messages"""
    render: Callable[..., str]
    """(messages, add_generation_prompt) -> text"""

    def prompt(self, messages: Messages) -> str:
        """Up to where the next answer begins."""
        return self.render(messages, True)

    def turns(self, messages: Messages) -> list[Turn]:
        """Given and answered in turns; what stands after the last answer is left out. Raises ValueError if the template
        writes the past anew when there is more of it: then no part of it is a turn's."""
        found, done = [], ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt, whole = self.render(messages[:i], True), self.render(messages[: i + 1], False)
            if not (prompt.startswith(done) and whole.startswith(prompt)):
                raise ValueError(f"{self.name} writes a conversation differently when it goes on")
            found.append(Turn(prompt[len(done) :], whole[len(prompt) :]))
            done = whole
        return found


def ids_of(turns: Sequence[Turn], codec: Codec, ends: frozenset[int]) -> tuple[list[int], list[bool]]:
    """Of all turns together: the ids, and whether each is to be learned. ends: special tokens, any of which may close
    an answer; what stands behind the last one of them is none of it."""
    ids: list[int] = []
    learned: list[bool] = []
    for turn in turns:
        given, answer = codec.encode_marked(turn.given), codec.encode_marked(turn.answer)
        last = max((k for k, i in enumerate(answer) if i in ends), default=len(answer) - 1)
        ids += given + answer
        learned += [False] * len(given) + [k <= last for k in range(len(answer))]
    return ids, learned


def open_chat(template: str | None, tokenizer: str, end_token: str) -> Chat:
    """template: a file; else what stands beside the tokenizer (chat_template.jinja, tokenizer_config.json); else
    DEFAULT.

    Raises DataError if it cannot be read or is no template. Sandboxed, as in transformers: a template is code.
    """
    try:
        from jinja2 import TemplateError
        from jinja2.ext import Extension, loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError as error:
        raise needs("jinja2", "finetune") from error

    class Generation(Extension):
        """{% generation %}, which marks answers for transformers; here it says nothing new."""

        tags = {"generation"}  # noqa: RUF012 # declared in Extension

        def parse(self, parser: Parser) -> Node | list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(words: str) -> None:
        raise TemplateError(words)

    name, text, tokens = template_of(template, Path(tokenizer))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    environment.globals["raise_exception"] = refuse
    try:
        compiled = environment.from_string(text)
    except TemplateError as error:
        raise _wrong(name, error) from error

    def render(messages: Messages, add_generation_prompt: bool) -> str:
        try:
            return compiled.render(
                messages=list(messages),
                add_generation_prompt=add_generation_prompt,
                **{"eos_token": end_token, **tokens},
            )
        except Exception as error:  # a template is code: it may add a word to a number
            raise ValueError(f"{name} refuses it: {error}") from error

    return Chat(name, render)


def template_of(template: str | None, tokenizer: Path) -> tuple[str, str, dict[str, str]]:
    """Name and text of the template, and the special tokens that the tokenizer's config names."""
    config = _read_config(tokenizer.with_name("tokenizer_config.json"))
    named = {
        key: value["content"] if isinstance(value, dict) else value
        for key, value in config.items()
        if key.endswith("_token")
    }
    tokens = {key: value for key, value in named.items() if isinstance(value, str)}
    beside = tokenizer.with_name("chat_template.jinja")
    file = template or (str(beside) if beside.is_file() else None)
    if file is not None:
        try:
            return file, Path(file).read_text(encoding="utf-8"), tokens
        except (OSError, UnicodeDecodeError) as error:
            raise _wrong(file, error) from error
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
        raise _wrong(str(path), error) from error
    if not isinstance(found, dict):
        raise _wrong(str(path), ValueError("the settings of a tokenizer are an object"))
    return found


def _wrong(name: str, error: Exception) -> DataError:
    return DataError(
        Problem(
            key="finetune.chat_template", found=name, expected=f"a chat template in Jinja ({error})", fix="correct it"
        )
    )
