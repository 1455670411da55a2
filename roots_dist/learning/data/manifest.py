"""What is known of a prepared corpus: how much it holds, what it was made from, with which options, and its hashes.

    prepare.py --writes last--> manifest.json --read_manifest--> bytes per token for bits per byte; is it up to date?

A folder without a manifest is not a finished corpus of ours; it may still be somebody else's, and usable.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from roots_dist.errors import DataError, Problem

NAME = "manifest.json"
TOKENIZER = "tokenizer.json"
SPLITS = ("train", "validation")


def stem(split: str) -> str:
    """The prefix of a split's files inside the folder, named as Megatron's tools name theirs."""
    return f"{split}_text_document"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class File(_Record):
    path: str
    bytes: int
    mtime_ns: int
    sha256: str

    @staticmethod
    def of(path: Path) -> File:
        state = path.stat()
        return File(path=str(path), bytes=state.st_size, mtime_ns=state.st_mtime_ns, sha256=sha256(path))

    def is_still(self, path: Path) -> bool:
        """Same size, and same time or else same content: a copied or touched file is not another one."""
        if not path.is_file():
            return False
        state = path.stat()
        return state.st_size == self.bytes and (state.st_mtime_ns == self.mtime_ns or sha256(path) == self.sha256)


class Options(_Record):
    """Everything besides the inputs that the outputs depend on; not the number of workers."""

    text_key: str
    vocab: int | None
    pre_tokenizer: str | None
    tokenizer_sha256: str | None
    """Of the tokenizer that was given; then vocab and pre_tokenizer are None."""
    end_of_document: str | None
    validation: float
    seed: int
    on_error: str
    kind: str | None = "bpe"
    """None with a tokenizer that was given"""
    min_count: int | None = None
    split_sentences: bool = False


class Split(_Record):
    documents: int = 0
    tokens: int = 0
    """With one end of document each."""
    bytes: int = 0
    """Of the documents' text in UTF-8."""

    def plus(self, tokens: int, bytes: int) -> Split:
        return Split(documents=self.documents + 1, tokens=self.tokens + tokens, bytes=self.bytes + bytes)


class Manifest(_Record):
    format: str = "roots-corpus-1"
    options: Options
    vocab: int
    end_of_document: str
    """The token, as tokenizer.load() takes it."""
    tokenizer_sha256: str
    train: Split
    validation: Split
    defects: dict[str, int]
    """How many of each kind were skipped."""
    examples: tuple[str, ...]
    """The first of them, with file and line."""
    inputs: tuple[File, ...]
    outputs: tuple[File, ...]
    """Paths are relative to the folder."""
    reused: bool = Field(False, exclude=True)
    """Nothing had to be done: the folder was up to date."""

    def split_of(self, prefix: str | Path) -> Split | None:
        """The split that a corpus prefix of this folder names."""
        name = Path(prefix).name.removesuffix(".bin").removesuffix(".idx")
        return {stem(split): getattr(self, split) for split in SPLITS}.get(name)

    def summary(self) -> str:
        """A few lines for a terminal."""
        skipped = ", ".join(f"{count} {kind}" for kind, count in self.defects.items())
        lines = ["up to date, nothing to do"] if self.reused else []
        for name in SPLITS:
            split: Split = getattr(self, name)
            rate = f", {split.bytes / split.tokens:.2f} bytes per token" if split.tokens else ""
            lines.append(f"{name:<11}{split.documents:>10,} documents {split.tokens:>14,} tokens{rate}")
        if not self.validation.documents and self.options.validation:
            lines.append("no document fell to validation: there are few; give more, smaller documents to hold some out")
        trained = self.options.tokenizer_sha256 is None
        lines.append(f"{'tokenizer':<11}{self.vocab:>10,} ids, " + ("trained here" if trained else "as given"))
        if self.options.vocab is not None and self.vocab < self.options.vocab:
            lines.append(f"the text gives no more than {self.vocab:,} entries; {self.options.vocab:,} were asked for")
        return "\n".join(lines + [f"skipped    {skipped}"] * bool(skipped))


def read_manifest(prefix_or_folder: str | Path) -> Manifest | None:
    """The manifest beside a corpus, or None for a corpus of other make. Raises DataError if it is ours but damaged."""
    path = Path(prefix_or_folder)
    path = (path if path.is_dir() else path.parent) / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    if "roots-corpus-" not in text:
        return None
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise _damaged(path, error.errors()[0]["msg"]) from error


def _damaged(path: Path, why: object) -> DataError:
    return DataError(
        Problem(
            key="manifest",
            found=str(path),
            expected=f"what `roots prepare` wrote ({why})",
            fix="prepare the corpus again",
        )
    )


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
