"""`roots train` without a launcher: starts the ranks on this machine, waits for them, says what went wrong.

    roots train --processes_for--> how many --launch--> torch elastic --> `python -m roots_dist train ...` on every rank

torch elastic brings the rendezvous and the watching; it does not restart, since a run resumes by itself when repeated.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from roots_dist import environment
from roots_dist.config.schema import Config
from roots_dist.errors import UserError
from roots_dist.runs.ranks.failure_report import read_records, summarize

SHOW_CURSOR = "\x1b[?25h"
SHUTDOWN_S = 60
"""How long ranks may take to end after a signal, before they are killed: a step and a checkpoint."""
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Handed on to the ranks. SIGUSR1 is what Slurm is told to send before a time limit (runs/train/stop_signal.py)."""


def signals() -> str:
    """Of SIGNALS those that this process does not ignore: torch elastic would listen to SIGHUP under nohup too, and
    end."""
    return ",".join(name for name in SIGNALS.split(",") if signal.getsignal(signal.Signals[name]) is not signal.SIG_IGN)


def processes_for(config: Config, asked: int | None, gpus: int) -> int:
    """How many ranks to start: as asked, else one for each GPU, else one replica of the model (tp × pp)."""
    model_size = config.parallel.tp * config.parallel.pp
    if asked is not None:
        return asked
    if gpus == 0:
        return model_size
    if gpus < model_size:
        raise UserError(
            f"parallel.tp × parallel.pp = {model_size}: expected at most the {gpus} GPUs of this machine. "
            "Fix: lower one "
            f"of them, start the run on several machines (torchrun, srun), or use train.device=cpu."
        )
    return gpus - gpus % model_size


def launch(size: int, arguments: Sequence[str], threads: int | None = None, what: str = "") -> int:
    """Run `python ARGUMENTS` on `size` ranks of this machine; the exit code, after every rank is gone.

    A rank that fails ends the others within seconds; so do SIGTERM and Ctrl-C, which are handed on, and the death of
    this process (runs/ranks/die_with_parent.py). `what` they are is shown on a terminal, since they take seconds to
    appear.
    """
    if what and sys.stderr.isatty():
        print(f"starting {size} processes for {what} ...", file=sys.stderr)
    records = Path(tempfile.mkdtemp(prefix="roots-"))
    environment.export(
        {
            environment.FAILURES: str(records),
            environment.LAUNCHER_PID: str(os.getpid()),
            "OMP_NUM_THREADS": str(threads or max(1, environment.cores() // size)),
        }
    )
    environment.export(
        {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": loopback()}, replace=False
    )
    try:
        exits = _run(size, arguments, records)
        if not exits:
            return 0
        found = read_records(records)
        if not found and (code := _told_to_stop(exits)):
            return code
        verdict = summarize(found, exits, size)
        print(verdict.text, file=sys.stderr)
        return verdict.code
    except _Signalled as stop:
        return 128 + stop.number
    finally:
        shutil.rmtree(records, ignore_errors=True)
        if sys.stdout.isatty():
            print(SHOW_CURSOR, end="", flush=True)  # a rank that was killed could not, and its live line had hidden it


class _Signalled(Exception):
    """This process was told to end, and has ended the ranks."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def _run(size: int, arguments: Sequence[str], records: Path) -> dict[int, int]:
    """Exit codes of the ranks if any of them failed, else nothing."""
    logging.disable(
        logging.ERROR
    )  # elastic's loggers have levels of their own; its banners would bury the rank's error
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=str(os.getpid()),
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=SHUTDOWN_S,
        signals_to_handle=signals(),
        logs_specs=DefaultLogsSpecs(log_dir=str(records / "elastic")),
    )
    try:
        elastic_launch(config, sys.executable)(*arguments)
    except ChildFailedError as error:
        return {rank: failure.exitcode for rank, failure in error.failures.items()}
    except SignalException as stop:
        raise _Signalled(int(stop.sigval)) from None
    finally:
        logging.disable(logging.NOTSET)
    return {}


def _told_to_stop(exits: dict[int, int]) -> int | None:
    """The exit code of ranks that were told to stop one by one, not by way of this process (runs/train/stop_signal.py),
    and did."""
    ours = {128 + number for number in (signal.SIGTERM, signal.SIGUSR1)}
    late = {-signal.SIGTERM}  # had stopped too, and was about to leave when elastic ended it
    codes = set(exits.values())
    return min(codes & ours) if codes & ours and codes <= ours | late else None


def loopback() -> str:
    """gloo looks the machine's own name up otherwise, which fails in many containers."""
    return "lo" if sys.platform == "linux" else "lo0"
