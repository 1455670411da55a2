"""The cluster profile: everything that `roots doctor` measured and found, as data. What `--json FILE` holds.

    examine.py --answers of the ranks--> Profile --show.py--> table    --write/read--> JSON, for a planner

Bytes, seconds, FLOP/s and bytes/s; ranks are those of the world. docs/doctor.md explains every field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from roots_dist.errors import DataError
from roots_dist.files import write_atomically

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong: where, what was found, what would be right, what to do about it."""

    check: str
    """answers, versions, devices, addresses, room, placement, folder, clocks, speed or links."""
    where: str
    found: str
    expected: str
    fix: str
    serious: bool = True
    """Training would fail, be wrong or be slow: exit code 1."""

    def __str__(self) -> str:
        return f"{'✗' if self.serious else '!'} {self.where}: {self.found}, expected {self.expected}. Fix: {self.fix}."


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """What one rank says of itself and its machine."""

    rank: int
    host: str
    device: str
    """`cpu`, or the GPU as torch names it."""
    gpu: str | None = None
    """Its unique id; None on a CPU."""
    gpus: int = 0
    """GPUs of the machine by its driver, whether torch can use them or not."""
    versions: Mapping[str, str | None]
    """python, torch, deepspeed, roots_dist, code (a hash of the package's files), cuda, nccl, driver; None: has
    none."""
    cores: int
    threads: int
    """CPU threads that this rank computes with."""
    memory_free: int | None
    disk_free: int
    """Of the temporary folder."""
    shared_memory_free: int | None = None
    """Of /dev/shm; None: there is none."""
    address: str | None = None
    """That the machine's own name stands for; None: nothing, or GLOO_SOCKET_IFNAME makes it needless."""


@dataclass(frozen=True, kw_only=True)
class Wrote:
    """What one rank could do in the shared folder, while all others did the same."""

    rank: int
    trouble: str | None
    """Why it could not write or rename."""
    bytes_per_s: float | None
    free: int | None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What one rank computed, while all others did the same."""

    rank: int
    precision: str
    matmul_flops: float
    """FLOP/s of square matrix products, sustained."""
    copy_bytes_per_s: float
    """Read and written, of a large copy in the device's memory."""
    peak_flops: float | None
    """FLOP/s at best: of a GPU by its maker's sheet, of a CPU one core's best product times threads; None: not
    known."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """One operation at one size, over all groups that did it at once."""

    where: str
    """inside: among the ranks of a host; between: among ranks of different hosts."""
    operation: str
    """all_reduce, all_gather or send."""
    ranks: int
    """In the largest group; 2 for send."""
    groups: int
    """At work at the same time."""
    bytes: int
    """all_reduce, send: of the tensor; all_gather: of what every rank ends up with."""
    seconds: float
    """The middle group's; of a group its slowest rank's, of a rank the median of its repeats."""
    bus_bytes_per_s: float
    """bytes / seconds × 2(n-1)/n (all_reduce), (n-1)/n (all_gather), 1 (send): comparable with the link's own speed."""
    slowest_seconds: float
    slowest: tuple[int, ...]
    """Ranks of the slowest group."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    format: int = FORMAT
    when: str
    """UTC, ISO 8601."""
    seconds: float
    """That the whole examination took."""
    launcher: str
    backend: str
    world_size: int
    layout: str | None
    ranks: tuple[RankFacts, ...]
    """Of those that answered."""
    clock_offsets_s: Mapping[str, float]
    """By host: its clock minus rank 0's."""
    folder: str | None
    wrote: tuple[Wrote, ...]
    speeds: tuple[Speed, ...]
    links: tuple[Link, ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return not any(finding.serious for finding in self.findings)


def write(profile: Profile, path: Path) -> None:
    """Whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, TypeAdapter(Profile).dump_json(profile, indent=1) + b"\n")


def read(path: Path) -> Profile:
    """Raises DataError if it is no profile of this format."""
    try:
        profile = TypeAdapter(Profile).validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        why = str(error).splitlines()[0]
        raise DataError(
            f"profile = {str(path)!r}: expected what roots doctor --json wrote ({why}). Fix: make it anew."
        ) from None
    if profile.format != FORMAT:
        raise DataError(
            f"profile = {str(path)!r}: expected format {FORMAT}, found {profile.format}. Fix: make it anew."
        )
    return profile


def hosts_of(ranks: Iterable[RankFacts]) -> dict[int, str]:
    return {facts.rank: facts.host for facts in ranks}


def named(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """`rank 3 (host b)`, `ranks 0-3, 6 (host a); 8 (host b)`; a rank whose host is not known stands alone."""
    ranks = sorted(ranks)
    by_host: dict[str | None, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts.get(rank), []).append(rank)
    parts = [runs(members) + (f" (host {host})" if host is not None else "") for host, members in by_host.items()]
    return ("rank " if len(ranks) == 1 else "ranks ") + "; ".join(parts)


def runs(ranks: Iterable[int]) -> str:
    """[0, 1, 2, 5] -> 0-2, 5"""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][-1] + 1:
            found[-1].append(rank)
        else:
            found.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)
