"""Read a YAML file and overrides into a typed Config with known keys only; report every mistake at once, with its
place.

    run.yaml --read--> tree + origins --apply overrides--> tree + origins --pydantic--> Config

Called by the commands of cli/main.py. What one value means for another (a tp that does not divide the heads) is
checks.py's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from roots_dist.config import text
from roots_dist.config.extensions import KEY, NOTHING, Extension, extended, pinned
from roots_dist.config.overrides import joined, typed
from roots_dist.config.problems import origin_of, problems_of, unknown, validated
from roots_dist.config.proposals import proposal, sizes
from roots_dist.config.schema import Config
from roots_dist.config.unknown_keys import fixed, in_one_word, known_keys, meant_by, no_config, setting
from roots_dist.errors import ConfigError, Problem
from roots_dist.files import WORKING_DIRECTORY

COMMAND_LINE = "command line"
PREPARE = re.compile(r"^#.*?((?:roots prepare .*--output|python examples/\w+\.py) (\S+).*)$", re.MULTILINE)
"""A comment of a config that says how its corpus is made."""
CONFIG_FILE = "config.yaml"
"""The name of a run's config in its folder."""


@dataclass(frozen=True)
class Loaded:
    config: Config
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted key -> where it was written: `run.yaml:7` or `command line`. Defaults are not in it."""

    def located(self, problems: Sequence[Problem]) -> list[Problem]:
        """The problems, each with the place where its value was written."""
        found = [replace(p, origin=p.origin or origin_of(p.key, self.origins)) for p in problems]
        return [replace(p, fix=_prepared_by(p) or p.fix + _not_beside(p)) for p in found]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The config of a file with `section.key=value` overrides. Raises ConfigError with everything that is wrong."""
    return read(path, overrides).config


def read(path: str | Path, overrides: Sequence[str] = (), named: Sequence[str] | None = None) -> Loaded:
    """Load like `load`, and remember where each value came from. `named` are the extensions that a person has named
    beside the overrides, if the file is that of a run's folder, which may come from anybody; None if the file is
    theirs."""
    if isinstance(overrides, str):
        expected, fix = "a list of texts", f"write overrides=[{overrides!r}]"
        raise ConfigError([Problem(key="overrides", found=overrides, expected=expected, fix=fix)])
    tree, origins = text.parse_file(Path(path))
    if (foreign := no_config(tree)) is not None:
        raise ConfigError([replace(foreign, found=str(path))])
    problems: list[Problem] = []
    if (meant := joined(overrides)) is not None:
        found, expected = " ".join(overrides), "an override without spaces, section.key=value"
        raise ConfigError([Problem(key="override", found=found, expected=expected, fix=fixed(meant))])
    refused = [override for override in overrides if _problems_of(override, tree, origins)]
    for override in refused:  # again: an answer may depend on an override behind it
        problems += _problems_of(override, tree, origins)
    if odd := [*text.unusable(tree, "", origins)]:
        raise ConfigError([*problems, *odd])
    known = _pin_extensions(tree, origins, named)
    return Loaded(validated(Config, tree, known, origins, problems), origins)


def read_record(path: Path) -> Config:
    """The config in the folder of a run, which may come from anybody: its extensions are not run, and whatever names
    they have added are taken. Raises ConfigError."""
    tree, origins = text.parse_file(path)
    try:
        return Config.from_record(tree)
    except ValidationError as error:
        raise ConfigError(problems_of(error, tree, origins)) from None


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


def _prepared_by(problem: Problem) -> str:
    """The fix that the config's own comments give for a corpus or a tokenizer that is not there yet; else empty."""
    file, _, line = problem.origin.rpartition(":")
    if not problem.key.startswith("data.") or not line.isdigit() or WORKING_DIRECTORY not in problem.expected:
        return ""
    said = PREPARE.finditer(Path(file).read_text(encoding="utf-8-sig", errors="replace"))
    wanted = Path(str(problem.found)).parent
    return next((f"run {found[1].strip()}" for found in said if Path(found[2]) == wanted), "")


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


def _problems_of(override: str, tree: dict[str, Any], origins: dict[str, str]) -> Sequence[Problem]:
    """Apply an override, or say what is wrong with it."""
    try:
        _apply(override, tree, origins)
    except ConfigError as error:
        return error.problems
    return ()


def _apply(override: str, tree: dict[str, Any], origins: dict[str, str]) -> None:
    key, equals, value = override.partition("=")
    section, _, inside = key.partition(".")
    known = known_keys()
    if (several := in_one_word(override, known)) is not None:
        expected, fix = "an override of one key", f"write {several}"
        raise ConfigError([Problem(key=override, found=override, expected=expected, fix=fix, origin=COMMAND_LINE)])
    if equals and not inside and section in Config.model_fields:
        raise ConfigError([_whole_section(section, value)])
    if not equals or not inside or not section or (not override.isascii() and key not in known and typed(key) in known):
        expected = "an override of the form section.key=value"
        fix = meant_by(override, known, sizes(tree))
        raise ConfigError([Problem(key=override, found=override, expected=expected, fix=fix, origin=COMMAND_LINE)])
    parsed = text.parse_value(key, value, COMMAND_LINE)
    if key not in known:
        raise ConfigError([unknown(key, parsed, COMMAND_LINE, tree)])
    *outer, leaf = key.split(".")
    place: Any = tree
    for depth, name in enumerate(outer, 1):
        if place.get(name) is None:  # not said, or a record that is off by default
            place[name] = {}
            if depth > 1:  # the other keys of a section are at their defaults
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
    inner = given if isinstance(given, dict) else {}
    keys = [found for key, one in inner.items() if (found := setting(f"{section}.{key}", one)) is not None]
    first = next(key for key in known_keys() if key.startswith(f"{section}."))
    usual = (None if isinstance(given, (dict, type(None))) else proposal(first, value)) or f"{first}=VALUE"
    expected, fix = "an override of one key, section.key=value", f"write {' '.join(keys) or usual}"
    return Problem(key=section, found=value, expected=expected, fix=fix, origin=COMMAND_LINE)
