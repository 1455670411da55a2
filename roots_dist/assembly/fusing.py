"""Choose, once for a run, what makes kernels of the layers' functions: train.compile.

    config + mesh --choose_fuse--> eager, or a Compiler (world/fuse.py) --build_passes--> TensorParallel.fuse

Whether it compiles here is tried with one small function: a compiler that is found may lack headers, or a folder to
write to. All ranks choose alike, because copies of a parameter must stay equal to the bit.
"""

from __future__ import annotations

import logging

import torch

from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem
from roots_dist.world.fuse import Compiler, Fuse, eager
from roots_dist.world.mesh import Mesh

log = logging.getLogger(__name__)
ANOTHER = "it does not compile on another rank"
MOST_LETTERS = 300
"""Longest excerpt from a compiler's message, in characters."""


def choose_fuse(config: Config, mesh: Mesh) -> Fuse:
    """Raises ConfigError if train.compile is true and some rank cannot compile. Collective over the world, unless the
    config alone says that nothing is compiled."""
    if not wants_compiler(config, mesh.device):
        return eager
    compiler = Compiler()
    trouble = why_not(compiler, mesh.device)
    failed = mesh.world.sum_(torch.tensor(float(trouble is not None), device=mesh.device))
    if not failed.item():
        log.info(
            "the first step compiles norms, activations and dropout (train.compile), and the first of another size"
        )
        return compiler
    if config.train.compile is True:
        fix = "install g++ and Python's headers on every machine of the run, or set train.compile=false"
        expected = f"torch.compile to work ({trouble or ANOTHER})"
        raise ConfigError([Problem(key="train.compile", found=True, expected=expected, fix=fix)])
    log.warning(
        "train.compile=auto compiles nothing: %s. Fix: install gcc, or set train.compile=false", trouble or ANOTHER
    )
    return eager


def wants_compiler(config: Config, device: torch.device) -> bool:
    """True if the run is to be compiled, provided that this works. `auto` compiles on a GPU: on a CPU it would win a
    few percent, and take longer than a short run. It does not compile an exact run, which computes what it has been
    proved with."""
    wanted = config.train.compile
    return wanted if wanted != "auto" else device.type == "cuda" and config.train.exact is None


def why_not(compiler: Compiler, device: torch.device) -> str | None:
    """The reason why the compiler does not work on this device, in one line; None if it does."""
    try:
        compiler(_trial)(torch.ones(2, 8, device=device))
    except Exception as error:  # of torch, a compiler, a driver, a folder: whatever it is, nothing can be compiled
        return " ".join(f"{type(error).__name__}: {error}".split())[:MOST_LETTERS]
    return None


def _trial(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1
