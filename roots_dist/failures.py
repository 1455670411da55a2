"""Failure handling of a rank: report what failed first, write the traceback to a file, and end the job at once.

rank raises --guarded--> errors/rank_00002.txt in the run's folder
                     --> a record for our launcher, which prints them in order (runs/ranks/failure_report.py)
                     --> under another launcher: a box, one line, or nothing, so that the cause stands out
                     --> exit, without waiting for peers that may hang
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from roots_dist.errors import UserError
from roots_dist.files import open_plain, write_atomically

ERRORS = "errors"
"""Folder in a run's folder for tracebacks and stacks. It is not followed if it is a link."""
USER_ERROR, FAILURE = 2, 1
"""Exit codes: an error that the user can fix, and any other error."""
CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "failed to recv, got 0 bytes",
    "recv timeout",
    "Timed out waiting",
    "NCCL communicator was aborted",
    "ncclRemoteError",
)
"""Messages of gloo, NCCL and the store on a rank whose peer has exited or hangs; these are rarely the cause."""
SAID = "roots-said-"
"""Beginning of the names of files in which ranks count those that have the same to say."""
RECENT_S = 60.0
"""Seconds during which an identical message from another rank counts as a repetition."""
TRACEBACK_LINES = 12
"""Number of traceback lines shown; the file has all of them."""


@dataclass(frozen=True)
class RankIdentity:
    """The rank that is guarded, with as much as it knows about itself so far."""

    rank: int
    size: int
    place: str = ""
    folder: Path | None = None
    """The run's folder, or None if it is not known yet."""
    local_size: int = 0
    """Number of the launcher's ranks on this machine; 0 if it is not known."""
    records: Path | None = None
    """Folder in which our own launcher looks for records; None under another launcher, or without one."""


@dataclass(frozen=True)
class Record:
    """The failure of one rank."""

    rank: int
    place: str
    host: str
    time: float
    by_user: bool
    """True if the user can fix the error; it is then shown without a traceback."""
    consequence: bool
    """True if this failure was caused by the failure of another rank."""
    message: str
    trace: str
    file: str | None
    is_whole: bool = False
    """True if the message says what happened to all ranks; it is then shown as it is."""

    @property
    def name(self) -> str:
        where = f"{self.place}, node {self.host}" if self.place else f"node {self.host}"
        return f"rank {self.rank} ({where})"


@contextmanager
def guarded(who: RankIdentity) -> Iterator[None]:
    """Report any error raised inside, and end the process if it is one of several."""
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except KeyboardInterrupt:
        _exit(130, who)
    except BaseException as error:
        record = describe(error, who)
        if who.records is not None:
            write_if_possible(who.records / f"rank_{who.rank:05d}.json", json.dumps(asdict(record)))
        else:
            _print_failure(record, who)
        _exit(USER_ERROR if record.by_user else FAILURE, who)


def describe(error: BaseException, who: RankIdentity) -> Record:
    """Turn an error into a record, and write its full traceback to the run's folder if that is known."""
    inside = error.__traceback__.tb_next if error.__traceback__ else None  # without guarded() itself
    trace = "".join(traceback.format_exception(type(error), error, inside))
    by_user = isinstance(error, UserError)
    message = (
        error.cli_message() if isinstance(error, UserError) else traceback.format_exception_only(error)[-1].strip()
    )
    file = None
    if who.folder is not None:
        path = who.folder / ERRORS / f"rank_{who.rank:05d}.txt"
        file = str(path) if write_if_possible(path, trace) else None
    return Record(
        rank=who.rank,
        place=who.place,
        host=socket.gethostname(),
        time=time.time(),
        by_user=by_user,
        consequence=is_consequence(error),
        message=message,
        trace=trace,
        file=file,
    )


def is_consequence(error: BaseException) -> bool:
    """True if an error was caused by the failure of another rank."""
    if isinstance(error, UserError):
        return False
    trace = "".join(traceback.format_exception(error))
    return any(words in trace for words in CONSEQUENCES)


def box(record: Record, word: str = "failed") -> str:
    """Frame the failure that caused the others, so that it is not overlooked."""
    lines = record.trace.rstrip().splitlines()
    shown = ([f"... {len(lines) - TRACEBACK_LINES} lines above"] if len(lines) > TRACEBACK_LINES else []) + lines[
        -TRACEBACK_LINES:
    ]
    rows = [record.message.splitlines()[0], "", *shown]
    if record.file is not None:
        rows += ["", f"full traceback: {record.file}"]
    return "\n".join([f"╭─ {record.name} {word}", *(f"│ {row}".rstrip() for row in rows), "╰─"])


def report(who: RankIdentity, text: str, consequence: bool = False) -> None:
    """Report what another thread than the main one has found to have happened to all ranks; a rank for which another
    one speaks is only counted (`consequence`)."""
    if who.records is None:
        if not consequence:
            print(text, file=sys.stderr, flush=True)
        return
    host, now = socket.gethostname(), time.time()
    record = Record(who.rank, who.place, host, now, False, consequence, text, "", None, is_whole=not consequence)
    write_if_possible(who.records / f"rank_{who.rank:05d}.json", json.dumps(asdict(record)))


def _print_failure(record: Record, who: RankIdentity) -> None:
    """Print a failure under a launcher that is not ours, where all ranks share stderr and cannot agree on an order."""
    if record.by_user:
        if _is_first_to_print(record.message, who):
            print(record.message, file=sys.stderr)
    elif record.consequence:
        print(f"{record.name} stopped because another rank failed: {record.message.splitlines()[0]}", file=sys.stderr)
    else:
        print(box(record), file=sys.stderr)


def _is_first_to_print(message: str, who: RankIdentity) -> bool:
    """True unless another rank of the same launcher on this machine has printed this message recently. Ranks are
    counted in a file, which the last of them removes; what ranks leave that were ended before, later ones remove."""
    if who.size == 1:
        return True
    same = hashlib.blake2b(f"{os.getppid()} {message}".encode(), digest_size=8).hexdigest()
    folder = Path(tempfile.gettempdir())
    path = folder / f"{SAID}{same}"
    try:
        _remove_old(folder)
        with os.fdopen(open_plain(path, os.O_RDWR | os.O_CREAT | os.O_APPEND), "wb", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            said = os.fstat(file.fileno()).st_size
            file.write(b".")
            if said + 1 == who.local_size:
                path.unlink(missing_ok=True)
    except OSError:
        return True
    return said == 0


def _remove_old(folder: Path) -> None:
    """Remove this user's files of ranks that have been ended before they were all counted."""
    for name in os.listdir(folder):
        if name.startswith(SAID):
            with suppress(OSError):
                found = (folder / name).lstat()
                if found.st_uid == os.getuid() and abs(time.time() - found.st_mtime) > RECENT_S:
                    (folder / name).unlink()


def write_if_possible(path: Path, text: str) -> bool:
    """Write a report whole, or return False: a full disk must not hide the error itself."""
    try:
        if any(parent.name == ERRORS and parent.is_symlink() for parent in path.parents):
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode("utf-8", "replace"))
    except OSError:
        return False
    return True


def end_at_once(code: int) -> None:
    """End this process from any thread, and what it has started."""
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            child.terminate()
    os._exit(code)


def _exit(code: int, who: RankIdentity) -> None:
    """Exit at once: an ordinary shutdown would wait for communication threads, and those for a peer that has exited."""
    sys.stdout.flush()
    sys.stderr.flush()
    if who.records is not None and os.getpgrp() == os.getpid():  # our launcher gave this rank a group of its own:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # processes that the rank started go with it
        os.killpg(0, signal.SIGTERM)
    if who.size > 1:
        os._exit(code)
    raise SystemExit(code)
