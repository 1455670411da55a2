"""Time one pipeline rank's passes on a local device, with its own kernels and the layout's own shapes.

    config + layout + pp rank + device --the rank's own stages, with data, recording groups--> {(kind, stage): seconds}

One rank's part fits one device whatever the size of the world, and effects that no formula has (a head width that is
slow in its kernels) are simply measured. Messages between tensor and context ranks are left out; predict.py adds them.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import Tensor

from roots_dist.assembly.rank_model import RankModel, build_model
from roots_dist.config.records import schedule_of
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.runs.plan.rank_cost import first_trainable_stage, one_microbatch, recording_mesh
from roots_dist.schedule.actions import Kind
from roots_dist.schedule.schedules import record_of
from roots_dist.world.batch import MicroBatch

REPEATS = 3
"""Number of repeats after one warm-up; the median counts."""


def time_passes(config: Config, layout: Layout, pp_rank: int, device: torch.device) -> dict[tuple[Kind, int], float]:
    """Time tensor rank 0. Needs the memory of one rank with one microbatch, without the optimizer's."""
    model = build_model(config, recording_mesh(layout, pp_rank, device, []))
    batch = one_microbatch(config, model.tp.of_context).to(device)
    split_backward = record_of(schedule_of(config)).splits_backward
    for p in model.params:
        p.tensor.requires_grad_(p.name in model.trainable)
    return {
        (kind, index): statistics.median(seconds)
        for index in sorted(model.stages)
        for kind, seconds in _time_stage(model, index, batch, split_backward).items()
    }


def _time_stage(model: RankModel, index: int, batch: MicroBatch, split_backward: bool) -> dict[Kind, list[float]]:
    device, deferred, stage = batch.tokens.device, model.tp.deferred, model.stages[index]
    needs_input_grad = index > first_trainable_stage(model)
    found: dict[Kind, list[float]] = {}
    for repeat in range(REPEATS + 1):
        payload = {
            name: _random_input(*spec, device, needs_input_grad)
            for name, spec in model.input_specs[index](batch).items()
        }
        clock = _now(device)
        out = stage(payload, batch)
        loss = sum(term.sum for term in out.results) if out.results else None
        laps = {Kind.FORWARD: -clock + (clock := _now(device))}
        outputs = [t for t in out.payload.values() if t.requires_grad]
        deferred.enabled = split_backward
        scored = [] if loss is None or not loss.requires_grad else [loss]
        if roots := [*scored, *outputs]:
            torch.autograd.backward(roots, [*(None for _ in scored), *map(torch.ones_like, outputs)])
        laps[Kind.INPUT if split_backward else Kind.BACKWARD] = -clock + (clock := _now(device))
        deferred.enabled = False
        if split_backward:
            deferred.run(deferred.drain())
            laps[Kind.WEIGHT] = _now(device) - clock
        for kind, seconds in laps.items() if repeat else ():
            found.setdefault(kind, []).append(seconds)
    return found


def _random_input(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, needs_grad: bool) -> Tensor:
    if dtype.is_floating_point:
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=needs_grad)
    return torch.ones(shape, dtype=dtype, device=device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
