"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023) in transformers: LayerNorm, biases, rotary positions
on a part of each head, and one query/key/value matrix grouped by head."""

from __future__ import annotations

from typing import Any

from roots_dist.config.objectives import learned_by
from roots_dist.storage.exchange.forms import QKV_BY_GROUP, VOCAB_ROWS
from roots_dist.storage.exchange.gpt2 import ACTIVATIONS, BUFFERS, CLASSIFIER, SCORE
from roots_dist.storage.exchange.llama import ROTARY
from roots_dist.storage.exchange.rotary import ANGLES, RULE, flat, nested
from roots_dist.storage.exchange.table import QKV, Architecture, ConfigKey, Entry, Head, contradiction, same_layout

OLDER = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
"""Names in version 4 -> those in version 5."""


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Rename what version 4 called otherwise."""
    tree = flat(tree)
    for old, new in OLDER.items():
        value = tree.pop(old, None)
        if value is not None and tree.setdefault(new, value) != value:
            why = "both are the same setting, and each version of transformers reads another one"
            raise contradiction(old, value, new, tree[new], why, "correct the one that is wrong, or remove it")
    return tree


def _nested(tree: dict[str, Any]) -> dict[str, Any]:
    """Nest config.json, with the names of both versions for the rotated share."""
    share = tree["partial_rotary_factor"]
    return nested(tree, usual_share=0.25) | {"rotary_pct": share, "rotary_emb_base": tree["rope_theta"]}


X, OURS = "gpt_neox.layers.{i}", "blocks.{i}"

GPT_NEOX = Architecture(
    model_type="gpt_neox",
    base="gpt_neox",
    heads=(
        Head(
            "GPTNeoXForCausalLM", learned_by("gpt", "write"), (Entry("embed_out.weight", ("head.weight",), VOCAB_ROWS),)
        ),
        Head("GPTNeoXForSequenceClassification", ("classify",), (SCORE,)),
        Head("GPTNeoXForTokenClassification", ("tag",), (CLASSIFIER,)),
    ),
    stack=(
        Entry(
            "gpt_neox.embed_in.weight",
            ("embed.tokens.weight",),
            VOCAB_ROWS,
            echoes=("embed_out.weight", "lm_head.weight"),
        ),
        *same_layout({f"{X}.input_layernorm": f"{OURS}.norm1"}),
        Entry(f"{X}.attention.query_key_value.*", QKV, QKV_BY_GROUP),
        *same_layout(
            {
                f"{X}.attention.dense": f"{OURS}.attention.out",
                f"{X}.post_attention_layernorm": f"{OURS}.norm2",
                f"{X}.mlp.dense_h_to_4h": f"{OURS}.mlp.up",
                f"{X}.mlp.dense_4h_to_h": f"{OURS}.mlp.down",
                "gpt_neox.final_layer_norm": "head.norm",
            }
        ),
    ),
    ours=ROTARY | {"model.norm": "layernorm", "model.mlp_bias": True},
    keys=(
        ConfigKey("vocab_size", "model.vocab", 50432),
        ConfigKey("max_position_embeddings", "model.max_positions", 2048),
        ConfigKey("hidden_size", "model.hidden", 6144),
        ConfigKey("num_hidden_layers", "model.layers", 44),
        ConfigKey("num_attention_heads", "model.heads", 64),
        ConfigKey("intermediate_size", "model.ffn", 24576),
        ConfigKey("hidden_act", "model.activation", "gelu", ACTIVATIONS),
        *ANGLES,
        ConfigKey("partial_rotary_factor", "model.rotary_fraction", 0.25),
        ConfigKey("use_parallel_residual", "model.branches", True, {True: "parallel", False: "sequential"}),
        ConfigKey("attention_bias", "model.qkv_bias", True),
        ConfigKey("attention_bias", "model.out_bias", True),
        ConfigKey("hidden_dropout", "model.dropout", 0.0),
        ConfigKey("attention_dropout", "model.attention_dropout", 0.0),
        ConfigKey("layer_norm_eps", "advanced.norm_eps", 1e-5),
        ConfigKey("tie_word_embeddings", "model.tied_embeddings", False),
    ),
    fixed=(RULE,),
    unused=BUFFERS,
    flatten=_flat,
    nest=_nested,
)
