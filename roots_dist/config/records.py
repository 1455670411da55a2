"""The records that a config chooses, and what they say of its samples. Whoever asks for a fact of these asks here.

Config --family_of, objective_of--> FamilyRecord, ObjectiveRecord
       --target_seq, shortest_seq …--> lengths by the objective's own functions
"""

from __future__ import annotations

from roots_dist.config.families import FAMILIES, FamilyRecord
from roots_dist.config.lr_schedules import LR_SCHEDULES, LrSchedule, Rate, lr_schedule
from roots_dist.config.objectives import OBJECTIVES, ObjectiveRecord, SampleSettings, learned_by
from roots_dist.config.optimizers import OPTIMIZERS
from roots_dist.config.schema import Config
from roots_dist.config.span_lengths import SpanLengths
from roots_dist.errors import Problem
from roots_dist.schedule.schedules import Schedule


def family_of(config: Config) -> FamilyRecord:
    added = config.extension.families.get(config.model.family)
    return added.record if added else FAMILIES[config.model.family]


def objective_of(config: Config) -> ObjectiveRecord:
    added = config.extension.objectives.get(config.objective.name)
    return added.record if added else OBJECTIVES[config.objective.name]


def objectives_of_family(config: Config) -> tuple[str, ...]:
    """Names of the objectives that the config's family can learn."""
    family, added = config.model.family, config.extension
    own = added.families[family].objectives if family in added.families else ()
    named = (name for name, new in added.objectives.items() if family in new.record.families)
    return tuple(dict.fromkeys([*learned_by(family), *own, *named]))


def lr_schedule_of(config: Config) -> LrSchedule:
    return config.extension.lr_schedules.get(config.optim.lr_schedule) or LR_SCHEDULES[config.optim.lr_schedule]


def learning_rate_of(config: Config) -> Rate:
    """The learning rate of each step, counted from 0."""
    return lr_schedule(config.optim, config.train.steps, lr_schedule_of(config))


def read_by_optimizer(config: Config) -> frozenset[str]:
    """Keys of optim that the rule of a step reads beside the learning rate."""
    added = config.extension.optimizers.get(config.optim.optimizer)
    return added.reads if added else OPTIMIZERS[config.optim.optimizer]


def schedule_of(config: Config) -> str | Schedule:
    """The schedule of forward and backward passes, as the functions of schedule/ take it."""
    return config.extension.schedules.get(config.parallel.schedule) or config.parallel.schedule


def is_bare(config: Config) -> bool:
    """True if the model has no head yet: a stack that was imported alone, or a task before its rows were read."""
    return objective_of(config).has_labels and not config.finetune.labels


def no_head(config: Config) -> Problem:
    """The problem of a bare model that is asked for labels."""
    expected = "the names of the labels: this model has no head that gives any"
    fix = f"teach it some: roots finetune CONFIG finetune.init_from={config.track.folder}"
    return Problem(key="finetune.labels", found=[], expected=expected, fix=fix)


def settings_of(config: Config) -> SampleSettings:
    """Collect what lengths depend on."""
    return SampleSettings(
        seq=config.data.seq_length,
        texts=1 if config.finetune.pair_column is None else 2,
        enclosed=bool(family_of(config).encloses_with),
        mask_probability=config.objective.mask_probability,
        mean_span_length=config.objective.mean_span_length,
    )


def special_tokens_of(config: Config) -> tuple[str, ...]:
    """Special tokens that the tokenizer must have: the objective's, those around a labelled text, and the one between
    the two texts of a decoder."""
    record, family = objective_of(config), family_of(config)
    if not record.has_labels:
        return record.special_tokens
    parted = record.answer == "classify" and config.finetune.pair_column is not None and not family.encloses_with
    return record.special_tokens + family.encloses_with + (("end",) if parted else ())


def shortest_seq(config: Config) -> int:
    """The least data.seq_length."""
    return objective_of(config).shortest(settings_of(config))


def corpus_tokens(config: Config) -> int:
    """The fewest tokens of a corpus that give a sample."""
    return objective_of(config).corpus_tokens(settings_of(config))


def num_sentinels(config: Config) -> int:
    """Sentinels that the tokenizer must have."""
    return objective_of(config).sentinels(settings_of(config))


def target_seq(config: Config) -> int:
    """Positions of the decoder of two stacks."""
    length = objective_of(config).target_length
    return length(settings_of(config)) if length else config.data.target_seq_length or config.data.seq_length


def span_lengths_of(config: Config) -> SpanLengths:
    return settings_of(config).spans()
