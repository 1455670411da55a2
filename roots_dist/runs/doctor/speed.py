"""Speed of each rank while all ranks compute: square matrix products and a large copy. Findings name slow ranks.

The rate is sustained over a part of a second, unlike the best product in accounting/peaks.py: a rank that shares its
core or is limited by a quota does single products as fast as any other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from roots_dist.accounting.memory import GIB
from roots_dist.accounting.peaks import Precision, format_flops, gpu_peak, measured_cpu_peak
from roots_dist.cluster_profile import Finding, Speed, format_ranks

if TYPE_CHECKING:
    import torch

SLOW = 0.7
"""Fraction of the median below which a rank is reported. Ranks wait for the slowest in every step."""
WINDOWS = 4
"""Number of windows, of which the best counts: a short-lived program does not make a rank slow. Each is longer than the
100 ms in which Linux applies CPU quotas."""
WINDOW_S = {False: 0.25, True: 0.12}
"""Seconds of a window, by --quick."""
SIDE = {"cpu": 512, "cuda": 8192}
"""Side of the matrices: large enough for the device's best rate."""
COPY_BYTES = {"cpu": 2**25, "cuda": GIB}
COPIES = 5


def measure(rank: int, device: torch.device, precision: Precision, quick: bool) -> Speed:
    """Measure this rank while all others do. fp32 on a GPU is without TF32, as training runs it."""
    window_s = WINDOW_S[quick]
    return Speed(
        rank=rank,
        precision=precision,
        matmul_flops=max(_products(device, precision, window_s) for _ in range(WINDOWS)),
        copy_bytes_per_s=_copy(device),
        peak_flops=_peak(device, precision, window_s),
    )


def findings(speeds: Sequence[Speed], hosts: Mapping[int, str], slow: float = SLOW) -> Iterator[Finding]:
    """Findings for ranks that compute at less than `slow` of the median."""
    median = statistics.median(speed.matmul_flops for speed in speeds)
    for speed in speeds:
        share = speed.matmul_flops / median
        if share < slow:
            yield Finding(
                check="speed",
                where=format_ranks([speed.rank], hosts),
                found=(
                    f"slow, {format_flops(speed.matmul_flops)} in {speed.precision} products, {share:.0%} of the median"
                ),
                expected=f"{slow:.0%} of {format_flops(median)} or more",
                fix=(
                    "check for other programs (top, nvidia-smi), CPU quotas, thermal and power limits there, "
                    "or leave that host out"
                ),
            )


def _products(device: torch.device, precision: Precision, seconds: float) -> float:
    import torch

    n = SIDE[device.type]
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = (torch.rand(n, n, device=device, dtype=dtype) for _ in range(2))
    out, wait = torch.empty_like(a), _waiter(device)
    torch.mm(a, b, out=out)
    wait()
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        torch.mm(a, b, out=out)
        wait()
        done += 1
    return done * 2 * n**3 / took


def _copy(device: torch.device) -> float:
    """Bytes per second read and written by the median copy."""
    import torch

    source = torch.zeros(COPY_BYTES[device.type], dtype=torch.uint8, device=device)
    target, wait = torch.ones_like(source), _waiter(device)
    took = []
    for _ in range(COPIES):
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        took.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(took)


def _peak(device: torch.device, precision: Precision, seconds: float) -> float | None:
    import torch

    if device.type == "cuda":
        return gpu_peak(torch.cuda.get_device_name(device), precision)
    return measured_cpu_peak(torch.get_num_threads(), seconds) if precision == "fp32" else None


def _waiter(device: torch.device) -> Callable[[], None]:
    """Function that waits until the device has finished."""
    import torch

    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
