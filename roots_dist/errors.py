"""What a user can cause, said so that it can be mended: where, what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing wrong with a run: the field or input, its value, what would be right, what to do about it."""

    key: str
    found: object
    expected: str
    fix: str
    origin: str = ""
    """Where the value was written (`run.yaml:7`, `command line`); empty: a default, or no value of a config."""

    def __str__(self) -> str:
        origin = f" ({self.origin})" if self.origin else ""
        return f"{self.key} = {self.found!r}{origin}: expected {self.expected}. Fix: {self.fix}."


def present(value: T | None) -> T:
    """A value that an earlier check has made sure of: if it is missing, that is our mistake and not the user's."""
    assert value is not None, "a value is missing that an earlier check makes sure of"
    return value


class UserError(Exception):
    """Something a user can mend. The command line prints it without a traceback and exits with 2."""

    def complaint(self) -> str:
        """As the command line prints it."""
        return f"✗ {self}"


class ConfigError(UserError):
    """Everything that is wrong with a config, all at once."""

    def __init__(self, problems: Sequence[Problem]):
        self.problems = tuple(problems)
        super().__init__("this run cannot start:\n" + "\n".join(f"  - {p}" for p in self.problems))

    def complaint(self) -> str:
        return "\n".join(f"✗ {p}" for p in self.problems)


class DataError(UserError):
    """A corpus, tokenizer or input file that cannot be used."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or does not fit the model."""


class ExchangeError(UserError):
    """A model of another library that cannot be read, or one of ours that no other library can."""


class EnvironmentProblem(UserError):
    """Launcher variables that are missing or contradict each other, or an optional package that is not installed."""


class NotFiniteError(UserError):
    """A loss, weight or gradient became inf or nan; says on which rank and parameter."""


def needs(package: str, extra: str) -> UserError:
    """The error for an optional package that is not installed."""
    return EnvironmentProblem(f"this needs the package {package}: pip install 'roots_dist[{extra}]'")
