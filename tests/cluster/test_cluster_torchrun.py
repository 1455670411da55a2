"""torchrun with an agent on each of two hosts: an agent that is killed and started again, a host that loses its power.

pytest tests/cluster/test_cluster_torchrun.py --cluster -s
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from daemons import until
from namespaces import Site, cluster
from trials import CONFIG, ROOTS, Trial, compared, script

TWO_NODES = ("--on", "torchrun", "--nodes", "2", "--rdzv-endpoint", "n1:29400", "--max-restarts", "3")
GONE_S = 5
"""Workers whose agent was killed are gone by then. Seen: 0.1 s."""


@pytest.fixture
def site():
    with cluster("n1", "n2", "n3") as site:
        yield site


def test_two_agents_train_as_one_place_does(site, tmp_path, expected):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    first, second = (agent(site, host, trial) for host in ("n1", "n2"))
    assert (first.wait(400), second.wait(400)) == (0, 0), said(tmp_path)
    compared(trial, whole, "launch --on torchrun, two agents")


def test_the_script_of_launch_trains_on_two_hosts(site, tmp_path, expected):
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    settings = {"NODES": "2", "PROCESSES_PER_NODE": "2", "RDZV_ENDPOINT": "n1:29400", "LOGS": str(tmp_path / "logs")}
    agents = [
        site[host].start(script("torchrun.sh"), *trial.words(), log=tmp_path / f"{host}.log", env=settings)
        for host in ("n1", "n2")
    ]
    assert [agent.wait(400) for agent in agents] == [0, 0], said(tmp_path)
    trial.finished()
    compared(trial, whole, "launch/torchrun.sh, two agents")


def test_an_agent_that_was_killed_and_is_started_again_goes_on_from_the_last_checkpoint(site, tmp_path, expected):
    """And its ranks do not outlive it: they would go on writing into the run's folder, and hold GPUs."""
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    first, second = (agent(site, host, trial) for host in ("n1", "n2"))
    until(lambda: trial.step() >= 9, 300, "step 9")
    pids = site["n2"].processes("torch.distributed.run")
    assert len(pids) == 1, pids
    assert len(site["n2"].processes("roots_dist")) == 3  # the agent and its two ranks
    killed = time.monotonic()
    site["n2"].signal(signal.SIGKILL, *pids)
    until(lambda: not site["n2"].processes("roots_dist"), GONE_S, "ranks of the killed agent gone", every=0.05)
    gone = time.monotonic() - killed
    assert second.wait(10) == -signal.SIGKILL or second.returncode == 128 + signal.SIGKILL
    again(site, trial, "n2", first, tmp_path)
    compared(trial, whole, f"agent killed (its ranks gone after {gone:.1f} s) and started again")


def test_another_host_takes_the_place_of_one_that_lost_its_power(site, tmp_path, expected):
    """Nobody tells the first host: its ranks wait for the dead until another agent comes."""
    trial = Trial(tmp_path)
    whole = expected(trial)
    trial.begin()
    first, _ = (agent(site, host, trial) for host in ("n1", "n2"))
    until(lambda: trial.step() >= 9, 300, "step 9")
    site["n2"].power_off()
    took = again(site, trial, "n3", first, tmp_path)
    compared(trial, whole, f"power lost, another host in its place: next step after {took:.0f} s")


@pytest.mark.parametrize("here, there, found", [(2, 2, ""), (1, 3, "a tensor group of TP2×PP2×DP1 across hosts")])
def test_doctor_sees_a_tensor_group_on_two_hosts(site, tmp_path, here, there, found):
    def agent(host: str, ranks: int):
        words = ("--nnodes=2", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d", "--rdzv-endpoint=n1:29400")
        return site[host].start(
            "torchrun", *words, "-m", "roots_dist", "doctor", CONFIG, "--quick", log=tmp_path / f"{host}.log"
        )

    begun = [agent("n1", here), agent("n2", there)]
    for process in begun:
        process.wait(120)
    text = said(tmp_path)
    assert "4 ranks on 2 hosts" in text, text
    assert found in text if found else "tensor group" not in text, text


def agent(site: Site, host: str, trial: Trial):
    return site[host].start(*ROOTS, "launch", *trial.words(), *TWO_NODES, log=trial.folder / f"{host}.log")


def again(site: Site, trial: Trial, host: str, first, folder: Path) -> float:
    """Seconds from the start of an agent there to the next step. Until both agents are done."""
    at, begin = trial.step(), time.monotonic()
    second = agent(site, host, trial)
    until(lambda: trial.step() > at, 300, "the run goes on")
    took = time.monotonic() - begin
    assert (first.wait(400), second.wait(400)) == (0, 0), said(folder)
    assert "resumed after step 8" in said(folder)
    return took


def said(folder: Path) -> str:
    return "\n".join(path.read_text()[-6000:] for path in folder.glob("n?.log"))
