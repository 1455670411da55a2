"""Shrink a config so that a laptop can verify it: the same features, the same degrees up to MAX_RANKS processes.

    Config --sizes--> small Config --ties.py: the same parameters on the same stages--> SmallConfig

Width, depth, vocabulary and text are cut. What makes layouts differ stays: uneven layers, the ratios of heads, ties
between stages, several sequences in a microbatch, dropout, padding of the vocabulary, schedule, batch ramp,
recomputation, clipping, the phases of fine-tuning. Every key that changes is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from roots_dist.accounting.sizes import generator_of
from roots_dist.config.init_from import config_of
from roots_dist.config.model import ModelConfig
from roots_dist.config.records import family_of, objective_of, target_seq
from roots_dist.config.rope_scaling import LongRope, RopeScaling
from roots_dist.config.schema import Config
from roots_dist.config.sections import Source
from roots_dist.errors import present
from roots_dist.verify.degrees import degrees, ranks_of_experts, ranks_of_shards
from roots_dist.verify.ties import VOCABS, with_same_ties
from roots_dist.verify.trainable import with_same_trainable

LABELS = ("a", "b", "c")
"""Labels of a task that reads its own from the rows."""
HEAD_DIM = 8
LATENTS = dict.fromkeys((f"model.{key}_head_dim" for key in ("qk_nope", "qk_rope", "v")), HEAD_DIM)
"""Widths of heads of latent attention."""
MADE_UP = (Source(path="random"),)
"""A source for a run that names none."""
SILENT = ("data.train", "data.validation", "data.tokenizer", "track.", "checkpoint.", "train.log_every")
"""Keys whose change is not worth telling: random text takes the place of files, and a folder that of another."""


@dataclass(frozen=True)
class SmallConfig:
    config: Config
    dp: int
    notes: tuple[str, ...]
    """Differences from the run, in words."""
    source: Config | None = None
    """The small model that the run starts from, if it starts from one."""

    @property
    def ranks(self) -> int:
        return self.config.parallel.ranks_per_sample() * self.dp


Dtype = Literal["float64", "float32", "bf16"]


def shrink(config: Config, dp: int, dtype: Dtype, *, steps: int = 4, device: str = "cpu") -> SmallConfig:
    """Shrink the config to a run of `steps` steps on `dp` data ranks, or on the nearest number that fits. float64 uses
    the reference engine, the others the one that the run has."""
    p = config.parallel
    tp, pp, dp, cp = degrees(p.tp, p.pp, dp if p.ep == 1 else max(dp, 2), p.cp)
    dp, ep = (dp, 1) if p.ep == 1 else ranks_of_experts(p.ep, tp, pp, dp, cp)
    dp, zero_ranks = (dp, None) if p.zero_ranks is None else ranks_of_shards(tp, pp, dp, cp)
    cut = {
        "parallel.tp": tp,
        "parallel.pp": pp,
        "parallel.cp": cp,
        "parallel.ep": ep,
        "parallel.zero_ranks": zero_ranks,
        "parallel.sequence_parallel": p.sequence_parallel and tp > 1,
    }
    unit = config.changed(cut).parallel.position_unit()
    small = config.changed(
        {
            **cut,
            **_model(config, tp, pp, cp, ep),
            **_data(config, max(tp, cp), unit),
            **_training(config, pp, dp, steps),
            **_dtype(config, dp * cp, dtype),
            "train.device": device,
        }
    )
    if objective_of(config).has_generator:
        small = small.changed(_generator(config, small))
    if family_of(config).has_two_stacks:
        small = small.changed(_encoder_decoder(config, small))
    small, same_ties = with_same_ties(config, small)
    small = with_same_trainable(config, small)
    notes = (
        [] if same_ties else ["ties between stages are not those of the run: no small model that was tried has them"]
    )
    start = config.finetune.init_from
    source = None if start is None else _source(config_of(start, config.advanced.extensions), small)
    return SmallConfig(small, dp, (*notes, changes(config, small)), source)


def _source(config: Config, small: Config) -> Config:
    """The small model that the small run starts from, trained for two steps in one process as `config` says."""
    tree = small.model_dump() | {"objective": config.objective.model_dump(), "finetune": {}}
    values: dict[str, object] = {
        "data.seq_length": max(32, small.data.seq_length)
        if family_of(config).has_two_stacks
        else small.data.seq_length,
        "data.target_seq_length": None,
        "train.steps": 2,
        "optim.warmup_steps": 0,
        "optim.decay_steps": None,
        "checkpoint.every": 0,
        "checkpoint.url": None,
        "checkpoint.fallback_folder": None,
    }
    if objective_of(config).has_labels:
        values["finetune.labels"] = config.finetune.labels[:5] or LABELS
    source = Config.from_tree(tree).changed(values)
    return source.changed(_generator(config, source)) if objective_of(config).has_generator else source


def changes(config: Config, small: Config) -> str:
    """Every key in which the small config differs: `model.layers 24 → 4, …`. Widths that follow from others are left
    out."""
    before, after = config.model_dump(), small.model_dump()
    derived = {"kv_heads": config.model.num_kv_heads(), "head_dim": config.model.width_of_head()}
    before["model"] |= {key: value for key, value in derived.items() if after["model"][key] is not None}
    if after["model"]["ffn"] is not None:
        before["model"]["ffn"] = config.model.width_of_ffn()
    if after["model"]["expert_ffn"] is not None:
        before["model"]["expert_ffn"] = config.model.width_of_expert()
    found = [
        f"{section}.{key} {_short(before[section][key])} → {_short(value)}"
        for section, keys in after.items()
        for key, value in keys.items()
        if value != before[section][key] and not f"{section}.{key}".startswith(SILENT)
    ]
    return "made small: " + ", ".join(found)


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _model(config: Config, tp: int, pp: int, cp: int, ep: int) -> dict[str, object]:
    """Keys of one stack: two blocks for each stage, or one less where the run's blocks are not even either."""
    m, p = config.model, config.parallel
    stages = pp * p.virtual_stages
    layers = 2 * stages if m.layers % (p.pp * p.virtual_stages) == 0 else 2 * stages - 1
    exchanged = p.head_unit() > 1  # each context rank then has heads of its own, as tensor ranks do
    cut_by, small_cut_by = (p.tp * p.cp, tp * cp) if exchanged else (p.tp, tp)
    heads, kv_heads = _heads(m.heads, m.num_kv_heads(), cut_by, small_cut_by)
    width = heads * HEAD_DIM
    kinds = tuple(dict.fromkeys(m.kinds()))  # one block of each kind at least
    hidden = width
    if m.heads * m.width_of_head() != m.hidden:  # heads that are wider or narrower than the residual stream
        hidden = max(HEAD_DIM, round(width * m.hidden / (m.heads * m.width_of_head()) / HEAD_DIM) * HEAD_DIM)
        hidden += HEAD_DIM * (hidden == width)

    def narrow(width: int) -> int:
        return max(1, round(width / m.hidden * hidden / tp)) * tp

    return {
        "model.layers": max(2, len(kinds), layers),
        "model.layer_kinds": m.layer_kinds if len(m.layer_kinds) <= layers else kinds,
        "model.window": None if m.window is None else min(m.window, 5),
        "model.rotary_fraction": 0.5 if m.rotary_fraction < 1 else 1.0,
        "model.rope_scaling": _rope_scaling(config),
        "model.hidden": hidden,
        "model.heads": heads,
        "model.kv_heads": None if m.kv_heads is None else kv_heads,
        "model.head_dim": None if m.head_dim is None else HEAD_DIM,
        **({} if m.kv_lora_rank is None else LATENTS | {"model.kv_lora_rank": 2 * HEAD_DIM}),
        "model.q_lora_rank": m.q_lora_rank and 3 * HEAD_DIM,
        "model.ffn": narrow(m.width_of_ffn()),
        **(_experts(m, ep, narrow) if m.experts else {}),
        "model.vocab": min(m.vocab, VOCABS[0]),
        "model.init_std": None if family_of(config).init == "fan-in" and m.init_std is None else 0.1,
        "model.embedding_size": None if m.width_of_embedding() == m.hidden else 4 * heads,
    }


def _experts(m: ModelConfig, ep: int, narrow: Callable[[int], int]) -> dict[str, object]:
    """A few experts, of which a token still uses some and leaves some; blocks of both kinds, if the run has both. On
    `ep` ranks as many on each, several if the run has."""
    experts = min(present(m.experts), 5) if ep == 1 else ep * min(3 if ep == 2 else 2, present(m.experts) // ep)
    groups = 2 if m.expert_groups > 1 else 1
    experts = max(groups, experts - experts % groups)
    return {
        "model.experts": experts,
        "model.experts_per_token": min(m.experts_per_token, 2 if m.experts_per_token < present(m.experts) else experts),
        "model.expert_ffn": narrow(m.width_of_expert()),
        "model.shared_expert_ffn": m.shared_expert_ffn and narrow(m.shared_expert_ffn),
        "model.expert_groups": groups,
        "model.groups_per_token": groups if m.groups_per_token == m.expert_groups else 1,
        "model.dense_layers": min(m.dense_layers, 1),
        "model.expert_every": min(m.expert_every, 2),
    }


def _rope_scaling(config: Config) -> RopeScaling | None:
    """The same rule, with factors for as many pairs of channels as the small heads have."""
    m = config.model
    scaling, pairs = m.rope_scaling, HEAD_DIM // (2 if m.rotary_fraction == 1 else 4)
    if not isinstance(scaling, LongRope):
        return scaling
    lists = {key: (getattr(scaling, key) * pairs)[:pairs] for key in ("short_factor", "long_factor")}
    if config.data.seq_length > scaling.original_length:  # the list for long texts, of the small ones too
        lists["original_length"] = 8
    return scaling.model_copy(update=lists)


def _heads(heads: int, kv_heads: int, tp: int, small_tp: int) -> tuple[int, int]:
    """Query and key/value heads with the run's group, and with as many tensor ranks per key/value head as in the run,
    or up to two heads per rank."""
    group = heads // kv_heads
    per_rank = min(2.0, kv_heads / tp) if kv_heads % tp == 0 else kv_heads / tp
    small = max(1, int(small_tp * per_rank))
    if small * group % small_tp:
        small = math.lcm(small * group, small_tp) // group
    return small * group, small


def _data(config: Config, most: int, unit: int) -> dict[str, object]:
    """Texts of a few tokens for each of the `most` ranks that cut them, from as many sources with the same weights; one
    is made up where the run has none. unit: what the number of tokens is a multiple of."""
    m, d = config.model, config.data
    seq = -(-max(16, 8 * most) // unit) * unit
    spare = m.max_positions is not None and m.max_positions > d.seq_length
    return {
        "model.max_positions": 2 * seq if spare else None,
        "data.train": tuple(Source(path=f"train-{i}", weight=s.weight) for i, s in enumerate(d.train or MADE_UP)),
        "data.validation": tuple(
            Source(path=f"held-out-{i}", weight=s.weight) for i, s in enumerate(d.validation or MADE_UP)
        ),
        "data.tokenizer": None,
        "data.seq_length": seq,
        "finetune.init_from": None,
        "finetune.epochs": None,
        "finetune.labels": (config.finetune.labels[:5] or LABELS) if objective_of(config).has_labels else (),
        "finetune.patience": 0,
    }


def _training(config: Config, pp: int, dp: int, steps: int) -> dict[str, object]:
    """A few steps of at least two microbatches for each stage with two sequences or more in each; clipping acts."""
    t, o = config.train, config.optim
    micro = 3 if t.micro_batch == 3 else 2
    unit = pp * micro * dp
    warmup = min(o.warmup_steps, 2)
    return {
        "train.global_batch": 2 * unit,
        "train.micro_batch": micro,
        "train.batch_ramp": None if t.batch_ramp is None else (unit, unit, unit),
        "train.steps": steps,
        "train.exact": None,
        "train.log_every": 1,
        "train.eval_every": max(1, steps // 2),
        "train.eval_sequences": 2 * micro * dp + 1,  # so that the last microbatches are filled up
        "train.sample_every": 0,
        "optim.lr": 1e-3,
        "optim.min_lr": 1e-3 * o.min_lr / o.lr,
        "optim.warmup_steps": warmup,
        "optim.decay_steps": None if o.decay_steps is None else max(1, min(o.decay_steps, steps - warmup)),
        "optim.clip_grad": min(o.clip_grad, 0.1),
        "checkpoint.every": max(1, steps // 2),
        "checkpoint.keep": 9,
        "checkpoint.resume": True,
        "checkpoint.url": None,
        "checkpoint.fallback_folder": None,
        "track.wandb": "disabled",
        "track.tensorboard": "off",
        "advanced.vocab_multiple": math.lcm(8, config.parallel.tp),
        "advanced.loss_chunk": 16,
        "advanced.reduce_bucket": 10_000,
        "advanced.threads": None,
    }


def _dtype(config: Config, dp: int, dtype: Dtype) -> dict[str, object]:
    """dp: ranks over which the engine shards."""
    values: dict[str, object] = {
        "train.precision": "bf16" if dtype == "bf16" else "fp32",
        "advanced.float64": dtype == "float64",
    }
    if dtype == "float64":
        return values | {"advanced.engine": "reference"}
    if config.model.activation == "relu":  # a few of millions of numbers fall on the other side of 0 by rounding
        values["model.activation"] = "gelu"
    if dtype == "bf16":  # else Adam turns the rounding of a tiny gradient into a whole step, now and then
        values["optim.eps"] = 1e-3
    return values | {"advanced.engine": config.advanced.engine}


def _generator(config: Config, small: Config) -> dict[str, object]:
    """Keys of ELECTRA's generator: as narrow against its discriminator as the run's, as far as tp divides it."""
    tp, m, g = small.parallel.tp, config.model, generator_of(config).model
    unit = math.lcm(tp, small.parallel.head_unit())
    heads = unit * max(1, round(small.model.heads * g.heads / m.heads / unit))
    return {
        "generator.layers": max(1, round(small.model.layers * g.layers / m.layers)),
        "generator.hidden": heads * HEAD_DIM,
        "generator.heads": heads,
        "generator.ffn": max(1, round(g.width_of_ffn() / g.hidden * heads * HEAD_DIM / tp)) * tp,
    }


def _encoder_decoder(config: Config, small: Config) -> dict[str, object]:
    """Keys of an encoder-decoder: blocks for every stage, as many in both stacks if the model has, and a text of
    several spans whose targets can be split."""
    m, unit = config.model, math.lcm(small.parallel.tp, small.parallel.position_unit())
    stages = small.num_stages()
    uneven = m.num_decoder_layers() != m.layers
    lengths = [
        config.changed({"data.seq_length": seq, "data.target_seq_length": None})
        for seq in range(32 * unit, 96 * unit, unit)
    ]
    fits = [c.data.seq_length for c in lengths if target_seq(c) % unit == 0]
    return {
        "model.layers": max(2, stages),
        "model.decoder_layers": max(1, stages - 1) if uneven else None,
        "data.seq_length": fits[0]
        if fits
        else 32 * unit,  # with spans of one token none fits: the targets are not split then
        "data.target_seq_length": None if config.data.target_seq_length is None else 8 * unit,
    }
