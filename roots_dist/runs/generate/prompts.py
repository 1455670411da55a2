"""From what a user writes to the ids that a model reads: as it was taught, so that it meets what it knows.

    PROMPT | --prompts FILE --texts--> [Given] --Wording.ids--> ids, which fit the model's positions
    gpt: the text itself; instruct: in its chat template; t5: with the end token that its encoder has learned to see

Everything is checked here, before the first process starts. No torch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from roots_dist.config.records import family_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import SENTINEL
from roots_dist.errors import DataError, Problem, present
from roots_dist.files import why
from roots_dist.learning.data.chat import Chat, Messages, open_chat
from roots_dist.learning.data.rows import Row, rows
from roots_dist.learning.data.specials import Specials, read_specials
from roots_dist.learning.data.tokenizer import Codec, load_codec
from roots_dist.runs.generate.check_options import is_unicode
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.generate.request import MAX_TOKENS
from roots_dist.runs.generate.stops import Stops

SPACE_BEFORE_SENTINEL = re.compile(r"\s+(?=" + re.escape(SENTINEL).replace(r"\{\}", r"\d+") + ")")
"""Space before a sentinel: in training there is none, since a sentinel stands where tokens stood, space included."""
SHORT = 40
"""Characters of a text that a message shows."""


class Prompt(NamedTuple):
    text: str
    pair: str | None = None
    place: str = "prompt"
    """Where it stands, for messages."""

    def problem(self, expected: str, fix: str) -> DataError:
        text = self.text if len(self.text) <= SHORT else f"{self.text[:SHORT]}…"
        text = text.encode(errors="replace").decode()  # it may be what is wrong
        return DataError(Problem(key=self.place, found=text, expected=expected, fix=fix))


def read_prompts(options: GenerateOptions) -> list[Prompt]:
    """What is to be answered: the prompt, or each line of a file. Raises DataError if that is nothing."""
    if options.prompts is None:
        found = [Prompt(options.prompt or "", options.pair)]
    elif options.prompt is not None or options.pair is not None:
        fix = "leave one of them out; jsonl has a second text under the key pair"
        raise DataError(
            Problem(key="--prompts", found=str(options.prompts), expected="no other prompt beside it", fix=fix)
        )
    else:
        found = _from_file(options.prompts)
        if not found:
            fix = "write one prompt on each line"
            raise DataError(
                Problem(key="--prompts", found=str(options.prompts), expected="a file with a prompt or more", fix=fix)
            )
    for one in found:
        if not one.text.strip():
            raise one.problem("text that is not empty", "give it a word to begin with, or --prompts FILE")
        if not is_unicode(f"{one.text}{one.pair or ''}"):
            raise one.problem(
                "text in Unicode: these are bytes that are none",
                "give it in the terminal's encoding, or as UTF-8 by --prompts FILE",
            )
    return found


def _from_file(path: Path) -> list[Prompt]:
    """Lines of text, blank ones passed over; or rows (jsonl, csv, tsv) with a column `prompt`, and `pair` for a second
    text."""
    if path.suffix.lower() != ".txt":
        return [_from_row(row) for row in rows(path)]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        expected = f"a file that can be read ({why(error)})"
        raise DataError(Problem(key="--prompts", found=str(path), expected=expected, fix="check the path")) from error
    return [Prompt(line, None, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _from_row(row: Row) -> Prompt:
    prompt, pair = row.values.get("prompt"), row.values.get("pair")
    if not isinstance(prompt, str):
        raise row.error("prompt", prompt, "a text", 'write lines like {"prompt": "…"}')
    if pair is not None and not isinstance(pair, str):
        raise row.error("pair", pair, "a text, or nothing")
    return Prompt(prompt, pair, row.place)


@dataclass(frozen=True, eq=False)
class PromptEncoder:
    """How a run's model is spoken to."""

    config: Config
    codec: Codec
    specials: Specials
    chat: Chat | None
    """The template that prompts are put into; None: they are read as they are."""

    @property
    def start(self) -> int | None:
        """What the decoder over an encoder begins with; None: there is no encoder."""
        return self.specials.pad if family_of(self.config).has_two_stacks else None

    @property
    def positions(self) -> int:
        """The longest text that the model knows."""
        m = self.config.model
        return (m.positions == "learned" and m.max_positions) or self.config.data.seq_length

    def ids(self, text: str) -> list[int]:
        """What the model reads of a prompt."""
        if self.chat is not None:
            return self.conversation([{"role": "user", "content": text}])
        if self.start is None:
            return self.codec.encode(text)
        ids = self.codec.encode_with_specials(SPACE_BEFORE_SENTINEL.sub("", text))
        closed = objective_of(self.config).ends_input and ids and ids[-1] != self.specials.end
        return [*ids, present(self.specials.end)] if closed else ids

    def conversation(self, messages: Messages) -> list[int]:
        """Up to where the next answer begins. Raises DataError if the template refuses it."""
        try:
            return self.codec.encode_with_specials(present(self.chat).prompt(messages))
        except ValueError as error:
            expected, fix = f"one that takes this ({error})", "give another finetune.chat_template, or use --raw"
            raise DataError(
                Problem(key="finetune.chat_template", found=present(self.chat).name, expected=expected, fix=fix)
            ) from error

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens after which nothing is said: the document's end, and what the template closes an answer with."""
        found = set() if self.specials.end is None else {self.specials.end}
        if self.chat is not None:
            found |= self._template_ends()
        return frozenset(found)

    def _template_ends(self) -> set[int]:
        try:
            *_, turn = present(self.chat).turns(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            )
        except ValueError:
            return set()  # a template that writes answers anew, or wants more than that
        special = [i for i in self.codec.encode_with_specials(turn.answer) if self.specials.special[i]]
        return set(special[-1:])

    def stops(self, strings: tuple[str, ...] = (), keep_end: bool = False, prompts: tuple[str, ...] = ()) -> Stops:
        """Special tokens are no part of an answer, but of a text that is gone on with. Sentinels are shown to who wrote
        one in a prompt; so is what has no known token."""
        s = self.specials
        hidden = set(np.flatnonzero(s.special).tolist()) if self.chat or self.start is not None else set()
        wanted = any(SENTINEL.format(i) in prompt for i in range(len(s.sentinels)) for prompt in prompts)
        hidden -= {s.unk, *(s.sentinels if wanted else ())}
        return Stops(self.ends, strings, self.codec, frozenset(hidden), keep_end)


def open_prompt_encoder(config: Config, *, talks: bool) -> PromptEncoder:
    """talks: prompts are put into the chat template. Raises DataError if the run has no tokenizer, or a bad
    template."""
    path = config.data.tokenizer
    if path is None:
        fix = "name the tokenizer.json that the model was trained with: data.tokenizer=…/tokenizer.json"
        raise DataError(
            Problem(key="data.tokenizer", found=None, expected="a tokenizer, to read and write text with", fix=fix)
        )
    codec, specials = load_codec(path), read_specials(path, config.model.vocab)
    end = "" if specials.end is None else present(codec.backend.id_to_token(specials.end))
    return PromptEncoder(
        config, codec, specials, open_chat(config.finetune.chat_template, path, end) if talks else None
    )


def encode_prompts(
    prompts: list[Prompt], encoder: PromptEncoder, max_tokens: int | None
) -> tuple[list[list[int]], int]:
    """The ids of each, and how many tokens an answer may have: max_tokens, or if None as usual, where there is room.

    Raises DataError if the tokenizer makes nothing of a prompt, or if there is no room: learned positions end
    somewhere.
    """
    found, most = [], max_tokens or MAX_TOKENS
    limit = encoder.positions if encoder.config.model.positions == "learned" and encoder.start is None else None
    for one in prompts:
        ids = encoder.ids(one.text)
        if not ids:
            raise one.problem("text of which the tokenizer makes something", "give it another word to begin with")
        found.append(ids)
        if limit is None:
            continue
        room, least = limit - len(ids), max_tokens or 1
        if room < least:
            expected = f"prompt and continuation of at most {limit} tokens, the learned positions there are; these are "
            expected += f"{len(ids)} + {least}"
            raise one.problem(expected, "a shorter prompt" + (f", or --max-tokens {room}" if room > 0 else ""))
        most = min(most, room)
    return found, most
