"""Answer as a conversation does: next tokens, but only those of the answers are scored (Ouyang et al. 2022, section
3.5).

    row: a conversation --data/turns.py, a template--> ids, and which of them are learned --> fields

A conversation longer than data.seq_length is cut at its end; one of which nothing is learned before that is refused, or
left out (finetune.on_error=skip).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from roots_dist.config.records import special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.data.remarks import counted
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.tasks import Example, Examples, open_examples
from roots_dist.learning.objectives.classify import padded
from roots_dist.world.batch import IGNORE, MicroBatch, QuestionObjective, num_scored


class Answers(QuestionObjective):
    """S positions."""

    perplexity_term = "instruct"
    weights: Mapping[str, float] = {perplexity_term: 1.0}

    def __init__(self, config: Config, specials: Specials):
        specials.require(*special_tokens_of(config))
        self.config, self.specials, self.seq = config, specials, config.data.seq_length

    def open(self, path: str) -> Examples:
        examples = open_examples(path, self.config)
        mute = [row for row in examples.rows if not self.teaches(row)]
        if self.config.finetune.on_error == "stop" or not mute or len(mute) == len(examples):
            return examples
        remark = (
            f"skips {counted(len(mute), 'sample')} (finetune.on_error=skip): nothing is learned of the first "
            f"{self.seq} tokens; the first is {mute[0].place}"
        )
        taught = tuple(row for row in examples.rows if self.teaches(row))
        return Examples(path, taught, (*examples.remarks, remark))

    def num_samples(self, source: Examples) -> int:
        return len(source)

    def too_long(self, example: Example) -> bool:
        return len(example.first) > self.seq + 1

    def teaches(self, example: Example) -> bool:
        """Something of an answer is left when it is cut."""
        return bool(present(example.token_labels)[1 : self.seq + 1].any())

    def sample(self, source: Examples, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        example = source.rows[index]
        ids, learned = (
            part[: self.seq + 1].astype(np.int64) for part in (example.first, present(example.token_labels))
        )
        targets = np.where(learned[1:], ids[1:], IGNORE)
        fields = padded(ids[:-1], self.seq, self.specials.pad)
        return fields | {"targets": np.pad(targets, (0, self.seq - len(targets)), constant_values=IGNORE)}

    def question(self, source: Examples, index: int) -> tuple[np.ndarray, np.ndarray]:
        """What stands before the last answer, and that answer with the token that ends it."""
        example = source.rows[index]
        marks = present(example.token_labels)
        begin = np.flatnonzero(np.diff(marks, prepend=0) == 1)[-1]
        end = np.flatnonzero(marks)[-1] + 1
        return example.first[:begin], example.first[begin:end]

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {self.perplexity_term: num_scored(batch.targets)}
