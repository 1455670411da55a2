"""What `roots launch` would do, held against files that people have looked at; what it refuses; and what its scripts do
when a job is told to stop, fails, or has a sick node. `python tests/launch/test_launch_plans.py` writes the golden
files anew."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from fakes import furnish, launch, notes, options_of, put
from patience import PATIENCE_S, comes_true

from roots_dist.cli.launch import command_for
from roots_dist.errors import UserError
from roots_dist.runs.launch.job import make
from roots_dist.runs.launch.launchers import LAUNCHERS
from roots_dist.runs.launch.submit import shown, write

GOLDEN = Path(__file__).parents[1] / "golden" / "launch"
KUBERNETES = {"on": "kubernetes", "nodes": 2, "image": "registry/roots:0.1", "pvc": "work"}
CASES = {
    "torchrun": {"on": "torchrun"},
    "torchrun-two-nodes": {"on": "torchrun", "nodes": 2, "rdzv_endpoint": "n1:29400", "max_restarts": 3},
    "slurm": {
        "on": "slurm",
        "nodes": 2,
        "time": "1:00:00",
        "partition": "gpu",
        "account": "me",
        "gpus_per_node": 2,
    },
    "slurm-array-spare": {
        "on": "slurm",
        "nodes": 2,
        "array": 4,
        "spare": 1,
        "env": ("NCCL_DEBUG=INFO",),
        "extra": ("--exclusive",),
    },
    "mpi-openmpi": {"on": "mpi", "hostfile": Path("hosts"), "runner": "openmpi", "env": ("A=b c",)},
    "mpi-mpich": {"on": "mpi", "hostfile": Path("hosts"), "runner": "mpich"},
    "deepspeed": {"on": "deepspeed"},
    "deepspeed-pdsh": {
        "on": "deepspeed",
        "hostfile": Path("hosts"),
        "include": "n1:0,1@n2:0,1",
        "env": ("NCCL_DEBUG=INFO",),
    },
    "deepspeed-openmpi": {
        "on": "deepspeed",
        "hostfile": Path("two"),
        "runner": "openmpi",
        "extra": ("--mca", "btl", "tcp"),
    },
    "kubernetes-job": {**KUBERNETES, "env": ("A=$(HOME) b",)},
    "kubernetes-trainjob": {
        **KUBERNETES,
        "kind": "trainjob",
        "gpus_per_node": 2,
        "max_restarts": 2,
        "env": ("A=b",),
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return furnish(tmp_path_factory.mktemp("plans"))


def said(place: Path, on: str, **given: object) -> str:
    job = make(command_for, "small.yaml", ("optim.lr=1e-3",), options_of(on, **{"python": "python", **given}), place)
    lines = shown(job, LAUNCHERS[on](job, {}), whole=True)
    return "\n".join(lines).replace(str(place), "/work") + "\n"


@pytest.mark.parametrize("case", CASES)
def test_what_is_run_is_what_people_have_looked_at(place, monkeypatch, case):
    monkeypatch.chdir(place)
    assert said(place, **CASES[case]) == (GOLDEN / f"{case}.txt").read_text(encoding="utf-8")


def test_the_manifest_is_what_kubernetes_knows(tmp_path):
    import kubernetes_validate as validate

    text = "\n".join(
        line[2:] for line in (GOLDEN / "kubernetes-job.txt").read_text().splitlines() if line.startswith("  ")
    )
    documents = list(yaml.safe_load_all(text))
    assert [document["kind"] for document in documents] == ["Service", "NetworkPolicy", "Job"]
    for document in documents:
        validate.validate(document, "1.34", strict=True)
    service, policy, job = documents
    pod = job["spec"]["template"]
    for selector in (service["spec"]["selector"], policy["spec"]["podSelector"]["matchLabels"]):
        assert selector.items() <= pod["metadata"]["labels"].items()
    assert service["spec"]["clusterIP"] == "None" and pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert {claim["name"] for claim in pod["spec"]["volumes"]} == {
        m["name"] for m in pod["spec"]["containers"][0]["volumeMounts"]
    }
    assert (
        f"--rdzv-endpoint={job['metadata']['name']}-0.{service['metadata']['name']}:29400"
        in pod["spec"]["containers"][0]["args"]
    )


@pytest.mark.parametrize(
    "given, named",
    [
        ({"on": "torchrun", "nodes": 2}, "--rdzv-endpoint = None"),
        ({"on": "torchrun", "nodes": 3, "rdzv_endpoint": "n1:1"}, "--processes-per-node = None"),
        ({"on": "torchrun", "processes_per_node": 6}, "world size = 6"),
        ({"on": "torchrun", "processes_per_node": 3}, "parallel"),
        ({"on": "torchrun", "hostfile": Path("hosts")}, "--hostfile = 'hosts'"),
        ({"on": "mpi", "include": "n1"}, "--include = 'n1': expected a hostfile to choose hosts from"),
        ({"on": "slurm", "time": "soon"}, "--time = 'soon'"),
        ({"on": "slurm", "time": "1:00:00; id"}, "--time = "),
        ({"on": "slurm", "time": "2:00"}, "--time = '2:00'"),
        ({"on": "slurm", "partition": "a\nb"}, "--partition = "),
        ({"on": "slurm", "template": Path("missing.sh")}, "--template = 'missing.sh'"),
        ({"on": "slurm", "template": Path("plain.sh")}, "--template = 'plain.sh': expected a script with one settings"),
        (
            {**KUBERNETES, "template": Path("gap.yaml")},
            "--template = 'gap.yaml: ${nmae}': expected gaps with names from name,",
        ),
        (
            {"on": "torchrun", "time": "1:00:00"},
            (
                "--time = '1:00:00': expected --on slurm: --time is not used with --on torchrun. "
                "Fix: remove --time, or choose --on slurm."
            ),
        ),
        (
            {"on": "mpi", "max_restarts": 3},
            "--max-restarts = 3: expected --on torchrun, --on slurm or --on kubernetes: ",
        ),
        ({"on": "deepspeed", "program": "deepspeed"}, "--program is not used with --on deepspeed"),
        ({"on": "slurm", "include": "n1"}, "--include is not used with --on slurm"),
        ({"on": "lsf"}, "--on = 'lsf': expected one of torchrun, deepspeed, slurm, mpi, kubernetes"),
        ({"on": "slurm", "gpus_per_node": 2, "processes_per_node": 2}, "--gpus-per-node = 2: expected only one of"),
        ({"on": "slurm", "rdzv_endpoint": "n1:1"}, "--rdzv-endpoint = 'n1:1': expected --on torchrun: "),
        (
            {"on": "slurm", "partition": ""},
            "--partition = '': expected a value that is not empty. Fix: remove --partition",
        ),
        (
            {"on": "torchrun", "nodes": 2, "rdzv_endpoint": ""},
            "--rdzv-endpoint = '': expected a value that is not empty",
        ),
        ({"on": "slurm", "extra": ("--exclusive", "")}, "--extra = '': expected a value that is not empty"),
        ({**KUBERNETES, "partition": "gpu"}, "Fix: remove --partition, or choose --on slurm"),
        ({"on": "mpi", "nodes": 2}, "--nodes = 2"),
        ({"on": "mpi", "hostfile": Path("hosts"), "nodes": 2}, "--nodes = 2"),
        ({"on": "mpi", "hostfile": Path("hosts"), "gpus_per_node": 2}, "--gpus-per-node = 2"),
        ({"on": "mpi", "runner": "lam"}, "--runner = 'lam'"),
        ({"on": "mpi", "program": "no-such-mpirun"}, "--program = 'no-such-mpirun'"),
        ({"on": "mpi", "hostfile": Path("hosts"), "runner": "mpich", "include": "n1:2,3@n2:2,3"}, "--include = "),
        ({"on": "mpi", "hostfile": Path("uneven"), "runner": "mpich"}, "slots = 'n2: 2, n1: 4'"),
        ({"on": "deepspeed", "nodes": 2}, "--nodes = 2"),
        ({"on": "deepspeed", "runner": "slurm"}, "--runner = 'slurm'"),
        (
            {"on": "deepspeed", "hostfile": Path("hosts"), "runner": "openmpi", "include": "n1:0,1@n2:0,1"},
            "--include = ",
        ),
        ({"on": "deepspeed", "hostfile": Path("hosts"), "include": "n1", "exclude": "n2"}, "--exclude = 'n2'"),
        ({"on": "deepspeed", "hostfile": Path("hosts"), "exclude": "n1@n2"}, "--exclude = 'n1@n2'"),
        ({"on": "kubernetes", "pvc": "work"}, "--image = None"),
        ({"on": "kubernetes", "image": "x"}, "--pvc = None"),
        ({**KUBERNETES, "kind": "pod"}, "--kind = 'pod'"),
        ({**KUBERNETES, "name": "Big_Name"}, "--name = 'Big_Name'"),
        ({**KUBERNETES, "namespace": "a;b"}, "--namespace = 'a;b'"),
        ({"on": "torchrun", "env": ("1A=b",)}, "--env = '1A=b'"),
        ({"on": "torchrun", "env": ("A",)}, "--env = 'A'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(place, monkeypatch, given, named):
    monkeypatch.chdir(place)
    (place / "plain.sh").write_text("#!/bin/bash\nsrun hostname\n")
    (place / "gap.yaml").write_text("metadata: {name: ${nmae}}\n")
    (place / "uneven").write_text("n1 slots=4\nn2 slots=2\n")
    with pytest.raises(UserError, match="Fix: ") as refused:
        said(place, **given)
    assert named in str(refused.value)


@pytest.mark.parametrize("folder", ["/scratch/run", "../run", "/work/../run", "/workshop/run"])
def test_a_folder_that_would_be_gone_with_its_pod_is_refused(place, monkeypatch, folder):
    monkeypatch.chdir(place)
    for kept in ("runs/x", "/work/runs/x", "a/../b"):
        LAUNCHERS["kubernetes"](
            make(command_for, "small.yaml", (f"track.folder={kept}",), options_of(**KUBERNETES), place), {}
        )
    job = make(command_for, "small.yaml", (f"track.folder={folder}",), options_of(**KUBERNETES), place)
    with pytest.raises(UserError, match="track.folder = .*: expected a folder below /work"):
        LAUNCHERS["kubernetes"](job, {})


@pytest.mark.parametrize("given, used", [(None, "python"), ("/opt/roots $(x)/python", "/opt/roots $$(x)/python")])
def test_a_pods_python_is_the_images_or_the_one_that_is_named(place, monkeypatch, given, used):
    monkeypatch.chdir(place)
    plan = LAUNCHERS["kubernetes"](
        make(command_for, "small.yaml", (), options_of(**KUBERNETES, python=given), place), {}
    )
    *_, job = yaml.safe_load_all(next(iter(plan.files.values())))
    assert job["spec"]["template"]["spec"]["containers"][0]["command"] == [used, "-m", "torch.distributed.run"]


def test_times_are_read_as_slurm_reads_them():
    from roots_dist.runs.launch.job import seconds

    times = {"90": 5400, "2:30": 150, "1:02:03": 3723, "2-3": 183600, "1-00:30": 88200, "1-00:00:01": 86401}
    assert {time: seconds(time) for time in times} == times


def test_a_site_can_have_a_template_of_its_own(place, monkeypatch):
    monkeypatch.chdir(place)
    own = '#!/bin/bash\n# Settings: ours\n: "${NODES:=1}"\n# End of settings\nmodule load cuda\nexec $NODES ${#a[@]}\n'
    (place / "own.sh").write_text(own)
    for on in ("slurm", "torchrun"):
        text = said(place, on=on, template=Path("own.sh"), python="/opt/my python")
        assert "  PYTHON='/opt/my python'\n  set -- small.yaml optim.lr=1e-3\n  # End of settings\n" in text
        assert "  module load cuda\n  exec $NODES ${#a[@]}\n" in text and ":=" not in text
    (place / "own.yaml").write_text("a: {name: ${name}, args: ${roots_args}}\nb:\n  - ${roots_args}\nc: $(HOME)\n")
    text = said(place, **KUBERNETES, template=Path("own.yaml"))
    words = '"-m", "roots_dist", "train", "small.yaml", "optim.lr=1e-3"'
    assert f'  a: {{name: "small", args: [{words}]}}\n  b:\n    - "-m"\n    - "roots_dist"\n' in text
    assert "  c: $(HOME)\n" in text


def test_a_dry_run_writes_nothing_and_begins_nothing(place, tmp_path):
    programs, before = put(tmp_path), {*place.rglob("*")}
    found = launch(place, programs, "small.yaml", "--on", "slurm", "--nodes", "2", "--dry-run")
    assert found.returncode == 0 and "$ sbatch " in found.stdout and "rdzv-endpoint" in found.stdout, found.stderr
    assert {*place.rglob("*")} == before and notes(tmp_path) == []


def test_a_launcher_that_is_not_there_is_named(place, tmp_path):
    programs = put(tmp_path)
    (programs / "sbatch").unlink()
    found = launch(place, programs, "small.yaml", "--on", "slurm", PATH=f"{programs}:/usr/sbin")
    assert found.returncode == 2 and found.stderr.startswith("✗ --on = 'sbatch': expected sbatch on PATH. Fix: "), (
        found.stderr
    )
    found = launch(place, programs, "small.yaml", "--python", "no-such-python")
    assert found.returncode == 2 and found.stderr.endswith("name it with --python PATH.\n"), found.stderr


def test_a_program_that_cannot_be_started_is_named(place, tmp_path):
    programs = put(tmp_path)
    (programs / "sbatch").write_text("exec /usr/bin/sbatch --verbose\n")  # a site's wrapper without #!
    found = launch(place, programs, "small.yaml", "--on", "slurm")
    expected = f"✗ --on = '{programs}/sbatch': expected a program that can be started (exec format error). Fix: "
    assert found.returncode == 2 and found.stderr.startswith(expected), found.stderr


def test_torchrun_trains_and_leaves_its_logs_and_how_it_ended(place):
    found = launch(
        place,
        place,
        "small.yaml",
        "--on",
        "torchrun",
        "--processes-per-node",
        "2",
        "parallel.pp=1",
        "train.steps=3",
        "track.folder=runs/real",
    )
    assert found.returncode == 0, found.stderr
    assert "2 processes, started by torchrun or deepspeed, 2 on this machine; they meet at 127.0.0.1:" in found.stderr
    assert (place / "runs/real/ended.txt").read_text().startswith("finished after step 3\n")
    assert "step 3/3" in next((place / "runs/real/launch/logs").glob("*/attempt_0/0/stdout.log")).read_text()


def job_script(place: Path, tmp_path: Path, srun: str, **given: object) -> tuple[list[str], Path]:
    """The command that starts a Slurm script as slurmd does, and the run's folder. srun: what bash does in its
    place."""
    programs = put(tmp_path, python=True)
    (programs / "srun").write_text(f'#!/bin/bash\n# "$@"\nended={tmp_path}/run/ended.txt\n{srun}\n')
    job = make(
        command_for,
        str(place / "small.yaml"),
        (f"track.folder={tmp_path}/run",),
        options_of("slurm", nodes=2, python="python", **given),
        place,
    )
    plan = LAUNCHERS["slurm"](job, {})
    write(plan)
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": f"n[1-{2 + job.options.spare}]",
        **({"SLURM_ARRAY_JOB_ID": "7"} if job.options.array else {}),
        "PATH": f"{programs}:/usr/bin:/bin",
    }
    return ["env", "-i", *(f"{k}={v}" for k, v in slurm.items()), "bash", plan.command[-1]], tmp_path / "run"


@pytest.mark.parametrize(
    "ended, array, code, requeued",
    [
        ("stopped by SIGUSR1 after step 3", None, 1, True),
        ("stopped by SIGTERM after step 3", 2, 0, False),
        ("finished after step 5", None, 0, False),
        ("failed: rank 1 (pp0 dp0 tp1), node n1: no", None, 1, False),
        ("failed: rank 1 (pp0 dp0 tp1), node n1: no", 2, 1, False),
        (None, None, 1, False),
        ("", None, 1, True),
        ("", 2, 0, False),
    ],
)
def test_a_job_is_queued_again_only_if_it_was_stopped(place, tmp_path, monkeypatch, ended, array, code, requeued):
    """None: it crashed before training; "": it was told to stop before training."""
    monkeypatch.chdir(place)
    says = f"echo {ended!r} > $ended; " if ended else "trap '' USR1; kill -USR1 $PPID; " if ended == "" else ""
    command, run = job_script(
        place, tmp_path, f"{says}exit {0 if ended and ended.startswith('finished') else 1}", array=array
    )
    run.mkdir(exist_ok=True)
    (run / "ended.txt").write_text(
        "stopped by SIGUSR1 after step 1\n"
    )  # by an earlier attempt: says nothing of this one
    (tmp_path / "bin" / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "sleep").chmod(0o755)
    found = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=250)
    assert found.returncode == code or (code == 1 and ended == "" and found.returncode), (
        found
    )  # bash forgets it at times
    assert found.stdout.count("job 7, exit code") == 1
    assert (["requeue", "7"] in [note["words"] for note in notes(tmp_path)]) == requeued


def test_the_signal_before_the_time_is_over_reaches_srun_and_is_waited_for(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    srun = (
        "trap 'sleep 0.3; echo stopped by SIGUSR1 after step 3 > $ended; exit 1' USR1; touch $ended.up; while :; "
        "do sleep 0.05; done"
    )
    command, run = job_script(place, tmp_path, srun, array=2)
    job = subprocess.Popen(command, cwd="/", stdout=subprocess.PIPE, text=True)
    assert comes_true((run / "ended.txt.up").exists)
    (bash,) = [job.pid]
    subprocess.run(["kill", "-USR1", str(bash)], check=True)
    out, _ = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0 and "exit code 1: stopped by SIGUSR1 after step 3" in out


def test_an_array_whose_run_has_finished_starts_nothing(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    command, run = job_script(place, tmp_path, "touch $ended.srun", array=2)
    run.mkdir(exist_ok=True)
    (run / "ended.txt").write_text("finished after step 5\n")
    found = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=250)
    assert found.returncode == 0 and "has finished" in found.stdout and not (run / "ended.txt.srun").exists()


def test_a_signal_while_nodes_are_examined_leaves_out_none_of_them(place, tmp_path, monkeypatch):
    monkeypatch.chdir(place)
    srun = """
for word; do [[ $word == --nodelist=* ]] && node=${word#*=}; [[ $word == timeout ]] && check=1; done
if [[ -n ${check:-} ]]; then [[ $node == n1 ]] && kill -USR1 $(ps -o ppid= $PPID); sleep 0.5; exit 0; fi
echo "$node" > $ended.list"""
    command, run = job_script(place, tmp_path, srun, spare=1, array=2)
    found = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=250)
    assert found.returncode == 0 and "left out" not in found.stderr, found
    assert (run / "ended.txt.list").read_text() == "n1,n2\n"


@pytest.mark.parametrize("sick, code", [(("n2",), 0), (("n1", "n3"), 1)])
def test_a_sick_node_is_left_out_by_name(place, tmp_path, monkeypatch, sick, code):
    """The fake srun starts what it is given on the node that it is for, and python is sick on some."""
    monkeypatch.chdir(place)
    srun = """
for word; do [[ $word == --nodelist=* ]] && node=${word#*=}; done
while [[ $1 == --* ]]; do shift; done
if [[ $1 == timeout ]]; then SLURM_STEP_ID=1 SLURMD_NODENAME=$node exec "$@"; fi
echo "$node" > $ended.list"""
    command, run = job_script(place, tmp_path, srun, spare=1)
    python = tmp_path / "bin" / "python"
    python.write_text(
        f'#!/bin/sh\n[ -z "$SLURM_STEP_ID" ] || exit 9\ncase $SLURMD_NODENAME in {"|".join(sick)}) exit 1 ;; esac\n'
    )
    found = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=250)
    assert found.returncode == code, found
    for node in sick:
        assert f"{node} is left out: {run}/launch/logs/7-check-{node}.log" in found.stderr
    if code:
        assert "1 of 3 nodes are healthy, 2 are needed" in found.stderr
    else:
        assert (run / "ended.txt.list").read_text() == "n1,n3\n"
    assert not [*(run / "launch" / "logs").glob("passed-*")]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(furnish(Path(folder)))
        GOLDEN.mkdir(parents=True, exist_ok=True)
        for case, given in CASES.items():
            (GOLDEN / f"{case}.txt").write_text(said(Path(folder), **given), encoding="utf-8")


if __name__ == "__main__":
    main()
