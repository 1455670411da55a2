"""ALiBi's slopes, rotary angles and sinusoids against transformers and against the papers' formulas.

T5's buckets are compared with transformers in tests/reference/test_t5_transformers.py, for distances to 3,000.
"""

from __future__ import annotations

import math

import pytest
import torch
import transformers

from roots_dist.config.model import ModelConfig
from roots_dist.learning.models.positions import Alibi, alibi_slopes, sinusoids
from roots_dist.learning.models.rotary import Rotary, attention_factor, scaled
from roots_dist.world.positions import Positions


def test_slopes_of_any_number_of_heads_are_those_of_transformers():
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in range(1, 130):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)  # [heads, 1, 2]: slope × position
        torch.testing.assert_close(alibi_slopes(heads).float(), theirs[:, 0, 1], rtol=1e-6, atol=0)


def papers_slopes(heads: int) -> list[float]:
    """Press et al. 2022, section 3 and the code of its authors (get_slopes)."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start * start**i for i in range(heads)]
    closest = 2 ** math.floor(math.log2(heads))
    return papers_slopes(closest) + papers_slopes(2 * closest)[0::2][: heads - closest]


@pytest.mark.parametrize("heads, mine", [(8, slice(0, 8)), (16, slice(4, 8)), (12, slice(6, 12)), (5, slice(0, 5))])
def test_the_bias_of_alibi_is_slope_times_distance_in_float64(heads, mine):
    """Slopes of 16 heads are no powers of two: rounded to float32 they are off by 3e-8."""
    like = torch.zeros((), dtype=torch.float64)
    bias = Alibi(heads, mine).bias(range(3, 7), 9, like)
    assert bias.dtype == torch.float64
    for h, slope in enumerate(papers_slopes(heads)[mine]):
        for q in range(3, 7):
            for k in range(9):
                expected = slope * (k - q) if k <= q else -math.inf
                assert float(bias[h, q - 3, k]) == pytest.approx(expected, rel=1e-14), (h, q, k)


@pytest.mark.parametrize("theta", [10000.0, 5000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [2, 8, 64])
def test_rotary_turns_pairs_by_their_angles(head_dim, theta):
    """Su et al. 2021, equation 15, as complex numbers: pair j at position m is multiplied by exp(i m θ^(-2j/K))."""
    positions = range(1000, 1017)
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, len(positions), head_dim, generator=draw, dtype=torch.float64)
    found = Rotary(head_dim, theta)(x, Positions((positions,)))
    rate = torch.tensor([theta ** (-2 * j / head_dim) for j in range(head_dim // 2)], dtype=torch.float64)
    angle = torch.tensor(list(positions), dtype=torch.float64).unsqueeze(1) * rate
    left, right = x.chunk(2, -1)
    turned = torch.complex(left, right) * torch.polar(torch.ones_like(angle), angle)
    torch.testing.assert_close(found, torch.cat([turned.real, turned.imag], -1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("head_dim, theta", [(8, 5000.0), (64, 500000.0)])
def test_rotary_is_that_of_transformers(head_dim, theta):
    """Up to the float32 in which theirs takes the angles."""
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, rope_theta=theta, max_position_embeddings=64
    )
    x = torch.randn(2, 4, 64, head_dim, generator=torch.Generator().manual_seed(0))
    cos, sin = LlamaRotaryEmbedding(config)(x, torch.arange(64).unsqueeze(0))
    theirs, _ = apply_rotary_pos_emb(x, x, cos, sin)
    torch.testing.assert_close(Rotary(head_dim, theta)(x, Positions((range(64),))), theirs, rtol=1e-5, atol=2e-5)


SCALINGS = {
    "linear": dict(type="linear", factor=4.0),
    "llama3": dict(type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_length=32),
    "yarn": dict(type="yarn", factor=4.0, original_length=32),
    "yarn, not truncated": dict(type="yarn", factor=4.0, original_length=32, truncate=False, beta_fast=8.0),
    "yarn, mscale": dict(type="yarn", factor=4.0, original_length=32, mscale=0.8, mscale_all_dim=0.5),
    "yarn, a factor": dict(type="yarn", factor=4.0, original_length=32, attention_factor=1.7),
    "longrope, short": dict(type="longrope", original_length=128),
    "longrope, long": dict(type="longrope", original_length=32),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scaled_rotary_rates_are_those_of_transformers(name):
    """Frequencies and the factor of cos and sin; theirs are computed in float32."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    ours, width, theta, seq = SCALINGS[name], 16, 5000.0, 64
    if "longrope" in name:
        ours = ours | dict(short_factor=[1 + i / 9 for i in range(8)], long_factor=[1 + i for i in range(8)])
    theirs = {key: value for key, value in ours.items() if key not in ("type", "original_length")}
    theirs |= {"rope_type": ours["type"], "rope_theta": theta}
    if "original_length" in ours:
        theirs["original_max_position_embeddings"] = ours["original_length"]
    longest = 4 * ours["original_length"] if "longrope" in name else seq
    config = transformers.LlamaConfig(
        hidden_size=4 * width, num_attention_heads=4, rope_parameters=theirs, max_position_embeddings=longest
    )
    if "longrope" in name:
        config.original_max_position_embeddings = ours["original_length"]
    expected, factor = ROPE_INIT_FUNCTIONS[ours["type"]](config, "cpu", seq_len=seq)
    scaling = ModelConfig(rope_scaling=ours).rope_scaling
    rates = scaled(theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width), theta, scaling, seq)
    torch.testing.assert_close(rates, expected.double(), rtol=1e-6, atol=1e-9)
    assert attention_factor(scaling, longest) == pytest.approx(factor, rel=1e-12)
    assert name == "linear" or (rates * theta ** (torch.arange(0, width, 2) / width)).unique().numel() > 2


def test_rotary_forgets_angles_of_other_positions():
    """It keeps those last used: another range, dtype or length must not see them."""
    rotary, fresh = Rotary(8, 10000.0), lambda: Rotary(8, 10000.0)
    x = torch.ones(1, 1, 4, 8, dtype=torch.float64)
    for given, where in ((x, range(4)), (x, range(4, 8)), (x.float(), range(4, 8)), (x[:, :, :2], range(4, 6))):
        there = Positions((where,))
        assert torch.equal(rotary(given, there), fresh()(given, there))


@pytest.mark.parametrize("width", [1, 2, 7, 16])
@pytest.mark.parametrize("slowest", [10000.0, 24.0])
def test_sinusoids_are_those_of_the_paper(width, slowest):
    """As tensor2tensor writes Vaswani et al. 2017, 3.5: sines, then cosines, of timescales from 1 to `slowest`."""
    half = (width + 1) // 2
    places = torch.tensor([[0, 1, 5], [100, 4095, 7]])
    found = sinusoids(places, width, slowest, torch.float64)
    assert found.shape == (2, 3, width) and found.dtype == torch.float64
    for place, row in zip(places.flatten().tolist(), found.flatten(0, 1).tolist()):
        angles = [place * slowest ** (-i / max(1, half - 1)) for i in range(half)]
        expected = [*map(math.sin, angles), *map(math.cos, angles)][:width]
        assert row == pytest.approx(expected, rel=1e-10, abs=1e-10)
    assert sinusoids(places, width).dtype == torch.float32
