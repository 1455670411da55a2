"""All rules that bind one key to another, to the size of the world and to the machine: every broken one at once.

    Config + world size --checks.py--> problems, none: the layout works out
    Config + Facts ------readiness.py--> problems, none: files, memory and packages are there

Pure arithmetic, no torch: the same answer on a login node as on rank 383, before the first process group. Only of a
schedule's program, a rank proves its own part (schedule/violations.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from roots_dist.accounting.sizes import generator_of, num_blocks
from roots_dist.checks import exact, families, model, readiness, unused
from roots_dist.checks.facts import Facts
from roots_dist.checks.model import divisors
from roots_dist.config.batch_ramp import batch_sizes
from roots_dist.config.records import lr_schedule_of, objective_of, schedule_of
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem
from roots_dist.layout import Layout
from roots_dist.schedule import schedules
from roots_dist.schedule.program import refusal

MOST_PASSES = 1 << 18
"""Microbatches × stages whose program is checked, some seconds' work. Larger ones are slips: gradient accumulation goes
to thousands."""
MOST_TOKENS = 1 << 26
"""Tokens of a microbatch: to plan a run its samples are drawn. No device holds what larger ones compute."""


def layout_for(config: Config, world_size: int) -> Layout:
    """The layout of a world: dp is what tp, cp and pp leave over. Raises ConfigError if that is no whole number, or ep
    does not fit in."""
    parallel = config.parallel
    model_size = parallel.least_ranks()
    if world_size % model_size or world_size < 1:
        above = -(-max(world_size, 1) // model_size) * model_size
        keys, sizes = parallel.factors(), parallel.factors().values()
        raise ConfigError(
            [
                Problem(
                    key="world size",
                    found=world_size,
                    expected=f"a multiple of {' × '.join(keys)} = {' × '.join(map(str, sizes))} = {model_size}",
                    fix=f"start {above} processes, or lower {' or '.join(keys)}",
                )
            ]
        )
    dp = world_size // parallel.ranks_per_sample()
    return Layout(dp=dp, pp=parallel.pp, tp=parallel.tp, cp=parallel.cp, ep=parallel.ep)


def check(config: Config, world_size: int, facts: Facts | None = None) -> list[Problem]:
    """Everything that keeps this run from starting on this world; without `facts`, all that arithmetic can tell."""
    return [*unused.check(config), *check_used(config, world_size, facts)]


def check_used(config: Config, world_size: int, facts: Facts | None = None, rank: int | None = None) -> list[Problem]:
    """The same but for keys that the config has no use for.

    With `rank`, the schedule's program is checked for this rank and its pipeline neighbours, in a time that does not
    grow with the world; without it, for all ranks.
    """
    problems = [*families.check(config), *model.check(config), *_tensor_parallel(config)]
    problems += [*_exchanged_heads(config), *_optim(config)]
    problems += _spikes(config)
    try:
        layout = layout_for(config, world_size)
    except ConfigError as error:
        return problems + list(error.problems)
    ramp = list(_ramp(config))
    sizes = [] if ramp else batch_sizes(config.train)
    pp_rank = None if rank is None else layout.place(rank).pp
    problems += [*ramp, *_batch(config, layout, sizes), *_pipeline(config, layout, sizes, pp_rank)]
    problems += [*_engine(config, layout), *exact.check(config, layout, sizes)]
    if facts is not None:
        problems += readiness.check(config, layout, facts)
    return problems


def _tensor_parallel(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    for name, size in exact.cut_over_tensor_ranks(config).items():
        if size % tp:
            yield Problem(
                key="parallel.tp",
                found=tp,
                expected=f"a divisor of {name} = {size}",
                fix=f"choose one of {divisors(size)}" if size < 1000 else f"choose a tp that divides {size}",
            )
    if model.experts is not None and model.experts % config.parallel.ep:
        yield Problem(
            key="parallel.ep",
            found=config.parallel.ep,
            expected=f"a divisor of model.experts = {model.experts}",
            fix=f"choose one of {divisors(model.experts)}",
        )
    kv_heads = model.num_kv_heads()
    if kv_heads % tp and tp % kv_heads and model.heads % tp == 0:
        yield Problem(
            key="parallel.tp",
            found=tp,
            expected=f"a divisor or a multiple of model.kv_heads = {kv_heads}, so that no head is cut",
            fix=f"choose one of {divisors(kv_heads)}, or a multiple of {kv_heads}",
        )
    if config.parallel.sequence_parallel and tp == 1:
        yield Problem(
            key="parallel.sequence_parallel",
            found=True,
            expected="parallel.tp above 1: the sequence is cut over the tensor ranks",
            fix="set parallel.sequence_parallel=false, or raise parallel.tp",
        )
    unit = config.parallel.position_unit()
    if config.data.seq_length % unit:
        yield Problem(
            key="data.seq_length",
            found=config.data.seq_length,
            expected=f"a multiple of {families.cut_by(config.parallel, 'it')}",
            fix=f"use {-(-config.data.seq_length // unit) * unit}",
        )


def _exchanged_heads(config: Config) -> Iterator[Problem]:
    parallel, unit = config.parallel, config.parallel.head_unit()
    heads = {"model.heads": config.model.heads, "model.kv_heads": config.model.num_kv_heads()}
    if objective_of(config).has_generator:
        heads["the generator's heads (generator.heads)"] = generator_of(config).model.heads
    for name, number in heads.items():
        if number % unit:
            yield Problem(
                key="parallel.cp_kind",
                found=parallel.cp_kind,
                expected=f"gather, because parallel.tp × parallel.cp = {unit} does not divide {name} = {number}",
                fix="set parallel.cp_kind=gather, which takes any number of heads",
            )
            return


def _ramp(config: Config) -> Iterator[Problem]:
    train = config.train
    if train.batch_ramp is None:
        return
    start, increment, _ = train.batch_ramp
    if min(train.batch_ramp) < 1 or start > train.global_batch or (train.global_batch - start) % increment:
        yield Problem(
            key="train.batch_ramp",
            found=list(train.batch_ramp),
            expected=(
                f"[start, increment, samples] above 0 that reaches train.global_batch = {train.global_batch} in "
                "whole steps"
            ),
            fix=f"start at {train.global_batch} less some increments, or leave train.batch_ramp out",
        )


def _batch(config: Config, layout: Layout, sizes: Sequence[int]) -> Iterator[Problem]:
    train = config.train
    most, length = max(1, MOST_TOKENS // config.data.seq_length), config.data.seq_length
    if train.micro_batch > most:
        yield Problem(
            key="train.micro_batch",
            found=train.micro_batch,
            expected=f"at most {most:,}: with data.seq_length = {length:,}, {MOST_TOKENS:,} tokens in a microbatch",
            fix="lower it: gradients of many microbatches are summed before a step",
        )
        return
    ramp = train.batch_ramp
    unit = train.micro_batch * layout.dp
    wrong = [size for size in sizes if size % unit]
    if wrong:
        yield Problem(
            key="train.global_batch" if ramp is None else "train.batch_ramp",
            found=wrong[0] if ramp is None else list(ramp),
            expected=f"every batch a multiple of train.micro_batch × dp = {train.micro_batch} × {layout.dp} = {unit}"
            + ("" if ramp is None else f", and not {wrong[0]}"),
            fix=f"use {-(-wrong[0] // unit) * unit} or another multiple of {unit}, or change train.micro_batch",
        )


def _pipeline(config: Config, layout: Layout, sizes: Sequence[int], rank: int | None) -> Iterator[Problem]:
    parallel = config.parallel
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
    for batch in sizes:
        microbatches = config.num_microbatches(layout.dp, batch)
        reason = (
            schedules.problem(schedule_of(config), layout.pp, microbatches, parallel.virtual_stages)
            if microbatches
            else None
        )
        if reason is not None:
            wrong, _, fix = reason.partition(". Fix: ")
            yield Problem(
                key="parallel.schedule",
                found=parallel.schedule,
                expected=f"a schedule for {layout.pp} ranks and {microbatches} microbatches; it says {wrong}",
                fix=fix or "choose another parallel.schedule",
            )
            return
    if sizes and blocks >= stages:
        yield from _deadlock(config, layout, sizes, rank)


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


def _optim(config: Config) -> Iterator[Problem]:
    optim, steps = config.optim, config.train.steps
    if optim.warmup_steps > steps:
        yield Problem(
            key="optim.warmup_steps",
            found=optim.warmup_steps,
            expected=f"at most train.steps = {steps}",
            fix=f"use {max(1, steps // 20)}, or train longer",
        )
    elif (
        optim.decay_steps is not None
        and lr_schedule_of(config).decays_at_the_end
        and optim.warmup_steps + optim.decay_steps > steps
    ):
        yield Problem(
            key="optim.decay_steps",
            found=optim.decay_steps,
            expected=f"at most train.steps - optim.warmup_steps = {steps - optim.warmup_steps}, "
            f"since {optim.lr_schedule} decays at the end",
            fix=f"use {max(1, min(steps // 5, steps - optim.warmup_steps))}",
        )
    if optim.min_lr > optim.lr:
        yield Problem(
            key="optim.min_lr",
            found=optim.min_lr,
            expected=f"at most optim.lr = {optim.lr}",
            fix=f"use {optim.lr / 10:g}, or 0",
        )


def _spikes(config: Config) -> Iterator[Problem]:
    if config.train.on_spike != "rewind":
        return
    if config.checkpoint.every == 0:
        yield Problem(
            key="checkpoint.every",
            found=0,
            expected="checkpoints to go back to, because of train.on_spike=rewind",
            fix="save one every so many steps, or set train.on_spike=skip",
        )
    if config.finetune.strategy == "progressive":
        yield Problem(
            key="train.on_spike",
            found="rewind",
            expected="skip with finetune.strategy=progressive: what has been unfrozen stays so",
            fix="set train.on_spike=skip",
        )


def _engine(config: Config, layout: Layout) -> Iterator[Problem]:
    engine, zero = config.advanced.engine, config.parallel.zero_stage
    if engine == "deepspeed" and (layout.ep > 1 or config.model.router_bias):
        yield _engine_of_experts(layout)
    if engine == "deepspeed" and zero == 0 and config.train.precision == "bf16":
        yield Problem(
            key="parallel.zero_stage",
            found=0,
            expected="1, 2 or 3 with train.precision=bf16 under DeepSpeed: its stage 0 gets bf16 norms wrong",
            fix="set parallel.zero_stage=1, or advanced.engine=reference",
        )
    if engine == "deepspeed" and config.optim.optimizer in config.extension.optimizers:
        yield Problem(
            key="optim.optimizer",
            found=config.optim.optimizer,
            expected="adamw with advanced.engine=deepspeed: an extension's rule has the other engine",
            fix="set advanced.engine=reference",
        )
    if config.advanced.float64:
        yield from _double(config, engine)


def _engine_of_experts(layout: Layout) -> Problem:
    if layout.ep > 1:
        expected = "reference with parallel.ep above 1: DeepSpeed shards what all data ranks hold alike"
    else:
        expected = "reference with model.router_bias: DeepSpeed would round the biases with the model"
    return Problem(key="advanced.engine", found="deepspeed", expected=expected, fix="set advanced.engine=reference")


def _double(config: Config, engine: str) -> Iterator[Problem]:
    if engine == "deepspeed":
        yield Problem(
            key="advanced.float64",
            found=True,
            expected="the reference engine: DeepSpeed keeps float32 master weights",
            fix="set advanced.engine=reference",
        )
    if config.train.precision == "bf16":
        yield Problem(
            key="advanced.float64",
            found=True,
            expected="train.precision=fp32: a run has one precision",
            fix="set train.precision=fp32, or advanced.float64=false",
        )
