"""What a site runs on its hosts: sshd with keys of its own, munge, and Slurm with a controller and a daemon per node.

    namespaces.cluster --with_ssh, with_slurm--> `ssh n2`, `pdsh`, `mpirun`, `sbatch` work on every host

All configuration lies in folders that are bound over /etc/ssh, /etc/munge and /etc/slurm of these hosts; the machine's
own is neither read nor changed.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from namespaces import Site

SSH_CLIENT = """\
Host *
    IdentityFile /etc/ssh/user_key
    IdentitiesOnly yes
    GlobalKnownHostsFile /etc/ssh/known_hosts
    UserKnownHostsFile none
    StrictHostKeyChecking yes
    LogLevel ERROR
"""
SSH_SERVER = """\
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
PidFile /run/sshd.pid
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
MaxStartups 100
"""
SLURM = """\
ClusterName=trial
SlurmctldHost={head}
SlurmUser=root
# A job that requeues itself waits for as long as a credential lives: 120 s, if nobody says otherwise.
AuthInfo=cred_expire=5
JobRequeue=1
ReturnToService=2
SchedulerParameters=batch_sched_delay=0,bf_interval=5
KillWait=30
StateSaveLocation=/run/slurmctld
SlurmdSpoolDir=/run/slurmd
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
NodeName={nodes} CPUs={cpus} State=UNKNOWN
PartitionName=trial Nodes={nodes} Default=YES MaxTime=INFINITE State=UP
"""


def with_ssh(site: Site) -> None:
    """Every host answers at port 22, to one key that every host has."""
    keys = site.folder / "keys"
    keys.mkdir()
    for name in ("user_key", "host_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / name], check=True)
    host_key = (keys / "host_key.pub").read_text()
    known = "".join(f"{host.name},{host.address} {host_key}" for host in site.hosts.values())
    for host in site.hosts.values():
        etc = host.etc / "ssh"
        for name in ("user_key", "host_key"):
            _write(etc / name, (keys / name).read_text(), 0o600)
        _write(etc / "authorized_keys", (keys / "user_key.pub").read_text(), 0o600)
        _write(etc / "known_hosts", known)
        _write(etc / "ssh_config", SSH_CLIENT)
        _write(etc / "sshd_config", SSH_SERVER)
        host.run("mkdir", "-p", "/run/sshd")
        host.run("/usr/sbin/sshd")


def with_slurm(site: Site, head: str, nodes: Sequence[str], cpus: int = 2) -> None:
    """A controller on `head`, which computes nothing, and a daemon on each of `nodes`. Ready when all are idle."""
    key = os.urandom(128)
    for host in site.hosts.values():
        (host.etc / "munge" / "munge.key").write_bytes(key)
        (host.etc / "munge" / "munge.key").chmod(0o400)
        _write(host.etc / "slurm" / "slurm.conf", SLURM.format(head=head, nodes=",".join(nodes), cpus=cpus))
        host.run("mkdir", "-p", "/run/munge", "/run/slurmd", "/run/slurmctld")
        places = ("--pid-file=/run/munge/munged.pid", "--log-file=/run/munge/munged.log", "--seed-file=/run/munge/seed")
        host.run("munged", "--key-file=/etc/munge/munge.key", *places)
    site[head].run("slurmctld", "-c", "-L", site.folder / "slurmctld.log")
    for node in nodes:
        site[node].run("slurmd", "-N", node, "-L", site.folder / f"slurmd-{node}.log")
    idle = f"idle {len(nodes)}\n"
    until(lambda: site[head].run("sinfo", "-h", "-o", "%T %D", check=False).stdout == idle, 30, "all nodes idle")


def until(true: Callable[[], object], seconds: float, what: str, every: float = 0.2):
    """What `true` says, as soon as it is something."""
    deadline = time.monotonic() + seconds
    while not (said := true()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not after {seconds:.0f} s")
        time.sleep(every)
    return said


def _write(path: Path, text: str, mode: int = 0o644) -> None:
    path.write_text(text)
    path.chmod(mode)
