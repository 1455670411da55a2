"""Commands as `python -m roots_dist` does them, without the seconds in which a new Python imports torch.

    roots("evaluate", run, ranks=2) --forks of the world's forkserver--> exit code, and what was said

For what a command does; how processes are started is tested with ones that are, in tests/launch above all.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import MappingProxyType

import torch.distributed as dist

from roots_dist.cli.main import main
from roots_dist.environment import LAUNCHERS
from roots_dist.testing.world import ENVIRONMENTS, environment_of_ranks

ROOT = Path(__file__).parents[1]
LIMIT_S = 250
LAUNCHERS_OWN = {name for names in LAUNCHERS.values() for name in names} | {"MASTER_ADDR", "MASTER_PORT"}


def environ() -> dict[str, str]:
    """What a process that tests start has around it: no launcher, and this package."""
    ours = {name: value for name, value in os.environ.items() if name not in LAUNCHERS_OWN}
    return ours | {"PYTHONPATH": str(ROOT)}


def roots(
    *words: str,
    ranks: int = 1,
    main: Callable[[Sequence[str]], object] = main,
    own_words: Mapping[int, Sequence[str]] = MappingProxyType({}),
    meanwhile: Callable[[Sequence[int]], object] = lambda pids: None,
    limit_s: float = LIMIT_S,
    **own_variables: object,
) -> subprocess.CompletedProcess[str]:
    """Run `roots WORDS` in one process that has no launcher, or on ranks that torchrun has started. `main` is another
    program that is given the words; `own_words` are further words of single ranks; `meanwhile` is called with the
    processes' numbers when they have been started; after `limit_s` seconds they are killed."""
    variables = environ() | ENVIRONMENTS["cpu"] | {"GLOO_SOCKET_IFNAME": "lo"}
    if ranks > 1:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # of torchrun's agent
        variables |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        variables |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    variables |= {name: str(value) for name, value in own_variables.items()}
    processes: list[BaseProcess] = []
    with tempfile.TemporaryDirectory() as folder:
        outputs = [[f"{folder}/out{rank}", f"{folder}/err{rank}"] for rank in range(ranks)]
        try:
            for rank in range(ranks):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
                mine = (*words, *own_words.get(rank, ()))
                processes.append(start(main, mine, variables | own, outputs[rank]))
            meanwhile([process.pid for process in processes])
            for process in processes:
                process.join(limit_s)
        finally:
            for process in processes:
                process.kill()
                process.join()
        written = [[Path(file) for file in files] for files in zip(*outputs)]  # not by one that was killed at once
        out, err = ("".join(path.read_text() for path in paths if path.exists()) for paths in written)
    return subprocess.CompletedProcess(words, max((p.exitcode for p in processes), key=abs), out, err)


def without_progress(said: str) -> str:
    """What was said less the lines by which a busy machine's processes say that they are still at work."""
    return "".join(line for line in said.splitlines(keepends=True) if not line.endswith(" s so far\n"))


def start(
    main: Callable[[Sequence[str]], object], words: Sequence[str], variables: Mapping[str, str], outputs: Sequence[str]
) -> BaseProcess:
    """Begin `main(words)` in a new process that has these variables alone. `outputs`: files for stdout and stderr."""
    process = multiprocessing.get_context("forkserver").Process(target=_run, args=(main, words, variables, outputs))
    with environment_of_ranks("cpu"):
        process.start()
    return process


def _run(
    main: Callable[[Sequence[str]], object], words: Sequence[str], variables: Mapping[str, str], outputs: Sequence[str]
) -> None:
    for stream, file in enumerate(outputs, start=1):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, stream)
        os.close(opened)
    os.environ.clear()
    os.environ.update(variables)
    gc.freeze()  # the forkserver's imports stay
    main(words)
