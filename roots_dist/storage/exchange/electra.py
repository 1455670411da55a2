"""ELECTRA (Clark et al. 2020) in transformers: discriminator and generator in separate folders, both with the shared
embedding.

Ours is one model, as it is in training. Fine-tuning uses only the discriminator.
"""

from __future__ import annotations

from roots_dist.storage.exchange.bert import ENCODER, FIXED, POSITION_IDS, encoder_blocks, encoder_keys, encoder_stack
from roots_dist.storage.exchange.forms import VOCAB_ROWS
from roots_dist.storage.exchange.gpt2 import CLASSIFIER
from roots_dist.storage.exchange.table import GENERATOR, Architecture, ConfigKey, Entry, Head, same_layout

_PROJECT = same_layout({"electra.embeddings_project": "project"})
_STACK = (*encoder_stack("electra"), *_PROJECT)


def _in_both(entry: Entry) -> Entry:
    """An entry of the embedding, which the generator's folder contains too."""
    return entry._replace(copies=(GENERATOR + entry.theirs,))


_GENERATOR_HEAD = (
    *same_layout(
        {
            f"{GENERATOR}generator_predictions.dense": "generator.head.dense",
            f"{GENERATOR}generator_predictions.LayerNorm": "generator.head.norm",
        }
    ),
    Entry(f"{GENERATOR}generator_lm_head.weight", ("generator.head.weight",), VOCAB_ROWS),
    Entry(f"{GENERATOR}generator_lm_head.bias", ("generator.head.bias",), VOCAB_ROWS),
)
_EMBEDDING = tuple(entry for entry in _STACK if ".embeddings." in entry.theirs)
_WORDS, *_OTHERS = map(_in_both, _EMBEDDING)
_DISCRIMINATOR_HEAD = same_layout(
    {"discriminator_predictions.dense": "head.dense", "discriminator_predictions.dense_prediction": "head.score"}
)
_RTD = (
    _WORDS._replace(echoes=(f"{GENERATOR}generator_lm_head.weight",)),
    *_OTHERS,
    *(entry for entry in _STACK if entry not in _EMBEDDING),
    *same_layout({f"{GENERATOR}electra.embeddings_project": "generator.project"}),
    *encoder_blocks(f"{GENERATOR}electra", "generator.blocks"),
    *_GENERATOR_HEAD,
    *_DISCRIMINATOR_HEAD,
)
_CLASSIFY = same_layout({"classifier.dense": "head.dense", "classifier.out_proj": "head.classifier"})
GENERATOR_CLASS = "ElectraForMaskedLM"
GENERATOR_NAMES = "generator."
"""Prefix of our names of the generator's parameters."""

ELECTRA = Architecture(
    model_type="electra",
    base="electra",
    heads=(
        Head("ElectraForPreTraining", ("rtd",), _RTD),
        Head("ElectraForSequenceClassification", ("classify",), (*_STACK, *_CLASSIFY)),
        Head("ElectraForTokenClassification", ("tag",), (*_STACK, CLASSIFIER)),
    ),
    stack=(),
    ours={"model.family": "electra", "model.activation": "gelu"} | ENCODER,
    keys=(*encoder_keys(1e-12), ConfigKey("embedding_size", "model.embedding_size", 128)),
    fixed=FIXED,
    unused=(POSITION_IDS,),
)
