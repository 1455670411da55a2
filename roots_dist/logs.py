"""Logging of a run: plain lines from rank 0, warnings from every rank with its place, other packages quieted."""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, TypeVar, cast

from roots_dist.errors import UserError
from roots_dist.files import why

T = TypeVar("T")
log = logging.getLogger(__name__)

FIRST_S, EVERY_S = 5.0, 15.0
"""Seconds until the first line about work that takes long, and between the next ones."""

OUTPUT = "standard output"
NOBODY_READS = (errno.EPIPE, errno.EIO)
"""Errors of a pipe whose reader has ended, and of a terminal that has gone."""
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


def open_closed_streams() -> None:
    """Let what was closed before the start (`>&-`, some daemons) lead nowhere: the next file that is opened would get
    its number, and what is written to standard output go into it."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:
                os.dup2(fd, number)
                os.close(fd)
            os.set_inheritable(number, True)
            setattr(sys, name, open(number, mode, encoding="utf-8"))  # noqa: SIM115 # to the end of the process


class _Outlived:
    """A stream of text that takes what can no longer be written, and says so once."""

    def __init__(self, stream: TextIO, name: str):
        self.stream, self._name, self._is_told = stream, name, False

    def write(self, text: str) -> int:
        self._try(lambda: self.stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if not self._is_told:
                self._is_told = True  # first: the warning may be written to this stream
                log.warning("%s cannot be written (%s): the run goes on", self._name, why(error))

    def end(self) -> None:
        """Drop what is still not written: Python would fail with it when the process ends."""
        try:
            self.stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class _Unread(_Outlived):
    """A stream of text that nobody may read to its end: the rest is dropped in silence. What is not taken for another
    reason, such as a full disk, is lost output: UserError."""

    def _try(self, work: Callable[[], object]) -> None:
        try:
            work()
        except OSError as error:
            if error.errno not in NOBODY_READS and self._name == OUTPUT:
                expected, fix = f"a place that can be written ({why(error)})", "make room, or write to another place"
                raise UserError(f"{OUTPUT}: expected {expected}. Fix: {fix}.") from None


@contextmanager
def outliving_output() -> Iterator[None]:
    """Keep training in the body alive when its output cannot be written: the disk of a log is full, `head` or `tee` at
    the other end of a pipe has ended, a terminal has gone."""
    with _replaced(_Outlived):
        yield


@contextmanager
def outliving_readers() -> Iterator[None]:
    """Keep a command in the body alive when nobody reads its output any more, as in `roots verify | head -3`: its exit
    code says what it has found. Raises UserError if the output cannot be written for another reason."""
    with _replaced(_Unread):
        yield
        sys.stdout.flush()


@contextmanager
def _replaced(kind: type[_Outlived]) -> Iterator[None]:
    """Let the two outputs be of this kind in the body, also where they are of another one around it."""
    before = sys.stdout, sys.stderr
    plain = [stream.stream if isinstance(stream, _Outlived) else stream for stream in before]
    outlived = [kind(stream, name) for stream, name in zip(plain, (OUTPUT, "standard error"))]
    sys.stdout, sys.stderr = (cast(TextIO, stream) for stream in outlived)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in outlived:
            stream.end()


@contextmanager
def still_busy(what: str, say: Callable[[str], object] = log.info, first_s: float | None = None) -> Iterator[None]:
    """Say every now and then that the body is not done yet, if it takes longer than `first_s` (default: FIRST_S)."""
    over, since = threading.Event(), time.monotonic()

    def tell() -> None:
        wait = FIRST_S if first_s is None else first_s
        while not over.wait(wait):
            say(f"{what}: {time.monotonic() - since:.0f} s so far")
            wait = EVERY_S

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def counted(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """The same items; every now and then a line says how many have been taken."""
    next_at = time.monotonic() + FIRST_S
    for number, item in enumerate(items):
        if time.monotonic() >= next_at:
            log.info("%s: %d%s batches done", what, number, "" if total is None else f" of {total}")
            next_at = time.monotonic() + EVERY_S
        yield item
