"""The loss over the vocabulary against plain autograd on whole logits, in float64: values and every gradient at 1e-12.

What is expected is written out term by term, from log-softmax, over the real words only. linear_cross_entropy writes
its gradient by hand and chunk by chunk; nothing of it is used here.
"""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from roots_dist.assembly.rank_model import build_model
from roots_dist.config.schema import Config
from roots_dist.learning.models.heads import class_term
from roots_dist.learning.objectives.synthetic import random_batches
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.cross_entropy import linear_cross_entropy, target_scores
from roots_dist.world.batch import IGNORE, MicroBatch
from roots_dist.world.mesh import Mesh

EXACT = dict(rtol=1e-12, atol=1e-12)
WIDTH, VOCAB, PADDED, TOKENS = 6, 13, 16, 11
SMOOTHING, Z_LOSS = 0.3, 0.05
"""Large, so that a part of either that is wrong is far from rounding."""


def plain_loss(logits: torch.Tensor, targets: torch.Tensor, smoothing: float, z_loss: float) -> torch.Tensor:
    """Sum over the scored targets of (1-ε)·(-log p) + ε·mean of -log p over the words + z·log²Z. logits [T, V]."""
    scored = targets != IGNORE
    logits, targets = logits[scored], targets[scored]
    log_p = logits.log_softmax(1)
    chosen = -log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    log_z = logits.logsumexp(1)
    return ((1 - smoothing) * chosen - smoothing * log_p.mean(1) + z_loss * log_z.square()).sum()


def some_input(vocab: int = VOCAB, padded: int = PADDED) -> tuple[torch.Tensor, ...]:
    """hidden, weight, bias and targets, of which three are not scored. Padded rows are large: they must not be seen."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=draw, dtype=torch.float64) for shape in ((TOKENS, WIDTH), (padded, WIDTH), padded)
    )
    weight[vocab:], bias[vocab:] = 50.0, 50.0
    targets = torch.randint(vocab, (TOKENS,), generator=draw)
    targets[[0, 4, 10]] = IGNORE
    return hidden, weight, bias, targets


def both(hidden, weight, bias, targets, vocab=VOCAB, smoothing=0.0, z_loss=0.0, chunk=1024, softcap=None):
    """[(loss, gradients)] of ours and of plain autograd, scaled as the trainer scales a sum."""
    found = []
    for ours in (True, False):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (hidden, weight, bias)]
        h, w, b = leaves
        if ours:
            options = dict(vocab=vocab, bias=b, smoothing=smoothing, z_loss=z_loss, chunk=chunk, softcap=softcap)
            loss, _ = linear_cross_entropy(TensorParallel(), h, w, targets, **options)
        else:
            logits = F.linear(h, w, b)[:, :vocab]
            logits = logits if softcap is None else softcap * (logits / softcap).tanh()
            loss = plain_loss(logits, targets, smoothing, z_loss)
        (loss * 0.37).backward()
        found.append((loss.detach(), [leaf.grad for leaf in leaves if leaf is not None]))
    return found


@pytest.mark.parametrize("chunk", [1, 2, 3, 10, 11, 12])
@pytest.mark.parametrize("smoothing, z_loss", itertools.product((0.0, SMOOTHING), (0.0, Z_LOSS)))
def test_loss_and_gradients_are_those_of_plain_autograd(smoothing, z_loss, chunk):
    """With chunks of one token, with and without a remainder, of all tokens, and of more than there are."""
    (loss, grads), (expected, expected_grads) = both(*some_input(), smoothing=smoothing, z_loss=z_loss, chunk=chunk)
    torch.testing.assert_close(loss, expected, **EXACT)
    for name, grad, wanted in zip(("hidden", "weight", "bias"), grads, expected_grads):
        torch.testing.assert_close(grad, wanted, **EXACT, msg=lambda m, name=name: f"{name}: {m}")
    assert not grads[1][VOCAB:].any() and not grads[2][VOCAB:].any()  # padding learns nothing


@pytest.mark.parametrize("smoothing, z_loss", itertools.product((0.0, SMOOTHING), (0.0, Z_LOSS)))
def test_capped_logits_have_the_gradients_of_plain_autograd(smoothing, z_loss):
    options = dict(smoothing=smoothing, z_loss=z_loss, chunk=4, softcap=1.3)
    (loss, grads), (expected, wanted) = both(*some_input(), **options)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(grads, wanted, **EXACT)


@pytest.mark.parametrize("vocab, padded", [(2, 16), (16, 16), (15, 16)])
def test_however_much_of_the_vocabulary_is_padding(vocab, padded):
    (loss, grads), (expected, wanted) = both(*some_input(vocab, padded), vocab=vocab, smoothing=SMOOTHING, chunk=4)
    torch.testing.assert_close(loss, expected, **EXACT)
    torch.testing.assert_close(grads, wanted, **EXACT)


def test_without_bias_and_with_large_logits():
    hidden, weight, _, targets = some_input()
    (loss, grads), (expected, wanted) = both(hidden * 300, weight, None, targets, z_loss=Z_LOSS, chunk=4)
    assert loss > 1e5
    torch.testing.assert_close([loss, *grads], [expected, *wanted], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("tokens", [TOKENS, 0])
def test_a_batch_without_targets_costs_and_teaches_nothing(tokens):
    hidden, weight, bias, targets = (t[:tokens] if len(t) == TOKENS else t for t in some_input())
    nothing = torch.full_like(targets, IGNORE)
    ((loss, grads), _) = both(hidden, weight, bias, nothing, smoothing=SMOOTHING, z_loss=Z_LOSS, chunk=4)
    assert loss == 0 and not any(grad.any() for grad in grads)


@pytest.mark.parametrize("learns", [("hidden",), ("weight",), ("bias",), ("hidden", "bias")])
def test_what_is_frozen_changes_no_other_gradient(learns):
    """A frozen head still passes its gradient down; a head that learns alone needs no gradient of its input."""
    hidden, weight, bias, targets = some_input()
    _, (_, expected) = both(hidden, weight, bias, targets, smoothing=SMOOTHING, z_loss=Z_LOSS)
    leaves = {n: t.requires_grad_(n in learns) for n, t in zip(("hidden", "weight", "bias"), (hidden, weight, bias))}
    loss, _ = linear_cross_entropy(
        TensorParallel(), hidden, weight, targets, vocab=VOCAB, bias=bias, smoothing=SMOOTHING, z_loss=Z_LOSS, chunk=4
    )
    (loss * 0.37).backward()
    for (name, leaf), wanted in zip(leaves.items(), expected):
        if name in learns:
            torch.testing.assert_close(leaf.grad, wanted, **EXACT)
        else:
            assert leaf.grad is None, name


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
def test_hits_and_scores_are_those_of_the_whole_logits(chunk):
    hidden, weight, bias, targets = some_input()
    logits = F.linear(hidden, weight, bias)[:, :VOCAB]
    targets[[1, 2, 3]] = logits.argmax(1)[[1, 2, 3]]
    scored = targets != IGNORE
    best = scored & (logits.argmax(1) == targets)
    given = (TensorParallel(), hidden, weight, targets)
    _, hits = linear_cross_entropy(*given, vocab=VOCAB, bias=bias, smoothing=SMOOTHING, z_loss=Z_LOSS, chunk=chunk)
    assert 3 <= hits == best.sum() < scored.sum()
    scores, is_best = target_scores(*given, vocab=VOCAB, bias=bias, chunk=chunk)
    wanted = logits.log_softmax(1).gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1) * scored
    torch.testing.assert_close(scores, wanted, **EXACT)
    assert torch.equal(is_best, best)


# ── the same through whole models: what their heads do with the config ───────────────────────────────────────────────

SIZES = dict(layers=1, hidden=16, heads=2, vocab=61, init_std=0.3)
MODELS = {
    "clm": SIZES | dict(tied_embeddings=False),
    "mlm": SIZES | dict(family="bert", norm_position="post", embedding_norm=True, activation="gelu"),
    "mlm, pre-norm": SIZES | dict(family="bert", activation="gelu"),
    "spans": SIZES | dict(family="t5", positions="relative", norm="rmsnorm", activation="relu", bias=False),
}


def model_and_batch(name: str):
    objective = {
        "name": name.partition(",")[0],
        "label_smoothing": SMOOTHING,
        "z_loss": Z_LOSS,
        "mask_probability": 0.4,
    }
    config = Config.model_validate(
        {
            "model": MODELS[name],
            "objective": objective,
            "data": {"seq_length": 24},
            "train": {"global_batch": 2, "micro_batch": 2},
            "advanced": {"float64": True, "loss_chunk": 7, "vocab_multiple": 8},
        }
    )
    model = build_model(config, Mesh.single())
    (batch,) = random_batches(config, 0, 0, 1)
    (stage,) = model.stages.values()
    return config, model, stage, batch


def logits_of(name: str, head: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """[B, S, V] from the head's input, as the papers write the heads."""
    vocab, eps = SIZES["vocab"], 1e-5
    if name == "spans":  # the projection is the embedding, and its input is scaled down (T5's code)
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * head.norm.weight * SIZES["hidden"] ** -0.5
        return (x @ head.weight.t())[..., :vocab]
    if name == "mlm, pre-norm":
        x = F.layer_norm(x, x.shape[-1:], head.final.weight, head.final.bias, eps)
    if name.startswith("mlm"):
        x = F.gelu(F.linear(x, head.dense.weight, head.dense.bias))
    x = F.layer_norm(x, x.shape[-1:], head.norm.weight, head.norm.bias, eps)
    return F.linear(x, head.weight, getattr(head, "bias", None))[..., :vocab]


@pytest.mark.parametrize("name", MODELS)
def test_heads_smooth_in_training_and_score_plainly_in_evaluation(name):
    _, model, stage, batch = model_and_batch(name)
    head = stage.pieces[stage.names.index("head")]
    seen: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, args: seen.append(args[0]["hidden"]))
    with torch.no_grad():
        for p in model.params:  # biases away from 0, norms away from 1
            p.tensor.add_(torch.randn(p.tensor.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for training, smoothing, z_loss in ((True, SMOOTHING, Z_LOSS), (False, 0.0, 0.0)):
        model.module.train(training)
        (term,) = stage({}, batch).results
        x = seen.pop()
        expected = plain_loss(logits_of(name, head, x).flatten(0, 1), batch.targets.flatten(), smoothing, z_loss)
        torch.testing.assert_close(term.sum, expected, **EXACT)
        assert term.count == (batch.targets != IGNORE).sum() < batch.targets.numel()
        leaves = [x, *head.parameters()]
        for ours, wanted in zip(
            torch.autograd.grad(term.sum, leaves, retain_graph=True, allow_unused=True),
            torch.autograd.grad(expected, leaves, allow_unused=True),
        ):
            torch.testing.assert_close(ours, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("smoothing", [0.0, SMOOTHING])
def test_classes_of_a_task_are_smoothed_over_all_of_them(smoothing):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, generator=draw, dtype=torch.float64)
    labels = torch.tensor([0, 2, IGNORE, 1, 1, IGNORE, 0])
    term = class_term("tag", logits, labels, smoothing)
    torch.testing.assert_close(term.sum, plain_loss(logits, labels, smoothing, 0.0), **EXACT)
    scored = labels != IGNORE
    assert term.count == 5 and term.hits == (logits.argmax(1) == labels)[scored].sum()


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_a_task_s_head_smooths_in_training_alone(task):
    tree = {
        "model": SIZES, "objective": {"name": task, "label_smoothing": SMOOTHING}, "data": {"seq_length": 8},
        "finetune": {"labels": ["a", "b", "c"]}, "advanced": {"float64": True},
    }  # fmt: skip
    model = build_model(Config.model_validate(tree), Mesh.single())
    (stage,) = model.stages.values()
    tokens = torch.arange(16).view(2, 8)
    labels = torch.tensor([2, 0]) if task == "classify" else tokens % 3
    batch = MicroBatch(tokens=tokens, labels=labels, sample_ids=torch.arange(2))
    logits: list[torch.Tensor] = []
    stage.pieces[-1].classifier.register_forward_hook(lambda _, args, out: logits.append(out))
    for training in (True, False):
        model.module.train(training)
        (term,) = stage({}, batch).results
        flat = logits.pop().flatten(0, -2)
        wanted = plain_loss(flat, labels.flatten(), SMOOTHING if training else 0.0, 0.0)
        torch.testing.assert_close(term.sum, wanted, **EXACT)
