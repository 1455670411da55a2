"""The store of torch elastic and of its ranks on one machine, which listens on the loopback address and nowhere else.

torch's own rendezvous listens on every address of the machine: whoever reaches its port may read and write there.
"""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

BACKEND, ADDRESS = "roots", "127.0.0.1"


def listening_store(address: str, port: int, patience: timedelta) -> Any:
    """A store that listens on this address alone. Raises OSError if the address is not this host's, or the port is
    taken."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((address, port))
        bound.listen(1024)
        port = bound.getsockname()[1]
        return TCPStore(address, port, None, True, patience, wait_for_workers=False, master_listen_fd=bound.detach())


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single agent: nobody is to be waited for. torch asks for a class."""

    def __init__(self, run_id: str):
        self._run_id, self._store = run_id, listening_store(ADDRESS, 0, timedelta(seconds=60))

    def get_backend(self) -> str:
        return BACKEND

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        meeting = RendezvousStoreInfo(ADDRESS, self._store.port)
        return RendezvousInfo(self._store, 0, 1, meeting)

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id)


def register() -> None:
    """Let torch elastic know BACKEND."""
    rendezvous_handler_registry.register(BACKEND, _make)
