"""The hosts that all other trials stand on: what they share, what they do not, and that nothing of them is left."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

from daemons import until, with_ssh
from namespaces import INTERFACE, cluster

PROGRAMS = ("sshd", "ssh", "ssh-keygen")
HERE = Path(__file__).parent
HOLDS_A_CLUSTER = """
import sys, time
sys.path.insert(0, {here!r})
from namespaces import cluster
with cluster("n1", "n2") as site:
    site["n1"].start("sleep", {mark!r}, log=site.folder / "log")
    print(site.folder, flush=True)
    time.sleep(600)
"""


def test_a_host_has_a_name_an_address_processes_and_a_network_of_its_own():
    with cluster("n1", "n2") as site:
        assert [site[name].run("hostname").stdout.strip() for name in ("n1", "n2")] == ["n1", "n2"]
        assert "10.77.0.1/24" in site["n1"].run("ip", "-br", "addr", "show", INTERFACE).stdout
        site["n1"].run("ping", "-c", "1", "-W", "2", "n2")
        site["n2"].start("sleep", "300.25", log=site.folder / "log")
        until(lambda: site["n2"].processes("sleep 300.25"), 5, "sleep")
        assert not site["n1"].processes("sleep 300.25")
        site["n1"].run("touch", "/run/mine")
        assert site["n2"].run("test", "-e", "/run/mine", check=False).returncode == 1
    assert not _anywhere("sleep 300.25")
    assert "10.77.0" not in subprocess.run(["ip", "addr"], capture_output=True, text=True).stdout


def test_a_host_is_reached_by_ssh_with_the_key_of_the_site_alone():
    with cluster("n1", "n2") as site:
        with_ssh(site)
        assert site["n1"].run("ssh", "n2", "hostname").stdout == "n2\n"
        refused = site["n1"].run("ssh", "-o", "PubkeyAuthentication=no", "n2", "hostname", check=False)
        assert refused.returncode == 255 and "Permission denied" in refused.stderr


def test_a_host_without_power_answers_nobody_and_says_no_goodbye():
    with cluster("n1", "n2") as site:
        with_ssh(site)
        site["n2"].power_off()
        begin = time.monotonic()
        done = site["n1"].run("ssh", "-o", "ConnectTimeout=2", "n2", "hostname", check=False)
        assert done.returncode == 255 and any(said in done.stderr for said in ("timed out", "No route to host"))
        assert time.monotonic() - begin < 10


def test_nothing_is_left_of_hosts_whose_program_is_killed():
    for number in (signal.SIGINT, signal.SIGKILL):
        mark = f"{300 + number}.125"
        words = [sys.executable, "-c", HOLDS_A_CLUSTER.format(here=str(HERE), mark=mark)]
        program = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        folder = Path(program.stdout.readline().strip())
        until(lambda mark=mark: _anywhere(f"sleep {mark}"), 10, "sleep")
        program.send_signal(number)
        program.wait(20)
        until(lambda mark=mark: not _anywhere(f"sleep {mark}"), 10, "its processes gone")
        assert folder.exists() == (number == signal.SIGKILL)  # nobody can tidy up after that
        subprocess.run(["rm", "-rf", folder], check=True)


def _anywhere(words: str) -> bool:
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.splitlines()
    return any(line.endswith(words) for line in listed)
