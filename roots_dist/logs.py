"""Logging of a run: plain lines from rank 0, warnings from all with their place, other packages turned down."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import TextIO

CHATTY = ("deepspeed", "DeepSpeed", "torch", "matplotlib", "wandb", "filelock", "urllib3")


class _Format(logging.Formatter):
    """`message` from rank 0, `[pp1 dp0 tp0] warning: message` from wherever something is the matter."""

    def __init__(self, place: str):
        super().__init__("%(message)s")
        self.prefix = f"[{place}] " if place else ""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{self.prefix}{record.levelname.lower()}: {text}"


class _Stderr(logging.StreamHandler[TextIO]):
    """To whatever sys.stderr is at the moment: while a live line is drawn, rich puts a stream there that prints above
    it."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)  # not StreamHandler's, which would keep a stream

    @property
    def stream(self) -> TextIO:  # type: ignore[override] # what nobody assigns may be read-only
        return sys.stderr


def setup(rank: int, place: str) -> None:
    """Called once by each process of a run. Information is said once, by rank 0."""
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
    """torch and DeepSpeed warn each other of names that will change: theirs to fix, and not for users."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch|deepspeed")
