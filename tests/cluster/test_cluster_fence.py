"""The ranks of a run meet at a store that asks nobody for a name or a key: who reaches its port can read and write it.

pytest tests/cluster/test_cluster_fence.py --cluster -s
"""

from __future__ import annotations

import sys

import pytest
from daemons import until
from namespaces import INTERFACE, Host, cluster
from trials import ROOTS, Trial, compared

PROGRAMS = ("iptables",)
PORT = "29400"
STRANGER = f"""
from datetime import timedelta
from torch.distributed import TCPStore
store = TCPStore("n1", {PORT}, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=4))
store.set("from a stranger", "hello")
print(store.get("from a stranger").decode(), store.num_keys())
"""


@pytest.fixture
def site():
    with cluster("n1", "n2", "stranger") as site:
        yield site


def fence(host: Host, *friends: Host) -> None:
    """A fence: of what comes over the network, only what the run's own hosts send."""
    addresses = ",".join(friend.address for friend in friends)
    host.run("iptables", "-A", "INPUT", "-i", INTERFACE, "-s", addresses, "-j", "ACCEPT")
    host.run("iptables", "-A", "INPUT", "-i", INTERFACE, "-j", "DROP")


@pytest.mark.parametrize("fenced", [False, True])
def test_the_store_is_open_to_all_who_reach_it_and_a_fence_does_not_hinder_the_run(site, tmp_path, expected, fenced):
    trial = Trial(tmp_path)
    whole = expected(trial)
    if fenced:
        for name in ("n1", "n2"):
            fence(site[name], site["n1"], site["n2"])
    trial.begin()
    words = (*ROOTS, "launch", *trial.words(), "--on", "torchrun", "--nodes", "2", "--rdzv-endpoint", f"n1:{PORT}")
    agents = [site[name].start(*words, log=tmp_path / f"{name}.log") for name in ("n1", "n2")]
    until(lambda: trial.step() >= 2, 300, "step 2")
    done = site["stranger"].run(sys.executable, "-c", STRANGER, check=False, timeout=120)
    if fenced:
        assert done.returncode and "timed out" in done.stderr.lower(), done
    else:
        assert done.stdout.startswith("hello"), done
    assert [agent.wait(400) for agent in agents] == [0, 0]
    compared(trial, whole, "with a fence around its hosts" if fenced else "with a stranger at its store")
