"""A float64 model computes in float64: no narrower floating-point tensor is born in a training step or an evaluation.

A proof at 1e-10 compares two layouts that run the same source. A number that was rounded to float32 on its way is
rounded alike on both sides, and nothing of the proof sees it. A dispatch mode looks at the output of every operation,
those of backward and of the optimizer included.
"""

from __future__ import annotations

import sys

import pytest
import torch
from parity.models import MODELS
from parity.models import config as small_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.evaluate.held_out import score
from roots_dist.runs.train.step import train_step
from roots_dist.world.mesh import Mesh

ALLOWED = {
    ("positions.py", "bucket"): "whole numbers of buckets, at whose borders T5's code rounds in float32",
    ("groups.py", "initial_state"): "AdamW's number of steps, exact in float32 up to 16 million, as torch keeps it",
    ("groups.py", "update"): "the same number, one higher",
}
"""(file, function) of the package -> why its numbers may be narrower."""

LLAMA = dict(
    positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tied_embeddings=False, kv_heads=2, heads=4
)
BERT = dict(family="bert", norm_position="post", embedding_norm=True, activation="gelu", segments=2)
T5 = dict(family="t5", positions="relative", norm="rmsnorm", activation="geglu", bias=False, relative_buckets=8)
LABELS = {"labels": ["a", "b", "c"]}
CASES: dict[str, dict[str, dict[str, object]]] = {
    "gpt": {"model": {"attention_dropout": 0.1}, "objective": {"z_loss": 1e-3}},
    "gpt, documents": {"objective": {"reset_at_documents": True, "z_loss": 1e-3}},
    "llama, recomputed": {"model": LLAMA, "objective": {"z_loss": 1e-3}, "train": {"recompute": "selective"}},
    "llama, blocks recomputed": {"model": LLAMA, "train": {"recompute": "full"}},
    "bloom": {"model": {"positions": "alibi", "heads": 3, "hidden": 24, "embedding_norm": True}},
    "bloom, dropped": {"model": {"positions": "alibi", "heads": 16, "hidden": 32, "attention_dropout": 0.1}},
    "sinusoids": {"model": {"positions": "sinusoidal", "norm_position": "post", "activation": "relu"}},
    "sinusoids, documents": {"model": {"positions": "sinusoidal"}, "objective": {"reset_at_documents": True}},
    "bert": {"model": BERT | {"attention_dropout": 0.1}, "objective": {"name": "mlm-nsp", "z_loss": 1e-3}},
    "electra": {
        "model": BERT | {"family": "electra", "embedding_size": 8}, "objective": {"name": "rtd", "z_loss": 1e-3},
    },
    "t5": {
        "model": T5 | {"attention_dropout": 0.1}, "objective": {"name": "spans", "z_loss": 1e-3},
        "data": {"seq_length": 32},
    },
    "classes": {"model": BERT, "objective": {"name": "classify"}, "finetune": LABELS},
    "tags, unfrozen": {
        "model": LLAMA, "objective": {"name": "tag"},
        "finetune": LABELS | {"strategy": "progressive", "unfreeze_every": 1},
    },
    "answers, lora": {
        "model": LLAMA, "objective": {"name": "instruct"}, "finetune": {"strategy": "lora", "layer_lr_decay": 0.7},
    },
}  # fmt: skip


def config(case: str) -> Config:
    common = {
        "model": {"layers": 2, "hidden": 16, "heads": 2, "vocab": 61, "dropout": 0.1},
        "objective": {"label_smoothing": 0.1},
        "data": {"seq_length": 16},
        "train": {"global_batch": 4, "micro_batch": 2},
        "optim": {"clip_grad": 0.01},
        "advanced": {"float64": True, "loss_chunk": 7, "vocab_multiple": 8},
    }
    sections = CASES[case]
    return Config.model_validate({name: common.get(name, {}) | sections.get(name, {}) for name in {*common, *sections}})


class NarrowFloats(TorchDispatchMode):
    """Notes every floating-point tensor of fewer than 64 bits, by the operation and the place in the package."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.operations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
                self._note(function, tensor)
        return out

    def _note(self, function, tensor: torch.Tensor) -> None:
        frame = sys._getframe(2)
        while frame is not None and "/roots_dist/" not in frame.f_code.co_filename:
            frame = frame.f_back
        if frame is None:
            self.found.add(f"{function} -> {tensor.dtype}, outside of the package")
            return
        place = (frame.f_code.co_filename.rpartition("/")[2], frame.f_code.co_name)
        if place not in ALLOWED:
            self.found.add(f"{function} -> {tensor.dtype} {tuple(tensor.shape)} in {place}, line {frame.f_lineno}")


@pytest.mark.parametrize("case", CASES)
def test_a_float64_model_computes_in_float64(case):
    c = config(case)
    run = build_run(c, Mesh.single(), objective=proof_objective(c))
    for step in range(2):
        batches = random_batches(c, step, 0, 1)
        with NarrowFloats() as seen:
            report = train_step(run, batches, 1e-3)
        assert report.skipped is None and report.grad_norm > c.optim.clip_grad
        assert not seen.found and seen.operations > 100, seen.found
    with NarrowFloats() as seen:
        score(run.passes, run.objective, random_batches(c, 9, 0, 1), None)
    assert not seen.found and seen.operations > 30, seen.found


FEATURED = [name for name in MODELS if name not in CASES and "-" not in name]
FEATURED += ["qwen-moe", "llama-packed", "gpt-prefers", "t5-seq2seq"]


@pytest.mark.parametrize("name", FEATURED)
def test_so_does_every_model_of_the_proof(name):
    """And whatever is added to tests/parity/models.py."""
    c = small_model(name, train__global_batch=2, train__micro_batch=2)
    run = build_run(c, Mesh.single(), objective=proof_objective(c))
    with NarrowFloats() as seen:
        report = train_step(run, random_batches(c, 0, 0, 1), 1e-3)
    assert report.skipped is None and not seen.found and seen.operations > 100, seen.found


def test_a_narrow_number_is_seen_in_forward_in_backward_and_in_a_sum():
    """The test above can fail."""
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    for spoiled in (
        lambda: 0.1 * (x > 0),
        lambda: (x.float() * 1.0).double().sum().backward(),
        lambda: torch.zeros(1).double() + x,
    ):
        with NarrowFloats() as seen:
            spoiled()
        assert seen.found
