"""Encode prompts into ids as the model saw them in training.

    PROMPT | --prompts FILE --read_prompts--> [Prompt] --PromptEncoder.ids--> ids, which fit the model's positions
    gpt: the text, after the tokens that its tokenizer puts before every text; instruct: in its chat template;
    t5: with the end token that its encoder was trained with

All checks happen here, before the first process starts. No torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from roots_dist.config.records import family_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import SENTINEL
from roots_dist.errors import DataError, Problem, present
from roots_dist.files import read_plain, where, why
from roots_dist.learning.data.chat import Chat, Messages, open_chat
from roots_dist.learning.data.ends import answer_ends, ends_of
from roots_dist.learning.data.rows import Row, rows
from roots_dist.learning.data.specials import Specials, read_specials
from roots_dist.learning.data.tokenizer import Codec, load_codec
from roots_dist.runs.generate.check_options import is_unicode
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.generate.request import MAX_TOKENS
from roots_dist.runs.generate.stops import Stops

SPACE_BEFORE_SENTINEL = re.compile(r"\s+(?=" + re.escape(SENTINEL).replace(r"\{\}", r"\d+") + ")")
"""White space before a sentinel. Training has none, because a sentinel replaces tokens including their space."""
SHORT = 40
"""Number of characters of a text in an error message."""


class Prompt(NamedTuple):
    text: str
    pair: str | None = None
    place: str = "prompt"
    """Origin of the prompt, for error messages."""

    def problem(self, expected: str, fix: str) -> DataError:
        text = self.text if len(self.text) <= SHORT else f"{self.text[:SHORT]}…"
        text = text.encode(errors="replace").decode()  # it may be what the message is about
        return DataError(Problem(key=self.place, found=text, expected=expected, fix=fix))


def read_prompts(options: GenerateOptions) -> list[Prompt]:
    """Prompts of the options: the one given, or each line of a file. Raises DataError if there is none."""
    if options.prompts is None:
        found = [Prompt(options.prompt or "", options.pair)]
    elif options.prompt is not None or options.pair is not None:
        fix = "remove one of them; in jsonl the key pair holds a second text"
        raise DataError(Problem(key="--prompts", found=str(options.prompts), expected="no other prompt", fix=fix))
    else:
        found = _from_file(options.prompts)
        if not found:
            fix = "write one prompt on each line"
            raise DataError(
                Problem(
                    key="--prompts", found=str(options.prompts), expected="a file with at least one prompt", fix=fix
                )
            )
    for one in found:
        if not one.text.strip():
            raise one.problem("text that is not empty", "give at least one word, or --prompts FILE")
        if not is_unicode(f"{one.text}{one.pair or ''}"):
            raise one.problem(
                "text in Unicode, and these bytes are not",
                "type it in the terminal's encoding, or use UTF-8 in --prompts FILE",
            )
    return found


def _from_file(path: Path) -> list[Prompt]:
    """Prompts of a file: lines of text, skipping blank ones; or rows (jsonl, csv, tsv) with a column `prompt`, and
    `pair` for a second text."""
    if path.suffix.lower() != ".txt":
        return [_from_row(row) for row in rows(path, key="--prompts")]
    try:
        lines = read_plain(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        expected = f"a file that can be read ({why(error)}: {where(path)})"
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
    """Encoding of prompts for a run's model: tokenizer, special tokens and chat template."""

    config: Config
    codec: Codec
    specials: Specials
    chat: Chat | None
    """Chat template of the prompts; None reads them as they are."""

    @property
    def start(self) -> int | None:
        """First token of a decoder over an encoder; None if there is no encoder."""
        return self.specials.pad if family_of(self.config).has_two_stacks else None

    @property
    def positions(self) -> int:
        """Length of the longest text that the model was trained for."""
        m = self.config.model
        return (m.positions in ("learned", "rotary") and m.max_positions) or self.config.data.seq_length

    def ids(self, text: str) -> list[int]:
        """Ids of a prompt."""
        if self.chat is not None:
            return self.conversation([{"role": "user", "content": text}])
        if self.start is None:
            ids = self.codec.encode(text)
            return [*self.specials.tokens.before, *ids] if ids else []
        ids = self.codec.encode_with_specials(SPACE_BEFORE_SENTINEL.sub("", text))
        closed = objective_of(self.config).ends_input and ids and ids[-1] != self.specials.end
        return [*ids, present(self.specials.end)] if closed else ids

    def conversation(self, messages: Messages) -> list[int]:
        """Ids of a conversation up to the next answer. Raises DataError if the template refuses it."""
        try:
            return self.codec.encode_with_specials(present(self.chat).prompt(messages))
        except ValueError as error:
            expected, fix = (
                f"a template that accepts this conversation ({error})",
                "use another finetune.chat_template, or --raw",
            )
            raise DataError(
                Problem(key="finetune.chat_template", found=present(self.chat).name, expected=expected, fix=fix)
            ) from error

    @cached_property
    def ends(self) -> frozenset[int]:
        """Tokens that end an answer: those of learning/data/ends.py, and the last token of an answer in the template in
        which the prompt is put."""
        found = ends_of(self.config, self.codec, self.specials.tokens)
        return frozenset([*found, *(answer_ends(self.chat, self.codec) if self.chat is not None else ())])

    def stops(self, strings: tuple[str, ...] = (), keep_end: bool = False, prompts: tuple[str, ...] = ()) -> Stops:
        """Stop conditions of an answer. Special tokens are hidden in an answer, but not in a continued text. Sentinels
        are shown only if a prompt contains one; the unknown token is always shown."""
        s = self.specials
        hidden = set(np.flatnonzero(s.special).tolist()) if self.chat or self.start is not None else set()
        wanted = any(SENTINEL.format(i) in prompt for i in range(len(s.sentinels)) for prompt in prompts)
        hidden -= {s.unk, *(s.sentinels if wanted else ())}
        return Stops(self.ends, strings, self.codec, frozenset(hidden), keep_end)


def open_prompt_encoder(config: Config, *, talks: bool) -> PromptEncoder:
    """Open the encoder of a run; with `talks`, prompts are put into the chat template. Raises DataError if the run has
    no tokenizer or a bad template."""
    path = config.data.tokenizer
    if path is None:
        fix = "name the tokenizer.json that the model was trained with: data.tokenizer=…/tokenizer.json"
        raise DataError(
            Problem(key="data.tokenizer", found=None, expected="a tokenizer to encode and decode text", fix=fix)
        )
    codec, specials = load_codec(path), read_specials(path, config.model.vocab)
    end = "" if specials.end is None else present(codec.backend.id_to_token(specials.end))
    return PromptEncoder(
        config, codec, specials, open_chat(config.finetune.chat_template, path, end, datetime.now) if talks else None
    )


def encode_prompts(
    prompts: list[Prompt], encoder: PromptEncoder, max_tokens: int | None
) -> tuple[list[list[int]], int]:
    """Ids of each prompt, and the largest number of tokens of an answer: max_tokens, or by default MAX_TOKENS where
    there is room.

    Raises DataError if a prompt has no tokens, or if it leaves no room in the learned positions.
    """
    found, most = [], max_tokens or MAX_TOKENS
    limit = encoder.positions if encoder.config.model.positions == "learned" and encoder.start is None else None
    for one in prompts:
        ids = encoder.ids(one.text)
        if not ids:
            raise one.problem("text that has at least one token", "give another prompt")
        found.append(ids)
        if limit is None:
            continue
        room, least = limit - len(ids), max_tokens or 1
        if room < least:
            expected = f"prompt and continuation of at most {limit} tokens, the number of learned positions; these are "
            expected += f"{len(ids)} + {least}"
            raise one.problem(expected, "a shorter prompt" + (f", or --max-tokens {room}" if room > 0 else ""))
        most = min(most, room)
    return found, most


def beyond_training(texts: Sequence[Sequence[int]], encoder: PromptEncoder) -> str | None:
    """The remark on prompts that are longer than any text of training, which nothing keeps from being read whole."""
    longest, limit = max(map(len, texts)), encoder.positions
    if longest <= limit:
        return None
    which = "the prompt has" if len(texts) == 1 else "the longest prompt has"
    return f"{which} {longest} tokens. All are read, but the model was made for texts of {limit}: answers may be worse"
