"""A chat template (Jinja, as tokenizers provide it): conversations to text, and where in it the answers are.

    [{role, content}, …] --template--> text of the whole conversation, and the spans of its characters that are learned

An answer is what the template marks with {% generation %}. Without this mark it goes from the generation prompt
(add_generation_prompt) to the token that ends it. A turn is never rendered without those before it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from roots_dist.errors import DataError, Problem
from roots_dist.learning.data.template_files import WITH_TOOLS, find_templates
from roots_dist.learning.data.templates import BEGIN, CPU_S, END, Template, TemplateFailed, TemplateLimitError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None
"""Descriptions of functions that the model may call."""
Span = tuple[int, int]
"""First character of a range, and the one behind its last."""


class PastRewritten(ValueError):
    """The template renders an answer differently when the conversation goes on."""


class Rendering(NamedTuple):
    """The text of a conversation, and what its template marks in it as answers."""

    text: str
    answers: tuple[Span, ...]


class Turn(NamedTuple):
    """The text of a conversation up to an answer, and what is learned of it."""

    text: str
    answers: tuple[Span, ...]
    end: int
    """End of the answer, with all that the template writes to close it."""
    is_prompted: bool = True
    """True if the generation prompt leads to the answer, or the answer is marked."""


@dataclass(frozen=True)
class PromptAndAnswer:
    """Everything before an answer, and the answer to it."""

    prompt: str
    answer: str


@dataclass(frozen=True, eq=False)
class Chat:
    """The chat format of one tokenizer."""

    name: str
    """Name of the template, for error messages."""
    source: str
    marks_answers: bool
    """True if the template has {% generation %}."""
    render: Callable[[Messages, bool, Tools], Rendering]
    """(messages, add_generation_prompt, tools) -> text, and its marked answers"""
    with_tools: Chat | None = None
    """The tokenizer's template for conversations with tools, where it has one for these alone."""

    def of(self, tools: Tools) -> Chat:
        """The format of a conversation with these tools, chosen as transformers does."""
        return self.with_tools if tools is not None and self.with_tools is not None else self

    def prompt(self, messages: Messages) -> str:
        """The text up to the beginning of the next answer."""
        return self.render(messages, True, None).text

    def reads(self, word: str) -> bool:
        """True if the template contains this word, as the name of a variable or a key."""
        return re.search(rf"\b{re.escape(word)}\b", self.source) is not None

    @cached_property
    def developer(self) -> str:
        """The role that developer's messages are given: their own, if the template writes them, or else system."""
        try:
            text = self.render(
                [{"role": "developer", "content": f"{BEGIN}a{END}"}, {"role": "user", "content": "a"}], True, None
            )
        except ValueError:
            return "system"
        return "developer" if text.answers else "system"

    def turns(self, messages: Messages) -> list[PromptAndAnswer]:
        """Each answer, and all that is before it."""
        found = []
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt, text = self.prompt(messages[:i]), self.render(messages[: i + 1], False, None).text
                if not text.startswith(prompt):
                    raise ValueError(f"{self.name} asks for an answer with another text than it writes before it")
                found.append(PromptAndAnswer(prompt, text[len(prompt) :]))
        return found

    def answer(self, messages: Messages, i: int, tools: Tools, closing: re.Pattern[str]) -> Turn:
        """The conversation up to the answer in message i, and the spans of that answer.

        closing: matches a special token. An answer ends with the first one behind its content; where the template
        writes no such content, with the last one before white space; without one, with the text.
        Raises ValueError if it is not found: the generation prompt is not how the template begins an answer, and its
        content is not there either.
        """
        text, marked = self.render(messages[: i + 1], False, tools)
        if self.marks_answers:
            before = self.render(messages[:i], True, tools).answers if i else ()
            return Turn(text, marked[len(before) :], max((end for _, end in marked), default=0))
        prompt = self.render(messages[:i], True, tools).text if i else ""
        is_prompted = i > 0 and text.startswith(prompt)
        least = len(prompt) if is_prompted else 0
        content = "" if messages[i].get("tool_calls") else (messages[i].get("content") or "").strip()
        ends = [match.span() for match in closing.finditer(text, least)]
        last = ends[-1][1] if ends and not text[ends[-1][1] :].strip() else len(text)
        behind = [(begin, end) for begin, end in ends if content and text[least:begin].rstrip().endswith(content)]
        if is_prompted:
            return Turn(text, ((least, behind[0][1] if behind else last),), last)
        if not behind:
            raise ValueError(
                f"{self.name} asks for the answer of message {i + 1} with another text than it writes before it; "
                "{% generation %} … {% endgeneration %} around answers would mark them"
            )
        begin, end = behind[-1]
        return Turn(text, ((len(text[:begin].rstrip()) - len(content), end),), last, is_prompted=i == 0)

    def all_answers(self, messages: Messages, chosen: Sequence[int], tools: Tools, closing: re.Pattern[str]) -> Turn:
        """The whole conversation, and the spans of the answers in the chosen messages.

        Raises PastRewritten if one of them is not written as it was when the conversation had come so far.
        """
        (text, marked), spans = self.render(messages, False, tools), list[Span]()
        turns = [self.answer(messages, i, tools, closing) for i in chosen]
        for i, turn in zip(chosen, turns):
            if text[: turn.end] != turn.text[: turn.end]:
                raise PastRewritten(
                    f"{self.name} writes the answer of message {i + 1} differently when the conversation goes on"
                )
            spans += [span for span in turn.answers if not self.marks_answers or span in marked]
        return Turn(text, tuple(spans), len(text), all(turn.is_prompted for turn in turns))


def open_chat(template: str | None, tokenizer: str, end_token: str, now: Callable[[], datetime] | None = None) -> Chat:
    """Load a chat template: `template` is a file; without it, the template next to the tokenizer (chat_template.jinja,
    tokenizer_config.json), or DEFAULT.

    now: the time that `strftime_now` of the template writes; without it templates find that there is none, for rows of
    training must not depend on when and where a process reads them.

    Raises DataError if it cannot be read or is not a template. Templates are code, so they run in a sandbox, as in
    transformers, and in a process of their own (templates.py).
    """
    found = find_templates(template, Path(tokenizer))

    def made(name: str, source: str, with_tools: Chat | None = None) -> Chat:
        return _chat(name, source, {"eos_token": end_token, **found.tokens}, now, with_tools)

    own = found.named.get(WITH_TOOLS)
    return made(found.name, found.default, None if own is None else made(f"{found.name} {WITH_TOOLS}", own))


def _chat(
    name: str,
    source: str,
    tokens: Mapping[str, str],
    now: Callable[[], datetime] | None,
    with_tools: Chat | None,
) -> Chat:
    """Compile a template. tokens: names of special tokens that it may write -> the tokens."""
    try:
        compiled = Template(source)
    except TemplateFailed as error:
        raise _error(name, error) from error
    except TemplateLimitError as error:
        raise _beyond(name, error) from None

    def render(messages: Messages, add_generation_prompt: bool, tools: Tools) -> Rendering:
        variables = {
            "messages": [dict(message) for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **tokens,
        }
        try:
            text = compiled.render(variables, now() if now is not None else None)
        except TemplateFailed as error:
            raise ValueError(f"{name} refuses it: {error}") from error
        except TemplateLimitError as error:
            raise _beyond(name, error) from None
        return _without_marks(text)

    return Chat(name, source, compiled.marks_answers, render, with_tools)


def _without_marks(text: str) -> Rendering:
    """The text without BEGIN and END, and what they stand around."""
    answers, begin, length = [], 0, 0
    pieces = re.split(f"([{BEGIN}{END}])", text)
    for piece in pieces:
        if piece == BEGIN:
            begin = length
        elif piece == END:
            answers.append((begin, length))
        else:
            length += len(piece)
    return Rendering("".join(pieces[::2]), tuple(answers))


def _beyond(name: str, error: TemplateLimitError) -> TemplateLimitError:
    expected = f"a template that computes for {CPU_S} s at most, and needs little memory, but {error}"
    problem = Problem(key="finetune.chat_template", found=name, expected=expected, fix="correct it, or give another")
    return TemplateLimitError(str(problem))


def _error(name: str, error: Exception) -> DataError:
    return DataError(
        Problem(
            key="finetune.chat_template", found=name, expected=f"a chat template in Jinja ({error})", fix="correct it"
        )
    )
