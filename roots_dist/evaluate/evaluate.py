"""`roots evaluate RUN`: held-out loss of a run's newest checkpoint, in one process or in any layout.

    run's config.yaml + overrides --> Passes --load_weights--> score --> table
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from roots_dist.checkpoint.keep import newest
from roots_dist.checkpoint.load import load_weights
from roots_dist.config.load import Loaded, read
from roots_dist.config.schema import Config
from roots_dist.data.batches import Batches
from roots_dist.errors import CheckpointError, ConfigError, Problem
from roots_dist.evaluate.held_out import Score, bytes_per_token, score
from roots_dist.mesh import Mesh
from roots_dist.train.build import build_passes

ONE_PROCESS = ("parallel.tp=1", "parallel.pp=1", "parallel.chunks=1", "parallel.schedule=1f1b", "parallel.sequence=false")


def config_of(run: Path, overrides: Sequence[str]) -> Loaded:
    """The run's config for one process, unless overrides ask for a layout; training's batch arithmetic set aside."""
    path = run / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{run} is not the folder of a run: it holds no config.yaml. Fix: name a track.folder.")
    loaded = read(path, [*ONE_PROCESS, *overrides])
    if not loaded.config.data.validation:
        fix = "name a prefix: roots evaluate RUN data.validation=data/mine/validation_text_document"
        raise ConfigError([Problem(key="data.validation", found=[], expected="a held-out corpus", fix=fix)])
    return loaded


def evaluate(run: Path, config: Config, mesh: Mesh) -> Score:
    """Collective over the world; the same on every rank."""
    checkpoint = newest(run)
    if checkpoint is None:
        raise CheckpointError(f"{run} holds no complete checkpoint. Fix: train it first, or name another run's folder.")
    passes = build_passes(config, mesh)
    load_weights(checkpoint, passes.model.params, mesh)
    held_out = Batches(config, config.data.validation, mesh.dp.rank, mesh.dp.size)
    found = score(passes, held_out.evaluation(config.train.eval_sequences), bytes_per_token(config.data.validation))
    if mesh.rank == 0:
        show(checkpoint, found)
    return found


def show(checkpoint: Path, found: Score) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("checkpoint", str(checkpoint))
    table.add_row("tokens", f"{found.targets:,}")
    table.add_row("log-likelihood", f"{found.log_likelihood:,.1f} nats")
    table.add_row("loss", f"{found.loss:.4f} nats per token")
    table.add_row("perplexity", f"{found.perplexity:.2f}")
    if found.bits_per_byte is not None:
        table.add_row("bits per byte", f"{found.bits_per_byte:.4f}")
    Console(highlight=False).print(table)
