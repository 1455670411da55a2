"""GPT-2 (Radford et al. 2019) in transformers: learned positions, LayerNorm before each branch, Conv1D weights [in,
out]. OPT (Zhang et al. 2022) is the same function with other names, and with positions that start at row 2."""

from __future__ import annotations

from typing import Any

from roots_dist.config.objectives import learned_by
from roots_dist.storage.exchange.forms import POSITIONS_AFTER_PADDING, QKV_TRANSPOSED, TRANSPOSED, VOCAB_ROWS
from roots_dist.storage.exchange.table import (
    BIASED,
    QKV,
    Architecture,
    ConfigKey,
    Entry,
    Fixed,
    Head,
    same_layout,
    unread,
)

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu",
    "relu": "relu",
}
"""Their name -> ours, for an MLP without a gate."""
SCORE = Entry("score.weight", ("head.classifier.weight",))
CLASSIFIER = Entry("classifier.*", ("head.classifier.*",))
BUFFERS = (r"\.(attn|attention)\.(masked_)?bias$", r"rotary_emb\.inv_freq$")
"""Causal masks and rotary angles, which older versions saved with the weights."""

H, OURS = "transformer.h.{i}", "blocks.{i}"

GPT2 = Architecture(
    model_type="gpt2",
    base="transformer",
    heads=(
        Head("GPT2LMHeadModel", learned_by("gpt", "write"), (Entry("lm_head.weight", ("head.weight",), VOCAB_ROWS),)),
        Head("GPT2ForSequenceClassification", ("classify",), (SCORE,)),
        Head("GPT2ForTokenClassification", ("tag",), (CLASSIFIER,)),
    ),
    stack=(
        Entry("transformer.wte.weight", ("embed.tokens.weight",), VOCAB_ROWS, echoes=("lm_head.weight",)),
        Entry("transformer.wpe.weight", ("embed.position_embedding",)),
        *same_layout({f"{H}.ln_1": f"{OURS}.norm1"}),
        Entry(f"{H}.attn.c_attn.*", QKV, QKV_TRANSPOSED),
        Entry(f"{H}.attn.c_proj.*", (f"{OURS}.attention.out.*",), TRANSPOSED),
        *same_layout({f"{H}.ln_2": f"{OURS}.norm2"}),
        Entry(f"{H}.mlp.c_fc.*", (f"{OURS}.mlp.up.*",), TRANSPOSED),
        Entry(f"{H}.mlp.c_proj.*", (f"{OURS}.mlp.down.*",), TRANSPOSED),
        *same_layout({"transformer.ln_f": "head.norm"}),
    ),
    ours={
        "model.family": "gpt",
        "model.positions": "learned",
        "model.norm": "layernorm",
        "model.norm_position": "pre",
        "model.embedding_norm": False,
        **BIASED,
    },
    keys=(
        ConfigKey("vocab_size", "model.vocab", 50257),
        ConfigKey("n_positions", "model.max_positions", 1024, aliases=("max_position_embeddings",)),
        ConfigKey("n_embd", "model.hidden", 768, aliases=("hidden_size",)),
        ConfigKey("n_layer", "model.layers", 12, aliases=("num_hidden_layers",)),
        ConfigKey("n_head", "model.heads", 12, aliases=("num_attention_heads",)),
        ConfigKey("n_inner", "model.ffn"),
        ConfigKey("activation_function", "model.activation", "gelu_new", ACTIVATIONS),
        ConfigKey("resid_pdrop", "model.dropout", 0.1),
        ConfigKey("embd_pdrop", "model.dropout", 0.1),
        ConfigKey("attn_pdrop", "model.attention_dropout", 0.1),
        ConfigKey("layer_norm_epsilon", "advanced.norm_eps", 1e-5),
        ConfigKey("tie_word_embeddings", "model.tied_embeddings", True),
    ),
    fixed=(
        Fixed("scale_attn_weights", True),
        Fixed("scale_attn_by_inverse_layer_idx", False),
        Fixed("reorder_and_upcast_attn", False, equivalent=(True,)),
        Fixed("add_cross_attention", False),
    ),
    unused=BUFFERS,
)


def _opt_flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Fill in the embedding's width, which is the model's if there is none."""
    width = tree.get("word_embed_proj_dim")
    return tree | {"word_embed_proj_dim": tree.get("hidden_size", 768) if width is None else width}


_LAYER = "model.decoder.layers.{i}"

OPT = Architecture(
    model_type="opt",
    base="model",
    heads=(
        Head("OPTForCausalLM", learned_by("gpt", "write"), (Entry("lm_head.weight", ("head.weight",), VOCAB_ROWS),)),
        Head("OPTForSequenceClassification", ("classify",), (SCORE,)),
    ),
    stack=(
        Entry("model.decoder.embed_tokens.weight", ("embed.tokens.weight",), VOCAB_ROWS, echoes=("lm_head.weight",)),
        Entry("model.decoder.embed_positions.weight", ("embed.position_embedding",), POSITIONS_AFTER_PADDING),
        *same_layout(
            {
                f"{_LAYER}.self_attn_layer_norm": f"{OURS}.norm1",
                f"{_LAYER}.self_attn.q_proj": f"{OURS}.attention.query",
                f"{_LAYER}.self_attn.k_proj": f"{OURS}.attention.key",
                f"{_LAYER}.self_attn.v_proj": f"{OURS}.attention.value",
                f"{_LAYER}.self_attn.out_proj": f"{OURS}.attention.out",
                f"{_LAYER}.final_layer_norm": f"{OURS}.norm2",
                f"{_LAYER}.fc1": f"{OURS}.mlp.up",
                f"{_LAYER}.fc2": f"{OURS}.mlp.down",
                "model.decoder.final_layer_norm": "head.norm",
            }
        ),
    ),
    ours={**GPT2.ours, "advanced.norm_eps": 1e-5},
    keys=(
        ConfigKey("vocab_size", "model.vocab", 50272),
        ConfigKey("max_position_embeddings", "model.max_positions", 2048),
        ConfigKey("hidden_size", "model.hidden", 768),
        ConfigKey("word_embed_proj_dim", "model.hidden"),
        ConfigKey("num_hidden_layers", "model.layers", 12),
        ConfigKey("num_attention_heads", "model.heads", 12),
        ConfigKey("ffn_dim", "model.ffn", 3072),
        ConfigKey("activation_function", "model.activation", "relu", ACTIVATIONS),
        ConfigKey("dropout", "model.dropout", 0.1),
        ConfigKey("attention_dropout", "model.attention_dropout", 0.0),
        ConfigKey("tie_word_embeddings", "model.tied_embeddings", True),
    ),
    fixed=(
        Fixed("do_layer_norm_before", True),
        Fixed("_remove_final_layer_norm", False),
        Fixed("enable_bias", True),
        Fixed("layer_norm_elementwise_affine", True),
        Fixed("layerdrop", 0.0),
        *unread(learned_embeddings=True, scale_embeddings=False),  # of Galactica
    ),
    inert=("init_std",),
    unused=BUFFERS,
    flatten=_opt_flat,
)
