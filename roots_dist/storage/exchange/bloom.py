"""BLOOM (BigScience 2022) in transformers: ALiBi, a norm after the embedding, and one query/key/value matrix grouped by
head."""

from __future__ import annotations

from roots_dist.config.objectives import learned_by
from roots_dist.storage.exchange.forms import QKV_BY_GROUP, VOCAB_ROWS
from roots_dist.storage.exchange.gpt2 import BUFFERS, CLASSIFIER, SCORE
from roots_dist.storage.exchange.table import BIASED, QKV, Architecture, ConfigKey, Entry, Fixed, Head, same_layout

H, OURS = "transformer.h.{i}", "blocks.{i}"

BLOOM = Architecture(
    model_type="bloom",
    base="transformer",
    heads=(
        Head("BloomForCausalLM", learned_by("gpt", "write"), (Entry("lm_head.weight", ("head.weight",), VOCAB_ROWS),)),
        Head("BloomForSequenceClassification", ("classify",), (SCORE,)),
        Head("BloomForTokenClassification", ("tag",), (CLASSIFIER,)),
    ),
    stack=(
        Entry("transformer.word_embeddings.weight", ("embed.tokens.weight",), VOCAB_ROWS, echoes=("lm_head.weight",)),
        *same_layout({"transformer.word_embeddings_layernorm": "embed.norm", f"{H}.input_layernorm": f"{OURS}.norm1"}),
        Entry(f"{H}.self_attention.query_key_value.*", QKV, QKV_BY_GROUP),
        *same_layout(
            {
                f"{H}.self_attention.dense": f"{OURS}.attention.out",
                f"{H}.post_attention_layernorm": f"{OURS}.norm2",
                f"{H}.mlp.dense_h_to_4h": f"{OURS}.mlp.up",
                f"{H}.mlp.dense_4h_to_h": f"{OURS}.mlp.down",
                "transformer.ln_f": "head.norm",
            }
        ),
    ),
    ours={
        "model.family": "gpt",
        "model.positions": "alibi",
        "model.norm": "layernorm",
        "model.norm_position": "pre",
        "model.embedding_norm": True,
        "model.activation": "gelu_tanh",
        **BIASED,
    },
    keys=(
        ConfigKey("vocab_size", "model.vocab", 250880),
        ConfigKey("seq_length", "data.seq_length", 2048),
        ConfigKey("hidden_size", "model.hidden", 64, aliases=("n_embed",)),
        ConfigKey("n_layer", "model.layers", 2, aliases=("num_hidden_layers",)),
        ConfigKey("n_head", "model.heads", 8, aliases=("num_attention_heads",)),
        ConfigKey("hidden_dropout", "model.dropout", 0.0),
        ConfigKey("attention_dropout", "model.attention_dropout", 0.0),
        ConfigKey("layer_norm_epsilon", "advanced.norm_eps", 1e-5),
        ConfigKey("tie_word_embeddings", "model.tied_embeddings", True),
    ),
    fixed=(Fixed("apply_residual_connection_post_layernorm", False),),
    plain_ffn=True,
    unused=BUFFERS,
)
