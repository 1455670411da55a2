"""Fill in files of templates/, or a site's own: scripts, whose settings are replaced, and manifests, which have gaps.

    templates/slurm.sh --script(settings, arguments)--> the same script with another settings block, quoted for bash
    templates/kubernetes.yaml --manifest(values)--> each ${name} replaced by its value, quoted for YAML

launch/ holds the same files for people who submit them without our tool; tests/launch/test_launch_scripts.py compares.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from roots_dist.files import why
from roots_dist.runs.launch.quoting import refused

TEMPLATES = Path(__file__).with_name("templates")
SETTINGS = re.compile(r"^# Settings\b.*?^# End of settings$", re.MULTILINE | re.DOTALL)
GAP = re.compile(r"\$\{(?P<name>\w+)\}")
LIST_OR_GAP = re.compile(rf"(?P<line>^(?P<indent>[ \t]*)- \$\{{(?P<list>\w+)\}}[ \t]*\n)|{GAP.pattern}", re.MULTILINE)


Setting = str | int | Sequence[str]


def script(
    name: str,
    site_template: Path | None,
    settings: Mapping[str, Setting],
    *,
    arguments: Sequence[str],
    directory: Path,
    variables: Mapping[str, str],
    comment: str,
) -> str:
    """Return the script `name`, or the site's own, with its settings block filled in; arrays are for tuples.

    Raises UserError if it cannot be read or has no settings block.
    """
    path, text = _read(name, site_template)
    if len(SETTINGS.findall(text)) != 1:
        expected = "a script with one settings block, from '# Settings' to '# End of settings'"
        raise refused("--template", str(path), expected, f"begin with a copy of {TEMPLATES / name}")
    block = [
        f"# Settings, filled in by roots launch{comment}",
        f"cd -- {bash(directory)} || exit 1",
        *(f"export {key}={bash(value)}" for key, value in variables.items()),
        *(f"{key}={bash(value)}" for key, value in settings.items()),
        f"set -- {' '.join(map(bash, arguments))}",
        "# End of settings",
    ]
    return SETTINGS.sub(lambda _: "\n".join(block), text)


def manifest(name: str, site_template: Path | None, values: Mapping[str, object]) -> str:
    """Return the manifest `name`, or the site's own, with its gaps filled in.

    A line `- ${list}` becomes a line for each item, `${anything}` elsewhere becomes a value on one line.
    Raises UserError if it cannot be read, or has a gap for which there is no value.
    """
    path, text = _read(name, site_template)
    if unknown := sorted({*GAP.findall(text)} - values.keys()):
        expected = f"gaps with names from {', '.join(values)}"
        raise refused("--template", f"{path}: ${{{unknown[0]}}}", expected, f"begin with a copy of {TEMPLATES / name}")

    def filled(found: re.Match[str]) -> str:
        if found["line"] and isinstance(value := values[found["list"]], (list, tuple)):
            return "".join(f"{found['indent']}- {as_yaml(item)}\n" for item in value)
        return GAP.sub(lambda gap: as_yaml(values[gap["name"]]), found[0])

    return LIST_OR_GAP.sub(filled, text)


def bash(value: str | int | Path | Sequence[str]) -> str:
    """Quote a word of bash, or an array of words for a sequence."""
    if isinstance(value, (list, tuple)):
        return f"({' '.join(map(bash, value))})"
    return shlex.quote(str(value))


def as_yaml(value: object) -> str:
    """Quote a value on one line of YAML, so that it is read as this text, number, list or mapping; keys are names."""
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {as_yaml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (bool, int)):
        return str(value).lower()
    return yaml.safe_dump(str(value), default_style='"', width=float("inf"), allow_unicode=False).rstrip("\n")


def _read(name: str, site_template: Path | None) -> tuple[Path, str]:
    path = site_template or TEMPLATES / name
    try:
        return path, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refused("--template", str(path), f"a file that can be read ({why(error)})", "name another file") from None
