"""Checks of values that travel to other machines: as an argument in a list, or as text that a remote shell reads.

values of the command line --argument | plain | variable--> job.py, deepspeed.py
"""

from __future__ import annotations

import re

from roots_dist.errors import EnvironmentProblem, Problem, UserError
from roots_dist.scrub import HIDDEN, SECRET_NAME

CONTROL = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Control characters, of which a newline ends a line of a script or hostfile, and bytes that are not UTF-8."""
PLAIN = re.compile(r"[A-Za-z0-9_./:=,@+^-]+")
"""Text that neither a shell changes nor pdsh, which replaces %h, %u and %n."""


def argument(key: str, value: str) -> str:
    """Return a value that can be an argument of a program and be quoted in a script, or raise UserError."""
    if CONTROL.search(value):
        raise refused(
            key, value, "one line of text without control characters", "write it into the config file, or rename it"
        )
    return value


def plain(key: str, value: str, reader: str) -> str:
    """Return a value that a remote shell may read without quotes, or raise UserError."""
    if not PLAIN.fullmatch(value) or value.startswith("-"):
        expected = f"only letters, digits and _ . / : = , @ + ^ -, since {reader} hands it to a shell on each host"
        raise refused(key, value, expected, "write it into the config file, rename it, or use another launcher")
    return value


def variable(text: str) -> tuple[str, str]:
    """Split the `NAME=VALUE` of --env. Raises UserError."""
    name, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise refused("--env", text, "NAME=VALUE, with a name of letters, digits and _", "write it in this form")
    if SECRET_NAME.search(name):
        expected = "a variable that is no secret: values of --env are seen in files and in lists of processes"
        raise refused(
            "--env",
            f"{name}={HIDDEN}",
            expected,
            f"export {name} where you start the job; on Kubernetes make it a secret",
        )
    return name, argument(f"--env {name}", value)


def no_option(path: str) -> str:
    """Write a path that begins with - so that no program takes it for an option."""
    return f"./{path}" if path.startswith("-") else path


def refused(key: str, found: object, expected: str, fix: str) -> UserError:
    return EnvironmentProblem(Problem(key=key, found=found, expected=expected, fix=fix))
