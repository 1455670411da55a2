"""A whole run of `train` against a loop of plain torch: its curve, learning rates, held-out losses and saved weights.

Layouts are compared by a loop of the proof's own; whoever only compares runs with runs does not see that both are one
step late. Here the windows of text, the learning rates and the held-out loss are counted from the beginning by hand.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from checkpoints import newest

from roots_dist.assembly.rank_model import build_model
from roots_dist.config.schema import Config
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.store import Writer
from roots_dist.learning.objectives import make_objective
from roots_dist.runs.track.metrics import METRICS_FILE, read_lines
from roots_dist.runs.train.loop import train
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh

VOCAB, SEQ, STEPS, EVALUATED, PEAK, WARMUP = 61, 12, 6, (0, 4, 6), 1e-2, 2
TOKENS = {"text": 900, "held out": 5 * SEQ + 1}


def config(place: Path) -> Config:
    """eps is large, so that Adam makes a rounding of key biases' gradients, which ought to be zero, no larger."""
    return Config.model_validate(
        {
            "model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": VOCAB, "dropout": 0.1, "init_std": 0.2},
            "objective": {"label_smoothing": 0.1, "z_loss": 0.01},
            "data": {"train": str(place / "text"), "validation": str(place / "held out"), "seq_length": SEQ},
            "train": {
                "steps": STEPS, "global_batch": 4, "micro_batch": 2, "device": "cpu", "eval_every": 4,
                "eval_sequences": 99,
            },
            "optim": {"lr": PEAK, "warmup_steps": WARMUP, "lr_schedule": "linear", "eps": 1e-4, "clip_grad": 1.5},
            "checkpoint": {"every": 0},
            "track": {"folder": str(place / "run"), "wandb": "disabled", "tensorboard": "off"},
            "advanced": {"float64": True, "vocab_multiple": 8},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Config, dict[int, dict[str, float]]]:
    """The config of a run, and what it logged after each step."""
    place = tmp_path_factory.mktemp("loop")
    for seed, (name, tokens) in enumerate(TOKENS.items()):
        with Writer(place / name, np.dtype("<u2")) as writer:
            writer.add(np.random.default_rng(seed).integers(0, VOCAB, tokens).astype("<u2"))
            writer.commit()
    made = config(place)
    assert train(made, Mesh.single()) == 0
    logged: dict[int, dict[str, float]] = {}
    for line in read_lines(place / "run" / METRICS_FILE):
        logged.setdefault(line["step"], {}).update(line)
    return made, logged


def rate(step: int) -> float:
    """The rate of the step with this number, counted from 0: up to the peak, then straight down, to zero behind the
    last one."""
    return PEAK * (step + 1) / WARMUP if step < WARMUP else PEAK * (1 - (step - WARMUP) / (STEPS - WARMUP))


@torch.no_grad()
def held_out_loss(stage) -> float:
    """Plain mean of -log p over every window of the held-out text."""
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, VOCAB, TOKENS["held out"]))
    seen: list[torch.Tensor] = []
    head = stage.pieces[-1]
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0]["hidden"]))
    stage.eval()
    windows, losses = tokens[:-1].view(-1, SEQ), []
    for n, window in enumerate(windows):
        stage({}, MicroBatch(tokens=window[None], targets=window[None], sample_ids=torch.tensor([0])))
        x = F.layer_norm(seen.pop(), (16,), head.norm.weight, head.norm.bias)
        targets = tokens[n * SEQ + 1 : (n + 1) * SEQ + 1]
        losses.append(F.cross_entropy((x @ head.weight.t())[0, :, :VOCAB], targets, reduction="sum"))
    handle.remove()
    stage.train()
    return float(sum(losses)) / (len(windows) * SEQ)


def test_a_run_is_the_loop_of_plain_torch(finished):
    c, logged = finished
    model = build_model(c, Mesh.single())
    (stage,) = model.stages.values()
    matrices = [p.tensor for p in model.params if p.tensor.dim() > 1]
    vectors = [p.tensor for p in model.params if p.tensor.dim() < 2]
    groups = [{"params": matrices, "weight_decay": c.optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(c.optim.beta1, c.optim.beta2), eps=c.optim.eps, foreach=False)
    data = Batches.open(c, make_objective(c), c.data.train)
    held_out = {0: held_out_loss(stage)}
    for step in range(STEPS):
        terms = [term for batch in data.at(step) for term in stage({}, batch).results]
        loss = sum(term.sum for term in terms) / (4 * SEQ)
        adam.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(matrices + vectors, c.optim.clip_grad)
        for group in adam.param_groups:
            group["lr"] = rate(step)
        adam.step()
        ours = logged[step + 1]
        assert ours["loss/train"] == pytest.approx(loss.item(), rel=1e-10)
        assert ours["optim/lr"] == pytest.approx(rate(step), rel=1e-12)
        assert ours["optim/grad_norm"] == pytest.approx(norm.item(), rel=1e-9)
        assert ours["data/tokens"] == (step + 1) * 4 * SEQ
        if step + 1 in EVALUATED:
            held_out[step + 1] = held_out_loss(stage)
    assert {step for step, line in logged.items() if "loss/validation" in line} == {*EVALUATED}
    for step, loss in held_out.items():
        assert logged[step]["loss/validation"] == pytest.approx(loss, rel=1e-10)
        assert logged[step]["perplexity/validation"] == pytest.approx(math.exp(loss), rel=1e-9)
    saved = build_model(c, Mesh.single())
    load_weights(newest(Path(c.track.folder)), saved.params)
    for p, q in zip(saved.params, model.params):
        torch.testing.assert_close(p.tensor, q.tensor, rtol=1e-10, atol=1e-12, msg=lambda m, p=p: f"{p.name}: {m}")
