"""Each launcher's variables, as it really sets them, and every way in which they can contradict each other."""

from __future__ import annotations

import os
import sys
from types import SimpleNamespace

import pytest

from roots_dist import environment
from roots_dist.environment import discover, let_threads_sleep
from roots_dist.errors import EnvironmentProblem
from roots_dist.slurm import first_host, tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "n01",
    "MASTER_PORT": "29400",
}
DEEPSPEED = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "4", "CROSS_RANK": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[03-05],big1",
    "SLURM_JOB_ID": "123456",
}


@pytest.mark.parametrize(
    "variables, expected",
    [
        (TORCHRUN, (5, 8, 1, 4, "n01", 29400)),
        (DEEPSPEED, (5, 8, 1, 4, "n01", 29400)),
        (OPEN_MPI, (1, 2, 1, 2, "127.0.0.1", 29500)),
        (MPICH, (1, 2, 1, 2, "127.0.0.1", 29500)),
        ({"PMI_RANK": "1", "PMI_SIZE": "2"}, (1, 2, 1, 2, "127.0.0.1", 29500)),
        (SLURM, (5, 7, 1, 2, "gpu03", 20000 + 123456 % 20000)),
        (SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}, (5, 7, 1, 2, "10.0.0.1", 1234)),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "MASTER_ADDR": "x"}, (1, 2, 1, 2, "x", 29500)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, (0, 1, 0, 1, "127.0.0.1", 29500)),
    ],
)
def test_a_launchers_variables_are_understood(variables, expected):
    world = discover(variables)
    assert world is not None
    assert (
        world.rank,
        world.size,
        world.local_rank,
        world.local_size,
        world.master_addr,
        world.master_port,
    ) == expected


def test_torchrun_inside_srun_wins_since_slurm_then_counts_nodes():
    world = discover(SLURM | TORCHRUN)
    assert world is not None and world.launcher == "torchrun or deepspeed" and world.rank == 5


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"PATH": "/bin", "MASTER_ADDR": "n01"},
        {k: v for k, v in SLURM.items() if k != "SLURM_STEP_ID"},  # a batch script
        SLURM | {"SLURM_PTY_PORT": "5000"},  # srun --pty bash
        {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"},  # salloc
    ],
)
def test_bare_is_none(variables):
    assert discover(variables) is None


@pytest.mark.parametrize(
    "variables, named",
    [
        (TORCHRUN | {"RANK": "8"}, "RANK = 8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK = '-1'"),
        (TORCHRUN | {"RANK": ""}, "RANK = ''"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "WORLD_SIZE"),
        (TORCHRUN | {"WORLD_SIZE": "eight"}, "WORLD_SIZE"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK = 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE = 9"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT"),
        (TORCHRUN | {"MASTER_PORT": "x"}, "MASTER_PORT"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_ADDR"}, "MASTER_ADDR is not set"),
        ({k: v for k, v in TORCHRUN.items() if k != "MASTER_PORT"}, "MASTER_PORT is not set"),
        ({k: v for k, v in TORCHRUN.items() if k != "WORLD_SIZE"}, "WORLD_SIZE is not set"),
        ({k: v for k, v in TORCHRUN.items() if k != "LOCAL_RANK"}, "LOCAL_RANK is not set"),
        ({k: v for k, v in OPEN_MPI.items() if k != "OMPI_COMM_WORLD_SIZE"}, "OMPI_COMM_WORLD_SIZE is not set"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "2"}, "OMPI_COMM_WORLD_RANK = 2"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "SLURM_TASKS_PER_NODE = many"),
        (SLURM | {"SLURM_LOCALID": "3"}, "SLURM_LOCALID = 3"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"}, "SLURM_JOB_NODELIST is not set"),
    ],
)
def test_a_contradiction_is_refused_by_name_with_a_remedy(variables, named):
    with pytest.raises(EnvironmentProblem) as caught:
        discover(variables)
    assert named in str(caught.value) and "expected" in str(caught.value) and "Fix: " in str(caught.value)


def test_an_mpi4py_of_another_mpi_than_mpiruns_is_named(monkeypatch):
    """Each process is a world of one for it: what rank 0 broadcasts reaches nobody."""
    world = SimpleNamespace(Get_rank=lambda: 0, Get_size=lambda: 1)
    mpi = SimpleNamespace(COMM_WORLD=world, Get_library_version=lambda: "Open MPI v4.1.4, package: Debian\0")
    monkeypatch.setitem(sys.modules, "mpi4py", SimpleNamespace(MPI=mpi))
    with pytest.raises(EnvironmentProblem) as caught:
        discover(MPICH | {"PMI_SIZE": "4"})
    assert "mpi4py uses Open MPI v4.1.4 and knows 1 of the 4 processes" in str(caught.value)
    assert "Fix: set MASTER_ADDR to the first machine" in str(caught.value)


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("n1", "n1"),
        ("n[01-03,07],gpu5", "n01"),
        ("gpu5,n[01-03]", "gpu5"),
        ("r[1-2]n[3-4]", "r1n3"),
        ("rack-[007]-a,x", "rack-007-a"),
        ("a,b,c", "a"),
    ],
)
def test_first_host_of_slurms_short_form(nodelist, host):
    assert first_host(nodelist) == host


@pytest.mark.parametrize(
    "said, wanted",
    [({}, "10000"), ({"GOMP_SPINCOUNT": "5"}, "5"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["nothing", "a number", "a policy"],
)
def test_threads_wait_awake_for_a_short_time_unless_a_user_says_how(said, wanted, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
        if name in said:
            monkeypatch.setenv(name, said[name])
    let_threads_sleep()
    assert os.environ.get("GOMP_SPINCOUNT") == wanted


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("8") == [8]


def test_torchs_names_describe_the_same_world():
    world = discover(SLURM)
    assert world is not None
    again = discover(environment.variables(world))
    assert again is not None
    assert (again.rank, again.size, again.local_rank, again.local_size) == (5, 7, 1, 2)
    assert (again.master_addr, again.master_port) == (world.master_addr, world.master_port)


def test_gpus_hidden_by_the_user_do_not_count():
    assert environment.gpus({"CUDA_VISIBLE_DEVICES": "", "PATH": ""}) == 0
    assert environment.gpus({"CUDA_VISIBLE_DEVICES": "-1", "PATH": ""}) == 0
    assert environment.gpus({"PATH": "/nonexistent"}) == 0


def test_gpus_are_counted_through_nvidia_smi(tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: x)'\necho 'GPU 1: A (UUID: y)'\n")
    tool.chmod(0o755)
    assert environment.gpus({"PATH": str(tmp_path)}) == 2
    assert environment.gpus({"PATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": "1"}) == 1
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert environment.gpus({"PATH": str(tmp_path)}) == 0


@pytest.mark.parametrize(
    "variables, asked, found",
    [
        ({}, None, 4),
        ({"OMP_NUM_THREADS": "3"}, None, 3),
        ({"OMP_NUM_THREADS": "3,1"}, None, 3),
        ({"OMP_NUM_THREADS": "3"}, 2, 2),
        ({"OMP_NUM_THREADS": "1"}, None, 1),
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x"}, None, 4),  # torchrun's default, which nobody asked for
        ({"OMP_NUM_THREADS": "1", "TORCHELASTIC_RUN_ID": "x", "ROOTS_FAILURES": "y"}, None, 1),
    ],
)
def test_threads_are_those_that_the_config_or_the_user_asks_for(monkeypatch, variables, asked, found):
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "ROOTS_FAILURES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(environment, "cores", lambda: 8)
    assert environment.threads_per_process(asked, 2) == found
