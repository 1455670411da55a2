"""What a block and a step may cost on a GPU: kernels, bytes, waits and messages, counted without one.

Blocks are those of shipped configs, at full size on the meta device; a step is a small model's, on a CPU. A count above
its ceiling is a loss that no CPU test would feel. One below it is a gain: lower the ceiling to it.
"""

from typing import NamedTuple

import pytest
import torch
from torch import nn

from roots_dist.assembly.rank_model import build_model
from roots_dist.assembly.run import build_run
from roots_dist.config.load import load
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.models.pieces import compute_dtype
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.plan.cost_counter import CostCounter
from roots_dist.runs.plan.rank_cost import META, RecordingGroup, fake_mesh, one_microbatch
from roots_dist.runs.train.step import train_step
from roots_dist.testing.watcher import Watcher, in_one_launch, in_words, kernels_of_a_gpu, reads_counted
from roots_dist.world.batch import MicroBatch
from roots_dist.world.fuse import Fuse, eager
from roots_dist.world.mesh import Mesh
from tests.parity.models import COMMON, MODELS


class Budget(NamedTuple):
    """Ceilings of a block, for one microbatch, in bf16 and without recomputation."""

    forward: int
    """Launches."""
    backward: int
    moved: float
    """GB that both read and write."""
    kept: float
    """GB from forward to backward."""
    messages: int = 0
    """Between tensor ranks."""


BLOCKS = {
    ("gpt2-small", "blocks.1", 1): Budget(forward=22, backward=43, moved=1.71, kept=0.190),
    ("llama-3-8b", "blocks.1", 1): Budget(forward=20, backward=36, moved=12.81, kept=0.841),
    ("llama-3-8b", "blocks.1", 2): Budget(forward=24, backward=42, moved=7.66, kept=0.421, messages=10),
    ("bert-base", "blocks.1", 1): Budget(forward=30, backward=44, moved=1.08, kept=0.0993),
    ("electra-base", "blocks.1", 1): Budget(forward=27, backward=44, moved=0.908, kept=0.0951),
    ("t5-base", "encoder.blocks.1", 1): Budget(forward=48, backward=34, moved=0.514, kept=0.048),
    ("t5-base", "decoder.blocks.1", 1): Budget(forward=67, backward=50, moved=0.264, kept=0.0201),
}
"""Config, piece, tensor ranks (sequence-parallel where there are several) -> ceilings."""
SHORTER = {"t5-base": {"data.seq_length": 128}}
"""Texts without a tokenizer have few sentinels."""
COMPILED = {
    ("llama-3-8b", "blocks.1", 1): Budget(forward=15, backward=28, moved=10.83, kept=0.841),
    ("llama-3-8b", "blocks.1", 2): Budget(forward=19, backward=34, moved=6.67, kept=0.421, messages=10),
}
"""The same where functions are compiled (train.compile), each to one launch."""
CASES = [*((*of, eager, budget) for of, budget in BLOCKS.items())] + [
    (*of, in_one_launch, budget) for of, budget in COMPILED.items()
]


@pytest.mark.parametrize(("name", "piece", "tp", "fuse", "budget"), CASES)
def test_a_block_keeps_its_budget(name: str, piece: str, tp: int, fuse: Fuse, budget: Budget) -> None:
    config = load(f"configs/{name}.yaml").changed(
        {
            "parallel.tp": tp,
            "parallel.pp": 1,
            "parallel.virtual_stages": 1,
            "parallel.schedule": "1f1b",
            "parallel.sequence_parallel": tp > 1,
            "train.recompute": "none",
            "train.precision": "bf16",
            **SHORTER.get(name, {}),
        }
    )
    group = RecordingGroup(tp)
    with META, kernels_of_a_gpu():
        model = build_model(config, fake_mesh(Layout(tp=tp), 0, group if tp > 1 else None), fuse=fuse)
        block = dict(model.pieces())[piece]
        batch = one_microbatch(config).to(META)
        _counted(block, batch, config, tp, piece.startswith("decoder"))  # allocates gradients, fills caches
        del group.messages[:]
        forward, backward, kept = _counted(block, batch, config, tp, piece.startswith("decoder"))
    both = forward.bytes + backward.bytes
    found = Budget(
        sum(forward.launches.values()),
        sum(backward.launches.values()),
        sum(both.values()) / 1e9,
        kept / 1e9,
        len(group.messages),
    )
    assert not forward.waits and not backward.waits, f"the host waits: {in_words(forward.waits + backward.waits)}"
    above = [field for field, most, has in zip(Budget._fields, budget, found) if has > most]
    assert not above, (
        f"{', '.join(above)} above the budget: {found}. Forward: {in_words(forward.launches)}. "
        f"Backward: {in_words(backward.launches)}. Bytes: {in_words(both)}"
    )


def _counted(
    block: nn.Module, batch: MicroBatch, config: Config, tp: int, decodes: bool
) -> tuple[Watcher, Watcher, int]:
    """Count one microbatch: what forward and backward cost, and the bytes that are kept between them."""
    x, encoded = (
        torch.zeros(len(ids), ids.shape[1] // tp, config.model.hidden, dtype=compute_dtype(config), requires_grad=True)
        for ids in (batch.tokens if batch.decoder_tokens is None or not decodes else batch.decoder_tokens, batch.tokens)
    )
    for parameter in block.parameters():
        parameter.requires_grad_(True)
    forward, backward, counter = Watcher(), Watcher(), CostCounter()
    with counter:
        with forward:
            out = block({"hidden": x, "encoded": encoded}, batch)["hidden"]
        kept = counter.live - out.nbytes  # the next block's input is kept there
        with backward:
            out.backward(torch.zeros_like(out))
    return forward, backward, kept


STEPS = dict.fromkeys(("gpt", "llama", "bert", "electra", "t5"), 1)
"""Waits of a step of four microbatches: all its numbers are read at once, between backward and the optimizer."""


@pytest.mark.parametrize("name", STEPS)
def test_a_step_waits_no_more_than_its_budget(name: str) -> None:
    config = Config.model_validate(COMMON | {"model": MODELS[name]}).changed(
        {
            "train.global_batch": 4,
            "objective.name": {"bert": "mlm", "electra": "rtd", "t5": "spans"}.get(name, "clm"),
            "model.layers": 2,
            "advanced.float64": False,
        }
    )
    run = build_run(config, Mesh.single(), objective=proof_objective(config))
    train_step(run, random_batches(config, 0, 0, 1), 1e-3)  # fills caches
    batches = random_batches(config, 1, 0, 1)
    watcher = Watcher()
    with reads_counted(watcher), watcher:
        train_step(run, batches, 1e-3)
    assert sum(watcher.waits.values()) <= STEPS[name], in_words(watcher.waits)


@pytest.mark.parametrize(("fuse", "most", "moves"), [(eager, 104, 67.1), (in_one_launch, 74, 29.2)])
def test_the_head_keeps_its_budget(fuse: Fuse, most: int, moves: float) -> None:
    """The head is that of llama-3-8b, 8,192 tokens in bf16: a float32 pass over its weight for each 1,024 tokens
    is 50 GB."""
    config = load("configs/llama-3-8b.yaml").changed(
        {"parallel.tp": 1, "parallel.pp": 1, "parallel.sequence_parallel": False, "train.precision": "bf16"}
    )
    with META, kernels_of_a_gpu():
        head = dict(build_model(config, fake_mesh(Layout(), 0, None), fuse=fuse).pieces())["head"]
        batch = one_microbatch(config).to(META)
        x = torch.zeros(*batch.tokens.shape, config.model.hidden, dtype=torch.bfloat16, requires_grad=True)
        for parameter in head.parameters():
            parameter.requires_grad_(True)
        with Watcher() as watcher:
            head({"hidden": x}, batch).results[0].sum.backward()
    launches, moved = sum(watcher.launches.values()), sum(watcher.bytes.values()) / 1e9
    assert not watcher.waits, in_words(watcher.waits)
    assert launches <= most and moved <= moves, f"{launches}, {moved} GB: {in_words(watcher.bytes)}"
