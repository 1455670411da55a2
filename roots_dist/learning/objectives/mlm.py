"""Hide some tokens of a text, score the guesses at those places (Devlin et al. 2019, section 3.1; alone: Liu et al.
2019).

    order.py: sample number --batches.py--> MaskedTokens.sample: [CLS] window [SEP], some of it hidden --> fields

Windows cross document borders, as RoBERTa's FULL-SENTENCES do; the end-of-document token is in the stream. What is
hidden is drawn anew each time that a window comes by (dynamic masking, Liu et al. 2019, section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from roots_dist.config.records import special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.config.sections import ObjectiveConfig
from roots_dist.errors import present
from roots_dist.learning.data.specials import Specials
from roots_dist.learning.data.store import Corpus, num_windows
from roots_dist.world.batch import IGNORE, MicroBatch, num_scored


def hide(
    tokens: np.ndarray, specials: Specials, how: ObjectiveConfig, draw: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """tokens [S] -> (what is shown, targets), [S] each: the target is the token where it is to be guessed, else IGNORE.

    Each place of a word is chosen with probability how.mask_probability, on its own, as the collator of transformers
    does; the original chooses exactly that share of each text, which in short texts is a matter of rounding. Of the
    chosen, 80 % are shown as the mask, 10 % as any word, 10 % as they are. Special tokens are never chosen and never
    shown for a word. With whole_words, tokens of one word are chosen together, and shown each in its own way.
    """
    word = ~specials.special[tokens]
    chance = draw.random(len(tokens))
    if how.whole_word_mask:
        begins = ~(specials.is_continuation[tokens] & word & np.roll(word, 1))
        begins[0] = True
        chance = chance[np.flatnonzero(begins)[np.cumsum(begins) - 1]]  # each token's is that of its word's first
    chosen = word & (chance < how.mask_probability)
    fate = draw.random(len(tokens))
    other = specials.words[draw.integers(len(specials.words), size=len(tokens))]
    shown = np.where(chosen & (fate < how.mask_replace_probability), present(specials.mask), tokens)
    shown = np.where(
        chosen
        & (fate >= how.mask_replace_probability)
        & (fate < how.mask_replace_probability + how.random_replace_probability),
        other,
        shown,
    )
    return shown, np.where(chosen, tokens, IGNORE)


def enclosed(source: Corpus, index: int, seq: int, specials: Specials) -> np.ndarray:
    """int64 [S]: [CLS], the window's tokens, [SEP]."""
    return np.concatenate([[specials.cls], source.tokens(index * (seq - 2), seq - 2), [specials.sep]]).astype(np.int64)


class MaskedTokens:
    """S positions."""

    weights: Mapping[str, float] = {"mlm": 1.0}
    perplexity_term = "mlm"

    def __init__(self, config: Config, specials: Specials):
        specials.require(*special_tokens_of(config))
        self.seq, self.how, self.specials = config.data.seq_length, config.objective, specials

    def open(self, path: str) -> Corpus:
        return Corpus.open(path)

    def num_samples(self, source: Corpus) -> int:
        return num_windows(source, self.seq - 2, self.seq - 2)

    def sample(self, source: Corpus, index: int, draw: np.random.Generator) -> dict[str, np.ndarray]:
        shown, targets = hide(enclosed(source, index, self.seq, self.specials), self.specials, self.how, draw)
        return {"tokens": shown, "targets": targets}

    def counts(self, batch: MicroBatch) -> dict[str, int]:
        return {"mlm": num_scored(batch.targets)}
