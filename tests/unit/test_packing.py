"""Several rows in a sample: every row once, in few samples, and each learned as if it were alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.packing import Packs, pack
from roots_dist.learning.data.tasks import Example, Examples
from roots_dist.learning.objectives.instruct import InstructAnswers
from roots_dist.learning.objectives.synthetic import proof_objective
from roots_dist.runs.train.step import train_step
from roots_dist.world.batch import IGNORE, PADDING
from roots_dist.world.mesh import Mesh

SEQ = 16
POSITIONS = {
    "learned": {"positions": "learned"},
    "rotary": {"positions": "rotary", "kv_heads": 1},
    "alibi": {"positions": "alibi"},
    "windows": {"positions": "rotary", "window": 4, "layer_kinds": ["window", "full"]},
}


@pytest.mark.parametrize("room", [1, 7, 64])
def test_every_row_is_in_one_sample_that_has_room_for_it(room):
    lengths = np.random.default_rng(room).integers(1, room + 1, size=500).tolist()
    packs = pack(lengths, room)
    assert sorted(i for numbers in packs for i in numbers) == list(range(500))
    filled = [sum(lengths[i] for i in numbers) for numbers in packs]
    assert max(filled) <= room and len(packs) <= 11 / 9 * -(-sum(lengths) // room) + 2
    assert packs == pack(lengths, room)


def test_a_row_takes_the_fullest_sample_that_it_fits():
    assert pack([6, 5, 4, 3, 2], 10) == [(0, 2), (1, 3, 4)]
    assert pack([3], 3) == [(0,)] and pack([], 3) == []


def small(features: str = "rotary", **finetune: object) -> Config:
    model = {"layers": 2, "hidden": 16, "heads": 2, "vocab": 61, "init_std": 0.3} | POSITIONS[features]
    return Config.model_validate(
        {
            "model": model,
            "objective": {"name": "instruct"},
            "data": {"seq_length": SEQ},
            "finetune": finetune,
            "advanced": {"float64": True, "engine": "reference"},
        }
    )


def some_rows(count: int) -> Examples:
    draw = np.random.default_rng(3)
    rows = [draw.integers(61, size=int(n)).astype(np.int32) for n in draw.integers(3, 12, size=count - 1)]
    rows.append(draw.integers(61, size=SEQ + 9).astype(np.int32))  # cut
    return Examples("rows", tuple(map(example, rows)))


def example(ids: np.ndarray, question: int = 2) -> Example:
    """A row whose first tokens are not learned."""
    return Example(ids, token_labels=(np.arange(len(ids)) >= question).astype(np.int32))


def test_a_sample_says_where_its_rows_begin():
    answers = proof_objective(small()).objective
    rows = tuple(example(np.array(ids, np.int32), question=1) for ids in ([5, 6, 7], [8, 9]))
    fields = answers.sample(Packs(Examples("rows", rows), ((0, 1),)), 0, np.random.default_rng(0))
    rest = SEQ - 3
    assert fields["tokens"][:3].tolist() == [5, 6, 8]
    assert fields["targets"].tolist() == [6, 7, 9] + [IGNORE] * rest
    assert fields["document_ids"].tolist() == [0, 0, 1] + [PADDING] * rest
    assert fields["position_ids"].tolist() == [0, 1, 0] + [0] * rest


@pytest.mark.parametrize("features", POSITIONS)
def test_packed_rows_are_learned_as_if_each_were_a_sample(features):
    """One step over all rows, packed and not: the same loss, and the same gradients, of which moments are a tenth."""
    examples = some_rows(12)
    found = []
    for packed in (False, True):
        config = small(features, packing=packed)
        answers = proof_objective(config).objective
        assert isinstance(answers, InstructAnswers)
        source = answers.packed(examples) if packed else examples
        samples = len(source)
        assert samples == (5 if packed else 12)
        config = config.changed({"train.global_batch": samples, "train.micro_batch": samples, "optim.clip_grad": 0.0})
        run = build_run(config, Mesh.single(), objective=answers)
        report = train_step(run, Batches(config, answers, [source], [1.0]).at(0), 0.0)
        moments = {p.name: run.engine.read_state(p.name)["exp_avg"] for p in run.params}
        found.append((report.loss, report.grad_norm, moments))
    (loss, norm, moments), (loss_packed, norm_packed, moments_packed) = found
    assert loss_packed == pytest.approx(loss, abs=1e-10) and norm_packed == pytest.approx(norm, abs=1e-10)
    for name, moment in moments.items():
        torch.testing.assert_close(moments_packed[name], moment, rtol=0, atol=1e-10)


def test_a_row_of_one_token_is_refused_by_the_checks_and_not_by_packing():
    rows = Examples("rows", (example(np.array([7], np.int32)), example(np.arange(5, dtype=np.int32))))
    answers = proof_objective(small(packing=True)).objective
    assert isinstance(answers, InstructAnswers)
    assert not answers.teaches(rows.rows[0]) and len(answers.packed(rows)) == 1
