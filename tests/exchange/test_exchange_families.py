"""Every family of models: gradients as in transformers, settings that come back, and the keys of both its versions."""

import json
import shutil

import pytest
import torch
import transformers
from hub_checks import differences
from hub_models import MODELS, generator_of, saved, tensors_in
from safetensors.torch import load_file, save_file

from roots_dist.assembly.run import build_run
from roots_dist.checks import checks
from roots_dist.config.init_from import complete_from_model
from roots_dist.config.load import Loaded, to_yaml
from roots_dist.config.run_config import config_of_run
from roots_dist.config.schema import Config
from roots_dist.errors import UserError
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective
from roots_dist.runs.evaluate.check_options import problems
from roots_dist.runs.evaluate.options import EvaluateOptions
from roots_dist.runs.train.init_weights import load_init_weights
from roots_dist.runs.train.origin import write_origin
from roots_dist.storage.exchange import ARCHITECTURES
from roots_dist.storage.exchange.compare import compare, comparison_batch
from roots_dist.storage.exchange.exporting import architecture_for, export_model, origin_of
from roots_dist.storage.exchange.hf_config import config_of, hf_config_of, read_hf_config
from roots_dist.storage.exchange.importing import import_model
from roots_dist.world.mesh import Mesh

TWO_HEADS = ("bert", "electra")
"""Their gradients are compared in tests/reference."""
LEARNED = [name for name in MODELS if name not in TWO_HEADS and not {"classify", "untied", "bare"} & {*name.split()}]
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


NOT_ROTARY = "bloom gpt2 opt gptj bert roberta xlm-roberta camembert distilbert electra t5 mt5"
"""GPT-J is, but has no settings of it."""
ROTARY = [name for name in MODELS if name.split()[0] not in NOT_ROTARY.split() and "classify" not in name]


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


KINDS = {
    "qwen2 windows": ({"max_window_layers": 1}, ("full", "window", "window")),
    "qwen3 windows": ({"max_window_layers": 1}, ("full", "window")),
    "gemma2": ({}, ("window", "full")),
    "gemma3": ({"sliding_window_pattern": 3}, ("window", "window", "full")),
    "olmo3": ({}, ("window", "window", "window", "full")),
    "smollm3": ({"no_rope_layer_interval": 2}, ("full", "nope", "full", "nope", "full")),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_layers_follow_from_older_keys_where_they_are_not_listed(name, imported):
    theirs, _, _ = imported(name)
    more, expected = KINDS[name]
    tree = json.loads((theirs / "config.json").read_text())
    older = {key: value for key, value in tree.items() if key not in ("layer_types", "no_rope_layers")}
    kinds = read_hf_config(older | more, ARCHITECTURES[tree["model_type"]], "x").values["model.layer_kinds"]
    layers = tree["num_hidden_layers"]
    assert [kinds[i % len(kinds)] for i in range(layers)] == [expected[i % len(expected)] for i in range(layers)]


INERT = {
    "_num_labels": 5, "_warp_drive": 7, "max_sequence_length": 2048, "unsloth_version": "2025.1",
    "use_flash_attn": True, "embd_dropout": 0.0, "layer_types": ["full_attention"] * 3,
}  # fmt: skip
ROTARY = {"rope_type": "linear", "factor": 1.0, "rope_theta": 300.0}
SILENT = {"use_sliding_window": False, "rope_parameters": ROTARY, "sliding_window": None}


def changed(folder, to, keys):
    """A copy of the folder whose config.json has these keys too."""
    copy = shutil.copytree(folder, to)
    tree = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(tree | keys))
    return copy


def test_keys_that_change_no_function_are_listed_and_ignored(imported, tmp_path):
    theirs, run, plain = imported("llama")
    assert "ignored" not in plain
    more = INERT | SILENT | {"use_sliding_window": False, "sliding_window": 128, "max_window_layers": 1}
    said = import_model(changed(theirs, tmp_path / "theirs", more), tmp_path / "run")
    listed = said.split("ignored, because they change no function: ")[1].split(";")[0]
    assert set(listed.split(", ")) == {*INERT, "sliding_window", "max_window_layers"}
    assert config_of_run(tmp_path / "run").config.model == config_of_run(run).config.model


def test_a_class_under_its_old_name_is_read(imported, tmp_path):
    theirs, run, _ = imported("t5 v1.0")
    import_model(changed(theirs, tmp_path / "theirs", {"architectures": ["T5WithLMHeadModel"]}), tmp_path / "run")
    assert config_of_run(tmp_path / "run").config.model == config_of_run(run).config.model
    assert origin_of(tmp_path / "run") == "T5ForConditionalGeneration"


def test_a_balance_of_whole_batches_is_not_taken_over_and_an_import_says_so(imported, tmp_path):
    theirs, _, said = imported("mixtral")
    assert "; router_aux_loss_coef = 0.001 is not taken over" in said
    assert "objective.balance_loss=0.002, of each sequence, is as strong" in said, "two experts for each token"
    assert "router" not in import_model(
        changed(theirs, tmp_path / "a", {"router_aux_loss_coef": 0.0}), tmp_path / "run"
    )


def test_layers_that_predict_further_tokens_are_left_out_and_an_import_says_so(imported, tmp_path):
    theirs, run, said = imported("deepseek_v3")
    assert "further tokens" not in said
    copy = changed(theirs, tmp_path / "theirs", {"num_nextn_predict_layers": 1})
    weights = load_file(theirs / "model.safetensors")

    def holds(*further: str) -> None:
        save_file(weights | {name: torch.ones(3) for name in further}, copy / "model.safetensors")

    holds("model.layers.2.enorm.weight", "model.layers.2.eh_proj.weight")
    assert "; without 2 tensors of layers that predict further" in import_model(copy, tmp_path / "run")
    first, second = tensors_in(run), tensors_in(tmp_path / "run")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    holds("model.layers.3.enorm.weight")
    with pytest.raises(UserError, match=r"layers.3.enorm.weight is not part of the model"):
        import_model(copy, tmp_path / "other")


def test_an_export_in_bf16_keeps_the_biases_of_a_choice_in_float32(imported, tmp_path):
    theirs, run, _ = imported("deepseek_v3")
    export_model(run, tmp_path / "back", "bfloat16")
    first, second = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "back"))
    wide = {name for name, w in second.items() if w.dtype == torch.float32}
    assert wide == {name for name in first if name.endswith("e_score_correction_bias")}
    assert all(torch.equal(first[name], second[name]) for name in wide)


def test_a_model_for_long_texts_does_not_make_samples_as_long_and_keeps_its_length(imported, tmp_path):
    theirs, _, _ = imported("llama 3.1")
    import_model(changed(theirs, tmp_path / "theirs", {"max_position_embeddings": 131072}), tmp_path / "run")
    config = config_of_run(tmp_path / "run").config
    assert config.data.seq_length == 4096 and config.model.max_positions == 131072
    short = config.changed({"data.seq_length": 128})
    architecture, head = architecture_for(short, {})
    written = hf_config_of(short, architecture, head)
    assert written["max_position_embeddings"] == 131072
    assert written["rope_scaling"]["original_max_position_embeddings"] == 24


@pytest.mark.parametrize("name", ["mistral", "mistral tag", "qwen2 classify", "opt", "camembert", "distilbert", "mt5"])
def test_an_export_is_of_the_class_that_was_imported(name, imported, tmp_path):
    theirs, run, _ = imported(name)
    export_model(run, tmp_path / "back")
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (theirs, tmp_path / "back"))
    assert second["architectures"] == first["architectures"] and second["model_type"] == first["model_type"]


def test_the_export_of_a_fine_tuned_run_is_of_the_family_that_it_started_from(imported, tmp_path):
    _, run, _ = imported("mistral")
    tuned = config_of_run(run).config.changed({"finetune.init_from": str(run), "objective.name": "classify"})
    (tmp_path / "config.yaml").write_text(to_yaml(tuned.changed({"finetune.labels": ("a", "b")})))
    assert origin_of(run) == origin_of(tmp_path) == "MistralForCausalLM"
    config = config_of_run(tmp_path).config
    assert architecture_for(config, {}, origin_of(tmp_path))[1].architecture == "MistralForSequenceClassification"
    assert architecture_for(config, {})[1].architecture == "LlamaForSequenceClassification"
    biased = config.changed({"model.bias": True})  # which Mistral has not
    assert architecture_for(biased, {}, origin_of(tmp_path))[1].architecture == "LlamaForSequenceClassification"


def test_a_run_that_trains_in_the_folder_of_an_import_is_still_of_its_class(tmp_path):
    run = tmp_path / "run"
    import_model(saved("mistral", tmp_path / "theirs"), run)
    facts = write_origin(run, config_of_run(run).config, Layout(), {})
    assert origin_of(run) == "MistralForCausalLM" and facts["imported_from"] == str(tmp_path / "theirs")


@pytest.mark.parametrize("name", ["gemma2", "granite", "phi", "qwen3", "bert bare", "distilbert bare", "mistral bare"])
def test_an_import_can_be_fine_tuned_for_labels(name, imported):
    """What belongs to its projection over the vocabulary is left behind with it; a stack alone gets a head."""
    _, run, _ = imported(name)
    asked = {"objective": {"name": "classify"}, "finetune": {"init_from": str(run), "labels": ["a", "b"]}}
    loaded = Loaded(Config.model_validate(asked), {"objective.name": "file", "finetune.labels": "file"})
    config = complete_from_model(loaded).config
    assert checks.check(config, 1) == []
    tuned = build_run(config, Mesh.single(), objective=proof_objective(config))
    load_init_weights(tuned)
    batch = comparison_batch(config)
    assert tuned.passes.forward([batch])[0].shape == (2, 2)


def test_a_stack_alone_keeps_its_pooler_and_says_that_it_has_no_labels(imported):
    theirs, run, said = imported("bert bare")
    assert "it has no head: name it as finetune.init_from" in said
    config = config_of_run(run).config
    tuned = config.changed({"finetune.labels": ("a", "b"), "finetune.init_from": str(run)})
    started = build_run(tuned, Mesh.single(), objective=proof_objective(tuned))
    load_init_weights(started)
    pooler = next(p.tensor for p in started.params if p.name == "head.pooler.weight")
    assert torch.equal(pooler, load_file(theirs / "model.safetensors")["pooler.dense.weight"])
    (problem,) = problems(EvaluateOptions(), config)
    assert "this model has no head" in problem.expected and problem.fix.endswith(f"finetune.init_from={run}")


def test_a_discriminator_alone_goes_back_alone(imported, tmp_path):
    theirs, _, _ = imported("electra")
    import_model(theirs, tmp_path / "run")
    assert "without a generator" in export_model(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back" / "generator").exists()
    assert compare(tmp_path / "run", tmp_path / "back").equal
    first, second = (load_file(folder / "model.safetensors") for folder in (theirs, tmp_path / "back"))
    assert first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


ROPE = {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False, "tied_embeddings": False}
DEEPSEEK = dict(
    kv_lora_rank=9, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, rotary_interleaved=True, experts=4,
    expert_ffn=8, shared_expert_ffn=16, normalize_expert_weights=False,
)  # fmt: skip
FEATURES = [
    (dict(qk_norm="head", window=4, layer_kinds=["window", "full"]), "qwen3"),
    (dict(window=4), "mistral"),
    (dict(qk_norm="whole", norm_position="branch"), "olmo2"),
    (dict(layer_kinds=["full", "nope"]), "smollm3"),
    (dict(residual_multiplier=0.5), "granite"),
    (dict(norm="layernorm", norm_affine=False), "olmo"),
    (dict(rope_scaling={"type": "linear", "factor": 2.0}), "llama"),
    (dict(qkv_bias=True), "qwen2"),
    (dict(experts=4), "mixtral"),
    (dict(experts=4, dense_layers=1, expert_every=2, qk_norm="head", expert_ffn=8), "qwen3_moe"),
    (dict(experts=4, qkv_bias=True, shared_expert_ffn=8, shared_expert_gate=True), "qwen2_moe"),
    (dict(experts=4, qk_norm="whole"), "olmoe"),
    (DEEPSEEK, "deepseek_v2"),
    (DEEPSEEK | dict(expert_groups=2, group_score_experts=1), "deepseek_v2"),
    (DEEPSEEK | dict(router_score="sigmoid", router_bias=True, expert_groups=2), "deepseek_v3"),
    (
        DEEPSEEK | dict(expert_groups=2),
        "model.group_score_experts = 2: expected 1 for DeepseekV2ForCausalLM",
    ),
    (DEEPSEEK | dict(shared_expert_ffn=12), "model.shared_expert_ffn = 12: expected 16 for DeepseekV2ForCausalLM"),
    (DEEPSEEK | dict(attention_scale=0.5), "model.attention_scale = 0.5: expected 0.28"),
    (DEEPSEEK | dict(rotary_interleaved=False), "model.rotary_interleaved = False: expected true for DeepseekV2"),
    (
        dict(experts=4, router_score="sigmoid"),
        "model.router_score = 'sigmoid': expected softmax for MixtralForCausalLM",
    ),
    (
        dict(experts=4, routed_scaling_factor=2.0),
        "model.routed_scaling_factor = 2.0: expected 1.0 for MixtralForCausalLM",
    ),
    (dict(experts=4, router_bias=True), "model.router_bias = True: expected false for MixtralForCausalLM"),
    (dict(experts=4, expert_groups=2), "model.expert_groups = 2: expected 1 for MixtralForCausalLM"),
    (dict(experts=4, shared_expert_ffn=8), "expected null for MixtralForCausalLM"),
    (dict(out_bias=True), "model.out_bias = True: expected false, as model.qkv_bias is, for LlamaForCausalLM"),
    (dict(attention_scale=0.3, qk_norm="head"), "model.attention_scale = 0.3: expected 0.3535"),
    (dict(qk_norm="whole"), "model.qk_norm = 'whole': expected none for LlamaForCausalLM"),
    (
        dict(window=4, layer_kinds=["window", "nope"]),
        "model.layer_kinds = ('window', 'nope'): expected only full for Llama",
    ),
    (dict(attention_softcap=5.0), "model.attention_softcap = 5.0: expected null for LlamaForCausalLM"),
    (dict(logits_scaling=2.0, qk_norm="head"), "model.logits_scaling = 2.0: expected 1.0 for Qwen3ForCausalLM"),
    (dict(rotary_interleaved=True), "model.rotary_interleaved = True: expected false for LlamaForCausalLM"),
    (dict(head_bias=True), "model.head_bias = True: expected false for LlamaForCausalLM"),
    (dict(rotary_fraction=0.5, mlp_bias=True), "model.rotary_fraction = 0.5: expected 1.0 for LlamaForCausalLM"),
]


@pytest.mark.parametrize("model, expected", FEATURES, ids=[str(model) for model, _ in FEATURES])
def test_no_feature_is_lost_in_an_export(model, expected):
    config = Config.model_validate({"model": dict(layers=2, hidden=24, heads=3, vocab=97) | ROPE | model})
    assert not checks.check(config, 1)
    if expected in ARCHITECTURES:
        assert architecture_for(config, {})[0].model_type == expected
        return
    with pytest.raises(UserError) as error:
        architecture_for(config, {})
    assert expected in error.value.cli_message()


def test_every_class_of_a_table_is_one_of_transformers():
    for architecture in ARCHITECTURES.values():
        for head in architecture.heads:
            assert hasattr(transformers, head.architecture)
