"""The examination from top to bottom: rounds with deadlines, then rank 0's findings from the answers.

    coordinator --arrival, facts, clocks, folder, speed, join, links--> answers --findings of each check--> Profile

Every rank calls `examine`; only rank 0 has answers afterwards, and calls `build_profile`. A rank that fails or is
silent ends the examination, and what was measured until then is still reported.
"""

from __future__ import annotations

import secrets
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path

import torch
import torch.distributed as dist

from roots_dist.accounting.peaks import Precision
from roots_dist.accounting.sizes import parameters
from roots_dist.cluster_profile import Finding, FolderAccess, Profile, RankFacts, Speed
from roots_dist.config.schema import Config
from roots_dist.environment import World
from roots_dist.layout import Layout
from roots_dist.runs.doctor import clocks, links, speed
from roots_dist.runs.doctor import host_groups as placement
from roots_dist.runs.doctor import rank_facts as facts
from roots_dist.runs.doctor import shared_folder as folder
from roots_dist.runs.doctor.coordinator import Coordinator, RoundStopped
from roots_dist.runs.ranks.deadline import DeadlineExceeded, run_with_deadline
from roots_dist.world.mesh import BACKGROUND

FACTS_S, CLOCKS_S, FOLDER_S, SPEED_S, JOIN_S, LINKS_S = 15.0, 10.0, 10.0, 15.0, 15.0, 20.0
"""Seconds after which a round, and with it the examination, is given up. On a healthy cluster all rounds together take
some seconds."""
LEAVE_S = 5.0
GLOO_FIX = (
    "checkpoints are saved in the background over gloo, beside NCCL: set GLOO_SOCKET_IFNAME on every host to the "
    "interface of the cluster's network (ip addr lists them), or set checkpoint.asynchronous=false"
)
CHECKPOINT_BYTES = 12
"""Bytes per parameter in a checkpoint: weight and both moments of Adam in float32."""


@dataclass(frozen=True)
class ExamineOptions:
    """Options of an examination."""

    config: Config | None = None
    layout: Layout | None = None
    """Layout of the config in this world."""
    folder: Path | None = None
    """Folder that all hosts share; None takes the run's if there is a config."""
    quick: bool = False
    wait_s: float = 20.0
    """Seconds that ranks may take to arrive."""

    @property
    def shared(self) -> Path | None:
        return folder.place(self.folder, Path(self.config.track.folder) if self.config else None)

    @property
    def checkpoint(self) -> int | None:
        """Bytes of a checkpoint. None without a config, or if the model's size is in finetune.init_from."""
        if self.config is None or self.config.finetune.init_from is not None:
            return None
        return parameters(self.config) * CHECKPOINT_BYTES

    def precision(self, device: torch.device) -> Precision:
        if self.config is not None:
            return self.config.train.precision
        return "bf16" if device.type == "cuda" else "fp32"


@dataclass(frozen=True)
class Probes:
    """Functions that a rank measures with."""

    host: str = field(default_factory=socket.gethostname)
    facts: Callable[[int, torch.device, str], RankFacts] = facts.gather
    now: clocks.Now = time.time
    speed: Callable[[int, torch.device, Precision, bool], Speed] = speed.measure


def examine(
    coordinator: Coordinator, world: World, device: torch.device, options: ExamineOptions, probes: Probes
) -> None:
    """Run all rounds. Collective over the ranks that share the coordinator's store. Leaves no process group unless it
    was stopped."""
    with suppress(RoundStopped):
        _rounds(coordinator, world, device, options, probes)


def _rounds(
    coordinator: Coordinator, world: World, device: torch.device, options: ExamineOptions, probes: Probes
) -> None:
    fix = (
        "read in the launcher's output whether it started and how it ended, "
        f"or wait longer (--wait, now {options.wait_s:g})"
    )
    here = coordinator.run_round("arrival", options.wait_s, lambda: probes.host, silence="did not arrive", fix=fix)
    hosts = coordinator.broadcast("hosts", [here[rank] for rank in range(world.size)] if here else None)
    coordinator.hosts = dict(enumerate(hosts))
    coordinator.run_round("facts", FACTS_S, lambda: asdict(probes.facts(world.rank, device, probes.host)))
    coordinator.run_round("clocks", CLOCKS_S, lambda: clocks.offset(coordinator.store, world.rank, hosts, probes.now))
    if options.shared is not None:
        _folder(coordinator, options.shared, hosts)
    coordinator.run_round(
        "speed", SPEED_S, lambda: asdict(probes.speed(world.rank, device, options.precision(device), options.quick))
    )
    if world.size > 1:
        _links(coordinator, world, device, options, hosts)


def _folder(coordinator: Coordinator, shared: Path, hosts: list[str]) -> None:
    """Check the shared folder. Rank 0 chooses it, in case a launcher starts ranks in different folders."""
    shared, token = (
        Path(coordinator.broadcast("folder", str(shared.absolute()))),
        coordinator.broadcast("token", secrets.token_hex(8)),
    )
    fix = f"check that {shared} responds on that host (df, mount)"
    try:
        wrote = coordinator.run_round(
            "folder write", FOLDER_S, lambda: asdict(folder.write(shared, token, coordinator.rank)), fix=fix
        )
        writers = coordinator.broadcast("writers", [rank for rank, one in wrote.items() if one["trouble"] is None])
        looks = coordinator.rank in [members[0] for members in placement.by_host(hosts)]
        coordinator.run_round(
            "folder look", FOLDER_S, lambda: folder.find_unseen(shared, token, writers) if looks else [], fix=fix
        )
    finally:
        _with_deadline(coordinator, lambda: folder.remove_file(shared, token, coordinator.rank))


def _links(
    coordinator: Coordinator, world: World, device: torch.device, options: ExamineOptions, hosts: list[str]
) -> None:
    """Join the world as training does, and measure its links."""
    fix = (
        "check that the hosts reach each other on all ports; "
        "GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME set the interface"
    )
    coordinator.run_round("join", JOIN_S, lambda: _join(coordinator, world, device), fix=fix)
    if saves_over_gloo(device, options):
        coordinator.run_round("background saves", JOIN_S, lambda: meet_over_gloo(world.size), fix=GLOO_FIX)
    timeout = timedelta(seconds=LINKS_S)
    coordinator.run_round(
        "links", LINKS_S, lambda: links.measure(links.axes(hosts, world.rank, timeout), device, options.quick), fix=fix
    )
    _with_deadline(coordinator, dist.destroy_process_group)


def _with_deadline(coordinator: Coordinator, work: Callable[[], object]) -> None:
    """Clean up with a deadline, because that may hang like everything else."""
    try:
        run_with_deadline(LEAVE_S, work)
    except DeadlineExceeded:
        coordinator.thread_is_stuck = True


def _join(coordinator: Coordinator, world: World, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend_of(device),
        store=dist.PrefixStore("world", coordinator.store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=JOIN_S),
        device_id=device if device.type == "cuda" else None,
    )
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    assert total.item() == world.size, (total, world)


def saves_over_gloo(device: torch.device, options: ExamineOptions) -> bool:
    """True if the threads that save in the background need gloo beside the NCCL of training (world/mesh.py)."""
    return backend_of(device) != "gloo" and (options.config is None or options.config.saves_in_background())


def meet_over_gloo(size: int) -> None:
    """Meet as those threads do: in a group of their own, in CPU memory. Collective over the world."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=JOIN_S), group_desc=BACKGROUND)
    total = torch.ones(1)
    dist.all_reduce(total, group=group)
    assert total.item() == size, (total, size)


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def build_profile(
    coordinator: Coordinator, world: World, device: torch.device, options: ExamineOptions, seconds: float
) -> Profile:
    """Profile from whatever was answered, on rank 0."""
    wrote = [FolderAccess(**answer) for answer in coordinator.answers.get("folder write", {}).values()]
    offsets = {
        coordinator.hosts[rank]: offset
        for rank, offset in coordinator.answers.get("clocks", {}).items()
        if offset is not None
    }
    samples = [links.Sample(*sample) for answer in coordinator.answers.get("links", {}).values() for sample in answer]
    return Profile(
        when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        launcher=world.launcher if world.failures is None else "roots doctor",  # it starts ranks as torchrun does
        backend=backend_of(device),
        world_size=world.size,
        layout=str(options.layout) if options.layout else None,
        ranks=tuple(_facts(coordinator)),
        clock_offsets_s=offsets,
        folder=str(options.shared) if options.shared else None,
        wrote=tuple(wrote),
        speeds=tuple(_speeds(coordinator)),
        links=tuple(links.merge(samples)),
        findings=(*coordinator.findings, *_findings(coordinator, device, options, wrote, offsets, samples)),
    )


def _findings(
    coordinator: Coordinator,
    device: torch.device,
    options: ExamineOptions,
    wrote: list[FolderAccess],
    offsets: dict[str, float],
    samples: list[links.Sample],
) -> Iterator[Finding]:
    """Findings of each check, the most serious kind first."""
    if ranks := _facts(coordinator):
        yield from facts.versions(ranks)
        yield from facts.devices(ranks)
        yield from facts.addresses(ranks, "gloo" if saves_over_gloo(device, options) else backend_of(device))
        yield from facts.check_space(ranks)
    if options.layout is not None and coordinator.hosts:
        yield from placement.crossings(options.layout, coordinator.hosts)
    if options.shared is not None:
        yield from folder.findings(
            options.shared, wrote, coordinator.answers.get("folder look", {}), coordinator.hosts, options.checkpoint
        )
    if offsets:
        yield from clocks.findings(offsets)
    if speeds := _speeds(coordinator):
        yield from speed.findings(speeds, coordinator.hosts)
    yield from links.findings(samples, coordinator.hosts)


def _facts(coordinator: Coordinator) -> list[RankFacts]:
    return [RankFacts(**answer) for answer in coordinator.answers.get("facts", {}).values()]


def _speeds(coordinator: Coordinator) -> list[Speed]:
    return [Speed(**answer) for answer in coordinator.answers.get("speed", {}).values()]
