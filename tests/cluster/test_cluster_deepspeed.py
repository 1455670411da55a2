"""DeepSpeed's launcher with a hostfile of two hosts, over a real pdsh and sshd, and over Open MPI.

pytest tests/cluster/test_cluster_deepspeed.py --cluster -s
"""

from __future__ import annotations

import signal

import pytest
from daemons import with_ssh
from namespaces import cluster
from trials import ROOTS, Trial, compared, hostfile, script, stopped_and_gone_on

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh", "mpirun")


@pytest.fixture(scope="module")
def site():
    with cluster("n1", "n2") as site:
        with_ssh(site)
        yield site


def test_deepspeed_starts_the_ranks_of_a_hostfile(site, tmp_path, expected):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    hosts = hostfile(tmp_path, "n1", "n2")
    site["n1"].run("deepspeed", "--hostfile", hosts, "--module", "roots_dist", "train", *trial.words(), timeout=500)
    compared(trial, whole, "deepspeed, pdsh")


@pytest.mark.parametrize("runner, extra", [("pdsh", ""), ("openmpi", "--allow-run-as-root")])
def test_the_script_of_launch_trains_on_the_hosts_of_a_hostfile(site, tmp_path, expected, runner, extra):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    hosts = hostfile(tmp_path, "n1", "n2")
    settings = {"HOSTFILE": str(hosts), "RUNNER": runner, "EXTRA": extra, "LOGS": str(tmp_path / "logs")}
    site["n1"].run(script("deepspeed.sh"), *trial.words(), env=settings, timeout=500)
    trial.finished()
    compared(trial, whole, f"launch/deepspeed.sh, {runner}")


def test_the_script_of_launch_trains_on_this_host(site, tmp_path, expected):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    site["n1"].run(script("deepspeed.sh"), *trial.words(), env={"PROCESSES_PER_NODE": "4"}, timeout=500)
    trial.finished()
    compared(trial, whole, "launch/deepspeed.sh, one host")


def test_launch_starts_deepspeed(site, tmp_path, expected):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    where = ("--on", "deepspeed", "--hostfile", hostfile(tmp_path, "n1", "n2"))
    site["n1"].run(*ROOTS, "launch", *trial.words(), *where, timeout=500)
    compared(trial, whole, "launch --on deepspeed, pdsh")


def test_launch_starts_deepspeed_by_way_of_open_mpi(site, tmp_path, expected):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    where = ("--on", "deepspeed", "--runner", "openmpi", "--hostfile", hostfile(tmp_path, "n1", "n2"))
    site["n1"].run(*ROOTS, "launch", *trial.words(), *where, "--extra=--allow-run-as-root", timeout=500)
    compared(trial, whole, "launch --on deepspeed, openmpi")


def test_a_launcher_that_is_told_to_end_stops_the_ranks_with_a_checkpoint(site, tmp_path, expected):
    """It runs pkill on each host, which is a SIGTERM to the ranks; other signals would end it alone."""
    trial = Trial(tmp_path, steps=48, every=100)
    whole = expected(trial)
    trial.begin()
    words = (*ROOTS, "launch", *trial.words(), "--on", "deepspeed", "--hostfile", hostfile(tmp_path, "n1", "n2"))
    step = stopped_and_gone_on(trial, site, words, "deepspeed.launcher.runner", signal.SIGTERM)
    compared(trial, whole, f"SIGTERM to deepspeed, stopped after step {step} of {trial.steps}, the same command again")
