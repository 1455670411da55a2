"""Rules between the keys of model.*: heads, rotary positions, kinds of blocks. Pure arithmetic; called by checks.py."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from roots_dist.config.rope_scaling import Llama3, LongRope, Yarn
from roots_dist.config.schema import Config
from roots_dist.errors import Problem

MOST_NAMED = 24
"""Numbers that a fix names."""


def divisors(n: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def one_of(numbers: Sequence[int]) -> str:
    """The fix that names the numbers that fit; of many, the first."""
    if len(numbers) == 1:
        return f"use {numbers[0]}"
    more = f", … {numbers[-1]}" if len(numbers) > MOST_NAMED else ""
    return f"choose one of {', '.join(map(str, numbers[:MOST_NAMED]))}{more}"


def check(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.kv_lora_rank is not None:
        yield from _latents(config)
        if model.positions == "rotary":
            yield from _rope_scaling(config)
    elif model.head_dim is None and model.hidden % model.heads:
        near = -(-model.hidden // model.heads) * model.heads
        yield Problem(
            key="model.hidden",
            found=model.hidden,
            expected=f"a multiple of model.heads = {model.heads}",
            fix=f"use {near}, or set model.head_dim",
        )
    elif model.positions == "rotary" and model.rotary_fraction == 1 and model.width_of_head() % 2:
        yield Problem(
            key="model.head_dim",
            found=model.width_of_head(),
            expected="an even width of a head, because rotary positions turn pairs",
            fix="set model.head_dim to an even number, or choose other model.positions",
        )
    elif model.positions == "rotary":
        yield from _rotary_fraction(config)
        yield from _rope_scaling(config)
    yield from _layer_kinds(config)
    if model.experts is not None:
        yield from _experts(model.experts, config)
    if model.has_parallel_branches() and model.norm_position != "pre":
        yield Problem(
            key="model.norm_position",
            found=model.norm_position,
            expected=f"pre with model.branches={model.branches}: the branches are summed before anything else is done",
            fix="set model.norm_position=pre, or model.branches=sequential",
        )
    if model.heads % model.num_kv_heads():
        yield Problem(
            key="model.kv_heads",
            found=model.kv_heads,
            expected=f"a divisor of model.heads = {model.heads}, so that each serves as many query heads",
            fix=one_of(divisors(model.heads)),
        )


def _latents(config: Config) -> Iterator[Problem]:
    model = config.model
    if model.positions != "rotary":
        yield Problem(
            key="model.positions",
            found=model.positions,
            expected="rotary with model.kv_lora_rank: model.qk_rope_head_dim channels of a head are rotated",
            fix="set model.positions=rotary, or leave model.kv_lora_rank out",
        )
    if model.qk_rope_head_dim % 2:
        yield Problem(
            key="model.qk_rope_head_dim",
            found=model.qk_rope_head_dim,
            expected="an even number, because rotary positions turn pairs",
            fix=f"use {model.qk_rope_head_dim + 1}",
        )
    if model.v_head_dim > model.width_of_head():
        yield Problem(
            key="model.v_head_dim",
            found=model.v_head_dim,
            expected="at most model.qk_nope_head_dim + model.qk_rope_head_dim = "
            f"{model.width_of_head()}: values are filled up to the width of keys",
            fix=f"use {model.width_of_head()} or less",
        )
    if model.bias_of_qkv():
        yield Problem(
            key="model.qkv_bias",
            found=True,
            expected="false with model.kv_lora_rank: queries, keys and values by latents have no biases",
            fix="set model.qkv_bias=false",
        )
    if model.has_parallel_branches():
        yield Problem(
            key="model.branches",
            found=model.branches,
            expected="sequential with model.kv_lora_rank: the MLP does not read the latents that attention reads",
            fix="set model.branches=sequential",
        )


def _rotary_fraction(config: Config) -> Iterator[Problem]:
    model, width = config.model, config.model.rotary_width()
    asked = model.width_of_head() * model.rotary_fraction
    if width % 2 or not width:
        even = max(2, 2 * round(asked / 2))
        yield Problem(
            key="model.rotary_fraction",
            found=model.rotary_fraction,
            expected=f"an even number of channels of model.head_dim = {model.width_of_head()}, not {asked:.6g}: rotary "
            "positions turn pairs",
            fix=f"use {even / model.width_of_head()!r}, which are {even} channels",
        )


def _rope_scaling(config: Config) -> Iterator[Problem]:
    model, width = config.model, config.model.rotary_width()
    scaling = model.rope_scaling
    if isinstance(scaling, Llama3) and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield Problem(
            key="model.rope_scaling",
            found=f"low_freq_factor: {scaling.low_freq_factor:g}",
            expected=f"less than high_freq_factor = {scaling.high_freq_factor:g}: between the two it is interpolated",
            fix="use 1, with high_freq_factor: 4, as Llama 3.1",
        )
    if isinstance(scaling, Yarn) and scaling.beta_slow > scaling.beta_fast:
        yield Problem(
            key="model.rope_scaling",
            found=f"beta_slow: {scaling.beta_slow:g}",
            expected=f"at most beta_fast = {scaling.beta_fast:g}: the ramp lies between the two",
            fix="use 1, with beta_fast: 32, as YaRN",
        )
    if isinstance(scaling, Yarn) and model.rope_theta <= 1:
        expected = "more than 1: yarn divides by its logarithm"
        yield Problem(key="model.rope_theta", found=model.rope_theta, expected=expected, fix="use 10000")
    if isinstance(scaling, LongRope):
        for name, factors in (("short_factor", scaling.short_factor), ("long_factor", scaling.long_factor)):
            if len(factors) != width // 2 or min(factors, default=0) <= 0:
                odd = "" if min(factors, default=1) > 0 else ", not all positive"
                yield Problem(
                    key="model.rope_scaling",
                    found=f"{name}: {len(factors)} numbers{odd}",
                    expected=f"{width // 2} positive numbers, one for each pair of rotated channels",
                    fix="take the list of the released model with this width of a head",
                )


def _experts(experts: int, config: Config) -> Iterator[Problem]:
    model = config.model
    if model.experts_per_token > experts:
        yield Problem(
            key="model.experts_per_token",
            found=model.experts_per_token,
            expected=f"at most model.experts = {experts}",
            fix="use 2, as Mixtral",
        )
    if experts % model.expert_groups:
        yield Problem(
            key="model.expert_groups",
            found=model.expert_groups,
            expected=f"a divisor of model.experts = {experts}",
            fix=one_of(divisors(experts)),
        )
    elif model.groups_per_token > model.expert_groups:
        yield Problem(
            key="model.groups_per_token",
            found=model.groups_per_token,
            expected=f"at most model.expert_groups = {model.expert_groups}",
            fix=f"use {model.expert_groups}",
        )
    elif model.experts_per_token > (most := model.groups_per_token * (experts // model.expert_groups)):
        yield Problem(
            key="model.groups_per_token",
            found=model.groups_per_token,
            expected=f"groups of model.experts_per_token = {model.experts_per_token} experts or more, not of {most}",
            fix="raise it, or lower model.expert_groups",
        )
    elif model.expert_groups > 1 and model.group_score_experts > (most := max(2, experts // model.expert_groups)):
        yield Problem(
            key="model.group_score_experts",
            found=model.group_score_experts,
            expected=f"at most {most}: a group has {experts // model.expert_groups} experts",
            fix="use 2, as DeepSeek-V3, or 1, as DeepSeek-V2",
        )
    if not model.num_expert_layers():
        yield Problem(
            key="model.experts",
            found=experts,
            expected=f"no value, because none of model.layers = {model.layers} has experts with model.dense_layers = "
            f"{model.dense_layers} and model.expert_every = {model.expert_every}",
            fix="lower model.dense_layers or model.expert_every, or remove it",
        )
    if model.bias_of_mlp():
        yield Problem(
            key="model.mlp_bias",
            found=True,
            expected="false with model.experts: an expert's output is weighted and summed, and has no bias",
            fix="set model.mlp_bias=false",
        )
    if model.has_parallel_branches():
        yield Problem(
            key="model.branches",
            found=model.branches,
            expected="sequential with model.experts: the router reads what attention has added",
            fix="set model.branches=sequential",
        )
    if model.shared_expert_gate and model.shared_expert_ffn is None:
        yield Problem(
            key="model.shared_expert_gate",
            found=True,
            expected="false without model.shared_expert_ffn: there is nothing to scale",
            fix="set model.shared_expert_ffn, the width of the shared expert",
        )


def _layer_kinds(config: Config) -> Iterator[Problem]:
    model = config.model
    windows = "window" in model.layer_kinds
    if windows and model.window is None:
        yield Problem(
            key="model.layer_kinds",
            found=list(model.layer_kinds),
            expected="no window without model.window, the number of keys that a query sees there",
            fix="set model.window",
        )
    if model.window is not None and model.layer_kinds and not windows:
        yield Problem(
            key="model.window",
            found=model.window,
            expected="no value, because model.layer_kinds has no window",
            fix="remove it, or name window in model.layer_kinds",
        )
    if "nope" in model.layer_kinds and model.positions != "rotary":
        yield Problem(
            key="model.layer_kinds",
            found=list(model.layer_kinds),
            expected=f"no nope with model.positions={model.positions}: it leaves rotary positions out of a block",
            fix="use full",
        )
    if len(model.layer_kinds) > model.layers:
        yield Problem(
            key="model.layer_kinds",
            found=f"{len(model.layer_kinds)} kinds",
            expected=f"at most one for each of model.layers = {model.layers}",
            fix=f"keep the first {model.layers}",
        )
