"""`roots prepare`: from text files to a corpus for training. The whole process is on this page.

    inputs --readers--> documents --tokenizer--> ids --encode, several processes--> store --> folder with a manifest

The folder is complete or absent: everything is written to `.partial` inside it and moved at the end, the manifest last.
The tokens of a document depend on its number, the seed and the options, never on the number of workers.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from roots_dist import environment
from roots_dist.config.extensions import OwnReader, digest_of, extended, pinned
from roots_dist.config.special_tokens import SETTINGS
from roots_dist.errors import DataError, Problem
from roots_dist.files import PARTIAL
from roots_dist.idx_format import MANIFEST, TOKENIZER
from roots_dist.learning.data import readers
from roots_dist.learning.data import tokenizer as tokenizers
from roots_dist.learning.data.chat_rows import chat_fix
from roots_dist.learning.data.corpus_folder import COPIED, lock, publish, up_to_date
from roots_dist.learning.data.encode import Encoded, encode_texts
from roots_dist.learning.data.manifest import (
    PAIRS,
    SPLITS,
    CorpusManifest,
    File,
    Options,
    Split,
    sha256,
    split_stem,
)
from roots_dist.learning.data.order import fraction
from roots_dist.learning.data.readers import Defect, Document, PassedOver, listed
from roots_dist.learning.data.store import Writer, token_type
from roots_dist.learning.data.tokenizer import Tokenizer

BATCH_BYTES = 1 << 18
"""Bytes of text sent to a worker at a time."""
TRAINING_BYTES = 1 << 30
"""Bytes of text that train the tokenizer, about: of larger inputs, a random part of this size."""
"""Folder in the output for what is not complete."""
EXAMPLES = 20
"""Number of defects that are recorded in full; all are counted."""


class InputProgress(NamedTuple):
    """Progress of one pass over the inputs."""

    stage: Literal["tokenizer", "tokens"]
    done: int
    total: int
    """Bytes of the input files as stored on disk."""
    documents: int


def prepare(
    inputs: Sequence[str | Path],
    output: str | Path,
    *,
    text_key: str = "text",
    vocab: int = 4096,
    kind: str = "bpe",
    pre_tokenizer: str = "gpt2",
    min_count: int = 2,
    split_sentences: bool = False,
    tokenizer: str | Path | None = None,
    end_of_document: str | None = None,
    begin_of_document: bool = False,
    validation: float = 0.05,
    seed: int = 1234,
    workers: int | None = None,
    on_error: Literal["stop", "skip"] = "stop",
    extension: Sequence[str] = (),
    progress: Callable[[InputProgress], None] = lambda _: None,
) -> CorpusManifest:
    """Fill `output` with train and validation pairs, tokenizer.json and manifest.json, unless it is up to date.

    validation: share of documents held out, drawn by (seed, document number). tokenizer: an existing tokenizer.json;
    vocab, kind and pre_tokenizer are then ignored. split_sentences: each sentence becomes a sequence of its document
    and is tokenized separately. begin_of_document: each document begins with the tokenizer's bos. Raises DataError for
    any problem of the inputs; with on_error="skip", unreadable documents are counted in the manifest instead.
    extension: Python files whose readers read files of other suffixes.
    """
    _check(validation, workers, on_error, tokenizer, end_of_document, begin_of_document)
    folder = Path(output)
    pins = pinned(list(extension))
    given = tokenizers.load(tokenizer, end_of_document) if tokenizer is not None else None
    options = Options(
        text_key=text_key,
        vocab=None if given else vocab,
        pre_tokenizer=None if given or kind != "bpe" else pre_tokenizer,
        kind=None if given else kind,
        min_count=min_count if not given and kind == "words" else None,
        split_sentences=split_sentences,
        tokenizer_sha256=given.sha256 if given else None,
        end_of_document=end_of_document,
        validation=validation,
        seed=seed,
        on_error=on_error,
        begin_of_document=begin_of_document,
        tokenizer_files={path.name: sha256(path) for path in _companions(tokenizer)},
        extensions=tuple(map(digest_of, pins)),
    )
    own = extended(tuple(pins)).readers
    passed_over: PassedOver = Counter()
    ours = {(folder / name).resolve() for name in (MANIFEST, TOKENIZER, PARTIAL, *PAIRS, *COPIED)}
    files = readers.find(inputs, passed_over, ours, own)
    with lock(folder):
        if existing := up_to_date(folder, files, options):
            return existing.model_copy(update={"passed_over": listed(passed_over)})
        stream = _DocumentStream(files, options, own, progress)
        partial = folder / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            chosen = given or tokenizers.train(stream.texts_for_tokenizer(), vocab, pre_tokenizer, kind, min_count)
            chosen.backend.save(str(partial / TOKENIZER))
            for path in _companions(tokenizer):
                shutil.copyfile(path, partial / path.name)
            begin = _begin(chosen) if begin_of_document else None
            train, held_out = _tokenize(stream, chosen, begin, partial, workers or _workers(stream.total))
            manifest = CorpusManifest(
                options=options,
                vocab=chosen.vocab,
                end_of_document=chosen.end_token,
                tokenizer_sha256=chosen.sha256,
                begin_of_document=None if begin is None else chosen.specials.text(begin),
                train=train,
                validation=held_out,
                defects=dict(stream.defects),
                examples=tuple(stream.examples),
                passed_over=listed(passed_over),
                losses=dict(stream.losses),
                loss_example=stream.loss_example,
                inputs=stream.files_read(),
                outputs=tuple(File.of(p).model_copy(update={"path": p.name}) for p in sorted(partial.iterdir())),
            )
            publish(partial, folder, manifest)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _check(
    validation: float,
    workers: int | None,
    on_error: str,
    tokenizer: object,
    end_of_document: str | None,
    begin_of_document: bool,
) -> None:
    if not 0 <= validation < 1:
        expected = "a share of documents, 0 or more and below 1"
        raise DataError(Problem(key="validation", found=validation, expected=expected, fix="use 0.05 for 5 %"))
    if workers is not None and workers < 1:
        raise DataError(
            Problem(key="workers", found=workers, expected="at least 1", fix="leave it out to use every core")
        )
    if on_error not in ("stop", "skip"):
        raise DataError(Problem(key="on_error", found=on_error, expected="stop or skip", fix="choose one of these"))
    if end_of_document is not None and tokenizer is None:
        expected = "none with a tokenizer that is trained here, which has its own"
        raise DataError(Problem(key="end_of_document", found=end_of_document, expected=expected, fix="leave it out"))
    if begin_of_document and tokenizer is None:
        expected = "a tokenizer that is given: one that is trained here has no token to begin a text (bos)"
        fix = "leave --begin-of-document out, or name --tokenizer FILE"
        raise DataError(Problem(key="begin_of_document", found=True, expected=expected, fix=fix))


def _companions(tokenizer: str | Path | None) -> list[Path]:
    """Files beside a given tokenizer that go with it: they name its special tokens and its chat template."""
    beside = [] if tokenizer is None else [Path(tokenizer).with_name(name) for name in COPIED]
    return [path for path in beside if path.is_file()]


def _begin(chosen: Tokenizer) -> int:
    if chosen.specials.bos is None:
        expected = "a tokenizer that has a token to begin a text (bos), and this one names none"
        fix = f"name bos_token in {SETTINGS} beside --tokenizer, or leave --begin-of-document out"
        raise DataError(Problem(key="begin_of_document", found=True, expected=expected, fix=fix))
    return chosen.specials.bos


def _workers(total: int) -> int:
    """One process per available core, unless the text is read before they would have started."""
    if total < 1 << 20:
        return 1
    return environment.cores()


@dataclass
class _DocumentStream:
    """The numbered documents of the inputs; a defect stops the run or is counted."""

    files: list[Path]
    options: Options
    own: Mapping[str, OwnReader]
    progress: Callable[[InputProgress], None]
    defects: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    fix: str = ""
    """The fix for the first defect."""
    losses: Counter[str] = field(default_factory=Counter)
    """Documents that the tokenizer does not decode to their text, by what they lose."""
    loss_example: str | None = None

    def __post_init__(self) -> None:
        self._found = [path.stat() for path in self.files]
        self.total = sum(state.st_size for state in self._found)

    def batches(self, stage: Literal["tokenizer", "tokens"]) -> Iterator[list[Document]]:
        """All documents in order, in batches. Each pass counts the defects from zero."""
        self.defects.clear()
        self.examples.clear()
        batch, size, number, before = [], 0, 0, 0
        for path, state in zip(self.files, self._found):
            for item in readers.read(path, self.options.text_key, self.own):
                if isinstance(item, Defect):
                    self._note(item)
                    continue
                batch.append(item)
                size += len(item.text)
                number += 1
                if size >= BATCH_BYTES:
                    self.progress(InputProgress(stage, min(before + item.position, self.total), self.total, number))
                    yield batch
                    batch, size = [], 0
            before += state.st_size
        if batch:
            yield batch
        self.progress(InputProgress(stage, self.total, self.total, number))
        if not number:
            expected = f"a document in them ({'; '.join(self.examples[:3]) or 'the files are empty'})"
            found, fix = f"{len(self.files)} files", self.fix or "check the files"
            raise DataError(Problem(key="inputs", found=found, expected=expected, fix=fix))

    def _note(self, defect: Defect) -> None:
        fix = (chat_fix(defect.row, defect.file) if defect.row is not None else None) or defect.fix
        if self.options.on_error == "stop":
            raise DataError(f"{defect}. Fix: {fix}, or skip it with --on-error skip.")
        self.fix = self.fix or fix
        self.defects[defect.kind] += 1
        if len(self.examples) < EXAMPLES:
            self.examples.append(str(defect))

    def note_losses(self, part: Encoded) -> None:
        graver = min(part.losses, default="z") < min(self.losses, default="z")  # characters before white space
        self.loss_example = part.example if graver else self.loss_example
        self.losses += part.losses

    def files_read(self) -> tuple[File, ...]:
        """Input files with their hashes. Raises DataError if one has changed since the start."""
        read = tuple(map(File.of, self.files))
        for file, state in zip(read, self._found):
            if (file.bytes, file.mtime_ns) != (state.st_size, state.st_mtime_ns):
                expected = "a file that stays the same while it is read"
                raise DataError(Problem(key="input", found=file.path, expected=expected, fix="run it again"))
        return read

    def held_out(self, numbers: np.ndarray) -> np.ndarray:
        """True for each document that belongs to the validation split."""
        return fraction(self.options.seed, numbers) < self.options.validation

    def texts_for_tokenizer(self) -> Iterator[str]:
        """Texts of the training split: the tokenizer must not see held-out text."""
        share = min(1.0, TRAINING_BYTES / max(1, self.total))
        first = 0
        for batch in self.batches("tokenizer"):
            numbers = np.arange(first, first + len(batch))
            drawn = ~self.held_out(numbers) & (fraction(self.options.seed + 1, numbers) < share)
            yield from (document.text for document, take in zip(batch, drawn) if take)
            first += len(batch)


def _tokenize(
    stream: _DocumentStream, chosen: Tokenizer, begin: int | None, partial: Path, workers: int
) -> tuple[Split, Split]:
    """Write both pairs to `partial`; a split without documents gets none."""
    dtype, counts, first = token_type(chosen.vocab), [Split(), Split()], 0
    texts = ([document.text for document in batch] for batch in stream.batches("tokens"))
    train_prefix, validation_prefix = (partial / split_stem(split) for split in SPLITS)
    with Writer(train_prefix, dtype) as train, Writer(validation_prefix, dtype) as validation:
        writers = (train, validation)
        with closing(
            encode_texts(
                texts, partial / TOKENIZER, chosen.end_token, dtype, workers, stream.options.split_sentences, begin
            )
        ) as results:
            for part in results:
                stream.note_losses(part)
                held_out = stream.held_out(np.arange(first, first + len(part.lengths)))
                first += len(part.lengths)
                _add(part, held_out, writers, counts)
        if not train.num_documents:
            raise DataError(
                Problem(
                    key="validation",
                    found=stream.options.validation,
                    expected=f"documents left for training, but all {first} are held out",
                    fix="lower it, or change the seed",
                )
            )
        for writer in writers:
            if writer.num_documents:
                writer.commit()
    return counts[0], counts[1]


def _add(part: Encoded, held_out: np.ndarray, writers: Sequence[Writer], counts: list[Split]) -> None:
    documents = np.split(part.tokens, np.cumsum(part.lengths)[:-1])
    for tokens, sequences, size, split in zip(documents, part.sequences, part.bytes, held_out.astype(int)):
        writers[split].add(tokens, sequences)
        counts[split] = counts[split].plus(len(tokens), size)
