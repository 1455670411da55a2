"""Does vLLM load what `roots export` writes, and compute the same? Exports runs, asks a python that has vLLM, compares.

    python tools/vllm_loads.py runs/quickstart runs/bert-quickstart --python ~/vllm/bin/python

    run --export_model--> folder --vllm_reader.py, in that python--> tokens, log-probabilities
        --held against--> the run's

Decoders go on with a text and with words drawn at random, greedily; compared are the new tokens, and the
log-probability of every word at each place of prompt and answer (the answer's places come from vLLM's cache of keys and
values). Encoders and classifiers read the same; compared are all their logits. Exits with 1 if any differs by more than
rounding, or is not loaded.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from roots_dist.assembly.passes import build_passes
from roots_dist.config.run_config import config_of_run
from roots_dist.config.schema import Config
from roots_dist.learning.data.tokenizer import load_codec
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.request import Request
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.storage.exchange.compare import BOUND, comparison_batch, our_logits
from roots_dist.storage.exchange.exporting import export_model
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh

READER = Path(__file__).with_name("vllm_reader.py")
TEXT = "The state of the Union"
NEW = 16
"""Tokens that a decoder adds."""
LONGEST = 160
"""Characters of an error that are shown."""
TASKS = {"clm": "generate", "instruct": "generate", "spans": "generate", "classify": "classify"}
"""What vLLM is asked to do, by objective; the others have an output at each token."""
OVERRIDES = {"BertForPreTraining": {"architectures": ["BertForMaskedLM"]}}
"""vLLM knows the class without the head of next sentences, and leaves that head out when it loads."""
DEVIATES = {"BloomForCausalLM": {"model.activation": "gelu"}}
"""What vLLM 0.32 computes otherwise than transformers, as our config says it: its BLOOM has the exact gelu, not that of
tanh."""
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the model in the process that is asked for its class
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "TORCHDYNAMO_DISABLE": "1",  # on CPUs, or it compiles C++ for a minute
}


class Answer(NamedTuple):
    told: dict
    """vllm_reader.py's answer.json"""
    logits: list[Tensor]
    """of each text"""


class Seen(NamedTuple):
    """A line of the table."""

    run: str
    architecture: str
    kind: str
    """vLLM's class, or why there is none"""
    difference: float
    """largest, of all logits"""
    largest: float
    notes: list[str]
    """how many of the greedy tokens are the run's, and whether a text has the same ids"""
    good: bool

    def __str__(self) -> str:
        said = (
            ", ".join([f"{self.difference:.1e} of {self.largest:.3g}", *self.notes]) if self.largest else "not loaded"
        )
        return f"{self.run} | {self.architecture} | {self.kind} | {said} | {'✓' if self.good else '✗'}"


def texts_for(config: Config) -> list[list[int]]:
    """Ids of TEXT, if the run has a tokenizer, and words drawn at random."""
    room = config.data.seq_length - NEW
    drawn = comparison_batch(config).tokens[:, :room].tolist()
    if config.data.tokenizer is None:
        return drawn
    return [load_codec(config.data.tokenizer).encode(TEXT)[:room], *drawn]


def job_for(config: Config, architecture: str, folder: Path, answer: Path) -> dict:
    """What vllm_reader.py is to do with the export."""
    return {
        "folder": str(folder),
        "answer": str(answer),
        "prompts": texts_for(config),
        "new": NEW,
        "vocab": config.model.vocab,
        "text": TEXT if config.data.tokenizer is not None else "",
        "task": TASKS.get(config.objective.name, "token_classify"),
        "overrides": OVERRIDES.get(architecture, {}),
    }


def ask(python: str, jobs: list[dict], work: Path) -> list[Answer | str]:
    """vLLM's answers; of what it refuses, why."""
    (work / "jobs.json").write_text(json.dumps(jobs))
    subprocess.run([python, READER, work / "jobs.json"], env=QUIET | os.environ, check=True)
    return [read(Path(job["answer"]), len(job["prompts"])) for job in jobs]


def read(folder: Path, texts: int) -> Answer | str:
    """What vllm_reader.py left there; of a log alone, the last error in it."""
    if not (folder / "answer.json").is_file():
        log = (folder / "log").read_text()
        return next((line.strip() for line in reversed(log.splitlines()) if "Error" in line), log)[:LONGEST]
    logits = load_file(folder / "logits.safetensors")
    return Answer(json.loads((folder / "answer.json").read_text()), [logits[str(i)] for i in range(texts)])


def greedy(config: Config, run: Path, texts: list[list[int]]) -> list[list[int]]:
    """What the run goes on with, NEW tokens to each."""
    passes = build_passes(config, Mesh.single())
    load_weights(best_or_newest(run), passes.model.params)
    answers = decode(passes, texts, Request(max_tokens=NEW, sampling=Sampling(temperature=0)))
    return [answer[0].tokens for answer in answers]


def logits_of(config: Config, run: Path, tokens: list[int]) -> Tensor:
    """Logits of the run: [S, V], [S, C] or [C]."""
    batch = MicroBatch(tokens=torch.tensor([tokens]), sample_ids=torch.arange(1), logits_at=slice(None))
    return our_logits(config, best_or_newest(run), batch)[0][0]


def held_against(run: Path, config: Config, architecture: str, texts: list[list[int]], answer: Answer | str) -> Seen:
    """texts and answer: what vLLM was asked, and its answer or why there is none."""
    if isinstance(answer, str):
        return Seen(run.name, architecture, answer, math.nan, 0.0, [], False)
    told, notes = answer.told, []
    if told["tokens"]:
        ours, theirs = greedy(config, run, texts), told["tokens"]
        right = sum(a == b for mine, other in zip(ours, theirs, strict=True) for a, b in zip(mine, other, strict=True))
        notes.append(f"{right} of {NEW * len(texts)} tokens equal")
        whole = [[*text, *new] for text, new in zip(texts, theirs, strict=True)]
        expected = [logits_of(config, run, ids)[:-1].log_softmax(-1) for ids in whole]
    else:
        ours = theirs = []
        whole, expected = texts, [logits_of(config, run, ids) for ids in texts]
    if config.model.family == "gpt" and config.data.tokenizer is not None:  # encoders: theirs adds [CLS] and [SEP]
        notes.append(f"ids {'equal' if told['ids'] == texts[0] else 'differ'}")
    difference = rest = apart(expected, answer.logits)
    if architecture in DEVIATES:
        other = config.changed(DEVIATES[architecture])
        rest = apart([logits_of(other, run, ids)[:-1].log_softmax(-1) for ids in whole], answer.logits)
        notes.append(f"{rest:.1e} with {DEVIATES[architecture]}")
    largest = max(a.abs().max().item() for a in expected)
    equal = rest <= BOUND * max(1.0, largest)  # False of nan
    good = equal and ours == theirs and "ids differ" not in notes
    return Seen(run.name, architecture, told["class"], difference, largest, notes, good)


def apart(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference; nan if there is one."""
    shapes = [(a.shape, b.shape) for a, b in zip(expected, found, strict=True)]
    assert all(a == b for a, b in shapes), shapes
    return torch.cat([(a - b).abs().flatten() for a, b in zip(expected, found)]).max().item()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--python", default=sys.executable, help="one that has vLLM")
    args = parser.parse_args()
    configs = [
        config_of_run(run).config.changed({"train.precision": "fp32", "train.device": "cpu"}) for run in args.runs
    ]
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        jobs, architectures = [], []
        for i, (run, config) in enumerate(zip(args.runs, configs)):
            folder, answer = work / f"{i}-{run.name}", work / f"{i}-answer"
            answer.mkdir()
            export_model(run, folder)
            architectures.append(json.loads((folder / "config.json").read_text())["architectures"][0])
            jobs.append(job_for(config, architectures[-1], folder, answer))
        answers = ask(args.python, jobs, work)
    print(*[answer.told["versions"] for answer in answers if isinstance(answer, Answer)][:1])
    good = True
    for run, config, architecture, job, answer in zip(args.runs, configs, architectures, jobs, answers, strict=True):
        seen = held_against(run, config, architecture, job["prompts"], answer)
        print(seen, flush=True)
        good &= seen.good
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
