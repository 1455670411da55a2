"""Log-probabilities of the rows under the model that training starts from (dpo): computed once, before
the first step, and kept.

    [Examples] --the initial weights, in any layout--> log-probability of both answers of each row
        --references.npz in the run's folder--> a run that is resumed, evaluation

The file is written before the first step, so a checkpoint of a later step has it. It belongs to the samples as they
were: with other rows, in another order or cut elsewhere, a run is refused. For its evaluation they are computed anew.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch

from roots_dist.assembly.passes import Passes
from roots_dist.config.load import CONFIG_FILE, read_record
from roots_dist.config.schema import Config
from roots_dist.errors import CheckpointError, ConfigError, DataError, Problem, present
from roots_dist.files import replacing
from roots_dist.learning.data.tasks import Examples
from roots_dist.learning.models.vocab_head import answer_scores
from roots_dist.parallel.optim.trainable import ADAPTER
from roots_dist.runs.evaluate.held_out import AT_A_TIME
from roots_dist.storage.checkpoint.format import read_index
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.world.batch import MicroBatch, Objective, stack_samples

log = logging.getLogger(__name__)

REFERENCES = "references.npz"
TOLD_EVERY = 10.0
"""Seconds between two lines that say how many rows are done."""
OF_ROWS = (
    "data.seq_length", "data.tokenizer", "finetune.turns", "finetune.chat_template", "finetune.chat_date",
    "finetune.on_error",
)  # fmt: skip
"""Keys that say how a row becomes a sample."""


def with_references(
    passes: Passes, objective: Objective, sources: Sequence[Examples], folder: Path, step: int
) -> list[Examples]:
    """The sources, each with its references. At step 0 they are computed and kept in the run's folder; later they are
    read there. Collective over the world. Raises DataError if they are missing, or those of other rows."""
    if step > 0:
        return _read_references(passes.config, objective, sources, folder)
    log.info("computing the references of %s rows", f"{sum(map(len, sources)):,}")
    scored = [replace(source, references=_score(passes, objective, source)) for source in sources]
    if passes.mesh.rank == 0:
        content = io.BytesIO()
        kept: Any = {rows_digest(objective, source): source.references for source in scored}
        np.savez(content, **kept)
        with replacing(folder / REFERENCES) as file:
            file.write(content.getvalue())
    return scored


def references_to_evaluate(
    passes: Passes, objective: Objective, sources: Sequence[Examples], folder: Path
) -> list[Examples]:
    """The sources, with references that the run has kept, or else computed from the weights that it started from. These
    are then the passes' weights: those to be evaluated are loaded afterwards. Collective over the world."""
    kept = _kept(folder)
    found = [kept.get(rows_digest(objective, source)) for source in sources]
    if any(known is None for known in found):
        _load_start(passes)
    return [
        replace(source, references=_score(passes, objective, source) if known is None else known)
        for source, known in zip(sources, found)
    ]


def _load_start(passes: Passes) -> None:
    """Load the weights that training began with. Adapters began as zero, unless the start has its own."""
    start = passes.config.finetune.init_from
    if start is None:
        return  # the passes' weights are drawn as those of training were
    try:
        checkpoint = best_or_newest(Path(start), passes.mesh)
    except CheckpointError as error:
        expected = "the model that training started from, for the references of rows that it had not"
        fix = "bring it back, or evaluate on data.validation of the run"
        raise DataError(Problem(key="finetune.init_from", found=start, expected=expected, fix=fix)) from error
    there = read_index(checkpoint, "weight")
    for p in passes.model.params:
        if p.name not in there:
            assert p.name.endswith(ADAPTER), p.name
            p.tensor.data.zero_()
    load_weights(checkpoint, [p for p in passes.model.params if p.name in there], passes.mesh)


def _read_references(config: Config, objective: Objective, sources: Sequence[Examples], folder: Path) -> list[Examples]:
    """The sources, with the references that the run in this folder has kept. Raises DataError or ConfigError that names
    what has changed since."""
    path, found = folder / REFERENCES, _kept(folder)
    digests = [rows_digest(objective, source) for source in sources]
    for source, digest in zip(sources, digests):
        if digest not in found:
            raise _other_rows(config, source, path)
    return [replace(source, references=found[digest]) for source, digest in zip(sources, digests)]


def _kept(folder: Path) -> dict[str, np.ndarray]:
    """The references that the run in this folder has kept, by the digest of the rows."""
    path = folder / REFERENCES
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {name: kept[name] for name in kept.files}
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        expected = "references of the rows, which the run has left there before its first step"
        state = "no such file" if isinstance(error, FileNotFoundError) else f"damaged ({error})"
        fix = "start the run anew in another track.folder"
        raise DataError(Problem(key=str(path), found=state, expected=expected, fix=fix)) from error


def _other_rows(config: Config, source: Examples, path: Path) -> DataError | ConfigError:
    """The error of rows that are not those of the references: it names a key of the config, or else the content of a
    file."""
    kept = path.with_name(CONFIG_FILE)
    was = read_record(kept) if kept.is_file() else config
    fix = "set it back, or start anew in another track.folder"
    for key in OF_ROWS:
        now, before = config.value(key), was.value(key)
        if now != before:
            expected = f"{before!r}, with which the references in {path} were computed"
            return ConfigError([Problem(key=key, found=now, expected=expected, fix=fix)])
    begun_with = {file.path for file in (*was.data.train, *was.data.validation)}
    if source.prefix not in begun_with:
        expected = f"one of {', '.join(sorted(begun_with))}, of which {path} holds the references"
        return DataError(Problem(key="file of rows", found=source.prefix, expected=expected, fix=fix))
    expected = f"the rows and {config.data.tokenizer} as they were when the run began, as the references in {path} are"
    fix = "give the files back as they were, or start anew in another track.folder"
    return DataError(Problem(key=f"rows of {source.prefix}", found=len(source), expected=expected, fix=fix))


def rows_digest(objective: Objective, source: Examples) -> str:
    """Digest what a sample holds of each row, in their order: ids and targets, cut to its length."""
    digest = hashlib.sha256()
    bare = replace(source, references=None)
    for i in range(len(source)):
        for name, part in objective.sample(bare, i, np.random.default_rng(i)).items():
            digest.update(name.encode() + np.ascontiguousarray(part, np.int64).tobytes())
    return digest.hexdigest()


def _score(passes: Passes, objective: Objective, source: Examples) -> np.ndarray:
    """float64 [rows, 2], equal on every rank. Data ranks take microbatches in turn, enough of them at a time to fill a
    pipeline."""
    mesh, config = passes.mesh, passes.config
    scores = torch.zeros(len(source), 2, dtype=torch.float64, device=mesh.device)
    step, told = config.train.micro_batch * mesh.dp.size, time.monotonic()

    def batch_of(first: int) -> tuple[np.ndarray, MicroBatch]:
        numbers = np.arange(first, first + step)[mesh.dp.rank :: mesh.dp.size]
        there = np.minimum(numbers, len(source) - 1)  # the last ones are filled up, so that all ranks compute alike
        samples = [objective.sample(source, int(i), np.random.default_rng(i)) for i in there]
        return numbers, replace(stack_samples(samples, numbers, 0), logits_at="targets").to(mesh.device)

    firsts = iter(range(0, len(source), step))
    while some := [batch_of(first) for first in islice(firsts, AT_A_TIME * mesh.pp.size)]:
        results = passes.forward([batch for _, batch in some])  # of the last stage
        for (numbers, batch), result in zip(some, results):
            own = answer_scores(result[0], passes.model.tp.of_context(present(batch.document_ids))).double()
            mine = numbers < len(source)
            scores[torch.from_numpy(numbers[mine]).to(mesh.device)] = own[torch.from_numpy(mine).to(mesh.device)]
        if time.monotonic() - told > TOLD_EVERY:
            told, done = time.monotonic(), min(len(source), int(some[-1][0].max()) + 1)
            log.info("references of %s of %s rows of %s", f"{done:,}", f"{len(source):,}", source.prefix)
    if mesh.tp.rank > 0:  # equal on all tensor ranks, so only one adds them
        scores.zero_()
    found: np.ndarray = mesh.world.sum_(scores).cpu().numpy()
    return found
