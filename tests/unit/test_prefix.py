"""A text is cut in two at any place: what the encoder reads and the decoder says is the text again."""

import numpy as np
import pytest

from roots_dist.config.schema import Config
from roots_dist.learning.data.specials import synthetic_specials
from roots_dist.learning.objectives import OBJECTIVES
from roots_dist.learning.objectives.synthetic import random_source
from roots_dist.world.batch import IGNORE, PADDING

SEQ, VOCAB = 24, 90


def prefix(**data: object):
    tree = {"model": {"family": "t5", "positions": "relative", "vocab": VOCAB}, "objective": {"name": "prefix"}}
    config = Config.model_validate(tree | {"data": {"seq_length": SEQ} | data})
    return OBJECTIVES["prefix"](config, synthetic_specials(VOCAB)), random_source(config)


@pytest.mark.parametrize("target_seq", [None, 7, 40])
def test_both_parts_are_the_text(target_seq):
    objective, corpus = prefix(target_seq_length=target_seq)
    cuts = []
    for index in range(objective.num_samples(corpus)):
        found = objective.sample(corpus, index, np.random.default_rng(index))
        text, said = corpus.tokens(index * SEQ, SEQ), found["targets"][found["targets"] != IGNORE]
        cut = SEQ if "document_ids" not in found else int((found["document_ids"] != PADDING).sum())
        cuts.append(cut)
        room = target_seq or SEQ
        assert len(found["tokens"]) == SEQ and len(found["targets"]) == len(found["decoder_tokens"]) == room
        assert np.array_equal(found["tokens"][:cut], text[:cut]) and np.array_equal(said, text[cut : cut + room])
        assert found["decoder_tokens"][0] == 0 and np.array_equal(found["decoder_tokens"][1 : len(said)], said[:-1])
    assert min(cuts) < 4 and max(cuts) > SEQ - 4 and max(cuts) < SEQ
