"""Tables of a cluster profile: hosts, links, versions, and the findings at the end.

Profile --> rich tables on rank 0's stdout
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table

from roots_dist.accounting.memory import GIB
from roots_dist.accounting.peaks import format_flops
from roots_dist.cluster_profile import MeasuredLink, Profile, format_ranges, format_ranks, hosts_of
from roots_dist.runs.doctor.rank_facts import FIXES

WIDE = 1000
"""Width in columns: a table takes what it needs, and nothing is cut where there is no terminal."""


def show(profile: Profile) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False, width=WIDE)
    for line in lines(profile):
        console.print(line)


def lines(profile: Profile) -> Iterator[Table | str]:
    world = _count(profile.world_size, "rank") + (f", {profile.layout}" if profile.layout else "")
    yield f"{world}, {profile.backend}" + (f", started by {profile.launcher}" if profile.launcher != "none" else "")
    if profile.ranks:
        yield versions_line(profile)
        yield settings_line(profile)
        yield ""
        yield hosts_table(profile)
    if len(profile.speeds) > 1:
        yield slowest_line(profile)
    if profile.links:
        yield ""
        yield links_table(profile.links)
    yield ""
    yield from map(str, profile.findings)
    yield verdict(profile)


def versions_line(profile: Profile) -> str:
    """Versions of most ranks; findings name those that differ."""
    usual = {name: Counter(facts.versions.get(name) for facts in profile.ranks).most_common(1)[0][0] for name in FIXES}
    return ", ".join(f"{name} {version}" for name, version in usual.items() if version is not None)


def settings_line(profile: Profile) -> str:
    """Settings of torch that a run has on most ranks."""
    names = dict.fromkeys(name for facts in profile.ranks for name in facts.settings)
    usual = {name: Counter(facts.settings.get(name) for facts in profile.ranks).most_common(1)[0][0] for name in names}
    return ", ".join(f"{name} {value}" for name, value in usual.items() if value is not None)


def hosts_table(profile: Profile) -> Table:
    table = Table(box=None, pad_edge=False)
    columns = ("host", "ranks", "device", "cores", "free memory", "free disk", "clock", "products", "copies", "folder")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < 3 else "right")
    hosts = hosts_of(profile.ranks)
    for host in dict.fromkeys(hosts.values()):
        here = [facts for facts in profile.ranks if facts.host == host]
        flops = [speed.matmul_flops for speed in profile.speeds if hosts[speed.rank] == host]
        copies = [speed.copy_bytes_per_s for speed in profile.speeds if hosts[speed.rank] == host]
        written = [one.bytes_per_s for one in profile.wrote if hosts[one.rank] == host]
        memory, offset = here[0].memory_free, profile.clock_offsets_s.get(host)
        table.add_row(
            host,
            format_ranges(facts.rank for facts in here),
            ", ".join(sorted({facts.device for facts in here})),
            str(here[0].cores),
            "-" if memory is None else f"{memory / GIB:.1f} GiB",
            f"{here[0].disk_free / GIB:.1f} GiB",
            "-" if offset is None or len(profile.clock_offsets_s) == 1 else f"{1000 * offset:+.1f} ms",
            _range(flops),
            f"{min(copies) / 1e9:.3g} GB/s" if copies else "-",
            "✗" if None in written else f"{sum(filter(None, written)) / 1e9:.3g} GB/s" if written else "-",
        )
    return table


def slowest_line(profile: Profile) -> str:
    slowest = min(profile.speeds, key=lambda speed: speed.matmul_flops)
    share = slowest.matmul_flops / max(speed.matmul_flops for speed in profile.speeds)
    words = format_ranks([slowest.rank], hosts_of(profile.ranks))
    return (
        f"slowest device: {words}, {format_flops(slowest.matmul_flops)} in {slowest.precision} products, "
        f"{share:.0%} of the fastest"
    )


def links_table(links: Sequence[MeasuredLink]) -> Table:
    """A row per operation: the time of the smallest size, the bandwidth of each larger one."""
    sizes = sorted({link.bytes for link in links})
    table = Table(box=None, pad_edge=False)
    for i, column in enumerate(("links", "operation", "ranks", f"time {_size(sizes[0])}", *map(_size, sizes[1:]))):
        table.add_column(column, justify="left" if i < 2 else "right")
    for where, operation in dict.fromkeys((link.where, link.operation) for link in links):
        mine = {link.bytes: link for link in links if (link.where, link.operation) == (where, operation)}
        first = mine[sizes[0]]  # larger sizes are missing if this one took long
        table.add_row(
            {"inside": "inside a host", "between": "between hosts"}[where],
            operation,
            f"{first.groups} × {first.ranks}" if first.groups > 1 else str(first.ranks),
            f"{1e6 * first.seconds:.0f} µs",
            *(f"{mine[size].bus_bytes_per_s / 1e9:.3g} GB/s" if size in mine else "-" for size in sizes[1:]),
        )
    return table


def verdict(profile: Profile) -> str:
    hosts = len({facts.host for facts in profile.ranks})
    world = f"{_count(profile.world_size, 'rank')}" + (f" on {_count(hosts, 'host')}" if hosts else "")
    serious = sum(finding.serious for finding in profile.findings)
    summary = f"{_count(serious, 'finding')} to fix before training" if serious else "no problems found"
    return f"{'✗' if serious else '✓'} {world}: {summary}; {profile.seconds:.1f} s"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _range(flops: Sequence[float]) -> str:
    if not flops:
        return "-"
    low, high = format_flops(min(flops)), format_flops(max(flops))
    return low if low == high else f"{low} to {high}"


def _size(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
