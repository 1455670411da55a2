"""All rules that bind one key to another, to the size of the world and to the machine: every broken one at once.

    Config + world size --checks.py--> problems, none: the layout works out
    Config + Facts ------readiness.py--> problems, none: files, memory and packages are there

Pure arithmetic, no torch: the same answer on a login node as on rank 383, before the first process group. Only of a
schedule's program, a rank proves its own part (schedule/violations.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from roots_dist.accounting.sizes import generator_of
from roots_dist.checks import exact, families, model, pipeline, readiness, unused
from roots_dist.checks.facts import Facts
from roots_dist.checks.model import divisors, one_of
from roots_dist.config.batch_ramp import batch_sizes
from roots_dist.config.parallel import ParallelConfig
from roots_dist.config.records import lr_schedule_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem
from roots_dist.layout import Layout

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
        lower = dict(_lower(parallel, world_size))
        fix = f"start {above} processes"
        if world_size > 0 and not check_used(config.changed(lower), world_size):
            fix += ", or write " + " ".join(f"{key}={'null' if size is None else size}" for key, size in lower.items())
        raise ConfigError(
            [
                Problem(
                    key="world size",
                    found=world_size,
                    expected=f"a multiple of {' × '.join(keys)} = {' × '.join(map(str, sizes))} = {model_size}",
                    fix=fix,
                )
            ]
        )
    dp = world_size // parallel.ranks_per_sample()
    return Layout(dp=dp, pp=parallel.pp, tp=parallel.tp, cp=parallel.cp, ep=parallel.ep, zero_ranks=parallel.zero_ranks)


def _lower(parallel: ParallelConfig, world_size: int) -> Iterator[tuple[str, int | None]]:
    """The degrees that do not divide what the axes before them leave of the ranks, with those that do."""
    left = max(world_size, 1)
    for axis in ("tp", "cp", "ep", "zero_ranks", "pp"):
        size = getattr(parallel, axis) or 1
        if (fits := math.gcd(size, left)) != size:
            yield f"parallel.{axis}", None if axis == "zero_ranks" and fits == 1 else fits
        left //= fits


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
    problems += [*ramp, *_batch(config, layout, sizes), *pipeline.check(config, layout, sizes, pp_rank)]
    problems += [*_engine(config, layout), *exact.check(config, layout, sizes)]
    if facts is not None:
        problems += readiness.check(config, layout, facts)
    return problems


def _tensor_parallel(config: Config) -> Iterator[Problem]:
    model, tp = config.model, config.parallel.tp
    cut = exact.cut_over_tensor_ranks(config)
    wrong = [f"{name} = {size}" for name, size in cut.items() if size % tp]
    kv_heads = model.num_kv_heads()

    def cuts_a_head(number: int) -> bool:
        return bool(kv_heads % number and number % kv_heads)

    if wrong or cuts_a_head(tp):
        cuts = cuts_a_head(tp) and model.heads % tp == 0  # else what is wrong with the heads is said
        heads = [f"a divisor or a multiple of model.kv_heads = {kv_heads}"] if cuts else []
        fits = [number for number in divisors(math.gcd(*cut.values())) if not cuts_a_head(number)]
        fits = [number for number in fits if _takes_positions_and_heads(config, number)] or [1]
        yield Problem(
            key="parallel.tp",
            found=tp,
            expected=" and ".join([*(["a divisor of " + " and of ".join(wrong)] if wrong else []), *heads])
            + (", so that no head is cut" if heads else ""),
            fix=one_of(fits) if fits != [1] else "use 1, or change what is named",
        )
    if model.experts is not None and model.experts % config.parallel.ep:
        yield Problem(
            key="parallel.ep",
            found=config.parallel.ep,
            expected=f"a divisor of model.experts = {model.experts}",
            fix=one_of(divisors(model.experts)),
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


def _takes_positions_and_heads(config: Config, tp: int) -> bool:
    """True if this many tensor ranks cut the positions evenly, and the heads that context ranks exchange."""
    parallel = config.parallel.model_copy(update={"tp": tp})
    heads, unit = (config.model.heads, config.model.num_kv_heads()), parallel.head_unit()
    return config.data.seq_length % parallel.position_unit() == 0 and not any(number % unit for number in heads)


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
    if config.parallel.zero_ranks is not None:
        yield from _some_shards(config)
    if config.advanced.float64:
        yield from _double(config, engine)


def _some_shards(config: Config) -> Iterator[Problem]:
    """Refuse what cannot be where ZeRO shards over some of the data ranks."""
    without = (
        (config.advanced.engine == "deepspeed", "advanced.engine=deepspeed, which shards over all data ranks"),
        (config.parallel.ep > 1, "parallel.ep above 1, where experts have holders of their own"),
        (config.train.exact is not None, "train.exact, whose sums are trees over all data ranks"),
    )
    for is_there, what in without:
        if is_there:
            yield Problem(
                key="parallel.zero_ranks",
                found=config.parallel.zero_ranks,
                expected=f"no value with {what}",
                fix="leave it out",
            )


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
