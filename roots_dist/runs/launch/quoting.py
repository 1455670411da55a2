"""What may travel to other machines, and how far it is safe: an argument of a list, or text that a remote shell will read.

values of the command line --argument | plain | variable--> launchers.py
"""

from __future__ import annotations

import re

from roots_dist.errors import EnvironmentProblem, Problem, UserError
from roots_dist.scrub import HIDDEN, SECRET_NAME

CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Newlines end a line of a script or host list; the last are bytes that are no UTF-8."""
PLAIN = re.compile(r"[A-Za-z0-9_./:=,@+^-]+")
"""What no shell changes, and pdsh neither, which replaces %h, %u and %n."""


def argument(key: str, value: str) -> str:
    """One that can be an argument of a program, and be quoted in a script. Raises UserError."""
    if CONTROL.search(value):
        raise refused(
            key, value, "text in one line, without control characters", "write it into the config file, or rename it"
        )
    return value


def plain(key: str, value: str, reader: str) -> str:
    """One that a remote shell may read without quotes. Raises UserError."""
    if not PLAIN.fullmatch(value) or value.startswith("-"):
        expected = f"letters, digits and _ . / : = , @ + ^ - alone, since {reader} hands it to a shell on each host"
        raise refused(key, value, expected, "write it into the config file, rename it, or use another launcher")
    return value


def variable(text: str) -> tuple[str, str]:
    """`NAME=VALUE` of --env."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise refused("--env", text, "NAME=VALUE, the name of letters, digits and _", "write it so")
    if SECRET_NAME.search(name):
        expected = "no secret: it would stand in files and in lists of processes"
        raise refused(
            "--env",
            f"{name}={HIDDEN}",
            expected,
            f"export {name} where you start the job; on Kubernetes make it a secret",
        )
    return name, argument(f"--env {name}", value)


def no_option(path: str) -> str:
    """A path that begins with - as no program takes for an option."""
    return f"./{path}" if path.startswith("-") else path


def refused(key: str, found: object, expected: str, fix: str) -> UserError:
    return EnvironmentProblem(Problem(key=key, found=found, expected=expected, fix=fix))
