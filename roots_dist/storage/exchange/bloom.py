"""BLOOM (BigScience 2022) in transformers: ALiBi, a norm after the embedding, queries, keys and values by head in one
matrix."""

from __future__ import annotations

from roots_dist.storage.exchange.forms import QKV_BY_HEAD, WORDS
from roots_dist.storage.exchange.gpt2 import BUFFERS, CLASSIFIER, SCORE
from roots_dist.storage.exchange.table import QKV, Architecture, Entry, Fixed, Head, Key, same

H, OURS = "transformer.h.{i}", "blocks.{i}"

BLOOM = Architecture(
    model_type="bloom",
    base="transformer",
    heads=(
        Head("BloomForCausalLM", ("clm", "instruct"), (Entry("lm_head.weight", ("head.weight",), WORDS),)),
        Head("BloomForSequenceClassification", ("classify",), (SCORE,)),
        Head("BloomForTokenClassification", ("tag",), (CLASSIFIER,)),
    ),
    stack=(
        Entry("transformer.word_embeddings.weight", ("embed.tokens.weight",), WORDS, echoes=("lm_head.weight",)),
        *same({"transformer.word_embeddings_layernorm": "embed.norm", f"{H}.input_layernorm": f"{OURS}.norm1"}),
        Entry(f"{H}.self_attention.query_key_value.*", QKV, QKV_BY_HEAD),
        *same(
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
        "model.bias": True,
    },
    keys=(
        Key("vocab_size", "model.vocab", 250880),
        Key("seq_length", "data.seq_length", 2048),
        Key("hidden_size", "model.hidden", 64, older=("n_embed",)),
        Key("n_layer", "model.layers", 2, older=("num_hidden_layers",)),
        Key("n_head", "model.heads", 8, older=("num_attention_heads",)),
        Key("hidden_dropout", "model.dropout", 0.0),
        Key("attention_dropout", "model.attention_dropout", 0.0),
        Key("layer_norm_epsilon", "advanced.norm_eps", 1e-5),
        Key("tie_word_embeddings", "model.tied_embeddings", True),
    ),
    fixed=(Fixed("apply_residual_connection_post_layernorm", False),),
    plain_ffn=True,
    unused=BUFFERS,
)
