"""Slurm's short spellings of lists: of a job's nodes, and of the tasks on each."""

from __future__ import annotations

import re

from roots_dist.errors import EnvironmentProblem


def first_host(nodelist: str) -> str:
    """First host of a Slurm node list: `n[01-03,07],gpu5` -> n01, `r[1-2]n[3-4]` -> r1n3."""
    depth, end = 0, len(nodelist)
    for i, letter in enumerate(nodelist):
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            end = i
            break
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodelist[:end])


def tasks_per_node(short: str) -> list[int]:
    """Expand Slurm's compact counts: `2(x3),1` -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in short.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise EnvironmentProblem(
                f"SLURM_TASKS_PER_NODE = {short}: expected a list such as 2(x3),1. Fix: start the job with srun."
            )
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
