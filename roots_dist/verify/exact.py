"""`roots verify CONFIG --exact`: no bit may differ, in the dtype that trains.

    small config with train.exact --testing/bits.py: in its layout, and in one process--> digests, compared rank by rank

A digest that differs names the step, the number and the rank: a bug, or a machine that computes otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from roots_dist.config.parallel import ParallelConfig
from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.testing.bits import Bits, trace_bits
from roots_dist.testing.parity import Difference
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.verify.proof import Proof
from roots_dist.verify.proofs import TIMEOUT_S, describe
from roots_dist.verify.shrink import SmallConfig

KINDS = ("loss", "gradient norm", "(weight)", "(exp_avg)", "(exp_avg_sq)")
"""Endings of the names of digests."""


def exact_changes(parallel: ParallelConfig, dp: int) -> dict[str, object]:
    """Keys that make a small run exact, up to its own degrees. Its processes have one thread each."""
    degrees = {"tensor": parallel.tp, "data": dp, "context": parallel.cp}
    return {"train.exact": degrees, "advanced.threads": 1}


def prove_exact(small: SmallConfig) -> Proof:
    """Compare the bits of a small exact run with those of one process."""
    config, device = small.config, small.config.train.device
    kept = {key: value for key, value in ONE_PROCESS.items() if key != "train.exact"}
    (alone,) = on_world(1, trace_bits, config.changed(kept), 0, config.train.steps, timeout=TIMEOUT_S, device=device)
    if device == "cpu":
        ranks = on_warm_world(small.ranks, trace_bits, config, 0, config.train.steps, timeout=TIMEOUT_S)
    else:
        ranks = on_world(small.ranks, trace_bits, config, 0, config.train.steps, timeout=TIMEOUT_S, device=device)
    title = f"{describe(small)}, {config.train.precision} to the bit, numbers that differ"
    return Proof(title, small.notes, tuple(exact_row(kind, alone["steps"], ranks) for kind in KINDS))


def exact_row(kind: str, alone: Sequence[Bits], ranks: Sequence[Mapping[str, Any]]) -> Difference:
    """The number of digests of one kind that differ, and the first of them. A digest that no rank reports counts as
    different, and so does a step with nothing to compare."""
    found = [] if alone else ["no step to compare"]
    for step, truth in enumerate(alone):
        wanted = [what for what in truth if what.endswith(kind)]
        reports = [rank["steps"][step] if step < len(rank["steps"]) else {} for rank in ranks]
        found += [] if wanted else [f"step {step}: nothing to compare"]
        found += [f"step {step}: {what} on no rank" for what in wanted if not any(what in own for own in reports)]
        found += [
            f"step {step}: {what} on rank {number}"
            for number, own in enumerate(reports)
            for what, bits in own.items()
            if what.endswith(kind) and truth.get(what) != bits
        ]
    return Difference(kind.strip("()"), len(found), 0.0, found[0] if found else "")
