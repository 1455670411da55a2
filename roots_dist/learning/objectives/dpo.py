"""Prefer one answer to another: direct preference optimization (DPO, Rafailov et al. 2023, equation 7).

    row: prompt, chosen, rejected --data/turns.py--> two conversations, one sample of two documents --> fields
    loss of a pair: -log σ(β ((log p(chosen) - log p_ref(chosen)) - (log p(rejected) - log p_ref(rejected))))

Both texts are in one sample, each with attention and positions of its own, so that every layout carries a pair as it
carries any sample. log p_ref are those of the model that training starts from; runs/evaluate/references.py computes
them once. A pair that is longer than data.seq_length is cut at the ends of its texts.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from roots_dist.config.records import special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.tasks import Example, Examples, open_examples
from roots_dist.learning.objectives.instruct import documents_of, tokens_and_targets, without_mute
from roots_dist.world.batch import IGNORE, MicroBatch, RowObjective


class Preferences(RowObjective):
    """S positions, for both texts of a pair."""

    perplexity_term = None
    weights: Mapping[str, float] = {"dpo": 1.0}

    def __init__(self, config: Config, specials: Specials):
        specials.require(*special_tokens_of(config))
        self.config, self.specials, self.seq = config, specials, config.data.seq_length

    def open(self, path: str) -> Examples:
        return without_mute(open_examples(path, self.config), self, self.config)

    def num_samples(self, source: Examples) -> int:
        return len(source)

    def too_long(self, example: Example) -> bool:
        return len(example.first) + len(present(example.second)) - 2 > self.seq

    def length(self, example: Example) -> int:
        return max(2 * len(example.first), len(example.first) + len(present(example.second))) - 2

    def teaches(self, example: Example) -> bool:
        """True if something of both answers is left when they are cut."""
        return all((targets != IGNORE).any() for _, targets in self._texts(example))

    def sample(self, source: Examples, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        """Add the references of the pair, if the source has them."""
        fields = documents_of(self._texts(source.rows[index]), self.seq, self.specials.pad)
        return fields if source.references is None else fields | {"references": source.references[index]}

    def _texts(self, example: Example) -> list[tuple[np.ndarray, np.ndarray]]:
        """Tokens and targets of the chosen and the rejected text. Each may fill half of the sample, and what the other
        leaves."""
        chosen, rejected = len(example.first) - 1, len(present(example.second)) - 1
        chosen = min(chosen, max(self.seq - rejected, self.seq // 2))
        rejected = min(rejected, self.seq - chosen)
        return [
            tokens_and_targets(example.first, present(example.token_labels), chosen),
            tokens_and_targets(present(example.second), present(example.second_labels), rejected),
        ]

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        """Pairs with targets; evaluation fills its last microbatches with rows that have none."""
        return {"dpo": int((present(batch.targets) != IGNORE).any(1).sum())}
