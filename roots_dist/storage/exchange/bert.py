"""BERT (Devlin et al. 2019), RoBERTa (Liu et al. 2019) and models like them in transformers: a norm after each branch
and after the embedding.

RoBERTa is BERT with other tensor names, and with positions that start after the padding id. XLM-R (Conneau et al. 2020)
and CamemBERT (Martin et al. 2020) are RoBERTa by another name. DistilBERT (Sanh et al. 2019) is BERT without segments
and pooler, with names of its own.
"""

from __future__ import annotations

from roots_dist.storage.exchange.forms import (
    NO_SEGMENTS,
    POSITIONS_AFTER_PADDING,
    ROBERTA_OFFSET,
    SAME,
    VOCAB_ROWS,
    Form,
)
from roots_dist.storage.exchange.gpt2 import ACTIVATIONS, CLASSIFIER
from roots_dist.storage.exchange.table import BIASED, Architecture, ConfigKey, Entry, Fixed, Head, renamed, same_layout


def encoder_stack(base: str, places: Form = SAME, words: Entry | None = None) -> tuple[Entry, ...]:
    """Entries of embedding and blocks, under the prefix `base`."""
    e = f"{base}.embeddings"
    return (
        words or Entry(f"{e}.word_embeddings.weight", ("embed.tokens.weight",), VOCAB_ROWS),
        Entry(f"{e}.position_embeddings.weight", ("embed.position_embedding",), places),
        Entry(f"{e}.token_type_embeddings.weight", ("embed.segment_embedding",)),
        Entry(f"{e}.token_type_embeddings.weight", (), NO_SEGMENTS, when=lambda config: config.model.segments == 0),
        *same_layout({f"{e}.LayerNorm": "embed.norm"}),
        *encoder_blocks(base),
    )


def encoder_blocks(base: str, blocks: str = "blocks") -> tuple[Entry, ...]:
    """Entries of the blocks. blocks: prefix of our names."""
    layer, ours = f"{base}.encoder.layer.{{i}}", f"{blocks}.{{i}}"
    return same_layout(
        {
            f"{layer}.attention.self.query": f"{ours}.attention.query",
            f"{layer}.attention.self.key": f"{ours}.attention.key",
            f"{layer}.attention.self.value": f"{ours}.attention.value",
            f"{layer}.attention.output.dense": f"{ours}.attention.out",
            f"{layer}.attention.output.LayerNorm": f"{ours}.norm1",
            f"{layer}.intermediate.dense": f"{ours}.mlp.up",
            f"{layer}.output.dense": f"{ours}.mlp.down",
            f"{layer}.output.LayerNorm": f"{ours}.norm2",
        }
    )


def encoder_keys(eps: float, shift: int = 0) -> tuple[ConfigKey, ...]:
    """shift: rows of the position table before the first position."""
    return (
        ConfigKey("vocab_size", "model.vocab", 30522),
        ConfigKey(
            "max_position_embeddings",
            "model.max_positions",
            512 + shift,
            to_ours=lambda rows: rows - shift,
            to_theirs=lambda rows: rows + shift,
        ),
        ConfigKey("hidden_size", "model.hidden", 768),
        ConfigKey("num_hidden_layers", "model.layers", 12),
        ConfigKey("num_attention_heads", "model.heads", 12),
        ConfigKey("intermediate_size", "model.ffn", 3072),
        ConfigKey("hidden_act", "model.activation", "gelu", ACTIVATIONS),
        ConfigKey("hidden_dropout_prob", "model.dropout", 0.1),
        ConfigKey("attention_probs_dropout_prob", "model.attention_dropout", 0.1),
        ConfigKey("type_vocab_size", "model.segments", 2, to_theirs=lambda kinds: max(1, kinds)),
        ConfigKey("layer_norm_eps", "advanced.norm_eps", eps),
        ConfigKey("tie_word_embeddings", "model.tied_embeddings", True),
    )


ENCODER = {
    "model.positions": "learned",
    "model.norm": "layernorm",
    "model.norm_position": "post",
    "model.embedding_norm": True,
    **BIASED,
}
FIXED = (Fixed("position_embedding_type", "absolute"), Fixed("is_decoder", False), Fixed("add_cross_attention", False))
POSITION_IDS = r"embeddings\.position_ids$"


def _bias(head: str) -> tuple[Entry, ...]:
    """Entries of the output bias. Transformers has two such biases; version 5 ties both if the embeddings are tied, and
    uses the decoder's."""
    one, used = f"{head}.bias", f"{head}.decoder.bias"
    return (
        Entry(one, ("head.bias",), VOCAB_ROWS, echoes=(used,), when=lambda config: config.model.tied_embeddings),
        Entry(used, ("head.bias",), VOCAB_ROWS, idle=(one,), when=lambda config: not config.model.tied_embeddings),
    )


_GUESS = (
    *same_layout({"cls.predictions.transform.dense": "head.dense", "cls.predictions.transform.LayerNorm": "head.norm"}),
    Entry("cls.predictions.decoder.weight", ("head.weight",), VOCAB_ROWS),
    *_bias("cls.predictions"),
)
_POOLER = same_layout({"bert.pooler.dense": "head.pooler"})

BERT = Architecture(
    model_type="bert",
    base="bert",
    heads=(
        Head(
            "BertForPreTraining", ("mlm-nsp",), (*_GUESS, *_POOLER, *same_layout({"cls.seq_relationship": "head.next"}))
        ),
        Head("BertForMaskedLM", ("mlm",), _GUESS),
        Head("BertForSequenceClassification", ("classify",), (*_POOLER, CLASSIFIER)),
        Head("BertForTokenClassification", ("tag",), (CLASSIFIER,)),
        Head("BertModel", ("classify",), _POOLER, bare=True),
    ),
    stack=encoder_stack(
        "bert",
        words=Entry(
            "bert.embeddings.word_embeddings.weight",
            ("embed.tokens.weight",),
            VOCAB_ROWS,
            echoes=("cls.predictions.decoder.weight",),
        ),
    ),
    ours={"model.family": "bert"} | ENCODER,
    keys=encoder_keys(1e-12),
    fixed=FIXED,
    unused=(POSITION_IDS, r"^(bert\.)?pooler\."),
)

_ROBERTA_GUESS = (
    *same_layout({"lm_head.dense": "head.dense", "lm_head.layer_norm": "head.norm"}),
    Entry("lm_head.decoder.weight", ("head.weight",), VOCAB_ROWS),
    *_bias("lm_head"),
)

ROBERTA = Architecture(
    model_type="roberta",
    base="roberta",
    heads=(
        Head("RobertaForMaskedLM", ("mlm",), _ROBERTA_GUESS),
        Head(
            "RobertaForSequenceClassification",
            ("classify",),
            same_layout({"classifier.dense": "head.pooler", "classifier.out_proj": "head.classifier"}),
        ),
        Head("RobertaForTokenClassification", ("tag",), (CLASSIFIER,)),
    ),
    stack=encoder_stack(
        "roberta",
        POSITIONS_AFTER_PADDING,
        Entry(
            "roberta.embeddings.word_embeddings.weight",
            ("embed.tokens.weight",),
            VOCAB_ROWS,
            echoes=("lm_head.decoder.weight",),
        ),
    ),
    ours={"model.family": "bert"} | ENCODER,
    keys=tuple(
        key._replace(translation={"gelu": "gelu"}) if key.theirs == "hidden_act" else key
        for key in encoder_keys(1e-12, shift=ROBERTA_OFFSET)
    ),
    fixed=(Fixed("pad_token_id", 1), *FIXED),
    unused=(POSITION_IDS, r"^(roberta\.)?pooler\."),
)
"""Its head for masked words has the exact gelu whatever hidden_act says, so that only this is the same everywhere."""

XLM_ROBERTA = ROBERTA._replace(model_type="xlm-roberta", heads=renamed(ROBERTA.heads, "XLMRoberta"))
CAMEMBERT = ROBERTA._replace(model_type="camembert", heads=renamed(ROBERTA.heads, "Camembert"))

_LAYER = "distilbert.transformer.layer.{i}"
_DISTILBERT_NAMES = {"hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads"} | {
    "intermediate_size": "hidden_dim", "hidden_act": "activation", "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout",
}  # fmt: skip

DISTILBERT = Architecture(
    model_type="distilbert",
    base="distilbert",
    heads=(
        Head(
            "DistilBertForMaskedLM",
            ("mlm",),
            (
                *same_layout({"vocab_transform": "head.dense", "vocab_layer_norm": "head.norm"}),
                Entry("vocab_projector.weight", ("head.weight",), VOCAB_ROWS),
                Entry("vocab_projector.bias", ("head.bias",), VOCAB_ROWS),
            ),
        ),
        Head(
            "DistilBertForSequenceClassification",
            ("classify",),
            (*same_layout({"pre_classifier": "head.pooler"}), CLASSIFIER),
        ),
        Head("DistilBertForTokenClassification", ("tag",), (CLASSIFIER,)),
    ),
    stack=(
        Entry(
            "distilbert.embeddings.word_embeddings.weight",
            ("embed.tokens.weight",),
            VOCAB_ROWS,
            echoes=("vocab_projector.weight",),
        ),
        Entry("distilbert.embeddings.position_embeddings.weight", ("embed.position_embedding",)),
        *same_layout(
            {
                "distilbert.embeddings.LayerNorm": "embed.norm",
                f"{_LAYER}.attention.q_lin": "blocks.{i}.attention.query",
                f"{_LAYER}.attention.k_lin": "blocks.{i}.attention.key",
                f"{_LAYER}.attention.v_lin": "blocks.{i}.attention.value",
                f"{_LAYER}.attention.out_lin": "blocks.{i}.attention.out",
                f"{_LAYER}.sa_layer_norm": "blocks.{i}.norm1",
                f"{_LAYER}.ffn.lin1": "blocks.{i}.mlp.up",
                f"{_LAYER}.ffn.lin2": "blocks.{i}.mlp.down",
                f"{_LAYER}.output_layer_norm": "blocks.{i}.norm2",
            }
        ),
    ),
    ours={"model.family": "bert", "model.segments": 0, "advanced.norm_eps": 1e-12}
    | {"model.pooler_activation": "relu"}
    | ENCODER,
    keys=tuple(
        key._replace(theirs=_DISTILBERT_NAMES.get(key.theirs, key.theirs))
        for key in encoder_keys(1e-12)
        if key.ours not in ("model.segments", "advanced.norm_eps")
    ),
    inert=("qa_dropout", "seq_classif_dropout", "sinusoidal_pos_embds", "tie_weights_"),
    unused=(POSITION_IDS,),
)
"""sinusoidal_pos_embds says how positions began; they are in the files either way."""
