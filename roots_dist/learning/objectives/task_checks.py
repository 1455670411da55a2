"""Checks of a task's rows, and what they say of its config: before the first process group.

config --complete_from_rows--> the same with labels and steps by the rows of data.train
config --check_rows--> every row read and cut as in training: the first that cannot be learned is refused with its line
"""

from __future__ import annotations

from collections.abc import Iterator

from roots_dist.config.batch_ramp import step_after
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, DataError, Problem
from roots_dist.learning.data.batches import open_source
from roots_dist.learning.data.tasks import collect_labels
from roots_dist.world.batch import Objective, PackingObjective, RowObjective


def complete_from_rows(config: Config) -> Config:
    """Raises DataError for rows that cannot be read."""
    f = config.finetune
    values: dict[str, object] = {}
    if objective_of(config).has_labels and not f.labels and config.data.train:
        values["finetune.labels"] = _labels_of_rows(config)
    labelled = config.changed(values)
    if (
        (f.epochs is None and f.unfreeze_every_epochs is None)
        or not config.data.train
        or (objective_of(config).rows and not config.data.tokenizer)
    ):
        return labelled  # what is missing is told by the checks
    samples = _num_samples(labelled)
    if f.epochs is not None:  # batches go on over the end of a pass, so that only the last step is rounded up
        values["train.steps"] = step_after(config.train, f.epochs * samples)
    if f.unfreeze_every_epochs is not None:
        pass_steps = samples / config.train.global_batch
        values["finetune.unfreeze_every"] = max(1, round(f.unfreeze_every_epochs * pass_steps))
    return config.changed(values)


def _labels_of_rows(config: Config) -> tuple[str, ...]:
    """The labels of the training rows. Raises DataError for fewer than two."""
    paths = [source.path for source in config.data.train]
    labels = collect_labels(paths, config)
    if len(labels) == 1:
        expected = f"rows of two labels or more; in all of them {config.finetune.label_column} is {labels[0]!r}"
        fix = "add rows of another label, or name the column that holds it with finetune.label_column"
        raise DataError(Problem(key="data.train", found=", ".join(paths), expected=expected, fix=fix))
    return labels


def _num_samples(config: Config) -> int:
    from roots_dist.learning.objectives import make_objective

    objective = make_objective(config)
    packed = config.finetune.packing and isinstance(objective, PackingObjective)  # else the checks refuse the key
    opened = [open_source(objective, source.path, packed) for source in config.data.train]
    return sum(map(objective.num_samples, opened))


def check_rows(config: Config) -> None:
    """Raises DataError or ConfigError for rows that training would stumble over. The headers of corpora are checked
    before."""
    if not objective_of(config).rows:
        return
    from roots_dist.learning.objectives import make_row_objective

    objective = make_row_objective(config)
    for source in (*config.data.train, *config.data.validation):
        opened = objective.open(source.path)
        mute = [row for row in opened.rows if not objective.teaches(row)]
        if mute:
            stops = config.finetune.on_error == "stop"
            other = ", or leave such rows out with finetune.on_error=skip" if stops else ""
            problem = Problem(
                key="data.seq_length",
                found=config.data.seq_length,
                expected=f"more: of {len(mute)} of the {len(opened)} samples of {source.path} (the first is "
                f"{mute[0].place}) it holds nothing of an answer",
                fix=f"use at least {max(map(objective.length, mute))}{other}",
            )
            raise ConfigError([problem])


def row_remarks(config: Config, objective: Objective) -> Iterator[str]:
    """Yield remarks on the rows, file by file: their format, what is not read, and which are skipped or cut."""
    if not isinstance(objective, RowObjective):
        return
    if isinstance(objective, PackingObjective) and config.data.train:
        yield _padding(config, objective)
    batch, samples = config.train.global_batch, _num_samples(config) if config.data.train else 0
    if 0 < samples < batch:
        yield (
            f"train.global_batch = {batch:,} is more than the {samples:,} samples of data.train: a step takes some of "
            f"them {-(-batch // samples)} times"
        )
    for source in (*config.data.train, *config.data.validation):
        opened = objective.open(source.path)
        yield from opened.remarks
        if cut := sum(map(objective.too_long, opened.rows)):
            yield (
                f"{source.path}: {cut:,} of {len(opened):,} rows are longer than data.seq_length = "
                f"{config.data.seq_length}, and cut"
            )


def _padding(config: Config, objective: RowObjective) -> str:
    """Say how much of the training samples is padding."""
    assert isinstance(objective, PackingObjective)
    opened = [objective.open(source.path) for source in config.data.train]
    seq, rows = config.data.seq_length, sum(map(len, opened))
    filled = sum(min(objective.length(row), seq) for source in opened for row in source.rows)
    alone = 1 - filled / (rows * seq)
    if config.finetune.packing:
        packs = sum(len(objective.packed(source)) for source in opened)
        packed = 1 - filled / (packs * seq)
        return f"{rows:,} rows are packed into {packs:,} samples: {packed:.1%} of them is padding, not {alone:.1%}"
    saves = "; finetune.packing=true puts several into a sample" if alone > 0.5 else ""
    return f"{rows:,} rows, each a sample: {alone:.1%} of them is padding{saves}"
