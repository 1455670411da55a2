"""Hosts and their slots: the hostfile that DeepSpeed and Open MPI read, and a choice among them.

hostfile --read--> hosts --choose(include, exclude)--> hosts --> deepspeed.py, mpi.py
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from roots_dist.files import why
from roots_dist.runs.launch.quoting import refused

NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,251}[A-Za-z0-9])?")
"""A host name or IPv4 address: nothing that a shell, ssh or a list of hosts would read as something else."""
SLOTS = re.compile(r"[1-9][0-9]{0,3}")


@dataclass(frozen=True)
class Host:
    name: str
    slots: tuple[int, ...]
    """The slots to use, one process each."""
    all_slots: int = 0
    """The number of slots in the hostfile."""


def read(path: Path) -> tuple[Host, ...]:
    """Read lines of `HOST slots=N`, where # begins a comment. Raises UserError with the number of any other line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise refused("--hostfile", str(path), f"a file that can be read ({why(error)})", "name another file") from None
    found: dict[str, Host] = {}
    for number, line in enumerate(text.split("\n"), 1):
        written = line.partition("#")[0].removesuffix("\r").strip(" \t")
        if not written:
            continue
        words = re.split(r"[ \t]+", written)
        name, rest = words[0], words[1:]
        slots = rest[0].removeprefix("slots=") if len(rest) == 1 and rest[0].startswith("slots=") else None
        where = f"{path}:{number}"
        if not NAME.fullmatch(name) or slots is None or not SLOTS.fullmatch(slots):
            raise refused(
                where,
                line,
                "HOST slots=N, with a host name or IPv4 address and 1 to 9999 slots",
                "write it in this form",
            )
        if name in found:
            raise refused(
                where, line, f"each host once, but {name} is in a line above too", "remove one of the two lines"
            )
        found[name] = Host(name, tuple(range(int(slots))), int(slots))
    if not found:
        raise refused("--hostfile", str(path), "at least one line HOST slots=N", "write the hosts into it")
    return tuple(found.values())


def choose(hosts: Sequence[Host], include: str | None, exclude: str | None) -> tuple[Host, ...]:
    """Choose hosts and slots as DeepSpeed does, by one of the two: `a@b:0,2` is all of a, and two slots of b."""
    if include and exclude:
        raise refused("--exclude", exclude, "only one of --include and --exclude", "remove one of the two")
    if include:
        wanted = _filter("--include", include, hosts)
        chosen = [replace(host, slots=wanted[host.name] or host.slots) for host in hosts if host.name in wanted]
    elif exclude:
        unwanted = _filter("--exclude", exclude, hosts)
        left = [(host, [s for s in host.slots if s not in (unwanted.get(host.name) or ())]) for host in hosts]
        chosen = [replace(host, slots=tuple(s)) for host, s in left if s and unwanted.get(host.name) != ()]
        if not chosen:
            raise refused("--exclude", exclude, "a choice that leaves at least one host", "exclude fewer hosts")
    else:
        chosen = list(hosts)
    return tuple(chosen)


def slots_of_each(hosts: Sequence[Host]) -> int:
    """Return how many slots each host has. Raises UserError if they differ: a layout needs as many on each."""
    counts = {host.name: len(host.slots) for host in hosts}
    if len({*counts.values()}) > 1:
        least, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        found = f"{least}: {counts[least]}, {most}: {counts[most]}"
        raise refused(
            "slots", found, "the same number of slots on each host", f"choose with --include, such as {most}:0"
        )
    return next(iter(counts.values()))


def slots_file(hosts: Iterable[tuple[str, int]]) -> str:
    """Write a hostfile of names and their numbers of slots."""
    return "".join(f"{name} slots={slots}\n" for name, slots in hosts)


def _filter(option: str, text: str, hosts: Sequence[Host]) -> dict[str, tuple[int, ...]]:
    """Map each host of a filter to its slots; none means all of them."""
    there = {host.name: host for host in hosts}
    found: dict[str, tuple[int, ...]] = {}
    for part in text.split("@"):
        name, colon, listed = part.partition(":")
        slots = listed.split(",") if colon else []
        if name not in there or not all(re.fullmatch(r"0|[1-9][0-9]{0,3}", slot) for slot in slots) or name in found:
            expected = f"HOST or HOST:0,1 joined by @, each host once, from {_some([*there])}"
            raise refused(option, text, expected, "write it in this form")
        numbers = tuple(sorted({int(slot) for slot in slots}))
        if numbers and numbers[-1] >= there[name].all_slots:
            expected = f"slots below {there[name].all_slots}, the number that {name} has"
            raise refused(option, text, expected, "choose others, or raise slots= in the hostfile")
        found[name] = numbers
    return found


def _some(names: Sequence[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
