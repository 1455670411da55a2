"""Which parameter joins when, and at which rate, for every family: written down by hand from Howard & Ruder 2018.

Section 3.3: the last layer first, then one group of blocks below the other, the embedding last. Section 3.2: each layer
learns at a share of the rate of the layer above it. AdamW's steps of those that join are in test_adamw.py.
"""

from __future__ import annotations

import pytest

from roots_dist.config.schema import Config
from roots_dist.parallel.optim.trainable import Trainable, trainable
from roots_dist.verify.trainable import depths

BERT = dict(family="bert", norm_position="post", embedding_norm=True)
T5 = dict(family="t5", positions="relative", norm="rmsnorm", bias=False)
CASES: dict[str, tuple[dict, dict, int, dict[str, tuple[int, int]]]] = {
    # what is said of the model, of the objective; blocks that join at a time; piece -> (phase it joins in, depth)
    "gpt": (
        dict(layers=3), {}, 1,
        {"head": (0, 0), "blocks.2": (1, 1), "blocks.1": (2, 2), "blocks.0": (3, 3), "embed": (4, 4)},
    ),
    "gpt, two at a time": (
        dict(layers=4), {}, 2,
        {
            "head": (0, 0), "blocks.3": (1, 1), "blocks.2": (1, 2), "blocks.1": (2, 3), "blocks.0": (2, 4),
            "embed": (3, 5),
        },
    ),
    "gpt, two at a time of three": (
        dict(layers=3), {}, 2,
        {"head": (0, 0), "blocks.2": (1, 1), "blocks.1": (1, 2), "blocks.0": (2, 3), "embed": (3, 4)},
    ),
    "nothing above the blocks": (
        dict(layers=2, norm_position="post"), {}, 1, {"blocks.1": (0, 1), "blocks.0": (1, 2), "embed": (2, 3)},
    ),
    "bert": (
        BERT | dict(layers=2), {"name": "mlm"}, 1,
        {"head": (0, 0), "blocks.1": (1, 1), "blocks.0": (2, 2), "embed": (3, 3)},
    ),
    "electra": (
        BERT | dict(family="electra", layers=2), {"name": "rtd"}, 1,
        {
            "head": (0, 0), "blocks.1": (1, 1), "blocks.0": (2, 2), "generator.head": (3, 3),
            "generator.blocks.1": (3, 3), "generator.blocks.0": (4, 4), "generator.project": (5, 5), "embed": (5, 5),
        },
    ),
    "t5": (
        T5 | dict(layers=2, decoder_layers=3), {"name": "seq2seq"}, 1,
        {
            "head": (0, 0), "decoder.blocks.2": (1, 1), "decoder.blocks.1": (2, 2), "decoder.blocks.0": (3, 3),
            "bridge": (4, 4), "encoder.blocks.1": (4, 4), "encoder.blocks.0": (5, 5), "embed": (6, 6),
        },
    ),
}  # fmt: skip
EVERY, DECAY = 10, 0.5


def config(case: str, **finetune: object) -> Config:
    model, objective, blocks, _ = CASES[case]
    chosen = {"unfreeze_every": EVERY, "unfreeze_blocks": blocks, "layer_lr_decay": DECAY} | finetune
    return Config.model_validate(
        {"model": dict(hidden=16, heads=4, vocab=61) | model, "objective": objective, "finetune": chosen}
    )


def piece_of(name: str, pieces) -> str:
    """The longest name of a piece that the parameter's begins with: blocks.1 is not blocks.10."""
    return max((piece for piece in pieces if f"{name}.".startswith(f"{piece}.")), key=len)


@pytest.mark.parametrize("case", CASES)
def test_the_head_learns_first_and_the_embedding_last(case):
    """A tied projection is the embedding, and joins with it."""
    expected = CASES[case][3]
    c = config(case, strategy="progressive")
    found = trainable(c, depths(c))
    seen = set()
    for name, when in found.items():
        piece = piece_of(name, expected)
        phase, depth = expected[piece]
        assert when == Trainable(EVERY * phase, pytest.approx(DECAY**depth)), name
        seen.add(piece)
    assert seen == expected.keys()


@pytest.mark.parametrize("case", ["bert", "t5"])
def test_all_learn_from_the_start_at_their_own_rates_unless_they_are_unfrozen(case):
    expected = CASES[case][3]
    c = config(case, strategy="full")
    for name, when in trainable(c, depths(c)).items():
        assert when == Trainable(0, pytest.approx(DECAY ** expected[piece_of(name, expected)][1])), name
