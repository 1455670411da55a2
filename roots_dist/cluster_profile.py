"""The cluster profile: everything that `roots doctor` measured and found, as data. It is what `--json FILE` writes.

    examine.py --answers of the ranks--> Profile --profile_table.py--> table    --write/read--> JSON, for a planner

Units are bytes, seconds, FLOP/s and bytes/s; ranks are ranks of the world. docs/doctor.md explains every field.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote

from pydantic import TypeAdapter, ValidationError

from roots_dist.errors import DataError, Problem
from roots_dist.files import read_plain, reason, write_atomically

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is wrong: where, what was found, what would be right, and how to fix it."""

    check: str
    """Name of the check: answers, versions, devices, addresses, room, placement, folder, clocks, speed or links."""
    where: str
    found: str
    expected: str
    fix: str
    serious: bool = True
    """True if training would fail, be wrong or be slow; the command then exits with code 1."""

    def __str__(self) -> str:
        return f"{'✗' if self.serious else '!'} {self.where}: {self.found}, expected {self.expected}. Fix: {self.fix}."


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """Facts about one rank and its machine."""

    rank: int
    host: str
    device: str
    """`cpu`, or torch's name of the GPU."""
    gpu: str | None = None
    """Unique id of the GPU; None on a CPU."""
    gpus: int = 0
    """Number of GPUs that the driver of this machine reports, whether torch can use them or not."""
    versions: Mapping[str, str | None]
    """python, torch, deepspeed, roots_dist, code (hash of the package's files), cuda, nccl, driver; None if absent."""
    cores: int
    threads: int
    """Number of CPU threads that this rank computes with."""
    settings: Mapping[str, str] = field(default_factory=dict)
    """Settings of torch that a run has here: flight recorder; on a GPU also allocator and TF32."""
    memory_free: int | None
    disk_free: int
    """Free bytes in the temporary folder."""
    shared_memory_free: int | None = None
    """Free bytes in /dev/shm; None if it does not exist."""
    address: str | None = None
    """Address that the host name resolves to; None if there is none, or if GLOO_SOCKET_IFNAME makes it irrelevant."""


@dataclass(frozen=True, kw_only=True)
class FolderAccess:
    """Result of one rank's writes to the shared folder while all other ranks wrote too."""

    rank: int
    trouble: str | None
    """The reason why the rank could not write or rename; None on success."""
    bytes_per_s: float | None
    free: int | None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Compute speed of one rank while all other ranks computed too."""

    rank: int
    precision: str
    matmul_flops: float
    """Sustained FLOP/s of square matrix products."""
    copy_bytes_per_s: float
    """Bytes read and written per second in a large copy within the device's memory."""
    peak_flops: float | None
    """Peak FLOP/s: from the data sheet of a GPU; for a CPU, the best product of one core times threads. None if
    unknown."""


@dataclass(frozen=True, kw_only=True)
class MeasuredLink:
    """One operation at one size, measured over all groups that ran it at the same time."""

    where: str
    """`inside`: among the ranks of one host; `between`: among ranks of different hosts."""
    operation: str
    """all_reduce, all_gather or send."""
    ranks: int
    """Number of ranks in the largest group; 2 for send."""
    groups: int
    """Number of groups that ran at the same time."""
    bytes: int
    """Size of the tensor (all_reduce, send), or of the gathered result on every rank (all_gather)."""
    seconds: float
    """Time of the median group. A group takes as long as its slowest rank; a rank's time is the median of its repeats.
    """
    bus_bytes_per_s: float
    """bytes / seconds × 2(n-1)/n (all_reduce), (n-1)/n (all_gather), 1 (send): comparable with the speed of the link.
    """
    slowest_seconds: float
    slowest: tuple[int, ...]
    """Ranks of the slowest group."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Everything that one examination measured and found."""

    format: int = FORMAT
    when: str
    """UTC time, ISO 8601."""
    seconds: float
    """Duration of the whole examination."""
    launcher: str
    backend: str
    world_size: int
    layout: str | None
    ranks: tuple[RankFacts, ...]
    """Facts of the ranks that answered."""
    clock_offsets_s: Mapping[str, float]
    """Clock of each host minus the clock of rank 0."""
    folder: str | None
    wrote: tuple[FolderAccess, ...]
    speeds: tuple[Speed, ...]
    links: tuple[MeasuredLink, ...]
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        return not any(finding.serious for finding in self.findings)


def write(profile: Profile, path: Path) -> None:
    """Write the profile atomically. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, TypeAdapter(Profile).dump_json(profile, indent=1) + b"\n")


def read(path: Path) -> Profile:
    """Read a profile. Raises DataError if the file is not a profile of this format."""
    try:
        profile = TypeAdapter(Profile).validate_json(read_plain(path))
    except (OSError, ValidationError) as error:
        why = reason(error, path).splitlines()[0]
        raise DataError(_problem(path, f"what roots doctor --json wrote ({why})")) from None
    if profile.format != FORMAT:
        raise DataError(_problem(path, f"format {FORMAT}, found {profile.format}"))
    return profile


def _problem(path: Path, expected: str) -> Problem:
    fix = f"write it on the cluster with roots doctor --json {quote(str(path))}, or leave --profile out"
    return Problem(key="profile", found=str(path), expected=expected, fix=fix)


def hosts_of(ranks: Iterable[RankFacts]) -> dict[int, str]:
    """Host of each rank."""
    return {facts.rank: facts.host for facts in ranks}


def format_ranks(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Format ranks with their hosts: `rank 3 (host b)`, `ranks 0-3, 6 (host a); 8 (host b)`; hosts not known are left
    out."""
    ranks = sorted(ranks)
    by_host: dict[str | None, list[int]] = {}
    for rank in ranks:
        by_host.setdefault(hosts.get(rank), []).append(rank)
    parts = [
        format_ranges(members) + (f" (host {host})" if host is not None else "") for host, members in by_host.items()
    ]
    return ("rank " if len(ranks) == 1 else "ranks ") + "; ".join(parts)


def format_ranges(ranks: Iterable[int]) -> str:
    """Format numbers as ranges: [0, 1, 2, 5] -> `0-2, 5`."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][-1] + 1:
            found[-1].append(rank)
        else:
            found.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in found)
