"""Run a command on ranks: choose one of the three ways to run, and be a rank.

no launcher --> one process here, or runs/ranks/local.py starts as many as the layout needs
launcher    --> this process is a rank: check the config, join the world, work, report failures
"""

from __future__ import annotations

import faulthandler
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from roots_dist import environment, logs
from roots_dist.checks import checks, facts, unused
from roots_dist.config.load import COMMAND_LINE, Loaded
from roots_dist.config.schema import Config
from roots_dist.environment import World
from roots_dist.errors import ConfigError, UserError
from roots_dist.failures import RankIdentity, guarded
from roots_dist.layout import Layout
from roots_dist.runs.ranks import local
from roots_dist.runs.ranks.command import Command
from roots_dist.runs.ranks.die_with_parent import die_with_parent
from roots_dist.runs.ranks.stop_signal import catch_stop_signals

log = logging.getLogger(__name__)

CHECKING = "checking the config and the data"
"""Work that takes long before the ranks meet, if there are many rows."""
Body = Callable[[Config, World, Layout, RankIdentity], "int | None"]
"""Returns the exit code; None means 0. The last argument says where a failure of the rank is reported."""


def run_on_ranks(
    command: Command,
    subject: str,
    overrides: Sequence[str],
    processes: int | None = None,
    arguments: Sequence[str] = (),
) -> int:
    """Run `roots COMMAND SUBJECT OVERRIDES`, or this rank of it, and return the exit code. `arguments` is the command
    line that starts the other ranks, if it has more than that."""
    world = environment.discover()
    environment.threads()  # a wrong number is refused before anything is read

    def body(config: Config, world: World, layout: Layout, who: RankIdentity) -> int | None:
        said = (command.name,) if command.trains else (command.name, *(arguments or (subject, *overrides)))
        say = _say_on_rank_0(command, world)
        with ExitStack() as joining:
            with logs.still_busy("starting", say):
                from roots_dist.runs.ranks.join import joined

                mesh = joining.enter_context(joined(config, world, layout, said, who))
            code = command.work(config, mesh)
        if command.close is not None and world.rank == 0:
            with logs.still_busy("closing the run", say):
                command.close(config, layout)
        return code

    if world is not None:
        if processes is not None:
            raise UserError(
                f"--processes {processes}: {world.launcher} has started this process. Fix: leave --processes out."
            )
        return be_rank(world, lambda: command.fit(command.read(subject, overrides), world.size), body, command)
    with logs.still_busy(CHECKING, command.say):
        loaded = command.read(subject, overrides)
        gpus = environment.gpus() if loaded.config.train.device != "cpu" else 0
        if not command.uses_all_gpus:
            gpus = min(gpus, loaded.config.parallel.least_ranks())
        size = local.processes_for(loaded.config, processes, gpus)
        loaded = command.fit(loaded, size)
        layout = ready(loaded, size, local_size=size, ignored_keys=command.not_required, trains=command.trains)
        command.check(loaded.config)
    if size > 1:
        program = ["-m", "roots_dist", *(arguments or (command.name, subject, *overrides))]
        return local.launch(size, program, loaded.config.advanced.threads, what=str(layout))
    return be_rank(environment.single_process(), lambda: loaded, body, command)


def _say_on_rank_0(command: Command, world: World) -> Callable[[str], object]:
    return command.say if world.rank == 0 else lambda text: None


def ready(
    loaded: Loaded,
    world_size: int,
    local_size: int | None,
    ignored_keys: frozenset[str] = frozenset(),
    trains: bool = True,
    rank: int | None = None,
) -> Layout:
    """Layout of a run that can start. Raises ConfigError with all problems otherwise. With `local_size`, this machine
    is checked too; with `rank`, the program of this rank instead of all ranks' programs. For an existing run (`trains`
    is false), only keys of the command line must be used."""
    config = loaded.config
    found = facts.gather(config, local_size) if local_size is not None else None
    problems = [p for p in unused.check(config) if trains or loaded.origins.get(p.key) == COMMAND_LINE]
    problems += [p for p in checks.check_used(config, world_size, found, rank) if p.key not in ignored_keys]
    if problems:
        raise ConfigError(loaded.located(problems))
    return checks.layout_for(config, world_size)


def be_rank(world: World, load: Callable[[], Loaded], body: Body, command: Command) -> int:
    """Run `body` as one rank of a world. Does not return if it fails and there are other ranks."""
    faulthandler.enable()  # truncating a mapped corpus raises SIGBUS: show at least where
    if world.size > 1:
        die_with_parent(world.launcher_pid)
    records = Path(world.failures) if world.failures else None
    who = RankIdentity(world.rank, world.size, local_size=world.local_size, records=records)
    checked_already = (
        world.failures is not None or world == environment.single_process()
    )  # by our own launcher, on this machine
    with guarded(who), logs.still_busy(CHECKING, _say_on_rank_0(command, world)):
        loaded = load()
        local_size = None if checked_already else world.local_size
        layout = ready(loaded, world.size, local_size, command.not_required, command.trains, world.rank)
        if local_size is not None:
            command.check(loaded.config)
    place = str(layout.place(world.rank))
    logs.setup(world.rank, place if world.size > 1 else "")
    if not checked_already and world.rank == 0:
        log.info("%s", world)
    folder = Path(loaded.config.track.folder)
    listening = catch_stop_signals(folder) if command.trains else nullcontext()  # until the training itself does
    who = replace(who, place=place if world.size > 1 else "", folder=folder)
    with logs.outliving_output() if command.trains else nullcontext():
        with guarded(who), listening:
            code = body(loaded.config, world, layout, who)
        sys.stdout.flush()
    return code or 0
