"""A run whose output cannot be written any more goes on: the disk of its log is full, or `head` has read enough."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
import threading

import pytest
from chaos.hangs import write_run
from commands import ROOT, environ, start
from rich.console import Console

from roots_dist import logs
from roots_dist.cli.main import main
from roots_dist.cli.train import TRAIN
from roots_dist.config.load import Loaded
from roots_dist.config.schema import Config
from roots_dist.environment import single_process
from roots_dist.runs.ranks.run_on_ranks import be_rank
from roots_dist.runs.ranks.stop_signal import read_end
from roots_dist.runs.track.progress import ProgressTracker
from roots_dist.testing.parity import Difference
from roots_dist.testing.world import ENVIRONMENTS
from roots_dist.verify import verify
from roots_dist.verify.proof import Proof


class Full(io.StringIO):
    """A stream that takes nothing, or nothing for a while."""

    def __init__(self, error: OSError, until: int = 10**9):
        super().__init__()
        self.error, self.left = error, until

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left >= 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")])
def test_what_cannot_be_shown_is_said_once_and_ends_nothing(error, monkeypatch, caplog):
    """rich ends the process where a pipe is broken, and every other error ended the run."""
    shown, noted = Full(error, until=1), Full(error)
    monkeypatch.setattr(sys, "stdout", shown)
    monkeypatch.setattr(sys, "stderr", noted)
    with logs.outliving_output():
        progress = ProgressTracker(200, console=Console(width=80))
        for step in range(1, 9):
            progress.log(step, {"loss/train": 2.0})
            print("warning", file=sys.stderr, flush=True)
        progress.close()
    assert (sys.stdout, sys.stderr) == (shown, noted)
    assert "loss 2.000" in shown.getvalue(), "what can be written again is"
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.partition(" (")[0] for line in said] == [
        "standard output cannot be written",
        "standard error cannot be written",
    ]


def test_a_rank_that_trains_goes_on_without_its_output(monkeypatch):
    monkeypatch.setattr(logs, "setup", lambda rank, place: None)
    monkeypatch.setattr(sys, "stdout", Full(BrokenPipeError(32, "Broken pipe")))
    config = Config.model_validate({"data": {"train": "x"}, "train": {"device": "cpu"}})

    def body(config, world, layout, who) -> int:
        Console(width=80).print("step 1")
        print("step 2", flush=True)
        return 7

    assert be_rank(single_process(), lambda: Loaded(config), body, TRAIN) == 7


def test_a_closed_output_leads_nowhere_and_not_into_the_next_file(tmp_path):
    code = "import os, sys; from roots_dist.logs import open_closed_streams as do; do(); f = open(sys.argv[1], 'w')\n"
    code += "print('lost', flush=True); os.system('echo lost'); f.write(str(sys.stdout.isatty()))"
    words = ["sh", "-c", '"$@" >&- <&-', "sh", sys.executable, "-c", code, str(tmp_path / "file")]
    done = subprocess.run(words, env=environ(), capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (0, "") and (tmp_path / "file").read_text() == "False"


OUTCOMES = {
    "--help": 0,
    "--version": 0,
    "schedule 1f1b --ranks 2 --microbatches 2": 0,
    "ls tests/golden": 0,
    "train configs/quickstart.yaml --print-config": 0,
    "train configs/quickstart.yaml --print-config model.heads=5": 2,
    "verify configs/quickstart.yaml": 0,
    "verify configs/quickstart.yaml optim.lr=9": 1,
    "verify nowhere.yaml": 2,
    "nonsense": 2,
}


@pytest.mark.parametrize("line", OUTCOMES)
def test_the_exit_code_is_the_outcome_though_nobody_reads(line, monkeypatch):
    """A passed proof ended with 1, which means that a layout differs, where `head` had read enough."""
    monkeypatch.chdir(ROOT)

    def proofs(config, wanted):
        largest = 1.0 if config.optim.lr == 9 else 0.0
        yield Proof("TP2", (), (Difference("loss", largest, 1e-9, "step 1"),))
        yield Proof("PP2", (), (Difference("loss", 0.0, 1e-9, ""),))

    monkeypatch.setattr(verify, "proofs", proofs)
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Full(BrokenPipeError(32, "Broken pipe")))
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == OUTCOMES[line]


def test_a_pipe_that_is_closed_is_no_error_of_a_process():
    """Python's own last flush would end it with 120."""
    words = ["sh", "-c", '{ "$@"; echo "code $?" >&2; } | true', "sh", sys.executable, "-m", "roots_dist", "--help"]
    done = subprocess.run(words, env=environ(), capture_output=True, text=True, timeout=250)
    assert done.stderr == "code 0\n"


def test_output_that_is_lost_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", Full(OSError(28, "No space left on device")))
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("✗ standard output: expected a place that can be written (no space left")


@pytest.mark.full
@pytest.mark.parametrize("where", ["a full disk", "a pipe that nobody reads"])
def test_a_run_that_cannot_speak_is_finished_all_the_same(where, tmp_path):
    out = "/dev/full"
    if where != "a full disk":
        out = str(tmp_path / "pipe")
        os.mkfifo(out)
        threading.Thread(target=lambda: os.close(os.open(out, os.O_RDONLY)), daemon=True).start()
    words = ("train", str(write_run(tmp_path)), "train.steps=2")
    process = start(main, words, environ() | ENVIRONMENTS["cpu"], [out, str(tmp_path / "err")])
    process.join(250)
    said = (tmp_path / "err").read_text()
    assert process.exitcode == 0, said
    assert "standard output cannot be written" in said and said.count("cannot be written") == 1
    assert read_end(tmp_path / "run" / "ended.txt") == "finished after step 2"
    assert (tmp_path / "run" / "curve.png").exists()
