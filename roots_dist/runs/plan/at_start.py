"""The planned memory of a process for the opening of a run, unless counting it takes longer than a start should.

config + layout --planned_bytes, on rank 0--> the number that `roots plan` prints, or None
"""

from __future__ import annotations

import logging
import time
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.runs.plan.predict import predict

log = logging.getLogger(__name__)

LIMIT_S = 1.0
"""Seconds of processor time that a count may take."""
MOST_PASSES = 20_000
"""Forward passes of all pipeline ranks in a step, whose program is played in less than that."""


class OutOfTimeError(Exception):
    """A count takes longer than it may."""


class _TimeLimit(TorchDispatchMode):
    """Raises OutOfTimeError at the first operation that begins too late."""

    def __init__(self, seconds: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call] # torch's has no types
        self._end = time.thread_time() + seconds

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as CostCounter

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if time.thread_time() > self._end:
            raise OutOfTimeError
        return func(*args, **(kwargs or {}))


def planned_bytes(config: Config, layout: Layout) -> int | None:
    """Bytes of tensors of the process that needs most, those on the host included where it trains on a CPU. None if
    counting them would take too long, or is impossible. Draws no random numbers."""
    if layout.pp * config.parallel.virtual_stages * config.num_microbatches(layout.dp) > MOST_PASSES:
        return None
    try:
        with _TimeLimit(LIMIT_S):
            plan = predict(config, layout)
    except Exception as error:  # of an extension, too, which may ask for values where tensors have only shapes
        log.debug("the memory is not planned: %r", error)
        return None
    return plan.peak_with_copy if config.train.device == "cpu" else plan.peak
