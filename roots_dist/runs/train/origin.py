"""The origin of a run: its resolved config, versions, machine and git commit, written into its folder.

runs/train/loop.py --write_origin, on rank 0--> RUN/config.yaml, RUN/origin.json
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path

from roots_dist import environment
from roots_dist.config.extensions import COPIES, copy_name, read_file, split
from roots_dist.config.load import CONFIG_FILE, to_yaml
from roots_dist.config.schema import Config
from roots_dist.files import read_plain, write_atomically
from roots_dist.layout import Layout
from roots_dist.runs.track.machine_facts import machine_facts
from roots_dist.scrub import known_secrets, scrub


def without_secrets(config: Config) -> Config:
    """The config without secrets in the run's name, project, group and tags. Paths stay, because files are read from
    them."""
    track = {
        "name": config.track.name,
        "project": config.track.project,
        "group": config.track.group,
        "tags": config.track.tags,
    }
    return config.changed({f"track.{key}": value for key, value in scrub(track, known_secrets()).items()})


def write_origin(folder: Path, config: Config, layout: Layout, bound: Mapping[str, object]) -> dict[str, object]:
    """Write what is needed to repeat the run: config.yaml (resolved), copies of its extensions, origin.json (versions,
    machine, git commit, and the lower bounds of accounting/bounds.py). Rank 0 calls it; returns the content of
    origin.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / CONFIG_FILE, to_yaml(config)
    )  # a full disk must not cost the config that the checkpoints need
    for entry in config.advanced.extensions:
        copy = folder / COPIES / copy_name(entry)
        copy.parent.mkdir(exist_ok=True)
        write_atomically(copy, read_file(split(entry)[0]))
    facts = scrub({**machine_facts(), "layout": str(layout), "git_commit": git_commit(), **bound}, known_secrets())
    facts = _of_import(folder / "origin.json") | facts
    write_atomically(folder / "origin.json", json.dumps(facts, indent=1) + "\n")
    return facts


def _of_import(path: Path) -> dict[str, object]:
    """Facts that an import has written about itself, if the run trains in its folder: an export asks for its class."""
    try:
        found = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: found[key] for key in ("imported_from", "generator", "architecture") if key in found}


def git_commit() -> str | None:
    """Commit of the checkout that this code runs from, with a + if it has changes; else the commit that the container
    image was built from; else None."""
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return environment.image_commit()
