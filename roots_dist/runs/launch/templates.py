"""Scripts and manifests are files with gaps (launch/forms/, or a site's own): what fills a gap is quoted there, by name.

{{ value | sh }}   one word of bash         {{ words | sh }}   several, for a list
{{ value | yaml }} one scalar of YAML       {{ words | yaml }} a list of them
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import yaml

from roots_dist.errors import needs
from roots_dist.runs.launch.quoting import refused

FORMS = Path(__file__).with_name("forms")


def render(name: str, instead: Path | None, values: Mapping[str, object]) -> str:
    """The text of a form. instead: a site's own. Raises UserError if that cannot be read, or asks for what is not there."""
    try:
        import jinja2
    except ImportError:
        raise needs("jinja2", "launch") from None
    path = instead or FORMS / name
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refused("--template", str(path), f"a file that can be read ({error})", "name another file") from None
    room = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        comment_start_string="{{#", comment_end_string="#}}",  # bash has {# of its own: ${#list[@]}
    )  # fmt: skip
    room.filters.update(sh=sh, yaml=as_yaml)
    try:
        return room.from_string(text).render(**values)
    except Exception as error:  # a form is a small program, which may go wrong in any way
        line = f" in line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise refused(
            "--template", str(path), f"a template that works out ({error}{line})", f"begin from {FORMS / name}"
        ) from None


def sh(value: object) -> str:
    """A word of bash, or words of it, exactly as they are."""
    return " ".join(map(sh, value)) if _is_list(value) else shlex.quote(str(value))


def as_yaml(value: object) -> str:
    """A scalar of YAML that is read as this text or number, or a list of them."""
    if _is_list(value):
        return "[" + ", ".join(map(as_yaml, value)) + "]"
    if isinstance(value, (bool, int)):
        return str(value).lower()
    return yaml.safe_dump(str(value), default_style='"', width=float("inf"), allow_unicode=False).rstrip("\n")


def _is_list(value: object) -> TypeGuard[Sequence[object]]:
    return isinstance(value, Sequence) and not isinstance(value, str)
