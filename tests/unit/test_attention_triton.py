"""Attention with dropout in Triton's interpreter: outputs and gradients of the plain form in float64, its masks."""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARED = """
import torch
from roots_dist.learning.models import dropped_attention
from roots_dist.world import rng

attend = dropped_attention.dropped_attention

def plain(q, k, v, bias, causal):
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    scores = q @ k.transpose(-1, -2) * 0.3
    if bias is not None:
        scores = scores + bias
    if causal:
        scores = scores + scores.new_full(scores.shape[2:], -torch.inf).triu(1 + scores.shape[3] - scores.shape[2])
    return rng.dropout(scores.softmax(-1), 0.2, rows) @ v

torch.manual_seed(0)
for b, h, g, queries, keys, width, causal, shape in (
    (2, 4, 2, 70, 70, 20, True, None),
    (1, 2, 1, 5, 70, 16, True, None),
    (2, 3, 3, 68, 33, 24, False, (1, 3, 68, 33)),
    (2, 2, 2, 9, 66, 8, False, (2, 1, 1, 66)),
):
    rows = rng.fold(rng.key("a", 1), torch.arange(b * h * queries)).view(b, h, queries)
    q, k, v = (torch.randn(b, s, n, width).transpose(1, 2) for s, n in ((queries, h), (keys, g), (keys, g)))
    bias = None if shape is None else torch.randn(shape)
    if shape and shape[1] == 1:
        bias.masked_fill_(torch.rand(shape) < 0.3, -torch.inf)
    learned = [bias] if bias is not None and shape[1] > 1 else []
    given = [t.requires_grad_() for t in (q, k, v, *learned)]
    exact = [t.detach().double().requires_grad_() for t in given]
    out = attend(q, k, v, rows, 0.2, scale=0.3, bias=bias, causal=causal)
    wide = exact[3] if len(exact) > 3 else None if bias is None else bias.double()
    truth = plain(*exact[:3], wide, causal)
    up = torch.randn(out.shape)
    torch.testing.assert_close(out.double(), truth, rtol=1e-5, atol=1e-5)
    found = torch.autograd.grad(out, given, up)
    for ours, theirs in zip(found, torch.autograd.grad(truth, exact, up.double()), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)

# the masks, to the bit: values that tell which probabilities were kept
q, k, rows = torch.zeros(1, 1, 70, 64), torch.zeros(1, 1, 64, 64), rows.flatten()[:1].expand(70).reshape(1, 1, 70)
rows = rng.fold(rows, torch.arange(70))
out = attend(q, k, torch.eye(64)[None, None], rows, 0.2, scale=1.0)
assert torch.equal(out[0, 0] > 0, rng.keep(rows[0, 0], torch.arange(64), 0.2))
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_attend_as_the_plain_form():
    ran = subprocess.run(
        [sys.executable, "-c", COMPARED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
