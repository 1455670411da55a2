"""A cluster on one machine: hosts that are namespaces of the kernel, with names and addresses of their own, on one
bridge.

    with cluster("head", "n1", "n2") as site: site["n1"].run("hostname")     daemons.py gives them sshd, munge and Slurm

A host is a process number 1 that waits for the end of a pipe which only this program holds. However this program ends,
the pipe closes, number 1 goes, and with it the kernel ends every process of the host and takes its network away:
nothing is left, nothing has a name outside. What hosts share is the file system, but for /etc/hosts, /run, /dev/shm and
the folders of etc/. Linux, root, util-linux and iproute2; the standard library alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NETWORK = "10.77.0"
INTERFACE = "net0"
"""Not eth0, which some launchers take for granted."""
BOUND = ("ssh", "munge", "slurm")
"""Folders of /etc that a host has for itself, where the system has them at all."""
SPACES = ("--net", "--uts", "--mount", "--pid")


@dataclass(frozen=True)
class Host:
    """Commands run as root, in the checkout, in an environment that holds nothing but PATH, HOME, LANG and what is
    given."""

    name: str
    address: str
    etc: Path
    """What this host sees under /etc/ssh, /etc/munge and /etc/slurm."""
    holder: subprocess.Popen
    pid: int
    """Process number 1 of the host, seen from outside."""

    def words(self, *command: object) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *SPACES, f"--wd={ROOT}", *map(str, command)]

    def run(self, *command: object, timeout: float = 60, env: Mapping[str, str] | None = None, check: bool = True):
        done = subprocess.run(
            self.words(*command),
            env=environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode:
            said = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            raise RuntimeError(f"{self.name}: {command} ended with {done.returncode}\n{said}")
        return done

    def start(self, *command: object, log: Path, env: Mapping[str, str] | None = None) -> subprocess.Popen:
        """Start it, with what it says going into `log`. To signal it, use `signal`: this is nsenter, its parent."""
        words, both = self.words(*command), subprocess.STDOUT
        with log.open("ab") as file:
            return subprocess.Popen(words, env=environment(env), stdin=subprocess.DEVNULL, stdout=file, stderr=both)

    def processes(self, *words: str) -> dict[int, str]:
        """Process number (on this host) -> command line, of those that have all the words in it and are no zombies."""
        listed = self.run("ps", "-e", "-o", "pid=,stat=,args=").stdout.splitlines()
        rows = [line.split(None, 2) for line in listed]
        alive = {int(row[0]): row[2] for row in rows if len(row) == 3 and not row[1].startswith("Z")}
        return {pid: args for pid, args in alive.items() if all(word in args for word in words)}

    def signal(self, number: int, *pids: int) -> None:
        self.run("kill", f"-{int(number)}", *pids, check=False)

    def power_off(self) -> None:
        """As a node that loses its power: the network goes first, so that no peer is told anything."""
        self.run("ip", "link", "set", INTERFACE, "down")
        self.holder.kill()  # --kill-child: number 1 goes with it
        self.holder.wait()


@dataclass(frozen=True)
class Site:
    folder: Path
    """Logs, keys and configuration. Removed in the end."""
    hosts: dict[str, Host] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Host:
        return self.hosts[name]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    return {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1", **(more or {})}


def lacking(*programs: str) -> str | None:
    """Why a cluster cannot be made here, or None."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "hosts are network namespaces, which take Linux and root"
    path = environment()["PATH"]
    needed = ("unshare", "nsenter", "ip", "hostname", "ps", *programs)
    missing = [name for name in needed if shutil.which(name, path=path) is None]
    return f"not installed: {', '.join(missing)} (docs/clusters.md says which packages)" if missing else None


@contextmanager
def cluster(*names: str) -> Iterator[Site]:
    """Hosts at 10.77.0.1, 10.77.0.2, … that know each other by name. Gone afterwards, whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix="roots-site-"))
    site, holders = Site(folder), []
    try:
        switch = _born(holders)
        _ip(switch, "link", "add", "bridge", "type", "bridge")
        _ip(switch, "link", "set", "bridge", "up")
        known = "".join(f"{_address(i)} {name}\n" for i, name in enumerate(names))
        (folder / "hosts").write_text("127.0.0.1 localhost\n" + known)
        for i, name in enumerate(names):
            pid = _born(holders)
            host = Host(name, _address(i), folder / name / "etc", holders[-1], pid)
            _cable(switch, host)
            _furnish(host, folder / "hosts")
            site.hosts[name] = host
        yield site
    finally:
        for holder in holders:
            holder.stdin.close()
        for holder in holders:
            try:
                holder.wait(timeout=10)
            except subprocess.TimeoutExpired:
                holder.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _address(i: int) -> str:
    return f"{NETWORK}.{i + 1}"


def _born(holders: list[subprocess.Popen]) -> int:
    """New namespaces; the number of their first process, which bash makes one that buries orphans."""
    command = ["unshare", *SPACES, "--fork", "--kill-child", "--mount-proc", "bash", "-c", "echo here; read -r _"]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    holders.append(holder)
    assert holder.stdout.readline() == "here\n", (
        "the kernel gives no namespaces: is this a container without CAP_SYS_ADMIN?"
    )
    return int(Path(f"/proc/{holder.pid}/task/{holder.pid}/children").read_text())


def _ip(pid: int, *words: str) -> None:
    """Run `ip` in that process's network, but seen from outside, so that others can be named by their numbers."""
    subprocess.run(["nsenter", "--target", str(pid), "--net", "ip", *words], check=True)


def _cable(switch: int, host: Host) -> None:
    _ip(switch, "link", "add", host.name, "type", "veth", "peer", "name", INTERFACE, "netns", str(host.pid))
    _ip(switch, "link", "set", host.name, "master", "bridge", "up")
    _ip(host.pid, "addr", "add", f"{host.address}/24", "dev", INTERFACE)
    _ip(host.pid, "link", "set", INTERFACE, "up")
    _ip(host.pid, "link", "set", "lo", "up")


def _furnish(host: Host, hosts: Path) -> None:
    """A name, a list of names, and places that are this host's alone."""
    host.run("hostname", host.name)
    host.run("mount", "--bind", hosts, "/etc/hosts")
    for place in ("/run", "/dev/shm"):
        host.run("mount", "-t", "tmpfs", "tmpfs", place)
    for name in BOUND:
        (host.etc / name).mkdir(parents=True)
        if Path("/etc", name).is_dir():
            host.run("mount", "--bind", host.etc / name, Path("/etc", name))
