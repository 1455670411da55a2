"""Work that is cut into pieces by a size: small pieces give what one piece gives, with and without a remainder.

In tests the sizes of the package are rarely reached, so that one side of each switch would never run. Chunks of the
loss are in test_cross_entropy.py, microbatches of an evaluation in test_evaluation_sums.py, blocks of initial weights
in test_initial_weights.py, DeepSpeed's buckets in tests/conformance, shards of files in tests/unit and tests/exchange.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roots_dist.assembly.passes import build_passes
from roots_dist.config.schema import Config
from roots_dist.learning.data import tasks
from roots_dist.learning.data.remarks import Remarks
from roots_dist.learning.data.specials import synthetic_specials
from roots_dist.learning.data.tasks import Example, Examples
from roots_dist.learning.models import vocab_head
from roots_dist.learning.models.sample_tokens import sample_tokens
from roots_dist.learning.models.vocab_head import loss_chunk
from roots_dist.learning.objectives.synthetic import random_batches
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.zero import flat, unit
from roots_dist.parallel.zero.collectives import PendingMessage
from roots_dist.runs.evaluate import harness_model, ngram
from roots_dist.runs.generate import fill, predict
from roots_dist.world import rng
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import SINGLE, Axis, Mesh
from roots_dist.world.sharding import Param, ShardSpec

SIZES = dict(layers=1, hidden=16, heads=2, vocab=61, init_std=0.4)
BERT = dict(family="bert", norm_position="post", embedding_norm=True, activation="gelu")


def passes_of(**sections):
    tree = {"data": {"seq_length": 12}, "advanced": {"float64": True, "vocab_multiple": 8}} | sections
    return build_passes(Config.model_validate(tree), Mesh.single())


@pytest.mark.parametrize(
    "rows, width, chunk",
    [(61, 16, 1024), (50257, 2048, 2048), (128256, 8192, 4185), (2**19, 8192, 1024)],
    ids=["as many as are worth a product", "as many as the weight is wide", "two GiB of them", "a product again"],
)
def test_the_logits_that_exist_at_one_time_take_two_gib(rows, width, chunk):
    assert loss_chunk(Config(), TensorParallel(), torch.empty(rows, width, device="meta")) == chunk


def test_the_head_is_computed_in_the_chunks_of_the_config(monkeypatch):
    made, chunks = (
        Config.model_validate({"model": SIZES, "data": {"seq_length": 12}, "advanced": {"loss_chunk": 5}}),
        [],
    )
    whole = vocab_head.linear_cross_entropy
    monkeypatch.setattr(
        vocab_head, "linear_cross_entropy", lambda *of, **keys: chunks.append(keys.get("chunk")) or whole(*of, **keys)
    )
    passes = build_passes(made, Mesh.single())
    passes.forward(random_batches(made, 0, 0, 1))
    assert set(chunks) == {5}


@pytest.mark.parametrize("chunk", [1, 3, 29, 30, 31])
def test_draws_of_the_generator_do_not_depend_on_the_chunk(chunk):
    """They are the best of logits plus Gumbel noise, over the real words."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(n, generator=draw, dtype=torch.float64) for n in ((30, 4), (16, 4), (16,)))
    bias[13:] = 1e3  # padding
    rows = rng.fold(7, torch.arange(30))
    found = sample_tokens(TensorParallel(), hidden, weight, bias, rows, vocab=13, chunk=chunk)
    uniform = (rng.bits(rows, torch.arange(13, dtype=torch.int32)).double() + 2**31 + 0.5) / 2**32
    expected = (F.linear(hidden, weight, bias)[:, :13] - torch.log(-torch.log(uniform))).argmax(1)
    assert torch.equal(found, expected) and len(found.unique()) > 5


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("align", [1, 5, 12, 13, 64, 10_000])
def test_gradients_are_summed_once_wherever_they_begin_and_are_cut(align, ranks, monkeypatch):
    """Parts that cut through parameters, that hold many and that hold none; also of a gradient that is no contiguous
    memory, which cannot be sent as it is. Two sums of three ranks that hold the same are added up."""
    monkeypatch.setattr(flat, "ALIGN", align)
    gradients = [torch.randn(n, dtype=torch.float64) for n in ((3, 4), (5,), (1,), (24,), (2,))]
    gradients.insert(2, torch.randn(6, 4, dtype=torch.float64).t())
    params = [
        Param(str(i), torch.nn.Parameter(torch.zeros(g.shape, dtype=g.dtype)), ShardSpec(shape=(*g.shape,)), SINGLE)
        for i, g in enumerate(gradients)
    ]
    sent: list[torch.Tensor] = []

    def thrice(whole: torch.Tensor, axis: Axis) -> PendingMessage:
        assert whole.is_contiguous()  # as gloo and NCCL demand
        sent.append(whole)
        return PendingMessage(None, whole, 3 * whole.view(axis.size, -1)[axis.rank])

    monkeypatch.setattr(unit, "start_all_reduce", thrice)
    monkeypatch.setattr(unit, "start_reduce_scatter", thrice)
    parts: list[list[torch.Tensor]] = [[] for _ in params]
    for rank in range(ranks):
        axis = Axis("dp", size=ranks, rank=rank)
        summed = unit.Gradients(flat.Flat(tuple(params), axis), axis)
        for _ in range(2):
            for p, gradient in zip(params, gradients):
                p.tensor.grad = gradient
            summed.start()
            assert all(p.tensor.grad is None for p in params)
        summed.finish()
        for i, found in enumerate(parts):
            found.append(summed.of(i).flatten())
    for found, gradient in zip(parts, gradients):
        torch.testing.assert_close(torch.cat(found), 6 * gradient.flatten(), rtol=1e-15, atol=0)
    assert len(sent) == 2 * ranks, "one message for all of them"
    total = sum(g.sum() for g in gradients)
    assert all(abs(whole.sum() - total) < 1e-12 for whole in sent), "what fills gaps is zeros"


@pytest.mark.parametrize("at_a_time", [1, 7, 29, 30])
def test_ngrams_are_looked_up_in_parts(at_a_time, monkeypatch):
    tokens, starts = np.random.default_rng(0).integers(5, size=200), np.array([0, 50, 51, 120])
    model, places = ngram.count(tokens, starts, 3, 5), np.arange(30, 60)
    whole = model.log_probabilities(tokens, starts, places)
    monkeypatch.setattr(ngram, "AT_A_TIME", at_a_time)
    assert np.array_equal(model.log_probabilities(tokens, starts, places), whole) and whole.shape == (4, 30)


@pytest.mark.parametrize("at_once", [1, 2, 3, 16])
def test_each_masked_text_is_filled_as_if_it_were_alone(at_once, monkeypatch):
    """Texts of other lengths beside it pad it; its guesses are the likeliest of its own logits."""
    monkeypatch.setattr(fill, "AT_ONCE", at_once)
    passes = passes_of(model=SIZES | BERT, objective={"name": "mlm"})
    specials = synthetic_specials(61)
    encoder = SimpleNamespace(specials=specials, config=passes.config)
    texts = [[1, 9, 3, 2], [1, 3, 20, 33, 3, 21, 8, 2], [1, 7, 30, 3, 2], [1, 3, 2], [1, 40, 41, 42, 3, 3, 2]]
    found = fill.fill(passes, texts, encoder, 2)
    for text, guesses in zip(texts, found):
        batch = MicroBatch(tokens=torch.tensor([text]), sample_ids=torch.tensor([0]), logits_at=slice(None))
        (logits,) = passes.forward([batch])
        p = logits[0].double().softmax(-1)[[i for i, t in enumerate(text) if t == specials.mask]]
        assert len(guesses) == len(p)
        for row, guess in zip(p, guesses):
            best = row.topk(2)
            assert [g.id for g in guess] == best.indices.tolist()
            assert [g.probability for g in guess] == pytest.approx(best.values.tolist(), abs=1e-6)


@pytest.mark.parametrize("at_once", [1, 2, 16])
def test_each_text_is_classified_as_if_it_were_alone(at_once, monkeypatch):
    monkeypatch.setattr(predict, "AT_ONCE", at_once)
    passes = passes_of(model=SIZES, objective={"name": "classify"}, finetune={"labels": ["a", "b", "c"]})
    texts = [np.arange(first, first + n) for first, n in ((5, 4), (20, 12), (9, 1), (30, 7), (12, 3))]
    found = predict.classify(passes, Examples("rows", tuple(Example(text, None, label=0) for text in texts)))
    for text, labels in zip(texts, found):
        batch = MicroBatch(tokens=torch.from_numpy(text[None]), sample_ids=torch.tensor([0]), logits_at=slice(None))
        (logits,) = passes.forward([batch])  # read at the last of its own tokens
        p = dict(zip("abc", logits[0].double().softmax(-1).tolist()))
        assert labels == pytest.approx(p, abs=1e-6) and list(labels) == sorted(p, key=lambda c: -p[c])


@pytest.mark.parametrize("at_a_time, micro", [(1, 1), (2, 2), (16, 4)])
def test_each_continuation_is_scored_as_if_it_were_alone(at_a_time, micro, monkeypatch):
    monkeypatch.setattr(harness_model, "AT_A_TIME", at_a_time)
    passes = passes_of(model=SIZES, train={"micro_batch": micro, "global_batch": micro})
    draw = np.random.default_rng(0)
    asked = [
        (draw.integers(61, size=a).tolist(), draw.integers(61, size=b).tolist())
        for a, b in ((3, 2), (1, 1), (20, 3), (5, 9), (8, 1), (2, 11), (4, 4))
    ]
    found = harness_model.token_scores(passes, asked, max_length=12)
    for (context, continuation), (score, greedy) in zip(asked, found):
        ids = (context + continuation)[-13:]
        batch = MicroBatch(tokens=torch.tensor([ids[:-1]]), sample_ids=torch.tensor([0]), logits_at=slice(None))
        (logits,) = passes.forward([batch])
        log_p = logits[0].double().log_softmax(-1)[-len(continuation) :]
        assert score == pytest.approx(float(log_p[range(len(continuation)), continuation].sum()), abs=1e-5)
        assert greedy == (log_p.argmax(1).tolist() == continuation)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 100])
def test_rows_of_a_task_keep_their_own_ids(batch, monkeypatch):
    """Texts of several rows are tokenized together; a row may have none, one or more."""
    monkeypatch.setattr(tasks, "BATCH_TEXTS", batch)
    backend = SimpleNamespace(
        encode_batch_fast=lambda texts, add_special_tokens: [SimpleNamespace(ids=[*map(ord, t)]) for t in texts]
    )
    rows = [["a", "bc"], [], ["d"], ["e", "f", "gh"], ["i"], ["jk", "l"], ["m"]]
    codec = SimpleNamespace(backend=backend)
    found = list(tasks._encode_rows(rows, lambda row: (row, len(row)), codec, Remarks()))
    assert [(row, made, ids) for row, made, ids in found] == [
        (row, (row, len(row)), [[*map(ord, text)] for text in row]) for row in rows
    ]
