"""Rules that bind the pipeline's stages, its schedule and the batch. Pure arithmetic; called by checks.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roots_dist.accounting.sizes import num_blocks
from roots_dist.config.records import schedule_of
from roots_dist.config.schema import Config
from roots_dist.errors import Problem, present
from roots_dist.layout import Layout
from roots_dist.schedule import schedules
from roots_dist.schedule.program import refusal

MOST_PASSES = 1 << 18
"""Microbatches × stages whose program is checked, some seconds' work. Larger ones are slips: gradient accumulation goes
to thousands."""


def check(config: Config, layout: Layout, sizes: Sequence[int], rank: int | None) -> Iterator[Problem]:
    """sizes: the batches that occur; none if they are wrong themselves. rank: the pipeline rank that asks; None: every
    rank."""
    blocks, stages = num_blocks(config), config.num_stages()
    if blocks < stages:
        one_stack = blocks == config.model.layers
        yield Problem(
            key="model.layers",
            found=config.model.layers,
            expected=f"at least one layer for each of parallel.pp × parallel.virtual_stages = {stages} stages"
            + ("" if one_stack else f"; both stacks together have {blocks}"),
            fix=(f"use {stages} layers or more" if one_stack else "use more layers")
            + ", or lower parallel.pp or parallel.virtual_stages",
        )
    batches = max((config.num_microbatches(layout.dp, batch) for batch in sizes), default=0)
    if blocks >= stages and batches * stages > MOST_PASSES:
        most = max(1, MOST_PASSES // stages)
        yield Problem(
            key="train.global_batch",
            found=config.train.global_batch,
            expected=f"at most {most:,} microbatches in a step of a rank, and not {batches:,}: all passes are checked",
            fix="lower train.global_batch, raise train.micro_batch, or start more processes",
        )
        return
    wrong = next((found for batch in sizes if (found := _schedule(config, layout, batch)) is not None), None)
    if wrong is not None:
        yield wrong
        return
    if sizes and blocks >= stages:
        yield from _deadlock(config, layout, sizes, rank)


def _schedule(config: Config, layout: Layout, batch: int) -> Problem | None:
    """The reason why the schedule does not take this number of stages, or of microbatches."""
    parallel, train, microbatches = config.parallel, config.train, config.num_microbatches(layout.dp, batch)
    named, stages = schedules.record_of(schedule_of(config)), parallel.virtual_stages
    if not microbatches or (reason := schedules.problem(schedule_of(config), layout.pp, microbatches, stages)) is None:
        return None
    with_schedule = f"with parallel.schedule={parallel.schedule}"
    if named.virtual_stages != (stages > 1):
        fix = f"set parallel.virtual_stages=2, or parallel.schedule={schedules.DEFAULT}"
        if not named.virtual_stages:
            others = [f"parallel.schedule={name}" for name, s in schedules.SCHEDULES.items() if s.virtual_stages]
            fix = f"set parallel.virtual_stages=1, or {' or '.join(others)}"
        expected = f"{'at least 2' if named.virtual_stages else '1'} {with_schedule}"
        return Problem(key="parallel.virtual_stages", found=stages, expected=expected, fix=fix)
    if named.whole_groups and microbatches % layout.pp:
        unit = train.micro_batch * layout.dp
        use = -(-microbatches // layout.pp) * layout.pp * unit
        of_ramp = train.batch_ramp is not None
        return Problem(
            key="train.batch_ramp" if of_ramp else "train.global_batch",
            found=list(present(train.batch_ramp)) if of_ramp else batch,
            expected=f"{'every batch ' if of_ramp else ''}a multiple of train.micro_batch × dp × parallel.pp = "
            f"{train.micro_batch} × {layout.dp} × {layout.pp} = {unit * layout.pp} {with_schedule}"
            + (f", and not {batch}" if of_ramp else ""),
            fix=f"use {'multiples of ' + str(unit * layout.pp) if of_ramp else use}, or set "
            f"parallel.schedule={schedules.DEFAULT}",
        )
    wrong, _, fix = reason.partition(". Fix: ")
    return Problem(
        key="parallel.schedule",
        found=parallel.schedule,
        expected=f"a schedule for {layout.pp} ranks and {microbatches} microbatches; it says {wrong}",
        fix=fix or "choose another parallel.schedule",
    )


def _deadlock(config: Config, layout: Layout, sizes: Sequence[int], rank: int | None) -> Iterator[Problem]:
    """Check the programs of the smallest and the largest batch; those between are checked when a ramp comes to them."""
    parallel = config.parallel
    for batch in sorted({min(sizes), max(sizes)}):
        microbatches = config.num_microbatches(layout.dp, batch)
        shape = schedules.Shape(parallel.pp, microbatches, parallel.virtual_stages)
        if microbatches and (reason := refusal(schedule_of(config), shape, rank)):
            yield Problem(
                key="parallel.schedule",
                found=parallel.schedule,
                expected=f"a program that ends with {shape.ranks} ranks and {microbatches} microbatches; {reason}",
                fix="choose another parallel.schedule, or correct its function in schedule/schedules.py",
            )
            return
