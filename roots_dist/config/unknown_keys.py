"""Answers about keys that do not exist: the one that is meant, by its spelling or by its name elsewhere.

    train.learning_rate=1e-4 --fix_of--> "it is called optim.lr here"

Called by load.py with the tree as far as it is read, since some answers are numbers that depend on it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel

from roots_dist.config import text
from roots_dist.config.foreign import Known, advice_for, share_of
from roots_dist.config.other_names import DATA_RANKS, NO_DATA_RANKS, key_for
from roots_dist.config.overrides import typed
from roots_dist.config.proposals import as_written, described, instead, proposal, refusal_of
from roots_dist.config.renamed import NO_EQUAL, RENAMED
from roots_dist.config.sections import ConfigTree, Source
from roots_dist.errors import ConfigError, Problem

STRANGE = 3
"""Keys of which nothing is known that make a file another one than a config."""


def known_keys() -> list[str]:
    """Every dotted key of the tree, sections included."""
    return list(_all_keys())


@cache
def _all_keys() -> tuple[str, ...]:
    return tuple(_keys(ConfigTree))


def keys_named(name: str) -> list[str]:
    """The keys of all sections that have this name."""
    return [key for key in known_keys() if "." in key and key.rpartition(".")[2] == name]


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
    renamed = next((new for old, new in RENAMED.items() if old.rpartition(".")[2] == leaf), None)
    if renamed in known:
        return renamed
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    if close:
        return close[0]
    leaves = {key.rpartition(".")[2]: key for key in reversed(known)}  # the first section that has it
    return next((leaves[found] for found in difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.7)), None)


def fixed(override: str) -> str:
    """Say what to write for an override whose key may not exist."""
    key, _, value = override.partition("=")
    return instead(key, value) if key in known_keys() else f"write {override}"


def in_one_word(override: str, known: Sequence[str]) -> str | None:
    """The overrides that were joined with commas, as `tp=2,pp=2`, apart; None if it is one."""
    parts = [part.partition("=") for part in re.split(r",\s*(?=[\w.]+=)", override)]
    keys = [nearest(name, known) if "=" in equals else None for name, equals, _ in parts]
    if len(parts) == 1 or None in keys:
        return None
    return " ".join(f"{key}={value}" for key, (_, _, value) in zip(keys, parts))


def meant_by(override: str, known: Sequence[str], sizes: Known) -> str:
    """Say what to write for an override without a section, with a colon, dashes or full-width characters."""
    key, value = re.split(r"[=:]|$", typed(override).lstrip("-—"), maxsplit=1)
    key, value = key.strip(), value.strip()
    if not key:
        return f"write optim.lr={value or 'VALUE'}"
    if key in DATA_RANKS:
        return NO_DATA_RANKS
    found = _parsed(key, value)
    if (advice := advice_for(key, found, sizes) or share_of(key_for(key) or "", found, sizes)) is not None:
        return advice
    meant = nearest(key, known)
    if meant is None and override.startswith(("—", "–")):
        return f"write --{override[1:]} with plain dashes"
    if meant is None and key.isidentifier() and value:
        return "remove it: no key has this name; --print-config lists all keys"
    if meant is None:
        return "write a key of the config, as optim.lr=1e-3"
    return instead(meant, value) if value else f"write {meant}=VALUE"


def _parsed(key: str, value: str) -> object:
    """The value of an override; itself if it is no YAML."""
    try:
        return text.parse_value(key, value, "")
    except ConfigError:
        return value


def fix_of(key: str, found: object, known: Known) -> str:
    """Say what to do about a key that does not exist."""
    parent = key.rpartition(".")[0]
    if parent.rpartition(".")[2].isdigit():  # the lists of the tree hold sources
        near = nearest(key, [f"{parent}.{name}" for name in Source.model_fields])
        return f"did you mean {near}" if near else "remove it; --print-config lists all keys"
    if (known_fix := _by_name(key, found, known)) is not None:
        return known_fix
    near = nearest(key, known_keys())
    if near and isinstance(found, dict) and refusal_of(near, {}) is not None:
        near = None  # a section for a key that takes none
    return f"did you mean {near}" if near else "remove it; --print-config lists all keys"


def no_config(tree: Mapping[str, Any]) -> Problem | None:
    """The problem of a file that is something else: most of its keys are neither sections nor known under another name.
    None if it may be a config."""
    others = [str(key) for key in tree if key not in ConfigTree.model_fields]
    if len(others) < STRANGE or 2 * len(others) < len(tree):
        return None
    strange = [key for key in others if key_for(key) is None and nearest(key, known_keys()) is None]
    if len(strange) < STRANGE:
        return None
    expected = (
        f"a config, whose keys are {', '.join(ConfigTree.model_fields)}, and not {', '.join(strange[:STRANGE])} …"
    )
    is_model = "model_type" in tree or "architectures" in tree
    fix = (
        "import this model: roots import ITS_FOLDER runs/NAME"
        if is_model
        else "name a YAML file, such as those in configs/"
    )
    return Problem(key="CONFIG", found="", expected=expected, fix=fix)


def _by_name(key: str, found: object, known: Known) -> str | None:
    """The fix for a key whose name stands in a table; None if it does not."""
    leaf = key.rpartition(".")[2]
    if leaf in DATA_RANKS:
        return NO_DATA_RANKS
    if key in RENAMED:
        return f"it is called {RENAMED[key]} now"
    if leaf in NO_EQUAL:
        return NO_EQUAL[leaf]
    if ":" in leaf and found is None:
        return f"write a space after the colon: {leaf.replace(':', ': ', 1)}"
    if (advice := advice_for(key, found, known)) is not None:
        return advice
    if (ours := key_for(key)) is not None:
        return share_of(ours, found, known) or _called(ours, found)
    return _inside(key, found, known) if isinstance(found, dict) and key not in ConfigTree.model_fields else None


def _called(ours: str, found: object) -> str:
    """The fix for another system's name of a key: ours, and what its value is here."""
    if found is None or refusal_of(ours, found) is None:
        return f"it is called {ours} here"
    meant = proposal(ours, as_written(found))
    return f"write {meant}: that is how it is called here" if meant else f"it is called {ours} here{described(ours)}"


def _inside(key: str, found: dict[str, Any], known: Known) -> str | None:
    """The fixes for the keys of a section that does not exist here; None if none of them is known."""
    leaves = {key.rpartition(".")[2]: key for key in reversed(known_keys())}
    fixes = {
        name: _by_name(f"{key}.{name}", value, known) or (f"did you mean {leaves[name]}" if name in leaves else None)
        for name, value in found.items()
    }
    unknown = [name for name, fix in fixes.items() if fix is None]
    answers = [f"{name}: {fix}" for name, fix in fixes.items() if fix is not None]
    return "; ".join([*answers, *([f"remove {', '.join(unknown)}"] if unknown else [])]) if answers else None


def setting(key: str, value: object) -> str | None:
    """A key, or the one that is meant, with the value that it takes for this one or a place for it; None if no key is
    meant."""
    meant = key if key in known_keys() else nearest(key, known_keys())
    if meant is None or meant in ConfigTree.model_fields:
        return None
    return proposal(meant, as_written(value)) or f"{meant}=VALUE"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        yield f"{prefix}{name}"
        for kind in _models(info.annotation):
            yield from _keys(kind, f"{prefix}{name}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The section that an annotation names, through Optional; lists of sections have no dotted keys."""
    options = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [option for option in options if isinstance(option, type) and issubclass(option, BaseModel)]
