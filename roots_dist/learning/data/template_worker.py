"""The process in which chat templates are compiled and rendered: a template is code, and may loop for ever or ask for
all memory (a constant of two gigabytes is computed when it is compiled, and a power of three nines without a pause in
which another thread could stop it).

    a line of JSON on standard input --compile or render, within limits--> a line of JSON on standard output

templates.py starts it, and says what became of it.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, ExtensionAttribute
from jinja2.sandbox import ImmutableSandboxedEnvironment

from roots_dist.learning.data.templates import BEGIN, CPU_S, END

if TYPE_CHECKING:
    from jinja2.nodes import Node
    from jinja2.parser import Parser

MEMORY = 1 << 30
"""Bytes of address space of this process."""
LONGEST = 1 << 25
"""Characters of one text."""


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, which mark answers, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 # declared in Extension

    def parse(self, parser: Parser) -> Node | list[Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("marked"), [], [], body).set_lineno(line)

    def marked(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(words: str) -> None:
    raise TemplateError(words)


def _environment() -> ImmutableSandboxedEnvironment:
    """The environment in which transformers renders templates."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    return made


@lru_cache(maxsize=16)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


def answer(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Render the template `source` with `variables`; without them, compile it and say whether it marks answers."""
    compiled = _compiled(asked["source"])
    if "variables" not in asked:
        marks = any(True for _ in _environment().parse(asked["source"]).find_all(ExtensionAttribute))
        return {"marks_answers": marks}
    variables = dict(asked["variables"])
    if asked["now"] is not None:
        now = datetime.fromisoformat(asked["now"])
        variables["strftime_now"] = lambda form: now.strftime(form)
    text = compiled.render(variables)
    if len(text) > LONGEST:
        return {"limit": f"it writes {len(text):,} characters, and {LONGEST:,} are the most"}
    return {"text": text}


def _limit(what: int, most: int) -> None:
    with suppress(ValueError, OSError):  # a system that has no such limit, or a lower one
        resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


def main(seconds: int = CPU_S) -> None:
    """Answer questions until there are no more. Ctrl-C is for whoever asks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for what, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0)):
        _limit(what, most)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        _limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + seconds)  # then SIGXCPU ends this process
        try:
            told = answer(json.loads(line))
        except MemoryError:
            told = {"limit": f"it asks for more than {MEMORY >> 30} GiB of memory"}
        except RecursionError:
            told = {"error": "it calls itself too often", "is_template_error": False}
        except Exception as error:  # a template is code and may raise anything
            told = {"error": str(error), "is_template_error": isinstance(error, TemplateError)}
        sys.stdout.write(json.dumps(told) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
