"""`roots doctor` as a process: under a launcher it is one rank of the world that it finds, bare it starts the ranks.

    verb.py --> start --meet.py--> store --examine.py--> answers --write_up--> Profile --> table, JSON, exit code

Exit codes: 0 nothing serious, 1 findings, 2 the ranks could not even meet, or the command line asks for nonsense.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from roots_dist import environment, logs
from roots_dist.checks.checks import layout_for
from roots_dist.cluster_profile import Profile, write
from roots_dist.cluster_profile import read as read_profile
from roots_dist.config.load import Loaded, read
from roots_dist.config.schema import Config
from roots_dist.environment import World
from roots_dist.errors import ConfigError, Problem, UserError
from roots_dist.failures import RankIdentity, guarded
from roots_dist.files import why
from roots_dist.layout import Layout
from roots_dist.runs.ranks import local
from roots_dist.runs.ranks.die_with_parent import die_with_parent

RANKS = 2
"""Of a bare doctor without a config and without GPUs: the fewest that have a link."""


@dataclass(frozen=True)
class Command:
    """The command line."""

    config: str | None
    overrides: tuple[str, ...]
    folder: Path | None
    quick: bool
    json: Path | None
    wait_s: float
    words: tuple[str, ...]
    """All of it, to start other ranks with."""


def start(command: Command, processes: int | None = None) -> int:
    """Exit code of `roots doctor`, or of this rank of it."""
    world = environment.discover()
    if world is not None:
        if processes is not None and world.failures is None:  # our own launcher starts ranks with all of its words
            raise UserError(
                f"--processes {processes}: {world.launcher} has started this process. Fix: leave --processes out."
            )
        return _be_rank(world, command)
    loaded = _loaded(command)
    size = _processes(loaded, processes)
    layout = _layout(loaded, size)
    if size == 1:
        return _be_rank(environment.alone(), command)
    with tempfile.TemporaryDirectory(prefix="roots-doctor-") as folder:
        written = command.json or Path(folder) / "profile.json"
        written.unlink(missing_ok=True)  # of an earlier examination
        words = (*command.words, *(() if command.json else ("--json", str(written))))
        threads = loaded.config.advanced.threads if loaded else None
        code = local.launch(size, ["-m", "roots_dist", *words], threads, what=str(layout or "roots doctor"))
        return code or int(not read_profile(written).healthy)


def _be_rank(world: World, command: Command) -> int:
    """One rank's life. Ends the process at once where a thread is still stuck in what it could not finish."""
    faulthandler.enable()
    if world.size > 1:
        die_with_parent(world.launcher_pid)
    with guarded(RankIdentity(world.rank, world.size, records=Path(world.failures) if world.failures else None)):
        loaded = _loaded(command)
        layout = _layout(loaded, world.size)
        logs.setup(world.rank, f"rank {world.rank}" if world.size > 1 else "")
        code, clean = _visit(world, command, loaded.config if loaded else None, layout)
    sys.stdout.flush()
    sys.stderr.flush()
    code = (
        0 if world.failures is not None else code
    )  # our own launcher reads the profile, and would explain a failed rank
    if not clean:
        os._exit(code)
    return code


def _visit(world: World, command: Command, config: Config | None, layout: Layout | None) -> tuple[int, bool]:
    """The exit code, the same on every rank; and whether this process can end as usual."""
    import torch

    from roots_dist.runs.doctor.board import Board
    from roots_dist.runs.doctor.examine import ExamineOptions, Tools, examine, write_up
    from roots_dist.runs.doctor.meet import meet
    from roots_dist.runs.doctor.show import show
    from roots_dist.runs.ranks.join import device_for

    begin = time.monotonic()
    logs.ignore_warnings_of_libraries()
    tools = Tools()
    asked = ExamineOptions(config, layout, command.folder, command.quick, command.wait_s)
    device = device_for(config or Config(), world)
    threads = config.advanced.threads if config else None
    torch.set_num_threads(threads or max(1, environment.cores() // world.local_size))
    board = Board(meet(world, command.wait_s, tools.host), world.rank, world.size)
    examine(board, world, device, asked, tools)
    found = write_up(board, world, device, asked, time.monotonic() - begin) if world.rank == 0 else None
    code = board.tell("exit code", None if found is None else int(not found.healthy))
    board.leave()
    if found is not None:
        show(found)
        if command.json is not None:
            _write(found, command.json)
    return code, not (board.overdue or torch.distributed.is_initialized())


def _loaded(command: Command) -> Loaded | None:
    return read(command.config, command.overrides) if command.config is not None else None


def _layout(loaded: Loaded | None, size: int) -> Layout | None:
    """Raises ConfigError if the config's cannot be had in a world of this size."""
    if loaded is None:
        return None
    try:
        return layout_for(loaded.config, size)
    except ConfigError as error:
        raise ConfigError(loaded.located(error.problems)) from None


def _processes(loaded: Loaded | None, asked: int | None) -> int:
    if loaded is None:
        return asked or environment.gpus() or RANKS
    gpus = environment.gpus() if loaded.config.train.device != "cpu" else 0
    return local.processes_for(loaded.config, asked, gpus)


def _write(found: Profile, path: Path) -> None:
    try:
        write(found, path)
    except OSError as error:
        expected = f"a file that can be written ({why(error)})"
        raise UserError(Problem(key="--json", found=str(path), expected=expected, fix="name another file")) from None
