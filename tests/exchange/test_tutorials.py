"""The documentation site builds without a dead link, and the commands of its tutorials run as they stand."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environ
from hub_models import saved_chat_model

ROOT = Path(__file__).parents[2]
TUTORIALS = sorted((ROOT / "docs").glob("tutorial-*.md"))
SMALLER = {
    "hidden: 192": "hidden: 32", "layers: 4": "layers: 4", "heads: 6": "heads: 2", "seq_length: 256": "seq_length: 32",
    "steps: 250": "steps: 4", "eval_every: 50": "eval_every: 2", "every: 100": "every: 2",
    "warmup_steps: 25": "warmup_steps: 1",
}  # fmt: skip
"""What makes configs/quickstart.yaml a matter of seconds; what is typed stays."""
CHAT = {
    "lora_targets: [query, key, value, out, up, gate, down]": "lora_targets: [query, value]",
    "seq_length: 1024": "seq_length: 64", "global_batch: 16": "global_batch: 1", "precision: bf16": "precision: fp32",
    "recompute: selective": "recompute: none", "warmup_steps: 10": "warmup_steps: 1",
}  # fmt: skip
TOO_LARGE = "bloom-176b"
"""Its proof starts 12 processes; tests/runs/test_verify.py has smaller ones."""


def written(path: Path, config: str, changes: dict[str, str]) -> None:
    text = (ROOT / "configs" / config).read_text(encoding="utf-8")
    for before, after in changes.items():
        assert before in text, before
        text = text.replace(before, after)
    (path / "configs" / config).write_text(text)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A clone with smaller configs, some books, a released model of a few thousand weights, and conversations."""
    found = tmp_path_factory.mktemp("site")
    (found / "configs").mkdir()
    for config in (ROOT / "configs").glob("*.yaml"):
        (found / "configs" / config.name).write_text(config.read_text(encoding="utf-8"))
    written(found, "quickstart.yaml", SMALLER)
    written(found, "chat.yaml", CHAT)
    (found / "books").mkdir()
    lines = [
        json.dumps({"text": f"Once upon a time in {n} there was a miller; he had {n % 7} sons."}) for n in range(400)
    ]
    (found / "books" / "tales.jsonl").write_text("\n".join(lines))
    saved_chat_model(found / "downloads/Qwen3-0.6B")
    ((row,),) = (re.findall(r"^(\{.*\})$", (ROOT / "docs/tutorial-chat.md").read_text(), re.M),)
    (found / "conversations.jsonl").write_text(f"{row}\n" * 4)
    return found


def commands_of(page: Path) -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("roots ")]


def test_every_tutorial_has_commands():
    assert len(TUTORIALS) == 5 and all(commands_of(page) for page in TUTORIALS)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("pages", [TUTORIALS], ids=["in their order"])
def test_the_commands_of_the_tutorials_run_as_they_stand(place, pages):
    order = ("first-run", "own-text", "layout", "cluster", "chat")
    pages = sorted(pages, key=lambda page: order.index(page.stem.removeprefix("tutorial-")))
    for command in [c for page in pages for c in commands_of(page) if TOO_LARGE not in c]:
        typed = command.replace("train.steps=254", "train.steps=6")
        line = f"{shlex.quote(sys.executable)} -m roots_dist {typed.removeprefix('roots ')}"
        variables = environ() | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            line, shell=True, cwd=place, env=variables, input="/exit\n", capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    card = (place / "exports/chat/README.md").read_text()
    for words in (
        "license: other",
        "FILL IN",
        "`runs/qwen3`",
        "`conversations.jsonl`",
        "training loss",
        "AutoTokenizer",
    ):
        assert words in card, words


@pytest.mark.full
def test_the_site_builds_without_a_dead_link(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path / "site"]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    text = {
        name: (tmp_path / "site" / f"{name}.html").read_text()
        for name in ("reference-cli", "reference-python", "config")
    }
    assert "roots verify" in text["reference-cli"] and "--precision" in text["reference-cli"]
    assert (
        "on_evaluation" in text["reference-python"] and "Load the best or newest checkpoint" in text["reference-python"]
    )
    assert (tmp_path / "site/search/search_index.json").stat().st_size > 100_000
