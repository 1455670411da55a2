"""The examination, from top to bottom: round after round, each with a deadline; then what rank 0 makes of the answers.

    board --arrival, facts, clocks, folder, speed, join, links--> answers --findings of each check--> Profile

Every rank calls `examine`; rank 0 alone has answers afterwards, and calls `write_up`. A rank that fails or is silent ends
it there, and what was measured until then is still written up.
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
from roots_dist.cluster_profile import Finding, Profile, RankFacts, Speed, Wrote
from roots_dist.config.schema import Config
from roots_dist.environment import World
from roots_dist.layout import Layout
from roots_dist.runs.doctor import clocks, facts, folder, links, placement, speed
from roots_dist.runs.doctor.board import Board, Stopped
from roots_dist.runs.doctor.deadline import Overdue, within

FACTS_S, CLOCKS_S, FOLDER_S, SPEED_S, JOIN_S, LINKS_S = 15.0, 10.0, 10.0, 15.0, 15.0, 20.0
"""Until a round is given up, and with it the examination. On a healthy cluster all of them together take some seconds."""
LEAVE_S = 5.0
CHECKPOINT_BYTES = 12
"""Of a parameter in a checkpoint: weight and both moments of Adam in float32."""


@dataclass(frozen=True)
class ExamineOptions:
    """What the command line asks for."""

    config: Config | None = None
    layout: Layout | None = None
    """Of the config in this world."""
    folder: Path | None = None
    """That all hosts share; None: the run's, if there is a config."""
    quick: bool = False
    wait_s: float = 20.0
    """That ranks may take to arrive."""

    @property
    def shared(self) -> Path | None:
        return folder.place(self.folder, Path(self.config.track.folder) if self.config else None)

    @property
    def checkpoint(self) -> int | None:
        """Bytes of one. A config that goes on from a model does not say its size."""
        if self.config is None or self.config.finetune.init_from is not None:
            return None
        return parameters(self.config) * CHECKPOINT_BYTES

    def precision(self, device: torch.device) -> Precision:
        if self.config is not None:
            return self.config.train.precision
        return "bf16" if device.type == "cuda" else "fp32"


@dataclass(frozen=True)
class Tools:
    """What a rank looks and measures with."""

    host: str = field(default_factory=socket.gethostname)
    facts: Callable[[int, torch.device, str], RankFacts] = facts.gather
    now: clocks.Now = time.time
    speed: Callable[[int, torch.device, Precision, bool], Speed] = speed.measure


def examine(board: Board, world: World, device: torch.device, asked: ExamineOptions, tools: Tools) -> None:
    """Collective over the ranks that share the board's store. Leaves no process group, unless it was stopped."""
    with suppress(Stopped):
        _rounds(board, world, device, asked, tools)


def _rounds(board: Board, world: World, device: torch.device, asked: ExamineOptions, tools: Tools) -> None:
    fix = f"see in the launcher's output whether it started and how it ended, or wait longer (--wait, now {asked.wait_s:g})"
    here = board.ask("arrival", asked.wait_s, lambda: tools.host, silence="did not arrive", fix=fix)
    hosts = board.tell("hosts", [here[rank] for rank in range(world.size)] if here else None)
    board.hosts = dict(enumerate(hosts))
    board.ask("facts", FACTS_S, lambda: asdict(tools.facts(world.rank, device, tools.host)))
    board.ask("clocks", CLOCKS_S, lambda: clocks.offset(board.store, world.rank, hosts, tools.now))
    if asked.shared is not None:
        _folder(board, asked.shared, hosts)
    board.ask("speed", SPEED_S, lambda: asdict(tools.speed(world.rank, device, asked.precision(device), asked.quick)))
    if world.size > 1:
        _links(board, world, device, asked.quick, hosts)


def _folder(board: Board, shared: Path, hosts: list[str]) -> None:
    """Rank 0 says which folder, in case a launcher starts ranks in different ones."""
    shared, token = Path(board.tell("folder", str(shared.absolute()))), board.tell("token", secrets.token_hex(8))
    fix = f"see whether {shared} answers on that host (df, mount)"
    try:
        wrote = board.ask("folder write", FOLDER_S, lambda: asdict(folder.write(shared, token, board.rank)), fix=fix)
        writers = board.tell("writers", [rank for rank, one in wrote.items() if one["trouble"] is None])
        looks = board.rank in [members[0] for members in placement.by_host(hosts)]
        board.ask("folder look", FOLDER_S, lambda: folder.look(shared, token, writers) if looks else [], fix=fix)
    finally:
        _soon(board, lambda: folder.clear(shared, token, board.rank))


def _links(board: Board, world: World, device: torch.device, quick: bool, hosts: list[str]) -> None:
    """Join the world as training does, and measure in it."""
    fix = (
        "see that the hosts reach each other on all ports; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface"
    )
    board.ask("join", JOIN_S, lambda: _join(board, world, device), fix=fix)
    timeout = timedelta(seconds=LINKS_S)
    board.ask("links", LINKS_S, lambda: links.measure(links.axes(hosts, world.rank, timeout), device, quick), fix=fix)
    _soon(board, dist.destroy_process_group)


def _soon(board: Board, work: Callable[[], object]) -> None:
    """Tidying up may hang like everything else."""
    try:
        within(LEAVE_S, work)
    except Overdue:
        board.overdue = True


def _join(board: Board, world: World, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend_of(device),
        store=dist.PrefixStore("world", board.store),
        rank=world.rank,
        world_size=world.size,
        timeout=timedelta(seconds=JOIN_S),
        device_id=device if device.type == "cuda" else None,
    )
    total = torch.ones(1, device=device)
    dist.all_reduce(total)
    assert total.item() == world.size, (total, world)


def backend_of(device: torch.device) -> str:
    return "nccl" if device.type == "cuda" else "gloo"


def write_up(board: Board, world: World, device: torch.device, asked: ExamineOptions, seconds: float) -> Profile:
    """On rank 0, of whatever was answered."""
    wrote = [Wrote(**answer) for answer in board.said.get("folder write", {}).values()]
    offsets = {board.hosts[rank]: offset for rank, offset in board.said.get("clocks", {}).items() if offset is not None}
    samples = [links.Sample(*sample) for answer in board.said.get("links", {}).values() for sample in answer]
    return Profile(
        when=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        launcher=world.launcher if world.failures is None else "roots doctor",  # which starts ranks as torchrun does
        backend=backend_of(device),
        world_size=world.size,
        layout=str(asked.layout) if asked.layout else None,
        ranks=tuple(_facts(board)),
        clock_offsets_s=offsets,
        folder=str(asked.shared) if asked.shared else None,
        wrote=tuple(wrote),
        speeds=tuple(_speeds(board)),
        links=tuple(links.merge(samples)),
        findings=(*board.findings, *_findings(board, device, asked, wrote, offsets, samples)),
    )


def _findings(
    board: Board,
    device: torch.device,
    asked: ExamineOptions,
    wrote: list[Wrote],
    offsets: dict[str, float],
    samples: list[links.Sample],
) -> Iterator[Finding]:
    """What each check says of the answers, the gravest kind first."""
    if ranks := _facts(board):
        yield from facts.versions(ranks)
        yield from facts.devices(ranks)
        yield from facts.addresses(ranks, backend_of(device))
        yield from facts.room(ranks)
    if asked.layout is not None and board.hosts:
        yield from placement.crossings(asked.layout, board.hosts)
    if asked.shared is not None:
        yield from folder.findings(
            asked.shared, wrote, board.said.get("folder look", {}), board.hosts, asked.checkpoint
        )
    if offsets:
        yield from clocks.findings(offsets)
    if speeds := _speeds(board):
        yield from speed.findings(speeds, board.hosts)
    yield from links.findings(samples, board.hosts)


def _facts(board: Board) -> list[RankFacts]:
    return [RankFacts(**answer) for answer in board.said.get("facts", {}).values()]


def _speeds(board: Board) -> list[Speed]:
    return [Speed(**answer) for answer in board.said.get("speed", {}).values()]
