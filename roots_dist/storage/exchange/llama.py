"""Llama (Touvron et al. 2023) and GPT-NeoX (Black et al. 2022) in transformers: the architectures with rotary
positions.

Llama has RMSNorm, a gated MLP and its own number of key/value heads; GPT-NeoX (with sequential branches) has LayerNorm
and biases. Version 4 of transformers reads rope_theta and ignores rope_parameters, which version 5 writes, so both are
written.
"""

from __future__ import annotations

from typing import Any

from roots_dist.config.objectives import learned_by
from roots_dist.storage.exchange.forms import QKV_BY_HEAD, VOCAB_ROWS
from roots_dist.storage.exchange.gpt2 import ACTIVATIONS, BUFFERS, CLASSIFIER, SCORE
from roots_dist.storage.exchange.table import QKV, Architecture, Entry, Fixed, Head, Key, same_layout


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Move rope_parameters (version 5) or rope_scaling (version 4) to the top level; scaled angles keep their nested
    key."""
    for name in ("rope_scaling", "rope_parameters"):
        given = tree.pop(name, None)
        if not isinstance(given, dict):
            continue
        if given.get("rope_type", given.get("type", "default")) != "default":
            tree[name] = given
        tree |= {key: given[key] for key in ("rope_theta", "partial_rotary_factor") if key in given}
    return tree


def _nested(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"rope_parameters": {"rope_type": "default", "rope_theta": tree["rope_theta"]}}


def _neox_nested(tree: dict[str, Any]) -> dict[str, Any]:
    """Add the rotated fraction of a head, for which the default is a quarter."""
    share, tree = tree["partial_rotary_factor"], _nested(tree)
    tree["rope_parameters"] |= {"partial_rotary_factor": share}
    return tree | {"rotary_pct": share, "rotary_emb_base": tree["rope_theta"]}


def _neox_flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Rename rotary_pct, the name in version 4."""
    tree = _flat(tree)
    share = tree.pop("rotary_pct", None)
    return tree if share is None else {"partial_rotary_factor": share} | tree


GATED = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
ROTARY = {
    "model.family": "gpt",
    "model.positions": "rotary",
    "model.norm_position": "pre",
    "model.embedding_norm": False,
}
_PLAIN = "rope_type default, angles that are not scaled"
UNSCALED = (Fixed("rope_scaling", None, description=_PLAIN), Fixed("rope_parameters", None, description=_PLAIN))
L, OURS = "model.layers.{i}", "blocks.{i}"
LM_HEAD = Entry("lm_head.weight", ("head.weight",), VOCAB_ROWS)

LLAMA = Architecture(
    model_type="llama",
    base="model",
    heads=(
        Head("LlamaForCausalLM", learned_by("gpt", "write"), (LM_HEAD,)),
        Head("LlamaForSequenceClassification", ("classify",), (SCORE,)),
        Head("LlamaForTokenClassification", ("tag",), (Entry("score.*", ("head.classifier.*",)),)),
    ),
    stack=(
        Entry("model.embed_tokens.weight", ("embed.tokens.weight",), VOCAB_ROWS, echoes=("lm_head.weight",)),
        *same_layout(
            {
                f"{L}.input_layernorm": f"{OURS}.norm1",
                f"{L}.self_attn.q_proj": f"{OURS}.attention.query",
                f"{L}.self_attn.k_proj": f"{OURS}.attention.key",
                f"{L}.self_attn.v_proj": f"{OURS}.attention.value",
                f"{L}.self_attn.o_proj": f"{OURS}.attention.out",
                f"{L}.post_attention_layernorm": f"{OURS}.norm2",
                f"{L}.mlp.gate_proj": f"{OURS}.mlp.gate",
                f"{L}.mlp.up_proj": f"{OURS}.mlp.up",
                f"{L}.mlp.down_proj": f"{OURS}.mlp.down",
                "model.norm": "head.norm",
            }
        ),
    ),
    ours=ROTARY | {"model.norm": "rmsnorm"},
    keys=(
        Key("vocab_size", "model.vocab", 32000),
        Key("max_position_embeddings", "data.seq_length", 2048),
        Key("hidden_size", "model.hidden", 4096),
        Key("num_hidden_layers", "model.layers", 32),
        Key("num_attention_heads", "model.heads", 32),
        Key("num_key_value_heads", "model.kv_heads"),
        Key("head_dim", "model.head_dim"),
        Key("intermediate_size", "model.ffn", 11008),
        Key("hidden_act", "model.activation", "silu", GATED),
        Key("rope_theta", "model.rope_theta", 10000.0),
        Key("attention_bias", "model.bias", False),
        Key("mlp_bias", "model.bias", False),
        Key("attention_dropout", "model.attention_dropout", 0.0),
        Key("rms_norm_eps", "advanced.norm_eps", 1e-6),
        Key("tie_word_embeddings", "model.tied_embeddings", False),
    ),
    fixed=(Fixed("partial_rotary_factor", 1.0), *UNSCALED),
    plain_heads=False,
    unused=BUFFERS,
    flatten=_flat,
    nest=_nested,
)

X = "gpt_neox.layers.{i}"

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
        Entry(f"{X}.attention.query_key_value.*", QKV, QKV_BY_HEAD),
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
    ours=ROTARY | {"model.norm": "layernorm", "model.bias": True},
    keys=(
        Key("vocab_size", "model.vocab", 50432),
        Key("max_position_embeddings", "data.seq_length", 2048),
        Key("hidden_size", "model.hidden", 6144),
        Key("num_hidden_layers", "model.layers", 44),
        Key("num_attention_heads", "model.heads", 64),
        Key("intermediate_size", "model.ffn", 24576),
        Key("hidden_act", "model.activation", "gelu", ACTIVATIONS),
        Key("rope_theta", "model.rope_theta", 10000.0, aliases=("rotary_emb_base",)),
        Key("hidden_dropout", "model.dropout", 0.0),
        Key("attention_dropout", "model.attention_dropout", 0.0),
        Key("layer_norm_eps", "advanced.norm_eps", 1e-5),
        Key("tie_word_embeddings", "model.tied_embeddings", False),
    ),
    fixed=(
        Fixed("use_parallel_residual", False, default=True),
        Fixed("attention_bias", True),
        Fixed("partial_rotary_factor", 1.0, default=0.25),
        *UNSCALED,
    ),
    unused=BUFFERS,
    flatten=_neox_flat,
    nest=_neox_nested,
)
