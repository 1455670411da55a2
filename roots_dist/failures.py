"""What a rank does when it fails: say who failed first and why, write down the rest, and take the job down at once.

rank raises --guarded--> errors/rank_00002.txt in the run's folder
                     --> a record for our own launcher, which prints all of them in order (runs/ranks/failure_report.py)
                     --> under another launcher: a box, one line, or nothing, so that the cause stands out
                     --> exit, without waiting for peers that may hang
"""

from __future__ import annotations

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
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from roots_dist.errors import UserError
from roots_dist.files import write_atomically

USER_ERROR, FAILURE = 2, 1
"""Exit codes: something the user can mend; anything else."""
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
"""What gloo, NCCL and the store say on a rank whose peer has gone or is stuck: seldom the cause."""
RECENT_S = 60.0
TAIL = 12
"""Lines of a traceback that are shown; the file has all of them."""


@dataclass(frozen=True)
class RankIdentity:
    """The rank that is guarded, as far as it knows itself by now."""

    rank: int
    size: int
    place: str = ""
    folder: Path | None = None
    """The run's folder; None: not known yet."""
    records: Path | None = None
    """Where our own launcher looks; None: another launcher, or none."""


@dataclass(frozen=True)
class Record:
    """One rank's failure."""

    rank: int
    place: str
    host: str
    time: float
    by_user: bool
    """Something the user can mend: shown without a traceback."""
    consequence: bool
    """Another rank's failure, as seen from here."""
    message: str
    trace: str
    file: str | None

    @property
    def name(self) -> str:
        where = f"{self.place}, node {self.host}" if self.place else f"node {self.host}"
        return f"rank {self.rank} ({where})"


@contextmanager
def guarded(who: RankIdentity) -> Iterator[None]:
    """Whatever goes wrong inside is reported, and ends the process if it is one of several."""
    try:
        yield
    except (SystemExit, GeneratorExit):
        raise
    except KeyboardInterrupt:
        _leave(130, who)
    except BaseException as error:
        record = describe(error, who)
        if who.records is not None:
            write_if_possible(who.records / f"rank_{who.rank:05d}.json", json.dumps(asdict(record)))
        else:
            _say(record, who)
        _leave(USER_ERROR if record.by_user else FAILURE, who)


def describe(error: BaseException, who: RankIdentity) -> Record:
    """The failure as a record; its full traceback is written to the run's folder, if that is known."""
    inside = error.__traceback__.tb_next if error.__traceback__ else None  # without guarded() itself
    trace = "".join(traceback.format_exception(type(error), error, inside))
    by_user = isinstance(error, UserError)
    message = error.complaint() if isinstance(error, UserError) else traceback.format_exception_only(error)[-1].strip()
    file = None
    if who.folder is not None:
        path = who.folder / "errors" / f"rank_{who.rank:05d}.txt"
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
    """Whether it is another rank's failure, as seen from here."""
    if isinstance(error, UserError):
        return False
    trace = "".join(traceback.format_exception(error))
    return any(words in trace for words in CONSEQUENCES)


def box(record: Record, word: str = "failed") -> str:
    """The failure that caused the others, so that nobody scrolls past it."""
    lines = record.trace.rstrip().splitlines()
    shown = ([f"... {len(lines) - TAIL} lines above"] if len(lines) > TAIL else []) + lines[-TAIL:]
    rows = [record.message.splitlines()[0], "", *shown]
    if record.file is not None:
        rows += ["", f"full traceback: {record.file}"]
    return "\n".join([f"╭─ {record.name} {word}", *(f"│ {row}".rstrip() for row in rows), "╰─"])


def _say(record: Record, who: RankIdentity) -> None:
    """Under a launcher that is not ours, every rank has one stderr, and they cannot agree on who speaks first."""
    if record.by_user:
        if _first_to_say(record.message, who):
            print(record.message, file=sys.stderr)
    elif record.consequence:
        print(f"{record.name} stopped because another rank failed: {record.message.splitlines()[0]}", file=sys.stderr)
    else:
        print(box(record), file=sys.stderr)


def _first_to_say(message: str, who: RankIdentity) -> bool:
    """Whether no other rank that the same launcher started on this machine has just said the same."""
    if who.size == 1:
        return True
    same = hashlib.blake2b(f"{os.getppid()} {message}".encode(), digest_size=8).hexdigest()
    path = Path(tempfile.gettempdir()) / f"roots-said-{same}"
    try:
        with path.open("x"):
            return True
    except FileExistsError:
        return time.time() - path.stat().st_mtime > RECENT_S  # left over from a launcher with the same number
    except OSError:
        return True


def write_if_possible(path: Path, text: str) -> bool:
    """Write a report whole, or return False: a full disk must not hide the error itself."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text.encode("utf-8", "replace"))
    except OSError:
        return False
    return True


def _leave(code: int, who: RankIdentity) -> None:
    """Ordinary shutdown would wait for communication threads, and they for a peer that is gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    if who.records is not None and os.getpgrp() == os.getpid():  # our launcher gave this rank a group of its own:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # processes that the rank started go with it
        os.killpg(0, signal.SIGTERM)
    if who.size > 1:
        os._exit(code)
    raise SystemExit(code)
