"""The command line as a user meets it: quick help, helpful refusals, exit codes, other launchers' habits."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import commands
import pytest

from roots_dist.config.load import load
from roots_dist.config.schema import Config
from roots_dist.errors import UserError
from roots_dist.runs.ranks.local import processes_for

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
CLEAN = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}


def roots(*arguments: str, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = CLEAN | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"} | variables
    return subprocess.run(
        [sys.executable, "-m", "roots_dist", *arguments], env=environ, capture_output=True, text=True, timeout=timeout
    )


def test_help_names_every_command_and_imports_nothing_heavy():
    found = roots("--help")
    assert found.returncode == 0
    assert all(
        command in found.stdout for command in ("prepare", "train", "evaluate", "generate", "verify", "schedule")
    )
    code = (
        "import sys, roots_dist.cli.main; heavy = {'torch', 'deepspeed', 'numpy', 'pydantic', 'rich', 'yaml'}; "
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=CLEAN | {"PYTHONPATH": str(ROOT)}, check=True, timeout=250)


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "generate", "verify", "schedule"])
def test_each_commands_help_shows_an_example(command):
    assert f"roots {command} " in roots(command, "--help").stdout.split("Usage:")[1].split("\n", 1)[1]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("trian", "x"), ["train"]),
        (("train",), ["CONFIG"]),
        (("train", "nope.yaml"), ["✗ nope.yaml", "Fix: "]),
        (("train", QUICKSTART, "optim.lrr=3"), ["✗ optim.lrr = 3 (command line)", "did you mean optim.lr"]),
        (("train", QUICKSTART, "optim.lrr=3", "model.heads=0"), ["✗ optim.lrr", "✗ model.heads"]),
        (("train", QUICKSTART, "--print-confg"), ["--print-config"]),
        (("train", QUICKSTART, "--processes", "0"), ["--processes"]),
        (("train", QUICKSTART, "--processes", "3", "data.train=nowhere"), ["✗ world size = 3", "tp × parallel.pp"]),
        (("train", QUICKSTART, "data.train=nowhere"), ["✗ data.train = 'nowhere' (command line)", "roots prepare"]),
        (("generate", "runs/x", "p", "--temperature", "-1"), ["--temperature"]),
        (("schedule", "1f2b", "--ranks", "2", "--microbatches", "3"), ["✗ ", "1f1b"]),
    ],
)
def test_a_mistake_is_refused_with_exit_code_2_and_no_traceback(arguments, words):
    found = commands.roots(*arguments)
    assert found.returncode == 2 and "Traceback" not in found.stderr
    assert all(word in found.stderr for word in words), found.stderr


def test_print_config_shows_a_tree_that_reads_back(tmp_path):
    found = roots("train", QUICKSTART, "model.layers=7", "--print-config")
    assert found.returncode == 0
    (tmp_path / "again.yaml").write_text(found.stdout)
    assert load(tmp_path / "again.yaml") == load(QUICKSTART, ["model.layers=7"])


def test_print_config_says_what_could_not_run():
    found = commands.roots("train", QUICKSTART, "parallel.pp=5", "--print-config")
    assert found.returncode == 2 and "pp: 5" in found.stdout and "✗ model.layers = 4" in found.stderr


def test_the_rank_that_deepspeeds_launcher_adds_is_ignored():
    found = roots("--local_rank=1", "train", QUICKSTART, "--print-config")
    assert found.returncode == 0 and "layers: 4" in found.stdout


def test_contradicting_launcher_variables_are_refused():
    found = commands.roots("train", QUICKSTART, RANK="3")
    assert found.returncode == 2 and "WORLD_SIZE is not set" in found.stderr


def test_processes_are_not_asked_for_under_a_launcher():
    found = commands.roots("train", QUICKSTART, "--processes", "4", RANK="0", WORLD_SIZE="1")
    assert found.returncode == 2 and "leave --processes out" in found.stderr


def test_prepare_takes_a_seed_and_the_token_that_ends_a_document(tmp_path):
    (tmp_path / "a.txt").write_text("To be, or not to be.")
    prepared = commands.roots(
        "prepare", str(tmp_path / "a.txt"), "--output", str(tmp_path / "one"), "--vocab", "260", "--seed", "7"
    )
    assert prepared.returncode == 0, prepared.stderr
    tokenizer = (tmp_path / "one" / "tokenizer.json").read_text().replace("<|endoftext|>", "<stop>")
    (tmp_path / "mine.json").write_text(tokenizer)
    again = (
        "prepare",
        str(tmp_path / "a.txt"),
        "--output",
        str(tmp_path / "two"),
        "--tokenizer",
        str(tmp_path / "mine.json"),
    )
    refused = commands.roots(*again)
    assert refused.returncode == 2 and refused.stderr.startswith("✗ end_of_document = None: expected a token of")
    assert commands.roots(*again, "--end-of-document", "<stop>").returncode == 0
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("one", "two")]
    assert [m["options"]["seed"] for m in manifests] == [7, 1234]
    assert [m["end_of_document"] for m in manifests] == ["<|endoftext|>", "<stop>"]


def test_a_schedule_is_drawn():
    found = commands.roots("schedule", "1f1b", "--ranks", "3", "--microbatches", "4")
    assert found.returncode == 0 and "F0" in found.stdout


def test_a_schedule_that_deadlocks_is_refused_in_seconds_instead_of_a_hang():
    """The user's own: rank 0 waits for a gradient before its second forward, rank 1 wants all activations first."""
    code = """
from dataclasses import replace
from roots_dist.schedule.schedules import SCHEDULES, gpipe, one_f_one_b
def bad(rank, ranks, microbatches):
    return gpipe(rank, ranks, microbatches) if rank else one_f_one_b(0, 1, microbatches)
SCHEDULES["gpipe"] = replace(SCHEDULES["gpipe"], actions=bad)
from roots_dist.cli.main import main
main()
"""
    overrides = ["parallel.tp=1", "parallel.schedule=gpipe", "train.micro_batch=1"]
    found = subprocess.run(
        [sys.executable, "-c", code, "train", QUICKSTART, *overrides],
        env=CLEAN | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=250,
    )  # fmt: skip
    assert found.returncode == 2 and "✗ parallel.schedule = 'gpipe' (command line)" in found.stderr
    assert "rank 0 waits at B0.0 for rb0.0, rank 1 waits at F1.1 for rf1.1" in found.stderr


def test_the_ranks_of_a_bare_run():
    config = Config(parallel={"tp": 2, "pp": 2})
    assert processes_for(config, None, gpus=0) == 4
    assert processes_for(config, 8, gpus=0) == 8
    assert processes_for(config, None, gpus=11) == 8
    with pytest.raises(UserError, match="Fix: "):
        processes_for(config, None, gpus=3)


def test_under_torchrun_the_cause_stands_out_and_a_users_mistake_is_said_once(tmp_path):
    def torchrun(folder: Path, *behaviours: str) -> str:
        command = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
        script = [str(Path(__file__).with_name("ranks.py")), str(folder), *behaviours]
        environ = CLEAN | {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
        found = subprocess.run(
            [sys.executable, *command, *script], env=environ, capture_output=True, text=True, timeout=250
        )
        assert found.returncode != 0
        return found.stderr

    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQiqqq", 1, 8, 1, 2, 1000, 0, 0, 1)
    (tmp_path / "corpus.idx").write_bytes(index)
    (tmp_path / "corpus.bin").write_bytes(bytes(2000))
    err = torchrun(tmp_path, "wait", "raise")
    assert "╭─ rank 1 (pp0 dp1 tp0, node " in err and "│ ValueError: the flux capacitor is empty" in err
    assert "full traceback: " in err and err.count("╭─") == 1
    assert torchrun(tmp_path, "alone:user", "alone:user").count("✗ corpus = 'x'") == 1
