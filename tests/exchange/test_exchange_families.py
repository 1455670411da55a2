"""Every family of models: gradients as in transformers, settings that come back, and the keys of both its versions."""

import json

import pytest
import transformers
from hub_checks import differences
from hub_models import MODELS, generator_of, saved

from roots_dist.config.run_config import config_of_run
from roots_dist.storage.exchange import ARCHITECTURES
from roots_dist.storage.exchange.hf_config import config_of, hf_config_of, read_hf_config
from roots_dist.storage.exchange.importing import import_model

TWO_HEADS = ("bert", "electra")
"""Their gradients are compared in tests/reference."""
LEARNED = [name for name in MODELS if name not in TWO_HEADS and "classify" not in name and "untied" not in name]
LEARNED += ["roberta classify", "gemma2 classify"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The folder of a model and its import, made once."""
    made = {}

    def one(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
            theirs = saved(name, folder / "theirs")
            made[name] = theirs, folder / "run", import_model(theirs, folder / "run", generator_of(theirs))
        return made[name]

    return one


@pytest.mark.parametrize("name", LEARNED)
def test_gradients_equal_those_of_transformers(name, imported):
    theirs, run, _ = imported(name)
    found = differences(theirs, run)
    assert found.logits < 1e-5 * max(1.0, found.largest_logit) and found.gradients < 2e-5, found


MADE_HERE = {"_name_or_path", "dtype", "torch_dtype", "transformers_version", "use_cache", "initializer_range"}
IDS = {"pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "id2label", "label2id"}


ADDED = {
    "seq_length", "n_positions", "rope_theta", "partial_rotary_factor", "position_embedding_type", "hidden_activation"
}  # fmt: skip
"""Keys that an export has besides, for version 4 or because the value would otherwise depend on a reader's default."""
OF_NO_EFFECT = {"max_window_layers", "sliding_window_pattern", "_sliding_window_pattern"}
"""layer_types takes their place."""


def settings(tree):
    """What version 5 makes of a config.json, without ids and what it notes for itself."""
    made = transformers.AutoConfig.for_model(**tree).to_dict()
    (made.get("rope_parameters") or {}).pop("type", None)  # version 4's name of rope_type
    return {key: value for key, value in made.items() if key not in MADE_HERE | IDS}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "electra"])
def test_every_key_of_config_json_comes_back(name, imported):
    theirs, run, _ = imported(name)
    tree = json.loads((theirs / "config.json").read_text())
    architecture = ARCHITECTURES[tree["model_type"]]
    config = config_of_run(run).config
    back = json.loads(json.dumps(hf_config_of(config, architecture, architecture.head(tree["architectures"][0]))))
    first, second = settings(tree), settings(back | {"pad_token_id": tree.get("pad_token_id")})
    if "n_inner" in first:  # null is the same, and nothing else says so
        first["n_inner"] = first["n_inner"] or 4 * first["n_embd"]
    if "classify" in name:  # of the head that it does not have
        first.pop("final_logit_softcapping", None), second.pop("final_logit_softcapping", None)
    assert second.keys() - first.keys() <= ADDED and first.keys() - second.keys() <= OF_NO_EFFECT
    shared = first.keys() & second.keys() - OF_NO_EFFECT
    assert {key: first[key] for key in shared} == {key: second[key] for key in shared}


def with_old_keys(tree):
    """A config.json of version 5 as version 4 would have written it."""
    tree = dict(tree)
    given = tree.pop("rope_parameters")
    if "full_attention" in given:
        tree["rope_local_base_freq"] = given["sliding_attention"]["rope_theta"]
        given = given["full_attention"]
    given = dict(given)
    tree["rope_theta"] = given.pop("rope_theta")
    if "partial_rotary_factor" in given:
        tree["partial_rotary_factor"] = given.pop("partial_rotary_factor")
    tree["rope_scaling"] = given if given.get("rope_type", "default") != "default" else None
    return tree


OTHERS = "bloom gpt2 opt gptj bert roberta xlm-roberta camembert distilbert electra t5 mt5"
    "bloom",
    "gpt2",
    "opt",
    "gptj",
    "bert",
    "roberta",
    "xlm-roberta",
    "camembert",
    "distilbert",
    "electra",
    "t5",
    "mt5",
]
ROTARY = [name for name in MODELS if name.split()[0] not in OTHERS.split() and "classify" not in name]


@pytest.mark.parametrize("name", ROTARY)
def test_both_spellings_of_rotary_settings_are_read_and_written(name, imported):
    theirs, run, _ = imported(name)
    tree = json.loads((theirs / "config.json").read_text())
    architecture = ARCHITECTURES[tree["model_type"]]

    def model(tree):
        return config_of(read_hf_config(tree, architecture, "x").values, architecture, "x").model

    new = model(tree)
    assert "rope_parameters" in tree and model(with_old_keys(tree)) == new
    written = hf_config_of(config_of_run(run).config, architecture, architecture.head(tree["architectures"][0]))
    for spelling in (("rope_parameters",), ("rope_scaling", "rope_theta", "rope_local_base_freq")):
        assert model({key: value for key, value in written.items() if key not in spelling}) == new
