"""Llama 1 to 3 (Touvron et al. 2023, Grattafiori et al. 2024) in transformers, and models that are Llama with a few
rows changed: rotary positions, RMSNorm before each branch, a gated MLP, grouped key/value heads.

    Mistral: a window      Phi-3: fused matrices, part of a head rotated      Qwen 2: biases of query, key and value
    Qwen 3: norms of queries and keys      SmolLM3: layers without rotary      Granite: four multipliers
"""

from __future__ import annotations

from typing import Any

from roots_dist.config.objectives import learned_by
from roots_dist.storage.exchange.forms import GATE_UP_ROWS, QKV_ROWS, VOCAB_ROWS
from roots_dist.storage.exchange.gpt2 import BUFFERS, SCORE
from roots_dist.storage.exchange.rotary import (
    ANGLES,
    EVERY_LAYER,
    LAYER_TYPES,
    MOST_LAYERS,
    RULE,
    WHOLE_HEAD,
    flat,
    nested,
    refuse_other_lengths,
    with_layer_types,
)
from roots_dist.storage.exchange.table import (
    QKV,
    UNBIASED,
    Architecture,
    ConfigKey,
    Entry,
    Head,
    biases,
    same_layout,
    unread,
    variant,
)

GATED = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
ROTARY = {
    "model.family": "gpt",
    "model.positions": "rotary",
    "model.norm_position": "pre",
    "model.embedding_norm": False,
}
L, OURS = "model.layers.{i}", "blocks.{i}"
LM_HEAD = Entry("lm_head.weight", ("head.weight",), VOCAB_ROWS)
ATTENTION_BIAS = (
    ConfigKey("attention_bias", "model.qkv_bias", False),
    ConfigKey("attention_bias", "model.out_bias", False),
)

LLAMA = Architecture(
    model_type="llama",
    base="model",
    heads=(
        Head("LlamaForCausalLM", learned_by("gpt", "write"), (LM_HEAD,), aliases=("LLaMAForCausalLM",)),
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
        ConfigKey("vocab_size", "model.vocab", 32000),
        ConfigKey("max_position_embeddings", "model.max_positions", 2048),
        ConfigKey("hidden_size", "model.hidden", 4096),
        ConfigKey("num_hidden_layers", "model.layers", 32),
        ConfigKey("num_attention_heads", "model.heads", 32),
        ConfigKey("num_key_value_heads", "model.kv_heads"),
        ConfigKey("head_dim", "model.head_dim"),
        ConfigKey("intermediate_size", "model.ffn", 11008),
        ConfigKey("hidden_act", "model.activation", "silu", GATED),
        *ANGLES,
        *ATTENTION_BIAS,
        ConfigKey("mlp_bias", "model.mlp_bias", False),
        ConfigKey("attention_dropout", "model.attention_dropout", 0.0),
        ConfigKey("rms_norm_eps", "advanced.norm_eps", 1e-6),
        ConfigKey("tie_word_embeddings", "model.tied_embeddings", False),
    ),
    fixed=(WHOLE_HEAD, RULE, *unread(activation="swiglu")),  # of Falcon 3, beside hidden_act
    unused=BUFFERS,
    flatten=flat,
    nest=nested,
)

MISTRAL = variant(
    LLAMA,
    "mistral",
    "Mistral",
    ours=UNBIASED,
    without=("attention_bias", "mlp_bias"),
    keys=[ConfigKey("sliding_window", "model.window", 4096)],
    defaults=dict(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=131072),
    derived=EVERY_LAYER,
    kinds=("full", "window"),
)
"""Jiang et al. 2023: a window in all layers, or in none."""

_APART = [f"{L}.self_attn.{part}_proj.*" for part in "qkv"] + [f"{L}.mlp.{part}_proj.*" for part in ("gate", "up")]
PHI3 = variant(
    MISTRAL,
    "phi3",
    "Phi3",
    stack=(
        *(entry for entry in LLAMA.stack if entry.theirs not in _APART),
        Entry(f"{L}.self_attn.qkv_proj.*", QKV, QKV_ROWS),
        Entry(f"{L}.mlp.gate_up_proj.*", (f"{OURS}.mlp.gate.*", f"{OURS}.mlp.up.*"), GATE_UP_ROWS),
    ),
    without=("head_dim",),
    keys=[
        ConfigKey("partial_rotary_factor", "model.rotary_fraction", 1.0),
        ConfigKey("resid_pdrop", "model.dropout", 0.0),
    ],
    defaults=dict(
        vocab_size=32064,
        hidden_size=3072,
        intermediate_size=8192,
        num_key_value_heads=None,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        sliding_window=None,
    ),
    fixed=unread(full_attn_mod=1, interpolate_factor=1, lm_head_bias=False),  # of Phi-4 mini
    inert=("embd_pdrop",),  # nothing reads it
    nest=lambda tree: nested(tree, kind_key="type"),
)
"""Abdin et al. 2024: query, key and value in one matrix, gate and up in another."""


def _qwen_flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Windows in layers from max_window_layers on, if use_sliding_window says so."""
    tree = flat(tree)
    used, first = tree.pop("use_sliding_window", False), tree.pop("max_window_layers", 28)
    window = tree.get("sliding_window", 4096) if used else None
    return with_layer_types(tree | {"sliding_window": window}, lambda i: window is not None and i >= first, 32)


def _qwen_nested(tree: dict[str, Any]) -> dict[str, Any]:
    types, window = tree["layer_types"], tree["sliding_window"]
    first = types.index("sliding_attention") if window is not None else len(types)
    return nested(tree) | {"use_sliding_window": window is not None, "max_window_layers": first}


QWEN2 = variant(
    LLAMA,
    "qwen2",
    "Qwen2",
    ours=biases(qkv=True, out=False, mlp=False),
    without=("attention_bias", "mlp_bias", "head_dim"),
    keys=[ConfigKey("sliding_window", "model.window"), LAYER_TYPES],
    defaults=dict(vocab_size=151936, intermediate_size=22016, num_key_value_heads=32, max_position_embeddings=32768),
    kinds=("full", "window"),
    flatten=_qwen_flat,
    nest=_qwen_nested,
)
"""Qwen 2 and 2.5 (Yang et al. 2024)."""

QK_NORM = same_layout(
    {
        f"{L}.self_attn.q_norm": f"{OURS}.attention.query_norm",
        f"{L}.self_attn.k_norm": f"{OURS}.attention.key_norm",
    }
)
QWEN3 = variant(
    QWEN2,
    "qwen3",
    "Qwen3",
    stack=(*QWEN2.stack, *QK_NORM),
    ours={"model.qk_norm": "head", "model.mlp_bias": False},
    keys=[*ATTENTION_BIAS, ConfigKey("head_dim", "model.head_dim", 128)],
)
"""Yang et al. 2025, the dense models."""


def _smollm_flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Layers without rotary positions are those that no_rope_layers has a 0 for."""
    tree = flat(tree)
    every, layers = tree.pop("no_rope_layer_interval", 4), tree.get("num_hidden_layers", 36)
    if tree.get("no_rope_layers") is None and isinstance(layers, int):
        tree["no_rope_layers"] = [int((i + 1) % every != 0) for i in range(min(layers, MOST_LAYERS))]
    refuse_other_lengths("no_rope_layers", tree.get("no_rope_layers"), layers)
    return tree


SMOLLM3 = variant(
    LLAMA,
    "smollm3",
    "SmolLM3",
    without=("head_dim",),
    keys=[
        ConfigKey(
            "no_rope_layers",
            "model.layer_kinds",
            to_ours=lambda rotary: tuple("full" if one else "nope" for one in rotary),
            to_theirs=lambda kinds: [int(kind == "full") for kind in kinds],
        )
    ],
    defaults=dict(
        vocab_size=128256,
        hidden_size=2048,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rope_theta=2000000.0,
        tie_word_embeddings=True,
    ),
    kinds=("full", "nope"),
    flatten=_smollm_flat,
)
"""Hugging Face 2025."""

GRANITE = variant(
    LLAMA,
    "granite",
    "Granite",
    tasks=["ForCausalLM"],
    without=("head_dim",),
    keys=[
        ConfigKey("embedding_multiplier", "model.embedding_multiplier", 1.0),
        ConfigKey("residual_multiplier", "model.residual_multiplier", 1.0),
        ConfigKey("attention_multiplier", "model.attention_scale", 1.0),
        ConfigKey("logits_scaling", "model.logits_scaling", 1.0),
    ],
)
"""Granite 3 (IBM 2024)."""
