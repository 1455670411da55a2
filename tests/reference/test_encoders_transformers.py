"""The encoders in one process, tied to Hugging Face's BERT and ELECTRA: losses and every gradient, in float64."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
import transformers

from roots_dist.config.schema import Config
from roots_dist.learning.models import MODELS
from roots_dist.parallel.pipeline.stage import Stage
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.batch import IGNORE, PADDING, MicroBatch
from roots_dist.world.sharding import initialize, parameters_of

VOCAB, SEQ, HIDDEN, HEADS, LAYERS, BOUND = 97, 12, 32, 4, 3, 1e-10
LAYER = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "norm2": "output.LayerNorm",
}
EMBED = {
    "tokens.weight": "word_embeddings.weight",
    "position_embedding": "position_embeddings.weight",
    "segment_embedding": "token_type_embeddings.weight",
}


def config(family: str, objective: str, generator: dict | None = None, **model) -> Config:
    sizes = dict(family=family, layers=LAYERS, hidden=HIDDEN, heads=HEADS, vocab=VOCAB, init_std=0.1, segments=2)
    shape = dict(norm_position="post", embedding_norm=True, activation="gelu")
    return Config.model_validate(
        {
            "model": sizes | shape | model,
            "generator": generator or {},
            "objective": {"name": objective},
            "data": {"seq_length": SEQ},
            "advanced": {"float64": True, "loss_chunk": 7, "norm_eps": 1e-12},
        }
    )


def their_sizes(**more):
    return (
        dict(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_attention_heads=HEADS,
            num_hidden_layers=LAYERS,
            intermediate_size=4 * HIDDEN,
            max_position_embeddings=SEQ,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
            attn_implementation="eager",
        )
        | more
    )


def name_of(ours: str, base: str, ends: dict[str, str]) -> str:
    """Theirs for a name of ours, without the stack's prefix."""
    if ours in ends:
        return ends[ours]
    piece, *rest = ours.split(".")
    if piece == "embed":
        last = ".".join(rest)
        return f"{base}.embeddings." + (EMBED.get(last) or last.replace("norm", "LayerNorm"))
    if piece == "project":
        return f"{base}.embeddings_project.{rest[0]}"
    number, *part, kind = rest
    return f"{base}.encoder.layer.{number}.{LAYER['.'.join(part)]}.{kind}"


def ours_with_noise(c: Config):
    built: dict = {}
    for spec in MODELS[c.model.family](c, TensorParallel()):
        built[spec.name] = spec.build(built).double()
    params = parameters_of(built.items())
    initialize(params, seed=5)
    with torch.no_grad():
        for p in params:
            p.tensor.add_(torch.randn(p.tensor.shape, dtype=torch.float64), alpha=0.1)
    return Stage(list(built), list(built.values())), params


def cut(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Without padded words."""
    return ours[: theirs.shape[0]].reshape(theirs.shape)


def compare(params, weights, names):
    for p in params:
        target = weights[names(p.name)]
        gradient = torch.zeros_like(target) if target.grad is None else target.grad
        mine = torch.zeros_like(p.tensor) if p.tensor.grad is None else p.tensor.grad
        torch.testing.assert_close(
            cut(mine, target), gradient, rtol=BOUND, atol=BOUND, msg=lambda m, p=p: f"{p.name}: {m}"
        )


def a_batch() -> MicroBatch:
    torch.manual_seed(1)
    tokens, targets = torch.randint(0, VOCAB, (2, 3, SEQ))
    targets = targets.masked_fill(torch.rand(3, SEQ) < 0.6, IGNORE)
    documents = torch.zeros_like(tokens)
    documents[1, -4:], targets[1, -4:] = PADDING, IGNORE
    segments = (torch.arange(SEQ) > 6).long().expand(3, -1)
    return MicroBatch(
        tokens=tokens,
        targets=targets,
        sample_ids=torch.arange(3),
        document_ids=documents,
        segment_ids=segments,
        labels=torch.tensor([0, 1, 1]),
    )


@pytest.mark.parametrize("objective", ["mlm", "mlm-nsp"])
@pytest.mark.parametrize("tied", [True, False])
def test_bert_is_that_of_transformers(objective, tied):
    torch.manual_seed(0)
    sizes = transformers.BertConfig(**their_sizes(tie_word_embeddings=tied))
    kind = transformers.BertForPreTraining if objective == "mlm-nsp" else transformers.BertForMaskedLM
    theirs = kind(sizes).double().eval()
    stage, params = ours_with_noise(config("bert", objective, tied_embeddings=tied))
    ends = {
        "head.weight": "cls.predictions.decoder.weight",
        "head.bias": "cls.predictions.bias" if tied else "cls.predictions.decoder.bias",
        **{f"head.dense.{k}": f"cls.predictions.transform.dense.{k}" for k in ("weight", "bias")},
        **{f"head.norm.{k}": f"cls.predictions.transform.LayerNorm.{k}" for k in ("weight", "bias")},
        **{f"head.pooler.{k}": f"bert.pooler.dense.{k}" for k in ("weight", "bias")},
        **{f"head.next.{k}": f"cls.seq_relationship.{k}" for k in ("weight", "bias")},
    }  # fmt: skip
    weights = dict(theirs.named_parameters())

    def names(ours):
        return name_of(ours, "bert", ends)

    with torch.no_grad():
        for p in params:
            weights[names(p.name)].copy_(cut(p.tensor, weights[names(p.name)]))
    batch = a_batch()
    found = stage({}, batch).results
    sum(t.sum / t.count for t in found).backward()
    extra = {"next_sentence_label": batch.labels} if objective == "mlm-nsp" else {}
    loss = theirs(
        batch.tokens,
        attention_mask=(batch.document_ids >= 0).long(),
        token_type_ids=batch.segment_ids,
        labels=batch.targets,
        **extra,
    ).loss
    loss.backward()
    torch.testing.assert_close(sum(t.sum / t.count for t in found), loss, rtol=BOUND, atol=BOUND)
    compare(params, weights, names)


@pytest.mark.parametrize("width", [HIDDEN, 24])
def test_electra_is_that_of_transformers(width):
    """The generator's draws are read off ours: theirs judges the same text."""
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_attention_heads=2, intermediate_size=40, num_hidden_layers=2)
    generator = transformers.ElectraForMaskedLM(
        transformers.ElectraConfig(**their_sizes(embedding_size=width, **small))
    )
    discriminator = transformers.ElectraForPreTraining(transformers.ElectraConfig(**their_sizes(embedding_size=width)))
    discriminator.electra.embeddings = generator.electra.embeddings  # as they are pre-trained
    both = torch.nn.ModuleDict({"g": generator, "d": discriminator}).double().eval()
    c = config("electra", "rtd", {"hidden": 16, "heads": 2, "ffn": 40, "layers": 2}, embedding_size=width)
    stage, params = ours_with_noise(c)
    kinds = ("weight", "bias")
    ends = {
        "generator.head.bias": "g.generator_lm_head.bias",
        **{f"generator.head.dense.{k}": f"g.generator_predictions.dense.{k}" for k in kinds},
        **{f"generator.head.norm.{k}": f"g.generator_predictions.LayerNorm.{k}" for k in kinds},
        **{f"head.dense.{k}": f"d.discriminator_predictions.dense.{k}" for k in kinds},
        **{f"head.score.{k}": f"d.discriminator_predictions.dense_prediction.{k}" for k in kinds},
    }
    weights = dict(both.named_parameters())

    def names(ours):
        if ours in ends:
            return ends[ours]
        if ours.startswith("generator."):
            return name_of(ours.removeprefix("generator."), "g.electra", {})
        return name_of(ours, "g.electra" if ours.startswith("embed") else "d.electra", {})

    with torch.no_grad():
        for p in params:
            weights[names(p.name)].copy_(cut(p.tensor, weights[names(p.name)]))
    batch = dataclasses.replace(a_batch(), labels=None, originals=None)
    batch = dataclasses.replace(batch, originals=torch.where(batch.targets == IGNORE, batch.tokens, batch.targets))
    originals = batch.originals.masked_fill(batch.document_ids < 0, IGNORE)
    batch = dataclasses.replace(batch, originals=originals)
    drawn = []
    stage.pieces[stage.names.index("discriminator.embed")].register_forward_pre_hook(
        lambda _, args: drawn.append(args[0]["tokens"])
    )
    mlm, rtd = stage({}, batch).results
    (mlm.sum / mlm.count + 50 * rtd.sum / rtd.count).backward()

    mask, (text,) = (batch.document_ids >= 0).long(), drawn
    assert torch.equal(text[batch.targets == IGNORE], batch.tokens[batch.targets == IGNORE])
    shared = dict(attention_mask=mask, token_type_ids=batch.segment_ids)
    first = generator(batch.tokens, labels=batch.targets, **shared).loss
    logits = discriminator(text, **shared).logits
    second = F.binary_cross_entropy_with_logits(logits[mask > 0], (text != originals)[mask > 0].double())
    (first + 50 * second).backward()
    torch.testing.assert_close(mlm.sum / mlm.count, first, rtol=BOUND, atol=BOUND)
    torch.testing.assert_close(rtd.sum / rtd.count, second, rtol=BOUND, atol=BOUND)
    compare(params, weights, names)
