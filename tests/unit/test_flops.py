"""Parameters and FLOPs by arithmetic, against published counts and formulas, and against torch's own counter."""

import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from roots_dist.accounting.flops import mfu
from roots_dist.accounting.peaks import GPU_PEAKS, gpu_peak, measured_cpu_peak
from roots_dist.accounting.sizes import parameters
from roots_dist.config.model import ModelConfig
from roots_dist.config.schema import Config
from roots_dist.config.sections import AdvancedConfig, DataConfig, TrainConfig
from roots_dist.learning.models.flops import flops_per_sample, flops_per_step
from roots_dist.parallel.tensor import grouped


def config(seq: int, multiple: int = 1, train: dict | None = None, **model) -> Config:
    return Config(
        model=ModelConfig(**model),
        data=DataConfig(seq_length=seq),
        advanced=AdvancedConfig(vocab_multiple=multiple),
        train=TrainConfig(**(train or {})),
    )


GPT2 = config(1024, layers=12, hidden=768, heads=12, vocab=50257)
BLOOM = config(
    2048, 512, layers=70, hidden=14336, heads=112, vocab=250680, positions="alibi", embedding_norm=True,
    train={"global_batch": 2048, "recompute": "full"},
)  # fmt: skip
LLAMA3 = config(
    8192, layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=128256, positions="rotary", norm="rmsnorm",
    activation="swiglu", bias=False, tied_embeddings=False,
)  # fmt: skip


@pytest.mark.parametrize(
    "of, published",
    [(GPT2, 124_439_808), (BLOOM, 176_247_271_424), (LLAMA3, 8_030_261_248)],
    ids=["GPT-2 small", "BLOOM-176B", "Llama-3-8B"],
)
def test_parameters_are_those_that_were_published(of, published):
    assert parameters(of) == published


SHAPES = {
    "gelu, tied": {},
    "swiglu, grouped heads, untied": {"kv_heads": 2, "activation": "swiglu", "tied_embeddings": False, "bias": False},
    "rmsnorm": {"norm": "rmsnorm"},
    "wide heads, rotary": {"head_dim": 32, "positions": "rotary", "embedding_norm": True},
    "post-norm": {"norm_position": "post", "positions": "alibi"},
    "latents": {
        "positions": "rotary",
        "bias": False,
        "kv_lora_rank": 12,
        "q_lora_rank": 20,
        "qk_nope_head_dim": 10,
        "qk_rope_head_dim": 6,
        "v_head_dim": 8,
    },
    "experts": {
        "mlp_bias": False,
        "experts": 5,
        "experts_per_token": 2,
        "expert_ffn": 24,
        "shared_expert_ffn": 8,
        "shared_expert_gate": True,
        "dense_layers": 1,
        "activation": "swiglu",
    },
}


def unseen(c: Config) -> float:
    """Forward FLOPs of a sample's attention that a causal model need not compute: half of scores and sums; and sums of
    the zeros that narrower values are filled up with."""
    width = c.model.width_of_head()
    return c.model.layers * c.data.seq_length**2 * c.model.heads * (4 * width - (width + c.model.width_of_value()))


def scores_and_sums(q: torch.Size, k: torch.Size, v: torch.Size, *_: object, **__: object) -> int:
    """FLOPs of the CPU's fused kernel, which torch does not count: q [B, h, Q, K], k and v [B, h, S, K]."""
    return 2 * q.numel() * (k[2] + v[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_flops_and_parameters_are_those_of_the_model(shape):
    """torch counts what the model computes. The math kernel computes attention in full, as a tile with a bias does."""
    from roots_dist.learning.models.gpt import pieces
    from roots_dist.parallel.tensor.collectives import TensorParallel
    from roots_dist.world.batch import MicroBatch
    from roots_dist.world.sharding import initialize, parameters_of

    c = config(16, 8, layers=2, hidden=32, heads=4, vocab=60, **SHAPES[shape])
    built = {}
    for piece in pieces(c, TensorParallel()):
        built[piece.name] = piece.build(built)
    params = parameters_of(built.items())
    initialize(params, 0)
    assert parameters(c) == sum(p.tensor.numel() for p in params if not p.is_copy)

    tokens = torch.randint(60, (3, 16))
    batch = MicroBatch(tokens=tokens, targets=tokens, sample_ids=torch.arange(3))
    math_kernel = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    for p in params:
        p.tensor.requires_grad_(False)  # else the loss computes its gradients at once
    one_by_one = mock.patch.object(grouped, "_has_kernel", return_value=False)  # torch does not count grouped ones
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: scores_and_sums}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter, math_kernel, one_by_one:
        payload = {}
        for piece in built.values():
            payload = piece(payload, batch)
        forward = counter.get_total_flops()
    assert forward == (flops_per_sample(c) / 3 + unseen(c)) * len(tokens)


def test_a_steps_flops_are_the_formula_of_the_paper_less_what_no_query_sees():
    b, s, h, layers, vocab = 2048, 2048, 14336, 70, 250680
    korthikanti_7 = 72 * b * layers * s * h**2 * (1 + s / (6 * h) + vocab / (12 * h * layers))
    causal = korthikanti_7 - 72 * b * layers * s * h**2 * s / (12 * h)
    assert flops_per_step(BLOOM) == pytest.approx(causal, rel=1e-12)
    assert flops_per_step(BLOOM) == pytest.approx(korthikanti_7 - b * 3 * unseen(BLOOM), rel=1e-12)
    assert flops_per_step(BLOOM, sequences=192) == pytest.approx(causal * 192 / 2048, rel=1e-12)


def test_52_per_cent_of_peak_at_1t_are_39_of_model_flops():
    """Narayanan et al. 2021, table 1, last row: 163 TFLOP/s on each of 3072 A100, 52 %, recomputation counted
    (equation 3) and attention in full."""
    c = config(2048, layers=128, hidden=25600, heads=160, vocab=51200, train={"global_batch": 3072})
    b, s, h, layers, vocab = 3072, 2048, 25600, 128, 51200
    hardware = 96 * b * s * layers * h**2 * (1 + s / (6 * h) + vocab / (16 * layers * h))
    seconds = hardware / (3072 * 163e12)
    assert mfu(hardware, seconds, 3072 * 312e12) == pytest.approx(0.522, abs=1e-3)
    assert mfu(flops_per_step(c) + b * 3 * unseen(c), seconds, 3072 * 312e12) == pytest.approx(0.392, abs=1e-3)


@pytest.mark.parametrize(
    "name, bf16",
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla V100-SXM2-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("AMD Instinct MI250X", 191.5e12),
        ("AMD Instinct MI300X", 1307.4e12),
    ],
)
def test_devices_are_found_by_the_name_that_torch_gives(name, bf16):
    assert gpu_peak(name, "bf16") == bf16


def test_an_unknown_device_has_no_peak():
    assert gpu_peak("NVIDIA GeForce GTX 1080", "fp32") is None
    assert gpu_peak("Tesla V100-SXM2-32GB", "tf32") == gpu_peak("Tesla V100-SXM2-32GB", "fp32") == 15.7e12


def test_peaks_are_ordered_as_hardware_is():
    for pattern, peak in GPU_PEAKS:
        assert peak.bf16 > 1.9 * peak.fp32, pattern
        assert peak.tf32 is None or peak.fp32 <= peak.tf32 <= peak.bf16 / 1.9, pattern


def test_a_cpu_is_measured_in_half_a_second_and_a_product_is_not_faster():
    before = torch.get_num_threads()
    start = time.perf_counter()
    peak = measured_cpu_peak(1)
    assert time.perf_counter() - start < 60.0  # 0.5 s on an idle machine
    assert torch.get_num_threads() == before
    assert 1e9 < peak < 1e12


def test_arithmetic_needs_no_torch():
    modules = (
        "roots_dist.accounting.flops, roots_dist.accounting.peaks, roots_dist.config.lr_schedules, "
        "roots_dist.storage.checkpoint.keep"
    )
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
