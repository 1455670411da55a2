"""Launcher of ranks on this machine, for `roots train` without torchrun: start them, wait for them, report what failed.

    roots train --processes_for--> how many --launch--> torch elastic --> `python -m roots_dist train ...` on every rank

torch elastic does the rendezvous and the monitoring. It does not restart ranks: a repeated command resumes by itself.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from roots_dist import environment
from roots_dist.config.schema import Config
from roots_dist.errors import EnvironmentProblem, UserError
from roots_dist.files import why
from roots_dist.runs.ranks.end_deaf_ranks import ending_deaf_ranks
from roots_dist.runs.ranks.failure_report import read_records, summarize
from roots_dist.runs.ranks.stop_signal import AT_ONCE
from roots_dist.runs.ranks.stop_signal import SIGNALS as STOPS

SHOW_CURSOR = "\x1b[?25h"
SHUTDOWN_S = 60
"""Seconds that ranks may take to end after a signal before they are killed: enough for a step and a checkpoint."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that are forwarded to the ranks. Slurm sends SIGUSR1 before a time limit (runs/ranks/stop_signal.py)."""


def signals() -> str:
    """Return SIGNALS less those that are ignored here: torch elastic would handle SIGHUP under nohup too, and end."""
    return ",".join(name for name in SIGNALS.split(",") if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN)


def processes_for(config: Config, requested: int | None, gpus: int) -> int:
    """Number of ranks to start: as requested, else one per GPU, else the least that the config needs."""
    model_size = config.parallel.least_ranks()
    if requested is not None:
        return requested
    if gpus == 0:
        return model_size
    if gpus < model_size:
        raise UserError(
            f"{' × '.join(config.parallel.factors())} = {model_size}: expected at most the {gpus} GPUs of this "
            "machine. Fix: lower one "
            f"of them, start the run on several machines (torchrun, srun), or use train.device=cpu."
        )
    return gpus - gpus % model_size


def launch(size: int, arguments: Sequence[str], threads: int | None = None, what: str = "") -> int:
    """Run `python ARGUMENTS` on `size` ranks of this machine. Returns the exit code after every rank has ended.

    If a rank fails, the others end within seconds; so they do after SIGTERM and Ctrl-C, which are forwarded, and when
    this process dies (runs/ranks/die_with_parent.py). `what` is shown on a terminal, because the ranks take seconds to
    appear.
    """
    if what and sys.stderr.isatty():
        print(f"starting {size} processes for {what} ...", file=sys.stderr)
    records = _folder_of_records()
    environment.export(
        {
            environment.FAILURES: str(records),
            environment.LAUNCHER_PID: str(os.getpid()),
            "OMP_NUM_THREADS": str(environment.threads_per_process(threads, size)),
        }
    )
    environment.export(
        {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": loopback()}, replace=False
    )
    try:
        with ending_deaf_ranks(records) as ranks:
            exits = _run(size, arguments, records)
        if not exits:
            return 0
        ranks.end_children()
        found = read_records(records)
        if not found and (code := _stop_code(exits)):
            return code
        summary = summarize(found, exits, size, ranks.killed)
        print(summary.text, file=sys.stderr)
        return summary.code
    except _Signalled as stop:
        return 128 + stop.number
    finally:
        shutil.rmtree(records, ignore_errors=True)
        if sys.stdout.isatty():
            print(
                SHOW_CURSOR, end="", flush=True
            )  # a killed rank could not restore the cursor that its live line had hidden


def _folder_of_records() -> Path:
    """A new folder in which ranks say how they fail. Raises EnvironmentProblem."""
    try:
        return Path(tempfile.mkdtemp(prefix="roots-"))
    except OSError as error:
        raise EnvironmentProblem(
            f"TMPDIR = {error.filename or 'none'}: expected a folder for temporary files that can be written "
            f"({why(error)}). Fix: make room there, or set TMPDIR to another folder."
        ) from error


class _Signalled(Exception):
    """This process got a signal to end, and has ended the ranks."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def _run(size: int, arguments: Sequence[str], records: Path) -> dict[int, int]:
    """Exit codes of all ranks if any failed, else nothing."""
    logging.disable(logging.ERROR)  # elastic's loggers have their own levels; their banners would bury the rank's error
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from roots_dist.runs.ranks import loopback_store

    loopback_store.register()

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=str(os.getpid()),
        rdzv_backend=loopback_store.BACKEND,
        rdzv_endpoint=loopback_store.ADDRESS,
        local_addr=loopback_store.ADDRESS,
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=SHUTDOWN_S,
        signals_to_handle="",  # elastic ends the ranks on a second signal, while they save
        logs_specs=DefaultLogsSpecs(log_dir=str(records / "elastic")),
    )
    with _forwarded() as sent:
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            exits = {rank: failure.exitcode for rank, failure in error.failures.items()}
            if sent and all(code in (-sent[0], 128 + sent[0], -signal.SIGTERM) for code in exits.values()):
                raise _Signalled(sent[0]) from None
            return exits
        finally:
            logging.disable(logging.NOTSET)
    return {}


@contextmanager
def _forwarded() -> Iterator[list[int]]:
    """Forward the signals that this process gets to its ranks, as often as they come, and yield the list of those: a
    rank that saves a checkpoint knows how to hear a signal twice. Before there are ranks, a signal ends this
    process."""
    sent: list[int] = []
    me = psutil.Process()

    def forward(number: int, _: object) -> None:
        sent.append(number)
        ranks = me.children()
        for rank in ranks:
            with suppress(psutil.NoSuchProcess):
                rank.send_signal(number)
        if not ranks:
            raise _Signalled(number)

    if threading.current_thread() is not threading.main_thread():
        yield sent
        return
    before = {number: signal.signal(number, forward) for number in map(_number, signals().split(","))}
    try:
        yield sent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _number(name: str) -> signal.Signals:
    return signal.Signals[name]


def _stop_code(exits: dict[int, int]) -> int | None:
    """Exit code if the ranks were told to stop one by one, not through this process, and did
    (runs/ranks/stop_signal.py); else None."""
    ours = {128 + number for number in (*STOPS, AT_ONCE)}
    late = {-signal.SIGTERM}  # had stopped as well, and was about to exit when elastic ended it
    codes = set(exits.values())
    return min(codes & ours) if codes & ours and codes <= ours | late else None


def loopback() -> str:
    """Loopback interface for gloo, which would look up the machine's own name otherwise. That fails in many
    containers."""
    return "lo" if sys.platform == "linux" else "lo0"
