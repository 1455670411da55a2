"""Groups of ranks by host, and groups of a layout that span several hosts.

Pure arithmetic over host names; links.py makes live groups of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from roots_dist.cluster_profile import Finding, format_ranks
from roots_dist.layout import AxisName, Layout

MOST_SHOWN = 4
"""Largest number of findings: a wrong order of ranks splits hundreds of groups alike."""


def by_host(hosts: Sequence[str]) -> list[list[int]]:
    """Ranks of each host, in order of their first ranks. `hosts[rank]` is the host of each rank."""
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return list(found.values())


def across_hosts(hosts: Sequence[str]) -> list[list[int]]:
    """Groups across hosts: the first rank of every host, the second of every host that has one, and so on. They use the
    network at once, as data and pipeline ranks do."""
    ranks = by_host(hosts)
    return [[members[i] for members in ranks if i < len(members)] for i in range(max(map(len, ranks)))]


def crossings(layout: Layout, hosts: Mapping[int, str]) -> Iterator[Finding]:
    """Findings for tensor groups that span hosts, and for groups with different experts or shards that do so although a
    host has room for them: they communicate in every layer and need the links within a host."""
    yield from _cut("tp", layout.tp, "tensor", "tp", layout, hosts)
    room = min(Counter(hosts.values()).values())
    if layout.ep > 1 and room >= layout.tp * layout.ep:
        yield from _cut("ep", layout.tp * layout.ep, "expert", "ep", layout, hosts)
    if layout.replica > 1 and room >= layout.tp * layout.shard:
        yield from _cut("shard", layout.tp * layout.shard, "shard", "zero_ranks", layout, hosts)


def _cut(
    axis: AxisName, together: int, kind: str, key: str, layout: Layout, hosts: Mapping[int, str]
) -> Iterator[Finding]:
    """together: neighbouring ranks that belong on one host. key: that of `parallel` which says so."""
    cut = [ranks for ranks in layout.groups(axis) if len({hosts[rank] for rank in ranks}) > 1]
    for ranks in cut[:MOST_SHOWN]:
        others = f", one of {len(cut)} such groups" if len(cut) > MOST_SHOWN else ""
        yield Finding(
            check="placement",
            where=format_ranks(ranks, hosts),
            found=f"{'an' if kind == 'expert' else 'a'} {kind} group of {layout} across hosts{others}",
            expected=f"its {len(ranks)} ranks on one host",
            fix=(
                f"start a multiple of {together} ranks on every host, numbered consecutively per host, "
                f"or lower parallel.{key}"
            ),
        )
