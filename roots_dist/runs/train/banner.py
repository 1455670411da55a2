"""Banner of a training run: its layout, model size, peak FLOP/s and batch arithmetic."""

from __future__ import annotations

import socket
import time
import zlib

import psutil
import torch

from roots_dist import environment
from roots_dist.accounting.bounds import Bounds
from roots_dist.accounting.peaks import Precision, format_flops, gpu_peak, measured_cpu_peak
from roots_dist.accounting.sizes import parameters_in_words
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.runs.plan.plan_table import size
from roots_dist.runs.track.machine_facts import peak_memory_gib
from roots_dist.world.mesh import Mesh

PEAK_S = 0.5
"""Seconds for which the peak of a CPU is measured."""


def peak_of_devices(config: Config, mesh: Mesh) -> float | None:
    """Peak FLOP/s of all devices of the run together: data-sheet values for GPUs, measured now for CPU cores.

    Collective over the world. One rank on each machine measures while the others sleep, because waiting in a collective
    may spin.
    """
    if mesh.device.type == "cuda":
        one = gpu_peak(torch.cuda.get_device_name(mesh.device), precision_of_products(config, _tf32()))
        return one and one * mesh.world.size
    hosts = torch.zeros(mesh.world.size, dtype=torch.int64)
    hosts[mesh.rank] = zlib.crc32(socket.gethostname().encode())
    mesh.world.sum_(hosts)  # no rank measures while another still builds its model
    here = (hosts == hosts[mesh.rank]).nonzero().flatten().tolist()
    peak = torch.zeros(1, dtype=torch.float64)
    if mesh.rank == here[0]:
        peak[0] = measured_cpu_peak(min(cores(), torch.get_num_threads() * len(here)), PEAK_S)
    else:
        time.sleep(PEAK_S)
    return mesh.world.sum_(peak).item()


def cores() -> int:
    """Number of CPU cores that this process may use; two threads of one core count once."""
    return min(environment.cores(), psutil.cpu_count(logical=False) or environment.cores())


def banner(config: Config, mesh: Mesh, peak: float | None, bound: Bounds, planned: int | None = None) -> str:
    """Layout, model size, engine, peak FLOP/s (the base of MFU), arithmetic of the batch, the lower bound of a step's
    time, and the memory of the process that needs most. planned: bytes of its tensors (runs/plan/at_start.py); without
    it the memory is a lower bound too."""
    if peak is None:
        peak_words = "peak of this GPU not known: no MFU"
    else:
        peak_words = f"peak {format_flops(peak)} {'measured' if mesh.device.type == 'cpu' else 'by data sheet'}"
    engine = config.advanced.engine
    model = f"{mesh.layout}, {parameters_in_words(config)}, {engine} engine, {peak_words}"
    if mesh.device.type == "cuda":
        model += f"; {products_in_words(config, _tf32())}"
    m = config.model
    if m.rotary_share_is_rounded():
        rotated = f"{m.rotary_width()} of {m.width_of_head()} channels"
        model += f"; model.rotary_fraction = {m.rotary_fraction:g} rotates {rotated}"
    speed = [] if bound.step_s is None else [f"at least {bound.step_s:.3g} s per step"]
    speed_words = "; ".join([*speed, *_threads(mesh)])
    lines = [model, batch_arithmetic(config, mesh.layout), speed_words, _memory(mesh, bound, planned)]
    return "\n".join(filter(None, lines))


def _tf32() -> bool:
    return bool(torch.backends.cuda.matmul.allow_tf32)


def precision_of_products(config: Config, tf32: bool) -> Precision:
    """Precision to which a GPU rounds the factors of products. tf32: True if torch may use TF32 for float32 ones."""
    if config.train.precision == "bf16":
        return "bf16"
    return "tf32" if tf32 else "fp32"


def products_in_words(config: Config, tf32: bool) -> str:
    """The precision of products on a GPU, where its peak differs tenfold."""
    return {
        "bf16": "products in bf16",
        "tf32": "float32 products rounded to TF32",
        "fp32": "float32 products without TF32 (train.precision=bf16 is several times as fast)",
    }[precision_of_products(config, tf32)]


def _threads(mesh: Mesh) -> list[str]:
    """Number of CPU threads of each process and the key that sets it, in words; empty on other devices."""
    if mesh.device.type != "cpu":
        return []
    count = torch.get_num_threads()
    return [f"{count} thread{'s' if count > 1 else ''} per process (advanced.threads)"]


def _memory(mesh: Mesh, bound: Bounds, planned: int | None) -> str:
    """The number that `roots plan` prints, or the larger of an even share of the state and what is held now."""
    if planned is not None:
        return f"{size(planned)} of tensors planned per process"
    held = peak_memory_gib(mesh.device)  # the libraries and the weights, which no arithmetic knows
    return f"at least {max(bound.memory_gib, held):.2g} GiB per process; roots plan counts all of it"


def batch_arithmetic(config: Config, layout: Layout) -> str:
    """`1 × 256 tokens × 8 microbatches × dp 2 = 4,096 tokens per step`"""
    t = config.train
    tokens = t.global_batch * config.data.seq_length
    micro = config.num_microbatches(layout.dp)
    return (
        f"{t.micro_batch} × {config.data.seq_length} tokens × {micro} microbatches × dp {layout.dp} = {tokens:,} "
        "tokens per step"
    )
