"""T5 (Raffel et al. 2020) in transformers: v1.0 with relu and a tied projection, v1.1 with a gated MLP and an untied
one.

Version 4 uses tie_word_embeddings to tell whether the input of the projection is scaled by D^-0.5 (v1.0); version 5
always sets it to true, and uses scale_decoder_outputs.
"""

from __future__ import annotations

from typing import Any

from roots_dist.config.objectives import learned_by
from roots_dist.storage.exchange.forms import VOCAB_ROWS
from roots_dist.storage.exchange.table import (
    UNBIASED,
    Architecture,
    ConfigKey,
    Entry,
    Fixed,
    Head,
    contradiction,
    same_layout,
    with_defaults,
)


def _stack(name: str, cross: bool) -> tuple[Entry, ...]:
    block, ours, mlp = f"{name}.block.{{i}}.layer", f"{name}.blocks.{{i}}", 2 if cross else 1

    def attention(theirs: str, part: str) -> dict[str, str]:
        short = {"q": "query", "k": "key", "v": "value", "o": "out"}
        return {f"{theirs}.{letter}": f"{ours}.{part}.{word}" for letter, word in short.items()}

    cross_attention = {
        f"{block}.1.layer_norm": f"{ours}.cross_norm",
        **attention(f"{block}.1.EncDecAttention", "cross"),
    }
    wide = {"wi_0": "gate", "wi_1": "up", "wo": "down"}
    dense = f"{block}.{mlp}.DenseReluDense"
    return (
        *same_layout({f"{block}.0.layer_norm": f"{ours}.norm1", **attention(f"{block}.0.SelfAttention", "attention")}),
        Entry(
            f"{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            (f"{name}.blocks.0.attention.relative.weight",),
        ),
        *same_layout(cross_attention if cross else {}),
        *same_layout({f"{block}.{mlp}.layer_norm": f"{ours}.norm2", f"{dense}.wo": f"{ours}.mlp.down"}),
        *(
            Entry(f"{dense}.{w}.*", (f"{ours}.mlp.{part}.*",), when=lambda config: config.model.gated())
            for w, part in list(wide.items())[:2]
        ),
        Entry(f"{dense}.wi.*", (f"{ours}.mlp.up.*",), when=lambda config: not config.model.gated()),
    )


ACTIVATIONS = {"relu": "relu", "gated-gelu": "geglu", "gated-silu": "swiglu"}


def _with_one_activation(tree: dict[str, Any], usual: str) -> dict[str, Any]:
    """Drop two keys that repeat what feed_forward_proj says; transformers follows them where they say something else.

    usual: what feed_forward_proj is if there is none."""
    said = tree.get("feed_forward_proj", usual)
    if not isinstance(said, str) or said not in ACTIVATIONS:
        return {key: value for key, value in tree.items() if key not in ("dense_act_fn", "is_gated_act")}
    meant = {"dense_act_fn": "gelu_new" if said == "gated-gelu" else said.split("-")[-1]}
    for key, value in (meant | {"is_gated_act": said.startswith("gated-")}).items():
        found = tree.pop(key, value)
        if found != value:
            why = f"it means {value!r}, and transformers would follow {key}"
            fix = f"correct the one that is wrong, or remove {key}"
            raise contradiction(key, found, "feed_forward_proj", said, why, fix)
    return tree


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Use one key for the scale."""
    tree = _with_one_activation(tree, "relu")
    scaled = tree.pop("scale_decoder_outputs", None)
    return tree if scaled is None else tree | {"tie_word_embeddings": scaled}


T5 = Architecture(
    model_type="t5",
    base="",
    heads=(
        Head(
            "T5ForConditionalGeneration",
            learned_by("t5", "write"),
            (Entry("lm_head.weight", ("head.weight",), VOCAB_ROWS),),
            aliases=("T5WithLMHeadModel",),
        ),
    ),
    stack=(
        Entry(
            "shared.weight",
            ("embed.tokens.weight",),
            VOCAB_ROWS,
            echoes=("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"),
        ),
        *_stack("encoder", cross=False),
        Entry("encoder.final_layer_norm.weight", ("bridge.norm.weight",)),
        *_stack("decoder", cross=True),
        Entry("decoder.final_layer_norm.weight", ("head.norm.weight",)),
    ),
    ours={
        "model.family": "t5",
        "model.positions": "relative",
        "model.norm": "rmsnorm",
        "model.norm_position": "pre",
        "model.embedding_norm": False,
        **UNBIASED,
    },
    keys=(
        ConfigKey("vocab_size", "model.vocab", 32128),
        ConfigKey("n_positions", "data.seq_length", 512),
        ConfigKey("d_model", "model.hidden", 512, aliases=("hidden_size",)),
        ConfigKey("num_layers", "model.layers", 6, aliases=("num_hidden_layers",)),
        ConfigKey("num_decoder_layers", "model.decoder_layers"),
        ConfigKey("num_heads", "model.heads", 8, aliases=("num_attention_heads",)),
        ConfigKey("d_kv", "model.head_dim", 64),
        ConfigKey("d_ff", "model.ffn", 2048),
        ConfigKey("feed_forward_proj", "model.activation", "relu", ACTIVATIONS),
        ConfigKey("relative_attention_num_buckets", "model.relative_buckets", 32),
        ConfigKey("relative_attention_max_distance", "model.relative_max_distance", 128),
        ConfigKey("dropout_rate", "model.attention_dropout", 0.1),
        ConfigKey("dropout_rate", "model.dropout", 0.1),
        ConfigKey("layer_norm_epsilon", "advanced.norm_eps", 1e-6),
        ConfigKey("tie_word_embeddings", "model.tied_embeddings", True),
    ),
    fixed=(Fixed("is_encoder_decoder", True), Fixed("is_decoder", False)),
    even_width=False,
    unused=(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$",),
    flatten=_flat,
    nest=lambda tree: tree | {"scale_decoder_outputs": tree["tie_word_embeddings"]},
)

MT5 = T5._replace(
    model_type="mt5",
    heads=(T5.heads[0]._replace(architecture="MT5ForConditionalGeneration", aliases=()),),
    ours={**T5.ours, "model.tied_embeddings": False},
    keys=with_defaults(
        [key for key in T5.keys if key.theirs != "tie_word_embeddings"],
        vocab_size=250112,
        num_layers=8,
        num_heads=6,
        d_ff=1024,
        feed_forward_proj="gated-gelu",
    ),
    # version 5 writes true whatever the model has, and reads a projection of its own all the same
    fixed=(*T5.fixed, Fixed("tie_word_embeddings", False, equivalent=(True,))),
    flatten=lambda tree: _with_one_activation(tree, "gated-gelu"),
    nest=lambda tree: tree,
)
"""mT5 (Xue et al. 2020): T5 v1.1 with another vocabulary, never tied."""
