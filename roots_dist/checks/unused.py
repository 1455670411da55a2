"""Keys that a config has no use for are refused, not ignored: one table of which key is used when.

    Config --USES--> problems: "only used with model.positions=rotary. Fix: remove it"

Checked on what a user wrote, with all other rules (checks.py). A key at its default says nothing, whatever the config.
What a switch turns off may stay beside it: track.tags with track.wandb=disabled, parallel.zero_stage on one data rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from roots_dist.config.lr_schedules import LR_SCHEDULES
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import TASKS
from roots_dist.errors import Problem

MASKING = ("mlm", "mlm-nsp", "rtd")
DEFAULTS = Config()


@dataclass(frozen=True, kw_only=True)
class Use:
    """Keys that are read by the same configs. Whether model.* and generator.* are read depends on those sections alone:
    fine-tuning takes them from the model that it starts from."""

    keys: tuple[str, ...]
    when: str
    used: Callable[[Config], bool]


def _with(key: str, *values: str) -> Callable[[Config], bool]:
    return lambda config: value_of(config, key) in values


def _one_of(key: str, *values: str, keys: tuple[str, ...]) -> Use:
    """Keys that are used when another key has one of these values."""
    return Use(keys=keys, when=f"{key}={_listed(values)}", used=_with(key, *values))


def _listed(values: tuple[str, ...]) -> str:
    """`mlm`, `mlm or rtd`, `mlm, rtd or spans`"""
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def _read_by_lr_schedule(key: str) -> Callable[[Config], bool]:
    return lambda config: key in LR_SCHEDULES[config.optim.lr_schedule].reads


def _writes(config: Config) -> bool:
    labels = config.objective.name in ("classify", "tag")
    return (
        config.model.family in ("gpt", "t5") and not labels and bool(config.data.validation and config.data.tokenizer)
    )


USES: tuple[Use, ...] = (
    _one_of("model.family", "t5", keys=("model.decoder_layers",)),
    _one_of("model.family", "bert", "electra", keys=("model.segments",)),
    Use(
        keys=("model.embedding_size",),
        when="model.family=bert or electra",
        used=lambda c: c.model.family in ("bert", "electra") or c.model.embedding_size == c.model.hidden,
    ),
    _one_of("model.positions", "learned", keys=("model.max_positions", "advanced.sinusoidal_init")),
    _one_of("model.positions", "rotary", keys=("model.rope_theta",)),
    _one_of("model.positions", "relative", keys=("model.relative_buckets", "model.relative_max_distance")),
    _one_of(
        "model.family", "electra", keys=("generator.layers", "generator.hidden", "generator.heads", "generator.ffn")
    ),
    _one_of("objective.name", "clm", keys=("objective.reset_at_documents",)),
    _one_of("objective.name", *MASKING, "spans", keys=("objective.mask_probability",)),
    _one_of(
        "objective.name",
        *MASKING,
        keys=(
            "objective.mask_replace_probability",
            "objective.random_replace_probability",
            "objective.whole_word_mask",
        ),
    ),
    _one_of("objective.name", "spans", keys=("objective.mean_span_length",)),
    _one_of("objective.name", "rtd", keys=("objective.discriminator_weight",)),
    Use(
        keys=("objective.z_loss", "advanced.loss_chunk"),
        when="an objective that predicts tokens, not objective.name=classify or tag",
        used=lambda c: c.objective.name not in ("classify", "tag"),
    ),
    _one_of("objective.name", "prefix", "seq2seq", keys=("data.target_seq_length",)),
    _one_of("objective.name", *TASKS, keys=("finetune.text_column", "finetune.label_column")),
    _one_of("objective.name", "classify", keys=("finetune.pair_column",)),
    _one_of("objective.name", "classify", "tag", keys=("finetune.labels",)),
    _one_of("objective.name", "instruct", keys=("finetune.chat_template",)),
    _one_of("finetune.strategy", "partial", keys=("finetune.trainable",)),
    _one_of("finetune.strategy", "progressive", keys=("finetune.unfreeze_every_epochs", "finetune.unfreeze_blocks")),
    Use(  # passes over the rows have been made into steps by now: those passes are what was written
        keys=("finetune.unfreeze_every",),
        when="finetune.strategy=progressive",
        used=lambda c: c.finetune.strategy == "progressive" or c.finetune.unfreeze_every_epochs is not None,
    ),
    _one_of("finetune.strategy", "lora", keys=("finetune.lora_rank", "finetune.lora_alpha", "finetune.lora_targets")),
    Use(
        keys=("finetune.metric",),
        when="data.validation, and finetune.init_from or finetune.patience",
        used=lambda c: bool(c.data.validation and (c.finetune.init_from or c.finetune.patience)),
    ),
    Use(
        keys=("train.eval_every", "train.eval_sequences"),
        when="data.validation",
        used=lambda c: bool(c.data.validation),
    ),
    Use(
        keys=("train.sample_every",),
        when="data.validation, data.tokenizer and a model that writes text, model.family=gpt or t5",
        used=_writes,
    ),
    *(
        Use(
            keys=(f"optim.{key}",),
            when=f"optim.lr_schedule={_listed(tuple(name for name, s in LR_SCHEDULES.items() if key in s.reads))}",
            used=_read_by_lr_schedule(key),
        )
        for key in sorted(frozenset().union(*(s.reads for s in LR_SCHEDULES.values())))
    ),
)


def check(config: Config) -> Iterator[Problem]:
    for use in USES:
        if use.used(config):
            continue
        for key in use.keys:
            found = value_of(config, key)
            if found != value_of(DEFAULTS, key):
                shown = list(found) if isinstance(found, tuple) else found
                yield Problem(
                    key=key, found=shown, expected=f"no value, because it is only used with {use.when}", fix="remove it"
                )


def value_of(config: Config, key: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)
