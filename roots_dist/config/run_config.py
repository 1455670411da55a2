"""The config of a run that exists, for the commands that read its checkpoint: one process reads it, whatever layout
wrote it.

run's config.yaml + overrides --of_run--> Config for one process, unless overrides ask for a layout
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from roots_dist.config.extensions import check_same
from roots_dist.config.load import COMMAND_LINE, CONFIG_FILE, Loaded, read
from roots_dist.config.text import parse_file
from roots_dist.errors import CheckpointError
from roots_dist.schedule.schedules import DEFAULT

ONE_PROCESS: Mapping[str, object] = {
    "parallel.tp": 1,
    "parallel.pp": 1,
    "parallel.virtual_stages": 1,
    "parallel.schedule": DEFAULT,
    "parallel.sequence_parallel": False,
    "parallel.zero_stage": 0,
    "advanced.engine": "reference",
}


def config_of_run(
    run: str | Path, overrides: Sequence[str] = (), defaults: Mapping[str, object] | None = None
) -> Loaded:
    """What overrides say, else `defaults`, else ONE_PROCESS, else the run's own config. Its folder may have been
    moved."""
    path = Path(run) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{run} is not the folder of a run: it holds no config.yaml. Fix: name a track.folder.")
    loaded = read(path, overrides, named=())
    section = parse_file(path)[0].get("advanced")
    check_same((section or {}).get("extensions") or (), loaded.config.advanced.extensions)
    values = {**ONE_PROCESS, **(defaults or {}), "track.folder": str(run)}
    wanted = {key: value for key, value in values.items() if loaded.origins.get(key) != COMMAND_LINE}
    return replace(loaded, config=loaded.config.changed(wanted))
