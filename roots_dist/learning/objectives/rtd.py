"""Replaced-token detection: a generator fills in hidden tokens, a discriminator judges each (Clark et al.
2020).

    MaskedTokens' sample + the text as it was --> generator: term "mlm", its draws --> discriminator: term "rtd"

The draws are the model's business (learning/models/electra.py); a sample only says what was hidden and what stood
there.
"""

from __future__ import annotations

import numpy as np

from roots_dist.config.schema import Config
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.objectives.mlm import MaskedTokens, enclosed, hide
from roots_dist.world.batch import MicroBatch, num_scored


class ReplacedTokens(MaskedTokens):
    """S positions. The loss is the generator's plus 50 times the discriminator's (section 2)."""

    def __init__(self, config: Config, specials: Specials):
        super().__init__(config, specials)
        self.weights = {"mlm": 1.0, "rtd": config.objective.discriminator_weight}

    def sample(self, source: Corpus, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        tokens = enclosed(source, index, self.seq, self.specials)
        shown, targets = hide(tokens, self.specials, self.how, draw)
        return {"tokens": shown, "targets": targets, "originals": tokens}

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"mlm": num_scored(batch.targets), "rtd": num_scored(batch.originals)}
