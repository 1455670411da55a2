"""What bf16's eight bits must not touch: factors that hold for a whole tensor."""

import torch

from roots_dist import rng
from roots_dist.generate.sampling import Sampling


def test_dropout_scales_bf16_by_the_factor_and_not_by_its_bf16():
    """1 / 0.9 as bf16 is 1.1094: every activation was 0.16 % too small."""
    x = torch.rand(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16() + 1
    y = rng.dropout(x, 0.1, torch.arange(64))
    kept = y != 0
    assert torch.equal(y[kept], (x[kept].double() / 0.9).bfloat16())


def test_dropout_keeps_a_byte_per_entry_for_backward():
    saved = []
    x = torch.ones(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        rng.dropout(x, 0.5, torch.arange(4))
    assert [t.dtype for t in saved if t.numel() == x.numel()] == [torch.bool]


def test_a_temperature_near_zero_is_greedy_and_no_overflow():
    logits = torch.tensor([[3.0, 900.0, 899.0]])
    for temperature in (1e-45, 1e-30, 1e-3):
        assert Sampling(temperature, top_k=2, top_p=0.9).choose(logits, torch.Generator()).tolist() == [1]
