"""Keys that a config has no use for are refused, not ignored: one table of which key is used when.

    Config --USES--> problems: "only used with model.positions=rotary. Fix: remove it"

Checked on what a user wrote, with all other rules (checks.py). A key at its default says nothing, whatever the config.
What depends on where a config runs, or is switched off for one run, is not refused, so that one file serves any number
of processes and any machine: parallel.zero_stage on one data rank, track.artifacts with track.wandb=disabled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from roots_dist.config.families import FAMILIES, FamilyRecord
from roots_dist.config.init_from import OF_VOCAB_HEAD
from roots_dist.config.lr_schedules import LR_SCHEDULES
from roots_dist.config.objectives import OBJECTIVES, ObjectiveRecord, named
from roots_dist.config.optimizers import READ
from roots_dist.config.records import family_of, lr_schedule_of, objective_of, read_by_optimizer
from roots_dist.config.schema import Config
from roots_dist.config.section import Section
from roots_dist.errors import Problem

DEFAULTS = Config()
OF_DECODERS = tuple(
    f"model.{key}"
    for key in (
        "experts",
        "layer_kinds",
        "window",
        "qk_norm",
        "kv_lora_rank",
        "attention_scale",
        "attention_softcap",
        "norm_affine",
        "branches",
        "head_bias",
        "embedding_multiplier",
        "residual_multiplier",
        "logits_scaling",
        "logit_softcap",
    )
)
"""Features that only models of one causal stack have."""
OF_LATENTS = tuple(f"model.{key}" for key in ("q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"))
"""Keys that say how latent attention is made."""
OF_EXPERTS = (
    *(
        f"model.{key}"
        for key in (
            "experts_per_token",
            "expert_ffn",
            "shared_expert_ffn",
            "shared_expert_gate",
            "router_score",
            "normalize_expert_weights",
            "routed_scaling_factor",
            "expert_groups",
            "router_bias",
            "dense_layers",
            "expert_every",
        )
    ),
    "objective.balance_loss",
    "objective.router_z_loss",
    "parallel.ep",
)
"""Keys that say how experts are used."""


@dataclass(frozen=True, kw_only=True)
class Use:
    """Keys that are read by the same configs. Whether model.* and generator.* are read depends on those sections alone:
    fine-tuning takes them from the model that it starts from."""

    keys: tuple[str, ...]
    when: str
    used: Callable[[Config], bool]


def _with(key: str, *values: str) -> Callable[[Config], bool]:
    return lambda config: config.value(key) in values


def _one_of(key: str, *values: str, keys: tuple[str, ...]) -> Use:
    """Keys that are used when another key has one of these values."""
    return Use(keys=keys, when=f"{key}={_listed(values)}", used=_with(key, *values))


def _listed(values: tuple[str, ...]) -> str:
    """`mlm`, `mlm or rtd`, `mlm, rtd or spans`"""
    *others, last = values
    return f"{', '.join(others)} or {last}" if others else last


def _of_objectives(fits: Callable[[ObjectiveRecord], bool], *keys: str) -> Use:
    """Keys that are used by the objectives that fit."""
    when = f"objective.name={_listed(tuple(name for name, record in OBJECTIVES.items() if fits(record)))}"
    return Use(keys=keys, when=when, used=lambda config: fits(objective_of(config)))


def _of_families(fits: Callable[[FamilyRecord], bool], *keys: str) -> Use:
    """Keys that are used by the families that fit."""
    return Use(keys=keys, when=f"model.family={_families(fits)}", used=lambda config: fits(family_of(config)))


def _families(fits: Callable[[FamilyRecord], bool]) -> str:
    return _listed(tuple(name for name, record in FAMILIES.items() if fits(record)))


def _read_by_lr_schedule(key: str) -> Callable[[Config], bool]:
    return lambda config: key in lr_schedule_of(config).reads


def _read_by_optimizer(key: str) -> Callable[[Config], bool]:
    return lambda config: key in read_by_optimizer(config)


def _writes(config: Config) -> bool:
    writes = not family_of(config).is_encoder and not objective_of(config).has_labels
    return writes and bool(config.data.validation and config.data.tokenizer)


USES: tuple[Use, ...] = (
    _of_families(lambda f: f.has_two_stacks, "model.decoder_layers"),
    _of_families(lambda f: f.is_encoder, "model.segments"),
    _of_families(lambda f: f.pooling == "pooler", "model.pooler_activation"),
    Use(
        keys=("model.embedding_size",),
        when=f"model.family={_families(lambda f: f.is_encoder)}",
        used=lambda c: family_of(c).is_encoder or c.model.embedding_size == c.model.hidden,
    ),
    _one_of("model.positions", "learned", keys=("advanced.sinusoidal_init",)),
    _one_of("train.precision", "bf16", keys=("advanced.grad_dtype",)),
    Use(keys=("checkpoint.run_id",), when="checkpoint.url", used=lambda c: c.checkpoint.url is not None),
    Use(
        keys=("parallel.zero_ranks",),
        when="parallel.zero_stage above 0",
        used=lambda c: c.parallel.zero_stage > 0,
    ),
    Use(keys=("parallel.cp_kind",), when="parallel.cp above 1", used=lambda c: c.parallel.cp > 1),
    _one_of("model.positions", "learned", "rotary", keys=("model.max_positions",)),
    _one_of(
        "model.positions",
        "rotary",
        keys=("model.rope_theta", "model.rope_scaling", "model.rotary_fraction", "model.rotary_interleaved"),
    ),
    Use(
        keys=("model.window_rope_theta",),
        when="model.positions=rotary and model.window",
        used=lambda c: c.model.positions == "rotary" and c.model.window is not None,
    ),
    _of_families(lambda f: f.is_decoder, *OF_DECODERS),
    Use(keys=OF_LATENTS, when="model.kv_lora_rank", used=lambda c: c.model.kv_lora_rank is not None),
    Use(
        keys=("model.kv_heads", "model.head_dim", "model.qk_norm", "model.rotary_fraction"),
        when="keys and values that are not made from a latent, without model.kv_lora_rank",
        used=lambda c: c.model.kv_lora_rank is None,
    ),
    Use(
        keys=("model.groups_per_token", "model.group_score_experts"),
        when="model.expert_groups above 1",
        used=lambda c: c.model.expert_groups > 1,
    ),
    Use(keys=("optim.router_bias_rate",), when="model.router_bias", used=lambda c: c.model.router_bias),
    Use(keys=OF_EXPERTS, when="model.experts", used=lambda c: c.model.experts is not None),
    Use(
        keys=("model.zero_centered_norm",),
        when=f"model.family={_families(lambda f: f.is_decoder)} and model.norm=rmsnorm with weights",
        used=lambda c: family_of(c).is_decoder and c.model.norm == "rmsnorm" and c.model.norm_affine,
    ),
    Use(
        keys=OF_VOCAB_HEAD,
        when=f"a decoder that predicts tokens, not objective.name={named(lambda o: o.has_labels)}",
        used=lambda c: not objective_of(c).has_labels or not family_of(c).is_decoder,  # of other families: told above
    ),
    _one_of("model.positions", "relative", keys=("model.relative_buckets", "model.relative_max_distance")),
    _of_families(lambda f: f.has_generator, "generator.layers", "generator.hidden", "generator.heads", "generator.ffn"),
    _of_objectives(lambda o: o.every_token, "objective.reset_at_documents"),
    _of_objectives(lambda o: o.masks or o.masks_spans, "objective.mask_probability"),
    _of_objectives(
        lambda o: o.masks,
        "objective.mask_replace_probability",
        "objective.random_replace_probability",
        "objective.whole_word_mask",
    ),
    _of_objectives(lambda o: o.masks_spans, "objective.mean_span_length"),
    _of_objectives(lambda o: o.has_generator, "objective.discriminator_weight"),
    _of_objectives(lambda o: o.has_references, "objective.dpo_beta"),
    Use(
        keys=("objective.z_loss",),
        when=f"the cross-entropy of tokens, not objective.name={named(lambda o: o.has_labels or o.has_references)}",
        used=lambda c: not objective_of(c).has_labels and not objective_of(c).has_references,
    ),
    Use(
        keys=("advanced.loss_chunk",),
        when=f"an objective that predicts tokens, not objective.name={named(lambda o: o.has_labels)}",
        used=lambda c: not objective_of(c).has_labels,
    ),
    _of_objectives(lambda o: o.reads_target_seq, "data.target_seq_length"),
    _of_objectives(lambda o: o.rows is not None, "finetune.on_error"),
    _of_objectives(
        lambda o: o.rows is not None and not o.has_references, "finetune.text_column", "finetune.label_column"
    ),
    _of_objectives(lambda o: o.answer == "classify", "finetune.pair_column"),
    _of_objectives(lambda o: o.has_labels, "finetune.labels"),
    _of_objectives(lambda o: o.rows == "conversations", "finetune.packing", "finetune.format"),
    _of_objectives(lambda o: o.chats, "finetune.chat_template", "finetune.chat_date", "finetune.turns"),
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
    Use(keys=("train.recheck_every",), when="train.exact", used=lambda c: c.train.exact is not None),
    Use(
        keys=("train.on_spike",),
        when="train.spike_threshold or train.norm_spike_threshold",
        used=lambda c: bool(c.train.spike_threshold or c.train.norm_spike_threshold),
    ),
    Use(
        keys=("train.sample_every",),
        when="data.validation, data.tokenizer and a model that writes text, "
        f"model.family={_families(lambda f: not f.is_encoder)}",
        used=_writes,
    ),
    Use(
        keys=("advanced.reduce_bucket",),
        when="advanced.engine=deepspeed",
        used=lambda c: c.advanced.engine == "deepspeed",
    ),
    *(
        Use(
            keys=(f"optim.{key}",),
            when=f"optim.lr_schedule={_listed(tuple(name for name, s in LR_SCHEDULES.items() if key in s.reads))}",
            used=_read_by_lr_schedule(key),
        )
        for key in sorted(frozenset().union(*(s.reads for s in LR_SCHEDULES.values())))
    ),
    *(Use(keys=(f"optim.{key}",), when="optim.optimizer=adamw", used=_read_by_optimizer(key)) for key in sorted(READ)),
)


def check(config: Config) -> Iterator[Problem]:
    for use in USES:
        if use.used(config):
            continue
        for key in use.keys:
            found, default = config.value(key), DEFAULTS.value(key)
            if found != default:
                yield Problem(
                    key=key,
                    found=_shown(found),
                    expected=f"no value, because it is only used with {use.when}",
                    fix=f"remove it, or override it with {key}={_written(default)}",
                )


def _shown(value: object) -> object:
    """A value as a writer of YAML has written it."""
    if isinstance(value, Section):
        written = value.model_dump(mode="json", exclude_unset=True)
        return f"{{{', '.join(f'{key}: {json.dumps(inner)}' for key, inner in written.items())}}}".replace('"', "")
    return list(value) if isinstance(value, tuple) else value


def _written(value: object) -> str:
    """A value as it is written on the command line."""
    return json.dumps(value).strip('"')
