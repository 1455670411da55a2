"""Rotary positions and windows in config.json, where versions 4 and 5 of transformers have keys of their own.

    version 4: rope_theta, rope_scaling {rope_type or type, …}    version 5: rope_parameters {rope_type, rope_theta, …}
    --flat--> rope_theta, partial_rotary_factor, rope_scaling in our terms --nested--> both

Version 4 ignores the keys of version 5 silently, so that both are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from roots_dist.storage.exchange.table import Fixed, Key

Tree = dict[str, Any]
RULES = ("linear", "llama3", "yarn", "longrope")
"""Values of rope_type that model.rope_scaling has by the same name."""
ORIGINAL = "original_max_position_embeddings"
_NOTES = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
"""Keys of the nested settings that are not of the rule."""
_UNSAID = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""Settings of yarn that are not written, because all versions have the same default."""
ANGLES = (Key("rope_theta", "model.rope_theta", 10000.0), Key("rope_scaling", "model.rope_scaling"))
RULE = Fixed("rope_type", "default", description=f"default, {', '.join(RULES[:-1])} or {RULES[-1]}", written=False)
WHOLE_HEAD = Fixed("partial_rotary_factor", 1.0, written=False)


def flat(tree: Tree) -> Tree:
    """One spelling for both, with the rule in our terms. A rule that we do not have stays under rope_type."""
    old, new = ({} if tree.get(name) is None else tree.pop(name) for name in ("rope_scaling", "rope_parameters"))
    if not isinstance(old, dict) or not isinstance(new, dict):
        return tree | {"rope_type": [old, new]}
    if isinstance(full := new.get("full_attention"), dict):  # settings of their own for window layers
        local = new.get("sliding_attention") or {}
        new = full
        tree |= {"rope_local_base_freq": local["rope_theta"]} if "rope_theta" in local else {}
        tree |= {} if _is_unscaled(local) else {"sliding_attention": local}
    given = _typed(new) | _typed(old)  # in version 5, too, the older key is the stronger one
    tree |= {key: given[key] for key in ("rope_theta", "partial_rotary_factor") if given.get(key) is not None}
    top = tree.pop(ORIGINAL, None)
    if _is_unscaled(given):
        return tree
    kind = given["rope_type"]
    if kind not in RULES:
        return tree | {"rope_type": kind}
    rule = {key: value for key, value in given.items() if key not in _NOTES and value is not None}
    if kind != "linear":
        original = top or rule.pop(ORIGINAL, None) or tree.get("max_position_embeddings")
        rule = {key: value for key, value in rule.items() if key != ORIGINAL} | {"original_length": original}
        if kind == "longrope" and rule.get("factor") == _ratio(tree.get("max_position_embeddings"), original):
            rule.pop("factor")
    return tree | {"rope_scaling": {"type": kind} | rule}


def nested(tree: Tree, kind_key: str = "rope_type", usual_share: float = 1.0) -> Tree:
    """Both spellings. kind_key: name of the rule's type in version 4. usual_share: rotated share of a head in models
    whose config.json says none."""
    kind, rule = _theirs(tree.pop("rope_scaling"))
    parameters: Tree = {"rope_type": kind, "rope_theta": tree["rope_theta"], **rule}
    if (share := tree.pop("partial_rotary_factor", usual_share)) != usual_share:
        parameters["partial_rotary_factor"] = tree["partial_rotary_factor"] = share
    if kind == "longrope":
        tree |= {ORIGINAL: rule[ORIGINAL]}
        rule = {key: value for key, value in rule.items() if key != ORIGINAL}
    return tree | {"rope_scaling": {kind_key: kind, **rule} if rule else None, "rope_parameters": parameters}


def nested_by_kind(tree: Tree) -> Tree:
    """The same for models whose window layers have angles of their own, unscaled."""
    local = tree["rope_local_base_freq"] = tree.get("rope_local_base_freq") or tree["rope_theta"]
    tree = nested(tree)
    unscaled = {"rope_type": "default", "rope_theta": local}
    return tree | {"rope_parameters": {"full_attention": tree["rope_parameters"], "sliding_attention": unscaled}}


def _typed(given: Tree) -> Tree:
    """The type of the rule under its newer name."""
    kind = given.get("rope_type", given.get("type"))
    return given if kind is None else given | {"rope_type": kind}


def _is_unscaled(given: Tree) -> bool:
    """Whether these settings leave the angles as they are, as a factor of 1 does."""
    kind = _typed(given).get("rope_type", "default")
    bare = not {"attention_factor", "mscale", "mscale_all_dim"} & given.keys()
    return kind == "default" or (kind in ("linear", "llama3", "yarn") and given.get("factor") == 1 and bare)


def _ratio(longest: Any, original: Any) -> float | None:
    """What longrope's factor is by default."""
    return longest / original if isinstance(longest, int) and isinstance(original, int) and original else None


def _theirs(rule: Tree | None) -> tuple[str, Tree]:
    """The rule's type and its settings in their terms."""
    if rule is None:
        return "default", {}
    said = {key: value for key, value in rule.items() if key != "type" and value is not None}
    said = {key: value for key, value in said.items() if _UNSAID.get(key) != value}
    names = {"original_length": ORIGINAL}
    return rule["type"], {names.get(key, key): list(v) if isinstance(v, tuple) else v for key, v in said.items()}


KINDS = {"full_attention": "full", "sliding_attention": "window"}
"""Values of layer_types."""


def _kinds_of(types: list[str]) -> tuple[str, ...]:
    return tuple(KINDS.get(one, one) for one in types)


def _types_of(kinds: tuple[str, ...]) -> list[str]:
    names = {ours: theirs for theirs, ours in KINDS.items()}
    return [names[kind] for kind in kinds]


LAYER_TYPES = Key("layer_types", "model.layer_kinds", to_ours=_kinds_of, to_theirs=_types_of)
MOST_LAYERS = 10_000
"""Kinds are not listed for a config.json that says more: it is refused for want of tensors."""
EVERY_LAYER = {
    "model.layer_kinds": lambda values: (
        ("window" if values["model.window"] else "full",) * min(values["model.layers"], MOST_LAYERS)
    )
}
"""For models with a window in all layers or in none."""


def with_layer_types(tree: Tree, is_window: Callable[[int], bool], num_layers: int) -> Tree:
    """Fill in the kinds of layers where config.json does not list them. is_window: of a layer's number."""
    types = tree.get("layer_types")
    if types is None and isinstance(layers := tree.get("num_hidden_layers", num_layers), int):
        types = ["sliding_attention" if is_window(i) else "full_attention" for i in range(min(layers, MOST_LAYERS))]
    return tree | {"layer_types": types}
