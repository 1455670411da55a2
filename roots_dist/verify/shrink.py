"""Shrink a config so that a laptop can verify it: the same family and features, the same degrees up to 8 ranks.

What makes layouts differ is kept (uneven layers, grouped heads, tied embeddings, dropout, vocabulary padding, schedule,
recomputation, clipping); what only costs time is cut (width, depth, vocabulary, sequence). Pure arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from roots_dist.config.records import family_of, objective_of, target_seq
from roots_dist.config.schema import Config
from roots_dist.verify.trainable import with_same_trainable

MAX_RANKS = 8
LABELS = ("a", "b", "c")
"""Labels of a task that reads its own from the rows."""


@dataclass(frozen=True)
class SmallConfig:
    config: Config
    dp: int
    notes: tuple[str, ...]
    """Changes of the layout, in words."""

    @property
    def ranks(self) -> int:
        return self.config.parallel.tp * self.config.parallel.pp * self.dp


def degrees(tp: int, pp: int, dp: int) -> tuple[int, int, int]:
    """Nearest degrees with at most MAX_RANKS ranks: the largest one is halved first, data ranks before others."""
    while tp * pp * dp > MAX_RANKS:
        if dp > 2:
            dp = (dp + 1) // 2
        elif pp >= tp and pp > 2:
            pp = (pp + 1) // 2
        else:
            tp = (tp + 1) // 2
        tp = 1 << (tp.bit_length() - 1)  # heads are split by powers of two
    return tp, pp, dp


def shrink(config: Config, dp: int, *, float64: bool) -> SmallConfig:
    """Shrink the config. `dp` is the wanted number of data ranks; `float64` uses the reference engine, else DeepSpeed
    in float32."""
    m, p = config.model, config.parallel
    tp, pp, dp = degrees(p.tp, p.pp, dp)
    notes = []
    if (tp, pp) != (p.tp, p.pp):
        notes.append(f"layout TP{p.tp}×PP{p.pp} is verified as TP{tp}×PP{pp}: at most {MAX_RANKS} processes here")
    stages = pp * p.virtual_stages
    layers = 2 * stages if m.layers % (p.pp * p.virtual_stages) == 0 else 2 * stages - 1
    group = m.heads // m.num_kv_heads()
    kv_heads = max(1, min(m.num_kv_heads(), 2 * tp // group))
    heads = math.lcm(kv_heads * group, tp)
    kv_heads = heads // group
    head_dim = 8
    vocab = min(m.vocab, 211)  # a prime: no tensor degree divides it
    seq = 8 * tp
    values: dict[str, object] = {
        "model.layers": max(2, layers),
        "model.hidden": heads * head_dim,
        "model.heads": heads,
        "model.kv_heads": kv_heads,
        "model.head_dim": None if m.head_dim is None else head_dim,
        "model.ffn": max(1, round(m.width_of_ffn() / m.hidden * 4)) * heads * head_dim // 4 // tp * tp,
        "model.vocab": vocab,
        "model.init_std": 0.1,  # at a small width, small weights would hide what a branch contributes
        "model.max_positions": None,
        "model.embedding_size": None if m.width_of_embedding() == m.hidden else 4 * heads,
        "data.train": (),
        "data.validation": (),
        "data.seq_length": seq,
        "finetune.init_from": None,
        "finetune.labels": config.finetune.labels[:5] or LABELS,
        "parallel.tp": tp,
        "parallel.pp": pp,
        "parallel.sequence_parallel": p.sequence_parallel and tp > 1,
        "train.global_batch": 2 * pp * dp,
        "train.micro_batch": 1,
        "train.batch_ramp": None,
        "train.device": "cpu",
        "train.precision": "fp32",
        "train.steps": 100,
        "optim.lr": 1e-3,
        "optim.warmup_steps": 2,
        "optim.decay_steps": None,
        "optim.clip_grad": min(config.optim.clip_grad, 0.1),  # low, so that clipping acts in every step
        "advanced.float64": float64,
        "advanced.engine": "reference" if float64 else "deepspeed",
        "advanced.vocab_multiple": math.lcm(8, tp),
        "advanced.loss_chunk": 16,
        "advanced.reduce_bucket": 10_000,
    }
    if float64:
        values["parallel.zero_stage"] = min(p.zero_stage, 1)
    elif (
        m.activation == "relu"
    ):  # rounding puts a few of millions of numbers on the other side of 0, where the slope jumps
        values["model.activation"] = "gelu"
    if objective_of(config).has_generator:
        values |= {
            "generator.layers": stages,
            "generator.hidden": tp * head_dim,
            "generator.heads": tp,
            "generator.ffn": 4 * tp * head_dim,
        }
    if family_of(config).has_two_stacks:
        values |= _encoder_decoder(config, stages, tp)
    return SmallConfig(with_same_trainable(config, config.changed(values)), dp, tuple(notes))


def _encoder_decoder(config: Config, stages: int, tp: int) -> dict[str, object]:
    """Model keys of an encoder-decoder: blocks for every stage, as many in both stacks if the model has, and a text of
    several spans whose targets can be split."""
    m = config.model
    uneven = m.num_decoder_layers() != m.layers
    lengths = [
        config.changed({"data.seq_length": seq, "data.target_seq_length": None}) for seq in range(32 * tp, 96 * tp, tp)
    ]
    fits = [c.data.seq_length for c in lengths if target_seq(c) % tp == 0]
    return {
        "model.layers": max(2, stages),
        "model.decoder_layers": max(1, stages - 1) if uneven else None,
        "data.seq_length": fits[0]
        if fits
        else 32 * tp,  # with spans of one token none fits: the targets are not split then
        "data.target_seq_length": None if config.data.target_seq_length is None else 8 * tp,
    }
