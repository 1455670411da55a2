"""Files config.json as released models have them, with keys that their classes do not read: each is imported as what it
says."""

import re

import pytest

from roots_dist.errors import UserError
from roots_dist.storage.exchange import ARCHITECTURES
from roots_dist.storage.exchange.hf_config import config_of, read_hf_config

NOTES = {
    "_name_or_path": "x", "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.02, "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0", "use_cache": True,
}  # fmt: skip
LLAMA_3_1 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
RELEASED = {
    "Llama-3.1-8B": (
        {
            "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
            "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
            "rope_scaling": LLAMA_3_1 | {"original_max_position_embeddings": 8192}, "tie_word_embeddings": False,
            "vocab_size": 128256,
        },
        {"rope_theta": 500000.0, "max_positions": 131072, "bias": False, "kv_heads": 8},
    ),
    "DeepSeek-V2-Lite": (
        {
            "model_type": "deepseek_v2", "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
            "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}, "first_k_dense_replace": 1,
            "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 10944, "kv_lora_rank": 512,
            "max_position_embeddings": 163840, "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1,
            "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": False, "num_attention_heads": 16,
            "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16, "pretraining_tp": 1,
            "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                "original_max_position_embeddings": 4096, "type": "yarn",
            },
            "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True,
            "tie_word_embeddings": False, "topk_group": 1, "topk_method": "greedy", "v_head_dim": 128,
            "vocab_size": 102400,
        },
        {"kv_lora_rank": 512, "q_lora_rank": None, "shared_expert_ffn": 2816, "dense_layers": 1, "bias": False},
    ),
    "DeepSeek-V3": (  # without its quantization_config
        {
            "model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0, "aux_loss_alpha": 0.001,
            "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
            "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
            "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
            "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8,
            "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "pretraining_tp": 1,
            "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
            "rope_scaling": {
                "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                "original_max_position_embeddings": 4096, "type": "yarn",
            },
            "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
            "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128,
            "vocab_size": 129280,
        },
        {"q_lora_rank": 1536, "experts": 256, "groups_per_token": 4, "group_score_experts": 2, "router_bias": True},
    ),
    "deepseek-coder-6.7b": (
        {
            "model_type": "llama", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 11008,
            "max_position_embeddings": 16384, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": {"factor": 4.0,
            "type": "linear"}, "rope_theta": 100000, "tie_word_embeddings": False, "vocab_size": 32256,
        },
        {"rope_theta": 100000, "max_positions": 16384},
    ),
    "Mistral-7B-v0.1": (
        {
            "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
            "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
            "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
            "tie_word_embeddings": False, "vocab_size": 32000,
        },
        {"window": 4096, "layer_kinds": (), "bias": False},
    ),
    "Phi-3-mini-4k-instruct": (
        {
            "model_type": "phi3", "attention_bias": False, "attention_dropout": 0.0, "embd_pdrop": 0.0,
            "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
            "original_max_position_embeddings": 4096, "pad_token_id": 32000, "resid_pdrop": 0.0,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "sliding_window": 2047,
            "tie_word_embeddings": False, "vocab_size": 32064,
            "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
        },
        {"window": 2047, "rope_scaling": None, "rotary_fraction": 1.0},
    ),
    "Qwen2.5-7B": (
        {
            "model_type": "qwen2", "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 3584,
            "intermediate_size": 18944, "max_position_embeddings": 131072, "max_window_layers": 28,
            "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": False, "use_mrope": False,
            "use_sliding_window": False, "vocab_size": 152064,
        },
        {"window": None, "layer_kinds": (), "qkv_bias": True, "out_bias": False, "mlp_bias": False},
    ),
    "Qwen3-8B": (
        {
            "model_type": "qwen3", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 128,
            "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960,
            "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
            "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
        },
        {"qk_norm": "head", "head_dim": 128, "bias": False},
    ),
    "gemma-2b": (
        {
            "model_type": "gemma", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 256,
            "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048, "intermediate_size": 16384,
            "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 18,
            "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "vocab_size": 256000,
            "pad_token_id": 0, "rope_scaling": None,
        },
        {"embedding_multiplier": 2048**0.5, "zero_centered_norm": True, "activation": "geglu", "tied_embeddings": True},
    ),
    "gemma-2-27b": (
        {
            "model_type": "gemma2", "attention_bias": False, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
            "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 128,
            "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 4608,
            "intermediate_size": 36864, "max_position_embeddings": 8192, "num_attention_heads": 32,
            "num_hidden_layers": 46, "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "rms_norm_eps": 1e-06,
            "rope_theta": 10000.0, "sliding_window": 4096, "sliding_window_size": 4096, "vocab_size": 256000,
        },
        {"attention_scale": 144**-0.5, "layer_kinds": ("window", "full"), "window": 4096, "logit_softcap": 30.0},
    ),
    "gemma-3-1b": (
        {
            "model_type": "gemma3_text", "attention_bias": False, "attention_dropout": 0.0,
            "attn_logit_softcapping": None, "cache_implementation": "hybrid", "final_logit_softcapping": None,
            "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
            "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
            "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
            "sliding_window_pattern": 6, "vocab_size": 262144,
        },
        {
            "attention_scale": None, "layer_kinds": ("window",) * 5 + ("full",), "window_rope_theta": 10000,
            "rope_theta": 1000000, "attention_softcap": None,
        },
    ),
    "starcoder2-3b": (
        {
            "model_type": "starcoder2", "activation_function": "gelu", "attention_dropout": 0.1,
            "attention_softmax_in_fp32": True, "embedding_dropout": 0.1, "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": 3072, "intermediate_size": 12288, "layer_norm_epsilon": 1e-05,
            "max_position_embeddings": 16384, "mlp_type": "default", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
            "num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2, "residual_dropout": 0.1,
            "rope_theta": 999999.4420358813, "scale_attention_softmax_in_fp32": True, "scale_attn_weights": True,
            "sliding_window": 4096, "use_bias": True, "vocab_size": 49152,
        },
        {"window": 4096, "bias": True, "tied_embeddings": True, "dropout": 0.1},
    ),
    "falcon-40b": (
        {
            "model_type": "falcon", "alibi": False, "apply_residual_connection_post_layernorm": False,
            "attention_dropout": 0.0, "bias": False, "hidden_dropout": 0.0, "hidden_size": 8192,
            "layer_norm_epsilon": 1e-05, "multi_query": True, "new_decoder_architecture": True,
            "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8, "parallel_attn": True,
            "vocab_size": 65024,
        },
        {"branches": "parallel", "kv_heads": 8, "bias": False},
    ),
    "gpt-j-6b": (
        {
            "model_type": "gptj", "activation_function": "gelu_new", "attn_pdrop": 0.0, "embd_pdrop": 0.0,
            "gradient_checkpointing": False, "layer_norm_epsilon": 1e-05, "n_embd": 4096, "n_head": 16,
            "n_inner": None, "n_layer": 28, "n_positions": 2048, "resid_pdrop": 0.0, "rotary": True, "rotary_dim": 64,
            "scale_attn_weights": True, "summary_type": "cls_index", "tie_word_embeddings": False,
            "tokenizer_class": "GPT2Tokenizer", "vocab_size": 50400,
        },
        {"rotary_fraction": 0.25, "rotary_interleaved": True, "head_bias": True, "qkv_bias": False, "mlp_bias": True},
    ),
    "phi-2": (
        {
            "model_type": "phi", "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "gelu_new",
            "hidden_size": 2560, "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
            "partial_rotary_factor": 0.4, "qk_layernorm": False, "resid_pdrop": 0.1, "rope_scaling": None,
            "rope_theta": 10000.0, "tie_word_embeddings": False, "vocab_size": 51200,
        },
        {"rotary_fraction": 0.4, "branches": "parallel_one_norm", "bias": True, "dropout": 0.1},
    ),
    "pythia-6.9b": (
        {
            "model_type": "gpt_neox", "hidden_act": "gelu", "hidden_size": 4096, "intermediate_size": 16384,
            "layer_norm_eps": 1e-05, "max_position_embeddings": 2048, "num_attention_heads": 32,
            "num_hidden_layers": 32, "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
            "use_parallel_residual": True, "vocab_size": 50432,
        },
        {"rotary_fraction": 0.25, "branches": "parallel", "bias": True},
    ),
    "SmolLM3-3B": (
        {
            "model_type": "smollm3", "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
            "hidden_size": 2048, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
            "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
            "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36,
            "num_key_value_heads": 4, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
            "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
        },
        {"layer_kinds": ("full", "full", "full", "nope"), "tied_embeddings": True},
    ),
    "opt-125m": (
        {
            "model_type": "opt", "_remove_final_layer_norm": False, "activation_dropout": 0.0,
            "activation_function": "relu", "attention_dropout": 0.0, "do_layer_norm_before": True, "dropout": 0.1,
            "ffn_dim": 3072, "hidden_size": 768, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048,
            "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "prefix": "</s>",
            "vocab_size": 50272, "word_embed_proj_dim": 768,
        },
        {"activation": "relu", "max_positions": 2048, "dropout": 0.1},
    ),
    "distilbert-base-uncased": (
        {
            "model_type": "distilbert", "activation": "gelu", "attention_dropout": 0.1, "dim": 768, "dropout": 0.1,
            "hidden_dim": 3072, "max_position_embeddings": 512, "n_heads": 12, "n_layers": 6, "pad_token_id": 0,
            "qa_dropout": 0.1, "seq_classif_dropout": 0.2, "sinusoidal_pos_embds": False, "tie_weights_": True,
            "vocab_size": 30522,
        },
        {"segments": 0, "family": "bert"},
    ),
}  # fmt: skip
IGNORED = {
    "SmolLM3-3B": ("max_window_layers", "layer_types"),
    "opt-125m": ("activation_dropout",),
}


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_config_json_is_read_as_what_it_says(name):
    tree, expected = RELEASED[name]
    architecture = ARCHITECTURES[tree["model_type"]]
    values, ignored = read_hf_config(NOTES | tree, architecture, name)
    assert ignored == IGNORED.get(name, ())
    values["objective.name"] = architecture.heads[0].objectives[0]
    model = config_of(values, architecture, name).model
    assert {key: getattr(model, key) for key in expected} == expected
    if name == "Llama-3.1-8B":
        assert model.rope_scaling.type == "llama3" and model.rope_scaling.original_length == 8192
        assert model.rope_scaling.factor == 8.0


DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
LINEAR = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA_3 = LLAMA_3_1 | {"original_max_position_embeddings": 8192}
TWO_PLACES = {
    "yarn beside what transformers 5 wrote": (
        "qwen3", {"rope_parameters": DEFAULT, "rope_scaling": YARN},
        "rope_scaling.rope_type = 'yarn': expected the same as rope_parameters.rope_type = 'default'",
    ),
    "no rule beside one": (
        "llama", {"rope_scaling": {"rope_type": "default"}, "rope_parameters": LINEAR | {"rope_theta": 9e3}},
        "rope_scaling.rope_type = 'default': expected the same as rope_parameters.rope_type = 'linear'",
    ),
    "the base beside the nested one": (
        "llama", {"rope_theta": 300.0, "rope_parameters": DEFAULT},
        "rope_theta = 300.0: expected the same as rope_parameters.rope_theta = 1000000.0",
    ),
    "the base of one place only": (
        "llama", {"rope_scaling": LINEAR, "rope_parameters": LINEAR | {"rope_theta": 9e3}},
        "rope_scaling.rope_theta = None: expected the same as rope_parameters.rope_theta = 9000.0",
    ),
    "two factors": (
        "llama", {"rope_theta": 9e3, "rope_scaling": LINEAR, "rope_parameters": LINEAR | {"factor": 2.0}},
        "rope_scaling.factor = 4.0: expected the same as rope_parameters.factor = 2.0",
    ),
    "two lengths": (
        "llama", {"rope_scaling": LLAMA_3, "original_max_position_embeddings": 64},
        "original_max_position_embeddings = 64: expected the same as rope_scaling.original_max_position_embeddings = 8",
    ),
    "a share beside the nested one": (
        "phi", {"rope_parameters": DEFAULT | {"partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.5},
        "partial_rotary_factor = 0.5: expected the same as rope_parameters.partial_rotary_factor = 0.25",
    ),
    "the base of window layers": (
        "gemma3_text", {"rope_local_base_freq": 5e3, "rope_parameters": {
            "full_attention": DEFAULT, "sliding_attention": DEFAULT | {"rope_theta": 1e4}}},
        "rope_local_base_freq = 5000.0: expected the same as rope_parameters.sliding_attention.rope_theta = 10000.0",
    ),
    "kinds of layers in rope_scaling": (
        "gemma3_text", {"rope_scaling": {"full_attention": LINEAR}},
        "rope_scaling = {'full_attention': {'rope_type': 'linear', 'factor': 4.0}}: expected the settings of one rule",
    ),
    "the name of a rule alone": (
        "llama", {"rope_scaling": "yarn"},
        "rope_scaling = 'yarn': expected an object with the settings of a rule, or null. Fix: write",
    ),
    "a list of settings": ("qwen3", {"rope_parameters": [DEFAULT]}, "rope_parameters = [{'rope_type': 'default', "),
    "no settings of a kind": (
        "gemma3_text", {"rope_parameters": {"full_attention": DEFAULT, "sliding_attention": "none"}},
        "rope_parameters.sliding_attention = 'none': expected an object with the settings of a rule, or null",
    ),
    "both names of a share": (
        "gpt_neox", {"rotary_pct": 0.25, "partial_rotary_factor": 0.5},
        "rotary_pct = 0.25: expected the same as partial_rotary_factor = 0.5",
    ),
    "both names of a base": (
        "gpt_neox", {"rotary_emb_base": 10000, "rope_theta": 300.0},
        "rotary_emb_base = 10000: expected the same as rope_theta = 300.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TWO_PLACES)
def test_a_rotary_setting_with_two_values_or_of_another_kind_is_refused_by_its_keys(case):
    """Each version of transformers reads another place, so that no reading of two values would be right for all."""
    kind, tree, told = TWO_PLACES[case]
    with pytest.raises(UserError, match=re.escape(told)) as error:
        read_hf_config(tree, ARCHITECTURES[kind], "config.json")
    assert ". Fix: " in str(error.value) and "\n" not in str(error.value)


def test_a_rotary_setting_may_stand_twice_with_one_value():
    def read(kind, **tree):
        values = read_hf_config(tree, ARCHITECTURES[kind], "config.json").values
        return values["model.rope_theta"], values.get("model.rope_scaling")

    both = {"rope_scaling": YARN, "rope_parameters": YARN | {"rope_theta": 1e6, "beta_fast": 32}, "rope_theta": 1000000}
    assert read("llama", **both) == (1e6, {"type": "yarn", "factor": 4.0, "beta_fast": 32, "original_length": 16})
    assert read("llama", rope_scaling={"type": "default"}, rope_parameters=DEFAULT, rope_theta=1e6) == (1e6, None)
    assert read("llama", rope_scaling={}, rope_parameters=DEFAULT) == (1e6, None)
    kinds = {"full_attention": LINEAR | {"rope_theta": 1e6}, "sliding_attention": DEFAULT | {"rope_theta": 1e4}}
    assert read("gemma3_text", rope_scaling=LINEAR, rope_parameters=kinds) == (1e6, {"type": "linear", "factor": 4.0})
    assert read("gpt_neox", rotary_emb_base=500, rope_theta=500.0)[0] == 500


OTHER_KINDS = {
    "one kind for all": ("qwen3", {"layer_types": "full_attention"}, "layer_types = 'full_attention': expected no"),
    "kinds of two layers": ("gemma2", {"layer_types": ["full_attention"] * 2}, "expected a list of 3, the kind of"),
    "kinds of four layers": ("smollm3", {"no_rope_layers": [1] * 4}, "no_rope_layers = [1, 1, 1, 1]: expected a"),
    "a truth as text": ("llama", {"tie_word_embeddings": "false"}, "tie_word_embeddings = 'false': expected no text"),
    "a number as text": ("llama", {"rope_theta": "10000.0"}, "rope_theta = '10000.0': expected no text there"),
    "a factor as text": (
        "llama", {"rope_scaling": LINEAR | {"factor": "4"}}, "rope_scaling.factor = '4': expected no text there",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", OTHER_KINDS)
def test_a_setting_of_another_kind_is_refused_by_its_key(case):
    """Where transformers reads something else than it says, as true for the text false, or fails."""
    kind, tree, told = OTHER_KINDS[case]
    with pytest.raises(UserError, match=re.escape(told)) as error:
        read_hf_config(SIZES | {"num_hidden_layers": 3} | tree, ARCHITECTURES[kind], "config.json")
    assert ". Fix: " in str(error.value) and "\n" not in str(error.value)


def test_the_other_name_of_an_activation_is_read():
    values = read_hf_config(SIZES | {"hidden_act": "swish"}, ARCHITECTURES["llama"], "config.json").values
    assert values["model.activation"] == "swiglu"


@pytest.mark.parametrize("length", [0, None])
def test_an_original_length_that_is_none_is_refused(length):
    for place in ({}, {"original_max_position_embeddings": length}):
        rule = LLAMA_3_1 | ({} if place else {"original_max_position_embeddings": length})
        values = read_hf_config({"rope_scaling": rule} | place, ARCHITECTURES["llama"], "config.json").values
        with pytest.raises(UserError, match="config.json: rope_scaling"):
            config_of(values, ARCHITECTURES["llama"], "config.json")


SIZES = {"hidden_size": 64, "num_attention_heads": 4}
UNREAD = {
    "Qwen3-Coder-30B-A3B": (
        "qwen3_moe", {"qkv_bias": False, "shared_expert_intermediate_size": 0, "use_qk_norm": True},
        {"qkv_bias": True, "shared_expert_intermediate_size": 8, "use_qk_norm": False},
    ),
    "Phi-4-mini": (
        "phi3", {"full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False},
        {"full_attn_mod": 2, "interpolate_factor": 2, "lm_head_bias": True, "mlp_bias": True},
    ),
    "Falcon3-7B": ("llama", {"activation": "swiglu"}, {"activation": "relu"}),
    "falcon-11B": ("falcon", {"ff_factor": 4}, {"ff_factor": 2}),
    "galactica-1.3b": (
        "opt", {"learned_embeddings": True, "scale_embeddings": False},
        {"learned_embeddings": False, "scale_embeddings": True},
    ),
    "dolly-v2-3b": ("gpt_neox", {"custom_pipelines": {"text-generation": {"impl": "x"}}}, {}),
    "a cross-encoder": ("bert", {"sbert_ce_default_activation_function": "x", "sentence_transformers": {"a": 1}}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_keys_that_no_class_reads_are_taken_at_the_value_that_is_computed(name):
    kind, said, others = UNREAD[name]
    read_hf_config(SIZES | said, ARCHITECTURES[kind], "config.json")
    for key, value in others.items():
        with pytest.raises(UserError, match=f"config.json: {key} = .*: the only supported value. Fix: "):
            read_hf_config(SIZES | said | {key: value}, ARCHITECTURES[kind], "config.json")


def test_the_first_name_of_longrope_is_read():
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    tree = SIZES | {"original_max_position_embeddings": 4096, "rope_scaling": factors | {"type": "su"}}
    values = read_hf_config(tree, ARCHITECTURES["phi3"], "config.json").values
    assert values["model.rope_scaling"] == {"type": "longrope", "original_length": 4096} | factors
