"""Peak FLOP/s of devices: dense data-sheet values of GPUs, and a measured one for a CPU. MFU is a fraction of it.

Values that a sheet gives "with sparsity" are halved. Tensor-core values are those with float32 accumulation.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "tf32", "fp32"]


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Peak FLOP/s of one device as torch names it."""

    bf16: float
    """Peak in bf16; in fp16 if the device has no bf16 units (V100, T4)."""
    tf32: float | None
    fp32: float

    def at(self, precision: Precision) -> float:
        return (self.tf32 or self.fp32) if precision == "tf32" else getattr(self, precision)


def _tera(bf16: float, tf32: float | None, fp32: float) -> Peak:
    return Peak(bf16=bf16 * 1e12, tf32=tf32 and tf32 * 1e12, fp32=fp32 * 1e12)


# torch.cuda.get_device_name contains the pattern; the first match counts, so special names come before general ones.
GPU_PEAKS: tuple[tuple[str, Peak], ...] = (
    (r"\bB200\b", _tera(2250, 1125, 75)),  # NVIDIA DGX B200 datasheet, per GPU
    (r"\bGH200\b", _tera(989.5, 494.5, 67)),  # NVIDIA GH200 datasheet
    (r"\bH200 NVL\b", _tera(835.5, 417.5, 60)),  # NVIDIA H200 datasheet
    (r"\bH200\b", _tera(989.5, 494.5, 67)),
    (r"\bH100 PCIe\b", _tera(756.5, 378, 51)),  # NVIDIA H100 datasheet (2023)
    (r"\bH100 NVL\b", _tera(835.5, 417.5, 60)),
    (r"\bH100\b", _tera(989.5, 494.5, 67)),  # SXM5, "NVIDIA H100 80GB HBM3"
    (r"\bA100\b", _tera(312, 156, 19.5)),  # NVIDIA A100 datasheet, PCIe and SXM alike
    (r"\bA800\b", _tera(312, 156, 19.5)),
    (r"\bL40S\b", _tera(362, 183, 91.6)),  # NVIDIA L40S datasheet
    (r"\bL40\b", _tera(181, 90.5, 90.5)),  # NVIDIA L40 datasheet
    (r"\bL4\b", _tera(121, 60, 30.3)),  # NVIDIA L4 datasheet
    (r"\bA40\b", _tera(149.7, 74.8, 37.4)),  # NVIDIA A40 datasheet
    (r"\bA30\b", _tera(165, 82, 10.3)),  # NVIDIA A30 datasheet
    (r"\bA10G\b", _tera(70, 35, 35)),  # NVIDIA A10G, AWS's variant
    (r"\bA10\b", _tera(125, 62.5, 31.2)),  # NVIDIA A10 datasheet
    (r"\bRTX 4090\b", _tera(165.2, 82.6, 82.6)),  # NVIDIA Ada architecture whitepaper, appendix A
    (r"\bRTX 3090\b", _tera(71, 35.6, 35.6)),  # NVIDIA GA102 whitepaper, appendix A
    (r"\bV100.*PCIE\b", _tera(112, None, 14)),  # NVIDIA V100 datasheet
    (r"\bV100\b", _tera(125, None, 15.7)),
    (r"\bT4\b", _tera(65, None, 8.1)),  # NVIDIA T4 datasheet
    (r"\bMI300X\b", _tera(1307.4, 653.7, 163.4)),  # AMD Instinct MI300X datasheet
    (r"\bMI250X\b", _tera(191.5, None, 47.9)),  # AMD Instinct MI250X datasheet, halved: torch sees each die
    (r"\bMI250\b", _tera(181.1, None, 45.3)),  # AMD Instinct MI250 datasheet, halved
    (r"\bMI210\b", _tera(181, None, 45.3)),  # AMD Instinct MI210 datasheet, fp32 matrix
)


def gpu_peak(device_name: str, precision: Precision) -> float | None:
    """Data-sheet FLOP/s; None for a device that is not in the table, because no MFU is better than a wrong one."""
    for pattern, peak in GPU_PEAKS:
        if re.search(pattern, device_name, re.IGNORECASE):
            return peak.at(precision)
    return None


UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"))

SIZES = (256, 384, 512)
"""Sizes of measured products: large enough for a core's best rate, and done before another program takes the core."""


def format_flops(flops: float) -> str:
    """9.54e10 -> 95.4 GFLOP/s"""
    value, unit = next(((flops / size, name) for size, name in UNITS if flops >= size), (flops, ""))
    return f"{value:.3g} {unit}FLOP/s"


def measured_cpu_peak(cores: int, seconds: float = 0.5) -> float:
    """Measured FLOP/s of float32 matrix products on `cores` cores: one core's best product within `seconds`, times
    cores.

    This is the convention of data sheets. Products on all cores at once would measure what other programs leave at the
    moment, and a peak that is too low makes MFU too high. torch's thread count is restored.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        factors = [(torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)) for n in SIZES]
        best, end = 0.0, time.perf_counter() + seconds
        while best == 0.0 or time.perf_counter() < end:
            for a, b, out in factors:
                start = time.perf_counter()
                torch.mm(a, b, out=out)
                best = max(best, 2 * len(a) ** 3 / (time.perf_counter() - start))
        return best * cores
    finally:
        torch.set_num_threads(before)
