"""Check that no option of the command line is given for another launcher than the chosen one.

one instance of each options class --choose(on)--> the launcher's own --> job.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from roots_dist.runs.launch.options import OPTIONS, JobOptions
from roots_dist.runs.launch.quoting import refused

MAY_BE_EMPTY = ("include", "exclude")
"""Options whose value may be empty: as in DeepSpeed, an empty choice is none."""


def choose(on: str, given: Sequence[JobOptions]) -> JobOptions:
    """Return the options of launcher `on`.

    Raises UserError if there is no such launcher, if an option of another one was given, or if a value is empty, as an
    unset variable of a shell is.
    """
    chosen = next((options for options in given if options.launcher == on), None)
    if chosen is None:
        names = ", ".join(options.launcher for options in given)
        raise refused("--on", on, f"one of {names}", "choose one of them")
    own = {field.name for field in fields(chosen)}
    for options in given:
        for field in fields(options):
            key, value = f"--{field.name.replace('_', '-')}", getattr(options, field.name)
            if value == field.default:
                continue
            found = str(value) if isinstance(value, Path) else value
            if field.name not in own:
                users = launchers_with(field.name)
                expected = f"{_alternatives(users)}: {key} is not used with --on {on}"
                raise refused(key, found, expected, f"remove {key}, or choose {_alternatives(users)}")
            if field.name not in MAY_BE_EMPTY and (value == "" or (isinstance(value, tuple) and "" in value)):
                raise refused(key, "", "a value that is not empty", f"remove {key}, or give it a value")
    if chosen.gpus_per_node is not None and chosen.processes_per_node is not None:
        expected = "only one of --gpus-per-node and --processes-per-node: each says how many processes a node gets"
        raise refused("--gpus-per-node", chosen.gpus_per_node, expected, "remove one of the two")
    return chosen


def launchers_with(option: str) -> list[str]:
    """Launchers whose class has this option."""
    return [of.launcher for of in OPTIONS if any(field.name == option for field in fields(of))]


def _alternatives(launchers: Sequence[str]) -> str:
    *most, last = (f"--on {name}" for name in launchers)
    return f"{', '.join(most)} or {last}" if most else last
