"""Join the world that a launcher described: device, threads, process group, and the groups of the layout.

environment.World + Layout --joined--> Mesh, until the run is over
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from roots_dist import environment, logs
from roots_dist.config.schema import Config
from roots_dist.environment import World
from roots_dist.failures import RankIdentity
from roots_dist.layout import Layout
from roots_dist.runs.ranks import torch_settings
from roots_dist.runs.ranks.fingerprint import fingerprint
from roots_dist.runs.ranks.handshake import Identity, shake_hands
from roots_dist.runs.ranks.rendezvous import rendezvous
from roots_dist.runs.ranks.watchdog import end_alone, group_timeout, watch
from roots_dist.world.mesh import Mesh
from roots_dist.world.progress import Progress


def device_for(config: Config, local_rank: int) -> torch.device:
    """Device of a rank, by its number on this machine; GPU 0 where a launcher shows each rank only its own GPU."""
    kind = config.train.device
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


CLOSING_S = 120
"""Seconds beyond advanced.timeout_s for which ranks that are done wait for rank 0."""


@contextmanager
def joined(
    config: Config, world: World, layout: Layout, said: Sequence[str] = (), who: RankIdentity | None = None
) -> Iterator[Mesh]:
    """Join the world for the duration of the body; `said` is the command, which all ranks must have been given, and
    `who` says where a hang is reported. Collective over the world.

    Nothing is torn down on failure: peers may hang, and guarded() ends the process.
    """
    device = device_for(config, world.local_rank)
    limits = wait_limits(config)
    timeout, progress = group_timeout(limits), Progress()
    # DeepSpeed reads the world only from these variables, and would choose an accelerator by itself
    environment.export(environment.variables(world) | {"DS_ACCELERATOR": device.type})
    torch_settings.export(device.type)
    torch.set_num_threads(environment.threads_per_process(config.advanced.threads, world.local_size))
    logs.ignore_warnings_of_libraries()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    live = world.size > 1 or config.advanced.engine == "deepspeed"
    store, watchdog = dist.HashStore(), None
    if world.size > 1:
        store = _meet(config, world, layout, device, said)
        watchdog = watch(who or RankIdentity(world.rank, world.size), store, layout, progress, limits)
    else:
        progress.call_hang = partial(end_alone, who or RankIdentity(world.rank, world.size), progress)
    if live:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    mesh = Mesh.connect(layout, world.rank, device, timeout, progress)
    progress.phase = "start"
    yield mesh
    if live:
        progress.phase = "end"
        _last_barrier(device, timeout)  # no rank closes its connections while others still read
        if watchdog is not None:
            watchdog.stop()
        dist.destroy_process_group()


def _last_barrier(device: torch.device, timeout: timedelta) -> None:
    """Wait for all ranks, and for what rank 0 still has to close (a tracker's server that answers late) beyond the
    timeout of other collectives. Collective over the world."""
    if device.type == "cuda":
        dist.barrier()
    elif dist.get_world_size() > 1:
        dist.monitored_barrier(timeout=timeout + timedelta(seconds=CLOSING_S))


def wait_limits(config: Config) -> dict[str, float]:
    """Seconds that a rank may wait for others, by the phase of the run (world/progress.py)."""
    usual, own = config.advanced.timeout_s, config.advanced
    evaluation = own.evaluate_timeout_s or usual
    return {
        "init": own.init_timeout_s or usual,
        "step": usual,
        "evaluation": evaluation,
        "sample": evaluation,
        "save": own.save_timeout_s or usual,
        "end": usual + CLOSING_S,
    }


def _meet(config: Config, world: World, layout: Layout, device: torch.device, said: Sequence[str]) -> Any:
    """The store of this start of the run, after all ranks have been found alike. Collective over the world."""
    seconds, host = config.advanced.init_timeout_s or config.advanced.timeout_s, socket.gethostname()
    store = rendezvous(world, seconds, host, "with advanced.init_timeout_s")
    store = dist.PrefixStore(f"roots/{environment.start_in_store()}", store)
    own = fingerprint(config, f"{layout} of {world.size} ranks", device, said)
    shake_hands(store, Identity.own(world.rank, host), world.size, layout, own, seconds)
    store.set_timeout(timedelta(seconds=seconds))
    return store
