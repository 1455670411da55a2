"""The manifest of a prepared corpus: its size, its inputs, the options, and hashes.

    prepare.py --writes last--> manifest.json --read_manifest--> bytes per token (for bits per byte); is it up to date?

A folder without a manifest is not a finished corpus of ours, but may be a usable corpus from another tool.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from roots_dist.errors import DataError, Problem
from roots_dist.idx_format import MANIFEST

SPLITS = ("train", "validation")


def split_stem(split: str) -> str:
    """Prefix of a split's files in the folder, named as in Megatron's tools."""
    return f"{split}_text_document"


PAIRS = tuple(f"{split_stem(split)}{ending}" for split in SPLITS for ending in (".bin", ".idx"))
"""Names of the files of both splits."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class File(_Record):
    """A file and its hash."""

    path: str
    bytes: int
    mtime_ns: int
    sha256: str

    @staticmethod
    def of(path: Path) -> File:
        state = path.stat()
        return File(path=str(path), bytes=state.st_size, mtime_ns=state.st_mtime_ns, sha256=sha256(path))

    def is_unchanged(self, path: Path) -> bool:
        """True if the size is the same, and the time or the content too: a copied or touched file counts as
        unchanged."""
        if not path.is_file():
            return False
        state = path.stat()
        return state.st_size == self.bytes and (state.st_mtime_ns == self.mtime_ns or sha256(path) == self.sha256)


class Options(_Record):
    """All options that the outputs depend on, which excludes the number of workers."""

    text_key: str
    vocab: int | None
    pre_tokenizer: str | None
    tokenizer_sha256: str | None
    """Hash of an existing tokenizer; vocab and pre_tokenizer are then None."""
    end_of_document: str | None
    validation: float
    seed: int
    on_error: str
    kind: str | None = "bpe"
    """None with an existing tokenizer."""
    min_count: int | None = None
    split_sentences: bool = False
    begin_of_document: bool = False
    tokenizer_files: dict[str, str] = {}
    """Files beside an existing tokenizer that say which tokens begin and end a text -> their hash."""
    extensions: tuple[str, ...] = ()
    """SHA-256 of each file whose readers may have read the inputs."""


class Split(_Record):
    """Size of the training or the validation split."""

    documents: int = 0
    tokens: int = 0
    """Number of tokens, including those that begin and end each document."""
    bytes: int = 0
    """UTF-8 bytes of the documents' text."""

    def plus(self, tokens: int, bytes: int) -> Split:
        """The split with one more document."""
        return Split(documents=self.documents + 1, tokens=self.tokens + tokens, bytes=self.bytes + bytes)


class CorpusManifest(_Record):
    """The manifest of a corpus folder."""

    format: str = "roots-corpus-1"
    options: Options
    vocab: int
    end_of_document: str
    """The end-of-document token, as tokenizer.load() takes it."""
    tokenizer_sha256: str
    begin_of_document: str | None = None
    """The token that begins each document."""
    train: Split
    validation: Split
    defects: dict[str, int]
    """Number of skipped documents of each kind."""
    examples: tuple[str, ...]
    """The first skipped documents, with file and line."""
    passed_over: str = ""
    """Number of files of each kind that were not read in the folders of the inputs."""
    losses: dict[str, int] = {}
    """Kind of loss -> number of documents that the tokenizer does not decode to their text, beyond its normalizer."""
    loss_example: str | None = None
    """The first loss of the gravest kind."""
    inputs: tuple[File, ...]
    outputs: tuple[File, ...]
    """Output files, with paths relative to the folder."""
    reused: bool = Field(False, exclude=True)
    """True if the folder was up to date, so that nothing was done."""

    def split_of(self, prefix: str | Path) -> Split | None:
        """The split that a corpus prefix in this folder names."""
        name = Path(prefix).name.removesuffix(".bin").removesuffix(".idx")
        return {split_stem(split): getattr(self, split) for split in SPLITS}.get(name)

    def summary(self) -> str:
        """A few lines for the terminal."""
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
        around = " ".join(filter(None, (self.begin_of_document, "TEXT", self.end_of_document)))
        lines.append(f"{'document':<11}{around}")
        if self.losses:
            lost = ", ".join(f"{count:,} lose {kind}" for kind, count in sorted(self.losses.items()))
            number = self.train.documents + self.validation.documents
            lines.append(f"{'lossy':<11}of {number:,} documents {lost} when decoded, first {self.loss_example}")
        lines += [f"skipped    {skipped}"] * bool(skipped)
        lines += [f"not read   {self.passed_over}"] * bool(self.passed_over)
        return "\n".join(lines)


def read_manifest(prefix_or_folder: str | Path) -> CorpusManifest | None:
    """Read the manifest beside a corpus; None for a corpus from another tool. Raises DataError if it is ours but
    damaged."""
    path = Path(prefix_or_folder)
    path = (path if path.is_dir() else path.parent) / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    if "roots-corpus-" not in text:
        return None
    try:
        return CorpusManifest.model_validate_json(text)
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
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()
