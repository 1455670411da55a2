"""Experts against their definition: token by token, expert by expert, in plain autograd."""

from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from roots_dist.assembly.run import Run, build_run
from roots_dist.config.model import ModelConfig
from roots_dist.config.schema import Config
from roots_dist.learning.models import experts as layer
from roots_dist.learning.models.experts import Experts, choose
from roots_dist.learning.models.init_stds import init_stds
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.parallel.tensor.grouped import Groups, _add_gradients, _gradients, _product, even, pack
from roots_dist.runs.train.expert_load import expert_loads
from roots_dist.runs.train.step import train_step
from roots_dist.world.batch import PADDING, MicroBatch
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import initialize, parameters_of

CASES = {
    "mixtral": dict(experts=5, experts_per_token=2),
    "olmoe": dict(experts=6, experts_per_token=3, normalize_expert_weights=False),
    "qwen2-moe": dict(
        experts=4, experts_per_token=2, normalize_expert_weights=False, shared_expert_ffn=7, shared_expert_gate=True
    ),
    "deepseek": dict(
        experts=6, experts_per_token=2, router_score="sigmoid", routed_scaling_factor=2.5, shared_expert_ffn=5
    ),
    "deepseek-v3": dict(
        experts=8, experts_per_token=3, router_score="sigmoid", expert_groups=4, groups_per_token=2, router_bias=True
    ),
    "deepseek-v2": dict(
        experts=8, experts_per_token=3, normalize_expert_weights=False, expert_groups=4, groups_per_token=2,
        group_score_experts=1, routed_scaling_factor=4.0,
    ),
    "ungated": dict(experts=4, experts_per_token=1, activation="gelu"),
}  # fmt: skip
B, S, D = 3, 8, 10
PADDED = torch.tensor([[0] * S, [0] * 5 + [PADDING] * 3, [PADDING] * S])
"""A sequence without padding, one with some, and one that is nothing else."""


def config(case: str = "mixtral", **objective: float) -> Config:
    sizes = dict(layers=2, hidden=D, heads=2, ffn=9, vocab=61, init_std=0.5, mlp_bias=False, activation="swiglu")
    return Config.model_validate(
        {
            "model": sizes | CASES[case],
            "objective": {"balance_loss": 0.5, "router_z_loss": 0.25} | objective,
            "data": {"seq_length": S},
            "train": {"global_batch": 6, "micro_batch": 2},
            "optim": {"clip_grad": 0.0},
            "advanced": {"float64": True, "vocab_multiple": 8},
        }
    )


def made(case: str, dtype: torch.dtype = torch.float64) -> Experts:
    one = config(case)
    module = Experts(one, TensorParallel(), "blocks.0", init_stds(one)).to(dtype)
    initialize(parameters_of([("blocks.0.mlp", module)]), 3)
    if module.router.bias is not None:
        module.router.bias.data.normal_(generator=torch.Generator().manual_seed(7)).mul_(0.3)
    return module


def inputs(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def a_batch(**fields: object) -> MicroBatch:
    return MicroBatch(tokens=torch.zeros(B, S, dtype=torch.int64), sample_ids=torch.arange(B), **fields)


def plain_mlp(weights: dict[str, torch.Tensor], name: str, x: torch.Tensor) -> torch.Tensor:
    up = weights[f"{name}.up.weight"] @ x
    gate = weights.get(f"{name}.gate.weight")
    inner = F.gelu(up) if gate is None else F.silu(gate @ x) * up
    return weights[f"{name}.down.weight"] @ inner


def chosen_by_definition(m: ModelConfig, judged: list[float]) -> list[int]:
    """The best experts of the groups whose best ones are best together."""
    each = m.experts // m.expert_groups
    groups = [range(first, first + each) for first in range(0, m.experts, each)]
    groups.sort(key=lambda group: -sum(sorted(judged[e] for e in group)[-m.group_score_experts :]))
    within = [e for group in groups[: m.groups_per_token if m.expert_groups > 1 else None] for e in group]
    return sorted(within, key=lambda e: (-judged[e], e))[: m.experts_per_token]


def plain(
    case: str, weights: dict[str, torch.Tensor], x: torch.Tensor, real: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, the sum of each sequence's balance, and the sum of each token's log²(Z)."""
    m = config(case).model
    out, balance, z = [], x.new_zeros(()), x.new_zeros(())
    for sequence, its_real in zip(x, real):
        used, share, length = x.new_zeros(m.experts), x.new_zeros(m.experts), int(its_real.sum())
        for token, is_real in zip(sequence, its_real):
            logits = weights["router.weight"] @ token
            scores = torch.sigmoid(logits) if m.router_score == "sigmoid" else logits.exp() / logits.exp().sum()
            best = chosen_by_definition(m, (scores + weights.get("router.bias", 0.0)).tolist())
            total = sum(scores[e] for e in best) if m.normalize_expert_weights else 1.0
            y = sum(
                m.routed_scaling_factor * scores[e] / total * plain_mlp(weights, f"experts.{e}", token) for e in best
            )
            if m.shared_expert_ffn:
                gate = torch.sigmoid(weights["shared_gate.weight"] @ token) if m.shared_expert_gate else 1.0
                y = y + gate * plain_mlp(weights, "shared", token)
            out.append(y)
            if is_real:
                z = z + logits.exp().sum().log() ** 2
                share = share + scores / scores.sum() / length
                used[best] += m.experts / (m.experts_per_token * length)
        balance = balance + (used * share).sum()
    return torch.stack(out).view_as(x), balance, z


@pytest.mark.parametrize("case", CASES)
def test_output_terms_and_gradients_are_those_of_the_definition(case):
    module, x, real = made(case), inputs().requires_grad_(), PADDED != PADDING
    weights = {name: p.detach().clone().requires_grad_() for name, p in module.named_parameters()}
    y = x.detach().clone().requires_grad_()
    wanted, balance, z = plain(case, weights, y, real)
    (wanted.square().sum() + 3 * balance + 2 * z).backward()

    terms = []
    out = module(x, a_batch(document_ids=PADDED), terms)
    found = {term.name: term for term in terms}
    assert [int(found[name].count) for name in ("balance", "router_z")] == [2, S + 5]
    torch.testing.assert_close(found["balance"].sum, balance)
    torch.testing.assert_close(found["router_z"].sum, z)
    torch.testing.assert_close(out, wanted)
    (out.square().sum() + 3 * found["balance"].sum + 2 * found["router_z"].sum).backward()
    torch.testing.assert_close(x.grad, y.grad)
    for name, p in module.named_parameters():
        if name == "router.bias":
            assert p.grad is None, "a rule moves it"
            continue
        assert p.grad is not None, f"{name} has no gradient"
        wanted_gradient = torch.zeros_like(p) if weights[name].grad is None else weights[name].grad
        torch.testing.assert_close(p.grad, wanted_gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_an_expert_without_tokens_has_a_gradient_of_zeros():
    """None would leave it out of decay and moments, and of the sums over ranks."""
    module = made("mixtral")
    with torch.no_grad():
        module.router.weight[3] = -100 * inputs().flatten(0, 1).mean(0)
        x = inputs().mean((0, 1)).expand(B, S, D) + 0.01 * inputs()
    module(x, a_batch(), []).sum().backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    assert missing == []
    assert all(p.grad.abs().max() == 0 for p in module.experts["3"].parameters())
    assert any(p.grad.abs().max() > 0 for p in module.experts.parameters())


def test_of_equal_scores_the_first_experts_are_chosen():
    scores = torch.tensor([[0.2] * 5, [0.1, 0.3, 0.1, 0.3, 0.2], [0.1, 0.1, 0.3, 0.4, 0.1], [0.0, 0.3, 0.2, 0.3, 0.2]])
    assert choose(scores, 3).tolist() == [[0, 1, 2], [1, 3, 4], [0, 2, 3], [1, 2, 3]]


def test_the_router_is_exact_in_bf16():
    """From the same bf16 numbers it makes the scores that float32 makes: rounded ones would send tokens elsewhere."""
    low, x = made("mixtral", torch.bfloat16), inputs(torch.bfloat16)
    routing = low.router(x.flatten(0, 1))
    logits = x.flatten(0, 1).float() @ low.router.weight.float().t()
    torch.testing.assert_close(routing.logits, logits)
    assert torch.equal(routing.chosen, choose(logits.softmax(-1), 2))
    assert low(x, a_batch(), []).dtype == torch.bfloat16


def test_recomputation_takes_the_experts_that_were_chosen():
    """A second choice could be another one, by the last bit of a kernel that is not exact."""
    wanted = [p.grad for p in _learned("none")]
    calls = []

    def once(scores: torch.Tensor, *how: int) -> torch.Tensor:
        calls.append(scores)
        return choose(scores, *how)

    with mock.patch.object(layer, "choose", once):
        found = [p.grad for p in _learned("full")]
    assert len(calls) == 2, "of each of two layers, in forward"
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def _learned(recompute: str) -> list[torch.nn.Parameter]:
    one = config().changed({"train.recompute": recompute, "train.global_batch": 2})
    run = build_run(one, Mesh.single(), objective=proof_objective(one))
    run.passes.forward_backward(random_batches(one, 0, 0, 1), {"clm": 1.0, "balance": 0.1, "router_z": 0.1})
    return [p.tensor for p in run.params]


def test_a_step_learns_means_over_sequences_tokens_and_layers():
    """Whatever the microbatches: a mean of each of them would be another number, where they are not alike."""
    one, wanted = config(balance_loss=0.5, router_z_loss=0.25), {}
    reports = []
    for micro_batch in (6, 2, 1):
        changed = one.changed({"train.micro_batch": micro_batch})
        run = build_run(changed, Mesh.single(), objective=proof_objective(changed))
        batches = random_batches(changed, 0, 0, 1)
        wanted = wanted or _defined_terms(run, batches)
        reports.append(train_step(run, batches, 1e-3))
    for report in reports:
        assert {name: report.terms[name] for name in wanted} == pytest.approx(wanted, abs=1e-12)
        summed = report.terms["clm"] + 0.5 * wanted["balance"] + 0.25 * wanted["router_z"]
        assert report.loss == pytest.approx(summed, abs=1e-12)
        assert report.grad_norm == pytest.approx(reports[0].grad_norm, abs=1e-12)


def _defined_terms(run: Run, batches: list[MicroBatch]) -> dict[str, float]:
    """Means of both terms, from what the layers with experts read."""
    read: list[tuple[Experts, torch.Tensor]] = []
    layers = [module for module in run.passes.model.module.modules() if isinstance(module, Experts)]
    hooks = [module.register_forward_pre_hook(lambda module, args: read.append((module, args[0]))) for module in layers]
    run.passes.forward(batches)
    for hook in hooks:
        hook.remove()
    real = torch.ones(6, S, dtype=torch.bool)
    sums = [plain("mixtral", dict(module.named_parameters()), x, real)[1:] for module, x in read]
    balance, z = (sum(part.item() for part in column) for column in zip(*sums))
    return {"balance": balance / (6 * len(layers)), "router_z": z / (6 * S * len(layers))}


def test_evaluation_scores_text_alone():
    module = made("mixtral").eval()
    terms = []
    out = module(inputs(), a_batch(), terms)
    assert terms == []
    torch.testing.assert_close(
        out, functional_call(made("mixtral"), dict(module.named_parameters()), (inputs(), a_batch(), []))
    )


def test_each_step_moves_a_bias_towards_even_use():
    """Up where an expert got fewer tokens than the mean, down where it got more."""
    one = config("deepseek-v3", balance_loss=0.0).changed({"optim.router_bias_rate": 0.01})
    run = build_run(one, Mesh.single(), objective=proof_objective(one))
    before = [experts.router.bias.clone() for experts in layers_of(run)]
    train_step(run, random_batches(one, 0, 0, 1), 1e-3)
    loads = expert_loads(run)
    for experts, bias in zip(layers_of(run), before):
        counts = loads[experts.name]
        assert sum(counts) == 6 * S * 3 and experts.router.bias.dtype == torch.float64
        moved = [0.01 * ((8 * count < sum(counts)) - (8 * count > sum(counts))) for count in counts]
        torch.testing.assert_close(experts.router.bias, bias + torch.tensor(moved, dtype=torch.float64))
        assert any(moved)


def test_a_bias_is_exact_in_bf16():
    low = {"advanced.float64": False, "train.precision": "bf16", "advanced.engine": "reference"}
    one = config("deepseek-v3", balance_loss=0.0).changed(low)
    run = build_run(one, Mesh.single(), objective=proof_objective(one))
    train_step(run, random_batches(one, 0, 0, 1), 1e-3)
    biases = [experts.router.bias for experts in layers_of(run)]
    assert {bias.dtype for bias in biases} == {torch.float32}
    assert all(bias.abs().max() == torch.tensor(1e-3) for bias in biases)


def layers_of(run: Run) -> list[Experts]:
    return [module for module in run.passes.model.module.modules() if isinstance(module, Experts)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_groups_are_those_of_each_group_whatever_the_widths(dtype):
    """A kernel takes widths of whole 16 bytes alone; a width of either matrix that is none must be noticed. The second
    group has no rows."""
    sizes = [3, 0, 4]
    groups = Groups(torch.tensor(sizes).cumsum(0).int(), sum(sizes))
    for width, features in itertools.product((8, 6), repeat=2):
        x, grad = (torch.randn(sum(sizes), n).to(dtype) for n in (width, features))
        stack = torch.randn(len(sizes), width, features).to(dtype)
        ours = _product(x, stack, groups), _gradients(grad, x, groups)
        rows = x.split(sizes), grad.split(sizes)
        product = torch.cat([part @ matrix for part, matrix in zip(rows[0], stack)])
        theirs = product, torch.stack([of_grad.t() @ part for part, of_grad in zip(*rows)])
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("count", [1, 3])
def test_packed_weights_are_neighbours(count):
    weights = [torch.nn.Parameter(torch.empty(2, 3)) for _ in range(count)]
    pack(weights)
    places = [weight.data_ptr() for weight in weights]
    assert places == [*range(places[0], places[0] + 24 * count, 24)]
    assert all(weight.shape == (2, 3) for weight in weights)


def test_gradients_of_experts_are_added_wherever_those_before_them_lie():
    """One after another in memory or not; an expert may be frozen, and another have none yet."""
    made = torch.arange(24.0).view(4, 2, 3)
    weights = [torch.nn.Parameter(torch.zeros(2, 3), requires_grad=number != 1) for number in range(4)]
    weights[0].grad, weights[3].grad = torch.ones(2, 3), torch.full((2, 3), 2.0)
    _add_gradients(weights, [weight for weight in weights if weight.requires_grad], made)
    found = [weight.grad for weight in weights]
    assert found[1] is None
    assert torch.equal(torch.stack([found[0], found[2], found[3]]), torch.stack([made[0] + 1, made[2], made[3] + 2]))


def test_where_there_are_only_shapes_rows_are_shared_out_evenly():
    for rows, parts in ((7, 3), (6, 3), (2, 5)):
        sizes = even(rows, parts)
        assert sum(sizes) == rows and len(sizes) == parts and max(sizes) - min(sizes) <= 1
        x, grad, stack, ends = (torch.empty(*n, device="meta") for n in ((rows, 4), (rows, 5), (parts, 4, 5), (parts,)))
        groups = Groups(ends, rows)
        assert _product(x, stack, groups).shape == (rows, 5) and _gradients(grad, x, groups).shape == (parts, 5, 4)
