"""Mixtures of experts in transformers: a model that has a table already, with experts in the place of its MLP.

    Mixtral: Mistral    Qwen2-MoE: Qwen 2, a shared expert with a gate    Qwen3-MoE: Qwen 3    OLMoE: Llama, OLMo 2's
    norms of queries and keys

In files each expert has matrices of its own, also where version 5 of transformers holds them in one tensor. Their
balance of experts is a setting of training, which an import does not take over, and says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roots_dist.config.schema import Config
from roots_dist.storage.exchange.llama import ATTENTION_BIAS, LLAMA, MISTRAL, OURS, QK_NORM, L
from roots_dist.storage.exchange.rotary import flat, nested
from roots_dist.storage.exchange.table import ConfigKey, Entry, Fixed, biases, same_layout, unread, variant

ONLY_IN_TRAINING = ("router_aux_loss_coef", "output_router_logits")
"""Keys of what is learned beside the text."""


def _balance(tree: Mapping[str, Any], config: Config) -> str:
    """Remark on router_aux_loss_coef: their balance is that of a batch, over all layers at once, and no sum over
    microbatches could be equal to it."""
    coefficient = tree.get("router_aux_loss_coef") or 0.0
    if not coefficient:
        return ""
    as_strong = f"{coefficient * config.model.experts_per_token:g}"
    return (
        f"router_aux_loss_coef = {coefficient:g} is not taken over, for its balance depends on microbatches: "
        f"objective.balance_loss={as_strong}, of each sequence, is as strong"
    )


_MLP = [f"{L}.mlp.{part}_proj.*" for part in ("gate", "up", "down")]
_EXPERT = f"{OURS}.mlp.experts.{{j}}"
PER_TOKEN = ConfigKey("num_experts_per_tok", "model.experts_per_token", 2)
NORMALIZE = ConfigKey("norm_topk_prob", "model.normalize_expert_weights", False)
WIDTH = ConfigKey("moe_intermediate_size", "model.expert_ffn", 768)
DENSE = (
    ConfigKey("decoder_sparse_step", "model.expert_every", 1),
    ConfigKey("first_dense_layers", "model.dense_layers", 0),
)
DENSE_ELSEWHERE = Fixed("mlp_only_layers", None, description="the first layers, as [0, 1]", written=False)
"""A list that is not of the first layers: _dense_first leaves no other."""
EXPERTS = same_layout(
    {
        f"{L}.mlp.gate": f"{OURS}.mlp.router",
        f"{L}.mlp.experts.{{j}}.gate_proj": f"{_EXPERT}.gate",
        f"{L}.mlp.experts.{{j}}.up_proj": f"{_EXPERT}.up",
        f"{L}.mlp.experts.{{j}}.down_proj": f"{_EXPERT}.down",
    }
)
"""Their names in all but Mixtral."""
_WITHOUT_MLP = tuple(entry for entry in LLAMA.stack if entry.theirs not in _MLP)

MIXTRAL = variant(
    MISTRAL,
    "mixtral",
    "Mixtral",
    stack=(
        *_WITHOUT_MLP,
        *same_layout(
            {
                f"{L}.block_sparse_moe.gate": f"{OURS}.mlp.router",
                f"{L}.block_sparse_moe.experts.{{j}}.w1": f"{_EXPERT}.gate",
                f"{L}.block_sparse_moe.experts.{{j}}.w3": f"{_EXPERT}.up",
                f"{L}.block_sparse_moe.experts.{{j}}.w2": f"{_EXPERT}.down",
            }
        ),
    ),
    keys=[
        ConfigKey("num_local_experts", "model.experts", 8, aliases=("num_experts",)),
        PER_TOKEN,
        ConfigKey("intermediate_size", "model.expert_ffn", 14336),
    ],
    fixed=[Fixed("router_jitter_noise", 0.0)],
    defaults=dict(sliding_window=None, rms_norm_eps=1e-5, rope_theta=1e6),
    inert=ONLY_IN_TRAINING,
    remark=_balance,
)
"""Jiang et al. 2024."""


def _dense_first(tree: dict[str, Any]) -> dict[str, Any]:
    """The number of the first layers that are dense, where the list is of those."""
    tree = flat(tree)
    dense = tree.get("mlp_only_layers") or []
    if dense != list(range(len(dense))):
        return tree
    return {key: value for key, value in tree.items() if key != "mlp_only_layers"} | {"first_dense_layers": len(dense)}


def _dense_listed(tree: dict[str, Any]) -> dict[str, Any]:
    tree = nested(tree)
    return tree | {"mlp_only_layers": list(range(tree.pop("first_dense_layers")))}


def _windowed(tree: dict[str, Any]) -> dict[str, Any]:
    tree = _dense_first(tree)
    used = tree.pop("use_sliding_window", False)
    return tree | {"sliding_window": tree.get("sliding_window", 4096) if used else None}


def _windows_said(tree: dict[str, Any]) -> dict[str, Any]:
    return _dense_listed(tree) | {"use_sliding_window": tree["sliding_window"] is not None}


QWEN3_MOE = variant(
    MISTRAL,
    "qwen3_moe",
    "Qwen3Moe",
    stack=(*LLAMA.stack, *QK_NORM, *EXPERTS),
    ours={"model.qk_norm": "head", "model.mlp_bias": False},
    keys=[
        *ATTENTION_BIAS,
        ConfigKey("num_experts", "model.experts", 128, aliases=("num_local_experts",)),
        PER_TOKEN._replace(default=8),
        WIDTH,
        NORMALIZE,
        *DENSE,
    ],
    fixed=[DENSE_ELSEWHERE, *unread(qkv_bias=False, shared_expert_intermediate_size=0, use_qk_norm=True)],
    defaults=dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=24,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    ),
    inert=(*ONLY_IN_TRAINING, "max_window_layers"),  # a window is in all layers or in none
    remark=_balance,
    flatten=_windowed,
    nest=_windows_said,
)
"""Yang et al. 2025."""

QWEN2_MOE = variant(
    LLAMA,
    "qwen2_moe",
    "Qwen2Moe",
    stack=(
        *LLAMA.stack,
        *EXPERTS,
        *same_layout(
            {f"{L}.mlp.shared_expert.{part}_proj": f"{OURS}.mlp.shared.{part}" for part in ("gate", "up", "down")}
        ),
        Entry(f"{L}.mlp.shared_expert_gate.weight", (f"{OURS}.mlp.shared_gate.weight",)),
    ),
    ours=biases(qkv=True, out=False, mlp=False) | {"model.shared_expert_gate": True},
    without=("attention_bias", "mlp_bias", "head_dim"),
    keys=[
        ConfigKey("qkv_bias", "model.qkv_bias", True),
        ConfigKey("num_experts", "model.experts", 60, aliases=("num_local_experts",)),
        PER_TOKEN._replace(default=4),
        WIDTH._replace(default=1408),
        ConfigKey("shared_expert_intermediate_size", "model.shared_expert_ffn", 5632),
        NORMALIZE,
        *DENSE,
    ],
    fixed=[DENSE_ELSEWHERE],
    defaults=dict(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=32768,
    ),
    inert=ONLY_IN_TRAINING,
    remark=_balance,
    flatten=_dense_first,
    nest=_dense_listed,
)
"""Qwen 1.5 and 2 (Yang et al. 2024), without windows."""

OLMOE = variant(
    LLAMA,
    "olmoe",
    "Olmoe",
    tasks=["ForCausalLM"],
    stack=(*_WITHOUT_MLP, *QK_NORM, *EXPERTS),
    ours={"model.qk_norm": "whole", "model.mlp_bias": False},
    without=("mlp_bias", "head_dim"),
    keys=[
        ConfigKey("num_experts", "model.experts", 64, aliases=("num_local_experts",)),
        PER_TOKEN._replace(default=8),
        ConfigKey("intermediate_size", "model.expert_ffn", 2048),
        NORMALIZE,
    ],
    fixed=[Fixed("clip_qkv", None)],
    defaults=dict(
        vocab_size=50304,
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=16,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    ),
    inert=ONLY_IN_TRAINING,
    remark=_balance,
)
"""Muennighoff et al. 2024."""
