"""The scripts of launch/, which people submit without our tool: they are what `roots launch` fills in, they are short,
shellcheck finds nothing in them, and with fake programs each starts what its usage says. `python
tests/launch/test_launch_scripts.py` writes launch/ anew from the templates. tests/cluster runs them on real
launchers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fakes import ROOT, furnish, notes, options_of, put

from roots_dist.cli.launch import command_for
from roots_dist.runs.launch.job import make
from roots_dist.runs.launch.launchers import LAUNCHERS
from roots_dist.runs.launch.render import SETTINGS, TEMPLATES
from roots_dist.runs.ranks.local import SIGNALS

LAUNCH = ROOT / "launch"
SCRIPTS = ("deepspeed.sh", "mpi.sh", "slurm.sh", "torchrun.sh")
GOLDEN = sorted((ROOT / "tests" / "golden" / "launch").glob("*.txt"))
LONGEST = 79
SETTING = re.compile(r'^: "\$\{(\w+):=|^read -ra (\w+) ', re.MULTILINE)
FILLED = re.compile(r"^(\w+)=", re.MULTILINE)
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")


def shipped() -> dict[str, str]:
    """What launch/ has to hold: the templates of scripts as they are, and a manifest of the quickstart on two pods."""
    options = options_of("kubernetes", nodes=2, name="roots", image="registry/roots:cpu", pvc="work")
    job = make(command_for, str(ROOT / "configs" / "quickstart.yaml"), (), options, ROOT)
    (manifest,) = LAUNCHERS["kubernetes"](job, {}).files.values()
    manifest = manifest.replace(str(ROOT) + "/", "")
    return {**{name: (TEMPLATES / name).read_text() for name in SCRIPTS}, "kubernetes.yaml": manifest}


@pytest.fixture
def place(tmp_path) -> Path:
    put(tmp_path, python=True)
    return furnish(tmp_path)


def test_launch_holds_what_roots_launch_fills_in():
    expected = shipped()
    assert {path.name for path in LAUNCH.iterdir()} == {*expected}
    for name, text in expected.items():
        assert (LAUNCH / name).read_text() == text, "run: python tests/launch/test_launch_scripts.py"


def rendered(case: Path) -> dict[str, str]:
    """The scripts of a golden file, by name."""
    files = re.findall(r"^file: \S+/(\S+)\n((?:  .*\n)+)", case.read_text(), re.MULTILINE)
    return {name: re.sub(r"^  ", "", text, flags=re.MULTILINE) for name, text in files if name.endswith(".sh")}


@pytest.mark.parametrize("case", GOLDEN, ids=lambda path: path.stem)
def test_what_is_rendered_differs_only_in_its_settings(case):
    for name, text in rendered(case).items():
        ours = (LAUNCH / name).read_text()
        assert SETTINGS.sub("", text) == SETTINGS.sub("", ours)
        settings = {a or b for a, b in SETTING.findall(SETTINGS.search(ours)[0])}
        assert settings == {*FILLED.findall(SETTINGS.search(text)[0])}


@pytest.mark.parametrize("path", sorted(LAUNCH.iterdir()), ids=lambda path: path.name)
def test_a_script_is_short_and_ends_in_our_program(path):
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST
    if path.suffix == ".yaml":
        arguments = list(yaml.safe_load_all(text))[-1]["spec"]["template"]["spec"]["containers"][0]["args"]
        assert arguments[-4:] == ["-m", "roots_dist", "train", "configs/quickstart.yaml"]
        return
    assert os.access(path, os.X_OK) and text.startswith("#!/bin/bash\n")
    assert re.findall(r'roots_dist "\$COMMAND" "\$@"', text)
    assert f"launch/{path.name} CONFIG [section.key=value ...]" in text


def test_the_scripts_have_torchrun_forward_the_signals_that_a_bare_run_forwards():
    assert f"--signals-to-handle={SIGNALS}" in (LAUNCH / "slurm.sh").read_text()
    assert f"for name in {SIGNALS.replace(',', ' ')}; do" in (LAUNCH / "torchrun.sh").read_text()


@pytest.mark.parametrize("source", [LAUNCH, *GOLDEN], ids=lambda path: path.stem)
def test_shellcheck_finds_nothing(source, tmp_path):
    texts = {name: (LAUNCH / name).read_text() for name in SCRIPTS} if source == LAUNCH else rendered(source)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        found = subprocess.run([SHELLCHECK, tmp_path / name], capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stdout


def run(place: Path, name: str, *words: str, check: bool = True, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {"PATH": f"{place}/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT), **variables}
    command = ["bash", LAUNCH / name, *words]
    return subprocess.run(command, cwd=place, env=environ, check=check, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_without_a_config_says_its_usage(place, name):
    found = run(place, name, check=False)
    assert found.returncode and f"launch/{name} CONFIG [section.key=value ...]" in found.stderr and not notes(place)


@pytest.mark.parametrize(
    "name, variables, expected",
    [
        ("torchrun.sh", {}, "-m torch.distributed.run --nnodes=1 --nproc-per-node=auto --rdzv-backend=c10d"),
        ("torchrun.sh", {"PROCESSES_PER_NODE": "2"}, "--rdzv-endpoint=localhost:0 --local-addr=127.0.0.1"),
        (
            "torchrun.sh",
            {"NODES": "2", "RDZV_ENDPOINT": "n1:29400", "MAX_RESTARTS": "3", "EXTRA": "--monitor-interval 1"},
            (
                "--rdzv-endpoint=n1:29400 --max-restarts=3 --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 "
                "--shutdown-timeout=120 --log-dir=logs --tee=3 --monitor-interval 1 -m roots_dist"
            ),
        ),
        ("deepspeed.sh", {"PROCESSES_PER_NODE": "2"}, "--master_addr=127.0.0.1 --master_port=29500 --no_local_rank"),
        (
            "deepspeed.sh",
            {"HOSTFILE": "hosts", "EXCLUDE": "n2", "EXTRA": "-u 9"},
            (
                "-m deepspeed.launcher.runner --hostfile=hosts --launcher=pdsh --force_multi "
                "--enable_each_rank_log={place}/logs "
                "--master_addr=n1 --master_port=29500 --exclude=n2 --launcher_args='-u' '9'  --no_local_rank --module"
            ),
        ),
        (
            "deepspeed.sh",
            {"HOSTFILE": "hosts", "RUNNER": "openmpi"},
            "--launcher_args='-x' 'MASTER_ADDR=n1' '-x' 'MASTER_PORT=29500'  --no_local_rank",
        ),
        (
            "mpi.sh",
            {"PROCESSES_PER_NODE": "4"},
            "-np 4 --map-by ppr:4:node --bind-to none --wdir {place} -x MASTER_PORT",
        ),
        (
            "mpi.sh",
            {"HOSTFILE": "hosts", "EXPORTS": "NCCL_DEBUG", "EXTRA": "--mca btl tcp"},
            (
                "-np 8 --map-by ppr:4:node --bind-to none --wdir {place} -x NCCL_DEBUG -x MASTER_PORT -x TTY_COMPATIBLE "
                "-x MASTER_ADDR --host n1:4,n2:4 --mca btl tcp {place}/bin/python -m roots_dist"
            ),
        ),
        ("mpi.sh", {"HOSTFILE": "hosts", "MPI": "mpich"}, "-n 8 -ppn 4 -wdir {place} -hosts n1:4,n2:4 "),
    ],
)
def test_a_script_starts_what_its_settings_say(place, name, variables, expected):
    run(place, name, "small.yaml", "track.name=a b", COMMAND="finetune", **variables)
    note = notes(place)[-1]
    assert note["words"][-4:] == ["roots_dist", "finetune", "small.yaml", "track.name=a b"]
    assert expected.format(place=place) in " ".join(note["words"])
    assert note["variables"].get("GLOO_SOCKET_IFNAME") == (
        "lo" if name != "mpi.sh" and not {"NODES", "HOSTFILE"} & {*variables} else None
    )


def test_several_nodes_without_a_rendezvous_are_refused(place):
    found = run(place, "torchrun.sh", "small.yaml", check=False, NODES="2")
    assert found.returncode and "RDZV_ENDPOINT: set it to HOST:PORT of one of the 2 nodes" in found.stderr


def test_an_mpirun_of_neither_kind_is_refused(place):
    found = run(place, "mpi.sh", "small.yaml", check=False, MPIRUN="echo")
    assert found.returncode == 2 and "echo is neither Open MPI nor MPICH" in found.stderr


def test_the_slurm_script_finds_the_folder_of_the_run_in_its_config(place):
    (place / "bin" / "python").unlink()
    words = ("small.yaml", "track.folder=runs/it's mine")
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8", "PYTHON": sys.executable}
    (place / "runs" / "it's mine").mkdir(parents=True)
    (place / "runs" / "it's mine" / "ended.txt").write_text("finished after step 5\n")
    found = run(place, "slurm.sh", *words, SLURM_ARRAY_JOB_ID="7", **slurm)
    assert "the run has finished" in found.stdout and not notes(place)
    run(place, "slurm.sh", *words, SLURM_CPUS_PER_TASK="4", **slurm)
    (srun,) = [note for note in notes(place) if note["name"] == "srun"]
    said = " ".join(srun["words"])
    assert "--nodes=2 --ntasks=2 --ntasks-per-node=1 --nodelist=n1,n2" in said and "--output=logs/%j-%N.log" in said
    assert "--nproc-per-node=8" in said and srun["words"][-3:] == ["train", *words]


def main() -> None:
    LAUNCH.mkdir(exist_ok=True)
    for name, text in shipped().items():
        (LAUNCH / name).write_text(text, encoding="utf-8")
        (LAUNCH / name).chmod(0o755 if name.endswith(".sh") else 0o644)


if __name__ == "__main__":
    main()
