"""Text ↔ token ids: a tokenizer of one of four kinds trained here, or any `tokenizer.json` with an end-of-document
token.

    texts --train--> tokenizer.json --load-------> Tokenizer(encode, decode, end_of_document), for prepare
                                    --load_codec-> Codec(encode, decode), for prompts and samples

Byte-level bpe has ids for every text, and decode(encode(text)) is the text. Knows nothing of files of documents.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from roots_dist.config.model import LARGEST_VOCAB
from roots_dist.config.special_tokens import NAMES, SETTINGS, SpecialTokens, read_special_tokens, special_tokens
from roots_dist.errors import DataError, Problem, present
from roots_dist.files import read_plain, reason
from roots_dist.idx_format import TOKENIZER

END_OF_DOCUMENT = NAMES["end"][0]

BLOOM_PATTERN = " ?[^(\\s|[.,!?…。，、।۔،])]+"
"""BLOOM's words: an optional space, then anything but spaces and punctuation (an Oniguruma pattern)."""

PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    "bloom": lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(BLOOM_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}

MIN_BPE_VOCAB = 257
"""The 256 bytes and the end of a document."""


class Loss(NamedTuple):
    """The part of a text that encoding and decoding loses."""

    kind: Literal["characters", "white space"]
    example: str
    """The first words that come back otherwise."""


EXAMPLE = 30
"""Number of characters of each side of an example."""


@dataclass(frozen=True, eq=False)
class Codec:
    """Text to ids and back, with or without an end-of-document token."""

    backend: tokenizers.Tokenizer

    def encode(self, text: str) -> list[int]:
        """Ids of the text alone. A special token that is spelled out is encoded as text, so that no document can forge
        its end."""
        return self.backend.encode_batch_fast([text], add_special_tokens=False)[0].ids

    def encode_with_specials(self, text: str) -> list[int]:
        """Ids of the text, in which a spelled-out special token is that token: for the output of a chat template."""
        self.backend.encode_special_tokens = False
        try:
            return self.encode(text)
        finally:
            self.backend.encode_special_tokens = True

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Encode like encode_with_specials; also return the first character of each token, and the one behind its
        last."""
        self.backend.encode_special_tokens = False
        try:
            encoding = self.backend.encode(text, add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = True
        return encoding.ids, encoding.offsets

    def loss(self, text: str, ids: Iterable[int]) -> Loss | None:
        """The loss of text when these ids are decoded, beyond what the tokenizer's own normalizer changes; None if
        nothing is lost. A space that the tokenizer puts before a text is no loss."""
        found = self.decode(ids)
        if text in (found, found.removeprefix(" ")):
            return None
        normalizer = self.backend.normalizer
        normal = normalizer.normalize_str if normalizer else str
        wanted, found = normal(text), normal(found)
        if found in (wanted, wanted.removeprefix(" "), " " + wanted):
            return None
        if "".join(found.split()) == "".join(wanted.split()):
            at = next((n for n, (a, b) in enumerate(zip(wanted, found)) if a != b), min(len(wanted), len(found)))
            sides = (text[max(0, at - 3) :][:EXAMPLE] for text in (wanted, found))
            return Loss("white space", " -> ".join(map(repr, sides)))
        words, others = wanted.split(), found.split()
        at = next((n for n, (a, b) in enumerate(zip(words, others)) if a != b), min(len(words), len(others)))
        sides = (" ".join(some[at : at + EXAMPLE])[:EXAMPLE] for some in (words, others))
        return Loss("characters", " -> ".join(map(repr, sides)))

    def decode(self, ids: Iterable[int]) -> str:
        """Decode with special tokens shown; a character cut in two becomes U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=False)


@dataclass(frozen=True, eq=False)
class Tokenizer(Codec):
    """A tokenizer with an end-of-document token."""

    end_of_document: int
    vocab: int
    """Largest id + 1: the smallest possible model.vocab."""
    specials: SpecialTokens

    @property
    def end_token(self) -> str:
        return present(self.backend.id_to_token(self.end_of_document))

    @property
    def json(self) -> str:
        return self.backend.to_str(pretty=False)

    @property
    def sha256(self) -> str:
        """Hash of the content, independent of the file's formatting."""
        return hashlib.sha256(self.json.encode()).hexdigest()


def train(
    texts: Iterable[str], vocab: int, pre_tokenizer: str = "gpt2", kind: str = "bpe", min_count: int = 2
) -> Tokenizer:
    """Train a tokenizer. The same texts in the same order give the same tokenizer, except that wordpiece and unigram
    break ties at random: keep the tokenizer.json. Few texts may give less than `vocab` entries.

    kind: one of KINDS. pre_tokenizer applies only to bpe, min_count only to words.
    """
    if kind not in KINDS:
        raise DataError(Problem(key="kind", found=kind, expected=f"one of {list(KINDS)}", fix="choose one of these"))
    smallest, make = KINDS[kind]
    if vocab < smallest:
        expected = f"at least {smallest} for kind {kind} (its special tokens" + (
            " and the 256 bytes)" if kind == "bpe" else ")"
        )
        raise DataError(Problem(key="vocab", found=vocab, expected=expected, fix="raise it"))
    if vocab > LARGEST_VOCAB:
        expected = f"at most {LARGEST_VOCAB:,}, the largest model.vocab"
        raise DataError(Problem(key="vocab", found=vocab, expected=expected, fix="use 32000, or another usual size"))
    if pre_tokenizer not in PRE_TOKENIZERS:
        expected = f"one of {list(PRE_TOKENIZERS)}"
        raise DataError(Problem(key="pre_tokenizer", found=pre_tokenizer, expected=expected, fix="choose one of these"))
    backend, trainer, end = make(vocab, pre_tokenizer, min_count)
    backend.train_from_iterator(texts, trainer)
    if kind == "unigram":  # T5's vocabulary ends with the sentinels in reverse order
        backend.add_special_tokens([AddedToken(f"<extra_id_{i}>", special=True) for i in reversed(range(SENTINELS))])
    return _ready(backend, "the trained tokenizer", end, special_tokens(json.loads(backend.to_str()), {}))


def _bpe(vocab: int, pre_tokenizer: str, min_count: int) -> Untrained:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = PRE_TOKENIZERS[pre_tokenizer]()
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END_OF_DOCUMENT]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    return backend, trainer, END_OF_DOCUMENT


def _wordpiece(vocab: int, pre_tokenizer: str, min_count: int) -> Untrained:
    """BERT's WordPiece, lower-case (Devlin et al. 2019)."""
    backend = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return backend, trainers.WordPieceTrainer(vocab_size=vocab, special_tokens=special, show_progress=False), "[SEP]"


def _unigram(vocab: int, pre_tokenizer: str, min_count: int) -> Untrained:
    """T5's unigram model (Raffel et al. 2020, section 2.2), with its sentinels."""
    backend = tokenizers.Tokenizer(models.Unigram())
    spaces = normalizers.Replace(Regex(" {2,}"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), spaces])
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab - SENTINELS, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    return backend, trainer, "</s>"


def _words(vocab: int, pre_tokenizer: str, min_count: int) -> Untrained:
    """Word-level: lower-case words of letters that are frequent enough, and one id for all others."""
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    letters = normalizers.Replace(Regex(r"[^\p{L}]+"), " ")
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), letters])
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(
        vocab_size=vocab, min_frequency=min_count, special_tokens=["<unk>", "<eos>"], show_progress=False
    )
    return backend, trainer, "<eos>"


SENTINELS = 100
Untrained = tuple[tokenizers.Tokenizer, trainers.Trainer, str]
KINDS: dict[str, tuple[int, Callable[[int, str, int], Untrained]]] = {
    "bpe": (MIN_BPE_VOCAB, _bpe),
    "wordpiece": (6, _wordpiece),
    "unigram": (SENTINELS + 4, _unigram),
    "words": (3, _words),
}
"""kind -> (smallest vocabulary, function (vocab, pre_tokenizer, min_count) -> (untrained tokenizer, trainer, end of
document))."""


def load(path: str | Path, end_of_document: str | None = None) -> Tokenizer:
    """Load a `tokenizer.json`, with the special tokens that the files beside it name. Raises DataError if it cannot be
    read or has no known end-of-document token."""
    backend = _parse(_read(path), str(path))
    return _ready(backend, str(path), end_of_document, read_special_tokens(path))


def load_codec(path: str | Path) -> Codec:
    """Load a `tokenizer.json` only for encoding and decoding. Raises DataError if it cannot be read."""
    return Codec(_without_truncation(_parse(_read(path), str(path))))


def _read(path: str | Path) -> str:
    try:
        return read_plain(Path(path)).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            Problem(
                key="tokenizer",
                found=str(path),
                expected=f"a tokenizer.json that can be read ({reason(error, path)})",
                fix=_fix_of(Path(path)),
            )
        ) from error


def _fix_of(path: Path) -> str:
    """Say what to do about a tokenizer that cannot be read: its folder, or its name on the Hub, is often given."""
    if path.is_dir():
        return f"give {path / TOKENIZER}" if (path / TOKENIZER).is_file() else f"give the {TOKENIZER} of a model"
    if path.suffix or path.exists() or len(path.parts) > 2 or path.is_absolute():
        return "check the path"
    return f"download it, hf download {path} {TOKENIZER} --local-dir {path}, and give {path / TOKENIZER}"


def from_json(text: str, name: str = "tokenizer", end_of_document: str | None = None) -> Tokenizer:
    """Make a tokenizer from the text of a tokenizer.json, without the files beside it."""
    backend = _parse(text, name)
    return _ready(backend, name, end_of_document, special_tokens(json.loads(text), {}))


def _parse(text: str, name: str) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception, with line and column in the text
        raise DataError(
            Problem(
                key="tokenizer",
                found=name,
                expected=f"the JSON of Hugging Face tokenizers ({error})",
                fix="use the tokenizer.json of a fast tokenizer",
            )
        ) from error


def _ready(backend: tokenizers.Tokenizer, name: str, end_of_document: str | None, specials: SpecialTokens) -> Tokenizer:
    end = specials.end if end_of_document is None else backend.token_to_id(end_of_document)
    if end is None:
        raise DataError(
            Problem(
                key="end_of_document",
                found=end_of_document,
                expected=f"a token of {name}, by default one of {', '.join(NAMES['end'])}",
                fix=f"name the token that ends a document here, or as eos_token in {SETTINGS} beside it",
            )
        )
    vocab = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    return Tokenizer(_without_truncation(backend), end, vocab, specials)


def _without_truncation(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    backend.no_truncation()  # a tokenizer.json may set both, but documents must stay whole
    backend.no_padding()
    backend.encode_special_tokens = True
    return backend
