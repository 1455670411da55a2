"""Report of our own launcher about failed ranks: the cause first, in a box; other failures in a line each; consequences
only counted.

    records of the ranks + exit codes --summarize--> text, exit code
"""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from roots_dist.failures import FAILURE, USER_ERROR, Record, box

STOPS = (signal.SIGTERM, signal.SIGINT)
"""Signals that a launcher sends to the ranks that are left."""


HINTS: Mapping[int, str] = MappingProxyType(
    {
        signal.SIGKILL: ": often the machine ran out of memory; try a smaller train.micro_batch",
        signal.SIGBUS: ": a file that it reads through the memory was cut short or cannot be read any more (see to the "
        "corpus and its disk), or /dev/shm is full",
    }
)
"""Signal -> what it often means."""


@dataclass(frozen=True)
class FailureSummary:
    text: str
    code: int


def read_records(folder: Path) -> list[Record]:
    """Read the records that ranks wrote, in order of time."""
    found = [Record(**json.loads(path.read_text(encoding="utf-8"))) for path in folder.glob("rank_*.json")]
    return sorted(found, key=lambda record: record.time)


def summarize(
    records: Sequence[Record], exits: Mapping[int, int], size: int, killed: Mapping[int, str] = MappingProxyType({})
) -> FailureSummary:
    """Summarize a failed run. `exits` maps the ranks that did not end well to their exit codes (negative: killed by
    that signal); `killed` are those that the launcher killed, and why: no cause of anything."""
    for record in records:
        if record.is_whole:
            return FailureSummary(record.message, FAILURE)
    own = [record for record in records if not record.consequence]
    written = {record.rank for record in records}
    gone = {rank: code for rank, code in sorted(exits.items()) if rank not in written and code}
    stopped = {*(-s for s in STOPS), *(128 + s for s in STOPS)}  # a rank of a run that has failed ends itself so
    silent = {rank: code for rank, code in gone.items() if code not in stopped and rank not in killed}
    if (
        not own and not silent
    ):  # no rank failed by itself: show the earliest record, or the ranks that were stopped from outside
        own, silent = list(records[:1]), {} if records else gone
    lines: list[str] = []
    shown: set[str] = set()
    involved: set[int] = set()
    for record in own:
        involved.add(record.rank)
        if record.message in shown:
            continue
        shown.add(record.message)
        if record.by_user:
            everywhere = sum(other.message == record.message for other in own) == size
            lines.append(record.message if everywhere else f"{record.message}\n    on {record.name}")
        elif len(shown) == 1:
            lines.append(box(record, "failed first" if size > 1 else "failed"))
        else:
            lines.append(f"{record.name} failed too: {record.message.splitlines()[0]}" + _see(record))
    for rank, code in silent.items():
        involved.add(rank)
        lines.append(f"✗ rank {rank} {_ending(code)}")
    deaf = [rank for rank in killed if rank not in involved]
    lines += [f"rank {rank} {killed[rank]}, and was killed." for rank in deaf]
    rest = [rank for rank in range(size) if rank not in involved and rank not in deaf]
    if rest:
        lines.append(f"{_ranks(rest)} stopped because of it.")
    return FailureSummary(
        "\n".join(lines), USER_ERROR if own and all(r.by_user for r in own) and not silent else FAILURE
    )


def _see(record: Record) -> str:
    return f" (full traceback: {record.file})" if record.file else ""


def _ending(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code} without an error message"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}{HINTS.get(-code, '')}"


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(str(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {shown}" if len(ranks) == 1 else f"ranks {shown}"
