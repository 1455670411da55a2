"""Tokenize texts on several processes, in order and in bounded memory.

    batches of texts --encode_texts--> (token ids, length and bytes of each document), in the order of the texts

Called by learning/data/prepare.py. The result does not depend on the number of workers. Workers are spawned: the
tokenizer library runs threads, and a forked copy of a process with threads may deadlock.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import NamedTuple

import numpy as np

from roots_dist.errors import DataError, Problem, present
from roots_dist.learning.data.sentences import sentences
from roots_dist.learning.data.tokenizer import Tokenizer, load


class Encoded(NamedTuple):
    """A batch of tokenized documents."""

    tokens: np.ndarray
    """Concatenated documents, each closed by the end-of-document token."""
    lengths: list[int]
    sequences: list[list[int]]
    """Lengths of the sentences of each document; a document that is not split into sentences has its own length."""
    bytes: list[int]
    """UTF-8 bytes of each text."""
    losses: Counter[str]
    """Kind of loss -> number of documents that decode to another text than they were, beyond the normalizer."""
    example: str | None
    """The first loss of the gravest kind."""


def encode_texts(
    texts: Iterator[list[str]],
    tokenizer: Path,
    end_of_document: str,
    dtype: np.dtype,
    workers: int,
    by_sentence: bool = False,
    begin: int | None = None,
) -> Generator[Encoded]:
    """Yield the encoded batches. begin: token that begins each document.

    Raises DataError if a worker dies. Closing the iterator, or an error in it, ends the workers.
    """
    work = partial(_encode, tokenizer, end_of_document, dtype, by_sentence, begin)
    if workers == 1:
        yield from map(work, texts)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    waiting: deque[Future[Encoded]] = deque()
    try:
        for part in texts:
            waiting.append(_submit(pool, work, part))
            if len(waiting) > 3 * workers:  # enough to keep all workers busy; the rest stays in the files
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            Problem(
                key="workers",
                found=workers,
                expected="workers that keep running, but one died",
                fix="fewer workers if memory ran out; in a script call prepare() under `if __name__ == '__main__':`",
            )
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(
    tokenizer: Path, end_of_document: str, dtype: np.dtype, by_sentence: bool, begin: int | None, texts: list[str]
) -> Encoded:
    encoder = _loaded(tokenizer, end_of_document)
    documents, sequences = [], []
    losses: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for text in texts:
        pieces = sentences(text) if by_sentence else [text]
        parts = [encoder.encode(piece) for piece in pieces]
        lost = [loss for loss in map(encoder.loss, pieces, parts) if loss is not None]
        if lost:
            gravest = min(lost)  # "characters" before "white space"
            losses[gravest.kind] += 1
            examples.setdefault(gravest.kind, gravest.example)
        parts = [part for part in parts[:-1] if part] + [[*parts[-1], encoder.end_of_document]]
        parts[0] = parts[0] if begin is None else [begin, *parts[0]]
        documents.append(np.array([i for part in parts for i in part], dtype=dtype))
        sequences.append([len(part) for part in parts])
    lengths = [len(document) for document in documents]
    sizes = [len(text.encode()) for text in texts]
    example = examples[min(examples)] if examples else None
    return Encoded(np.concatenate(documents), lengths, sequences, sizes, losses, example)


@lru_cache(maxsize=1)
def _loaded(tokenizer: Path, end_of_document: str) -> Tokenizer:
    """Load the tokenizer once per worker: it is too large to be sent with every batch."""
    return load(tokenizer, end_of_document)


def _submit(pool: ProcessPoolExecutor, work: Callable[[list[str]], Encoded], texts: list[str]) -> Future[Encoded]:
    """Submit work with SIGINT blocked, which a new worker inherits from its start: Ctrl-C is handled by the parent."""
    resource_tracker.ensure_running()  # if the pool started it, it would leave the signal unblocked
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(work, texts)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_worker() -> None:
    """End the worker when its parent is gone, for whatever reason."""
    parent = multiprocessing.parent_process()

    def follow() -> None:
        present(parent).join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
