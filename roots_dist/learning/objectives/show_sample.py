"""`roots sample CONFIG`: what an objective makes of the corpus, in words. One sample of a training step, field by
field.

config --objectives/, learning/data/batches.py--> MicroBatch --tokenizer--> lines
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from torch import Tensor

from roots_dist.config.schema import Config
from roots_dist.learning.data.batches import ID_FIELDS, Batches
from roots_dist.learning.data.tokenizer import Codec, load_codec
from roots_dist.learning.objectives import make_objective
from roots_dist.world.batch import IGNORE, MicroBatch


def sample_lines(config: Config, step: int) -> Iterator[str]:
    """The first sample of a step (counted from 0). Raises DataError if the corpus or the tokenizer cannot be used."""
    one = config.changed({"train.micro_batch": 1})
    batch = Batches.open(one, make_objective(one), one.data.train, packed=one.finetune.packing).at(step)[0]
    codec = load_codec(config.data.tokenizer) if config.data.tokenizer else None
    for name, value in fields(batch):
        if name in ID_FIELDS:
            told = words(value, codec)
        elif name == "position_ids":
            told = ", ".join(f"{first}–{last}" for first, last in ranges(value))
        else:
            told = ", ".join(f"{v} (×{n})" for v, n in runs(value))
        yield f"{name}, {len(value)}\n    {told}"


def fields(batch: MicroBatch) -> Iterator[tuple[str, list[int]]]:
    """Yield the name and the first row of each field that says something."""
    for name, value in vars(batch).items():
        if isinstance(value, Tensor) and name != "sample_ids":
            yield name, value[0].reshape(-1).tolist()


def runs(values: Sequence[int]) -> list[tuple[int, int]]:
    """(value, how many in a row) …"""
    return [(value, len(list(same))) for value, same in groupby(values)]


def ranges(values: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of each stretch in which every value is one more than the one before."""
    firsts = [i for i, value in enumerate(values) if i == 0 or value != values[i - 1] + 1]
    return [(values[a], values[b - 1]) for a, b in zip(firsts, [*firsts[1:], len(values)])]


def words(ids: Sequence[int], codec: Codec | None) -> str:
    """The text; without a tokenizer the ids. A dot stands for each run of tokens that are not scored."""
    parts = []
    for scored, run in groupby(ids, key=lambda i: i != IGNORE):
        some = list(run)
        parts.append("·" if not scored else codec.decode(some) if codec else " ".join(map(str, some)))
    return " ".join(part.strip() for part in parts)
