"""A host whose own name leads to 127.0.1.1, as Debian's installer writes it: gloo would tell others to meet it there.

pytest tests/cluster/test_cluster_names.py --cluster -s
"""

from __future__ import annotations

import pytest
from namespaces import INTERFACE, Site, cluster
from trials import CONFIG, Trial, compared

AGENT = (
    "torchrun",
    "--nnodes=2",
    "--nproc-per-node=2",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=n1:29400",
    "-m",
    "roots_dist",
)
HOSTS = ("n1", "n2")


@pytest.fixture
def site():
    with cluster(*HOSTS) as site:
        for name, other in (HOSTS, HOSTS[::-1]):
            path = site.folder / f"hosts-{name}"
            path.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n{site[other].address} {other}\n")
            site[name].run("mount", "--bind", path, "/etc/hosts")
        yield site


def test_doctor_names_the_hosts(site, tmp_path):
    text, codes = agents(site, tmp_path, "doctor", CONFIG, "--quick")
    assert 0 not in codes and "127.0.1.1" in text and "GLOO_SOCKET_IFNAME" in text, text


def test_an_interface_that_is_named_mends_it(site, tmp_path, expected):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    text, codes = agents(site, tmp_path, "train", *trial.words(), env={"GLOO_SOCKET_IFNAME": INTERFACE})
    assert codes == [0, 0], text
    compared(trial, whole, "names that lead to 127.0.1.1, GLOO_SOCKET_IFNAME set")


def agents(site: Site, folder, *words: str, env=None) -> tuple[str, list[int]]:
    begun = [site[name].start(*AGENT, *words, log=folder / f"{name}.log", env=env) for name in HOSTS]
    codes = [process.wait(300) for process in begun]
    return "\n".join((folder / f"{name}.log").read_text() for name in HOSTS), codes
