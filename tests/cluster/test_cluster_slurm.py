"""A real Slurm of three node daemons: a job that is told before its time is over, keeps what it has, and queues itself
again.

pytest tests/cluster/test_cluster_slurm.py --cluster -s
"""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest
from daemons import until, with_slurm
from namespaces import Site, cluster
from trials import CONFIG, ROOTS, Trial, compared, script

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol", "munged")
OVER = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
NODES = ("n1", "n2", "n3")
GRACE_S = 60
AT_LEAST_S = 35
"""The least time left. Slurm looks every 30 s whether a job is to be told, and tells it up to 30 s early."""


@pytest.fixture(scope="module")
def site():
    with cluster("head", *NODES) as site:
        with_slurm(site, "head", NODES)
        yield site


def test_a_job_is_told_before_its_time_is_over_and_goes_on_when_it_has_been_queued_again(site, tmp_path, expected):
    """Its limit is lowered while it trains: how long it takes to begin differs too much between machines."""
    trial = Trial(tmp_path, steps=160, every=40)
    whole = expected(trial)
    trial.begin()
    job = submitted(site, trial)
    until(lambda: trial.step() >= 12, 300, "step 12")
    limit(site, job, minutes=math.ceil((ran(site, job) + AT_LEAST_S) / 60))
    until(lambda: about(site, job, "Restarts") == "1", 240, "queued again", every=1)
    stopped = trial.step()
    limit(site, job, minutes=30)
    until(lambda: about(site, job, "JobState") in OVER, 600, "the job over", every=1)
    output = "".join(path.read_text() for path in sorted((trial.run / "launch" / "logs").glob("*.log")))
    assert about(site, job, "JobState") == "COMPLETED", output[-6000:]
    assert f"stopped by SIGUSR1 after step {stopped}" in output and f"resumed after step {stopped}" in output, output[
        -6000:
    ]
    compared(trial, whole, f"launch --on slurm, stopped after step {stopped} of {trial.steps} and queued again")


def test_the_next_job_of_an_array_goes_on(site, tmp_path, expected):
    trial = Trial(tmp_path, steps=48, every=100)
    whole = expected(trial)
    trial.begin()
    job = submitted(site, trial, "--array", "2")
    until(lambda: trial.step() >= 9, 300, "step 9")
    site["head"].run("scancel", "--signal=USR1", "--batch", f"{job}_1")
    until(lambda: trial.ended().startswith("stopped by SIGUSR1"), 120, "the first stopped")
    step = trial.step()
    until(lambda: trial.ended().startswith("finished"), 300, "the second finished")
    compared(trial, whole, f"--array 2: the first job stopped after step {step} of {trial.steps}")


def test_a_job_that_is_cancelled_leaves_a_checkpoint(site, tmp_path, expected):
    trial = Trial(tmp_path, steps=48, every=100)
    whole = expected(trial)
    trial.begin()
    job = submitted(site, trial)
    until(lambda: trial.step() >= 9, 300, "step 9")
    site["head"].run("scancel", job)
    until(lambda: about(site, job, "JobState") == "CANCELLED" and ranks(site) == 0, 120, "the job gone", every=1)
    step = trial.step()
    assert trial.ended() == f"stopped by SIGTERM after step {step}"
    again = submitted(site, trial)
    until(lambda: about(site, again, "JobState") in OVER, 300, "the job over", every=1)
    compared(trial, whole, f"scancel after step {step} of {trial.steps}, the same command again")


def test_a_sick_node_is_left_out_for_a_spare_one(site, tmp_path, expected):
    """The first of three has a Python that does not work."""
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    python = Path(sys.executable).resolve()
    site["n1"].run("mount", "--bind", "/bin/false", python)
    try:
        job = submitted(site, trial, "--spare", "1")
        until(lambda: about(site, job, "JobState") in OVER, 400, "the job over", every=1)
    finally:
        site["n1"].run("umount", python)
    logs = trial.run / "launch" / "logs"
    assert "n1 is left out" in (logs / f"slurm-{job}.log").read_text()
    assert (
        (logs / f"{job}-n2.log").exists()
        and (logs / f"{job}-n3.log").exists()
        and not (logs / f"{job}-n1.log").exists()
    )
    compared(trial, whole, "--spare 1, n1 sick: on n2 and n3")


def test_the_script_of_launch_is_signaled_requeued_and_finishes(site, tmp_path, expected):
    """Submitted without our tool; where the run lies it asks of the config."""
    trial = Trial(tmp_path, steps=48, every=100)
    whole = expected(trial)
    trial.begin()
    options = ("--nodes=2", "--time=30", f"--signal=B:USR1@{GRACE_S}", f"--output={tmp_path}/slurm-%j.log")
    settings = {"PROCESSES_PER_NODE": "2", "LOGS": str(tmp_path / "logs")}
    said = site["head"].run("sbatch", *options, script("slurm.sh"), *trial.words(), env=settings).stdout
    job = re.search(r"Submitted batch job (\d+)", said)[1]
    until(lambda: trial.step() >= 9, 300, "step 9")
    site["head"].run("scancel", "--signal=USR1", "--batch", job)
    until(lambda: about(site, job, "Restarts") == "1", 240, "queued again", every=1)
    step = trial.step()
    until(lambda: about(site, job, "JobState") in OVER, 400, "the job over", every=1)
    output = "".join(path.read_text() for path in sorted(tmp_path.rglob("*.log")))
    assert about(site, job, "JobState") == "COMPLETED", output[-6000:]
    assert f"stopped by SIGUSR1 after step {step}" in output and f"resumed after step {step}" in output, output[-6000:]
    assert {path.name for path in (tmp_path / "logs").iterdir()} == {f"{job}-n1.log", f"{job}-n2.log"}
    trial.finished()
    compared(trial, whole, f"sbatch launch/slurm.sh, stopped after step {step} of {trial.steps} and queued again")


def test_srun_alone_starts_the_ranks(site, tmp_path, expected):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    site["head"].run("srun", "--nodes=2", "--ntasks-per-node=2", *ROOTS, "train", *trial.words(), timeout=400)
    compared(trial, whole, "srun")


@pytest.mark.parametrize(
    "tasks, found",
    [("--ntasks-per-node=2", ""), ("--distribution=cyclic", "a tensor group of TP2×PP2×DP1 across hosts")],
)
def test_doctor_sees_how_srun_places_tensor_groups(site, tasks, found):
    """Cyclic puts ranks 0 and 2 on the first node, and so each tensor group on both."""
    words = ("srun", "--nodes=2", "--ntasks=4", tasks, *ROOTS, "doctor", CONFIG, "--quick")
    done = site["head"].run(*words, check=False, timeout=120)
    assert "4 ranks on 2 hosts" in done.stdout and "started by Slurm" in done.stdout, done.stdout + done.stderr
    assert found in done.stdout if found else "tensor group" not in done.stdout, done.stdout


def submitted(site: Site, trial: Trial, *more: str) -> str:
    """The number of a job of two nodes that has been submitted."""
    where = ("--on", "slurm", "--nodes", "2", "--time", "00:30:00", "--grace", str(GRACE_S))
    said = site["head"].run(*ROOTS, "launch", *trial.words(), *where, *more).stdout
    return re.search(r"Submitted batch job (\d+)", said)[1]


def ranks(site: Site) -> int:
    return sum(len(site[node].processes("-m roots_dist train")) for node in NODES)


def about(site: Site, job: str, key: str) -> str:
    return re.search(rf"\b{key}=(\S+)", site["head"].run("scontrol", "show", "job", job).stdout)[1]


def ran(site: Site, job: str) -> int:
    """Seconds since it began."""
    hours, minutes, seconds = about(site, job, "RunTime").split(":")
    return 3600 * int(hours) + 60 * int(minutes) + int(seconds)


def limit(site: Site, job: str, minutes: int) -> None:
    site["head"].run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
