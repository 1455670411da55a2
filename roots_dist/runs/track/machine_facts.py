"""Facts about the machine that a run records: versions and devices once, peak memory at every report."""

from __future__ import annotations

import platform
import resource
import sys
from importlib import metadata
from typing import TYPE_CHECKING

import psutil

from roots_dist.accounting.memory import GIB

if TYPE_CHECKING:
    import torch


PACKAGES = ("roots_dist", "torch", "deepspeed", "numpy", "safetensors", "tokenizers")


def machine_facts() -> dict[str, object]:
    """Versions, processor, memory and GPUs: enough to compare two runs, and nothing secret."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # a source tree that is not installed
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "versions": versions,
        "cores": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / GIB, 1),
        "gpus": gpus,
    }


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process so far: on a GPU what torch allocated, on a CPU resident memory."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / GIB  # macOS counts bytes, Linux KiB
