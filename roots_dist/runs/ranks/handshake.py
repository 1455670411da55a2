"""The handshake of the ranks, over the store that they meet at, before the first process group.

    every rank: who it is, digests --store--> rank 0 compares --> "alike", or who differs, in which key

A rank that differs trains another model, or waits for messages that no other rank sends; so this comes before any
operation whose number or shape follows from the config. Each rank sends some 300 bytes and reads one answer; rank 0 and
the store do the rest, in time proportional to the number of ranks (5 MB at 16,384). The names of keys are only sent if
digests differ, by one rank of each kind.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psutil

from roots_dist import environment
from roots_dist.cluster_profile import format_ranks
from roots_dist.errors import EnvironmentProblem, UserError
from roots_dist.layout import Layout
from roots_dist.runs.ranks.fingerprint import Fingerprint, digests, shown

PAUSES_S = (0.002, 0.1)
"""Seconds between two looks into the store: at first, and after a while."""
SLACK_S = 2.0
"""Extra seconds that the other ranks wait for rank 0's answer."""
BYE_S = 2.0
KINDS = 4
"""Kinds of ranks that differ, at most, that are asked for their keys."""
NAMED = 3
"""Keys that are named, at most, of a rank that differs."""


class RanksDiffer(UserError):
    """Ranks of one run were started with different configs, corpora, code, versions or layouts."""


@dataclass(frozen=True)
class Identity:
    """A process, so that another one of the same machine can ask how it is, and end it."""

    rank: int
    host: str
    pid: int
    started: float
    """Result of `started_at`: a process with the same number that started at another time is another."""

    @staticmethod
    def own(rank: int, host: str) -> Identity:
        return Identity(rank, host, os.getpid(), started_at(psutil.Process()))


def started_at(process: psutil.Process) -> float:
    """The time at which a process started, in seconds since the machine did, however the machine's clock is set
    meanwhile. Raises psutil.Error."""
    return float(process.create_time()) - psutil.boot_time()


def shake_hands(store: Any, who: Identity, size: int, layout: Layout, mine: Fingerprint, seconds: float) -> None:
    """Meet all ranks, and compare what they must have in common. Every rank of the world calls it.

    Raises RanksDiffer on every rank, with the ranks that differ from most others, their hosts, and the first keys.
    Raises EnvironmentProblem that names the ranks that have not arrived after `seconds`.
    """
    if store.add(f"arrivals/{who.rank}", 1) > 1:
        raise _twice(store, who)
    _set(store, _hello(who.rank), {"who": asdict(who), "digests": digests(mine)})
    if who.rank == 0:
        answer = _compare_digests(store, size, layout, seconds, mine)
        _set(store, "answer", answer)
    elif _wait_for(store, ["answer"], seconds + SLACK_S):
        answer = _get(store, "answer")
    else:
        missing = [rank for rank in range(size) if not store.check([_hello(rank)])]
        raise _absent(missing or [0], {}, layout, seconds)
    if answer["asked"] and not answer["message"]:
        answer = _exchange_texts(store, who, answer, mine, size, layout)
    if answer["message"]:
        _leave(store, who.rank, size)
        raise (RanksDiffer if answer["differ"] else EnvironmentProblem)(answer["message"])


def identity_of(store: Any, rank: int) -> Identity:
    """The process that has shaken hands as this rank."""
    return Identity(**_get(store, _hello(rank))["who"])


def _compare_digests(store: Any, size: int, layout: Layout, seconds: float, mine: Fingerprint) -> dict[str, Any]:
    """Rank 0: wait for all, and find the ranks whose digests are not those of most."""
    keys = [_hello(rank) for rank in range(size)]
    if not _wait_for(store, keys, seconds):
        there = {rank: _get(store, key)["who"] for rank, key in enumerate(keys) if store.check([key])}
        hosts = {rank: who["host"] for rank, who in there.items()}
        missing = [rank for rank in range(size) if rank not in there]
        return {"message": str(_absent(missing, hosts, layout, seconds)), "differ": False, "asked": []}
    rows = {rank: json.loads(row)["digests"] for rank, row in enumerate(store.multi_get(keys))}
    kinds: dict[str, list[int]] = {}
    for rank, row in rows.items():
        kinds.setdefault(json.dumps(row, sort_keys=True), []).append(rank)
    if len(kinds) == 1:
        return {"message": "", "differ": False, "asked": []}
    most, *others = sorted(kinds.values(), key=lambda ranks: (-len(ranks), ranks[0]))
    parts = [part for part in mine if any(row.get(part) != rows[most[0]].get(part) for row in rows.values())]
    asked = [most[0], *(ranks[0] for ranks in others[:KINDS])]
    return {"message": "", "differ": True, "asked": asked, "parts": parts, "kinds": [most, *others[:KINDS]]}


def _exchange_texts(
    store: Any, who: Identity, answer: dict[str, Any], mine: Fingerprint, size: int, layout: Layout
) -> dict[str, Any]:
    """Send this rank's texts if it is asked for them. Returns the answer with the message of rank 0."""
    if who.rank in answer["asked"]:
        _set(store, f"texts/{who.rank}", {part: dict(mine[part]) for part in answer["parts"] if part in mine})
    if who.rank != 0:
        if not _wait_for(store, ["message"], SLACK_S + BYE_S):
            raise EnvironmentProblem("ranks differ, and rank 0 has not said in what. Fix: read its log.")
        return {**answer, "message": _get(store, "message")}
    _wait_for(store, [f"texts/{rank}" for rank in answer["asked"]], BYE_S)
    texts = {rank: _get(store, f"texts/{rank}") for rank in answer["asked"] if store.check([f"texts/{rank}"])}
    hosts = {rank: _get(store, _hello(rank))["who"]["host"] for kind in answer["kinds"] for rank in kind[:NAMED]}
    message = describe_differences(answer["kinds"], texts, hosts, layout, size)
    _set(store, "message", message)
    return {**answer, "message": message}


def describe_differences(
    kinds: Sequence[Sequence[int]],
    texts: Mapping[int, Fingerprint],
    hosts: Mapping[int, str],
    layout: Layout,
    size: int,
) -> str:
    """Name the ranks that differ, and in which keys, a line for each kind. kinds: ranks that are alike, most first;
    texts: those of the first rank of each kind."""
    most, *others = kinds
    return "\n✗ ".join(_describe_difference(most, ranks, texts, hosts, layout, size) for ranks in others)


def _describe_difference(
    most: Sequence[int],
    ranks: Sequence[int],
    texts: Mapping[int, Fingerprint],
    hosts: Mapping[int, str],
    layout: Layout,
    size: int,
) -> str:
    who = format_ranks(ranks, {rank: hosts[rank] for rank in ranks if rank in hosts})
    place = f" ({layout.place(ranks[0])})" if len(ranks) == 1 and layout.world_size > ranks[0] else ""
    theirs, usual = texts.get(ranks[0], {}), texts.get(most[0], {})
    found = [
        (part, name, theirs.get(part, {}).get(name, "nothing"), usual.get(part, {}).get(name, "nothing"))
        for part in (*usual, *(part for part in theirs if part not in usual))
        for name in sorted({*theirs.get(part, {}), *usual.get(part, {})})
        if theirs.get(part, {}).get(name) != usual.get(part, {}).get(name)
    ]
    if not found:
        return f"{who}{place}: differs, and has not said in what. Fix: start all ranks with one command."
    same = f"as on {format_ranks(most, {}) if len(most) < 9 else f'the other {len(most)} ranks'}"
    if len(most) == len(ranks) and size == len(most) + len(ranks):
        same += " (as many as these: one of the two is wrong)"
    listed = ", ".join(f"{name} = {shown(own)}: expected {shown(usual)}" for _, name, own, usual in found[:NAMED])
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    return f"{who}{place}: {found[0][0]}: {listed}{more} {same}. Fix: {FIXES.get(found[0][0], FIXES['command'])}."


FIXES = {
    "layout": "start all ranks with one command, on machines with the same devices",
    "command": "start all ranks with one command",
    "config": "start all ranks with one command and one config file",
    "versions": "install the same versions on all machines, as from constraints.txt",
    "code": "run the same checkout on all machines",
    "corpus": "put the same files on all machines, or on a disk that they share",
    "environment": "set the variable alike on all machines",
}
"""The fix for ranks that differ in a part of their fingerprint."""


def _twice(store: Any, who: Identity) -> EnvironmentProblem:
    """The error for a second process of one rank. torch's elastic agent keeps its store when it starts the ranks
    anew because a node came or went, and does not count that as a restart, so that those before are still there."""
    fix = "give each process a rank of its own" + _of_agent_store()
    known = store.check([_hello(who.rank)])
    earlier = "process {pid} on {host}".format(**_get(store, _hello(who.rank))["who"]) if known else "another"
    return EnvironmentProblem(
        f"rank {who.rank} = process {who.pid} on {who.host}: expected one process of this rank, and {earlier} has "
        f"arrived before. Fix: {fix}."
    )


def _of_agent_store() -> str:
    """A further fix, if torch's elastic agent keeps one store over the starts of its ranks; else empty."""
    if not environment.uses_agent_store():
        return ""
    return (
        "; if torchrun has started the ranks anew because a node came or went, set "
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun on all nodes, and start the job again"
    )


def _absent(missing: Sequence[int], hosts: Mapping[int, str], layout: Layout, seconds: float) -> EnvironmentProblem:
    places = f" ({layout.place(missing[0])})" if len(missing) == 1 and layout.world_size > missing[0] else ""
    where = f", on {', '.join(sorted(set(hosts.values())))}" if hosts else ""
    return EnvironmentProblem(
        f"{format_ranks(missing, {})}{places}: did not arrive within {seconds:g} s, the other "
        f"{max(0, layout.world_size - len(missing))} did{where}. "
        "Fix: read the log of the missing, check that its host is up, or raise advanced.init_timeout_s"
        f"{_of_agent_store()}."
    )


def _leave(store: Any, rank: int, size: int) -> None:
    """Rank 0 leaves last, because the store may end with it."""
    store.set(f"bye/{rank}", b"-")
    if rank == 0:
        _wait_for(store, [f"bye/{other}" for other in range(size)], BYE_S)


def _hello(rank: int) -> str:
    return f"hello/{rank}"


def _set(store: Any, key: str, value: Any) -> None:
    store.set(key, json.dumps(value).encode())


def _get(store: Any, key: str) -> Any:
    return json.loads(store.get(key))


def _wait_for(store: Any, keys: Sequence[str], seconds: float) -> bool:
    """Look until the keys exist: a wait of torch's own that times out complains on stderr."""
    end, (pause, longest) = time.monotonic() + seconds, PAUSES_S
    while not store.check(list(keys)):
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(2 * pause, longest)
    return True
