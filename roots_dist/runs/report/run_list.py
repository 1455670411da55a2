"""A table of the runs below a folder: model, layout, how far, how well, how old, how large, and whether it is active.

FOLDER --find_runs--> folders of runs --run_record.py--> rows, cut to the terminal's width --> `roots ls`
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

from roots_dist.errors import UserError
from roots_dist.files import why
from roots_dist.runs.report.run_record import RunRecord, is_run, read_runs
from roots_dist.runs.track.progress import short
from roots_dist.storage.checkpoint.folder_lock import holder_of

DEEPEST = 3
"""Folders between the given one and a run, at most."""
COLUMNS = ("run", "model", "layout", "step", "train_loss", "val_loss", "age", "size", "state")
LEFT_OUT = ("size", "layout", "model", "age")
"""Columns that a narrow terminal goes without, the first one first."""
LEFT = ("run", "model", "layout", "state")
"""Columns of words, which are aligned left."""


def find_runs(folder: Path) -> list[Path]:
    """Folders of runs in this folder, the newest first; the folder itself if it is one."""
    found = [folder] if is_run(folder) else list(_below(folder, DEEPEST))
    return sorted(found, key=_changed, reverse=True)


def _below(folder: Path, depth: int) -> Iterator[Path]:
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        with suppress(OSError):  # of another user, or gone since
            if is_run(inner):
                yield inner
            elif depth > 1:
                yield from _below(inner, depth - 1)


@dataclass(frozen=True)
class RunList:
    lines: Sequence[str]
    """A line for each run below a head."""
    unreadable: Sequence[str]
    """Reasons why the run's files could not be read, one line each. Such a run has its row all the same."""


def list_runs(folders: Sequence[Path], known: Collection[str], width: int) -> RunList:
    """List the runs. Words are cut to `width` columns only where nothing is left to leave out."""
    rows: list[tuple[str, ...]] = [COLUMNS]
    unreadable: list[str] = []
    for folder in folders:
        try:
            rows.append(_row(folder, read_runs([folder], known)[0]))
        except UserError as error:
            unreadable.append(error.cli_message())
            rows.append(_unreadable(folder))
        except OSError as error:  # of another user, or gone since
            unreadable.append(f"✗ {error.filename}: {why(error)}")
            rows.append(_unreadable(folder))
    return RunList(_table(rows, width), unreadable)


def _unreadable(folder: Path) -> tuple[str, ...]:
    known = age(time.time() - _changed(folder)), f"{short(_size(folder))}B"
    return (str(folder), "?", "–", "–", "–", "–", *known, "unreadable")


def _table(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    shown = list(COLUMNS)
    for name in (None, *LEFT_OUT):
        shown = [column for column in shown if column != name]
        widths = {c: max(len(row[COLUMNS.index(c)]) for row in rows) for c in shown}
        if sum(widths.values()) + 2 * (len(shown) - 1) <= width:
            break
    else:
        widths["run"] = max(8, widths["run"] + width - sum(widths.values()) - 2 * (len(shown) - 1))
    return ["  ".join(_cell(row[COLUMNS.index(c)], c, widths[c]) for c in shown).rstrip() for row in rows]


def _cell(text: str, column: str, width: int) -> str:
    text = text if len(text) <= width else f"…{text[1 - width :]}"
    return text.ljust(width) if column in LEFT else text.rjust(width)


def _row(folder: Path, run: RunRecord) -> tuple[str, ...]:
    steps = "" if run.steps is None else f"/{run.steps}"
    return (
        str(folder),
        f"{run.config.get('model.family', '?')} {'' if run.parameters is None else short(run.parameters)}".strip(),
        str(run.layout or "–"),
        f"{run.step}{steps}",
        _loss(run, "loss/train"),
        _loss(run, "loss/validation"),
        age(time.time() - _changed(folder)),
        f"{short(_size(folder))}B",
        _state(folder, run),
    )


def _loss(run: RunRecord, metric: str) -> str:
    """The last value of a loss, with its step where that is not the run's last one: `7.273@0`."""
    value, step = run.last(metric), run.last_step_of(metric)
    return "–" if value is None else f"{value:.3f}" + ("" if step == run.step else f"@{step}")


def _state(folder: Path, run: RunRecord) -> str:
    """Active while a process holds the lock of the folder, on this machine or on one that shares its locks."""
    _, is_held = holder_of(folder)
    if is_held:
        return "running"
    if is_held is None:
        return run.state
    if "imported_from" in run.origin and not run.records:
        return "imported"
    return "interrupted" if run.state.startswith("running") else run.state


def age(seconds: float) -> str:
    """`12 s`, `3 min`, `5 h`, `9 d`"""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(0, int(seconds))} s"


def _changed(folder: Path) -> float:
    """Time of the last write to a run's folder."""
    try:
        return max((found.st_mtime for found in _stats(folder.iterdir())), default=folder.stat().st_mtime)
    except OSError:  # of another user
        return folder.stat().st_mtime


def _size(folder: Path) -> int:
    """Bytes of a folder's files; links are not followed."""
    return sum(found.st_size for found in _stats(folder.rglob("*")) if S_ISREG(found.st_mode))


def _stats(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    """Yield the status of each file that is still there: an active run removes checkpoints."""
    for path in paths:
        with suppress(OSError):
            yield path.lstat()
