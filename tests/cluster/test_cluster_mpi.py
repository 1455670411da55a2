"""Open MPI and MPICH of a distribution, over ssh to a second host: by hand as in README.md, and by `roots launch`.

pytest tests/cluster/test_cluster_mpi.py --cluster -s
"""

from __future__ import annotations

import signal

import pytest
from daemons import with_ssh
from namespaces import cluster
from trials import CONFIG, ROOTS, Trial, compared, hostfile, script, stopped_and_gone_on

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "mpirun.openmpi", "mpirun.mpich")
BY_HAND = {
    "openmpi": ("mpirun.openmpi", "--allow-run-as-root", "-x", "MASTER_ADDR=n1", "--host"),
    "mpich": ("mpirun.mpich", "-genv", "MASTER_ADDR", "n1", "-hosts"),
}
"""The last one takes a list such as n1:2,n2:2."""
AS_ROOT = {"openmpi": ("--extra=--allow-run-as-root",), "mpich": ()}
FLAVOURS = pytest.mark.parametrize("flavour", BY_HAND)


@pytest.fixture(scope="module")
def site():
    with cluster("n1", "n2") as site:
        with_ssh(site)
        yield site


@FLAVOURS
def test_mpirun_starts_the_ranks(site, tmp_path, expected, flavour):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    site["n1"].run(*BY_HAND[flavour], "n1:2,n2:2", *ROOTS, "train", *trial.words(), timeout=400)
    compared(trial, whole, f"mpirun of {flavour}")


@FLAVOURS
def test_the_script_of_launch_trains_on_the_hosts_of_a_hostfile(site, tmp_path, expected, flavour):
    """Which MPI it is the script asks of mpirun."""
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    extra = "--allow-run-as-root" if flavour == "openmpi" else ""
    settings = {"HOSTFILE": str(hostfile(tmp_path, "n1", "n2")), "MPIRUN": f"mpirun.{flavour}", "EXTRA": extra}
    site["n1"].run(script("mpi.sh"), *trial.words(), env=settings, timeout=400)
    trial.finished()
    compared(trial, whole, f"launch/mpi.sh, {flavour}")


@FLAVOURS
def test_launch_starts_mpirun(site, tmp_path, expected, flavour):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    where = ("--on", "mpi", "--program", f"mpirun.{flavour}", "--hostfile", hostfile(tmp_path, "n1", "n2"))
    done = site["n1"].run(*ROOTS, "launch", *trial.words(), *where, *AS_ROOT[flavour], timeout=400)
    compared(trial, whole, f"launch --on mpi, {flavour}")
    assert "\x1b[" not in done.stdout, "rank 0 draws a live line where there is no terminal"


@FLAVOURS
def test_mpirun_hands_a_signal_on_and_the_same_command_goes_on(site, tmp_path, expected, flavour):
    trial = Trial(tmp_path, steps=48, every=100)
    whole = expected(trial)
    trial.begin()
    where = ("--on", "mpi", "--program", f"mpirun.{flavour}", "--hostfile", hostfile(tmp_path, "n1", "n2"))
    words = (*ROOTS, "launch", *trial.words(), *where, *AS_ROOT[flavour])
    step = stopped_and_gone_on(trial, site, words, f"mpirun.{flavour} -n", signal.SIGUSR1)
    compared(
        trial,
        whole,
        f"{flavour}: SIGUSR1 to mpirun, stopped after step {step} of {trial.steps}, the same command again",
    )


@FLAVOURS
def test_doctor_flags_a_tensor_group_on_two_hosts(site, flavour):
    done = site["n1"].run(*BY_HAND[flavour], "n1:1,n2:3", *ROOTS, "doctor", CONFIG, "--quick", check=False, timeout=120)
    assert done.returncode == 1 and "a tensor group of TP2×PP2×DP1 across hosts" in done.stdout, (
        done.stdout + done.stderr
    )
