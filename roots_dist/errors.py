"""Errors that a user can cause and fix: where, what was found, what was expected, what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a run: the field or input, its value, what would be right, and how to fix it."""

    key: str
    found: object
    expected: str
    fix: str
    origin: str = ""
    """Place where the value was set (`run.yaml:7`, `command line`). Empty for defaults and for values outside the
    config."""

    def __str__(self) -> str:
        origin = f" ({self.origin})" if self.origin else ""
        return f"{self.key} = {self.found!r}{origin}: expected {self.expected}. Fix: {self.fix}."


@dataclass(frozen=True, kw_only=True)
class FileProblem(Problem):
    """One thing wrong with a file, or with the line of it that `origin` names: `found` says what, in words."""

    def __str__(self) -> str:
        return f"{self.origin or self.key}: {self.found}; expected {self.expected}. Fix: {self.fix}."


class Short:
    """A value of any type, shown in one short line."""

    def __init__(self, value: object):
        self.value = value

    def __repr__(self) -> str:
        return " ".join(reprlib.repr(self.value).split())


def present(value: T | None) -> T:
    """A value that an earlier check has made sure of: if it is missing, that is our mistake and not the user's."""
    assert value is not None, "a value is missing that an earlier check makes sure of"
    return value


class UserError(Exception):
    """An error that the user can fix. The command line prints it without a traceback and exits with code 2."""

    def cli_message(self) -> str:
        """Format the error as the command line prints it."""
        return f"✗ {self}"


class ConfigError(UserError):
    """Every problem of a config, reported together."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))

    def cli_message(self) -> str:
        return "\n".join(f"✗ {p}" for p in self.problems)


class ArgumentError(ConfigError):
    """Every argument of a call in Python that is of another type than the function takes, or out of its range."""


class DataError(UserError):
    """A corpus, tokenizer or input file cannot be used."""


class CheckpointError(UserError):
    """A checkpoint cannot be read, or does not fit the model."""


class ExchangeError(UserError):
    """A Hugging Face model cannot be imported, or a model of ours cannot be exported."""


class EnvironmentProblem(UserError):
    """Launcher variables are missing or contradict each other, or an optional package is not installed."""


class NotFiniteError(UserError):
    """A loss, weight or gradient became inf or nan; the message names the rank and the parameter."""


def missing_package(package: str, extra: str) -> UserError:
    """Build the error for an optional package that is not installed."""
    return EnvironmentProblem(
        f"{package}: expected this package to be installed. Fix: pip install 'roots_dist[{extra}]'."
    )
