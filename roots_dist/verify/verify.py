"""`roots verify CONFIG`: proof on this machine that the config's layout computes what one process computes, before it
costs GPU hours.

    config --shrink--> small config --proofs.py: the trainer's loop on real processes--> table of differences, verdict

Tensor, sequence, context, expert and pipeline parallelism are compared in float64, where noise is below 1e-10 and
anything above is a bug; then with data ranks and their ZeRO stage through the engine of the run, which is compared in
float32 with a stated bound if it is DeepSpeed; a run in bf16 by its distance from the truth. With --exact nothing but
bits: verify/exact.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from roots_dist.checks.checks import check_used
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError
from roots_dist.schedule.schedules import DEFAULT, SCHEDULES
from roots_dist.verify.exact import exact_changes, prove_exact
from roots_dist.verify.low_precision import prove_in_bf16
from roots_dist.verify.proof import Proof
from roots_dist.verify.proof_table import show
from roots_dist.verify.proofs import prove
from roots_dist.verify.shrink import Dtype, SmallConfig, changes, shrink

UNKNOWN_DP = 3
"""Data ranks of the small run if those of the run are not known."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The comparison that is asked for."""

    steps: int = 4
    dp: int | None = None
    """Data ranks of the run; None if their number is not known."""
    device: str = "cpu"
    bf16: bool = False
    exact: bool = False
    """True if bits are compared instead, in the dtype that trains."""

    def small(self, config: Config, dp: int, dtype: Dtype) -> SmallConfig:
        """Shrink the config. Raises ConfigError if the small run could not start: a fault of shrink()."""
        if self.exact:
            config = config.changed({"advanced.engine": "reference"})
        small = shrink(config, dp, dtype, steps=self.steps, device=self.device)
        if self.exact:
            exact = small.config.changed(exact_changes(small.config.parallel, small.dp))
            small = replace(small, config=exact, notes=(*small.notes[:-1], changes(config, exact)))
        problems = check_used(small.config, small.ranks)
        if problems:
            raise ConfigError(problems)
        return small


def proofs(config: Config, wanted: Wanted) -> Iterator[Proof]:
    """All proofs of a config that passes the trainer's checks."""
    if wanted.exact:
        dtype: Dtype = "bf16" if config.train.precision == "bf16" else "float32"
        for dp in (1, 2):  # powers of two, as the degrees are
            yield from prove_exact(wanted.small(config, dp, dtype))
        return
    dp = wanted.dp or UNKNOWN_DP
    yield from prove(wanted.small(config, 1, "float64"))
    zero = config.parallel.zero_stage
    if dp > 1 or (config.parallel.cp > 1 and zero > 0):
        dtype = "float32" if zero and config.advanced.engine == "deepspeed" else "float64"
        yield from prove(wanted.small(config, dp, dtype))
    if wanted.bf16:
        yield prove_in_bf16(wanted.small(config, dp, "bf16"))


MATRIX: tuple[dict[str, object], ...] = tuple(
    {"parallel.tp": tp, "parallel.cp": cp, "parallel.ep": ep, "parallel.pp": pp,
     "parallel.sequence_parallel": tp > 1 and sequence, "parallel.schedule": schedule,
     "parallel.virtual_stages": 2 if SCHEDULES[schedule].virtual_stages else 1, "parallel.zero_stage": zero}
    for tp, pp, sequence, schedule, zero, cp, ep in [
        *((tp, 1, sequence, DEFAULT, 0, 1, 1) for sequence in (False, True) for tp in (2, 4)),
        *((1, pp, False, name, 0, 1, 1) for pp in (2, 4) for name in SCHEDULES),
        *((2, 2, True, name, 0, 1, 1) for name, s in SCHEDULES.items()
          if name == DEFAULT or s.virtual_stages or s.splits_backward),
        (4, 2, True, DEFAULT, 0, 1, 1),
        (1, 1, False, DEFAULT, 0, 2, 1), (1, 1, False, DEFAULT, 0, 4, 1), (2, 1, False, DEFAULT, 0, 2, 1),
        (2, 1, True, DEFAULT, 0, 2, 1),
        *((1, 2, False, name, 0, 2, 1) for name, s in SCHEDULES.items() if s.splits_backward),
        (2, 2, True, DEFAULT, 0, 2, 1), (2, 1, True, DEFAULT, 0, 4, 1), (1, 2, False, DEFAULT, 0, 4, 1),
        (1, 1, False, DEFAULT, 1, 1, 1), (1, 1, False, DEFAULT, 2, 1, 1), (1, 1, False, DEFAULT, 3, 1, 1),
        (2, 1, True, DEFAULT, 1, 1, 1), (1, 2, False, DEFAULT, 2, 1, 1), (2, 2, True, DEFAULT, 1, 1, 1),
        (2, 2, True, DEFAULT, 2, 1, 1), (2, 2, True, DEFAULT, 3, 1, 1), (1, 1, False, DEFAULT, 3, 2, 1),
        (1, 1, False, DEFAULT, 1, 4, 1),
        *((1, 1, False, DEFAULT, 0, 1, ep) for ep in (2, 4)),
        *((2, 1, sequence, DEFAULT, 0, 1, 2) for sequence in (False, True)), (2, 1, True, DEFAULT, 0, 1, 4),
        *((1, 2, False, name, 0, 1, 2) for name, s in SCHEDULES.items() if name == DEFAULT or s.splits_backward),
        (1, 2, False, DEFAULT, 0, 1, 4), (1, 1, False, DEFAULT, 0, 2, 2), (1, 1, False, DEFAULT, 0, 2, 4),
        (1, 1, False, DEFAULT, 0, 4, 4),
        *((1, 1, False, DEFAULT, zero, 1, 2) for zero in (1, 2, 3)), (1, 1, False, DEFAULT, 1, 1, 4),
        (2, 1, True, DEFAULT, 3, 1, 2), (1, 2, False, DEFAULT, 2, 1, 2), (2, 2, True, DEFAULT, 1, 1, 2),
        (1, 1, False, DEFAULT, 3, 2, 4),
    ]
)  # fmt: skip
"""The grid of `roots verify --matrix`: tensor, sequence, context, expert and pipeline degrees, schedules, ZeRO stages.
Rows with expert ranks are for models that have experts."""


def matrix_proofs(config: Config, wanted: Wanted, layouts: Sequence[Mapping[str, object]] = MATRIX) -> Iterator[Proof]:
    """Proofs of each of these layouts, with this config's model and as many blocks as the layout has stages."""
    for values in layouts:
        if values["parallel.ep"] != 1 and config.model.experts is None:
            continue
        zero = values["parallel.zero_stage"]
        changed = config.changed(values)
        changed = changed.changed({"model.layers": max(config.model.layers, changed.num_stages())})
        dp = UNKNOWN_DP if zero else 1
        yield from prove(wanted.small(changed, dp, "float64"))
        if zero and values["parallel.ep"] == 1 and not config.model.router_bias:
            yield from prove(wanted.small(changed.changed({"advanced.engine": "deepspeed"}), dp, "float32"))
        if wanted.bf16:
            yield prove_in_bf16(wanted.small(changed, dp, "bf16"))


def verify(config: Config, wanted: Wanted, *, matrix: bool) -> bool:
    """Print the proofs as they come. Returns whether all passed."""
    return show(matrix_proofs(config, wanted) if matrix else proofs(config, wanted))
