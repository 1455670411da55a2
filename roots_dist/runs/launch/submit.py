"""Shows what a plan runs and where its logs will be, writes its files, and becomes its command.

Plan --show--> terminal --write--> track.folder/launch/ --begin--> sbatch, torchrun, mpirun, kubectl in this process's place
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Iterator

from roots_dist import environment
from roots_dist.runs.launch.job import Job, Plan
from roots_dist.runs.launch.quoting import refused


def shown(job: Job, plan: Plan, whole: bool) -> Iterator[str]:
    """Lines. whole: with the files that would be written, byte for byte."""
    yield f"{job.verb} {job.words[0]}: {job.layout} on {job.nodes} × {job.per_node} processes, by {job.wishes.on}"
    for path, text in plan.files.items():
        if text:
            yield f"file: {shlex.quote(str(path))}"
            yield from (f"  {line}" for line in text.splitlines() if whole)
    for name, value in plan.variables.items():
        yield f"variable: {name}={shlex.quote(value)}"
    for note in plan.notes:
        yield f"note: {note}"
    yield f"logs: {plan.logs}"
    yield f"$ {shlex.join(plan.command)}"


def write(plan: Plan) -> None:
    for path, text in plan.files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_name(f".{path.name}.{os.getpid()}")
            unfinished.write_text(text, encoding="utf-8", newline="")
            unfinished.replace(path)
        except OSError as error:
            expected = f"a folder that can be written ({(error.strerror or str(error)).lower()}: {path})"
            raise refused(
                "track.folder", str(path.parent), expected, "choose another folder, or make room there"
            ) from None


def begin(plan: Plan) -> None:
    """Does not return: this process becomes the command, which gets its signals and gives its exit code."""
    program, option = shutil.which(plan.command[0]), "--python" if "-m" in plan.command[1:3] else "--program"
    if program is None:
        expected = f"{plan.command[0]} on PATH"
        raise refused(
            "--on", plan.command[0], expected, f"load the site's module for it, or name it with {option} PATH"
        )
    environment.export(plan.variables)
    environment.forget(plan.unset)
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execv(program, plan.command)
    except OSError as error:
        expected = f"a program that can be started ({(error.strerror or str(error)).lower()})"
        raise refused("--on", program, expected, f"name another with {option} PATH; a script begins with #!") from None
