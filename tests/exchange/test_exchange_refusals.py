"""What cannot be the same model is refused in one line that names it, before anything is written."""

import json
import math
import shutil

import pytest
import torch
import transformers
from hub_models import SPECIALS, saved, tensors_in, tokenizer
from safetensors.torch import load_file, save_file

from roots_dist.cli.main import main
from roots_dist.errors import UserError
from roots_dist.learning.data.tokenizer import load
from roots_dist.storage.exchange import ARCHITECTURES
from roots_dist.storage.exchange.exporting import export_model
from roots_dist.storage.exchange.hf_config import labels_of
from roots_dist.storage.exchange.importing import import_model


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One of each, to be copied and spoilt."""
    made = {}

    def original(name):
        if name not in made:
            made[name] = saved(name, tmp_path_factory.mktemp("originals") / name.replace(" ", "_"))
        return made[name]

    return original


def refused(folder, run, generator=None) -> str:
    with pytest.raises(UserError) as error:
        import_model(folder, run, generator)
    assert not run.exists() and [p.name for p in run.parent.iterdir()] == [folder.name]
    text = error.value.cli_message()
    assert text.startswith("✗ ") and text.count("\n") == 0 and "Fix: " in text
    return text


KEYS = [
    ("gpt2", "scale_attn_by_inverse_layer_idx", True, "scale_attn_by_inverse_layer_idx = True: expected false"),
    ("gpt2", "scale_attn_weights", False, "scale_attn_weights = False: expected true"),
    ("gpt2", "add_cross_attention", True, "add_cross_attention = True: expected false"),
    ("gpt2", "activation_function", "silu", "activation_function = 'silu': expected gelu_new or gelu_pytorch_tanh"),
    ("gpt2", "pruned_heads", {"1": [0]}, "pruned_heads = {'1': [0]}: expected {}"),
    ("gpt2", "embd_pdrop", 0.3, "embd_pdrop = 0.3: expected the same as resid_pdrop = 0.1"),
    ("gpt2", "warp_drive", 7, "warp_drive = 7: expected a known key of model type gpt2"),
    ("gpt2", "use_alibi", True, "use_alibi = True: expected a known key of model type gpt2"),
    ("gpt2", "warp\ndrive", 7, "warp\\ndrive = 7: expected a known key"),
    ("gpt2", "n_layer", "three", "n_layer = 'three': expected no text there, but a number"),
    ("gpt2", "architectures", ["GPT2DoubleHeadsModel"], "= 'GPT2DoubleHeadsModel': expected one of GPT2LMHeadModel"),
    ("gpt2", "model_type", "mamba", "model_type = 'mamba': expected 'gpt2', as GPT2LMHeadModel has. Fix: write"),
    ("gpt2", "model_type", None, "model_type = None: expected 'gpt2', as GPT2LMHeadModel has"),
    ("llama", "model_type", "LLaMA", "model_type = 'LLaMA': expected 'llama', as LlamaForCausalLM has"),
    ("llama", "model_type", "bart", "'bart': expected a model type that is read, and this one is not. Fix"),
    ("llama", "model_type", "gemma3", "text = Gemma3ForCausalLM(model.config.text_config); text.model = model.model"),
    ("llama", "model_type", "RefinedWebModel", "expected 'falcon', as the class of transformers calls it. Fix: use"),
    ("gpt2", "architectures", None, "architectures = None: expected one of GPT2LMHeadModel"),
    ("gpt2", "architectures", {"a": 1}, "architectures = {'a': 1}: expected one of GPT2LMHeadModel"),
    ("gpt2", "model_type", ["gpt2"], "model_type = ['gpt2']: expected 'gpt2', as"),
    ("gpt2", "n_layer", 10**9, "= 1000000000: expected less than or equal to 16384"),
    ("mistral", "num_hidden_layers", 10**9, "= 1000000000: expected less than or equal to 16384"),
    ("qwen2", "num_hidden_layers", 10**9, "= 1000000000: expected less than or equal to 16384"),
    ("gpt2", "n_layer", 2, "tensor transformer.h.2.attn.c_attn.bias is not part of the model"),
    ("gpt2", "n_layer", 4, "tensor transformer.h.3.ln_1.weight is missing"),
    ("gpt2", "n_inner", 60, "mlp.c_fc.weight has shape (24, 56): expected (24, 60)"),
    ("gpt2", "quantization_config", {"bits": 4}, (
"quantization_config = {'bits': 4}: expected null: the only supported value. Fix: take the weights it was made from"
)),
    ("llama", "rope_parameters", {"rope_type": "dynamic", "factor": 8.0}, (
"rope_type = 'dynamic': expected default, linear, llama3, yarn or longrope"
)),
    ("llama", "rope_parameters", {"type": "linear", "factor": 0.5}, "rope_scaling.factor = 0.5: expected greater"),
    ("llama", "rope_parameters", {"type": "yarn", "factor": 2.0, "warp": 1}, (
"rope_scaling.warp = 1: expected no such setting, for yarn has factor, original_max_position_embeddings, beta_fast,"
)),
    ("llama", "rope_parameters", {"rope_type": "linear"}, (
"rope_scaling.factor = None: expected a value, which linear needs. Fix: add it."
)),
    ("llama", "num_key_value_heads", 4, "config.json: num_key_value_heads): expected a divisor of model.heads"),
    ("llama", "attention_bias", True, "tensor model.layers.0.self_attn.q_proj.bias is missing"),
    ("llama", "partial_rotary_factor", 0.5, "partial_rotary_factor = 0.5: expected 1.0"),
    ("llama", "layer_types", ["full_attention", "sliding_attention"], "expected a known key of model type llama"),
    ("llama", "use_sliding_window", True, "use_sliding_window = True: expected false"),
    ("llama", "ffn_dropout", 0.1, "ffn_dropout = 0.1: expected a known key of model type llama"),
    ("llama", "hidden_act", "relu", "hidden_act = 'relu': expected silu"),
    ("llama", "rope_interleaved", True, "rope_interleaved = True: expected false"),
    ("llama", "sliding_window", 128, "sliding_window = 128: expected null"),
    ("gpt_neox tied", "use_parallel_residual", None, "use_parallel_residual = None: expected true or false"),
    ("falcon", "alibi", True, "alibi = True: expected false"),
    ("falcon", "parallel_attn", False, "tensor transformer.h.0.post_attention_layernorm.weight is missing"),
    ("gptj", "rotary_dim", 5, "expected an even number of channels of model.head_dim = 12, not 5"),
    ("gptj", "rotary_dim", None, "rotary_dim = None: expected a valid number"),
    ("phi", "qk_layernorm", True, "qk_layernorm = True: expected false"),
    ("deepseek_v2", "norm_topk_prob", True, "norm_topk_prob = True: expected false: the only supported value"),
    ("deepseek_v2", "topk_method", "noaux_tc", "expected greedy or group_limited_greedy: the only supported value"),
    ("deepseek_v2", "num_key_value_heads", 3, "num_key_value_heads = 3: expected num_attention_heads"),
    ("deepseek_v2", "attention_bias", True, "attention_bias = True: expected false"),
    ("deepseek_v2", "q_lora_rank", 8, "self_attn.q_proj.weight is not part of the model"),
    ("deepseek_v2", "kv_lora_rank", 24, "has shape (24, 48): expected (28, 48)"),
    ("deepseek_v2", "v_head_dim", 12, "config.json: v_head_dim): expected at most model.qk_nope_head_dim"),
    ("deepseek_v2", "qk_rope_head_dim", 3, "config.json: qk_rope_head_dim): expected an even number"),
    ("deepseek_v2", "n_shared_experts", 0, "n_shared_experts = 0: expected greater than or equal to 1"),
    ("deepseek_v2 groups", "n_group", 4, "config.json: n_group): expected a divisor of model.experts = 6"),
    ("deepseek_v3", "scoring_func", "softmax", "scoring_func = 'softmax': expected sigmoid"),
    ("qwen3_moe", "mlp_only_layers", [1], "mlp_only_layers = [1]: expected the first layers, as [0, 1]"),
    ("qwen2_moe", "use_sliding_window", True, "use_sliding_window = True: expected false"),
    ("olmoe", "clip_qkv", 8.0, "clip_qkv = 8.0: expected null"),
    ("mixtral", "router_jitter_noise", 0.1, "router_jitter_noise = 0.1: expected 0.0"),
    ("mixtral", "num_local_experts", 10**9, "expected at most"),
    ("mixtral", "num_local_experts", 5, "block_sparse_moe.gate.weight has shape (4, 48): expected (5, 48)"),
    ("opt", "do_layer_norm_before", False, "do_layer_norm_before = False: expected true"),
    ("opt", "_remove_final_layer_norm", True, "_remove_final_layer_norm = True: expected false"),
    ("opt", "enable_bias", False, "enable_bias = False: expected true"),
    ("opt", "word_embed_proj_dim", 12, "word_embed_proj_dim = 12: expected the same as hidden_size = 36"),
    ("roberta", "pad_token_id", 0, "pad_token_id = 0: expected 1"),
    ("roberta", "hidden_act", "relu", "hidden_act = 'relu': expected gelu"),
    ("distilbert", "activation", "silu", "activation = 'silu': expected gelu_new"),
    ("qwen3", "layer_types", ["full_attention", "chunked"], "layer_types = 'chunked': expected 'full'"),
    ("phi3", "rope_parameters", {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0] * 4}, "factor: 1"),
    ("smollm3", "use_sliding_window", True, "use_sliding_window = True: expected false"),
    ("gemma", "hidden_act", "relu", "hidden_act = 'relu': expected gelu_pytorch_tanh"),
    ("gemma2", "use_bidirectional_attention", True, "use_bidirectional_attention = True: expected null"),
    ("gemma3", "rope_parameters", {"full_attention": {}, "sliding_attention": {"rope_type": "linear", "factor": 2.0}}, (
"sliding_attention = {'rope_type': 'linear', 'factor': 2.0}: expected a known key"
)),
    ("olmo", "clip_qkv", 8.0, "clip_qkv = 8.0: expected null"),
    ("stablelm", "qk_layernorm", True, "qk_layernorm = True: expected false"),
    ("stablelm", "use_parallel_residual", True, "post_attention_layernorm.bias is not part of the model"),
    ("starcoder2", "norm_type", "rms_norm", "norm_type = 'rms_norm': expected layer_norm"),
    ("mt5", "feed_forward_proj", "relu", "dense_act_fn = 'gelu_new': expected the same as feed_forward_proj = 'relu'"),
    ("bloom", "apply_residual_connection_post_layernorm", True, "post_layernorm = True: expected false"),
    ("bert words", "position_embedding_type", "relative_key", (
"position_embedding_type = 'relative_key': expected absolute"
)),
    ("bert words", "is_decoder", True, "is_decoder = True: expected false"),
    ("bert words", "hidden_act", "swish", "hidden_act = 'swish': expected gelu_new"),
    ("bert classify", "problem_type", "regression", "problem_type = 'regression': expected single_label"),
    ("bert classify", "id2label", {"0": "score"}, "id2label = {'0': 'score'}: expected the names of outputs 0, 1"),
    ("t5 v1.0", "feed_forward_proj", "gated-relu", "feed_forward_proj = 'gated-relu': expected relu or gated-gelu"),
    ("t5 v1.0", "scale_decoder_outputs", False, "tensor lm_head.weight is missing"),
    ("t5 v1.0", "dense_act_fn", "silu", "dense_act_fn = 'silu': expected the same as feed_forward_proj = 'relu'"),
    ("mt5", "dense_act_fn", "gelu", "feed_forward_proj = 'gated-gelu': it means 'gelu_new'"),
    ("mt5", "is_gated_act", False, "is_gated_act = False: expected the same as feed_forward_proj = 'gated-gelu'"),
    ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}, (
"rope_scaling.rope_type = 'yarn': expected the same as rope_parameters.rope_type = 'default': transformers reads "
"rope_scaling alone where there are both, rope_theta included. Fix: write the rule into rope_parameters, beside its "
"rope_theta, and remove rope_scaling."
)),
    ("gpt2", "n_positions", 10**30, "whole numbers of at most 2,147,483,647. Fix: use the config.json that"),
    ("gpt2", "vocab_size", 10**30, "expected less than or equal to 16777216. Fix: use the config.json that belongs"),
    ("llama", "hidden_size", 10**18, "config.json: hidden_size = 1000000000000000000: expected less than or equal to"),
    ("opt", "word_embed_proj_dim", 0, "word_embed_proj_dim = 0: expected the same as hidden_size = 36"),
]  # fmt: skip


@pytest.mark.parametrize("name, key, value, told", KEYS, ids=[f"{n}: {k}={v}" for n, k, v, _ in KEYS])
def test_a_config_that_says_something_else_is_refused_by_its_key(name, key, value, told, originals, tmp_path):
    folder = shutil.copytree(originals(name), tmp_path / "theirs")
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(tree | {key: value}))
    assert told in refused(folder, tmp_path / "run")


def spoil(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


LAST, WORDS = "transformer.ln_f.bias", "transformer.wte.weight"
TENSORS = {
    "missing": (lambda t: t.pop(LAST), f"tensor {LAST} is missing"),
    "extra": (
        lambda t: t.update({"transformer.adapter": torch.ones(3)}),
        "tensor transformer.adapter is not part of the model",
    ),
    "shape": (lambda t: t.update({LAST: torch.zeros(7)}), f"tensor {LAST} has shape (7,): expected (24,)"),
    "dtype": (
        lambda t: t.update({LAST: torch.zeros(24).char()}),
        f"tensor {LAST} has dtype I8: expected one of F32, F16, BF16. Fix: take the weights it was made from",
    ),
    "double": (
        lambda t: t.update({LAST: torch.zeros(24).double()}),
        f"tensor {LAST} has dtype F64: expected one of F32, F16, BF16. Fix: save it in one dtype: model.to(torch",
    ),
    "quantised": (
        lambda t: t.update({"transformer.h.0.mlp.c_fc.qweight": torch.zeros(3)}),
        "qweight is not part of the model that config.json describes. Fix: take the weights it was made from",
    ),
    "adapted": (
        lambda t: t.update({f"base_model.model.{name}": t.pop(name) for name in list(t)}),
        "describes. Fix: merge the adapter into its base model",
    ),
    "compiled": (
        lambda t: t.update({f"_orig_mod.{name}": t.pop(name) for name in list(t)}),
        "describes. Fix: save the model itself",
    ),
    "not a number": (lambda t: t[LAST].__setitem__(3, math.nan), f"tensor {LAST} holds NaN or infinity"),
    "infinite": (lambda t: t.update({LAST: t[LAST].half() / 0}), f"tensor {LAST} holds NaN or infinity"),
    "infinite at one end": (lambda t: t[LAST].__setitem__(3, math.inf), f"tensor {LAST} holds NaN or infinity"),
    "not a number, tied": (
        lambda t: t.update({WORDS: t[WORDS] * math.nan, "lm_head.weight": t[WORDS] * math.nan}),
        f"tensor {WORDS} holds NaN or infinity: expected numbers. Fix: get the files again",
    ),
    "tied in two dtypes": (
        lambda t: t.update({"lm_head.weight": t[WORDS].bfloat16()}),
        f"tensor lm_head.weight (BF16) differs from {WORDS} (F32): expected the same",
    ),
    "under two names": (lambda t: t.update({LAST.removeprefix("transformer."): t[LAST] + 1}), "Fix: keep the one that"),
    "untied": (lambda t: t.update({"lm_head.weight": t[WORDS] + 1}), f"tensor lm_head.weight differs from {WORDS}"),
}


@pytest.mark.parametrize("what", TENSORS)
def test_tensors_that_do_not_fit_are_refused_by_name(what, originals, tmp_path):
    folder = shutil.copytree(originals("gpt2"), tmp_path / "theirs")
    change, told = TENSORS[what]
    spoil(folder, change)
    assert told in refused(folder, tmp_path / "run")


def test_a_tensor_under_two_names_is_read_if_both_are_equal(originals, tmp_path):
    folder = shutil.copytree(originals("bert words"), tmp_path / "theirs")
    new, old = (f"bert.embeddings.LayerNorm.{name}" for name in ("weight", "gamma"))
    spoil(folder, lambda t: t.update({old: t[new] + 1}))
    told = refused(folder, tmp_path / "run")
    assert new in told and old in told and "differs from" in told
    spoil(folder, lambda t: t.update({old: t[new].clone()}))
    import_model(folder, tmp_path / "run")


@pytest.mark.parametrize(
    "said",
    [{"num_labels": "3"}, {"id2label": ["a", "b"]}, {"id2label": {"a": "b"}}, {"id2label": 1.5}, {"num_labels": 1}],
)
def test_labels_that_are_none_are_refused(said):
    with pytest.raises(
        UserError, match="config.json: id2label = .*: expected the names of outputs 0, 1 … of two or more"
    ):
        labels_of(said, "config.json")
    assert (
        labels_of({"num_labels": 3}, "config.json") == ["LABEL_0", "LABEL_1", "LABEL_2"]
        and len(labels_of({}, "config.json")) == 2
    )


def test_files_that_cannot_be_read_safely_are_refused(originals, tmp_path):
    folder = shutil.copytree(originals("gpt2"), tmp_path / "theirs")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert "model.safetensors: " in refused(folder, tmp_path / "run")
    (folder / "model.safetensors").unlink()
    assert "holds no model.safetensors: expected a folder" in refused(folder, tmp_path / "run")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    told = refused(folder, tmp_path / "run")
    assert (
        "holds pytorch_model.bin and no model.safetensors: expected safetensors, because reading the other may run code"
        in told
    )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}))
    assert "weight_map" in refused(folder, tmp_path / "run")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    assert "one.safetensors" in refused(folder, tmp_path / "run")
    (folder / "config.json").write_text("{")
    told = refused(folder, tmp_path / "run")
    assert "config.json: cannot be read" in told and "Fix: correct it there, or get the file again." in told


def test_a_class_like_no_other_is_answered_in_a_short_line_and_the_help_lists_all(originals, tmp_path, capsys):
    folder = shutil.copytree(originals("gpt2"), tmp_path / "theirs")
    (folder / "config.json").write_text(json.dumps({"model_type": "rwkv", "architectures": ["RwkvForCausalLM"]}))
    told = refused(folder, tmp_path / "run")
    assert "model_type = 'rwkv': expected a model type that is read, such as llama or qwen3 or bert or t5. Fix" in told
    assert f"use a model of one of the {len(ARCHITECTURES)} types that `roots import --help` lists" in told
    with pytest.raises(SystemExit):
        main(["import", "--help"])
    listed = capsys.readouterr().out.split("are read (docs/exchange.md):")[1].partition(".\n")[0]
    assert " ".join(listed.split()).split(", ") == [*ARCHITECTURES]


def test_a_class_of_no_type_is_answered_with_a_few_types(originals, tmp_path):
    folder = shutil.copytree(originals("gpt2"), tmp_path / "theirs")
    tree = json.loads((folder / "config.json").read_text())
    said = {"model_type": "granitemoe", "architectures": ["GraniteMoeForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(tree | said))
    told = refused(folder, tmp_path / "run")
    assert "model_type = 'granitemoe': expected a model type that is read, such as granite" in told
    assert "ForTokenClassification" not in told


@pytest.mark.parametrize(
    "name, told",
    {
        "adapter_config.json": "a LoRA adapter without its model. Fix: merge it into its base model, with peft's",
        "a.Q4_K_M.gguf": "a file of llama.cpp. Fix: take the model's safetensors",
        "consolidated.safetensors": "weights with other names than in transformers. Fix: take the model-*.safetensors",
        "model-00001-of-00002.safetensors": "a part of a model without model.safetensors.index.json. Fix: get",
        "consolidated.00.pth": "weights with other names than in transformers. Fix: take the version of it",
    }.items(),
)
def test_a_folder_with_another_format_is_answered_with_its_own_way(name, told, tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / name).write_bytes(b"{}")
    assert f"theirs = '{name}': expected model.safetensors, and this is {told}" in refused(
        tmp_path / "theirs", tmp_path / "run"
    )


def test_a_tokenizer_without_words_is_refused(originals, tmp_path):
    folder = shutil.copytree(originals("gpt2"), tmp_path / "theirs")
    tree = json.loads(tokenizer(SPECIALS["gpt"]).to_str())
    tree |= {"added_tokens": [], "post_processor": None, "model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    assert "tokenizer.json = '0 tokens': expected a vocabulary. Fix: take" in refused(folder, tmp_path / "run")


def test_words_of_a_tokenizer_that_the_model_does_not_have_are_refused(originals, tmp_path):
    """With what can be done about it: the model's table of words can be made larger, a vocabulary cannot be cut."""
    folder = shutil.copytree(originals("gpt2"), tmp_path / "theirs")
    made = tokenizer(SPECIALS["gpt"])
    tree = json.loads(made.to_str())
    tree["model"]["vocab"]["one more"] = 97
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    told = refused(folder, tmp_path / "run")
    assert "tokenizer.json = '98 ids': expected at most vocab_size = 97" in told and "'one more' is beyond them" in told
    assert "Fix: give the model more words: model.resize_token_embeddings(len(tokenizer))" in told
    made.add_special_tokens(["<end of all>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end of all>"}))
    assert "'<end of all>' is beyond them" in refused(folder, tmp_path / "run")  # every text ends with it


def test_added_tokens_beyond_the_model_are_left_out_and_said(originals, tmp_path):
    """As CodeLlama's 34b has them: nothing that the run encodes, nor its export, has an id that the model lacks."""
    folder = shutil.copytree(originals("gpt2"), tmp_path / "theirs")
    made = tokenizer(SPECIALS["gpt"])
    made.add_special_tokens(["▁<PRE>"])
    made.add_tokens(["one more"])
    made.save(str(folder / "tokenizer.json"))
    given = {"eos_token": "<|endoftext|>", "prefix_token": "▁<PRE>", "additional_special_tokens": ["▁<PRE>"]}
    given["added_tokens_decoder"] = {"0": {"content": "<|endoftext|>"}, "97": {"content": "▁<PRE>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(given))
    told = import_model(folder, tmp_path / "run")
    assert told.endswith("; without 2 added tokens, beyond the model's vocabulary: ▁<PRE>, one more")
    assert "\n" not in told
    kept = load(tmp_path / "run" / "tokenizer.json")
    assert kept.vocab == 97 and max(kept.encode_with_specials("w3 one more ▁<PRE>")) < 97
    export_model(tmp_path / "run", tmp_path / "export")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert len(theirs) == 97 and max(theirs("w3 one more ▁<PRE>").input_ids) < 97


def test_electras_generator_is_its_own_and_no_other(originals, tmp_path):
    folder = shutil.copytree(originals("electra"), tmp_path / "theirs")
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match="expected ElectraForPreTraining: the generator is half of the model. Fix: name the"
    ):
        import_model(folder / "generator", run)
    spoil(folder / "generator", lambda t: t["electra.embeddings.LayerNorm.bias"].add_(1))
    told = refused(folder, run, folder / "generator")
    assert (
        "theirs/generator: tensor electra.embeddings.LayerNorm.bias differs from electra.embeddings.LayerNorm.bias"
        in told
    )
    tree = json.loads((folder / "generator" / "config.json").read_text())
    (folder / "generator" / "config.json").write_text(json.dumps(tree | {"layer_norm_eps": 1e-3}))
    assert "layer_norm_eps = 0.001: expected 1e-12, as the discriminator has" in refused(
        folder, run, folder / "generator"
    )


def test_a_run_that_has_content_is_not_touched(originals, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("x")
    with pytest.raises(UserError, match="expected a new folder, or an empty one"):
        import_model(originals("gpt2"), tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]
    (tmp_path / "run" / "mine").unlink()
    import_model(originals("gpt2"), tmp_path / "run")  # an empty one may be there


def test_names_of_older_files_are_understood(originals, tmp_path):
    """The released GPT-2 and BLOOM leave out the stack's prefix and keep masks; the released BERT has gamma and beta,
    and a head for pairs that its config does not name."""
    folder = shutil.copytree(originals("gpt2"), tmp_path / "gpt2")

    def old(t):
        for name in list(t):
            t[name.removeprefix("transformer.")] = t.pop(name)
        t["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)

    spoil(folder, old)
    import_model(folder, tmp_path / "run")
    folder = shutil.copytree(originals("bert words"), tmp_path / "bert")

    def older(t):
        for name in list(t):
            t[name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")] = t.pop(
                name
            )
        t |= {"bert.embeddings.position_ids": torch.arange(16)[None], "bert.pooler.dense.weight": torch.ones(36, 36)}
        t |= {"bert.pooler.dense.bias": torch.ones(36)}
        t |= {"cls.seq_relationship.weight": torch.ones(2, 36), "cls.seq_relationship.bias": torch.ones(2)}

    spoil(folder, older)
    assert "BertForPreTraining" in import_model(folder, tmp_path / "bert run")
    import_model(originals("bert words"), tmp_path / "under newer names")
    newer, read = (tensors_in(tmp_path / name) for name in ("under newer names", "bert run"))
    norms = [name for name in newer if "norm" in name]
    assert len(norms) > 8 and all(torch.equal(read[name], newer[name]) for name in norms)
