"""Rendezvous of the ranks, step by step: its address, its port, and who listens there.

    MASTER_ADDR --resolve--> address --rank 0 listens, the others wait for it--> store
                                                           --> handshake.py, and runs/doctor/coordinator.py

torch does the same in one call, which hangs or fails minutes later with a page of C++ frames that names nobody.
"""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any

from roots_dist import environment
from roots_dist.environment import World
from roots_dist.errors import EnvironmentProblem
from roots_dist.files import why
from roots_dist.runs.ranks.deadline import DeadlineExceeded, run_with_deadline

RESOLVE_S = 10.0
HANDSHAKE_S = 5.0
KNOCK_S = 2.0
"""Seconds for one attempt to connect."""
PAUSE_S = 0.1
STORE_S = 30.0
"""Seconds for one request to the store."""


def rendezvous(world: World, wait_s: float, host: str, longer: str = "with --wait") -> Any:
    """Connect this rank to the world's store. Raises EnvironmentProblem that names what prevents it.

    Rank 0 listens, unless torch elastic's agent does. `host` is this machine's name and `longer` says how to wait
    longer, both for the message.
    """
    import torch.distributed as dist

    if world.size == 1:
        return dist.HashStore()
    me = f"rank {world.rank} (host {host})"
    resolve(world.master_addr, me)
    if world.rank == 0 and not environment.uses_agent_store():
        return _listen(world, me)
    wait_until_listening(world.master_addr, world.master_port, wait_s, me, longer)
    return _connect(world, me)


def resolve(address: str, me: str, seconds: float = RESOLVE_S) -> list[str]:
    """Numeric addresses of a name. Raises EnvironmentProblem if it is unknown or the name server does not answer in
    time."""
    try:
        found = run_with_deadline(seconds, lambda: socket.getaddrinfo(address, None, type=socket.SOCK_STREAM))
        return sorted({str(entry[4][0]) for entry in found})
    except (OSError, UnicodeError, DeadlineExceeded) as error:
        raise _problem(
            f"MASTER_ADDR = {address!r} on {me}",
            f"a name or number that this host can resolve ({why(error)})",
            "set it to rank 0's host as this one knows it (getent hosts NAME), or fix DNS or /etc/hosts here",
        ) from None


def wait_until_listening(address: str, port: int, seconds: float, me: str, longer: str = "with --wait") -> None:
    """Wait until a process listens there. Raises EnvironmentProblem if none does within `seconds`."""
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=KNOCK_S).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise _problem(
                    f"MASTER_ADDR:MASTER_PORT = {address}:{port} on {me}",
                    f"rank 0 listening there within {seconds:g} s ({why(error)})",
                    f"check that rank 0 runs on that host and no firewall is in between, or wait longer {longer}",
                ) from None
        time.sleep(PAUSE_S)


def _listen(world: World, me: str) -> Any:
    """Listen on MASTER_ADDR alone, so that an address of an inner network, or a firewall, fences the store. On every
    address only where other hosts could not reach that one: it is none of this host's (behind a service of Kubernetes),
    or a loopback address, as a host's own name often is."""
    from roots_dist.runs.ranks.loopback_store import listening_store

    address = resolve(world.master_addr, me)[0]
    if world.size > world.local_size and ipaddress.ip_address(address).is_loopback:
        return _store(world, listens=True)
    try:
        return listening_store(address, world.master_port, timedelta(seconds=STORE_S))
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            return _store(world, listens=True)
        if error.errno != errno.EADDRINUSE:
            raise
        raise _problem(
            f"MASTER_PORT = {world.master_port} on {me}",
            f"a free port, and {listener(world.master_port)} uses it",
            f"end that process, or choose another MASTER_PORT ({free_port()} is free there)",
        ) from None


def _connect(world: World, me: str) -> Any:
    """Connect on a thread: a foreign server that accepts and sends nothing blocks torch's client forever."""
    try:
        return run_with_deadline(HANDSHAKE_S, lambda: _store(world, listens=False))
    except (RuntimeError, DeadlineExceeded):
        raise _problem(
            f"MASTER_ADDR:MASTER_PORT = {world.master_addr}:{world.master_port} on {me}",
            "rank 0's store there, and another server answers",
            "end what listens on that port of that host, or choose another MASTER_PORT",
        ) from None


def _store(world: World, listens: bool) -> Any:
    import torch.distributed as dist

    patience = timedelta(seconds=STORE_S)
    return dist.TCPStore(world.master_addr, world.master_port, None, listens, patience, wait_for_workers=False)


def listener(port: int) -> str:
    """Process that listens on a port of this host, as far as this user may see."""
    import psutil

    with suppress(psutil.Error, OSError):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,) and connection.pid:
                return f"process {connection.pid} ({psutil.Process(connection.pid).name()})"
    return "another process"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def own_address(host: str) -> str | None:
    """Address that this host's own name resolves to; None if there is none. gloo tells the others to connect to it."""
    try:
        return socket.gethostbyname(host)
    except OSError:
        return None


def _problem(found: str, expected: str, fix: str) -> EnvironmentProblem:
    return EnvironmentProblem(f"{found}: expected {expected}. Fix: {fix}.")
