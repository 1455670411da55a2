"""Labels of a fine-tuned model: for a text, a pair of texts, or each word. Texts are truncated and enclosed as in
training.

    prompts --the task's reader of rows (learning/data/tasks.py)--> Examples --> batches --Passes--> labels

B texts, S positions, C labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from roots_dist.assembly.passes import Passes
from roots_dist.config.records import is_bare, no_head, objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import DataError, present
from roots_dist.learning.data.remarks import Remarks
from roots_dist.learning.data.rows import Row
from roots_dist.learning.data.tasks import ROW_READERS, Examples, columns_of
from roots_dist.learning.objectives import make_objective, make_row_objective
from roots_dist.runs.generate.cached_decoder import broadcast
from roots_dist.runs.generate.prompts import Prompt, PromptEncoder
from roots_dist.world.batch import IGNORE, stack_samples

AT_ONCE = 16
"""Number of texts in one forward pass."""
Labels = dict[str, float]
"""Label -> probability, the likeliest first."""


def examples(prompts: Sequence[Prompt], encoder: PromptEncoder) -> Examples:
    """The prompts as rows of the task, with labels that are not used. Raises DataError for a prompt that is no such
    row."""
    config = encoder.config
    f, objective = config.finetune, objective_of(config)
    one_label = objective.answer == "classify"
    if is_bare(config):
        raise DataError(no_head(config))
    found = []
    for one in prompts:
        if f.pair_column is not None and not (one.pair or "").strip():
            raise one.problem("a second text, because this model was trained on pairs", "give it with --pair TEXT")
        if f.pair_column is None and one.pair is not None and one_label:
            raise one.problem("no second text, because this model was trained on single texts", "leave pair out")
        label = f.labels[0] if one_label else [f.labels[0]] * len(one.text.split())
        found.append(
            Row(
                {
                    f.text_column: one.text,
                    f.label_column: label,
                    **({f.pair_column: one.pair} if f.pair_column else {}),
                },
                one.place,
                1,
            )
        )
    return Examples(
        "prompts",
        tuple(
            ROW_READERS[present(objective.rows)](found, columns_of(config), encoder.codec, encoder.specials, Remarks())
        ),
    )


def cut_texts(rows: Examples, encoder: PromptEncoder) -> str | None:
    """The remark on texts of which only the beginning is read."""
    cut, seq = sum(map(make_row_objective(encoder.config).too_long, rows.rows)), encoder.config.data.seq_length
    of = "the text is" if len(rows.rows) == 1 else f"{cut:,} of {len(rows.rows):,} texts are"
    return f"{of} longer than data.seq_length = {seq}: only the beginning is read" if cut else None


def classify(passes: Passes, rows: Examples) -> list[Labels]:
    """Label probabilities of each text. The result is on every rank; collective over the world."""
    return [named(p[0], passes.config) for p in _read(passes, rows, per_word=False)]


def tag(passes: Passes, rows: Examples) -> list[list[Labels]]:
    """Label probabilities of each word of each text; words beyond data.seq_length get none. The result is on every
    rank; collective over the world."""
    return [[named(word, passes.config) for word in p] for p in _read(passes, rows, per_word=True)]


def named(p: torch.Tensor, config: Config) -> Labels:
    """Label probabilities by name, sorted, from float64 [C]."""
    order = p.argsort(descending=True, stable=True)
    return {config.finetune.labels[i]: float(p[i]) for i in order.tolist()}


def _read(passes: Passes, rows: Examples, *, per_word: bool) -> list[torch.Tensor]:
    """Probabilities of each text: float64 [1 or words, C]."""
    mesh, objective = passes.mesh, make_objective(passes.config)
    classes, found = len(passes.config.finetune.labels), []
    for first in range(0, len(rows), AT_ONCE):
        numbers = np.arange(first, min(first + AT_ONCE, len(rows)))
        samples = [objective.sample(rows, int(i), np.random.default_rng(0)) for i in numbers]  # a task draws nothing
        batch = replace(stack_samples(samples, numbers, 0), logits_at=slice(None)).to(mesh.device)
        with passes.model.tp.without_sequence_sharding():
            read = passes.forward([batch])
        p = read[0].double().softmax(-1) if read and mesh.tp.rank == 0 else None  # [B, C] or [B, S, C]
        shape = (len(numbers), batch.tokens.shape[1], classes) if per_word else (len(numbers), classes)
        p = broadcast(mesh.model, p, shape, torch.float64, mesh.device)
        for i, fields in enumerate(samples):
            found.append(p[i][torch.from_numpy(fields["labels"] != IGNORE)] if per_word else p[i : i + 1])
    return found
