"""Rotary positions and windows in config.json, where versions 4 and 5 of transformers have keys of their own.

    version 4: rope_theta, rope_scaling {rope_type or type, …}    version 5: rope_parameters {rope_type, rope_theta, …}
    --flat--> rope_theta, partial_rotary_factor, rope_scaling in our terms --nested--> both

Version 4 ignores the keys of version 5 silently, so that both are written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from roots_dist.storage.exchange.table import ConfigKey, Fixed, Refusal, contradiction

Tree = dict[str, Any]
RULES = ("linear", "llama3", "yarn", "longrope")
"""Values of rope_type that model.rope_scaling has by the same name."""
ORIGINAL = "original_max_position_embeddings"
_NOTES = ("rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned")
"""Keys of the nested settings that are not of the rule."""
_BESIDE = ("rope_theta", "partial_rotary_factor", ORIGINAL)
"""Settings that may also stand beside the nested ones."""
LOCAL = "rope_parameters.sliding_attention.rope_theta"
_UNSAID = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
"""Settings of yarn that are not written, because all versions have the same default."""
ANGLES = (ConfigKey("rope_theta", "model.rope_theta", 10000.0), ConfigKey("rope_scaling", "model.rope_scaling"))
RULE = Fixed("rope_type", "default", description=f"default, {', '.join(RULES[:-1])} or {RULES[-1]}", written=False)
WHOLE_HEAD = Fixed("partial_rotary_factor", 1.0, written=False)


def flat(tree: Tree) -> Tree:
    """One spelling for both, with the rule in our terms. A rule that we do not have stays under rope_type. Raises
    Refusal where a setting stands in two places with two values, or is no object."""
    old, new = ({} if tree.get(name) is None else tree.pop(name) for name in ("rope_scaling", "rope_parameters"))
    _refuse_other_types("rope_scaling", old)
    _refuse_other_types("rope_parameters", new)
    if "full_attention" in old:
        fix = "write the rules of kinds of layers into rope_parameters, as transformers 5 does"
        raise Refusal("rope_scaling", old, "the settings of one rule, as version 4 of transformers has them", fix)
    old, new, place = _typed(old), _typed(new), "rope_parameters"
    if isinstance(full := new.get("full_attention"), dict):  # settings of their own for window layers
        local, place = new.get("sliding_attention") or {}, "rope_parameters.full_attention"
        _refuse_other_types("rope_parameters.sliding_attention", local)
        new = _typed(full)
        if (base := local.get("rope_theta")) is not None:
            _agree("rope_local_base_freq", tree.get("rope_local_base_freq"), LOCAL, base)
            tree |= {"rope_local_base_freq": base}
        tree |= {} if _is_unscaled(local) else {"sliding_attention": local}
    by_kind = place != "rope_parameters"
    if old and new:
        top = {key: tree[key] for key in _BESIDE if tree.get(key) is not None}
        kept = {key: new[key] for key in _BESIDE[:2] if by_kind and key in new}  # only added to those of full layers
        _refuse_other_rule(kept | top | old, place, top | new)
    given = new | old
    for key in _BESIDE:
        _agree(key, tree.get(key), f"{'rope_scaling' if key in old else place}.{key}", given.get(key))
    tree |= {key: given[key] for key in _BESIDE[:2] if given.get(key) is not None}
    original = next((said[ORIGINAL] for said in (tree, given) if ORIGINAL in said), tree.get("max_position_embeddings"))
    tree.pop(ORIGINAL, None)
    if _is_unscaled(given):
        return tree
    kind = given["rope_type"]
    if kind not in RULES:
        return tree | {"rope_type": kind}
    rule = {key: value for key, value in given.items() if key not in (*_NOTES, ORIGINAL) and value is not None}
    if text := next((key for key, value in rule.items() if isinstance(value, str)), None):
        raise Refusal(f"rope_scaling.{text}", rule[text], "no text there", "write it without quotes")
    if kind != "linear":
        rule["original_length"] = original
        if kind == "longrope" and rule.get("factor") == _ratio(tree.get("max_position_embeddings"), original):
            rule.pop("factor", None)
    return tree | {"rope_scaling": {"type": kind} | rule}


def _refuse_other_types(key: str, found: object) -> None:
    """Raise Refusal for settings that are no object, as the name of a rule alone."""
    if not isinstance(found, dict):
        rule = found if isinstance(found, str) and found in RULES else "linear"
        expected = "an object with the settings of a rule, or null"
        fix = f'write the rule with its settings, as {{"rope_type": "{rule}", "factor": 4.0}}'
        raise Refusal(key, found, expected, fix)


def _agree(key: str, found: object, other: str, value: object) -> None:
    """Raise Refusal if both are said and differ."""
    if found is not None and value is not None and found != value:
        why = "both are the same setting, and each version of transformers reads another one"
        raise contradiction(key, found, other, value, why, "correct the one that is wrong, or remove it")


def _refuse_other_rule(old: Tree, place: str, new: Tree) -> None:
    """Raise Refusal if rope_scaling says something else than rope_parameters, which it replaces as a whole."""
    unscaled = _is_unscaled(old) and _is_unscaled(new)
    keys = ("rope_theta", "partial_rotary_factor") if unscaled else ("rope_type", *old, *new)
    for key in keys:
        usual = _UNSAID.get(key, "default" if key == "rope_type" else None)
        found, value = (usual if said.get(key) is None else said[key] for said in (old, new))
        if key not in ("type", "finetuned") and found != value:
            why = "transformers reads rope_scaling alone where there are both, rope_theta included"
            fix = f"write the rule into {place}, beside its rope_theta, and remove rope_scaling"
            raise contradiction(f"rope_scaling.{key}", found, f"{place}.{key}", value, why, fix)


def nested(tree: Tree, kind_key: str = "rope_type", usual_share: float = 1.0) -> Tree:
    """Write the rule in both spellings, rope_scaling and rope_parameters. kind_key: name of the rule's type in version
    4. usual_share: rotated share of a head in models whose config.json says none."""
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
    """The type of the rule under its newer name; the first files of Phi-3 call longrope su."""
    kind = given.get("rope_type", given.get("type"))
    return given if kind is None else given | {"rope_type": "longrope" if kind == "su" else kind}


def _is_unscaled(given: Tree) -> bool:
    """True if these settings leave the angles as they are, as a factor of 1 does."""
    kind = _typed(given).get("rope_type", "default")
    bare = not {"attention_factor", "mscale", "mscale_all_dim"} & given.keys()
    return kind == "default" or (kind in ("linear", "llama3", "yarn") and given.get("factor") == 1 and bare)


def _ratio(longest: Any, original: Any) -> float | None:
    """The default of longrope's factor."""
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


LAYER_TYPES = ConfigKey("layer_types", "model.layer_kinds", to_ours=_kinds_of, to_theirs=_types_of)
MOST_LAYERS = 10_000
"""Kinds are not listed for a config.json that says more: it is refused for want of tensors."""
EVERY_LAYER = {
    "model.layer_kinds": lambda values: (
        ("window" if values["model.window"] else "full",) * min(values["model.layers"], MOST_LAYERS)
    )
}
"""Kinds of layers of a model with a window in all layers or in none."""


def with_layer_types(tree: Tree, is_window: Callable[[int], bool], num_layers: int) -> Tree:
    """Fill in the kinds of layers where config.json does not list them. is_window: of a layer's number."""
    types = tree.get("layer_types")
    if types is None and isinstance(layers := tree.get("num_hidden_layers", num_layers), int):
        types = ["sliding_attention" if is_window(i) else "full_attention" for i in range(min(layers, MOST_LAYERS))]
    refuse_other_lengths("layer_types", types, tree.get("num_hidden_layers", num_layers))
    return tree | {"layer_types": types}


def refuse_other_lengths(key: str, kinds: object, layers: object) -> None:
    """Raise Refusal unless these are the kinds of as many layers. A number of layers that is none is told elsewhere."""
    counted = isinstance(layers, int) and layers <= MOST_LAYERS
    if counted and not (isinstance(kinds, list) and len(kinds) == layers):
        expected = f"a list of {layers}, the kind of each layer"
        raise Refusal(key, kinds, expected, "correct it, or num_hidden_layers")
