"""A token without a target is not multiplied by the vocabulary, and nothing else changes."""

from dataclasses import replace

import pytest
import torch

from roots_dist.assembly.passes import build_passes
from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.learning.models import vocab_head
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.plan.cost_counter import CostCounter
from roots_dist.runs.train.step import on_device
from roots_dist.world.batch import IGNORE
from roots_dist.world.mesh import Mesh
from tests.parity.models import COMMON, MODELS


def test_only_scored_tokens_are_multiplied(monkeypatch) -> None:
    config = Config.model_validate(COMMON | {"model": MODELS["llama"]}).changed({"train.global_batch": 2})
    passes, multiplied = build_passes(config, Mesh.single()), []
    (first, *_), real = random_batches(config, 0, 0, 1), vocab_head.linear_cross_entropy

    def noting(tp, hidden, *args, **kwargs):
        multiplied.append(len(hidden))
        return real(tp, hidden, *args, **kwargs)

    monkeypatch.setattr(vocab_head, "linear_cross_entropy", noting)
    found = []
    for batch in (first, first.with_some_scored()):
        (term,) = passes.forward_backward([batch], {"clm": 0.1})
        found.append([term.sum, term.count, term.hits, *(p.tensor.grad.clone() for p in passes.model.params)])
        for p in passes.model.params:
            p.tensor.grad = None
    assert multiplied == [first.targets.numel(), int((first.targets != IGNORE).sum())]
    for whole, chosen in zip(*found, strict=True):
        torch.testing.assert_close(chosen, whole, rtol=1e-12, atol=1e-12)
    full = replace(first, targets=first.targets.clamp(min=0))
    assert full.with_some_scored() is full


def test_a_step_chooses_them() -> None:
    """In an exact run too: which tokens of a context shard have a target follows from the text, not from the layout."""
    config = Config.model_validate(COMMON | {"model": MODELS["llama"]}).changed({"train.global_batch": 2})
    exact = config.changed({"train.exact": {"tensor": 1, "data": 1}, "advanced.float64": False})
    for made in (config, exact):
        run = build_run(made, Mesh.single(), objective=proof_objective(made))
        batches = on_device(run, random_batches(made, 0, 0, 1))
        assert all(batch.scored_positions is not None for batch in batches)


def test_targets_are_scored_in_chunks():
    """Logits of a few tokens exist at a time: all of them would take 32 times as much as these."""
    config = Config.model_validate(
        {
            "model": {"layers": 1, "hidden": 8, "heads": 1, "vocab": 8192},
            "data": {"seq_length": 256},
            "train": {"global_batch": 1, "device": "cpu"},
            "advanced": {"loss_chunk": 8},
        }
    )
    passes = build_passes(config, Mesh.single())
    (batch,) = random_batches(config, 0, 0, 1)
    with torch.no_grad(), CostCounter() as counter:
        passes.forward([replace(batch, logits_at="targets")])
    assert counter.peak < 8 * 8 * 8192 * 4


@pytest.mark.parametrize("model", [{"logit_softcap": 1.3}, {"head_bias": True, "tied_embeddings": False}])
def test_a_score_is_the_log_probability_among_all_logits(model):
    config = Config.model_validate(COMMON | {"model": MODELS["llama"] | model}).changed({"train.global_batch": 2})
    passes = build_passes(config, Mesh.single())
    for p in passes.model.params:
        if p.name == "head.bias":
            torch.nn.init.normal_(p.tensor)
    batch, *_ = random_batches(config, 0, 0, 1)
    with torch.no_grad():
        (scores, is_best), logits = (
            passes.forward([replace(batch, logits_at=at)])[0] for at in ("targets", slice(None))
        )
    scored = batch.targets != IGNORE
    expected = logits.double().log_softmax(-1).gather(-1, batch.targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(scores[scored].double(), expected[scored], rtol=1e-5, atol=1e-5)
    assert torch.equal(is_best, scored & (logits.argmax(-1) == batch.targets))
