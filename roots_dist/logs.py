"""Logging of a run: plain lines from rank 0, warnings from every rank with its place, other packages quieted."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

CHATTY = ("deepspeed", "DeepSpeed", "torch", "matplotlib", "wandb", "filelock", "urllib3")


class _Format(logging.Formatter):
    """`message` for information, `[pp1 dp0 tp0] warning: message` for warnings and errors."""

    def __init__(self, place: str):
        super().__init__("%(message)s")
        self.prefix = f"[{place}] " if place else ""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{self.prefix}{record.levelname.lower()}: {text}"


class _Stderr(logging.StreamHandler[TextIO]):
    """Write to the current sys.stderr: while a progress line is drawn, rich replaces it to print above the line."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # not StreamHandler's, which would keep a stream

    @property
    def stream(self) -> TextIO:  # type: ignore[override] # what nobody assigns may be read-only
        return sys.stderr


def setup(rank: int, place: str) -> None:
    """Configure logging; called once by each process of a run. Only rank 0 logs information."""
    handler = _Stderr()
    handler.setFormatter(_Format(place))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("roots_dist").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.captureWarnings(False)


def ignore_warnings_of_libraries() -> None:
    """Silence the FutureWarnings of torch and DeepSpeed, which users cannot fix."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
