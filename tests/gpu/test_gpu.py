"""What is to hold on a GPU, each with the twin that holds on a CPU: `make gpu` on a machine that has one."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.parallel.tensor.weight_gradient import add_product_
from roots_dist.runs.plan.predict import predict
from roots_dist.runs.train.step import count_targets, scales, train_step
from roots_dist.testing.watcher import Watcher, in_words
from roots_dist.world import rng
from roots_dist.world.mesh import Mesh
from tests.parity.models import COMMON, MODELS

NEEDED = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU on this machine")
GPU = pytest.param("cuda", marks=[pytest.mark.gpu, NEEDED])
OBJECTIVES = {"bert": "mlm", "electra": "rtd", "t5": "spans"}


def config_of(model: str, **changes: object) -> Config:
    values = {"model.layers": 2, "advanced.float64": False, "train.global_batch": 2}
    if model in OBJECTIVES:
        values["objective.name"] = OBJECTIVES[model]
    made = Config.model_validate(COMMON | {"model": MODELS[model]}).changed(values)
    return made.changed({key.replace("__", "."): value for key, value in changes.items()})


def run_of(config: Config, device: str):
    return build_run(config, Mesh.single(torch.device(device)), objective=proof_objective(config))


def backward(run, step=0):
    """Loss-like sums and gradients of a step's microbatches."""
    batches = random_batches(run.config, step, 0, 1)
    factors = scales(run, count_targets(run, batches))
    masks = run.config.objective.name in ("mlm", "rtd")
    return [(b.with_scored_positions() if masks else b).to(run.mesh.device) for b in batches], factors


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("model", ["gpt", "bert"])
def test_float32_gradients_are_those_of_float64_on_a_cpu(model, device):
    """Dropout is on: masks are the same."""
    torch.backends.cuda.matmul.allow_tf32 = False
    truth, found = run_of(config_of(model, advanced__float64=True), "cpu"), run_of(config_of(model), device)
    weights = {p.name: p.tensor.detach().cpu() for p in found.params}
    with torch.no_grad():
        for p in truth.params:
            p.tensor.copy_(weights[p.name])
    for run in (truth, found):
        run.passes.forward_backward(*backward(run))
    for ours, exact in zip(found.params, truth.params, strict=True):
        distance = (ours.tensor.grad.cpu().double() - exact.tensor.grad).norm()
        assert distance <= 1e-5 * max(1e-3, exact.tensor.grad.norm()), ours.name


@pytest.mark.gpu
@NEEDED
@pytest.mark.parametrize("model", ["gpt", "llama", "bloom", "bert", "electra", "t5"])
def test_float64_on_a_gpu_is_float64_on_a_cpu(model):
    """The bound of the proof. Its twin is every parity test."""
    found = []
    for device in ("cpu", "cuda"):
        run = run_of(config_of(model, advanced__float64=True), device)
        found.append([train_step(run, random_batches(run.config, step, 0, 1), 1e-2).loss for step in range(3)])
    assert found[1] == pytest.approx(found[0], abs=1e-10)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_those_of_the_plain_form(dtype, device):
    samples = torch.tensor([5, -7, 2**40], device=device)
    rows = rng.fold(rng.fold(rng.key("a", 1), samples).unsqueeze(1), torch.arange(4, device=device))
    x = torch.randn(3, 4, 300, device=device, dtype=dtype)
    drawn = rng.keep(rows.cpu(), torch.arange(7, 307, dtype=torch.int32), 0.1)
    expected = torch.where(drawn, x.cpu() * (1 / 0.9), 0.0)
    assert torch.equal(rng.dropout(x, 0.1, rows, 7).cpu(), expected)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("model", ["gpt", "electra"])
def test_forward_and_backward_wait_for_nothing(model, device):
    run = run_of(config_of(model, train__precision="bf16" if device == "cuda" else "fp32"), device)
    run.passes.forward_backward(*backward(run))
    batches, factors = backward(run, 1)
    if device == "cpu":
        with Watcher() as watcher:
            run.passes.forward_backward(batches, factors)
        assert not watcher.waits, in_words(watcher.waits)
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        run.passes.forward_backward(batches, factors)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_products_are_added_to_a_wider_tensor(device):
    """On a GPU in the product's epilogue, so that the product itself is not rounded to bf16."""
    a, b = (torch.randn(64, 64, device=device).bfloat16() for _ in range(2))
    out = torch.randn(64, 64, device=device)
    exact = out.double() + a.double() @ b.double()
    add_product_(out, a, b)
    assert (out.double() - exact).norm() < (1e-5 if device == "cuda" else 1e-2) * exact.norm()


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_causal_attention_is_one_kernel(model, device):
    run = run_of(config_of(model, model__attention_dropout=0.0), device)
    batches, factors = backward(run)
    if device == "cpu":
        with Watcher() as watcher:
            run.passes.forward_backward(batches, factors)
        names = " ".join(watcher.launches)
    else:
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            run.passes.forward_backward(batches, factors)
        names = " ".join(event.key for event in profiled.key_averages())
    assert any(word in names for word in ("flash_attention", "cudnn_attention", "efficient_attention")), names
    assert "_softmax" not in names


@pytest.mark.gpu
@NEEDED
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_a_gpu_holds_what_is_planned(recompute):
    """Its twin, with real and with imagined tensors, is tests/parity/test_plan.py."""
    config = config_of("llama", train__precision="bf16", train__recompute=recompute).changed(
        {
            "model.hidden": 1024,
            "model.ffn": 2816,
            "data.seq_length": 1024,
            "model.layers": 8,
            "advanced.loss_chunk": 256,
        }
    )
    run = run_of(config, "cuda")
    for step in range(2):
        torch.cuda.reset_peak_memory_stats()
        train_step(run, random_batches(config, step, 0, 1), 1e-3)
    held, planned = torch.cuda.max_memory_allocated(), predict(config, Layout()).ranks[0].peak
    assert planned == pytest.approx(held, rel=0.03)
