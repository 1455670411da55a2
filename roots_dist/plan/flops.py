"""Parameters and FLOPs of a config by arithmetic, and model FLOPs utilisation (MFU). No torch.

Matrix products only, 2 FLOPs per multiply-add, backward twice the forward. The literature mixes three conventions, so
whoever prints an MFU prints the convention beside it:

    causal     model FLOPs, attention counted for the causal half only (Megatron since 2024); what this package reports
    full       model FLOPs, attention counted as if every position saw every other (Korthikanti et al. 2022, PaLM)
    hardware   full, and what recomputation computes again (Narayanan et al. 2021, BLOOM's logs)
"""

from __future__ import annotations

from typing import Literal

from roots_dist.config.schema import Config

Convention = Literal["causal", "full", "hardware"]
CONVENTIONS: dict[Convention, str] = {
    "causal": "model FLOPs, attention counted causally half",
    "full": "model FLOPs, attention counted in full",
    "hardware": "hardware FLOPs, attention in full, recomputation counted",
}


def num_parameters(config: Config) -> int:
    """Of the whole model in any layout, vocabulary padded, a tied head counted once."""
    m = config.model
    width, vocab, ffn = m.hidden, config.padded_vocab(), m.width_of_ffn()
    queries, keys = m.heads * m.width_of_head(), m.num_kv_heads() * m.width_of_head()
    ups = 2 if m.gated() else 1
    norm = width * (2 if m.norm == "layernorm" else 1)
    matrices = width * (queries + 2 * keys) + queries * width + (ups + 1) * width * ffn
    biases = (queries + 2 * keys + width + ups * ffn + width) if m.bias else 0
    embed = vocab * width + (norm if m.embedding_norm else 0)
    embed += config.data.seq * width if m.positions == "learned" else 0
    head = (norm if m.norm_position == "pre" else 0) + (0 if m.tied else vocab * width)
    return embed + m.layers * (matrices + biases + 2 * norm) + head


def flops_per_token(config: Config, convention: Convention = "causal") -> float:
    """Forward and backward of one token in a sequence of `data.seq`. Padded words are never multiplied."""
    m = config.model
    queries, keys = m.heads * m.width_of_head(), m.num_kv_heads() * m.width_of_head()
    projections = 2 * m.hidden * (queries + 2 * keys) + 2 * queries * m.hidden
    mlp = 2 * (3 if m.gated() else 2) * m.hidden * m.width_of_ffn()
    attention = 4 * config.data.seq * queries / (2 if convention == "causal" else 1)
    head = 2 * m.hidden * m.vocab
    again = 0.0
    if convention == "hardware":
        again = {"none": 0.0, "selective": attention, "full": projections + mlp + attention}[config.train.recompute]
    return m.layers * (3 * (projections + mlp + attention) + again) + 3 * head


def flops_per_step(config: Config, sequences: int | None = None, convention: Convention = "causal") -> float:
    """Of all ranks together, for a step of `sequences` sequences (default: the full batch)."""
    return (sequences or config.train.batch) * config.data.seq * flops_per_token(config, convention)


def mfu(flops: float, seconds: float, peak_flops: float, devices: int) -> float:
    """The share of the devices' peak that these FLOPs in this time are; a fraction, not per cent."""
    return flops / (seconds * peak_flops * devices)
