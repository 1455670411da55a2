"""Extensions of a user: objectives, families, activations, schedules, optimizer rules, readers of files.

    advanced.extensions: [mine.py] --pinned--> mine.py#sha256=… --extended--> Extension, a value that the config carries

A file is code that is run, with the rights of whoever named it. It is run once per process, from the bytes of its
digest; the tables of the package do not change. Called when a config is read, so that names are checked as others are.
"""

from __future__ import annotations

import hashlib
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator

from roots_dist.config.activations import ACTIVATIONS
from roots_dist.config.families import FAMILIES, FamilyRecord
from roots_dist.config.lr_schedules import LR_SCHEDULES, LrSchedule
from roots_dist.config.objectives import OBJECTIVES, ObjectiveRecord
from roots_dist.config.optimizers import OPTIMIZERS, NewOptimizer
from roots_dist.errors import ConfigError, Problem
from roots_dist.files import read_plain, why
from roots_dist.schedule.schedules import SCHEDULES, Schedule

KEY = "advanced.extensions"
NAME = "EXTENSION"
"""Name that the file gives to its Extension."""
PIN = "#sha256="
MOST_BYTES = 1 << 24
"""The largest file of an extension. It is copied into the folder of each run."""
COPIES = "extensions"
"""Folder of a run with the files that it was trained with."""


@dataclass(frozen=True, kw_only=True)
class NewObjective:
    """An objective of one's own."""

    record: ObjectiveRecord
    make: Callable[..., Any]
    """A class as roots_dist.world.batch.Objective describes it, made from (config, specials)."""


@dataclass(frozen=True, kw_only=True)
class NewFamily:
    """A model family of one's own."""

    record: FamilyRecord
    pieces: Callable[..., Any]
    """(config, tp) -> the model's pieces in order, as in roots_dist/learning/models."""
    objectives: tuple[str, ...]
    """Names of the objectives that it can learn, beside those whose records name it."""


OwnReader = Callable[[Path], Iterable[Mapping[str, Any]]]
"""Function from the path of a file to its rows: column name -> value."""


@dataclass(frozen=True, kw_only=True)
class Extension:
    """Records of one's own, each under the name that a config says."""

    objectives: Mapping[str, NewObjective] = field(default_factory=dict)
    families: Mapping[str, NewFamily] = field(default_factory=dict)
    activations: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """Functions of a tensor, elementwise: the MLP applies them to the columns that a rank has."""
    schedules: Mapping[str, Schedule] = field(default_factory=dict)
    lr_schedules: Mapping[str, LrSchedule] = field(default_factory=dict)
    optimizers: Mapping[str, NewOptimizer] = field(default_factory=dict)
    readers: Mapping[str, OwnReader] = field(default_factory=dict)
    """Suffix of a file, as `.xml` -> its rows: those of fine-tuning, and the documents of `roots prepare`."""


class AnyName:
    """Accepts any name in a config, because its extensions are not to be run."""


NOTHING = Extension()
TAKEN: dict[str, tuple[Collection[str], type]] = {
    "objectives": (OBJECTIVES, NewObjective),
    "families": (FAMILIES, NewFamily),
    "activations": (ACTIVATIONS, types.FunctionType),
    "schedules": (SCHEDULES, Schedule),
    "lr_schedules": (LR_SCHEDULES, LrSchedule),
    "optimizers": (OPTIMIZERS, NewOptimizer),
    "readers": ((), types.FunctionType),  # learning/data/own_readers.py knows which suffixes are taken
}
"""Field of an Extension -> the package's own names, and what a record of it is."""


def or_extended(table: str) -> WrapValidator:
    """Let a key have a name of this table of the config's extensions too."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        known = info.context
        is_added = isinstance(known, AnyName) or value in (getattr(known, table) if known else ())
        return value if isinstance(value, str) and is_added else handler(value)

    return WrapValidator(check)


def pinned(entries: object, named: Sequence[str] | None = None) -> list[str]:
    """Write the digest behind each file. `named` are the extensions that a person has named, where the entries stand in
    the folder of a run, which may come from anybody; None: a person has named them. Raises ConfigError."""
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, str) for entry in entries):
        if entries is None:
            return []
        _refuse(entries, "a list of Python files", f"write {KEY}=[mine.py]")
    if named is None:
        return [f"{path}{PIN}{_digest(path, pin)}" for path, pin in map(split, entries)]
    trusted = {pin: path for path, pin in map(split, named)}
    for entry in entries:
        path, pin = split(entry)
        if pin not in trusted:
            expected = "it on the command line too: a run's folder may come from anybody, and this is code that is run"
            fix = f"read it, then add '{KEY}=[{path}]'; the run's folder has a copy under {COPIES}/"
            _refuse(path, expected, fix)
    return [f"{trusted[pin]}{PIN}{pin}" for _, pin in map(split, entries)]


def check_same(recorded: Sequence[str], named: Sequence[str]) -> None:
    """Raise ConfigError if a run was trained with other bytes than those of the files that a person has named."""
    missing = {split(entry)[1] for entry in recorded} - {split(entry)[1] for entry in named}
    if missing:
        copies = ", ".join(f"{COPIES}/{copy_name(entry)}" for entry in recorded if split(entry)[1] in missing)
        expected = f"the bytes that the run was trained with; its folder has a copy, {copies}"
        _refuse([split(entry)[0] for entry in named], expected, "name that copy")


def split(entry: str) -> tuple[str, str]:
    """Path and digest of an entry; the digest is empty if nobody has written it."""
    path, _, pin = entry.partition(PIN)
    return path, pin


def digest_of(entry: str) -> str:
    return split(entry)[1]


def copy_name(entry: str) -> str:
    """Name of a file's copy in the folder of a run."""
    path, pin = split(entry)
    return f"{pin[:12]}_{Path(path).name}"


@lru_cache
def extended(entries: tuple[str, ...]) -> Extension:
    """The records of all files together. Raises ConfigError for a file that cannot be used."""
    if not entries:
        return NOTHING
    found = [_run(*split(entry)) for entry in entries]
    together: dict[str, dict[str, Any]] = {kind: {} for kind in TAKEN}
    for entry, extension in zip(entries, found):
        for kind, (ours, what) in TAKEN.items():
            for name, record in getattr(extension, kind).items():
                _check(split(entry)[0], kind, name, record, what, {*ours, *together[kind]})
                together[kind][name] = record
    return Extension(**together)


def _check(path: str, kind: str, name: object, record: object, what: type, taken: set[str]) -> None:
    if name in taken:
        _refuse(path, f"a new name in {NAME}.{kind}; {name!r} is taken", "choose another name")
    is_one = callable(record) if what is types.FunctionType else isinstance(record, what)
    if not isinstance(name, str) or not is_one:
        _refuse(path, f"{what.__name__} for {NAME}.{kind}[{name!r}], found {type(record).__name__}", "make it one")
    inner = getattr(record, "record", None)
    if inner is not None and inner.name != name:
        _refuse(path, f"one name for {NAME}.{kind}[{name!r}]; its record says {inner.name!r}", "write the same name")


def _digest(path: str, pin: str) -> str:
    found = hashlib.sha256(read_file(path)).hexdigest()
    if pin and pin != found:
        _refuse(path, f"the file with sha256 {pin[:12]}…; it has changed since", "restore it, or write its path alone")
    return found


def read_file(path: str) -> bytes:
    """Bytes of an extension. Raises ConfigError if it cannot be read."""
    try:
        if Path(path).stat().st_size > MOST_BYTES:
            _refuse(path, f"a Python file of at most {MOST_BYTES:,} bytes", "check the path")
        return read_plain(Path(path))
    except OSError as error:
        _refuse(path, f"a Python file that can be read ({why(error)})", "check the path")


@lru_cache
def _run(path: str, pin: str) -> Extension:
    """Run a file as a module of its own, and take what it calls EXTENSION."""
    source = read_file(path)
    digest = hashlib.sha256(source).hexdigest()
    if pin and digest != pin:
        _refuse(path, f"the file with sha256 {pin[:12]}…; it has changed since", "start again")
    module = types.ModuleType(f"roots_extension_{digest[:12]}")
    module.__file__ = path
    sys.modules[module.__name__] = module  # dataclasses look their module up
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except Exception as error:  # whatever a user's code raises is told with its line
        line = next((f":{f.tb_lineno}" for f in _frames(error) if f.tb_frame.f_code.co_filename == path), "")
        line = line or (f":{error.lineno}" if isinstance(error, SyntaxError) else "")
        _refuse(f"{path}{line}", f"a file that runs; it raised {type(error).__name__}: {error}", "correct it")
    found = getattr(module, NAME, None)
    if not isinstance(found, Extension):
        _refuse(path, f"a line {NAME} = Extension(…) in it", "see docs/extensions.md")
    return found


def _frames(error: BaseException) -> list[types.TracebackType]:
    """Places that the error came through, the innermost first."""
    frames: list[types.TracebackType] = []
    at = error.__traceback__
    while at is not None:
        frames.insert(0, at)
        at = at.tb_next
    return frames


def _refuse(found: object, expected: str, fix: str) -> NoReturn:
    raise ConfigError([Problem(key=KEY, found=found, expected=expected, fix=fix)])
