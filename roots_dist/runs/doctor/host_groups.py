"""Which ranks of a layout lie where: groups of ranks by host, and tensor groups that a network cuts.

Pure arithmetic over host names; links.py makes live groups of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from roots_dist.cluster_profile import Finding, format_ranks
from roots_dist.layout import Layout

MOST_SHOWN = 4
"""Groups that are named; a wrong order of ranks cuts hundreds alike."""


def by_host(hosts: Sequence[str]) -> list[list[int]]:
    """`hosts[rank]` -> the ranks of each host, in the order of their first ranks."""
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        found.setdefault(host, []).append(rank)
    return list(found.values())


def across_hosts(hosts: Sequence[str]) -> list[list[int]]:
    """The first rank of every host, the second of every host that has one, and so on: they use the network at once, as
    data and pipeline ranks do."""
    ranks = by_host(hosts)
    return [[members[i] for members in ranks if i < len(members)] for i in range(max(map(len, ranks)))]


def crossings(layout: Layout, hosts: Mapping[int, str]) -> Iterator[Finding]:
    """Tensor groups with members on several hosts: they talk in every layer, and want the links inside a host."""
    cut = [ranks for ranks in layout.groups("tp") if len({hosts[rank] for rank in ranks}) > 1]
    for ranks in cut[:MOST_SHOWN]:
        others = f", one of {len(cut)} such groups" if len(cut) > MOST_SHOWN else ""
        yield Finding(
            check="placement",
            where=format_ranks(ranks, hosts),
            found=f"a tensor group of {layout} across hosts{others}",
            expected=f"its {layout.tp} ranks on one host",
            fix=(
                f"start a multiple of {layout.tp} ranks on every host, each host's numbered in a row, or lower "
                "parallel.tp"
            ),
        )
