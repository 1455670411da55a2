"""Check a config's tree against its sections, and say in our words what pydantic finds wrong with it.

    tree of plain values --validated--> Config, or ConfigError with every unknown key and every wrong value

load.py calls it with a file's tree, schema.py with a changed one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from roots_dist.config import text
from roots_dist.config.foreign import share_of
from roots_dist.config.proposals import (
    SECTION,
    another,
    as_written,
    choices_of,
    described,
    examples,
    expected_of,
    given,
    inner_values,
    instead,
    proposal,
    refusal_of,
    sizes,
)
from roots_dist.config.renamed import RENAMED_VALUES
from roots_dist.config.rope_scaling import RULES
from roots_dist.config.sections import ConfigTree
from roots_dist.config.unknown_keys import fix_of, known_keys, nearest
from roots_dist.errors import ConfigError, Problem, Short

Tree = TypeVar("Tree", bound=ConfigTree)
ROPE_SCALING = ("model", "rope_scaling")
"""The key whose value is one of several records."""


def validated(
    kind: type[Tree],
    tree: Mapping[str, Any],
    context: object,
    origins: Mapping[str, str],
    problems: Sequence[Problem] = (),
) -> Tree:
    """The config of a tree of plain values. No value becomes one of another type: "5" is not 5. Raises ConfigError with
    these problems and its own."""
    try:
        config = kind.model_validate_json(json.dumps(tree), strict=True, context=context)
    except ValidationError as error:
        raise ConfigError([*problems, *problems_of(error, tree, origins)]) from None
    if problems:
        raise ConfigError(problems)
    return config


def problems_of(error: ValidationError, tree: Mapping[str, Any], origins: Mapping[str, str]) -> list[Problem]:
    """pydantic's findings in our words."""
    return [_problem(details, origins, tree) for details in error.errors(include_url=False)]


def put_values(tree: dict[str, Any], values: Mapping[str, object]) -> list[Problem]:
    """Replace values of a config's tree, by `section.key`. Returns the problems of what is no key, and of values that
    YAML has no word for: these are left out. Raises ConfigError if `values` is no mapping."""
    if not isinstance(values, Mapping):
        expected, fix = "a mapping of section.key to a value", 'write config.changed({"optim.lr": 1e-3})'
        raise ConfigError([Problem(key="values", found=Short(values), expected=expected, fix=fix)])
    problems: list[Problem] = []
    known = known_keys()
    for key, value in values.items():
        if not isinstance(key, str) or "." not in key:
            problems.append(_no_key(key, value))
            continue
        try:
            plain = _plain(value)
        except (TypeError, ValueError, RecursionError):
            expected = "a value as YAML has them: a number, text, True, False, None, a list or a dict"
            fix = f"give {key} such a value{described(key)}"
            problems.append(Problem(key=key, found=Short(value), expected=expected, fix=fix))
            continue
        if key not in known:
            problems.append(unknown(key, plain, "", tree))
        elif odd := [*text.unusable(plain, key, {})]:
            problems += odd
        else:
            _put(tree, key, plain)
    return problems


def _no_key(key: object, value: object) -> Problem:
    """A name without a section, or a section as a whole."""
    if isinstance(value, Mapping) and key in ConfigTree.model_fields:
        known = {f"{key}.{inner}": given for inner, given in value.items()}
        fix = f"write {{{', '.join(f'{name!r}: {Short(given)!r}' for name, given in known.items())}}}"
    else:
        near = nearest(str(key), [name for name in known_keys() if "." in name])
        fix = f"did you mean {near}" if near else "write the key with its section, as optim.lr"
    return Problem(key="key", found=Short(key), expected="a key of the config, section.key", fix=fix)


def as_argument(name: str, value: object) -> Problem:
    """A key that was written as the name of an argument, as changed(train_steps=5)."""
    known = [key for key in known_keys() if "." in key]
    with_section = name.replace("_", ".", 1)
    key = with_section if with_section in known else nearest(name, known) or "section.key"
    if name in ConfigTree.model_fields:
        key = next(inner for inner in known if inner.startswith(f"{name}."))
    expected, fix = "a mapping of section.key to a value", f"write config.changed({{{key!r}: {Short(value)!r}}})"
    return Problem(key=f"changed: {name}", found=Short(value), expected=expected, fix=fix)


def _plain(value: object) -> Any:
    """A value as YAML would give it. Numbers of numpy are numbers, and paths are text."""
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, os.PathLike):
        return str(os.fspath(value))
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(inner) for key, inner in value.items()}
    raise TypeError(type(value).__name__)


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a value; a record that is off by default is switched on by any of its keys."""
    *outer, leaf = key.split(".")
    place = tree
    for name in outer:
        if not isinstance(place.get(name), dict):
            place[name] = {}
        place = place[name]
    place[leaf] = value


def origin_of(key: str, origins: Mapping[str, str]) -> str:
    """The place where a key, or the nearest thing around it, was written."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, "")


def unknown(key: str, found: object, origin: str, tree: Mapping[str, Any]) -> Problem:
    """The problem of a key that does not exist."""
    return Problem(key=key, found=found, expected="a known key", fix=fix_of(key, found, sizes(tree)), origin=origin)


def _problem(details: ErrorDetails, origins: Mapping[str, str], tree: Mapping[str, Any]) -> Problem:
    """pydantic's finding in our words."""
    loc = [part for part in details["loc"] if part != "<lambda>"]
    rule = str(loc.pop(2)) if loc[:2] == list(ROPE_SCALING) and len(loc) > 2 else None  # pydantic names the record too
    key = ".".join(map(str, loc)) or "config"
    origin = origin_of(key, origins)
    if details["type"] == "extra_forbidden" and rule is not None:
        known = ", ".join(RULES[rule].model_fields)
        expected = f"a key of {rule}: {known}"
        return Problem(key=key, found=details["input"], expected=expected, fix="remove it", origin=origin)
    if details["type"] == "extra_forbidden":
        return unknown(key, details["input"], origin, tree)
    is_section = details["type"] in SECTION and loc == list(ROPE_SCALING)
    if details["type"].startswith("union_tag") or is_section:
        found, expected = details["input"], f"a mapping with a type, one of {', '.join(RULES)}"
        fix = f"write {key}={{type: {next(iter(RULES))}, factor: 2}}, or leave it out"
        return Problem(key=key, found=found, expected=expected, fix=fix, origin=origin)
    expected = expected_of(details, key)
    found = None if details["type"] == "missing" else details["input"]  # pydantic gives what the key is missing in
    return Problem(key=key, found=found, expected=expected, fix=_remedy(details, key, tree), origin=origin)


def _remedy(details: ErrorDetails, key: str, tree: Mapping[str, Any]) -> str:
    kind = details["type"]
    if (share := share_of(key, details["input"], sizes(tree))) is not None:
        return share
    if kind == "literal_error" and (new := RENAMED_VALUES.get((key, str(details["input"])))):
        return f"it is called {new} now"
    if kind == "missing":
        return f"give {key} a value"
    if kind == "string_type" and details["input"] is None:
        return f"write {key}=TEXT{described(key)}, or leave it out"
    if kind == "string_type":
        return "put the value into quotes"
    if kind == "tuple_type":
        listed = proposal(key, f"[{details['input']}]") if isinstance(details["input"], (str, int)) else None
        return f"write {listed or f'a list, as {key}=[{examples(key)}]'}{described(key)}"
    if kind in SECTION and (inner := inner_values(key)):
        return f"write keys of its own, as {key}={inner}{described(key)}, or leave it out"
    if kind in SECTION:
        return f"write the keys of {key} indented below it, each on a line"
    if key not in known_keys() or refusal_of(key, details["input"]) is None:
        return f"give {key} {given(details, key)}"
    meant = proposal(key, as_written(details["input"]))
    if meant is not None:
        return f"write {meant}" + ("" if kind == "literal_error" else described(key))
    if kind == "literal_error":
        return f"choose one of {choices_of(details)}"
    other = instead(key, as_written(details["input"]))
    said = other == f"give {key} {given(details, key)}"  # by what was expected
    return another(key) if said else other
