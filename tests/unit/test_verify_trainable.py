"""A proof's small model learns what the large one learns: partial by the same blocks, progressive within the proof's
steps."""

import pytest

from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError
from roots_dist.parallel.optim.trainable import trainable
from roots_dist.verify.shrink import shrink
from roots_dist.verify.trainable import depths


def config(layers: int = 12, family: str = "bert", **finetune) -> Config:
    t5 = {"positions": "relative", "norm": "rmsnorm", "bias": False}
    model = {
        "family": family,
        "layers": layers,
        "hidden": 64,
        "heads": 4,
        **({"segments": 2} if family == "bert" else t5),
    }
    return Config.model_validate(
        {"model": model, "objective": {"name": "mlm" if family == "bert" else "spans"}, "finetune": finetune}
    )


def small(c: Config) -> Config:
    return shrink(c, 1, "float64").config


def test_patterns_of_blocks_that_the_small_model_has_not_stand_for_those_at_their_height():
    c = config(strategy="partial", trainable=["blocks.11.mlp.*", "head.*"])
    learns = trainable(small(c), depths(small(c)))
    assert small(c).model.layers == 2 and "blocks.1.mlp.up.weight" in learns and "head.norm.weight" in learns
    assert not any(name.startswith(("blocks.0.", "embed.", "blocks.1.attention")) for name in learns)


def test_of_two_stacks_each_has_its_own_heights():
    c = config(family="t5", strategy="partial", trainable=["encoder.blocks.0.*", "decoder.blocks.11.*"])
    learns = trainable(small(c), depths(small(c)))
    stacks = {name.split(".attention")[0] for name in learns if name.endswith(".attention.query.weight")}
    assert stacks == {"encoder.blocks.0", "decoder.blocks.1"}


def test_all_of_a_progressive_run_is_reached_within_three_steps():
    c = config(strategy="progressive", unfreeze_every=5000, unfreeze_every_epochs=1.0)
    assert {l.from_step for l in trainable(small(c), depths(small(c))).values()} == {0, 1, 2}


@pytest.mark.parametrize(
    "wrong",
    [
        {"strategy": "partial"},
        {"strategy": "partial", "trainable": ["blocks.12.*"]},
        {"strategy": "lora", "lora_targets": ["querry"]},
    ],
)
def test_names_that_the_large_model_has_not_are_refused(wrong):
    with pytest.raises(ConfigError, match="finetune.(trainable|lora_targets) = .* Fix: "):
        small(config(**wrong))


@pytest.mark.parametrize("objective, labels", [("classify", ("no", "yes")), ("mlm", ())])
def test_adapters_are_learned_alone_but_for_the_head_of_a_task(objective, labels):
    """A task's head has no pre-trained weights; that of pre-training has."""
    c = config(2, strategy="lora", lora_targets=["query"], labels=labels).changed({"objective.name": objective})
    learns = trainable(c, depths(c))
    heads = {name for name in learns if ".lora." not in name}
    assert heads == ({name for name in depths(c) if name.startswith("head.")} if labels else set())
    assert {name for name in depths(c) if ".lora." in name} <= {*learns}


LLAMA = {"hidden": 64, "heads": 4, "layers": 2, "activation": "swiglu", "positions": "rotary"}


@pytest.mark.parametrize(
    "word, fix",
    [
        ("q_proj", "write query for it"),
        ("self_attn.o_proj", "write out for it"),
        ("Wqkv", "write query, key, value for it"),
        ("c_proj", "write out, down for it"),
        ("gate_up_proj", "write gate, up for it"),
        ("kv_b_proj", "choose for example query"),
        ("all-linear", "write query, key, value, out, up, gate, down for it"),
        ("valeu", "choose for example value"),
        ("attention", "choose for example gate"),
        ("zzz", "choose for example query or key or value"),
    ],
)
def test_a_layer_by_the_name_that_others_give_it_is_told_ours(word, fix):
    c = Config.model_validate({"model": LLAMA, "finetune": {"strategy": "lora", "lora_targets": [word]}})
    with pytest.raises(ConfigError, match=rf"finetune.lora_targets = '{word}': .* Fix: {fix}"):
        trainable(c, depths(c))
