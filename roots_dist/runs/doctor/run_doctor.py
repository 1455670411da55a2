"""`roots doctor` as a process: under a launcher it is one rank of that world, otherwise it starts the ranks.

    run_doctor --rendezvous.py--> store --examine.py--> answers --build_profile--> Profile --> table, JSON, exit code

Exit codes: 0 nothing serious, 1 findings, 2 the ranks could not connect, or the command line is invalid.
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
from roots_dist.runs.doctor.options import DoctorOptions
from roots_dist.runs.ranks import local
from roots_dist.runs.ranks.die_with_parent import die_with_parent

RANKS = 2
"""Number of ranks without a launcher, a config and GPUs: the fewest that have a link."""


@dataclass(frozen=True)
class DoctorCommand:
    """Options of the command line."""

    config: str | None
    overrides: tuple[str, ...]
    options: DoctorOptions
    words: tuple[str, ...]
    """All words of it, to start other ranks with."""


def run_doctor(command: DoctorCommand) -> int:
    """Run `roots doctor`, or this rank of it, and return the exit code."""
    world, options, processes = environment.discover(), command.options, command.options.processes
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
        return _be_rank(environment.single_process(), command)
    with tempfile.TemporaryDirectory(prefix="roots-doctor-") as folder:
        written = options.json or Path(folder) / "profile.json"
        written.unlink(missing_ok=True)  # from an earlier examination
        words = (*command.words, *(() if options.json else ("--json", str(written))))
        threads = loaded.config.advanced.threads if loaded else None
        code = local.launch(size, ["-m", "roots_dist", *words], threads, what=str(layout or "roots doctor"))
        return code or int(not read_profile(written).healthy)


def _be_rank(world: World, command: DoctorCommand) -> int:
    """Run one rank."""
    faulthandler.enable()
    if world.size > 1:
        die_with_parent(world.launcher_pid)
    records = Path(world.failures) if world.failures else None
    with guarded(RankIdentity(world.rank, world.size, local_size=world.local_size, records=records)):
        loaded = _loaded(command)
        layout = _layout(loaded, world.size)
        logs.setup(world.rank, f"rank {world.rank}" if world.size > 1 else "")
        code, clean = _examine_and_show(world, command, loaded.config if loaded else None, layout)
    sys.stdout.flush()
    sys.stderr.flush()
    if world.failures is not None:  # our own launcher reads the profile, and would explain a failed rank
        code = 0
    if not clean:
        os._exit(code)
    return code


def _examine_and_show(
    world: World, command: DoctorCommand, config: Config | None, layout: Layout | None
) -> tuple[int, bool]:
    """Exit code, equal on every rank, and whether this process can end normally."""
    import torch

    from roots_dist.runs.doctor.coordinator import Coordinator
    from roots_dist.runs.doctor.examine import ExamineOptions, Probes, build_profile, examine
    from roots_dist.runs.doctor.profile_table import show
    from roots_dist.runs.ranks.join import device_for
    from roots_dist.runs.ranks.rendezvous import rendezvous

    begin, options = time.monotonic(), command.options
    logs.ignore_warnings_of_libraries()
    probes = Probes()
    what = ExamineOptions(config, layout, options.folder, options.quick, options.wait)
    device = device_for(config or Config(), world.local_rank)
    threads = config.advanced.threads if config else None
    torch.set_num_threads(threads or max(1, environment.cores() // world.local_size))
    coordinator = Coordinator(rendezvous(world, options.wait, probes.host), world.rank, world.size)
    examine(coordinator, world, device, what, probes)
    found = build_profile(coordinator, world, device, what, time.monotonic() - begin) if world.rank == 0 else None
    code = coordinator.broadcast("exit code", None if found is None else int(not found.healthy))
    coordinator.leave()
    if found is not None:
        show(found)
        if options.json is not None:
            _write(found, options.json)
    return code, not (coordinator.thread_is_stuck or torch.distributed.is_initialized())


def _loaded(command: DoctorCommand) -> Loaded | None:
    return read(command.config, command.overrides) if command.config is not None else None


def _layout(loaded: Loaded | None, size: int) -> Layout | None:
    """Layout of the config in a world of this size; None without a config. Raises ConfigError if it does not fit."""
    if loaded is None:
        return None
    try:
        return layout_for(loaded.config, size)
    except ConfigError as error:
        raise ConfigError(loaded.located(error.problems)) from None


def _processes(loaded: Loaded | None, requested: int | None) -> int:
    if loaded is None:
        return requested or environment.gpus() or RANKS
    gpus = environment.gpus() if loaded.config.train.device != "cpu" else 0
    return local.processes_for(loaded.config, requested, gpus)


def _write(found: Profile, path: Path) -> None:
    try:
        write(found, path)
    except OSError as error:
        expected = f"a file that can be written ({why(error)})"
        raise UserError(Problem(key="--json", found=str(path), expected=expected, fix="name another file")) from None
