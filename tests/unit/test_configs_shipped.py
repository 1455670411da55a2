"""Every config in configs/ is read and works out on the world it was made for; published facts are held to."""

from __future__ import annotations

from pathlib import Path

import pytest

from roots_dist.accounting.sizes import active_parameters, parameters
from roots_dist.checks.checks import check, layout_for
from roots_dist.config.init_from import complete_from_model
from roots_dist.config.load import load, read, to_yaml
from roots_dist.config.schema import Config

CONFIGS = Path(__file__).parents[2] / "configs"
WORLDS = {
    "quickstart": 4,
    "gpt2-small": 8,
    "gpt2-medium": 8,
    "gpt2-large": 8,
    "gpt2-xl": 8,
    "bloom-560m": 32,
    "bloom-1b1": 32,
    "bloom-1b7": 64,
    "bloom-3b": 128,
    "bloom-7b1": 128,
    "bloom-176b": 384,
    "llama-3-8b": 64,
    "llama-3-70b": 512,
    "bert-quickstart": 4,
    "bloom-quickstart": 4,
    "llama-quickstart": 4,
    "roberta-quickstart": 4,
    "bert-base": 8,
    "bert-large": 8,
    "roberta-base": 64,
    "electra-quickstart": 4,
    "electra-small": 1,
    "electra-base": 8,
    "electra-large": 64,
    "t5-quickstart": 4,
    "t5-small": 8,
    "t5-base": 8,
    "t5-large": 32,
    "t5-3b": 64,
    "t5-11b": 128,
    "t5-v1_1-base": 8,
    "llama-3.1-8b": 64,
    "llama-3.1-8b-128k": 64,
    "llama-3.2-1b": 8,
    "mistral-7b": 64,
    "qwen2.5-7b": 64,
    "qwen3-8b": 64,
    "gemma-2-9b": 64,
    "gemma-3-1b": 8,
    "olmo-2-7b": 64,
    "phi-3-mini": 32,
    "granite-3-8b": 64,
    "smollm3-3b": 32,
    "pythia-6.9b": 128,
    "falcon-7b": 64,
    "gpt-j-6b": 32,
    "phi-2": 32,
    "gemma-7b": 64,
    "olmo-7b": 64,
    "stablelm-2-1.6b": 16,
    "starcoder2-3b": 32,
    "opt-1.3b": 16,
    "xlm-roberta-base": 64,
    "camembert-base": 64,
    "distilbert-base": 8,
    "mt5-base": 64,
    "mixtral-8x7b": 64,
    "qwen3-30b-a3b": 64,
    "olmoe-1b-7b": 64,
    "deepseek-v2-lite": 64,
}
STARTS = {
    "bert-languages": "bert-quickstart",
    "bert-pairs": "bert-languages",
    "bert-words": "bert-quickstart",
    "electra-eras": "electra-quickstart",
    "chat": "qwen3-8b",
    "gpt-answers": "quickstart",
    "t5-names": "t5-quickstart",
}
"""The config whose model each fine-tuning starts from. All work out on four processes."""
BILLIONS = {  # as published, with embeddings
    "gpt2-small": 0.12444,
    "gpt2-medium": 0.355,
    "gpt2-large": 0.774,
    "gpt2-xl": 1.558,
    "bloom-560m": 0.559,
    "bloom-1b1": 1.065,
    "bloom-1b7": 1.722,
    "bloom-3b": 3.003,
    "bloom-7b1": 7.069,
    "bloom-176b": 176.247,
    "llama-3-8b": 8.030,
    "llama-3-70b": 70.554,
    "bert-base": 0.110106428,
    "bert-large": 0.336226108,
    "roberta-base": 0.124697433,
    "t5-small": 0.060506624,
    "t5-base": 0.222903552,
    "t5-large": 0.737668096,
    "t5-3b": 2.851598336,
    "t5-11b": 11.307321344,
    "t5-v1_1-base": 0.247577856,
    "llama-3.1-8b": 8.030261248,
    "llama-3.1-8b-128k": 8.030261248,
    "llama-3.2-1b": 1.2358144,
    "mistral-7b": 7.241732096,
    "qwen2.5-7b": 7.615616512,
    "qwen3-8b": 8.19073536,
    "gemma-2-9b": 9.241705984,
    "gemma-3-1b": 0.999885952,
    "olmo-2-7b": 7.298617344,
    "phi-3-mini": 3.821079552,
    "granite-3-8b": 8.170848256,
    "smollm3-3b": 3.075098624,
    "pythia-6.9b": 6.857302016,
    "falcon-7b": 6.921720704,
    "gpt-j-6b": 6.050882784,
    "phi-2": 2.77968384,
    "gemma-7b": 8.537680896,
    "olmo-7b": 6.888095744,
    "stablelm-2-1.6b": 1.644417024,
    "starcoder2-3b": 3.030371328,
    "opt-1.3b": 1.31575808,
    "xlm-roberta-base": 0.278295186,
    "camembert-base": 0.110655493,
    "distilbert-base": 0.06698553,
    "mt5-base": 0.58240128,
    "mixtral-8x7b": 46.702792704,
    "qwen3-30b-a3b": 30.532122624,
    "olmoe-1b-7b": 6.919161856,
    "deepseek-v2-lite": 15.706484224,
}


def test_every_config_is_in_the_table():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*WORLDS, *STARTS}


@pytest.mark.parametrize("name", WORLDS)
def test_a_shipped_config_works_out(name):
    assert check(load(CONFIGS / f"{name}.yaml"), WORLDS[name]) == []


def whole(name: str, place: Path) -> Config:
    """The config as its run has it, in its folder under `place`; first that of the run which it starts from."""
    asked = read(CONFIGS / f"{name}.yaml")
    if name in STARTS:
        whole(STARTS[name], place)
    config = complete_from_model(asked).config
    if config.objective.name in ("classify", "tag"):
        config = config.changed({"finetune.labels": ("a", "b")})
    folder = place / config.track.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    return config


@pytest.mark.parametrize("name", STARTS)
def test_a_shipped_config_of_fine_tuning_works_out_on_the_model_that_it_starts_from(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load(CONFIGS / f"{name}.yaml").finetune.init_from == load(CONFIGS / f"{STARTS[name]}.yaml").track.folder
    start, config = whole(STARTS[name], tmp_path), whole(name, tmp_path)
    assert check(config, 4) == [] and config.model.hidden == start.model.hidden


@pytest.mark.parametrize("name", BILLIONS)
def test_a_familys_size_is_the_published_one(name):
    """Padded rows are counted: below 0.3 %."""
    assert parameters(load(CONFIGS / f"{name}.yaml")) / 1e9 == pytest.approx(BILLIONS[name], rel=3e-3)


@pytest.mark.parametrize("name, billions", [("mixtral-8x7b", 12.9), ("qwen3-30b-a3b", 3.3), ("olmoe-1b-7b", 1.3)])
def test_a_token_uses_as_many_parameters_as_published(name, billions):
    assert active_parameters(load(CONFIGS / f"{name}.yaml")) / 1e9 == pytest.approx(billions, abs=0.06)


@pytest.mark.parametrize("name", [name for name in BILLIONS if name.startswith("t5")])
def test_t5s_size_is_that_of_the_released_checkpoint(name):
    assert parameters(load(CONFIGS / f"{name}.yaml")) == round(BILLIONS[name] * 10**9)


def test_bloom_176b_has_the_layout_that_it_was_trained_in():
    config = load(CONFIGS / "bloom-176b.yaml")
    assert str(layout_for(config, 384)) == "TP4×PP12×DP8"
    assert config.padded_vocab() == 250_880 and config.train.batch_ramp == (192, 16, 9_765_625)
    assert config.model.width_of_head() == 128


def test_one_replica_of_the_quickstart_is_what_make_train_starts():
    assert str(layout_for(load(CONFIGS / "quickstart.yaml"), 4)) == "TP2×PP2×DP1"
