"""Show what a plan runs and where its logs will be, write its files, and become its command.

LaunchPlan --shown--> terminal --write--> track.folder/launch/ --begin--> sbatch, bash, kubectl in this process's place
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator

from roots_dist import environment
from roots_dist.files import why, write_atomically
from roots_dist.runs.launch.job import Job, LaunchPlan
from roots_dist.runs.launch.quoting import refused


def shown(job: Job, plan: LaunchPlan, whole: bool) -> Iterator[str]:
    """Yield the lines that say what a plan does; whole: with the contents of its files, byte for byte."""
    per_node, launcher = job.processes_per_node, job.options.launcher
    yield f"{job.roots_command} {job.words[0]}: {job.layout} on {job.nodes} × {per_node} processes, by {launcher}"
    for path, text in plan.files.items():
        if text:
            yield f"file: {shlex.quote(str(path))}"
            yield from (f"  {line}" for line in text.splitlines() if whole)
    for note in plan.notes:
        yield f"note: {note}"
    yield f"logs: {plan.logs}"
    yield f"$ {shlex.join(plan.command)}"


def write(plan: LaunchPlan) -> None:
    """Write the plan's files. Raises UserError."""
    for path, text in plan.files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
        except OSError as error:
            expected, fix = (
                f"a folder that can be written ({why(error)}: {path})",
                "choose another folder, or make room",
            )
            raise refused("track.folder", str(path.parent), expected, fix) from None


def begin(plan: LaunchPlan) -> None:
    """Become the command, which gets this process's signals and gives its exit code, or raise UserError."""
    for name, option in plan.programs.items():
        if shutil.which(name) is None:
            fix = "load the site's module for it" + ("" if option == "--on" else f", or name it with {option} PATH")
            raise refused("--on", name, f"{name} on PATH", fix)
    program = shutil.which(plan.command[0])
    assert program is not None, plan
    environment.unset(plan.unset)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(program, plan.command)
    except OSError as error:
        option = plan.programs[plan.command[0]]
        fix = f"name another with {option} PATH; a script begins with #!"
        raise refused("--on", program, f"a program that can be started ({why(error)})", fix) from None
