"""Text ↔ token ids: a byte-level BPE trained here, or any `tokenizer.json` that says where a document ends.

    texts --train--> tokenizer.json --load-------> Tokenizer(encode, decode, end_of_document), for prepare
                                    --load_codec-> Codec(encode, decode), for prompts and samples

Byte-level: every text has ids, and decode(encode(text)) is the text. Knows nothing of files of documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from roots_dist.errors import DataError, Problem

END_OF_DOCUMENT = "<|endoftext|>"
KNOWN_ENDS = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]")
"""Tokens that end a document in known tokenizers; the first that is there is taken."""

BLOOM_PATTERN = " ?[^(\\s|[.,!?…。，、।۔،])]+"
"""BLOOM's words: an optional space, then anything but spaces and punctuation (an Oniguruma pattern)."""

PRE_TOKENIZERS = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "bloom": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BLOOM_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}

SMALLEST = 257
"""The bytes and the end of a document."""


@dataclass(frozen=True, eq=False)
class Codec:
    """Text to ids and back, whether or not anything is known to end a document."""

    backend: tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        """The ids of the text alone. A special token spelled out in it is text: no document can forge its end."""
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens are shown; a character cut in two appears as U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


@dataclass(frozen=True, eq=False)
class Tokenizer(Codec):
    end_of_document: int
    vocab: int
    """Largest id + 1: what model.vocab must be at least."""

    @property
    def end_token(self) -> str:
        return self.backend.id_to_token(self.end_of_document)

    @property
    def json(self) -> str:
        return self.backend.to_str(pretty=False)

    @property
    def sha256(self) -> str:
        """Of its content, not of the file's spacing."""
        return hashlib.sha256(self.json.encode()).hexdigest()


def train(texts: Iterable[str], vocab: int, pre_tokenizer: str = "gpt2") -> Tokenizer:
    """The same texts in the same order give the same tokenizer. Few texts may give less than `vocab` entries."""
    if vocab < SMALLEST:
        raise DataError(
            Problem(
                key="vocab",
                found=vocab,
                expected=f"at least {SMALLEST} (256 bytes and the end of a document)",
                fix="raise it",
            )
        )
    if pre_tokenizer not in PRE_TOKENIZERS:
        raise DataError(
            Problem(
                key="pre_tokenizer",
                found=pre_tokenizer,
                expected=f"one of {list(PRE_TOKENIZERS)}",
                fix="choose one of these",
            )
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _ready(backend, "the trained tokenizer", END_OF_DOCUMENT)


def load(path: str | Path, end_of_document: str | None = None) -> Tokenizer:
    """A `tokenizer.json`. Raises DataError if it is none, or if nothing in it is known to end a document."""
    return from_json(_read(path), str(path), end_of_document)


def load_codec(path: str | Path) -> Codec:
    """A `tokenizer.json`, for encoding and decoding alone. Raises DataError if it is none."""
    return Codec(_for_whole_texts(_parse(_read(path), str(path))))


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            Problem(
                key="tokenizer",
                found=str(path),
                expected=f"a tokenizer.json that can be read ({error})",
                fix="check the path",
            )
        ) from error


def from_json(text: str, name: str = "tokenizer", end_of_document: str | None = None) -> Tokenizer:
    return _ready(_parse(text, name), name, end_of_document)


def _parse(text: str, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises the bare class, with a line and column in its text
        raise DataError(
            Problem(
                key="tokenizer",
                found=name,
                expected=f"the JSON of Hugging Face tokenizers ({error})",
                fix="take the file of a fast tokenizer",
            )
        ) from error


def _ready(backend: tokenizers.Tokenizer, name: str, end_of_document: str | None) -> Tokenizer:
    wanted = KNOWN_ENDS if end_of_document is None else (end_of_document,)
    ends = [i for i in map(backend.token_to_id, wanted) if i is not None]
    if not ends:
        raise DataError(
            Problem(
                key="end_of_document",
                found=end_of_document,
                expected=f"a token of {name}, by default one of {', '.join(KNOWN_ENDS)}",
                fix="name the token that ends a document",
            )
        )
    vocab = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return Tokenizer(_for_whole_texts(backend), ends[0], vocab)


def _for_whole_texts(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.no_truncation()  # a tokenizer.json may bring both, and documents are to be whole
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend
