"""Before the ranks know each other: an address, a port, a rank that is not there. Named in time, by a process that
ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from threading import Event

import pytest
from commands import roots

from roots_dist.environment import World
from roots_dist.errors import EnvironmentProblem
from roots_dist.runs.doctor import coordinator as coordinator
from roots_dist.runs.ranks import rendezvous as rendezvous
from roots_dist.runs.ranks.loopback_store import LoopbackRendezvous, listening_store


@contextmanager
def taken() -> Iterator[int]:
    """A port on which this process listens and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def world(rank: int, port: int, address: str = "127.0.0.1") -> World:
    return World(rank, 2, rank, 2, address, port, "test")


def doctor(rank: int, port: int, address: str = "127.0.0.1", *options: str) -> tuple[str, str, int]:
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    ran = roots("doctor", "--quick", *options, MASTER_ADDR=address, **place)
    return ran.stdout, ran.stderr, ran.returncode


def test_a_name_that_nothing_stands_for_is_said_with_the_rank_and_the_host():
    with pytest.raises(EnvironmentProblem) as found:
        rendezvous.rendezvous(world(1, 29500, "no-such-host.invalid"), 1, "b")
    assert str(found.value).startswith(
        "MASTER_ADDR = 'no-such-host.invalid' on rank 1 (host b): expected a name or number"
    )
    assert "Fix: set it to rank 0's host" in str(found.value)


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
    over = Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **more: over.wait())
    with pytest.raises(EnvironmentProblem, match="not done after 0.3 s"):
        rendezvous.resolve("slow.example", "rank 0 (host a)", seconds=0.3)
    over.set()


def test_the_process_that_has_the_port_is_named():
    with taken() as port, pytest.raises(EnvironmentProblem) as found:
        rendezvous.rendezvous(world(0, port), 1, "a")
    assert str(found.value).startswith(
        f"MASTER_PORT = {port} on rank 0 (host a): expected a free port, and process {os.getpid()}"
    )
    assert "choose another MASTER_PORT (" in str(found.value)


def test_nobody_at_the_meeting_point_is_named_as_rank_0():
    with pytest.raises(EnvironmentProblem, match=r"on rank 1 \(host b\): expected rank 0 listening there within 0.5 s"):
        rendezvous.rendezvous(world(1, rendezvous.free_port()), 0.5, "b")


def test_a_foreign_server_that_says_nothing_does_not_hold_a_rank(monkeypatch):
    monkeypatch.setattr(rendezvous, "HANDSHAKE_S", 0.5)
    with (
        taken() as port,
        pytest.raises(EnvironmentProblem, match="expected rank 0's store there, and another server answers"),
    ):
        rendezvous.rendezvous(world(1, port), 5, "b")


def test_one_rank_alone_needs_no_meeting_point():
    store = rendezvous.rendezvous(World(0, 1, 0, 1, "nowhere.invalid", 0, "none"), 1, "a")
    store.set("x", b"1")
    assert store.get("x") == b"1"


def test_the_command_names_what_keeps_ranks_apart_and_ends_in_time():
    with taken() as port, socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody else gets it, and it does not listen
        free = held.getsockname()[1]
        found = {
            "port": doctor(0, port),
            "address": doctor(1, free, "no-such-host.invalid"),
            "no rank 0": doctor(1, free, "127.0.0.1", "--wait", "2"),
            "no rank 1": doctor(0, rendezvous.free_port(), "127.0.0.1", "--wait", "2"),
        }
    assert {name: code for name, (*_, code) in found.items()} == {
        "port": 2,
        "address": 2,
        "no rank 0": 2,
        "no rank 1": 1,
    }
    assert f"✗ MASTER_PORT = {port} on rank 0" in found["port"][1]
    assert "✗ MASTER_ADDR = 'no-such-host.invalid' on rank 1" in found["address"][1]
    assert "expected rank 0 listening there within 2 s" in found["no rank 0"][1]
    assert "✗ rank 1: did not arrive, expected an answer within 7 s." in found["no rank 1"][0]
    assert not any("Traceback" in err or "frame #" in err for _, err, _ in found.values())


def test_a_rank_that_falls_silent_is_named_by_rank_0_and_rank_0_by_the_others(monkeypatch):
    import torch.distributed as dist

    monkeypatch.setattr(coordinator, "SLACK_S", 0.2)
    store = dist.HashStore()
    first = coordinator.Coordinator(store, 0, 3)
    first.hosts = {0: "a", 1: "a", 2: "b"}
    store.set("links/1", b'{"error": "RuntimeError: connection reset by peer"}')
    with pytest.raises(coordinator.RoundStopped):
        first.run_round("links", 0.3, lambda: 7, fix="look at the network")
    assert first.answers == {"links": {0: 7}} and store.get("links/word") == b'"stop"'
    assert [str(finding) for finding in first.findings] == [
        (
            "✗ rank 2 (host b): no answer in round links, expected an answer within 0.5 s. Fix: read that rank's "
            "log, and check that its host is up."
        ),
        (
            "✗ rank 1 (host a): links: RuntimeError: connection reset by peer, expected no error. Fix: look at "
            "the network."
        ),
    ]
    with pytest.raises(coordinator.RoundStopped):
        coordinator.Coordinator(store, 2, 3).run_round("links", 0.3, lambda: 7)
    with pytest.raises(
        EnvironmentProblem, match="rank 0 = silent: expected its answer in round speed, within 0.7 s. Fix: read"
    ):
        coordinator.Coordinator(store, 1, 3).run_round("speed", 0.3, lambda: 7)


def test_the_store_listens_on_the_one_address_that_it_was_given():
    """torch's listens on every address of the machine."""
    import os

    import psutil

    before = {c.laddr for c in psutil.Process(os.getpid()).net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    handler = LoopbackRendezvous("a run")
    store, found = handler.next_rendezvous().store, set()
    for connection in psutil.Process(os.getpid()).net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr not in before:
            found.add(tuple(connection.laddr))
    assert found == {("127.0.0.1", store.port)}
    with pytest.raises(OSError, match="in use"):
        listening_store("127.0.0.1", store.port, timedelta(seconds=1))
