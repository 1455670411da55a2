"""Answer as a conversation does: next tokens, but only those of the answers are scored (Ouyang et al. 2022, section
3.5).

    row: a conversation --data/turns.py, a template--> ids, and which of them are learned --> fields

A conversation longer than data.seq_length is cut at its end; one of which nothing is learned before that is refused, or
left out (finetune.on_error=skip).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from roots_dist.config.records import special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.data.packing import Packs, pack
from roots_dist.learning.data.remarks import counted
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.tasks import Example, Examples, open_examples
from roots_dist.learning.objectives.classify import padded
from roots_dist.world.batch import IGNORE, PADDING, MicroBatch, QuestionObjective, RowObjective, num_scored


class InstructAnswers(QuestionObjective):
    """S positions."""

    perplexity_term = "instruct"
    weights: Mapping[str, float] = {perplexity_term: 1.0}

    def __init__(self, config: Config, specials: Specials):
        specials.require(*special_tokens_of(config))
        self.config, self.specials, self.seq = config, specials, config.data.seq_length

    def open(self, path: str) -> Examples:
        return without_mute(open_examples(path, self.config), self, self.config)

    def num_samples(self, source: Examples | Packs) -> int:
        return len(source)

    def packed(self, source: Examples) -> Packs:
        """The same rows, several to a sample (finetune.packing)."""
        return Packs(source, tuple(pack([self._positions(row) for row in source.rows], self.seq)))

    def _positions(self, example: Example) -> int:
        """Positions of a sample that the row takes: one less than its ids, the last of which is only a target."""
        return max(1, min(self.length(example), self.seq))  # a row of one token is refused, but not here

    def too_long(self, example: Example) -> bool:
        return len(example.first) > self.seq + 1

    def length(self, example: Example) -> int:
        return len(example.first) - 1

    def teaches(self, example: Example) -> bool:
        """True if something of an answer is left when it is cut."""
        return bool(present(example.token_labels)[1 : self.seq + 1].any())

    def sample(self, source: Examples | Packs, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        if isinstance(source, Packs):
            return documents_of(list(map(self._texts, source.rows_of(index))), self.seq, self.specials.pad)
        tokens, targets = self._texts(source.rows[index])
        fields = padded(tokens, self.seq, self.specials.pad)
        return fields | {"targets": np.pad(targets, (0, self.seq - len(targets)), constant_values=IGNORE)}

    def _texts(self, example: Example) -> tuple[np.ndarray, np.ndarray]:
        return tokens_and_targets(example.first, present(example.token_labels), self.seq)

    def question(self, source: Examples, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The text before the last answer, and that answer with the token that ends it."""
        example = source.rows[index]
        marks = present(example.token_labels)
        begin = np.flatnonzero(np.diff(marks, prepend=0) == 1)[-1]
        end = np.flatnonzero(marks)[-1] + 1
        return example.first[:begin], example.first[begin:end]

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {self.perplexity_term: num_scored(batch.targets)}


def tokens_and_targets(ids: np.ndarray, learned: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """int64: the tokens of a text, cut to a length, and what is predicted at each of them."""
    ids, learned = (part[: length + 1].astype(np.int64) for part in (ids, learned))
    return ids[:-1], np.where(learned[1:], ids[1:], IGNORE)


def documents_of(texts: Sequence[tuple[np.ndarray, np.ndarray]], seq: int, pad: int | None) -> dict[str, np.ndarray]:
    """Fields of a sample that holds several texts, each a document with positions from 0."""
    tokens, targets = zip(*texts)
    lengths = [len(one) for one in tokens]
    rest = (0, seq - sum(lengths))
    return padded(np.concatenate(tokens), seq, pad) | {
        "targets": np.pad(np.concatenate(targets), rest, constant_values=IGNORE),
        "document_ids": np.pad(np.repeat(np.arange(len(texts)), lengths), rest, constant_values=PADDING),
        "position_ids": np.pad(np.concatenate([np.arange(n) for n in lengths]), rest),
    }


def without_mute(examples: Examples, objective: RowObjective, config: Config) -> Examples:
    """Leave out the rows of which nothing is learned once they are cut, if invalid rows are skipped; keep all if none
    would be left."""
    taught = tuple(row for row in examples.rows if objective.teaches(row))
    if config.finetune.on_error == "stop" or len(taught) in (0, len(examples)):
        return examples
    first = next(row for row in examples.rows if not objective.teaches(row))
    remark = (
        f"skips {counted(len(examples) - len(taught), 'sample')} (finetune.on_error=skip): nothing is learned of the "
        f"first {config.data.seq_length} tokens; the first is {first.place}"
    )
    return Examples(examples.prefix, taught, (*examples.remarks, remark))
