"""The launchers by name: a module each, whose plan is pure but for reading a template.

    Job --LAUNCHERS[on]--> LaunchPlan: files to write, one argument list to run --submit.py--> running

No value is ever read by a shell here: what is run is a list, and what a script contains is quoted by render.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from roots_dist.runs.launch import deepspeed, kubernetes, mpi, slurm, torchrun
from roots_dist.runs.launch.job import Job, LaunchPlan

LAUNCHERS: Mapping[str, Callable[[Job, Mapping[str, str]], LaunchPlan]] = {
    "torchrun": torchrun.plan,
    "deepspeed": deepspeed.plan,
    "slurm": slurm.plan,
    "mpi": mpi.plan,
    "kubernetes": kubernetes.plan,
}
"""--on NAME: a function of the job and of the variables that are set here."""
