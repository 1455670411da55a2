"""Check the types of what a Python program gives, so that a mistake is told in a line where it is made.

    @checked() on a function --> prompt = ['a', 'b']: expected text. Fix: give one, or use answers() for several.

The parameters' annotations say what is taken. Values (a range, a model that lacks something) are the functions' own.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NamedTuple, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from roots_dist.config.other_names import key_for
from roots_dist.config.proposals import as_written
from roots_dist.config.schema import Config
from roots_dist.config.unknown_keys import keys_named, known_keys, nearest
from roots_dist.errors import ArgumentError, Problem, Short
from roots_dist.world.batch import MicroBatch

P = ParamSpec("P")
R = TypeVar("R")


class Accepted(NamedTuple):
    """Values that a parameter takes."""

    expected: str
    fits: Callable[[object], bool]


def _is_whole(value: object) -> bool:
    """True for whole numbers, those of numpy and torch included."""
    try:
        operator.index(value)  # type: ignore[arg-type] # what is none raises TypeError
    except TypeError:
        return False
    return not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _are(kind: type | Callable[[object], bool]) -> Callable[[object], bool]:
    """The test of a list, all of whose items are of a kind. Text is no list: its characters are never meant."""

    def fits(value: object) -> bool:
        if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
            return False
        return all(isinstance(item, kind) if isinstance(kind, type) else kind(item) for item in value)

    return fits


def _is(kind: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, kind)


KINDS: dict[object, Accepted] = {
    str: Accepted("text", _is(str)),
    bool: Accepted("True or False", _is(bool)),
    int: Accepted("a whole number", _is_whole),
    float: Accepted("a finite number", _is_number),
    Path: Accepted("a path", _is(Path)),
    Config: Accepted("a Config", _is(Config)),
    Sequence[str]: Accepted("a list of texts", _are(str)),
    tuple[str, ...]: Accepted("a list of texts", _are(str)),
    Sequence[int]: Accepted("a list of whole numbers", _are(_is_whole)),
    list[MicroBatch]: Accepted("a list of MicroBatch", _are(MicroBatch)),
    Callable: Accepted("a function", callable),
}
"""Annotation of a parameter, or a part of a union -> what it takes."""


def kind_of(hint: object) -> Accepted:
    """The values that a parameter of this annotation takes."""
    parts = [part for part in _parts(hint) if part is not NoneType]
    kinds = [KINDS[Callable if get_origin(part) is Callable else part] for part in parts]
    takes_none = NoneType in _parts(hint)
    expected = " or ".join(kind.expected for kind in kinds)
    return Accepted(expected, lambda value: (takes_none and value is None) or any(kind.fits(value) for kind in kinds))


def _parts(hint: object) -> Iterator[object]:
    for part in get_args(hint) if get_origin(hint) in (Union, UnionType) else ():
        yield from _parts(part)
    if get_origin(hint) not in (Union, UnionType):
        yield hint


def checked(**fixes: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a function raise ArgumentError for arguments of other types than its annotations say. `fixes`: parameter ->
    what to do, where that is more than to give what is expected."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.cache
        def kinds() -> dict[str, Accepted]:
            hints = get_type_hints(function)
            named = [p.name for p in signature.parameters.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD]
            return {name: kind_of(hints[name]) for name in named}

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = _bound(function.__name__, signature, args, kwargs)
            refuse_others({name: (kind, given[name]) for name, kind in kinds().items() if name in given}, fixes)
            return function(*args, **kwargs)

        return call

    return decorate


def _bound(call: str, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call under the names of its parameters. Raises ArgumentError for names that none has, for too
    many, and for what is missing."""
    parameters = {p.name: p for p in signature.parameters.values() if p.name != "self" and p.kind is not p.VAR_KEYWORD}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    unknown = {} if open_ended else {name: value for name, value in kwargs.items() if name not in parameters}
    if unknown:
        raise ArgumentError([_unknown(call, name, value, [*parameters]) for name, value in unknown.items()])
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        plain = [p.replace(annotation=p.empty) for p in parameters.values()]
        shown = inspect.Signature(plain)
        number = len(args) + len(kwargs) - ("self" in signature.parameters)
        expected = f"{call}{shown}; {error}"
        problem = Problem(key=f"arguments of {call}", found=number, expected=expected, fix="call it so")
        raise ArgumentError([problem]) from error


def _unknown(call: str, name: str, value: object, known: Sequence[str]) -> Problem:
    """An argument that a function does not take: another spelling of one, or a key of the config."""
    keys = keys_named(name)
    near = nearest(name, known) or next((one for one in known if one == (key_for(name) or "").rpartition(".")[2]), None)
    with_section = name.replace("_", ".", 1)
    key = with_section if with_section in known_keys() else keys[0] if len(keys) == 1 else key_for(name)
    if near is None and "overrides" in known and key:
        fix = f"write overrides=['{key}={value}']"
    else:
        fix = f"write {near}={call_name(value) if callable(value) else Short(value)}" if near else "leave it out"
    return Problem(key=f"{call}: {name}", found=Short(value), expected=f"one of {', '.join(known)}", fix=fix)


def takes_one(call: Callable[..., object]) -> bool:
    """True if a function can be called with one argument, or does not say what it takes."""
    try:
        inspect.signature(call).bind(None)
    except TypeError:
        return False
    except ValueError:  # of some that are built in
        return True
    return True


def call_name(call: Callable[..., object]) -> str:
    """The name of a function, as a program writes it."""
    name = getattr(call, "__name__", type(call).__name__)
    return name if name.isidentifier() else "call"


def refuse_others(given: Mapping[str, tuple[Accepted, object]], fixes: Mapping[str, str] | None = None) -> None:
    """Raise ArgumentError for values that are not of their kind."""
    problems = [
        _problem(name, value, kind, fixes or {}) for name, (kind, value) in given.items() if not kind.fits(value)
    ]
    if problems:
        raise ArgumentError(problems)


def _problem(name: str, value: object, kind: Accepted, fixes: Mapping[str, str]) -> Problem:
    fix = fixes.get(name, f"give {kind.expected}")
    if isinstance(value, str) and "a list of texts" in kind.expected:
        fix = f"write {name}=[{Short(value)}]"
    if name == "overrides" and (pairs := _pairs(value)):
        fix = f"write overrides={[f'{key}={as_written(given)}' for key, given in pairs]}"
    return Problem(key=name, found=Short(value), expected=kind.expected, fix=fix)


def _pairs(value: object) -> list[tuple[str, object]]:
    """Keys and their values of a mapping, or of a list of pairs; none of something else."""
    items = list(value.items()) if isinstance(value, Mapping) else value
    if not isinstance(items, list) or not all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in items):
        return []
    return [(str(key), given) for key, given in items]


def refuse(name: str, value: Any, expected: str, fix: str) -> ArgumentError:
    """The error for an argument of the right type whose value cannot be."""
    return ArgumentError([Problem(key=name, found=Short(value), expected=expected, fix=fix)])
