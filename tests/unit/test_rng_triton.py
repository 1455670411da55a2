"""The kernels of a GPU, in Triton's interpreter: the masks and keys of a CPU, to the bit."""

import importlib.util
import os
import subprocess
import sys

import pytest

COMPARED = """
import torch
from roots_dist.world import rng, rng_triton

samples, key = torch.tensor([5, -7, 2**40]), rng.key("a", 1)
folded = rng.fold(key, samples)
assert torch.equal(folded, rng_triton.fold(key, samples))
rows = rng.fold(folded.unsqueeze(1), torch.arange(2, 6))
assert torch.equal(rows, rng_triton.fold(folded.unsqueeze(1), torch.arange(2, 6)))
heads = torch.arange(3, 5).unsqueeze(1)
of_heads = rng.fold(rows.unsqueeze(1), heads)
assert torch.equal(of_heads, rng_triton.fold(rows.unsqueeze(1), heads))
for drop, columns in ((0.1, 50), (0.9, 1100)):
    x = torch.randn(3, 2, 4, columns)
    assert torch.equal(rng.dropout(x, drop, of_heads, 7), rng_triton.dropout(x, drop, of_heads, 7))
    narrow = x.bfloat16()
    plain, kernel = rng.dropout(narrow, drop, of_heads), rng_triton.dropout(narrow, drop, of_heads, 0)
    assert torch.equal(plain == 0, kernel == 0)
    torch.testing.assert_close(kernel, plain, rtol=0.008, atol=0)  # the interpreter cuts where a GPU rounds
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_have_the_masks_of_a_cpu():
    ran = subprocess.run(
        [sys.executable, "-c", COMPARED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
