"""`roots verify CONFIG --exact`: no bit may differ, in the dtype that trains.

    small config --the trainer's loop, in its layout and in one process--> digests, compared rank by rank
                 --each run resumed from half-way by the other         --> the same

A digest that differs names the step, the number and the rank: a bug, or a machine that computes otherwise.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from roots_dist.config.parallel import ParallelConfig
from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.testing.bits import Bits
from roots_dist.testing.parity import Difference
from roots_dist.verify.proof import Proof
from roots_dist.verify.proofs import Place, describe, resumes, started
from roots_dist.verify.shrink import SmallConfig
from roots_dist.verify.trainer_trace import trace_training_bits

KINDS = ("loss", "gradient norm", "(weight)", "(exp_avg)", "(exp_avg_sq)")
"""Endings of the names of digests."""
LOGGED = "(logged)"
"""Ending of the names of what the run has logged: held-out losses, norms of groups, counts."""


def exact_changes(parallel: ParallelConfig, dp: int) -> dict[str, object]:
    """Keys that make a small run exact, up to its own degrees. Its processes have one thread each."""
    degrees = {"tensor": parallel.tp, "data": dp, "context": parallel.cp}
    return {"train.exact": degrees, "advanced.threads": 1}


def prove_exact(small: SmallConfig) -> Iterator[Proof]:
    """Compare the bits of a small exact run with those of one process; then each of them resumed by the other from
    half-way."""
    with tempfile.TemporaryDirectory(prefix="roots-verify-") as folder:
        place = Place(Path(folder))
        config = started(small, place)
        alone = config.changed({key: value for key, value in ONE_PROCESS.items() if key != "train.exact"})
        (truth,) = place.on_ranks(trace_training_bits, alone, 1, "alone")
        found = place.on_ranks(trace_training_bits, config, small.ranks, "layout")
        title = f"{describe(small)}, {config.train.precision} to the bit"
        yield Proof(f"{title}, numbers that differ", small.notes, exact_rows(truth, found))
        if small.ranks == 1:
            return
        half = config.checkpoint.every
        for words, saved, resumed, ranks in resumes(alone, config, small.ranks):
            place.hand_over(saved, half, f"after-{saved}")
            found = place.on_ranks(trace_training_bits, resumed, ranks, f"after-{saved}")
            yield Proof(f"{title}, {words} after step {half}", (), exact_rows(truth, found, half))


def exact_rows(truth: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]], after: int = 0) -> tuple[Difference, ...]:
    """Compare what one process has computed and logged after a step with what ranks have."""
    rows = [exact_row(kind, truth["steps"][after:], ranks) for kind in KINDS]
    alone, *others = [{"steps": [_logged(one["logged"], after)]} for one in (truth, *ranks)]
    return *rows, exact_row(LOGGED, alone["steps"], others)


def _logged(records: Sequence[tuple[int, str, str]], after: int) -> Bits:
    return {f"{name} of step {step} {LOGGED}": bits for step, name, bits in records if step > after}


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
