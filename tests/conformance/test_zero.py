"""Both sides of the seam (zero/) compute what one process with torch's AdamW computes, and lose nothing on the way.

Expected values come from a loop of plain torch, without mesh, executor or engine. In the middle of every run stand
things that must leave no trace: an evaluation, a discarded step, a step whose gradient is infinite, one gradient
missing on one rank.
"""

import functools
import math
import os
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

import pytest
import torch

from roots_dist.assembly.rank_model import build_model
from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import random_batches
from roots_dist.parallel.zero.seam import STATE
from roots_dist.runs.train.step import train_step
from roots_dist.testing.world import WorldFailed, on_world
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import assemble

STEPS, LR = 4, 1e-2
BATCH = {"dp1": 4, "dp2": 2, "dp3": 2, "dp4": 1}
"""Sequences per microbatch, so that each of the 12 per step makes two or three microbatches."""


def config(**changes):
    """A GPT with tied embeddings and one key/value head, which two tensor ranks both hold. Clipping is active.

    eps is large: Adam then makes a rounding of a gradient that ought to be zero (key biases) no larger than it is.
    """
    base = Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 16, "heads": 4, "kv_heads": 1, "vocab": 29, "init_std": 0.1},
            "data": {"seq_length": 8},
            "train": {"global_batch": 12, "micro_batch": 4, "seed": 7},
            "optim": {"lr": LR, "clip_grad": 0.1, "weight_decay": 0.1, "lr_schedule": "constant", "eps": 1e-4},
            "advanced": {"vocab_multiple": 8},
        }
    )
    return base.changed({key.replace("__", "."): value for key, value in changes.items()})


def case(dp, engine, zero, marks=(), **changes):
    precise = {"advanced__float64": engine == "reference"}
    names = {"tp": "parallel__tp", "pp": "parallel__pp"}
    changes = {names.get(key, key): value for key, value in changes.items()}
    made = config(
        advanced__engine=engine,
        parallel__zero_stage=zero,
        train__micro_batch=BATCH[f"dp{dp}"],
        **{**precise, **changes},
    )
    name = " ".join([engine, f"zero{zero}", f"dp{dp}", *(f"{k.split('__')[1]}={v}" for k, v in changes.items())])
    return pytest.param(dp, made, id=name, marks=marks)


def mesh_of(config, rank, size):
    p = config.parallel
    return Mesh.connect(Layout(dp=size // (p.tp * p.pp), pp=p.pp, tp=p.tp, zero_ranks=p.zero_ranks), rank)


def size_of(config, dp):
    return dp * config.parallel.tp * config.parallel.pp


# ── what one process of plain torch computes ─────────────────────────────────────────────────────────────────────────


def plain(rank, size, config):
    model = build_model(config, Mesh.single())
    (stage,) = model.stages.values()
    groups = [
        {"params": [p.tensor for p in model.params if p.tensor.dim() >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p.tensor for p in model.params if p.tensor.dim() < 2], "weight_decay": 0.0},
    ]
    optim = config.optim
    adam = torch.optim.AdamW(groups, lr=LR, betas=(optim.beta1, optim.beta2), eps=optim.eps, foreach=False)
    losses, norms, states = [], [], []
    for step in range(2 * STEPS):
        terms = [term for batch in random_batches(config, step, 0, 1) for term in stage(None, batch).results]
        loss = sum(t.sum for t in terms) / sum(t.count for t in terms)
        loss.backward()
        everything = [p.tensor for p in model.params]
        by_group = [float(torch.nn.utils.get_total_norm([t.grad for t in group["params"]])) for group in groups]
        norms.append([float(torch.nn.utils.clip_grad_norm_(everything, optim.clip_grad or math.inf)), *by_group])
        losses.append(loss.item())
        adam.step()
        adam.zero_grad()
        states.append(
            {
                p.name: {"weight": p.tensor.detach().clone(), **{k: adam.state[p.tensor][k].clone() for k in STATE[1:]}}
                for p in model.params
            }
        )
    return losses, norms, {"before": initial(config), "middle": states[STEPS - 1], "end": states[-1]}


def initial(config):
    return {p.name: p.tensor.detach().clone() for p in build_model(config, Mesh.single()).params}


@functools.cache
def expected(double, clip):
    return on_world(1, plain, config(advanced__float64=double, optim__clip_grad=clip))[0]


# ── the same through the seam ────────────────────────────────────────────────────────────────────────────────────────


def learn(rank, size, config, first, load=None):
    mesh = mesh_of(config, rank, size)
    run = build_run(config, mesh)
    if load:
        state = torch.load(load, weights_only=True)
        for p in run.params:
            run.engine.write_state(p.name, {key: value[p.slices] for key, value in state[p.name].items()})
        run.engine.finish_loading({0: first})
    before = read(run)
    losses, norms = [], []
    for step in range(first, first + STEPS):
        batches = random_batches(config, step, mesh.dp.rank, mesh.dp.size)
        if step == first + 2:
            disturb(run, batches)
        report = train_step(run, batches, LR)
        losses.append(report.loss)
        norms.append([report.grad_norm, report.group_norms["decayed"], report.group_norms["no_decay"]])
    model_weights = {}
    if config.parallel.zero_stage < 3:
        model_weights = {p.name: weight.clone() for p, weight in run.engine.weights()}  # waits for those under way
    return {
        "losses": losses,
        "norms": norms,
        "before": before,
        "after": read(run),
        "model_weights": model_weights,
        "slices": {p.name: [[s.start, s.stop] for s in p.slices] for p in run.params},
        "shapes": {p.name: list(p.spec.shape) for p in run.params},
    }


def read(run):
    return {p.name: run.engine.read_state(p.name) for p in run.params}


def disturb(run, batches):
    before = read(run)
    run.passes.forward(batches)

    last = run.params[-1].tensor
    last.requires_grad_(run.mesh.dp.rank > 0)
    with run.engine.accumulate():
        backward(run, batches)
        last.requires_grad_(True)
    run.engine.zero_grad()
    assert all(p.tensor.grad is None for p in run.params)

    poisoned(run, batches, math.inf)
    assert not math.isfinite(run.engine.step(LR).grad_norm)
    assert all(p.tensor.grad is None for p in run.params)

    for value in (1.0, math.inf):
        poisoned(run, batches, value)
        found = run.engine.step(LR, limit=1e-3)
        assert found.grad_norm > 1e-3 and math.isfinite(found.grad_norm) == math.isfinite(value) and not found.by_group
        assert all(p.tensor.grad is None for p in run.params)

    after = read(run)
    for name, state in before.items():
        for key in STATE:
            assert torch.equal(state[key], after[name][key]), (name, key)


def poisoned(run, batches, value):
    """Backward passes in which one gradient of one rank is this value."""
    hook = run.params[0].tensor.register_hook(lambda g: torch.full_like(g, value) if run.mesh.rank == 0 else g)
    with run.engine.accumulate():
        backward(run, batches)
    hook.remove()


def backward(run, batches):
    run.passes.forward_backward(batches, {"clm": 1.0})


def whole(ranks, when):
    """{name: {key: whole tensor}} from slices. Data ranks, tensor ranks with the same slice and tied copies agree."""
    found = {}
    for name in dict.fromkeys(name for rank in ranks for name in rank["shapes"]):
        holders = [r for r in ranks if name in r["shapes"]]
        shape = holders[0]["shapes"][name]
        found[name] = {}
        for key in STATE:
            parts = [(tuple(slice(*s) for s in r["slices"][name]), r[when][name][key]) for r in holders]
            found[name][key] = assemble(shape, parts)
            for mine, part in parts:
                assert torch.equal(found[name][key][mine], part), (name, key)
    return found


def compare(ranks, losses, norms, state, bounds):
    loss_bound, norm_bound, state_bound = bounds
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses, abs=loss_bound, rel=0)
        assert [*chain(*rank["norms"])] == pytest.approx([*chain(*norms)], abs=0, rel=norm_bound)
    after = whole(ranks, "after")
    assert after.keys() == state.keys()
    for key in STATE:
        scale = max(parts[key].abs().max().item() for parts in state.values())
        for name, parts in state.items():
            largest = (after[name][key] - parts[key]).abs().max().item() / scale
            assert largest <= state_bound, (name, key, largest)


EXACT = (1e-12, 1e-12, 1e-12)
SINGLE_PRECISION = (2e-6, 2e-6, 1e-5)
"""Bounds of the loss, absolute; of the norm, relative; of weights and moments, relative to the largest of the kind."""

CASES = [
    case(1, "reference", 0),
    case(1, "reference", 3),  # nothing to shard
    case(2, "reference", 0),
    case(2, "reference", 1, optim__clip_grad=0.0, marks=pytest.mark.full),  # as stage 3 of three
    case(3, "reference", 1),
    case(4, "reference", 1, marks=pytest.mark.full),  # as three, and in tests/parity/test_layouts.py
    case(2, "reference", 1, tp=2),
    case(2, "reference", 1, pp=2),
    case(2, "reference", 2),
    case(2, "reference", 2, pp=2, parallel__schedule="zb-h1"),
    case(2, "reference", 3),
    case(3, "reference", 3, optim__clip_grad=0.0),
    case(2, "reference", 3, tp=2, parallel__sequence_parallel=True, train__recompute="full"),
    case(2, "reference", 3, pp=2),
    case(4, "reference", 1, parallel__zero_ranks=2),
    case(4, "reference", 2, parallel__zero_ranks=2, marks=pytest.mark.full),
    case(4, "reference", 3, parallel__zero_ranks=2),
    case(4, "reference", 3, pp=2, parallel__zero_ranks=2, parallel__schedule="zb-h1", marks=pytest.mark.full),
    case(1, "deepspeed", 1),
    case(1, "deepspeed", 3),
    case(2, "deepspeed", 0),
    case(2, "deepspeed", 0, optim__clip_grad=0.0, marks=pytest.mark.full),
    case(2, "deepspeed", 1, marks=pytest.mark.full),  # as three
    case(2, "deepspeed", 1, optim__clip_grad=0.0),
    case(2, "deepspeed", 2),
    case(2, "deepspeed", 3, marks=pytest.mark.full),
    case(3, "deepspeed", 1),  # a third is not exact in binary, and nothing divides by 3: padding
    case(3, "deepspeed", 3),
    case(4, "deepspeed", 3, marks=pytest.mark.full),  # as three, and in tests/parity/test_deepspeed.py
    case(2, "deepspeed", 1, advanced__reduce_bucket=100),  # smaller than a matrix
    case(2, "deepspeed", 0, tp=2, marks=pytest.mark.full),  # these two in tests/parity/test_deepspeed.py
    case(2, "deepspeed", 1, tp=2, parallel__sequence_parallel=True, marks=pytest.mark.full),
    case(2, "deepspeed", 3, tp=2, parallel__sequence_parallel=True, train__recompute="full"),
    case(2, "deepspeed", 0, pp=2),
    case(2, "deepspeed", 1, pp=2, train__recompute="full"),
    case(2, "deepspeed", 2, pp=2, parallel__schedule="zb-h1"),  # weight gradients put into .grad by hand
    case(2, "deepspeed", 3, pp=2),
]


@pytest.mark.parametrize("dp, config", CASES)
def test_equals_one_process_of_plain_torch(dp, config):
    losses, norms, states = expected(config.advanced.float64, config.optim.clip_grad)
    assert min(norm for norm, *_ in norms) > 0.1, "clipping is active where it is on"
    ranks = on_world(size_of(config, dp), learn, config, 0)
    bounds = EXACT if config.advanced.float64 else SINGLE_PRECISION
    compare(ranks, losses[:STEPS], norms[:STEPS], states["middle"], bounds)
    for name, state in whole(ranks, "before").items():  # state can be read before the first step
        assert torch.equal(state["weight"], states["before"][name])
        assert not state["exp_avg"].any() and not state["exp_avg_sq"].any()


def test_the_reference_starts_without_what_takes_seconds_to_import():
    """torch.optim's objects bring torch._dynamo with them, as DeepSpeed does, and torch.autograd.backward brings sympy,
    from a stage that is not the last one: longer than a small model's first steps."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from roots_dist.world.mesh import Mesh
from test_zero import config, random_batches, build_run, train_step
made = config(advanced__engine="reference", parallel__virtual_stages=2, parallel__schedule="interleaved")
train_step(build_run(made, Mesh.single()), random_batches(made, 0, 0, 1), 1e-3)
slow = {{"deepspeed", "torch._dynamo", "sympy"}} & {{*sys.modules}}
assert not slow, slow
"""
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr


@functools.cache
def source(kind):
    """States after STEPS steps, from engines that keep them in different ways."""
    dp, made = {
        "reference": case(3, "reference", 1, advanced__float64=False),
        "flat": case(2, "deepspeed", 2, tp=2),
        "cut": case(3, "deepspeed", 3),
    }[kind].values
    return whole(on_world(size_of(made, dp), learn, made, 0), "after")


MOVES = [
    ("cut", *case(2, "deepspeed", 1).values),
    pytest.param("cut", *case(4, "reference", 1, advanced__float64=False).values, marks=pytest.mark.full),
    ("flat", *case(3, "deepspeed", 3).values),
    ("flat", *case(1, "reference", 0, advanced__float64=False).values),
    ("reference", *case(2, "deepspeed", 0).values),
    ("reference", *case(2, "deepspeed", 3, pp=2).values),
]


@pytest.mark.parametrize("origin, dp, config", MOVES)
def test_a_state_goes_on_in_another_engine_and_layout(origin, dp, config, tmp_path):
    torch.save(source(origin), tmp_path / "state")
    losses, norms, states = expected(False, config.optim.clip_grad)
    ranks = on_world(size_of(config, dp), learn, config, STEPS, str(tmp_path / "state"))
    for name, state in whole(ranks, "before").items():  # out again as it came in, to the last bit
        for key in STATE:
            assert torch.equal(state[key], source(origin)[name][key]), (name, key)
    compare(ranks, losses[STEPS:], norms[STEPS:], states["end"], SINGLE_PRECISION)


@pytest.mark.parametrize("engine, zero", [*zip(["reference"] * 2, (0, 1)), *zip(["deepspeed"] * 3, (1, 2, 3))])
def test_bf16_keeps_float32_masters(engine, zero):
    losses, _, _ = expected(False, 0.1)
    _, made = case(2, engine, zero, advanced__float64=False, train__precision="bf16").values
    ranks = on_world(2, learn, made, 0)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(losses[:STEPS], abs=0.02)
        for name, weight in rank["model_weights"].items():
            master = rank["after"][name]["weight"]
            assert (master.dtype, weight.dtype) == (torch.float32, torch.bfloat16)
            assert torch.equal(weight, master.bfloat16()), name
            if master.numel() > 16:
                assert not torch.equal(weight.float(), master), f"{name}: the master is no finer than the weight"
    whole(ranks, "after")


def gradients_of_a_step(rank, size, config):
    """The mean of gradients after one step: a tenth of the gradient."""
    run = build_run(config, mesh_of(config, rank, size))
    train_step(run, random_batches(config, 0, rank, size), LR)
    return {"after": read(run), "slices": {p.name: [[s.start, s.stop] for s in p.slices] for p in run.params}}


def summed(engine, zero, grad_dtype):
    _, made = case(
        2, engine, zero, advanced__float64=False, train__precision="bf16", advanced__grad_dtype=grad_dtype
    ).values
    state = on_world(2, gradients_of_a_step, made.changed({"train.micro_batch": 1}))[0]["after"]
    return {name: parts["exp_avg"].double() for name, parts in state.items()}


def apart(a, b):
    return math.sqrt(sum((a[name] - b[name]).square().sum().item() for name in b)) / math.sqrt(
        sum(b[name].square().sum().item() for name in b)
    )


@functools.cache
def summed_by_the_reference():
    return summed("reference", 1, "fp32")


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gradients_of_bf16_are_summed_in_float32_by_both_engines(zero):
    assert apart(summed("deepspeed", zero, "fp32"), summed_by_the_reference()) < 1e-5


def test_gradients_are_summed_in_bf16_on_request():
    assert 1e-3 < apart(summed("deepspeed", 2, "bf16"), summed_by_the_reference()) < 1e-2


def fails_in_the_step(rank, size, config):
    run = build_run(config, mesh_of(config, rank, size))
    with run.engine.accumulate():
        backward(run, random_batches(config, 0, rank, size))
        if rank == 1:
            raise ValueError("the real cause")


@pytest.mark.parametrize("engine, zero", [("reference", 1), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 3)])
def test_a_rank_that_fails_does_not_wait_for_the_others(engine, zero):
    _, made = case(2, engine, zero).values
    start = time.monotonic()
    with pytest.raises(WorldFailed, match=r"failed\n\nrank 1 raised:(.|\n)*ValueError: the real cause"):
        on_world(2, fails_in_the_step, made, timeout=250)
    assert time.monotonic() - start < 125  # half of the timeout; 3 s on a free machine
