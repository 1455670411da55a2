"""vLLM loads exports and computes what the runs do: in a python of its own, which ROOTS_VLLM names. Minutes, not
seconds."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_models import SPECIALS, tokenizer
from test_exchange_exports import ENCODER, LLAMA, a_run

PYTHON = os.environ.get("ROOTS_VLLM")
LOADS = Path(__file__).parents[2] / "tools" / "vllm_loads.py"
SIZES = dict(layers=2, hidden=64, heads=2)
"""vLLM's attention wants heads of 32 and more."""
BERT = dict(family="bert", segments=2, **ENCODER)
LABELS = {"labels": ["no", "yes", "perhaps"]}
RUNS = {
    "gpt_neox": {"model": dict(positions="rotary")},
    "gpt2": {"model": dict(tied_embeddings=False, activation="gelu")},
    "bloom": {"model": dict(positions="alibi", embedding_norm=True)},
    "llama": {"model": LLAMA | dict(bias=True)},
    "bert": {"model": BERT, "objective": {"name": "mlm-nsp"}},
    "llama classify": {"model": LLAMA, "objective": {"name": "classify"}, "finetune": LABELS},
    "bert tag": {"model": BERT, "objective": {"name": "tag"}, "finetune": LABELS},
}

IDS_ALONE = ("gpt2",)
"""Without a tokenizer."""


@pytest.mark.timeout(900)
@pytest.mark.skipif(PYTHON is None, reason="ROOTS_VLLM names no python that has vLLM")
def test_vllm_loads_exports_and_says_what_the_runs_say(tmp_path):
    for kind in ("gpt", "bert"):
        tokenizer(SPECIALS[kind]).save(str(tmp_path / f"{kind}.json"))
    runs = []
    for name, tree in RUNS.items():
        path = tmp_path / f"{tree['model'].get('family', 'gpt')}.json"
        data = {"seq_length": 64} | ({} if name in IDS_ALONE else {"tokenizer": str(path)})
        runs.append(a_run(tmp_path / name, tree | {"model": SIZES | tree["model"], "data": data}))
    done = subprocess.run([sys.executable, LOADS, *runs, "--python", PYTHON], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if " | " in line]
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(lines) == len(RUNS) and all(line.endswith("✓") for line in lines), done.stdout
