"""Programs that launchers would run, put first on PATH: each notes what it was given, byte for byte, and what of its
surroundings matters. sbatch really runs its script with bash, srun and ssh note the words of each remote command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np

from roots_dist.config.text import dump
from roots_dist.learning.data.store import Writer
from roots_dist.runs.launch.check_options import choose
from roots_dist.runs.launch.options import OPTIONS, JobOptions

ROOT = Path(__file__).parents[2]
RECORDER = """#!{python} -S
import json, os, subprocess, sys
name = os.path.basename(sys.argv[0])
PREFIXES = ("ROOTS_TEST_", "MASTER_", "DS_", "GLOO_", "PYTHON")
kept = {{key: value for key, value in os.environ.items() if key.startswith(PREFIXES)}}
with open({notes!r}, "a", encoding="utf-8", errors="surrogateescape") as file:
    file.write(json.dumps({{"name": name, "words": sys.argv[1:], "folder": os.getcwd(), "variables": kept}}) + "\\n")
if name == "sbatch":
    script = sys.argv[-1]
    nodes = next(word for word in sys.argv if word.startswith("--nodes=")).partition("=")[2]
    slurm = {{"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-%s]" % nodes, "SLURM_NNODES": nodes}}
    slurm.update({{"SLURM_ARRAY_JOB_ID": "7"}} if any(word.startswith("--array=") for word in sys.argv) else {{}})
    sys.exit(subprocess.run(["bash", os.path.abspath(script)], env={{**os.environ, **slurm}}, cwd="/").returncode)
if name == "scontrol" and sys.argv[1:3] == ["show", "hostnames"]:
    print("\\n".join("n%d" % (i + 1) for i in range(int(sys.argv[3][4:-1]))))
if name == "mpirun":
    print("{version}")
if name == "pdsh":  # as ssh would have it done: the rest is joined and read by a shell
    where = sys.argv.index("-w") + 2
    sys.exit(subprocess.run(["sh", "-c", " ".join(sys.argv[where:]).replace("%n", "0")]).returncode)
"""
NAMES = ("sbatch", "srun", "scontrol", "mpirun", "pdsh", "kubectl", "ssh")


def put(folder: Path, version: str = "mpirun (Open MPI) 4.1.4", python: bool = False) -> Path:
    """The folder for PATH; its `notes` are read by `notes`. python: one, too, that notes what it would run."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    text = RECORDER.format(python=sys.executable, notes=str(folder / "notes"), version=version)
    for name in (*NAMES, *(("python",) if python else ())):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return programs


def notes(folder: Path) -> list[dict]:
    path = folder / "notes"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def options_of(on: str, **values: object) -> JobOptions:
    """The options of a launcher, as the command line gives them. Raises UserError."""
    every = [of(**{f.name: values[f.name] for f in fields(of) if f.name in values}) for of in OPTIONS]
    unknown = values.keys() - {f.name for of in OPTIONS for f in fields(of)}
    assert not unknown, unknown
    return choose(on, every)


def launch(folder: Path, programs: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONPATH")
    environ = {k: v for k, v in os.environ.items() if k not in names}
    environ |= {"PATH": f"{programs}:{environ['PATH']}", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, "-m", "roots_dist", "launch", *words]
    return subprocess.run(
        command, cwd=folder, env=environ, capture_output=True, text=True, timeout=250, errors="surrogateescape"
    )


def furnish(place: Path) -> Path:
    """small.yaml, its corpus, and hosts to run it on."""
    with Writer(place / "text", np.dtype("<u2")) as writer:
        writer.add(np.arange(4000, dtype="<u2") % 61)
        writer.commit()
    (place / "hosts").write_text("n1 slots=4\nn2 slots=4\n")
    (place / "two").write_text("n1 slots=2\nn2 slots=2\n")
    config = {
        "model": {"layers": 2, "hidden": 32, "heads": 4, "vocab": 61},
        "data": {"train": "text", "seq_length": 8},
        "parallel": {"tp": 2, "pp": 2},
        "train": {"steps": 5, "global_batch": 8, "device": "cpu"},
        "optim": {"warmup_steps": 1},
        "track": {"folder": "runs/small", "wandb": "disabled", "tensorboard": "off"},
    }
    (place / "small.yaml").write_text(dump(config))
    return place
