"""Falcon (Almazrouei et al. 2023), GPT-J (Wang & Komatsuzaki 2021) and Phi 1 and 2 (Microsoft 2023) in transformers:
rotary positions, LayerNorm, and attention and MLP side by side.

    Falcon 7B: one key/value head and one norm      Falcon 40B: groups of heads, a norm for each branch
    GPT-J and Phi: one norm, part of a head rotated (GPT-J: neighbouring channels), a bias on the vocabulary
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from roots_dist.config.objectives import learned_by
from roots_dist.storage.exchange.forms import QKV_BY_GROUP, VOCAB_ROWS
from roots_dist.storage.exchange.gpt2 import ACTIVATIONS, BUFFERS, CLASSIFIER, SCORE
from roots_dist.storage.exchange.llama import LLAMA, ROTARY, L
from roots_dist.storage.exchange.rotary import ANGLES, RULE, WHOLE_HEAD, flat, nested
from roots_dist.storage.exchange.table import (
    BIASED,
    QKV,
    Architecture,
    ConfigKey,
    Entry,
    Fixed,
    Head,
    biases,
    same_layout,
    unread,
    variant,
)

LAYERNORM = ROTARY | {"model.norm": "layernorm"}
SIDE_BY_SIDE = LAYERNORM | {"model.branches": "parallel_one_norm"}
X, OURS = "transformer.h.{i}", "blocks.{i}"
LM_HEAD = (Entry("lm_head.weight", ("head.weight",), VOCAB_ROWS), Entry("lm_head.bias", ("head.bias",), VOCAB_ROWS))


def _falcon_flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Three switches say how many key/value heads there are, and where the norms stand."""
    tree = flat(tree)
    new, several = tree.pop("new_decoder_architecture", False), tree.pop("multi_query", True)
    parallel, norms = tree.pop("parallel_attn", True), tree.pop("num_ln_in_parallel_attn", None)
    heads = tree.get("num_attention_heads", 71)
    if new and parallel:
        branches = "parallel_one_norm" if norms == 1 else "parallel"
    else:
        branches = "parallel_one_norm" if parallel else "sequential"
    if not new:
        tree["num_kv_heads"] = 1 if several else heads
    kv_heads = tree.get("num_kv_heads")
    return tree | {"branches": branches, "num_kv_heads": heads if kv_heads is None else kv_heads}


def _falcon_nested(tree: dict[str, Any]) -> dict[str, Any]:
    tree = nested(tree)
    branches, kv_heads = tree.pop("branches"), tree["num_kv_heads"]
    new = branches == "parallel" or kv_heads not in (1, tree["num_attention_heads"])
    return tree | {
        "new_decoder_architecture": new,
        "multi_query": new or kv_heads == 1,
        "num_kv_heads": kv_heads if new else tree["num_attention_heads"],  # which the older layouts do not read
        "parallel_attn": branches != "sequential",
        "num_ln_in_parallel_attn": (2 if branches == "parallel" else 1) if new else None,
    }


FALCON = Architecture(
    model_type="falcon",
    base="transformer",
    heads=(
        Head("FalconForCausalLM", learned_by("gpt", "write"), LM_HEAD[:1]),
        Head("FalconForSequenceClassification", ("classify",), (SCORE,)),
        Head("FalconForTokenClassification", ("tag",), (CLASSIFIER,)),
    ),
    stack=(
        Entry("transformer.word_embeddings.weight", ("embed.tokens.weight",), VOCAB_ROWS, echoes=("lm_head.weight",)),
        Entry(f"{X}.ln_attn.*", (f"{OURS}.norm1.*",), when=lambda config: config.model.branches == "parallel"),
        Entry(f"{X}.ln_mlp.*", (f"{OURS}.norm2.*",), when=lambda config: config.model.branches == "parallel"),
        Entry(f"{X}.input_layernorm.*", (f"{OURS}.norm1.*",), when=lambda config: config.model.branches != "parallel"),
        Entry(
            f"{X}.post_attention_layernorm.*",
            (f"{OURS}.norm2.*",),
            when=lambda config: config.model.branches == "sequential",
        ),
        Entry(f"{X}.self_attention.query_key_value.*", QKV, QKV_BY_GROUP),
        *same_layout(
            {
                f"{X}.self_attention.dense": f"{OURS}.attention.out",
                f"{X}.mlp.dense_h_to_4h": f"{OURS}.mlp.up",
                f"{X}.mlp.dense_4h_to_h": f"{OURS}.mlp.down",
                "transformer.ln_f": "head.norm",
            }
        ),
    ),
    ours=LAYERNORM,
    keys=(
        ConfigKey("vocab_size", "model.vocab", 65024),
        ConfigKey("max_position_embeddings", "model.max_positions", 2048),
        ConfigKey("hidden_size", "model.hidden", 4544),
        ConfigKey("num_hidden_layers", "model.layers", 32),
        ConfigKey("num_attention_heads", "model.heads", 71),
        ConfigKey("num_kv_heads", "model.kv_heads"),
        ConfigKey("ffn_hidden_size", "model.ffn"),
        ConfigKey("activation", "model.activation", "gelu", {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}),
        ConfigKey("branches", "model.branches"),
        *(ConfigKey("bias", name, False) for name in ("model.qkv_bias", "model.out_bias", "model.mlp_bias")),
        *ANGLES,
        ConfigKey("hidden_dropout", "model.dropout", 0.0),
        ConfigKey("attention_dropout", "model.attention_dropout", 0.0),
        ConfigKey("layer_norm_epsilon", "advanced.norm_eps", 1e-5),
        ConfigKey("tie_word_embeddings", "model.tied_embeddings", True),
    ),
    fixed=(
        WHOLE_HEAD,
        RULE,
        Fixed("alibi", False),
        Fixed("apply_residual_connection_post_layernorm", False, written=False),
        *unread(ff_factor=4),  # of the 11B, beside ffn_hidden_size
    ),
    unused=BUFFERS,
    flatten=_falcon_flat,
    nest=_falcon_nested,
)


def _gptj_flat(tree: dict[str, Any]) -> dict[str, Any]:
    """The rotated channels as a share of a head."""
    width, heads = (tree.get(name, default) for name, default in (("n_embd", 4096), ("n_head", 16)))
    with suppress(TypeError, ZeroDivisionError):  # of sizes that are none: the schema says so
        tree["rotary_dim"] = tree.get("rotary_dim", 64) / (width // heads)
    return tree


def _gptj_nested(tree: dict[str, Any]) -> dict[str, Any]:
    return tree | {"rotary_dim": round(tree["rotary_dim"] * (tree["n_embd"] // tree["n_head"]))}


GPTJ = Architecture(
    model_type="gptj",
    base="transformer",
    heads=(
        Head("GPTJForCausalLM", learned_by("gpt", "write"), LM_HEAD),
        Head("GPTJForSequenceClassification", ("classify",), (SCORE,)),
    ),
    stack=(
        Entry("transformer.wte.weight", ("embed.tokens.weight",), VOCAB_ROWS, echoes=("lm_head.weight",)),
        *same_layout(
            {
                f"{X}.ln_1": f"{OURS}.norm1",
                f"{X}.attn.q_proj": f"{OURS}.attention.query",
                f"{X}.attn.k_proj": f"{OURS}.attention.key",
                f"{X}.attn.v_proj": f"{OURS}.attention.value",
                f"{X}.attn.out_proj": f"{OURS}.attention.out",
                f"{X}.mlp.fc_in": f"{OURS}.mlp.up",
                f"{X}.mlp.fc_out": f"{OURS}.mlp.down",
                "transformer.ln_f": "head.norm",
            }
        ),
    ),
    ours=SIDE_BY_SIDE
    | biases(qkv=False, out=False, mlp=True)
    | {"model.rotary_interleaved": True, "model.rope_theta": 10000.0, "model.head_bias": True},
    keys=(
        ConfigKey("vocab_size", "model.vocab", 50400),
        ConfigKey("n_positions", "model.max_positions", 2048, aliases=("max_position_embeddings",)),
        ConfigKey("n_embd", "model.hidden", 4096, aliases=("hidden_size",)),
        ConfigKey("n_layer", "model.layers", 28, aliases=("num_hidden_layers",)),
        ConfigKey("n_head", "model.heads", 16, aliases=("num_attention_heads",)),
        ConfigKey("n_inner", "model.ffn"),
        ConfigKey("rotary_dim", "model.rotary_fraction"),
        ConfigKey("activation_function", "model.activation", "gelu_new", ACTIVATIONS),
        ConfigKey("resid_pdrop", "model.dropout", 0.0),
        ConfigKey("embd_pdrop", "model.dropout", 0.0),
        ConfigKey("attn_pdrop", "model.attention_dropout", 0.0),
        ConfigKey("layer_norm_epsilon", "advanced.norm_eps", 1e-5),
        ConfigKey("tie_word_embeddings", "model.tied_embeddings", False),
    ),
    fixed=(Fixed("rotary", True, written=False), Fixed("scale_attn_weights", True, written=False)),
    unused=(*BUFFERS, r"\.attn\.embed_positions$"),
    flatten=_gptj_flat,
    nest=_gptj_nested,
)

PHI = variant(
    LLAMA,
    "phi",
    "Phi",
    heads=(
        Head("PhiForCausalLM", learned_by("gpt", "write"), LM_HEAD),
        *(head._replace(architecture=head.architecture.replace("Llama", "Phi")) for head in LLAMA.heads[1:]),
    ),
    stack=(
        LLAMA.stack[0],
        *same_layout(
            {
                f"{L}.input_layernorm": f"{OURS}.norm1",
                f"{L}.self_attn.q_proj": f"{OURS}.attention.query",
                f"{L}.self_attn.k_proj": f"{OURS}.attention.key",
                f"{L}.self_attn.v_proj": f"{OURS}.attention.value",
                f"{L}.self_attn.dense": f"{OURS}.attention.out",
                f"{L}.mlp.fc1": f"{OURS}.mlp.up",
                f"{L}.mlp.fc2": f"{OURS}.mlp.down",
                "model.final_layernorm": "head.norm",
            }
        ),
    ),
    ours=SIDE_BY_SIDE | BIASED | {"model.head_bias": True},
    without=("attention_bias", "mlp_bias", "head_dim", "rms_norm_eps", "partial_rotary_factor"),
    keys=[
        ConfigKey("hidden_act", "model.activation", "gelu_new", ACTIVATIONS),
        ConfigKey("layer_norm_eps", "advanced.norm_eps", 1e-5),
        ConfigKey("partial_rotary_factor", "model.rotary_fraction", 0.5),
        ConfigKey("resid_pdrop", "model.dropout", 0.0),
    ],
    fixed=[Fixed("qk_layernorm", False)],
    defaults=dict(vocab_size=51200, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24),
    inert=("embd_pdrop",),
    nest=lambda tree: nested(tree, usual_share=0.5),
)
"""Phi-2 has 0.1 for resid_pdrop and 0 for embd_pdrop; ours has one rate for both."""
