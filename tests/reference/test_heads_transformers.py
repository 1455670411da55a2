"""Heads for a task, tied to Hugging Face's BERT, ELECTRA and GPT-2 with theirs: loss and every gradient, in float64."""

from dataclasses import replace

import pytest
import torch
import transformers
from test_encoders_transformers import (
    BOUND,
    HEADS,
    HIDDEN,
    LAYERS,
    SEQ,
    VOCAB,
    compare,
    config,
    cut,
    name_of,
    ours_with_noise,
    their_sizes,
)
from test_transformers import gpt2, pair

from roots_dist.learning.models.heads import task_head
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.batch import IGNORE, PADDING, MicroBatch

CLASSES, KINDS = 5, ("weight", "bias")


def a_batch(task: str) -> MicroBatch:
    """Texts of different lengths; of tags some are not scored."""
    torch.manual_seed(1)
    tokens = torch.randint(1, VOCAB, (3, SEQ))
    documents = torch.where(torch.arange(SEQ) < torch.tensor([[SEQ], [5], [8]]), 0, PADDING)
    labels = torch.tensor([4, 0, 2])
    if task == "tag":
        labels = torch.randint(0, CLASSES, (3, SEQ)).masked_fill((torch.rand(3, SEQ) < 0.4) | (documents < 0), IGNORE)
    segments = (torch.arange(SEQ) > 3).long().expand(3, -1)
    return MicroBatch(
        tokens=tokens.masked_fill(documents < 0, 0),
        sample_ids=torch.arange(3),
        document_ids=documents,
        segment_ids=segments,
        labels=labels,
    )


def with_classes(c, task: str):
    return c.changed({"objective.name": task, "finetune.labels": [str(n) for n in range(CLASSES)]})


def check(stage, batch: MicroBatch, theirs, **more):
    (term,) = stage({}, batch).results
    (term.sum / term.count).backward()
    loss = theirs(batch.tokens, attention_mask=(batch.document_ids >= 0).long(), labels=batch.labels, **more).loss
    loss.backward()
    torch.testing.assert_close(term.sum / term.count, loss, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("task", ["classify", "tag"])
@pytest.mark.parametrize("family, width", [("bert", HIDDEN), ("electra", HIDDEN), ("electra", 24)])
def test_an_encoder_with_a_head_is_that_of_transformers(family, width, task):
    torch.manual_seed(0)
    sizes = their_sizes(num_labels=CLASSES)
    sizes |= {"embedding_size": width} if family == "electra" else {}
    known = {"bert": "Bert", "electra": "Electra"}[family]
    kind = {"classify": "ForSequenceClassification", "tag": "ForTokenClassification"}[task]
    theirs = getattr(transformers, known + kind)(getattr(transformers, f"{known}Config")(**sizes)).double().eval()
    changes = {"embedding_size": width} if family == "electra" else {}
    stage, params = ours_with_noise(
        with_classes(config(family, {"bert": "mlm", "electra": "rtd"}[family], **changes), task)
    )
    last = "classifier.out_proj" if (family, task) == ("electra", "classify") else "classifier"
    ends = {f"head.classifier.{k}": f"{last}.{k}" for k in KINDS} | {
        f"head.dense.{k}": f"classifier.dense.{k}" for k in KINDS
    }
    ends |= {f"head.pooler.{k}": f"bert.pooler.dense.{k}" for k in KINDS}
    weights = dict(theirs.named_parameters())

    def names(ours):
        return name_of(ours, family, ends)

    assert {names(p.name) for p in params} == weights.keys()
    with torch.no_grad():
        for p in params:
            weights[names(p.name)].copy_(cut(p.tensor, weights[names(p.name)]))
    batch = a_batch(task)
    check(stage, batch, theirs, token_type_ids=batch.segment_ids)
    compare(params, weights, names)


@pytest.mark.parametrize("task", ["classify", "tag"])
def test_a_decoder_with_a_head_is_that_of_transformers(task):
    torch.manual_seed(0)
    ours, _, ends, where = gpt2()
    sizes = dict(
        vocab_size=VOCAB,
        n_positions=SEQ,
        n_embd=HIDDEN,
        n_layer=LAYERS,
        n_head=HEADS,
        num_labels=CLASSES,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
    )
    sizes |= dict(resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, classifier_dropout=0)
    kind = {"classify": transformers.GPT2ForSequenceClassification, "tag": transformers.GPT2ForTokenClassification}[
        task
    ]
    theirs = kind(transformers.GPT2Config(**sizes)).double().eval()
    stage, params = ours_with_noise(with_classes(ours, task))
    ends = ends | {f"head.classifier.{k}": "score.weight" if task == "classify" else f"classifier.{k}" for k in KINDS}
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for p in params:
            mine, view = pair(p.tensor, p.name, weights, ends, where)
            view.copy_(mine)
    check(stage, a_batch(task), theirs)
    gradients = {n: torch.zeros_like(w) if w.grad is None else w.grad for n, w in weights.items()}
    for p in params:
        mine, wanted = pair(p.tensor.grad, p.name, gradients, ends, where)
        torch.testing.assert_close(mine, wanted, rtol=BOUND, atol=BOUND, msg=lambda m, p=p: f"{p.name}: {m}")


@pytest.mark.parametrize("task, drops", [("classify", ("bert", "electra")), ("tag", ("bert", "electra", "gpt"))])
def test_a_head_drops_channels_where_that_of_transformers_does(task, drops):
    hidden = torch.randn(3, SEQ, HIDDEN)
    for family, first in (("bert", "mlm"), ("electra", "rtd"), ("gpt", "clm")):
        c = with_classes(config(family, first, dropout=0.5), task)
        head = task_head(c, TensorParallel())
        with torch.no_grad():
            for weight in head.parameters():
                weight.normal_()
        logits = {mode: head.train(mode)({"hidden": hidden}, asked(task)).results[0] for mode in (True, False)}
        assert (not torch.equal(logits[True], logits[False])) == (family in drops), family


def asked(task: str) -> MicroBatch:
    return replace(a_batch(task), logits_at=slice(None))
