"""Gemma 1 to 3 (Google 2024, 2025) in transformers: Llama with a scaled embedding and norms of 1 + weight.

Gemma 2: norms before and after each branch, soft caps, every other layer a window
Gemma 3: norms of queries and keys, five windows to one full layer, with a rotary base of their own
"""

from __future__ import annotations

import math
from typing import Any

from roots_dist.storage.exchange.llama import LLAMA, OURS, QK_NORM, L
from roots_dist.storage.exchange.rotary import LAYER_TYPES, flat, nested, nested_by_kind, with_layer_types
from roots_dist.storage.exchange.table import ConfigKey, Fixed, same_layout, variant

TANH = {"gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}


def _flat(tree: dict[str, Any]) -> dict[str, Any]:
    """Gemma 1 has its activation under two names; "gelu" always meant the approximation by tanh."""
    acts = [tree.pop(name, None) for name in ("hidden_activation", "hidden_act")]
    given = next((act for act in acts if act is not None), "gelu_pytorch_tanh")
    return flat(tree) | {"hidden_act": "gelu_pytorch_tanh" if given == "gelu" else given}


GEMMA = variant(
    LLAMA,
    "gemma",
    "Gemma",
    ours={"model.zero_centered_norm": True, "model.mlp_bias": False},
    without=("mlp_bias",),
    keys=[ConfigKey("hidden_act", "model.activation", "gelu_pytorch_tanh", TANH)],
    fixed=[Fixed("use_bidirectional_attention", None, equivalent=(False,))],
    defaults=dict(
        vocab_size=256000,
        hidden_size=3072,
        intermediate_size=24576,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=256,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    ),
    derived={"model.embedding_multiplier": lambda values: math.sqrt(values["model.hidden"])},
    flatten=_flat,
    nest=lambda tree: nested(tree) | {"hidden_activation": tree["hidden_act"]},
)


def _scalar(scale: float) -> float:
    """The number whose root the scores are divided by, as it was written."""
    scalar = scale**-2
    return round(scalar) if math.isclose(scalar, round(scalar), rel_tol=1e-12) else scalar


def _flat2(tree: dict[str, Any]) -> dict[str, Any]:
    return with_layer_types(flat(tree), lambda i: i % 2 == 0, 26)


GEMMA2 = variant(
    GEMMA,
    "gemma2",
    "Gemma2",
    stack=(
        *(entry for entry in LLAMA.stack if not entry.theirs.startswith(f"{L}.post_attention_layernorm")),
        *same_layout(
            {
                f"{L}.post_attention_layernorm": f"{OURS}.out_norm1",
                f"{L}.pre_feedforward_layernorm": f"{OURS}.norm2",
                f"{L}.post_feedforward_layernorm": f"{OURS}.out_norm2",
            }
        ),
    ),
    ours={"model.norm_position": "sandwich"},
    without=("hidden_act",),
    keys=[
        ConfigKey("hidden_activation", "model.activation", "gelu_pytorch_tanh", TANH),
        ConfigKey(
            "query_pre_attn_scalar",
            "model.attention_scale",
            256,
            to_ours=lambda scalar: scalar**-0.5,
            to_theirs=_scalar,
        ),
        ConfigKey("attn_logit_softcapping", "model.attention_softcap", 50.0),
        ConfigKey("final_logit_softcapping", "model.logit_softcap", 30.0),
        ConfigKey("sliding_window", "model.window", 4096),
        LAYER_TYPES,
    ],
    defaults=dict(
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
    ),
    inert=("hidden_act", "sliding_window_size"),  # which released files repeat, and nothing reads
    kinds=("full", "window"),
    flatten=_flat2,
    nest=nested,
)


def _flat3(tree: dict[str, Any]) -> dict[str, Any]:
    """Flatten config.json, where sliding_window_pattern counts the layers from one full layer to the next."""
    tree = flat(tree)
    patterns = [tree.pop(name, None) for name in ("sliding_window_pattern", "_sliding_window_pattern")]
    every = next((pattern for pattern in patterns if pattern is not None), 6)
    return with_layer_types(tree, lambda i: (i + 1) % every != 0, 26)


GEMMA3 = variant(
    GEMMA2,
    "gemma3_text",
    "Gemma3",
    tasks=["ForCausalLM"],
    stack=(*GEMMA2.stack, *QK_NORM),
    ours={"model.qk_norm": "head"},
    keys=[ConfigKey("rope_local_base_freq", "model.window_rope_theta", 10000.0)],
    fixed=[Fixed("use_bidirectional_attention", False)],
    defaults=dict(
        vocab_size=262208,
        max_position_embeddings=131072,
        rope_theta=1000000.0,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
    ),
    flatten=_flat3,
    nest=nested_by_kind,
)
"""The text models; those with images are of another class."""
