"""Every wrong combination is refused before the first process group: the key is named, and what to do about it."""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from dataclasses import replace

import pytest

from roots_dist.accounting.bounds import bounds
from roots_dist.accounting.sizes import parameters
from roots_dist.assembly.passes import training_program
from roots_dist.checks import facts as gathering
from roots_dist.checks import readiness, unused
from roots_dist.checks.checks import check, check_used, layout_for
from roots_dist.checks.facts import CorpusFacts, Facts
from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, UserError
from roots_dist.layout import Layout
from roots_dist.learning.models.flops import flops_per_step
from roots_dist.runs.train.banner import banner
from roots_dist.schedule.actions import Action, Kind
from roots_dist.schedule.schedules import SCHEDULES, gpipe
from roots_dist.world.mesh import Mesh

FINE = Facts(
    corpora={"c": CorpusFacts(tokens=10**6, vocab=4096)},
    tokenizer_vocab=4096,
    memory=8 * 2**30,
    special_tokens=frozenset({"pad", "unk", "end", "sep"}),
    sentinels=100,
    versions={"torch": "2.13.0+cpu", "deepspeed": "0.19.8"},
    pinned={"torch": "2.13.0", "deepspeed": "0.19.8"},
)
BASE = {"data": {"train": "c", "tokenizer": "t"}, "train": {"device": "cpu"}}
MIXTURE = {"experts": 8, "mlp_bias": False}
LATENT = {"positions": "rotary", "bias": False, "kv_lora_rank": 32}
T5 = {"family": "t5", "positions": "relative", "norm": "rmsnorm", "bias": False}
SPANS = {"name": "spans"}


def config_of(**sections: dict) -> Config:
    return Config(**{name: BASE.get(name, {}) | sections.get(name, {}) for name in {*BASE, *sections}})


def problems_of(world: int, facts: Facts | None = FINE, **sections: dict):
    return check(config_of(**sections), world, facts)


def with_facts(**changes: object) -> Facts:
    return Facts(**{**FINE.__dict__, **changes})


@pytest.mark.parametrize(
    "world, sections",
    [
        (1, {}),
        (8, {"parallel": {"tp": 2, "pp": 2}, "train": {"global_batch": 16}}),
        (4, {"parallel": {"tp": 4, "sequence_parallel": True}}),
        (2, {"model": MIXTURE, "parallel": {"ep": 2, "zero_stage": 3}}),
        (4, {"model": MIXTURE, "parallel": {"ep": 4}}),
        (8, {"model": MIXTURE, "parallel": {"ep": 4, "cp": 2, "tp": 2}}),
        (2, {"parallel": {"zero_stage": 3}}),
        (3, {"parallel": {"pp": 3}, "model": {"layers": 7}}),
        (4, {"parallel": {"tp": 4}, "model": {"kv_heads": 2}}),  # each key/value head on two ranks
        (2, {"parallel": {"tp": 2}, "model": {"vocab": 50257, "kv_heads": 2}}),
        (2, {"parallel": {"pp": 2, "virtual_stages": 2, "schedule": "interleaved"}}),
        (1, {"model": {"hidden": 100, "heads": 3, "head_dim": 32, "ffn": 10}}),
        (1, {"train": {"global_batch": 8, "batch_ramp": [2, 2, 100]}}),
        (4, {"advanced": {"float64": True, "engine": "reference"}}),
        (1, {"optim": {"lr_schedule": "wsd", "warmup_steps": 10, "decay_steps": 90}}),
        (
            7,
            {
                "model": T5 | {"decoder_layers": 3},
                "objective": SPANS,
                "parallel": {"pp": 7},
                "train": {"global_batch": 7},
            },
        ),
        (
            4,
            {
                "model": T5,
                "objective": SPANS,
                "data": {"seq_length": 516},
                "parallel": {"tp": 4, "sequence_parallel": True},
            },
        ),
        (
            2,
            {
                "model": T5,
                "objective": SPANS | {"name": "seq2seq"},
                "data": {"target_seq_length": 10},
                "parallel": {"tp": 2},
            },
        ),
    ],
)
def test_what_works_is_not_refused(world, sections):
    assert problems_of(world, **sections) == []


WRONG = [
    # world, sections, key that is named
    (6, {"parallel": {"zero_ranks": 4}}, "world size"),
    (4, {"parallel": {"zero_ranks": 2, "zero_stage": 0}}, "parallel.zero_ranks"),
    (4, {"parallel": {"zero_ranks": 2}, "advanced": {"engine": "deepspeed"}}, "parallel.zero_ranks"),
    (4, {"model": MIXTURE, "parallel": {"zero_ranks": 2, "ep": 2}}, "parallel.zero_ranks"),
    (4, {"parallel": {"zero_ranks": 2}, "train": {"exact": {"data": 4}}}, "parallel.zero_ranks"),
    (2, {"model": MIXTURE, "parallel": {"ep": 4}, "train": {"global_batch": 4}}, "world size"),
    (4, {"model": MIXTURE, "parallel": {"ep": 4, "cp": 2, "tp": 2}}, "world size"),
    (3, {"model": MIXTURE, "parallel": {"ep": 3}, "train": {"global_batch": 3}}, "parallel.ep"),
    (2, {"parallel": {"ep": 2}}, "parallel.ep"),
    (16, {"model": MIXTURE, "parallel": {"ep": 16}, "train": {"global_batch": 16}}, "parallel.ep"),
    (2, {"model": MIXTURE, "parallel": {"ep": 2}, "advanced": {"engine": "deepspeed"}}, "advanced.engine"),
    (2, {"model": MIXTURE | {"expert_ffn": 15}, "parallel": {"tp": 2}}, "parallel.tp"),
    (1, {"model": MIXTURE | {"experts_per_token": 9}}, "model.experts_per_token"),
    (1, {"model": MIXTURE | {"dense_layers": 9}}, "model.experts"),
    (1, {"model": MIXTURE | {"expert_groups": 3}}, "model.expert_groups"),
    (1, {"model": MIXTURE | {"expert_groups": 4, "groups_per_token": 5}}, "model.groups_per_token"),
    (1, {"model": MIXTURE | {"expert_groups": 8, "groups_per_token": 1}}, "model.groups_per_token"),
    (2, {"model": MIXTURE | {"router_bias": True}, "advanced": {"engine": "deepspeed"}}, "advanced.engine"),
    (1, {"model": MIXTURE | {"mlp_bias": True}}, "model.mlp_bias"),
    (1, {"model": MIXTURE | {"branches": "parallel"}}, "model.branches"),
    (1, {"model": MIXTURE | {"shared_expert_gate": True}}, "model.shared_expert_gate"),
    (1, {"model": LATENT | {"positions": "learned"}}, "model.positions"),
    (1, {"model": LATENT | {"qk_rope_head_dim": 5}}, "model.qk_rope_head_dim"),
    (1, {"model": LATENT | {"v_head_dim": 193}}, "model.v_head_dim"),
    (1, {"model": LATENT | {"qkv_bias": True}}, "model.qkv_bias"),
    (1, {"model": LATENT | {"branches": "parallel"}}, "model.branches"),
    (1, {"model": LATENT | {"kv_heads": 1}}, "model.kv_heads"),
    (1, {"model": LATENT | {"head_dim": 16}}, "model.head_dim"),
    (1, {"model": LATENT | {"qk_norm": "head"}}, "model.qk_norm"),
    (1, {"model": LATENT | {"rotary_fraction": 0.5}}, "model.rotary_fraction"),
    (1, {"model": {"q_lora_rank": 8}}, "model.q_lora_rank"),
    (3, {"model": LATENT, "parallel": {"tp": 3}}, "parallel.tp"),
    (2, {"model": LATENT | {"heads": 3}, "parallel": {"cp": 2, "cp_kind": "heads"}}, "parallel.cp_kind"),
    (1, {"model": LATENT, "train": {"exact": {}}, "advanced": {"threads": 1}}, "model.kv_lora_rank"),
    (
        1,
        {
            "model": {"family": "bert", "segments": 2, "positions": "rotary", "bias": False, "kv_lora_rank": 8},
            "objective": {"name": "mlm"},
        },
        "model.kv_lora_rank",
    ),
    (1, {"model": MIXTURE | {"group_score_experts": 1}}, "model.group_score_experts"),
    (1, {"model": MIXTURE | {"expert_groups": 2, "group_score_experts": 5}}, "model.group_score_experts"),
    (
        1,
        {"model": {"family": "bert", "segments": 2, "experts": 4, "mlp_bias": False}, "objective": {"name": "mlm"}},
        "model.experts",
    ),
    (3, {"parallel": {"tp": 2}}, "world size"),
    (2, {"parallel": {"tp": 2, "pp": 2}}, "world size"),
    (1, {"model": {"hidden": 250}}, "model.hidden"),
    (1, {"model": {"positions": "rotary", "head_dim": 63}}, "model.head_dim"),
    (1, {"model": {"positions": "rotary", "hidden": 12, "heads": 4}}, "model.head_dim"),
    (1, {"model": {"kv_heads": 3}}, "model.kv_heads"),
    (1, {"model": {"kv_heads": 8}}, "model.kv_heads"),
    (
        2,
        {"model": {"family": "electra", "segments": 2}, "objective": {"name": "rtd"}, "parallel": {"tp": 2}},
        "parallel.tp",
    ),
    (3, {"parallel": {"tp": 3}, "model": {"ffn": 768}, "advanced": {"vocab_multiple": 3}}, "parallel.tp"),
    (2, {"parallel": {"tp": 2}, "model": {"ffn": 1023}}, "parallel.tp"),
    (2, {"parallel": {"tp": 2}, "model": {"vocab": 4097}, "advanced": {"vocab_multiple": 1}}, "parallel.tp"),
    (4, {"parallel": {"tp": 4}, "model": {"heads": 12, "kv_heads": 6, "hidden": 240}}, "parallel.tp"),
    (1, {"parallel": {"sequence_parallel": True}}, "parallel.sequence_parallel"),
    (2, {"parallel": {"tp": 2, "sequence_parallel": True}, "data": {"seq_length": 255}}, "data.seq_length"),
    (4, {"parallel": {"cp": 4}, "data": {"seq_length": 252}}, "data.seq_length"),
    (4, {"parallel": {"cp": 2, "tp": 2, "sequence_parallel": True}, "data": {"seq_length": 254}}, "data.seq_length"),
    (2, {"parallel": {"cp": 2}, "data": {"seq_length": 254}}, "data.seq_length"),
    (2, {"model": T5, "objective": SPANS, "data": {"seq_length": 254}, "parallel": {"cp": 2}}, "data.seq_length"),
    (
        2,
        {
            "model": T5,
            "objective": {"name": "seq2seq"},
            "data": {"target_seq_length": 10},
            "parallel": {"cp": 2},
        },
        "data.target_seq_length",
    ),
    (3, {"parallel": {"cp": 2}}, "world size"),
    (2, {"parallel": {"cp": 4}}, "world size"),
    (1, {"parallel": {"cp_kind": "heads"}}, "parallel.cp_kind"),
    (3, {"parallel": {"cp": 3, "cp_kind": "heads"}, "data": {"seq_length": 252}}, "parallel.cp_kind"),
    (4, {"parallel": {"cp": 4, "cp_kind": "heads"}, "model": {"kv_heads": 2}}, "parallel.cp_kind"),
    (4, {"parallel": {"cp": 2, "tp": 2, "cp_kind": "heads"}, "model": {"kv_heads": 2}}, "parallel.cp_kind"),
    (
        2,
        {
            "model": {"family": "electra", "segments": 2},
            "objective": {"name": "rtd"},
            "generator": {"heads": 1},
            "parallel": {"cp": 2, "cp_kind": "heads"},
        },
        "parallel.cp_kind",
    ),
    (1, {"train": {"global_batch": 7, "micro_batch": 2}}, "train.global_batch"),
    (3, {}, "train.global_batch"),
    (1, {"train": {"global_batch": 2, "micro_batch": 4}}, "train.global_batch"),
    (1, {"train": {"batch_ramp": [3, 2, 100]}}, "train.batch_ramp"),
    (1, {"train": {"batch_ramp": [16, 2, 100]}}, "train.batch_ramp"),
    (1, {"train": {"batch_ramp": [2, 0, 100]}}, "train.batch_ramp"),
    (1, {"train": {"batch_ramp": [2, -2, 100]}}, "train.batch_ramp"),
    (4, {"train": {"batch_ramp": [2, 2, 100]}}, "train.batch_ramp"),
    (8, {"parallel": {"pp": 8}}, "model.layers"),
    (2, {"parallel": {"pp": 2, "virtual_stages": 3, "schedule": "interleaved"}}, "model.layers"),
    (2, {"parallel": {"pp": 2, "virtual_stages": 2}}, "parallel.virtual_stages"),
    (2, {"parallel": {"pp": 2, "schedule": "interleaved"}}, "parallel.virtual_stages"),
    (
        2,
        {"parallel": {"pp": 2, "virtual_stages": 2, "schedule": "interleaved"}, "train": {"global_batch": 3}},
        "train.global_batch",
    ),
    (
        2,
        {
            "parallel": {"pp": 2, "virtual_stages": 2, "schedule": "interleaved"},
            "train": {"global_batch": 4, "batch_ramp": [3, 1, 9]},
        },
        "train.batch_ramp",
    ),
    (1, {"model": {"positions": "rotary"}, "advanced": {"sinusoidal_init": True}}, "advanced.sinusoidal_init"),
    (1, {"optim": {"warmup_steps": 101}}, "optim.warmup_steps"),
    (1, {"optim": {"lr_schedule": "wsd", "warmup_steps": 50, "decay_steps": 51}}, "optim.decay_steps"),
    (1, {"optim": {"min_lr": 1.0}}, "optim.min_lr"),
    (1, {"train": {"spike_threshold": 6.0, "on_spike": "rewind"}}, "checkpoint.every"),
    (
        2,
        {"parallel": {"zero_stage": 0}, "advanced": {"engine": "deepspeed"}, "train": {"precision": "bf16"}},
        "parallel.zero_stage",
    ),
    (2, {"advanced": {"float64": True, "engine": "deepspeed"}}, "advanced.float64"),
    (1, {"advanced": {"float64": True}, "train": {"precision": "bf16"}}, "advanced.float64"),
    (1, {"objective": SPANS}, "objective.name"),
    (1, {"model": T5}, "objective.name"),
    (1, {"model": {"positions": "relative"}}, "model.positions"),
    (1, {"model": {"decoder_layers": 2}}, "model.decoder_layers"),
    (1, {"model": {"segments": 2}}, "model.segments"),
    (1, {"data": {"target_seq_length": 9}}, "data.target_seq_length"),
    *(
        (1, {"model": T5 | {key: value}, "objective": SPANS}, f"model.{key}")
        for key, value in {
            "positions": "learned",
            "norm_position": "post",
            "embedding_norm": True,
            "embedding_size": 128,
            "segments": 2,
            "relative_buckets": 3,
            "relative_max_distance": 16,
        }.items()
    ),
    (1, {"model": T5, "objective": SPANS, "data": {"target_seq_length": 9}}, "data.target_seq_length"),
    (1, {"model": T5, "objective": SPANS, "data": {"seq_length": 2}}, "data.seq_length"),
    (
        4,
        {
            "model": T5,
            "objective": SPANS,
            "data": {"seq_length": 512},
            "parallel": {"tp": 4, "sequence_parallel": True},
        },
        "data.seq_length",
    ),
    (
        2,
        {
            "model": T5,
            "objective": {"name": "seq2seq"},
            "data": {"target_seq_length": 9},
            "parallel": {"tp": 2, "sequence_parallel": True},
        },
        "data.target_seq_length",
    ),
    (8, {"model": T5 | {"decoder_layers": 3}, "objective": SPANS, "parallel": {"pp": 8}}, "model.layers"),
    (1, {"model": T5, "objective": SPANS, "data": {"tokenizer": None}}, "data.tokenizer"),
    (1, {"model": {"family": "bert"}, "objective": {"name": "mlm"}}, "data.tokenizer"),
    (1, {"model": T5, "objective": SPANS, "data": {"seq_length": 2100}}, "data.tokenizer"),  # 117 spans, 100 sentinels
    (1, {"finetune": {"trainable": ["head.*"]}}, "finetune.trainable"),
    (
        1,
        {"finetune": {"strategy": "progressive", "unfreeze_every": 100}, "train": {"steps": 100}},
        "finetune.unfreeze_every",
    ),
    (
        1,
        {
            "finetune": {"strategy": "progressive", "unfreeze_every": 100, "unfreeze_every_epochs": 2.5},
            "train": {"steps": 99},
        },
        "finetune.unfreeze_every_epochs",
    ),
    (1, {"data": {"train": []}}, "data.train"),
    (1, {"train": {"device": "cuda"}}, "train.device"),
    (1, {"data": {"seq_length": 10**6}}, "data.seq_length"),
    (1, {"model": {"vocab": 4095}}, "model.vocab"),
    (1, {"model": {"layers": 96, "hidden": 12288, "heads": 96}}, "model"),
]


@pytest.mark.parametrize("world, sections, key", WRONG)
def test_what_cannot_work_is_refused(world, sections, key):
    problems = problems_of(world, **sections)
    assert key in [p.key for p in problems]
    for p in problems:
        text = str(p)
        assert "\n" not in text and ": expected " in text and " Fix: " in text and p.fix.strip(), text


@pytest.mark.parametrize(
    "facts, key",
    [
        (with_facts(corpora={"c": CorpusFacts(trouble="no such file or directory: c.idx")}), "data.train"),
        (with_facts(corpora={"c": CorpusFacts(tokens=10**6, made_with="other/tokenizer.json")}), "data.train"),
        (with_facts(tokenizer_trouble="no such file"), "data.tokenizer"),
        (with_facts(tokenizer_vocab=5000), "model.vocab"),
        (with_facts(folder_trouble="permission denied: /"), "track.folder"),
        (with_facts(memory=10**6), "model"),
        (with_facts(versions={"torch": "2.4.0", "deepspeed": "0.19.8"}), "torch"),
        (with_facts(versions={"torch": None}), "torch"),
        (with_facts(versions={"torch": "2.13.0", "deepspeed": None}), "deepspeed"),
        (with_facts(versions={"torch": "2.13.0", "deepspeed": "0.18.6"}), "deepspeed"),
    ],
)
def test_a_machine_that_cannot_is_refused(facts, key):
    problems = problems_of(2, facts, advanced={"engine": "deepspeed"})
    assert [p.key for p in problems] == [key]
    assert all(p.fix for p in problems)


def test_frozen_weights_need_no_memory_for_learning():
    """Adapters of a model whose weights alone fit; everything else would need four times that."""
    weights = 4 * parameters(config_of())
    wanted = {"strategy": "lora"}, {"strategy": "partial", "trainable": ["head.*"]}, {}
    found = [problems_of(1, with_facts(memory=2 * weights), finetune=finetune) for finetune in wanted]
    assert [[p.key for p in problems] for problems in found] == [[], [], ["model"]]
    assert [p.key for p in problems_of(1, with_facts(memory=weights // 2), finetune=wanted[0])] == ["model"]


def test_the_proposed_length_of_cut_targets_works():
    sections = {"model": T5 | {"heads": 8}, "objective": SPANS, "parallel": {"tp": 8, "sequence_parallel": True}}
    (problem,) = problems_of(8, data={"seq_length": 512}, **sections)
    assert "not 114" in problem.expected
    assert problems_of(8, data={"seq_length": int(problem.fix.split()[-1])}, **sections) == []


def test_progressive_learning_reaches_the_embedding_as_proposed():
    """Four blocks, two at a time: four groups in a hundred steps."""
    sections = {
        "train": {"steps": 100},
        "finetune": {"strategy": "progressive", "unfreeze_every": 100, "unfreeze_blocks": 2},
    }
    (problem,) = problems_of(1, **sections)
    assert problem.fix == "set finetune.unfreeze_every=25, or train longer"
    assert (
        problems_of(
            1, **sections | {"finetune": {"strategy": "progressive", "unfreeze_every": 25, "unfreeze_blocks": 2}}
        )
        == []
    )


def test_deepspeed_is_not_asked_for_where_it_is_not_used():
    assert problems_of(2, with_facts(versions={"torch": "2.13.0", "deepspeed": None})) == []


def test_all_problems_come_at_once():
    problems = problems_of(
        3,
        model={"hidden": 250, "kv_heads": 3},
        parallel={"sequence_parallel": True},
        optim={"warmup_steps": 1000, "min_lr": 1.0},
        data={"train": []},
    )
    keys = {p.key for p in problems}
    assert keys >= {
        "model.hidden",
        "model.kv_heads",
        "parallel.sequence_parallel",
        "optim.warmup_steps",
        "optim.min_lr",
        "data.train",
    }
    assert "train.global_batch" in keys


@pytest.mark.parametrize("tp", range(1, 9))
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
def test_kv_heads_and_tp_agree_or_are_refused(tp, kv_heads):
    """Against the definition: the slices of the key/value heads must be whole heads, the same number on each rank."""
    allowed = kv_heads % tp == 0 or tp % kv_heads == 0
    sections = {"model": {"heads": 8 * 7 * 15, "head_dim": 2, "kv_heads": kv_heads, "ffn": 840}}
    problems = problems_of(
        tp, parallel={"tp": tp}, advanced={"vocab_multiple": 840}, train={"global_batch": 8}, **sections
    )
    assert (problems == []) == allowed


def one_waits_for_the_other(rank: int, ranks: int, microbatches: int):
    """Rank 0 waits for a gradient before its second forward, the others want all activations first."""
    if rank:
        return gpipe(rank, ranks, microbatches)
    return [Action(kind, rank, i) for i in range(microbatches) for kind in (Kind.FORWARD, Kind.BACKWARD)]


def test_a_schedule_that_deadlocks_is_refused_before_any_rank_starts(monkeypatch):
    """With what each rank would wait for; it would hang until advanced.timeout_s. The smallest batch of a ramp is
    checked too."""
    monkeypatch.setitem(SCHEDULES, "gpipe", replace(SCHEDULES["gpipe"], actions=one_waits_for_the_other))
    parallel = {"pp": 2, "schedule": "gpipe"}
    (problem,) = problems_of(2, parallel=parallel)
    assert problem.key == "parallel.schedule" and "2 ranks and 8 microbatches" in problem.expected
    assert "rank 0 waits at B0.0 for rb0.0, rank 1 waits at F1.1 for rf1.1" in problem.expected
    (problem,) = problems_of(2, parallel=parallel, train={"batch_ramp": [2, 2, 100]})
    assert "2 ranks and 2 microbatches" in problem.expected
    assert problems_of(2, parallel=parallel, train={"global_batch": 1}) == []  # one microbatch comes through
    with pytest.raises(UserError, match="rank 0 waits at B0.0"):  # what a rank would execute
        training_program(config_of(parallel=parallel), 8, rank=0)


def test_a_rank_refuses_a_schedule_in_which_it_or_its_neighbour_waits(monkeypatch):
    monkeypatch.setitem(SCHEDULES, "gpipe", replace(SCHEDULES["gpipe"], actions=one_waits_for_the_other))
    config = config_of(model={"layers": 8}, parallel={"pp": 4, "tp": 2, "schedule": "gpipe"})
    refused = [rank for rank in range(8) if check_used(config, 8, rank=rank)]
    assert refused == [0, 1, 2, 3], "pipeline rank 0, with two tensor ranks, and its neighbour"
    assert [problem.key for problem in check(config, 8)] == ["parallel.schedule"]


TENSOR_RANKS = {
    "heads and a vocabulary": ({"model": {"heads": 6, "hidden": 384}}, 6, "choose one of 1, 2."),
    "key/value heads": ({"model": {"heads": 12, "hidden": 384, "kv_heads": 4}}, 3, "choose one of 1, 2, 4."),
    "key/value heads that are cut": ({"model": {"heads": 12, "kv_heads": 6, "hidden": 240}}, 4, "choose one of 1, 2."),
    "nothing but one rank": ({"model": {"heads": 3, "hidden": 384}}, 2, "use 1, or change what is named."),
    "positions too": (
        {"model": {"heads": 8}, "data": {"seq_length": 12}, "parallel": {"sequence_parallel": True}},
        3,
        "choose one of 1, 2, 4.",
    ),
    "exchanged heads too": (
        {"model": {"heads": 8}, "data": {"seq_length": 256}, "parallel": {"cp": 2, "cp_kind": "heads"}},
        3,
        "choose one of 1, 2, 4.",
    ),
}


@pytest.mark.parametrize("case", TENSOR_RANKS)
def test_degrees_that_are_proposed_satisfy_every_rule_at_once(case):
    sections, tp, fix = TENSOR_RANKS[case]
    cp = sections.get("parallel", {}).get("cp", 1)

    def of(degree: int) -> list:
        changed = config_of(**sections).changed({"parallel.tp": degree, "train.global_batch": 8})
        return [p for p in check(changed, degree * cp) if degree > 1 or p.key != "parallel.sequence_parallel"]

    (problem,) = [p for p in of(tp) if p.key == "parallel.tp"]
    assert str(problem).endswith(f"Fix: {fix}") and "\n" not in str(problem)
    named = [int(word) for word in re.findall(r"\d+", fix)]
    assert named and not [p for degree in named for p in of(degree)]
    assert [degree for degree in range(1, 13) if not of(degree)] == named


def test_layout_for_gives_dp_what_is_left():
    config = config_of(parallel={"tp": 4, "pp": 12})
    assert layout_for(config, 384) == Layout(dp=8, pp=12, tp=4)
    for world in (0, 1, 47, 385):
        with pytest.raises(ConfigError):
            layout_for(config, world)


def test_the_closed_form_counts_gpt2_small():
    """124,439,808 parameters, and 47 padded rows."""
    config = config_of(
        model={"layers": 12, "hidden": 768, "heads": 12, "vocab": 50257}, data={"seq_length": 1024, "train": "c"}
    )
    assert readiness.parameters(config) == 124_439_808 + 47 * 768


@pytest.mark.parametrize("zero, expected", [(0, 16), (1, 4 + 4 + 8 / 4), (2, 4 + 12 / 4), (3, 16 / 4)])
@pytest.mark.parametrize("engine", ["reference", "deepspeed"])
def test_state_bytes_follow_the_zero_paper(zero, expected, engine):
    """Rajbhandari et al. 2020, figure 1, in float32: weights 4, gradients 4, moments 8 bytes for each parameter; where
    DeepSpeed shards, master weights too, 4 bytes: it keeps them in float32 as it does in bf16."""
    config = config_of(parallel={"zero_stage": zero}, advanced={"engine": engine})
    expected += 4 / 4 if zero and engine == "deepspeed" else 0
    assert readiness.state_bytes(config, Layout(dp=4)) == pytest.approx(
        readiness.parameters(config) * expected, rel=1e-6
    )


def write_corpus(folder, magic=b"MMIDIDX\x00\x00", version=1, code=8, sequences=1, tokens=1000, cut=0):
    idx = magic + struct.pack("<QBQQ", version, code, sequences, 2) + bytes(12 * sequences + 16)
    (folder / "c.idx").write_bytes(idx[: len(idx) - cut])
    (folder / "c.bin").write_bytes(bytes(2 * tokens))
    return str(folder / "c")


def test_a_corpus_is_read_by_its_header(tmp_path):
    prefix = write_corpus(tmp_path)
    assert gathering.corpus(prefix) == CorpusFacts(tokens=1000, documents=1)
    (tmp_path / "manifest.json").write_text(json.dumps({"vocab": 777}))
    assert gathering.corpus(prefix).vocab == 777
    for hostile in ("{", "[]", '{"vocab": "many"}', "\udcff"):
        (tmp_path / "manifest.json").write_text(hostile, errors="surrogateescape")
        assert gathering.corpus(prefix) == CorpusFacts(tokens=1000, documents=1)


@pytest.mark.parametrize(
    "wrong, word",
    [
        ({"magic": b"TNTIDX\x00\x00\x00"}, "older format"),
        ({"magic": b"not an id"}, "begins b'not an id', expected b'MMIDIDX"),
        ({"version": 2}, "version 2, expected version 1"),
        ({"code": 9}, "token type code 9, expected 1-5 or 8"),
        ({"code": 6}, "token type code 6"),
        ({"sequences": 3, "cut": 8}, "78 bytes, expected 86"),
        ({"sequences": 0}, "no documents"),
        ({"cut": 60}, "begins b'MM'"),
        ({"cut": 40}, "22 bytes, expected a header of 34"),
        ({"code": 4, "tokens": 999}, "cut off"),
    ],
)
def test_a_broken_corpus_says_what_is_wrong_with_it(tmp_path, wrong, word):
    assert word in (gathering.corpus(write_corpus(tmp_path, **wrong)).trouble or "")


def test_a_missing_corpus_and_a_missing_bin_are_told_apart(tmp_path):
    assert "c.idx" in (gathering.corpus(str(tmp_path / "c")).trouble or "")
    prefix = write_corpus(tmp_path)
    (tmp_path / "c.bin").unlink()
    assert "c.bin" in (gathering.corpus(prefix).trouble or "")


def test_facts_of_this_machine(tmp_path):
    prefix = write_corpus(tmp_path)
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 2, "content": "<pad>"}]})
    )
    config = Config(
        data={"train": prefix, "tokenizer": str(tmp_path / "tokenizer.json")},
        track={"folder": str(tmp_path / "runs/x")},
    )
    found = gathering.gather(config, local_size=2)
    assert found.corpora[prefix].tokens == 1000 and found.tokenizer_vocab == 3 and found.local_size == 2
    assert found.special_tokens == {"pad"} and found.sentinels == 0
    assert found.folder_trouble is None and not (tmp_path / "runs").exists()
    assert found.memory is not None and found.memory > 0
    assert found.versions["torch"]
    (tmp_path / "tokenizer.json").write_text('{"model": {"vocab": []}}')
    assert gathering.gather(config, 1).tokenizer_trouble
    (tmp_path / "file").write_text("")
    blocked = config.model_copy(update={"track": config.track.model_copy(update={"folder": str(tmp_path / "file/x")})})
    assert gathering.gather(blocked, 1).folder_trouble


def test_checking_needs_no_torch(tmp_path):
    """A login node checks a run in a fraction of a second."""
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(config_of()))
    code = (
        "import sys; from roots_dist.checks import checks, facts; from roots_dist.config import load; "
        f"config = load.load({str(path)!r}); checks.check(config, 4, facts.gather(config, 4)); "
        "assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)


def tokenizer(path, *words: str, **added: int):
    tree = {
        "model": {"vocab": {word: i for i, word in enumerate(words)}},
        "added_tokens": [{"content": w, "id": i} for w, i in added.items()],
    }
    path.write_text(json.dumps(tree))
    return str(path)


def test_a_corpus_of_another_tokenizer_is_seen_by_its_ids_not_by_its_file(tmp_path):
    prefix = write_corpus(tmp_path)
    beside = tokenizer(tmp_path / "tokenizer.json", "a", "b")
    (tmp_path / "ours").mkdir()
    same = tokenizer(tmp_path / "ours" / "same.json", "a", "b", c=2)  # a word more than the corpus can hold
    other = tokenizer(tmp_path / "ours" / "other.json", "b", "a")

    def made_with(ours: str | None) -> str | None:
        return gathering.gather(config_of(data={"train": prefix, "tokenizer": ours}), 1).corpora[prefix].made_with

    assert made_with(other) is None  # without a manifest: a file of this name may be anything
    (tmp_path / "manifest.json").write_text(json.dumps({"vocab": 2}))
    assert [made_with(ours) for ours in (beside, same, None, other)] == [None, None, None, beside]


@pytest.mark.parametrize(
    "head_dim, fraction, width", [(48, 1 / 3, 16), (48, 0.3333333, 16), (44, 30 / 44, 30), (80, 0.4, 32)]
)
def test_a_share_of_a_head_is_the_channels_that_it_means(head_dim, fraction, width):
    model = {"heads": 2, "head_dim": head_dim, "positions": "rotary", "rotary_fraction": fraction}
    config = Config.model_validate({"model": model})
    assert config.model.rotary_width() == width and check(config, 1) == []


def test_an_odd_number_of_rotated_channels_is_refused_with_a_share_that_is_not():
    model = {"heads": 2, "head_dim": 48, "positions": "rotary", "rotary_fraction": 0.32}
    (problem,) = check(Config.model_validate({"model": model}), 1)
    (share,) = re.findall(r"use (\S+), which are", problem.fix)
    assert check(Config.model_validate({"model": model | {"rotary_fraction": float(share)}}), 1) == []


def test_a_rotary_share_that_is_no_whole_number_of_channels_is_rounded_as_transformers_does_and_told():
    model = {"heads": 2, "head_dim": 20, "positions": "rotary", "rotary_fraction": 0.83}
    config = Config.model_validate({"model": model})
    assert check(config, 1) == [] and config.model.rotary_share_is_rounded()
    told = banner(config, Mesh.single(), None, bounds(config, Layout(), flops_per_step(config), None))
    assert "model.rotary_fraction = 0.83 rotates 16 of 20 channels" in told
    (problem,) = check(config.changed({"model.rotary_fraction": 0.76}), 1)
    assert problem.key == "model.rotary_fraction" and "not 15.2:" in problem.expected and "use 0.8" in problem.fix


def test_a_record_that_is_not_used_is_shown_as_it_was_written():
    (problem,) = unused.check(Config.model_validate({"model": {"rope_scaling": {"type": "linear", "factor": 2}}}))
    assert problem.found == "{type: linear, factor: 2.0}"
