"""Where the models drop: Hugging Face's, given our masks in the order of the calls, compute our loss and gradients.

Every call of dropout in theirs takes the next of our masks of its shape. A site that one of both has not, or has at
another place or with another rate, changes a gradient, leaves a mask over or finds none.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import pytest
import test_encoders_transformers as encoders
import test_t5_transformers as t5
import test_transformers as decoders
import torch
import transformers
from test_heads_transformers import CLASSES, KINDS, a_batch, with_classes
from torch import Tensor

from roots_dist.parallel.pipeline.stage import Stage
from roots_dist.world import rng
from roots_dist.world.batch import MicroBatch
from roots_dist.world.fuse import Fuse, eager

DROP, OF_ATTENTION, BOUND = 0.2, 0.35, 1e-10


class Masks:
    """The masks that our dropout drew, with their rates: by shape without ones, in the order of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.drawn: dict[tuple[int, ...], list[tuple[Tensor, float]]] = defaultdict(list)
        self.used = 0
        draw, mask_of = rng.dropout, rng.mask

        def ours(x: Tensor, drop: float, rows: Tensor, first_column: int = 0, fuse: Fuse = eager) -> Tensor:
            mask = draw(torch.ones_like(x), drop, rows, first_column) != 0
            self.drawn[self._key(x)].append((mask, drop))
            return draw(x, drop, rows, first_column, fuse)

        def of_attention(rows: Tensor, drop: float, columns: int) -> Tensor:
            mask = mask_of(rows, drop, columns)
            self.drawn[self._key(mask)].append((mask.clone(), drop))
            return mask

        def theirs(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
            if not training or p == 0:
                return x
            assert self.drawn[self._key(x)], f"we drop nothing of shape {tuple(x.shape)} any more"
            mask, drop = self.drawn[self._key(x)].pop(0)
            assert p == drop, (p, drop, tuple(x.shape))
            self.used += 1
            return x * mask.view(x.shape) / (1 - p)

        monkeypatch.setattr(rng, "dropout", ours)
        monkeypatch.setattr(rng, "mask", of_attention)
        monkeypatch.setattr(torch.nn.functional, "dropout", theirs)

    @staticmethod
    def _key(x: Tensor) -> tuple[int, ...]:
        return tuple(n for n in x.shape if n != 1)

    def check(self, sites: int) -> None:
        left = {shape: len(masks) for shape, masks in self.drawn.items() if masks}
        assert not left, f"theirs drops less often: {left}"
        assert self.used == sites


def dropping(config, attention: float = OF_ATTENTION):
    return config.changed({"model.dropout": DROP, "model.attention_dropout": attention})


def same(found: Tensor, expected: Tensor, name: str) -> None:
    torch.testing.assert_close(found, expected, rtol=BOUND, atol=BOUND, msg=lambda m: f"{name}: {m}")


# ── decoders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("task, sites", [("clm", 1 + 3 * 3), ("tag", 2 + 3 * 3), ("classify", 1 + 3 * 3)])
def test_gpt2_drops_after_the_embedding_in_attention_and_after_each_branch(task, sites, monkeypatch):
    """And before a tagger's classes; before the class of a text it does not."""
    ours, _, ends, where = decoders.gpt2()
    sizes = dict(vocab_size=decoders.VOCAB, n_positions=decoders.SEQ, n_embd=decoders.HIDDEN, n_layer=3, n_head=4)
    rates = dict(resid_pdrop=DROP, embd_pdrop=DROP, attn_pdrop=OF_ATTENTION, classifier_dropout=DROP)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=1, num_labels=CLASSES, attn_implementation="eager")
    kinds = {"clm": "GPT2LMHeadModel", "tag": "GPT2ForTokenClassification", "classify": "GPT2ForSequenceClassification"}
    theirs = getattr(transformers, kinds[task])(transformers.GPT2Config(**sizes, **rates, **tokens)).double().train()
    stage, params = encoders.ours_with_noise(dropping(ours if task == "clm" else with_classes(ours, task)))
    ends = ends | {f"head.classifier.{k}": "score.weight" if task == "classify" else f"classifier.{k}" for k in KINDS}
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for p in params:
            mine, view = decoders.pair(p.tensor, p.name, weights, ends, where)
            view.copy_(mine)
    batch = a_batch("tag" if task == "clm" else task)
    if task == "clm":
        targets = torch.where(batch.document_ids < 0, -100, batch.tokens.roll(-1, 1))
        batch = MicroBatch(tokens=batch.tokens, targets=targets, sample_ids=batch.sample_ids)
    masks = Masks(monkeypatch)
    (term,) = stage({}, batch).results
    (term.sum / term.count).backward()
    if task == "clm":
        logits = theirs(batch.tokens).logits.flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, batch.targets.flatten())
    else:
        loss = theirs(batch.tokens, attention_mask=(batch.document_ids >= 0).long(), labels=batch.labels).loss
    loss.backward()
    masks.check(sites)
    same(term.sum / term.count, loss, "loss")
    gradients = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
    for p in params:
        same(*decoders.pair(p.tensor.grad, p.name, gradients, ends, where), p.name)


# ── encoders ─────────────────────────────────────────────────────────────────────────────────────────────────────────

LAYERS = 1 + 3 * encoders.LAYERS
HEADS = {"pre-training": 0, "classify": 1, "tag": 1}
"""Sites of each head; ELECTRA's classifier has one before its dense layer and one behind it."""


@pytest.mark.parametrize("family, task", [("bert", t) for t in HEADS] + [("electra", t) for t in ("classify", "tag")])
def test_encoders_drop_after_the_embedding_in_attention_and_after_each_branch(family, task, monkeypatch):
    """And before the classes of a task; in pre-training nothing in the head."""
    torch.manual_seed(0)
    rates = dict(
        hidden_dropout_prob=DROP, attention_probs_dropout_prob=OF_ATTENTION, classifier_dropout=DROP, num_labels=CLASSES
    )
    known = {"bert": "Bert", "electra": "Electra"}[family]
    kinds = {"pre-training": "ForPreTraining", "classify": "ForSequenceClassification", "tag": "ForTokenClassification"}
    sizes = encoders.their_sizes(**(rates if task != "pre-training" else {**rates, "num_labels": 2}))
    sizes |= {"embedding_size": encoders.HIDDEN} if family == "electra" else {}
    their_config = getattr(transformers, f"{known}Config")(**sizes)
    theirs = getattr(transformers, known + kinds[task])(their_config).double().train()
    ours = dropping(encoders.config(family, {"bert": "mlm-nsp", "electra": "rtd"}[family]))
    stage, params = encoders.ours_with_noise(ours if task == "pre-training" else with_classes(ours, task))
    last = "classifier.out_proj" if (family, task) == ("electra", "classify") else "classifier"
    ends = {"head.weight": "cls.predictions.decoder.weight", "head.bias": "cls.predictions.bias"}
    for k in KINDS:
        dense = f"classifier.dense.{k}" if family == "electra" else f"cls.predictions.transform.dense.{k}"
        ends |= {
            f"head.classifier.{k}": f"{last}.{k}",
            f"head.dense.{k}": dense,
            f"head.pooler.{k}": f"bert.pooler.dense.{k}",
            f"head.norm.{k}": f"cls.predictions.transform.LayerNorm.{k}",
            f"head.next.{k}": f"cls.seq_relationship.{k}",
        }
    weights = dict(theirs.named_parameters())

    def names(ours: str) -> str:
        return encoders.name_of(ours, family, ends)

    with torch.no_grad():
        for p in params:
            weights[names(p.name)].copy_(encoders.cut(p.tensor, weights[names(p.name)]))
    batch = encoders.a_batch() if task == "pre-training" else a_batch(task)
    extra = {"labels": batch.labels}
    if task == "pre-training":
        extra = {"labels": batch.targets, "next_sentence_label": batch.labels}
    masks = Masks(monkeypatch)
    loss = sum(term.sum / term.count for term in stage({}, batch).results)
    loss.backward()
    expected = theirs(
        batch.tokens, attention_mask=(batch.document_ids >= 0).long(), token_type_ids=batch.segment_ids, **extra
    ).loss
    expected.backward()
    masks.check(LAYERS + HEADS[task] + ((family, task) == ("electra", "classify")))
    same(loss, expected, "loss")
    encoders.compare(params, weights, names)


def test_electra_drops_in_both_stacks_and_after_both_embeddings(monkeypatch):
    """What a discriminator with classes is, tested above, a generator is too: here sites are counted by their width."""
    generator = {"hidden": 16, "heads": 2, "ffn": 40, "layers": 2}
    stage, _ = encoders.ours_with_noise(dropping(encoders.config("electra", "rtd", generator, embedding_size=24)))
    masks = Masks(monkeypatch)
    batch = encoders.a_batch()
    stage({}, replace(batch, originals=batch.tokens, labels=None))
    size, seq, layers = *batch.tokens.shape, encoders.LAYERS
    assert {shape: len(drawn) for shape, drawn in masks.drawn.items()} == {
        (size, seq, 24): 2,
        (size, 2, seq, seq): 2, (size, seq, 16): 2 * 2,
        (size, encoders.HEADS, seq, seq): layers, (size, seq, encoders.HIDDEN): 2 * layers,
    }  # fmt: skip


# ── T5 ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", t5.VERSIONS)
def test_t5_also_drops_inside_the_mlp_and_at_both_ends_of_each_stack(version, monkeypatch):
    """Three encoder blocks of four sites, two decoder blocks of six, four ends."""
    ours = dropping(t5.config(version), attention=DROP)  # theirs has one rate
    theirs = t5.their_model(version, exact_norms=True)
    theirs.set_attn_implementation("eager")
    for module in theirs.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = DROP
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = DROP
    theirs.train()
    built, params = t5.build(ours)
    pairs = t5.copied(params, theirs, ours.model.gated())
    batch = t5.padded_batch()
    masks = Masks(monkeypatch)
    (term,) = Stage(list(built), list(built.values()))({}, batch).results
    (term.sum / term.count).backward()
    loss = theirs(input_ids=batch.tokens, attention_mask=(batch.document_ids >= 0).long(), labels=batch.targets).loss
    loss.backward()
    masks.check(3 * 4 + 2 * 6 + 4)
    same(term.sum / term.count, loss, "loss")
    for p in params:
        same(t5.words(p.tensor.grad), pairs[p.name].grad, p.name)
