"""Twelve steps of training against torch.optim.AdamW over a twin of the model, in float64.

What tests/conformance/test_zero.py has not: parameters that join later and learn at their own rates, a skipped step, a
rate of each step by its formula, steps that are clipped and steps that are not, and decay by the names of parameters.
Gradients of the twin come from plain backward passes; which parameter does what is written down here.
"""

from __future__ import annotations

import math

import pytest
import torch

from roots_dist.assembly.rank_model import build_model
from roots_dist.assembly.run import build_run
from roots_dist.config.lr_schedules import lr_schedule
from roots_dist.config.schema import Config
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.parallel.optim.norm import clip_factor
from roots_dist.runs.train.step import train_step
from roots_dist.world.batch import IGNORE
from roots_dist.world.mesh import Mesh

STEPS, LAYERS, EVERY, SKIPPED = 12, 2, 3, 4
PEAK, FLOOR, WARMUP, LAYER_DECAY = 1e-2, 1e-3, 3, 0.6
BERT = dict(family="bert", norm_position="post", embedding_norm=True, activation="gelu", segments=2)
CASES = {
    "gpt": ({}, {}),
    "t5": (
        dict(family="t5", positions="relative", norm="rmsnorm", activation="relu", bias=False, relative_buckets=8),
        {"objective": {"name": "seq2seq"}},
    ),
    "bert, unfrozen": (
        BERT,
        {
            "objective": {"name": "classify"},
            "finetune": {
                "labels": ["a", "b", "c"], "strategy": "progressive", "unfreeze_every": EVERY,
                "layer_lr_decay": LAYER_DECAY,
            },
        },
    ),
}  # fmt: skip


def config(case: str) -> Config:
    """eps is large: Adam then makes a rounding of a gradient that ought to be zero (key biases) no larger than it
    is."""
    model, sections = CASES[case]
    sizes = dict(layers=LAYERS, hidden=16, heads=2, vocab=61, init_std=0.2)
    return Config.model_validate(
        {
            "model": sizes | model,
            "data": {"seq_length": 12},
            "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "nonfinite": "skip"},
            "optim": {
                "lr": PEAK, "min_lr": FLOOR, "warmup_steps": WARMUP, "lr_schedule": "cosine", "eps": 1e-4,
                "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.9, "clip_grad": {"gpt": 1.7, "t5": 0.45}.get(case, 1.6),
            },
            "advanced": {"float64": True, "vocab_multiple": 8},
            **sections,
        }
    )  # fmt: skip


def decays(name: str) -> bool:
    """Matrices and embeddings; no bias and no norm."""
    return not name.endswith("bias") and "norm" not in name


def depth(name: str) -> int:
    """0 in the head, 1 in the last block …, one more than there are blocks in the embedding."""
    piece, number, *_ = name.split(".")
    return {"head": 0, "embed": LAYERS + 1}.get(piece) or (LAYERS - int(number) if piece == "blocks" else 0)


def rate(step: int) -> float:
    """Linear warm-up that ends at the peak, then half a cosine from the peak to the floor."""
    if step < WARMUP:
        return PEAK * (step + 1) / WARMUP
    return FLOOR + (PEAK - FLOOR) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2


def plain(c: Config, unfrozen: bool):
    """[(loss, norm)] of each step, the weights and moments after the last, and in how many steps gradients were
    clipped."""
    model = build_model(c, Mesh.single())
    (stage,) = model.stages.values()
    adam = torch.optim.AdamW([torch.zeros(1)], betas=(c.optim.beta1, c.optim.beta2), eps=c.optim.eps, foreach=False)
    adam.param_groups.clear()
    joined: list = []
    reports, clipped = [], 0
    for step in range(STEPS):
        for p in model.params:
            if (EVERY * depth(p.name) if unfrozen else 0) == step:
                weight_decay = c.optim.weight_decay if decays(p.name) else 0.0
                adam.add_param_group({"params": [p.tensor], "weight_decay": weight_decay, "name": p.name})
                joined.append(p)
        batches = random_batches(c, step, 0, 1)
        terms = [term for batch in batches for term in stage(None, batch).results]
        scored = [(b.labels if b.targets is None else b.targets) != IGNORE for b in batches]
        loss = sum(term.sum for term in terms) / sum(s.sum() for s in scored)
        for p in model.params:
            p.tensor.grad = None
        loss.backward()
        gradients = [p.tensor.grad for p in joined]
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients))
        if step == SKIPPED:
            continue
        factor = min(1.0, c.optim.clip_grad / (norm + 1e-6))
        clipped += factor < 1
        for gradient in gradients:
            gradient.mul_(factor)
        for group in adam.param_groups:
            group["lr"] = rate(step) * (LAYER_DECAY ** depth(group["name"]) if unfrozen else 1.0)
        adam.step()
        reports.append((loss.item(), norm))
    state = {
        p.name: {"weight": p.tensor.detach(), **{k: adam.state[p.tensor][k] for k in ("exp_avg", "exp_avg_sq")}}
        for p in model.params
    }
    return reports, state, clipped


@pytest.mark.parametrize("case", CASES)
def test_twelve_steps_are_those_of_torch(case):
    c = config(case)
    unfrozen = case == "bert, unfrozen"
    reports, expected, clipped = plain(c, unfrozen)
    assert 2 <= clipped <= len(reports) - 2  # both happen
    run, learning_rate = build_run(c, Mesh.single(), objective=proof_objective(c)), lr_schedule(c.optim, STEPS)
    (spoiled,) = (p.tensor for p in run.params if p.name == "head.norm.weight" or p.name == "head.pooler.weight")
    found = []
    for step in range(STEPS):
        hook = spoiled.register_hook(lambda g: torch.full_like(g, math.inf)) if step == SKIPPED else None
        report = train_step(run, random_batches(c, step, 0, 1), learning_rate(step))
        assert bool(report.skipped) == (step == SKIPPED)
        if hook:
            hook.remove()
        else:
            found.append((report.loss, report.grad_norm))
    assert [n for pair in found for n in pair] == pytest.approx([n for pair in reports for n in pair], rel=1e-11)
    for name, state in expected.items():
        ours = run.engine.read_state(name)
        for key, value in state.items():
            torch.testing.assert_close(
                ours[key], value, rtol=1e-11, atol=1e-13, msg=lambda m, at=(name, key): f"{at}: {m}"
            )


@pytest.mark.parametrize("norm, limit, factor", [(4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (9.0, 0.0, 1.0)])
def test_gradients_are_made_shorter_and_never_longer(norm, limit, factor):
    """torch.nn.utils.clip_grad_norm_ on a gradient of this norm. A limit of 0 turns clipping off."""
    assert clip_factor(norm, limit) == pytest.approx(factor, abs=1e-5)
    if limit:
        gradient = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        gradient.grad = torch.tensor([norm], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_([gradient], limit)
        assert clip_factor(norm, limit) == pytest.approx(gradient.grad.item() / norm, rel=1e-12)
