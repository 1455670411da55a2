"""`roots evaluate RUN`: held-out loss of a run's newest checkpoint, in one process or in any layout.

    run's config.yaml --of_run--> Passes --load_weights--> score --> table
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from roots_dist.checkpoint.keep import chosen
from roots_dist.checkpoint.load import load_weights
from roots_dist.config.schema import Config
from roots_dist.data.batches import Batches
from roots_dist.evaluate.held_out import Score, bytes_per_token, score
from roots_dist.mesh import Mesh
from roots_dist.objectives import make_objective
from roots_dist.objectives.base import MicroBatch
from roots_dist.train.build import build_passes


def evaluate(config: Config, mesh: Mesh) -> Score:
    """Collective over the world; the same on every rank. Rank 0 shows it."""
    run = Path(config.track.folder)
    checkpoint = chosen(run)
    passes = build_passes(config, mesh)
    load_weights(checkpoint, passes.model.params, mesh)
    objective = make_objective(config)
    held_out = Batches.open(config, objective, config.data.validation, mesh.dp.rank, mesh.dp.size)
    sequences = min(config.train.eval_sequences, held_out.num_samples)
    batches: Iterable[MicroBatch] = held_out.evaluation(sequences)
    if mesh.rank == 0 and sys.stderr.isatty():
        total = -(-sequences // (config.train.micro_batch * mesh.dp.size))
        batches = track(batches, "evaluating", total=total, console=Console(stderr=True), transient=True)
    found = score(passes, objective, batches, bytes_per_token(config.data.validation))
    if mesh.rank == 0:
        show(checkpoint, sequences, found)
    return found


def show(checkpoint: Path, sequences: int, found: Score) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_row("checkpoint", str(checkpoint))
    table.add_row("tokens", f"{found.targets:,} in {sequences:,} sequences")
    if found.log_likelihood is not None:
        table.add_row("log-likelihood", f"{found.log_likelihood:,.1f} nats")
    table.add_row("loss", f"{found.loss:.4f} nats per token")
    for name, sums in found.terms.items() if len(found.terms) > 1 else ():
        table.add_row(f"  {name}", f"{sums.mean:.4f} nats, {sums.accuracy:.1%} right of {sums.count:,}")
    if found.perplexity is not None:
        table.add_row("perplexity", f"{found.perplexity:.2f}")
    if found.bits_per_byte is not None:
        table.add_row("bits per byte", f"{found.bits_per_byte:.4f}")
    Console(highlight=False, soft_wrap=True).print(table)
