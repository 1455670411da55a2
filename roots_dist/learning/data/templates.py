"""Compile and render chat templates in a process of their own, which has limits of time and memory.

Template(source).render(variables) --template_worker.py, one for this process--> text, or TemplateFailed
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from roots_dist.errors import UserError, missing_package

PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from roots_dist.learning.data.template_worker import main; main()"
)
ROOT = Path(__file__).parents[3]
CPU_S = 10
"""Seconds of computing for one question. Not of waiting: a busy machine makes no template slow."""
BEGIN, END = "\ufdd0", "\ufdd1"
"""Stand around a marked answer while a template is rendered. Unicode reserves them for such uses: no text has them."""


class TemplateFailed(ValueError):
    """A template is none, or refuses what it is given."""


class TemplateLimitError(UserError):
    """A template goes beyond its limits. No row is skipped for it: the next would be like it."""


class TemplateWorker:
    """A process that answers one question after another. One that has ended is replaced with the next question."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """The answer. Raises TemplateFailed with the template's own words, or TemplateLimitError with the limit."""
        line = json.dumps(question, default=str) + "\n"
        with self._lock:
            process = self._process = self._process or _start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                told = process.stdout.readline()
            except BrokenPipeError:
                told = ""
            if not told:
                self._process = None
                raise TemplateLimitError(_end_of(process))
        found: dict[str, Any] = json.loads(told)
        if "limit" in found:
            raise TemplateLimitError(found["limit"])
        if "error" in found:
            raise TemplateFailed(found["error"])
        return found


def _start() -> subprocess.Popen[str]:
    if find_spec("jinja2") is None:
        raise missing_package("jinja2", "finetune")
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, json.dumps([*sys.path, str(ROOT)])],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="ascii",
    )


def _end_of(process: subprocess.Popen[str]) -> str:
    """The reason why a process has ended in the middle of a question, as a clause. Kills it if it runs."""
    process.kill()
    code = process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(OSError):  # what was not read any more
                pipe.close()
    if code == -signal.SIGXCPU:
        return f"it computes for more than {CPU_S} s"
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"it ends the process that renders it ({how})"


@cache
def _worker_of(process: int) -> TemplateWorker:
    """The worker of this process: one that was forked has pipes of its own."""
    return TemplateWorker()


class Template:
    """A chat template. The constructor and every method may raise TemplateFailed and TemplateLimitError."""

    def __init__(self, source: str):
        self.source = source
        self.marks_answers: bool = self._ask({})["marks_answers"]
        """True if it has {% generation %}."""

    def render(self, variables: Mapping[str, Any], now: datetime | None) -> str:
        """The text, with marks around answers (template_worker.py). `now`: what strftime_now of the template writes."""
        asked = {"variables": dict(variables), "now": None if now is None else now.isoformat()}
        text: str = self._ask(asked)["text"]
        return text

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        return _worker_of(os.getpid()).ask({"source": self.source, **question})
