"""Rules of families and objectives: which learns which, and what each needs. Pure arithmetic; called by checks.py."""

from __future__ import annotations

from collections.abc import Iterator

from roots_dist.accounting.sizes import num_blocks
from roots_dist.config.parallel import ParallelConfig
from roots_dist.config.records import family_of, objective_of, objectives_of_family, shortest_seq, target_seq
from roots_dist.config.schema import Config
from roots_dist.errors import Problem


def check(config: Config) -> Iterator[Problem]:
    name, family = config.objective.name, config.model.family
    learns = objectives_of_family(config)
    if name not in learns:
        yield Problem(
            key="objective.name",
            found=name,
            expected=f"for model.family={family} one of {', '.join(learns)}",
            fix=f"set objective.name={learns[0]}, or model.family={objective_of(config).families[0]}",
        )
        return
    yield from _places(config)
    yield from _length(config)
    yield from _task(config)
    yield from _masks(config)
    if family_of(config).has_two_stacks:
        yield from _two_stacks(config)


def _task(config: Config) -> Iterator[Problem]:
    """Labels that are not told are read off the rows, before anything is checked here."""
    f, o = config.finetune, config.objective
    objective = objective_of(config)
    if f.metric in ("f1", "mcc") and not objective.has_labels:
        yield Problem(
            key="finetune.metric",
            found=f.metric,
            expected=f"loss or accuracy for objective.name={o.name}: it has no classes",
            fix="use loss",
        )
    if f.patience and not (config.data.validation and config.train.eval_every):
        expected = "0 where nothing is evaluated while it learns"
        yield Problem(
            key="finetune.patience",
            found=f.patience,
            expected=expected,
            fix="set data.validation and train.eval_every, or leave it out",
        )
    if f.strategy == "progressive" and f.unfreeze_every >= config.train.steps:
        groups = -(-num_blocks(config) // f.unfreeze_blocks) + 2  # what is above the blocks, and what is below them
        key, found = (
            ("finetune.unfreeze_every", f.unfreeze_every)
            if f.unfreeze_every_epochs is None
            else ("finetune.unfreeze_every_epochs", f.unfreeze_every_epochs)
        )
        expected = (
            f"fewer steps than train.steps = {config.train.steps}: as it is, nothing but the top would ever learn"
        )
        fix = f"set finetune.unfreeze_every={max(1, config.train.steps // groups)}, or train longer"
        yield Problem(key=key, found=found, expected=expected, fix=fix)
    if objective.has_references and f.turns == "each":
        expected = f"all or last for objective.name={o.name}: a pair is one sample"
        yield Problem(key="finetune.turns", found=f.turns, expected=expected, fix="use last")
    if objective.has_labels and (len(f.labels) == 1 or len(set(f.labels)) < len(f.labels)):
        yield Problem(
            key="finetune.labels",
            found=list(f.labels),
            expected="two labels or more, each once",
            fix="leave it out: labels are read off data.train",
        )


def _places(config: Config) -> Iterator[Problem]:
    m, seq, family = config.model, config.data.seq_length, family_of(config)
    if m.positions in family.unfit_positions:
        yield Problem(
            key="model.positions",
            found=m.positions,
            expected=f"{' or '.join(family.positions)} for model.family={m.family}: "
            + family.unfit_positions[m.positions],
            fix=f"set model.positions={family.positions[0]}",
        )
    if m.positions == "learned" and m.max_positions is not None and m.max_positions < seq:
        yield Problem(
            key="data.seq_length",
            found=seq,
            expected=f"at most model.max_positions = {m.max_positions}: there are no more learned positions",
            fix=f"use {m.max_positions}, or raise model.max_positions",
        )


def _length(config: Config) -> Iterator[Problem]:
    objective, seq = objective_of(config), config.data.seq_length
    if seq < (least := shortest_seq(config)):
        yield Problem(
            key="data.seq_length",
            found=seq,
            expected=f"at least {least} for objective.name={objective.name}: {objective.shortest_holds}",
            fix=f"use {objective.usual_length}",
        )


def _masks(config: Config) -> Iterator[Problem]:
    o, objective = config.objective, objective_of(config)
    if objective.masks and o.mask_replace_probability + o.random_replace_probability > 1 + 1e-9:
        yield Problem(
            key="objective.random_replace_probability",
            found=o.random_replace_probability,
            expected=(
                f"at most 1 - objective.mask_replace_probability = {1 - o.mask_replace_probability:g}: both are "
                "shares of the hidden tokens"
            ),
            fix="use 0.1, with objective.mask_replace_probability=0.8",
        )
    if objective.pairs and config.model.segments < 2:
        yield Problem(
            key="model.segments",
            found=config.model.segments,
            expected=f"at least 2 for objective.name={objective.name}: the model must tell the two texts apart",
            fix="set model.segments=2",
        )


def _two_stacks(config: Config) -> Iterator[Problem]:
    m = config.model
    one_way = (
        ("model.norm_position", m.norm_position, "pre", "each stack ends with a norm"),
        ("model.embedding_norm", m.embedding_norm, False, "both stacks begin with the same bare words"),
    )
    for key, found, right, why in one_way:
        if found != right:
            said = str(right).lower()
            expected = f"{said} for model.family={m.family}: {why}"
            yield Problem(key=key, found=found, expected=expected, fix=f"set {key}={said}")
    if m.relative_buckets < 4:
        yield Problem(
            key="model.relative_buckets",
            found=m.relative_buckets,
            expected="at least 4: two for each side, one near and one far",
            fix="use 32, as T5",
        )
    elif m.relative_max_distance <= m.relative_buckets // 2:
        yield Problem(
            key="model.relative_max_distance",
            found=m.relative_max_distance,
            expected=f"more than {m.relative_buckets // 2}, the single distances that have one of "
            f"model.relative_buckets = {m.relative_buckets} each",
            fix=f"use {4 * m.relative_buckets}",
        )
    if config.parallel.position_unit() > 1 and config.data.seq_length >= shortest_seq(config):
        yield from _cut_targets(config)


def _cut_targets(config: Config) -> Iterator[Problem]:
    """Check that sequence and context parallelism can cut the decoder's positions too."""
    unit, seq, target = config.parallel.position_unit(), config.data.seq_length, target_seq(config)
    if target % unit == 0 or seq % unit:  # the latter has been told
        return
    cut = cut_by(config.parallel, "the decoder's positions too")
    told = f"a multiple of {cut}"
    follows = objective_of(config).target_length is not None
    if follows:
        key, found, told = "data.seq_length", seq, f"one that gives not {target} targets, but {told}"
    else:
        key, found = "data.target_seq_length", target
    longer = range(seq + unit, seq + 64 * unit, unit) if follows else ()
    fits = [s for s in longer if target_seq(config.changed({"data.seq_length": s})) % unit == 0]
    fix = (
        f"use {fits[0]}"
        if fits
        else f"use {-(-target // unit) * unit}"
        if not longer
        else "set parallel.sequence_parallel=false"
        if config.parallel.cp == 1
        else "lower parallel.cp"
    )
    yield Problem(
        key=key,
        found=found,
        expected=told,
        fix=fix,
    )


def cut_by(parallel: ParallelConfig, what: str) -> str:
    """The unit of positions, and who cuts them."""
    unit, tp = parallel.position_unit(), f"parallel.tp = {parallel.tp}"
    if parallel.cp == 1:
        return f"{tp}, because parallel.sequence_parallel cuts {what}"
    also = f", and parallel.sequence_parallel over {tp}," if parallel.sequence_parallel else ""
    return f"{unit}, because parallel.cp = {parallel.cp}{also} cuts {what} into two chunks for each rank"
