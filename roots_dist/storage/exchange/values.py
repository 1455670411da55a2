"""Our config values as the tables of exchange use them: nothing left to a default, one value per layer and per bias.

    Config --spelled_out--> {"model.kv_heads": 8, …} <-- the tables --> config.json
    config.yaml <--compact-- the same

What a table does not mention must be `plain`, so that no feature is lost in an export.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roots_dist.config.families import FAMILIES
from roots_dist.config.init_from import FREE
from roots_dist.config.model import ModelConfig
from roots_dist.config.schema import Config

BIASES = ("model.qkv_bias", "model.out_bias", "model.mlp_bias")
_SIZES = (
    "model.kv_heads",
    "model.head_dim",
    "model.ffn",
    "model.expert_ffn",
    "model.decoder_layers",
    "model.embedding_size",
)
NOT_PLAIN = frozenset((*FREE, *_SIZES, "model.bias", "model.max_positions", "model.family"))
"""Keys without a plain value: sizes, which the tables check, and what does not say which function it is."""


def spelled_out(config: Config) -> dict[str, Any]:
    """Every config value with its default filled in."""
    m = config.model
    found = {f"{section}.{key}": value for section, keys in config.model_dump().items() for key, value in keys.items()}
    scaled = FAMILIES[m.family].scaled_attention
    kinds = m.kinds()
    windows = "window" in kinds
    own = windows and (m.window_rope_theta != m.rope_theta or m.rope_scaling is not None)
    return found | {
        "model.kv_heads": m.num_kv_heads(),
        "model.head_dim": m.width_of_head(),
        "model.ffn": m.width_of_ffn(),
        "model.expert_ffn": m.width_of_expert(),
        "model.decoder_layers": m.num_decoder_layers(),
        "model.embedding_size": m.width_of_embedding(),
        "model.max_positions": m.max_positions or config.data.seq_length,
        "model.qkv_bias": m.bias_of_qkv(),
        "model.out_bias": m.bias_of_out(),
        "model.mlp_bias": m.bias_of_mlp(),
        "model.attention_scale": m.attention_scale or (m.usual_attention_scale() if scaled else 1.0),
        "model.layer_kinds": kinds,
        "model.window": m.window if windows else None,
        "model.window_rope_theta": m.window_rope_theta if own else None,
    }


def plain(config: Config) -> dict[str, Any]:
    """Values of model.* in a model without features of its own, with the sizes of this one."""
    m = config.model
    found = {f"model.{key}": field.default for key, field in ModelConfig.model_fields.items()}
    scaled = FAMILIES[m.family].scaled_attention
    found |= {
        "model.attention_scale": m.usual_attention_scale() if scaled else 1.0,
        "model.layer_kinds": ("full",) * m.layers,
    }
    return {key: value for key, value in found.items() if key not in NOT_PLAIN}


def compact(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values with less said, as a person would write them in config.yaml."""
    found = dict(values)
    biases = {found[name] for name in BIASES if name in found}
    if len(biases) == 1:
        found = {name: value for name, value in found.items() if name not in BIASES} | {"model.bias": biases.pop()}
    kinds = found.get("model.layer_kinds")
    if kinds is not None:
        found["model.layer_kinds"] = () if set(kinds) in ({"full"}, {"window"}) else _period(kinds)
        if "window" not in kinds:
            found |= {"model.window": None, "model.window_rope_theta": None}
    same_base = found.get("model.window_rope_theta") == found.get("model.rope_theta")
    if same_base and not found.get("model.rope_scaling"):
        found["model.window_rope_theta"] = None
    scale = found.get("model.attention_scale")
    if scale is not None and scale == _width_of_head(found) ** -0.5:
        found["model.attention_scale"] = None
    return found


def _width_of_head(values: Mapping[str, Any]) -> float:
    width: float = values.get("model.head_dim") or values["model.hidden"] // values["model.heads"]
    return width


def _period(kinds: Sequence[str]) -> tuple[str, ...]:
    """The shortest pattern that repeats to these kinds."""
    pattern = next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    return tuple(kinds[:pattern])
