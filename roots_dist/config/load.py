"""Read a YAML file and overrides into a typed Config with known keys only; report every mistake at once, with its
place.

    run.yaml --read--> tree + origins --apply overrides--> tree + origins --pydantic--> Config

Called by the commands of cli/main.py. What one value means for another (a tp that does not divide the heads) is
checks.py's.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from roots_dist.config import text
from roots_dist.config.extensions import KEY, NOTHING, Extension, extended, pinned
from roots_dist.config.other_names import DATA_RANKS, NO_DATA_RANKS, key_for, value_for
from roots_dist.config.overrides import joined, number_meant, typed
from roots_dist.config.renamed import NO_EQUAL, RENAMED, RENAMED_VALUES
from roots_dist.config.rope_scaling import RULES
from roots_dist.config.schema import Config, Source
from roots_dist.errors import ConfigError, Problem
from roots_dist.files import WORKING_DIRECTORY

COMMAND_LINE = "command line"
CONFIG_FILE = "config.yaml"
"""The name of a run's config in its folder."""
ROPE_SCALING = ("model", "rope_scaling")
"""The key whose value is one of several records."""
_SECTION = ("model_type", "model_attributes_type", "dict_type")
_WORDS = dict.fromkeys(_SECTION, "a section with keys") | {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "string_pattern_mismatch": "text of another form",
    "missing": "a value",
}
"""Kind of pydantic's error -> expected value, as a writer of YAML says it."""


@dataclass(frozen=True)
class Loaded:
    config: Config
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted key -> where it was written: `run.yaml:7` or `command line`. Defaults are not in it."""

    def located(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems, each with the place where its value was written."""
        found = [replace(p, origin=p.origin or origin_of(p.key, self.origins)) for p in problems]
        return [replace(p, fix=p.fix + _not_beside(p)) for p in found]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a file with `section.key=value` overrides. Raises ConfigError with everything that is wrong."""
    return read(path, overrides).config


def read(path: str | Path, overrides: Sequence[str] = (), named: Sequence[str] | None = None) -> Loaded:
    """Load like `load`, and remember where each value came from. `named` are the extensions that a person has named
    beside the overrides, if the file is that of a run's folder, which may come from anybody; None if the file is
    theirs."""
    tree, origins = text.parse_file(Path(path))
    problems: list[Problem] = []
    if (meant := joined(overrides)) is not None:
        found, expected = " ".join(overrides), "an override without spaces, section.key=value"
        raise ConfigError([Problem(key="override", found=found, expected=expected, fix=f"write {meant}")])
    for override in overrides:
        try:
            _apply(override, tree, origins)
        except ConfigError as error:
            problems += error.problems
    if odd := [*text.unusable(tree, "", origins)]:
        raise ConfigError([*problems, *odd])
    known = _pin_extensions(tree, origins, named)
    try:
        config = Config.model_validate_json(json.dumps(tree), strict=True, context=known)
    except ValidationError as error:
        problems += [_problem(details, origins) for details in error.errors(include_url=False)]
    if problems:
        raise ConfigError(problems)
    return Loaded(config, origins)


def read_record(path: Path) -> Config:
    """The config in the folder of a run, which may come from anybody: its extensions are not run, and whatever names
    they have added are taken. Raises ConfigError."""
    tree, origins = text.parse_file(path)
    try:
        return Config.from_record(tree)
    except ValidationError as error:
        raise ConfigError([_problem(details, origins) for details in error.errors(include_url=False)]) from None


def _pin_extensions(tree: dict[str, Any], origins: dict[str, str], named: Sequence[str] | None) -> Extension:
    """Write the digest behind each of the config's extensions, and run them: the names that they add are values."""
    section = tree.get("advanced")
    if not isinstance(section, dict) or not section.get("extensions"):
        return NOTHING
    by_hand = named is None or origins.get(KEY) == COMMAND_LINE
    try:
        section["extensions"] = pinned(section["extensions"], None if by_hand else named)
        return extended(tuple(section["extensions"]))
    except ConfigError as error:
        raise ConfigError([replace(p, origin=origin_of(KEY, origins)) for p in error.problems]) from None


def to_yaml(config: Config) -> str:
    """The whole resolved tree; reading it gives an equal Config."""
    return text.dump(config.model_dump(mode="json"))


def known_keys() -> list[str]:
    """Every dotted key of the tree, sections included."""
    return list(_keys(Config))


def _meant(override: str, known: Sequence[str]) -> str:
    """The override that was probably meant by one without a section, with a colon, dashes or full-width characters."""
    key, value = re.split(r"[=:]|$", typed(override).lstrip("-—"), maxsplit=1)
    meant = nearest(key.strip(), known) if key.strip() else "optim.lr"
    return f"{meant}={value.strip() or 'VALUE'}" if meant else "a key of the config, as optim.lr=1e-3"


def nearest(name: str, known: Sequence[str]) -> str | None:
    """The known key that a misspelt one probably means: same last part in another section, what another system calls
    so, or similar spelling."""
    name = name.lower()
    leaf = name.rpartition(".")[2]
    same_leaf = [key for key in known if key.rpartition(".")[2] == leaf]
    if same_leaf:
        return same_leaf[0]
    if (elsewhere := key_for(name)) in known:
        return elsewhere
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if close:
        return close[0]
    leaves = {key.rpartition(".")[2]: key for key in known}
    return next((leaves[found] for found in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)), None)


def origin_of(key: str, origins: dict[str, str]) -> str:
    """The place where a key, or the nearest thing around it, was written."""
    while key and key not in origins:
        key = key.rpartition(".")[0]
    return origins.get(key, "")


def _not_beside(problem: Problem) -> str:
    """A hint for a path that was looked for in the working directory but written in a config of another folder; else
    empty."""
    file, _, line = problem.origin.rpartition(":")
    elsewhere = line.isdigit() and Path(file).parent.resolve() != Path.cwd()
    return (
        "; paths in a config are relative to the working directory, not to the config"
        if elsewhere and WORKING_DIRECTORY in problem.expected
        else ""
    )


def _apply(override: str, tree: dict[str, Any], origins: dict[str, str]) -> None:
    key, equals, value = override.partition("=")
    section, _, inside = key.partition(".")
    known = known_keys()
    if equals and not inside and section in Config.model_fields:
        raise ConfigError([_whole_section(section, value)])
    if not equals or not inside or not section or (not override.isascii() and key not in known and typed(key) in known):
        expected = "an override of the form section.key=value"
        fix = NO_DATA_RANKS if key in DATA_RANKS else f"write {_meant(override, known)}"
        raise ConfigError([Problem(key=override, found=override, expected=expected, fix=fix, origin=COMMAND_LINE)])
    parsed = text.parse_value(key, value, COMMAND_LINE)
    if key not in known:
        raise ConfigError([_unknown(key, parsed, COMMAND_LINE)])
    *outer, leaf = key.split(".")
    place: Any = tree
    for depth, name in enumerate(outer, 1):
        if place.get(name) is None:  # not said, or a record that is off by default
            place[name] = {}
            origins[".".join(outer[:depth])] = COMMAND_LINE
        place = place[name]
        if not isinstance(place, dict):
            return  # the file is wrong there already, and validation says so
    place[leaf] = parsed
    for inner in [k for k in origins if k.startswith(f"{key}.")]:
        del origins[inner]
    origins[key] = COMMAND_LINE


def _whole_section(section: str, value: str) -> Problem:
    """A section has no value as a whole: its keys are set one by one."""
    given = text.parse_value(section, value, COMMAND_LINE)
    given = given if isinstance(given, dict) else {}
    keys = [f"{section}.{key}={json.dumps(inner)}" for key, inner in given.items()]
    first = next(key for key in known_keys() if key.startswith(f"{section}."))
    expected, fix = "an override of one key, section.key=value", f"write {' '.join(keys) or f'{first}=VALUE'}"
    return Problem(key=section, found=value, expected=expected, fix=fix, origin=COMMAND_LINE)


def _unknown(key: str, found: object, origin: str) -> Problem:
    parent, _, leaf = key.rpartition(".")
    in_list = parent.rpartition(".")[2].isdigit()  # the lists of the tree hold sources
    near = nearest(key, [f"{parent}.{name}" for name in Source.model_fields] if in_list else known_keys())
    fix = f"did you mean {near}" if near else "remove it; --print-config lists all keys"
    if leaf in DATA_RANKS:
        fix = NO_DATA_RANKS
    elif key in RENAMED:
        fix = f"it is called {RENAMED[key]} now"
    elif leaf in NO_EQUAL:
        fix = NO_EQUAL[leaf]
    elif ":" in leaf and found is None:
        fix = f"write a space after the colon: {leaf.replace(':', ': ', 1)}"
    elif near and near == key_for(key):
        fix = f"it is called {near} here"
    return Problem(key=key, found=found, expected="a known key", fix=fix, origin=origin)


def _problem(details: ErrorDetails, origins: dict[str, str]) -> Problem:
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
        return _unknown(key, details["input"], origin)
    is_section = details["type"] in _SECTION and loc == list(ROPE_SCALING)
    if details["type"].startswith("union_tag") or is_section:
        found, expected = details["input"], f"a mapping with a type, one of {', '.join(RULES)}"
        fix = f"write {key}={{type: {next(iter(RULES))}, factor: 2}}, or leave it out"
        return Problem(key=key, found=found, expected=expected, fix=fix, origin=origin)
    expected = _WORDS.get(details["type"]) or _choices(details) or details["msg"].removeprefix("Input should be ")
    found = None if details["type"] == "missing" else details["input"]  # pydantic gives what the key is missing in
    return Problem(key=key, found=found, expected=expected, fix=_remedy(details, key), origin=origin)


def _choices(details: ErrorDetails) -> str:
    """The words that a key takes, as YAML writes them; empty if it takes others too."""
    return re.sub(r"\b(True|False)\b", lambda word: word[0].lower(), details.get("ctx", {}).get("expected", ""))


def _remedy(details: ErrorDetails, key: str) -> str:
    kind = details["type"]
    if kind == "literal_error" and (new := RENAMED_VALUES.get((key, str(details["input"])))):
        return f"it is called {new} now"
    if kind in ("int_type", "float_type"):
        number = number_meant(details["input"], kind == "int_type")
        if number is not None:
            return f"write {key}={number}{_described(key)}"
    if kind == "missing":
        return f"give {key} a value"
    if kind == "string_type":
        return "put the value into quotes"
    if kind == "literal_error":
        meant = value_for(key, details["input"], get_args(info.annotation) if (info := _field(key)) else ())
        return f"write {key}={meant}" if meant else f"choose one of {_choices(details)}"
    if kind == "tuple_type":
        return f"write a list, as {key}=[{_examples(key)}]{_described(key)}"
    if kind in _SECTION:
        return f"write the keys of {key} indented below it, each on a line"
    return f"give {key} such a value{_described(key)}"


def _field(key: str) -> FieldInfo | None:
    section, _, name = key.partition(".")
    outer = Config.model_fields.get(section)
    return outer.annotation.model_fields.get(name) if outer and outer.annotation else None


def _examples(key: str) -> str:
    """Two values that the list of a key may hold."""
    inner = _field(key)
    options = [inner.annotation, *get_args(inner.annotation)] if inner else []
    items = next((get_args(option)[0] for option in options if get_origin(option) is tuple), None)
    words = get_args(items) if get_origin(items) is Literal else (1, 2) if items is int else ("a", "b")
    return ", ".join(map(str, words[:2]))


def _described(key: str) -> str:
    inner = _field(key)
    return f" ({inner.description})" if inner is not None and inner.description else ""


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in _models(info.annotation):
            yield from _keys(kind, f"{prefix}{name}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The section that an annotation names, through Optional; lists of sections have no dotted keys."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
