"""OLMo 1 to 3 (Ai2 2024, 2025) in transformers: Llama with other norms.

OLMo 1: LayerNorm without weights      OLMo 2: on the branches' outputs, and on queries and keys as a whole
OLMo 3: the same with windows, whose angles are never scaled
"""

from __future__ import annotations

from typing import Any

from roots_dist.storage.exchange.llama import LLAMA, OURS, QK_NORM, L
from roots_dist.storage.exchange.rotary import LAYER_TYPES, flat, nested_by_kind, with_layer_types
from roots_dist.storage.exchange.table import ConfigKey, Fixed, same_layout, variant

OLMO = variant(
    LLAMA,
    "olmo",
    "Olmo",
    tasks=["ForCausalLM"],
    ours={"model.norm": "layernorm", "model.norm_affine": False, "model.mlp_bias": False, "advanced.norm_eps": 1e-5},
    without=("mlp_bias", "head_dim", "rms_norm_eps"),
    fixed=[Fixed("clip_qkv", None)],
    defaults=dict(vocab_size=50304),
)

_NORMS = (f"{L}.input_layernorm.*", f"{L}.post_attention_layernorm.*")
OLMO2 = variant(
    LLAMA,
    "olmo2",
    "Olmo2",
    tasks=["ForCausalLM"],
    stack=(
        *(entry for entry in LLAMA.stack if entry.theirs not in _NORMS),
        *QK_NORM,
        *same_layout(
            {f"{L}.post_attention_layernorm": f"{OURS}.norm1", f"{L}.post_feedforward_layernorm": f"{OURS}.norm2"}
        ),
    ),
    ours={"model.norm_position": "branch", "model.qk_norm": "whole", "model.mlp_bias": False},
    without=("mlp_bias", "head_dim"),
    defaults=dict(vocab_size=50304, rms_norm_eps=1e-5),
)


def _flat3(tree: dict[str, Any]) -> dict[str, Any]:
    """The base is the same in all layers, so that it has one key."""
    tree = with_layer_types(flat(tree), lambda i: (i + 1) % 4 != 0, 32)
    local = tree.pop("rope_local_base_freq", None)
    return tree if local in (None, tree.get("rope_theta")) else tree | {"rope_local_base_freq": local}


def _unscaled_windows(values: dict[str, Any]) -> object:
    """Windows need a base of their own only where the other layers are scaled."""
    scaled = values["model.rope_scaling"] and "window" in values["model.layer_kinds"]
    return values["model.rope_theta"] if scaled else None


def _nested3(tree: dict[str, Any]) -> dict[str, Any]:
    tree = nested_by_kind(tree)
    del tree["rope_local_base_freq"]
    return tree


OLMO3 = variant(
    OLMO2,
    "olmo3",
    "Olmo3",
    keys=[ConfigKey("sliding_window", "model.window", 4096), LAYER_TYPES],
    defaults=dict(rope_theta=500000.0),
    derived={"model.window_rope_theta": _unscaled_windows},
    kinds=("full", "window"),
    flatten=_flat3,
    nest=_nested3,
)
