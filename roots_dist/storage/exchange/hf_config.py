"""config.json <-> our Config, by the table of an architecture; what either side cannot express is refused by name.

    config.json --read_hf_config--> {"model.hidden": 768, …}
    Config --incompatibilities--> problems, or none: --hf_config_of--> config.json

Nothing is dropped silently: an unknown key is refused, unless it is empty (null, {}, []) or changes no function, and
then it is listed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from pydantic import ValidationError

from roots_dist.checks import checks
from roots_dist.config.init_from import FREE, OF_VOCAB_HEAD
from roots_dist.config.records import objective_of
from roots_dist.config.rope_scaling import RULES
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, ExchangeError, Problem
from roots_dist.storage.exchange import rotary
from roots_dist.storage.exchange.common_keys import COMMON, FIXES, HARMLESS, LEFT_BEHIND, WINDOW_KEYS
from roots_dist.storage.exchange.table import Architecture, ConfigKey, Head, Refusal
from roots_dist.storage.exchange.tensors import exchange_error
from roots_dist.storage.exchange.values import compact, plain, spelled_out

LONGEST_SAMPLE = 4096
"""Largest data.seq_length of an import: models that allow 131,072 positions are seldom trained on as many."""


class Reading(NamedTuple):
    """The content of a config.json."""

    values: dict[str, object]
    """Our config values."""
    ignored: tuple[str, ...]
    """Keys that the model type does not know and that change no function."""


def read_hf_config(tree: Mapping[str, Any], architecture: Architecture, where: str) -> Reading:
    """Raises ExchangeError for the first setting that is not supported."""
    without_windows = tree.get("use_sliding_window") is False
    has_windows = any(key.ours == "model.window" for key in architecture.keys)
    _refuse_texts(tree, architecture, where)
    ignored = [name for name in WINDOW_KEYS if without_windows and not has_windows and tree.get(name) is not None]
    try:
        tree = architecture.flatten({name: value for name, value in tree.items() if name not in ignored})
    except Refusal as error:
        raise exchange_error(f"{where}: {error.key}", error.found, error.expected, error.fix) from error
    found: dict[str, object] = dict(architecture.ours)
    set_by: dict[str, str] = {}
    known = {fixed.theirs for fixed in architecture.fixed}
    for key in architecture.keys:
        known |= {key.theirs, *key.aliases}
        value = _to_ours(tree, key, where)
        if key.ours in found and found[key.ours] != value:
            other = set_by.get(key.ours)
            expected = (
                f"the same as {other} = {tree.get(other)!r}" if other else f"one that means {_as_json(found[key.ours])}"
            )
            raise _error(
                where, key.theirs, tree.get(key.theirs, key.default), f"{expected}: our models have a single {key.ours}"
            )
        found[key.ours], set_by[key.ours] = value, key.theirs
    for fixed in architecture.fixed:
        value = tree.get(fixed.theirs, fixed.value if fixed.default is ... else fixed.default)
        if value != fixed.value and value not in fixed.equivalent:
            raise _error(
                where, fixed.theirs, value, f"{fixed.description or _as_json(fixed.value)}: the only supported value"
            )
    for name, value in COMMON:
        if name not in known and tree.get(name) not in (value, None, False):
            raise _error(where, name, tree[name], f"{_as_json(value)}: the only supported value")
    for name, value in tree.items():
        if name in known | HARMLESS | dict(COMMON).keys() | set(architecture.inert) or value in (None, {}, []):
            continue
        if not _is_inert(name, value):
            raise _error(where, name, value, f"a known key of model type {architecture.model_type}")
        ignored.append(name)
    with suppress(TypeError, ValueError, ArithmeticError):  # of a size that is none: config_of says which
        found = compact(found | {ours: derive(found) for ours, derive in architecture.derived.items()})
    places = found.get("model.max_positions")
    if isinstance(places, int):
        found["data.seq_length"] = min(places, LONGEST_SAMPLE)
    return Reading(found, tuple(ignored))


def _refuse_texts(tree: Mapping[str, Any], architecture: Architecture, where: str) -> None:
    """Raise ExchangeError for a number or a truth that is written as text: transformers takes "false" for true."""
    for key in architecture.keys:
        for name in (key.theirs, *key.aliases):
            if key.translation is None and name != "rope_scaling" and isinstance(tree.get(name), str):
                raise _error(where, name, tree[name], "no text there, but a number, true, false or a list")


def _is_inert(name: str, value: object) -> bool:
    """True if a key that a model type does not know changes no function: dropout that drops nothing, layers that are
    all of the plain kind, and what tools left behind."""
    if name == "layer_types":
        return isinstance(value, list) and set(map(str, value)) == {"full_attention"}
    if "drop" in name:
        return value == 0
    return LEFT_BEHIND.search(name) is not None


def config_of(values: Mapping[str, object], architecture: Architecture, where: str) -> Config:
    """The checked Config with these values. Raises ExchangeError in terms of config.json, or ConfigError."""
    tree: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        section, key = name.split(".")
        tree.setdefault(section, {})[key] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise _invalid(where, error.errors(include_url=False)[0], architecture) from error
    problems = checks.check(config, 1)
    if problems:
        names = {key.ours: f"{where}: {key.theirs}" for key in architecture.keys}
        raise ConfigError([replace(problem, origin=names.get(problem.key, where)) for problem in problems])
    return config


def _invalid(where: str, details: Mapping[str, Any], architecture: Architecture) -> ExchangeError:
    """The error for what pydantic says of a value, in terms of config.json."""
    section, name, *inner = map(str, details["loc"])
    theirs, found = _their_name(f"{section}.{name}", architecture), details["input"]
    expected = details["msg"].removeprefix("Input should be ")
    if inner and inner[0] in RULES:  # of the rule of that name
        rule, *inner = inner
        theirs = ".".join([theirs, *(rotary.ORIGINAL if key == "original_length" else key for key in inner)])
        if details["type"] == "missing":
            return exchange_error(f"{where}: {theirs}", None, f"a value, which {rule} needs", "add it")
        if details["type"] == "extra_forbidden":
            keys = [rotary.ORIGINAL if key == "original_length" else key for key in RULES[rule].model_fields]
            expected = f"no such setting, for {rule} has {', '.join(key for key in keys if key != 'type')}"
            return exchange_error(f"{where}: {theirs}", found, expected, "remove it, or use a model without it")
    return _error(where, theirs, found, expected)


def _their_name(ours: str, architecture: Architecture) -> str:
    return next((key.theirs for key in architecture.keys if key.ours == ours), ours)


def labels_of(tree: Mapping[str, Any], where: str) -> list[str]:
    """Names of a head's classes, in the order of its outputs."""
    if tree.get("problem_type") not in (None, "single_label_classification"):
        raise _error(
            where, "problem_type", tree["problem_type"], "single_label_classification: each text has one label"
        )
    given = tree.get("id2label") or tree.get("num_labels", 2)
    try:
        given = {i: f"LABEL_{i}" for i in range(given)} if isinstance(given, int) else given
        names = {int(i): str(name) for i, name in given.items()}
    except (AttributeError, ValueError):
        names = {}
    if len(names) < 2 or sorted(names) != list(range(len(names))):
        raise _error(where, "id2label", given, "the names of outputs 0, 1 … of two or more classes")
    return [names[i] for i in range(len(names))]


def incompatibilities(config: Config, architecture: Architecture, head: Head) -> Iterator[Problem]:
    """Features of this model that a model of that type lacks."""
    values, m = spelled_out(config), config.model

    def problem(key: str, expected: object) -> Problem:
        fix = "train with that, or use `roots generate` and `roots evaluate`, which read the run itself"
        return Problem(key=key, found=values[key], expected=f"{expected} for {head.architecture}", fix=fix)

    fixed = dict(architecture.ours) | {ours: derive(values) for ours, derive in architecture.derived.items()}
    unread = OF_VOCAB_HEAD if objective_of(config).has_labels else ()
    for name, value in fixed.items():
        if values[name] != value and name not in unread:
            yield problem(name, _as_json(value))
    for key in architecture.keys:
        if key.translation is not None and values[key.ours] not in key.translation.values():
            yield problem(key.ours, " or ".join(dict.fromkeys(map(_as_json, key.translation.values()))))
    one: dict[str, ConfigKey] = {}
    for key in architecture.keys:  # several of ours that theirs has one key for; rates of dropout may differ
        first = one.setdefault(key.theirs, key)
        if key.ours not in FREE and values[key.ours] != values[first.ours]:
            yield problem(key.ours, f"{_as_json(values[first.ours])}, as {first.ours} is,")
    said = {key.ours for key in architecture.keys}
    if not set(values["model.layer_kinds"]) <= set(architecture.kinds):
        yield problem("model.layer_kinds", f"only {' and '.join(architecture.kinds)}")
    for name, value in plain(config).items():
        if name not in said | fixed.keys() | {"model.layer_kinds"} and values[name] != value:
            yield problem(name, _as_json(value))
    shared = values["model.window"] and values["model.rope_scaling"] and not values["model.window_rope_theta"]
    if "model.window_rope_theta" in said | architecture.derived.keys() and shared:
        yield problem("model.window_rope_theta", "a base for the window layers, which are not scaled")
    if "model.kv_heads" not in said and m.num_kv_heads() != m.heads:
        yield problem("model.kv_heads", f"model.heads = {m.heads}")
    if not {"model.head_dim", "model.kv_lora_rank"} & said and m.heads * m.width_of_head() != m.hidden:
        yield problem("model.head_dim", f"model.hidden / model.heads = {m.hidden / m.heads:g}")
    if "model.kv_lora_rank" in said and m.kv_lora_rank is None:
        yield problem("model.kv_lora_rank", "a width of latents")
    if "model.experts" in said and m.experts is None:
        yield problem("model.experts", "a number of experts")
    if architecture.even_width and m.hidden % m.heads:
        yield problem("model.hidden", f"a multiple of model.heads = {m.heads}")
    if architecture.plain_ffn and m.width_of_ffn() != 4 * m.hidden:
        yield problem("model.ffn", f"4 × model.hidden = {4 * m.hidden}")


def hf_config_of(config: Config, architecture: Architecture, head: Head) -> dict[str, object]:
    """config.json of a compatible model, without its special tokens."""
    values = spelled_out(config)
    tree: dict[str, object] = {"architectures": [head.architecture], "model_type": architecture.model_type}
    tree |= {fixed.theirs: fixed.value for fixed in architecture.fixed if fixed.written}
    tree |= {key.theirs: _to_theirs(key, values[key.ours]) for key in architecture.keys}
    labels = config.finetune.labels
    if objective_of(config).has_labels and not head.bare:
        tree["id2label"] = {str(i): name for i, name in enumerate(labels)}
        tree["label2id"] = {name: i for i, name in enumerate(labels)}
    tree |= {"initializer_range": config.model.std(), "use_cache": True}
    return architecture.nest(tree)


def _to_ours(tree: Mapping[str, Any], key: ConfigKey, where: str) -> object:
    """Our value for a key."""
    name = next((name for name in (key.theirs, *key.aliases) if name in tree), None)
    value = key.default if name is None else tree[name]
    if key.translation is not None:
        if not isinstance(value, (str, bool)) or value not in key.translation:
            raise _error(where, key.theirs, value, " or ".join(map(_as_json, key.translation)))
        return key.translation[value]
    try:
        return None if value is None else key.to_ours(value)
    except (TypeError, ValueError, LookupError, ArithmeticError):  # config_of says what is expected
        return value


def _to_theirs(key: ConfigKey, value: object) -> object:
    if key.translation is not None:
        return next(theirs for theirs, ours in key.translation.items() if ours == value)
    return None if value is None else key.to_theirs(value)


def _as_json(value: object) -> str:
    """The value as written in JSON."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


BEYOND = ("less than or equal to", "whole numbers of at most")
"""Beginnings of the config's messages about a size that no model has."""


def _error(where: str, key: str, found: object, expected: str) -> ExchangeError:
    fix = FIXES.get(key, "use a model without it: only models that compute the same function are imported")
    if expected.startswith(BEYOND):
        fix = "use the config.json that belongs to these files"
    return exchange_error(f"{where}: {key}", found, expected, fix)
