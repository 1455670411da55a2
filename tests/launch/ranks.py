"""What the launched processes of these tests run: `python ranks.py FOLDER BEHAVIOUR...`, one behaviour for each rank.

Every rank really joins a gloo world, says where it is (a file with its process number), meets the others once, and then
does what it is told. If all are told something that begins with `alone:`, they meet by these files only, and need not
import torch.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from roots_dist import environment, failures
from roots_dist.cli.train import TRAIN
from roots_dist.config.load import Loaded
from roots_dist.config.schema import Config
from roots_dist.errors import DataError
from roots_dist.runs.ranks.run_on_ranks import be_rank


def meet() -> float:
    import torch
    import torch.distributed as dist

    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()


def exit_together() -> None:
    """Let a rank that fails exit when all have said how they fail: the launcher ends those that are late."""
    exit_alone = failures._exit

    def exit_when_all_have_failed(code: int, who: failures.RankIdentity) -> None:
        assert who.records is not None
        while len(list(who.records.glob("rank_*.json"))) < who.size:
            time.sleep(0.02)
        exit_alone(code, who)

    failures._exit = exit_when_all_have_failed


def behave(what: str, folder: Path) -> None:
    if what == "fine":
        return
    if what == "wait":  # in a collective, for a peer that will not come
        meet()
    elif what == "hang":  # outside of torch, deaf to nothing but a signal
        time.sleep(1000)
    elif what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(1000)
    elif what == "raise":
        raise ValueError("the flux capacitor is empty")
    elif what == "user":
        exit_together()
        raise DataError("corpus = 'x': expected tokens. Fix: prepare it.")
    elif what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "exit":
        os._exit(7)
    elif what.startswith("parent"):  # of a process of its own, and then it fails
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN) if "deaf" in what else None
        child = os.fork()
        if child == 0:
            time.sleep(1000)
        (folder / "child").write_text(str(child))
        if before is not None:
            signal.signal(signal.SIGTERM, before)
        if "killed" in what:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("a parent failed")


def main() -> None:
    folder, behaviours = Path(sys.argv[1]), sys.argv[2:]
    config = Config(
        data={"train": str(folder / "corpus")},
        train={"device": "cpu", "global_batch": 64},
        track={"folder": str(folder / "run")},
        advanced={"timeout_s": 60},
    )

    def body(config, world, layout, who) -> None:
        (folder / f"pid{world.rank}").write_text(str(os.getpid()))
        mine = behaviours[world.rank]
        if mine.startswith("alone:"):
            (folder / f"met{world.rank}").touch()
            while not all((folder / f"met{rank}").exists() for rank in range(world.size)):
                time.sleep(0.02)
            behave(mine.removeprefix("alone:"), folder)
            return
        import torch

        from roots_dist.runs.ranks.join import joined

        with joined(config, world, layout, who=who) as mesh:
            met = meet() if mesh.layout.world_size > 1 else 1
            (folder / f"met{world.rank}").write_text(
                f"{met:g} {os.environ['OMP_NUM_THREADS']} {torch.get_num_threads()}"
            )
            behave(mine, folder)

    world = environment.discover()
    assert world is not None
    raise SystemExit(be_rank(world, lambda: Loaded(config), body, TRAIN))


if __name__ == "__main__":
    main()
