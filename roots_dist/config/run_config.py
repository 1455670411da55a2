"""The config of a run that exists, for the commands that read its checkpoint: one process reads it, whatever layout
wrote it.

run's config.yaml + overrides --config_of_run--> Config for one process, unless overrides ask for a layout
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from roots_dist.config.extensions import check_same
from roots_dist.config.load import COMMAND_LINE, CONFIG_FILE, Loaded, read
from roots_dist.config.text import parse_file
from roots_dist.errors import CheckpointError
from roots_dist.files import where
from roots_dist.schedule.schedules import DEFAULT

ONE_PROCESS: Mapping[str, object] = {
    "parallel.tp": 1,
    "parallel.cp": 1,
    "parallel.cp_kind": "gather",
    "parallel.ep": 1,
    "parallel.pp": 1,
    "parallel.virtual_stages": 1,
    "parallel.schedule": DEFAULT,
    "parallel.sequence_parallel": False,
    "parallel.zero_stage": 0,
    "parallel.zero_ranks": None,
    "advanced.engine": "reference",
    "train.exact": None,
}
SHOWN = 3
"""Number of runs that the answer to a wrong folder names."""


def config_of_run(
    run: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, object] | None = None
) -> Loaded:
    """Load the config of a run. Each value comes from the overrides, else from `defaults`, else from ONE_PROCESS, else
    from the run's own file. The folder may have been moved."""
    path = Path(run) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{run} is not the folder of a run: {_lack(path)}. Fix: {_run_meant(Path(run))}.")
    loaded = read(path, overrides, named=())
    section = parse_file(path)[0].get("advanced")
    check_same((section or {}).get("extensions") or (), loaded.config.advanced.extensions)
    values = {**ONE_PROCESS, **(defaults or {}), "track.folder": str(run)}
    wanted = {key: value for key, value in values.items() if loaded.origins.get(key) != COMMAND_LINE}
    return replace(loaded, config=loaded.config.changed(wanted))


def _lack(path: Path) -> str:
    return "it holds no config.yaml" if path.parent.exists() else f"there is no {where(path.parent)}"


def _run_meant(run: Path) -> str:
    """The folder of the run that a config was named for, or that has a similar name."""
    if run.is_file() and run.suffix in (".yaml", ".yml"):
        track = parse_file(run)[0].get("track") or {}
        folder = run.parent if run.name == CONFIG_FILE else track.get("folder", "its track.folder")
        return f"name the folder that its run is in, {folder}"
    if (around := next(filter(has_origin, run.parents), None)) is not None:
        return f"name the run that it is in, {around}"
    runs = _runs_in(run) or _runs_in(Path("runs")) or _runs_in(Path())
    names = [found.name for found in runs]
    close = difflib.get_close_matches(run.name, names, n=1, cutoff=0.75)
    if close:
        return f"did you mean {runs[names.index(close[0])]}"
    if not runs:
        return "name the track.folder of a run; roots ls FOLDER lists those below a folder"
    more = f" or another of {len(runs)} (roots ls {runs[0].parent})" if len(runs) > SHOWN else ""
    return f"name a run, as {', '.join(map(str, runs[:SHOWN]))}{more}"


def has_origin(folder: Path) -> bool:
    """True for a folder into which a run or an import has written: a config may lie anywhere."""
    return (folder / CONFIG_FILE).is_file() and (folder / "origin.json").is_file()


def _runs_in(folder: Path) -> list[Path]:
    """Folders of runs in this one, the newest first."""
    try:
        found = [file for file in folder.glob(f"*/{CONFIG_FILE}") if file.is_file()]
        return [file.parent for file in sorted(found, key=lambda file: -file.stat().st_mtime)]
    except OSError:  # of another user, or gone since
        return []
