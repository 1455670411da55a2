"""Real launchers, with real processes: ours and torchrun's agent are killed, or ranks under torchrun, which starts them
again."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
from commands import environ

from .hangs import LAYOUTS
from .lateness import lateness
from .ranks import LIMIT_S, STEPS, digest_of, judge, newest_step, untouched, wait_for_step, words_of
from .trial import Family, Outcome

ENDS_S, AFTER_A_RANK_S = 5.0, 30.0
"""Seconds after which nothing is left of a run whose launcher or ranks were killed."""
KINDS = (
    "our launcher",
    "torchrun's agent",
    "a rank of our launcher",
    "all ranks of our launcher",
    "a rank, and torchrun restarts",
    "all ranks, and torchrun restarts",
)


def start(kind: str, words: tuple[str, ...], size: int, place: Path) -> subprocess.Popen[bytes]:
    """Start the command under a launcher; what it says is in `said`."""
    ours = [sys.executable, "-m", "roots_dist", words[0], *words[1:]]
    if "torchrun" in kind:
        agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", "--max-restarts=5"]
        ours = [sys.executable, *agent, "-m", "roots_dist", *words]
    elif all(not word.startswith(("parallel.tp", "parallel.pp")) for word in words):
        ours.append(f"--processes={size}")
    variables = environ() | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    with open(place / "said", "ab") as said:
        return subprocess.Popen(ours, env=variables, stdout=said, stderr=said, start_new_session=True)


def ranks_of(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Processes that the launcher has started and that train."""
    with suppress(psutil.Error):
        return [p for p in psutil.Process(launcher.pid).children() if "roots_dist" in " ".join(p.cmdline())]
    return []


def trial(draw: random.Random, place: Path) -> Outcome:
    kind, layout = draw.choice(KINDS), draw.choice([name for name, (size, _) in LAYOUTS.items() if size == 2])
    size, step, delay = 2, draw.randrange(0, STEPS - 3), draw.random() * 0.3
    victims = draw.sample(range(size), size if "all" in kind else 1)
    run, words = place / "run", words_of(layout, place)
    launcher = start(kind, words, size, place)
    processes: list[psutil.Process] = []
    try:
        wait_for_step(run, step, time.monotonic() + LIMIT_S)
        while not processes and launcher.poll() is None:
            processes = ranks_of(launcher)
            time.sleep(0.01)
        time.sleep(delay)
        committed = newest_step(run)
        for victim in [processes[v] for v in victims if v < len(processes)] if "rank" in kind else [launcher]:
            with suppress(psutil.Error):
                victim.kill()
        killed, count = time.time(), len(victims)
        with lateness() as late:
            if "restarts" in kind:
                code = launcher.wait(LIMIT_S)
                said = (place / "said").read_text(errors="replace")
                if code:
                    return Outcome(kind, held=False, words=f"{layout}: exit code {code}: {said[-600:]}")
                wrong = judge(run, committed, said[said.rfind("resumed after step") :], layout)
                return Outcome(kind, not wrong, f"{layout} at step {committed}: {wrong}", count=count)
            launcher.wait(LIMIT_S)
            _, alive = psutil.wait_procs(processes, timeout=60)
            took = time.time() - killed
        if alive or took > (AFTER_A_RANK_S if "rank" in kind else ENDS_S) + late.allowance(killed):
            return Outcome(kind, held=False, words=f"{layout}: {len(alive)} ranks are left, {took:.1f} s")
    finally:
        for process in [*processes, *ranks_of(launcher)]:
            with suppress(psutil.Error):
                process.kill()
        launcher.kill()
        launcher.wait()
    if newest_step(run) == STEPS:
        return Outcome("too late: the run was over", held=digest_of(run) == untouched(layout))
    before = len((place / "said").read_text(errors="replace"))
    code = start(kind, words, size, place).wait(LIMIT_S)
    said = (place / "said").read_text(errors="replace")[before:]
    if code:
        return Outcome(kind, held=False, words=f"{layout}, again: exit code {code}: {said[-600:]}")
    wrong = judge(run, committed, said, layout)
    return Outcome(kind, not wrong, f"{layout} at step {committed}: {wrong}", count=count)


FAMILY = Family(
    "launchers",
    harm="the launcher of two ranks (ours, or torchrun's agent) gets SIGKILL at a random moment, or its ranks do, in "
    "eight layouts and engines; torchrun starts them again by itself, else the same command is given again",
    promise="no process is left, no committed step is lost, and the last weights and moments are to the bit those of a "
    "run that nobody touched",
    trial=trial,
    sample=0,
)
