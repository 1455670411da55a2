"""The commands of README and docs run as they stand, in a clone with smaller configs; those that cannot are named.

The tutorials' are in test_tutorials.py; what is refused, drawn or printed is compared in tests/test_readme.py.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environ
from hub_models import saved, saved_chat_model
from test_tutorials import CHAT, ROOT, written

from roots_dist.learning.data.prepare import prepare

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = ("roots", "torchrun", "deepspeed", "mpirun", "srun", "sbatch", "docker", "apptainer", "kubectl", "make")
PROGRAMS += (r"python (?!\d)\S*", "pytest", "git", "transformers", "hf", "pip")
NOT_RUN = {
    r"^(srun|sbatch|kubectl) |launch/slurm.sh": "asks a cluster's scheduler: tests/cluster",
    r"n1|node1|HOSTFILE=|PYTHON |/shared/|deepspeed --hostfile": "of several machines: tests/cluster",
    r"^(docker|apptainer) ": "needs an image: tests/unit/test_docker.py, docs/containers.md",
    r"^make ": "installs and takes minutes: continuous integration",
    r"^pytest |^python -m tests\.|^python (benchmarks|docs)/|^git clone|--matrix|tools/vllm": "measures for long",
    r"--processes (64|384)": "its proof starts 8 processes or more: tests/runs/test_verify.py; its plan is drawn below",
    r"--lm-eval|--folder |my-task": "reads what a reader has: tests/reference/test_lm_eval.py",
    r"^roots prepare .* --output data/sotu-wordpiece": "the clone has it, of other text, and a run of it",
    r"^transformers serve": "tests/exchange/test_exchange_serve.py",
    r"parallel.pp=5|optim.lrr|micro_batch=5|data/nowhere": "is refused: tests/test_readme.py",
}
"""Commands that are not run here, and why."""
PLANS = ("roots plan",)
"""What needs one process for any number of processes."""


def commands_of(page: Path) -> list[str]:
    """Its lines that are commands, each once; a line that ends with a backslash goes on."""
    text = page.read_text(encoding="utf-8").replace("\\\n", "")
    fenced = [body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S) if kind in ("", "sh")]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    lines = [line for body in fenced for line in body.splitlines()]
    lines += [line[4:] for line in re.findall(r"^ {4}\S.*$", rest, re.M)]
    bare = [line.removeprefix("$ ") for line in lines]
    starts = re.compile(rf"([A-Z_]+=\S+ )*({'|'.join(PROGRAMS)}|launch/\w+\.sh) ")
    return list(dict.fromkeys(line for line in bare if starts.match(line)))


def reason(command: str) -> str | None:
    """Why a command is not run."""
    if command.startswith(PLANS):
        return None
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command)), None)


ALL = [(page, command) for page in PAGES if not page.stem.startswith("tutorial-") for command in commands_of(page)]
RUN = [(page, command) for page, command in ALL if reason(command) is None]


QUICKSTART = {
    "hidden: 192": "hidden: 32", "heads: 6": "heads: 2", "seq_length: 256": "seq_length: 32",
}  # fmt: skip
SHORT = {
    "steps: 500": "steps: 4", "steps: 250": "steps: 4", "steps: 800": "steps: 4", "eval_every: 100": "eval_every: 2",
    "eval_every: 50": "eval_every: 2", "warmup_steps: 60": "warmup_steps: 1", "warmup_steps: 30": "warmup_steps: 1",
    "warmup_steps: 25": "warmup_steps: 1", "  every: 100": "  every: 2", "ffn: 512": "ffn: 64",
    "global_batch: 128": "global_batch: 4", "micro_batch: 32": "micro_batch: 1", "eval_sequences: 512": "",
    "epochs: 12": "epochs: 1", "eval_sequences: 233": "eval_sequences: 8",
}  # fmt: skip
"""What makes configs a matter of seconds; what is typed stays."""
SMALLER = {
    "quickstart.yaml": QUICKSTART, "llama-quickstart.yaml": QUICKSTART | SHORT, "bert-quickstart.yaml": SHORT,
    "t5-quickstart.yaml": QUICKSTART | SHORT, "bert-languages.yaml": SHORT, "chat.yaml": CHAT,
}  # fmt: skip
TALE = "Once upon a time in {} there was a miller. He had {} sons, and the people of the United States met Mr. Smith."
CORPORA = {
    "sotu": {},
    "mine": {},
    "sotu-wordpiece": {"kind": "wordpiece", "split_sentences": True},
    "sotu-unigram": {"kind": "unigram"},
}
BEFORE = (
    "python examples/tasks.py data/tasks",
    "roots train configs/quickstart.yaml",
    "roots train configs/bert-quickstart.yaml",
    "roots train configs/t5-quickstart.yaml",
)
"""What a reader has done before: the start page and the first lines of configs say it."""


OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}
"""Processes of root, and more than there are cores."""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A clone with smaller configs and corpora, released models of a few thousand weights, books and conversations."""
    found = tmp_path_factory.mktemp("pages")
    for folder in ("configs", "launch", "examples"):
        shutil.copytree(ROOT / folder, found / folder)
    for config, changes in SMALLER.items():
        text = (ROOT / "configs" / config).read_text(encoding="utf-8")
        written(found, config, {before: after for before, after in changes.items() if before in text})
    (found / "books").mkdir()
    books = [json.dumps({"body": TALE.format(n, n % 7)}) for n in range(400)]
    with gzip.open(found / "books" / "tales.jsonl.gz", "wt") as file:
        file.write("\n".join(books))
    for name, options in CORPORA.items():
        prepare([str(found / "books")], found / "data" / name, vocab=400, text_key="body", **options)
    saved_chat_model(found / "downloads/Qwen3-0.6B")
    for name, folder in {"gpt2": "gpt2", "olmoe": "OLMoE-1B-7B-0924", "electra": "electra-small-discriminator"}.items():
        saved(name, found / "downloads" / folder)
    (found / "downloads/electra-small-discriminator/generator").rename(found / "downloads/electra-small-generator")
    talk = [{"from": "human", "value": "Is it raining?"}, {"from": "gpt", "value": "Take an umbrella."}]
    (found / "sharegpt.json").write_text(json.dumps([{"conversations": talk}] * 4))
    pair = {"prompt": "Is it raining?", "chosen": "Take an umbrella.", "rejected": "No."}
    (found / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 16)
    (found / "prompts.txt").write_text("The people\nThe states\n")
    (found / "hosts").write_text("node1 slots=4\nnode7 slots=4\n")
    programs = found / "programs"
    programs.mkdir()
    for name, words in {"roots": "-m roots_dist", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
        (programs / name).chmod(0o755)
    return found


@pytest.mark.full
@pytest.mark.timeout(7200)
def test_the_commands_of_the_pages_run_as_they_stand(place):
    beside = Path(sys.executable).parent
    variables = environ() | {"PATH": f"{place}/programs:{beside}:{os.environ['PATH']}", "WANDB_MODE": "disabled"}
    variables |= {"OMP_NUM_THREADS": "1"} | OPEN_MPI
    wrong = []
    for name, command in [("before", line) for line in BEFORE] + [(page.name, line) for page, line in RUN]:
        if not shutil.which(command.split()[0], path=variables["PATH"]) and not command[0].isupper():
            continue
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=place,
            env=variables,
            input="/exit\n",
            capture_output=True,
            text=True,
            timeout=900,
        )
        if done.returncode:
            wrong.append(f"{name}: {command}\n{done.stdout[-1000:]}\n{done.stderr[-2000:]}")
    assert not wrong, "\n\n".join(wrong)


def test_every_command_of_the_pages_is_run_or_has_a_reason():
    assert len(RUN) > 60
    for pattern in NOT_RUN:
        assert any(re.search(pattern, command) for _, command in ALL), f"no page has {pattern} any more"
    for page, command in ALL:
        runs = re.match(r"(roots|torchrun|deepspeed|mpirun|python examples/) ?|(\w+=\S+ )+launch/torchrun.sh ", command)
        assert reason(command) or runs, f"{page.name}: {command}"
