"""DeepSeek-V2 and V3 in transformers: Llama with latent attention, and experts in the place of its MLP.

    V2: softmax, groups of experts by their best one      V3: sigmoid, a bias of the choice, groups by their two best

The layers of V3 behind the last one predict further tokens (MTP). They are no part of the model that transformers
computes: an import leaves them out, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from roots_dist.config.schema import Config
from roots_dist.storage.exchange.llama import LLAMA, OURS, L
from roots_dist.storage.exchange.mixtures import EXPERTS, NORMALIZE, ONLY_IN_TRAINING, PER_TOKEN, WIDTH
from roots_dist.storage.exchange.rotary import flat, nested
from roots_dist.storage.exchange.table import UNBIASED, ConfigKey, Entry, Fixed, same_layout, unread, variant

Tree = dict[str, Any]
ONE_FOR_ALL = [f"{L}.self_attn.{part}_proj.*" for part in "qkv"]
"""Names of Llama's projections."""
LATENTS = (
    Entry(
        f"{L}.self_attn.q_proj.weight",
        (f"{OURS}.attention.query.weight",),
        when=lambda config: config.model.q_lora_rank is None,
    ),
    Entry(
        f"{L}.self_attn.q_b_proj.weight",
        (f"{OURS}.attention.query.weight",),
        when=lambda config: config.model.q_lora_rank is not None,
    ),
    *same_layout(
        {
            f"{L}.self_attn.q_a_proj": f"{OURS}.attention.query_down",
            f"{L}.self_attn.q_a_layernorm": f"{OURS}.attention.query_down_norm",
            f"{L}.self_attn.kv_a_proj_with_mqa": f"{OURS}.attention.kv_down",
            f"{L}.self_attn.kv_a_layernorm": f"{OURS}.attention.kv_down_norm",
            f"{L}.self_attn.kv_b_proj": f"{OURS}.attention.kv_up",
        }
    ),
)
SHARED = same_layout(
    {f"{L}.mlp.shared_experts.{part}_proj": f"{OURS}.mlp.shared.{part}" for part in ("gate", "up", "down")}
)
SIZES = (
    ConfigKey("kv_lora_rank", "model.kv_lora_rank", 512),
    ConfigKey("q_lora_rank", "model.q_lora_rank", 1536),
    ConfigKey("qk_nope_head_dim", "model.qk_nope_head_dim", 128),
    ConfigKey("qk_rope_head_dim", "model.qk_rope_head_dim", 64),
    ConfigKey("v_head_dim", "model.v_head_dim", 128),
)
ALL_HEADS = Fixed("num_key_value_heads", None, description="num_attention_heads", written=False)
"""Refuses a number of key/value heads that _flattened has left in place because it is another number."""
EVERY_LAYER = unread(moe_layer_freq=1)
INERT = (*ONLY_IN_TRAINING, "aux_loss_alpha", "seq_aux", "ep_size", "head_dim", "qk_head_dim")
"""Keys that say how it was trained, and widths that follow from others: each class computes them anew."""


def _balance(tree: Mapping[str, Any], config: Config) -> str:
    """Remark on aux_loss_alpha: DeepSeek adds the term up over layers, objective.balance_loss is a mean over them."""
    coefficient = tree.get("aux_loss_alpha") or 0.0
    if not coefficient:
        return ""
    as_strong = f"{coefficient * config.model.num_expert_layers():g}"
    return f"aux_loss_alpha = {coefficient:g} is not taken over: objective.balance_loss={as_strong} is as strong"


def _flattened(heads: int, shared: int, width: int) -> Callable[[Tree], Tree]:
    """Convert config.json to ours in these: the shared experts are one, whose width their number says, and there are as
    many heads of keys as of queries. Numbers: where config.json does not say them."""

    def flatten(tree: Tree) -> Tree:
        tree = flat(tree)
        if tree.get("num_key_value_heads") == tree.get("num_attention_heads", heads):
            del tree["num_key_value_heads"]
        number, each = tree.get("n_shared_experts", shared), tree.get("moe_intermediate_size", width)
        if isinstance(number, int) and isinstance(each, int):
            tree["n_shared_experts"] = number * each
        return tree

    return flatten


def _numbered(tree: Tree) -> Tree:
    """The reverse."""
    return nested(tree) | {
        "num_key_value_heads": tree["num_attention_heads"],
        "n_shared_experts": tree["n_shared_experts"] // tree["moe_intermediate_size"],
    }


def _whole_shared_experts(values: Mapping[str, Any]) -> int:
    """The width of the shared expert, a multiple of that of the others: theirs are counted."""
    each: int = values["model.expert_ffn"]
    found: int | None = values["model.shared_expert_ffn"]
    return 0 if found == 0 else each * max(1, round((found or 0) / each))


_FLAT_V2, _FLAT_V3 = _flattened(32, 2, 1407), _flattened(128, 1, 2048)


def _without_groups(tree: Tree) -> Tree:
    """Drop the numbers of groups if routing does not use them."""
    tree = _FLAT_V2(tree)
    unasked = ("n_group", "topk_group") if tree.get("topk_method", "greedy") == "greedy" else ()
    return {key: value for key, value in tree.items() if key not in unasked}


def _with_method(tree: Tree) -> Tree:
    return _numbered(tree) | {"topk_method": "greedy" if tree["n_group"] == 1 else "group_limited_greedy"}


DEEPSEEK_V2 = variant(
    LLAMA,
    "deepseek_v2",
    "DeepseekV2",
    tasks=["ForCausalLM"],
    stack=(*(entry for entry in LLAMA.stack if entry.theirs not in ONE_FOR_ALL), *LATENTS, *EXPERTS, *SHARED),
    ours=UNBIASED | {"model.rotary_interleaved": True, "model.normalize_expert_weights": False},
    without=("attention_bias", "mlp_bias", "head_dim"),
    keys=[
        *SIZES,
        ConfigKey("n_routed_experts", "model.experts", 64, aliases=("num_experts", "num_local_experts")),
        ConfigKey("n_shared_experts", "model.shared_expert_ffn", 2 * 1407),
        PER_TOKEN._replace(default=None),
        WIDTH._replace(default=1407),
        ConfigKey("first_k_dense_replace", "model.dense_layers", 0),
        ConfigKey("n_group", "model.expert_groups", 1),
        ConfigKey("topk_group", "model.groups_per_token", 1),
        ConfigKey("routed_scaling_factor", "model.routed_scaling_factor", 1.0),
    ],
    fixed=[
        ALL_HEADS,
        Fixed("norm_topk_prob", False, equivalent=(None,)),  # which its class reads as false
        Fixed(
            "topk_method",
            "greedy",
            equivalent=("group_limited_greedy",),
            description="greedy or group_limited_greedy",
            written=False,
        ),
        *EVERY_LAYER,
        *unread(scoring_func="softmax", rope_interleave=True),
    ],
    defaults=dict(vocab_size=102400),
    derived={
        "model.shared_expert_ffn": _whole_shared_experts,
        "model.group_score_experts": lambda values: 1 if values["model.expert_groups"] > 1 else 2,
    },
    inert=INERT,
    remark=_balance,
    flatten=_without_groups,
    nest=_with_method,
)
"""DeepSeek-AI 2024."""


def _further_layers(tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Patterns of the tensors of layers behind the last one."""
    layers = tree.get("num_hidden_layers", 61)
    further = tree.get("num_nextn_predict_layers", tree.get("num_mtp_layers", 1))
    if not isinstance(layers, int) or not isinstance(further, int):
        return ()
    return tuple(rf"^model\.layers\.{layers + i}\." for i in range(min(further, MOST_FURTHER)))


MOST_FURTHER = 64
"""Bound on how many such layers are looked for."""

DEEPSEEK_V3 = variant(
    DEEPSEEK_V2,
    "deepseek_v3",
    "DeepseekV3",
    stack=(
        *(entry for entry in DEEPSEEK_V2.stack if entry.theirs != f"{L}.mlp.gate.*"),
        Entry(f"{L}.mlp.gate.weight", (f"{OURS}.mlp.router.weight",)),
        Entry(f"{L}.mlp.gate.e_score_correction_bias", (f"{OURS}.mlp.router.bias",), wide=True),
    ),
    ours={"model.router_score": "sigmoid", "model.router_bias": True},
    keys=[
        ConfigKey("rope_interleave", "model.rotary_interleaved", True),
        NORMALIZE._replace(default=True),
    ],
    fixed=[*unread(scoring_func="sigmoid", topk_method="noaux_tc")],
    defaults=dict(
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        num_hidden_layers=61,
        num_attention_heads=128,
        max_position_embeddings=4096,
        n_routed_experts=256,
        n_shared_experts=2048,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
    ),
    derived={"model.shared_expert_ffn": _whole_shared_experts},
    even_width=False,
    inert=(*INERT, "num_nextn_predict_layers", "num_mtp_layers"),
    left_out=_further_layers,
    flatten=_FLAT_V3,
    nest=lambda tree: _numbered(tree) | {"num_nextn_predict_layers": 0},
)
"""DeepSeek-AI 2024 and 2025: V3, R1."""
