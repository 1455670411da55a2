"""Small models of transformers with odd sizes and random weights, each as save_pretrained leaves it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import transformers

VOCAB, SEQ = 97, 16
LABELS = {0: "no", 1: "yes", 2: "perhaps"}
CLASSES = dict(id2label=LABELS, label2id={name: i for i, name in LABELS.items()})


def gpt2(kind: str = "LMHeadModel", **more):
    sizes = dict(vocab_size=VOCAB, n_positions=SEQ, n_embd=24, n_layer=3, n_head=3, n_inner=56, layer_norm_epsilon=1e-4)
    return getattr(transformers, f"GPT2{kind}")(transformers.GPT2Config(**sizes | more))


def bloom(kind: str = "ForCausalLM", **more):
    sizes = dict(vocab_size=VOCAB, hidden_size=36, n_layer=2, n_head=3)
    return getattr(transformers, f"Bloom{kind}")(transformers.BloomConfig(**sizes | more))


def llama(kind: str = "ForCausalLM", **more):
    sizes = dict(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=6, num_key_value_heads=2,
        head_dim=10, max_position_embeddings=SEQ, rms_norm_eps=1e-4,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0},
    )  # fmt: skip
    return getattr(transformers, f"Llama{kind}")(transformers.LlamaConfig(**sizes | more))


def gpt_neox(kind: str = "ForCausalLM", **more):
    sizes = dict(
        vocab_size=VOCAB, hidden_size=36, intermediate_size=56, num_hidden_layers=2, num_attention_heads=3, hidden_act="gelu_new",
        max_position_embeddings=SEQ, use_parallel_residual=False,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    return getattr(transformers, f"GPTNeoX{kind}")(transformers.GPTNeoXConfig(**sizes | more))


def encoder(family: str, kind: str, **more):
    sizes = dict(
        vocab_size=VOCAB, hidden_size=36, num_hidden_layers=2, num_attention_heads=3, intermediate_size=56,
        max_position_embeddings=SEQ,
    )  # fmt: skip
    return getattr(transformers, f"{family}{kind}")(getattr(transformers, f"{family}Config")(**sizes | more))


def bert(kind: str, **more):
    return encoder("Bert", kind, **more)


def roberta(kind: str, **more):
    return encoder("Roberta", kind, **{"max_position_embeddings": SEQ + 2, "type_vocab_size": 1} | more)


def electra(kind: str, **more):
    return encoder("Electra", kind, **{"embedding_size": 20} | more)


def t5(**more):
    sizes = dict(
        vocab_size=VOCAB, d_model=32, d_kv=12, d_ff=40, num_layers=3, num_decoder_layers=2, num_heads=3, decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=10,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes | more))
    if (
        more.get("tie_word_embeddings") is False
    ):  # version 5 ties every T5 that it makes; v1.1 has a projection of its own
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    return model


SMALL = dict(
    vocab_size=VOCAB, hidden_size=48, intermediate_size=56, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2,
    max_position_embeddings=SEQ, pad_token_id=0, bos_token_id=1, eos_token_id=1,
)  # fmt: skip
SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 24,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 4.0},
    "yarn, scores too": {
        "rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8, "mscale": 0.5, "mscale_all_dim": 0.9,
    },
}  # fmt: skip

LONGROPE = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.2], "long_factor": [1.5, 2.0, 4.0]}


def like_llama(family: str, kind: str = "ForCausalLM", config: str | None = None, **more):
    """A model whose config has Llama's names for sizes. Settings of rotary angles: scaled=name in SCALED, theta."""
    theta, scaled = more.pop("theta", 300.0), more.pop("scaled", None)
    rope = {"rope_type": "default", **(SCALED[scaled] if scaled else {}), "rope_theta": theta}
    own = more.pop("rope", {})
    rope = own if "full_attention" in own else rope | own
    sizes = SMALL | {"rope_parameters": rope} | more
    return getattr(transformers, f"{family}{kind}")(getattr(transformers, config or f"{family}Config")(**sizes))


def by_kind(scaled: str | None = None, local: float = 50.0, theta: float = 300.0):
    """rope_parameters of models whose window layers have angles of their own."""
    full = SCALED[scaled] if scaled else {"rope_type": "default"}
    return {
        "full_attention": full | {"rope_theta": theta},
        "sliding_attention": {"rope_type": "default", "rope_theta": local},
    }


def gemma(number: str, kind: str = "ForCausalLM", **more):
    config = "Gemma3TextConfig" if number == "3" else f"Gemma{number}Config"
    wide = dict(head_dim=12, num_hidden_layers=3)
    if number:
        wide |= dict(
            query_pre_attn_scalar=20, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
        )
    if number == "3":
        wide |= dict(
            attn_logit_softcapping=None, final_logit_softcapping=None, rope=by_kind("linear"), sliding_window_pattern=2
        )
    return like_llama(f"Gemma{number}", kind, config, **wide | more)


def deepseek(version: str, **more):
    sizes = dict(
        num_key_value_heads=6, q_lora_rank=14, kv_lora_rank=20, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=7,
        moe_intermediate_size=20, n_shared_experts=2, n_routed_experts=6, num_experts_per_tok=3, first_k_dense_replace=1,
        n_group=1, topk_group=1, rms_norm_eps=1e-3, scaled="yarn, scores too",
    )  # fmt: skip
    model = like_llama(f"Deepseek{version}", **sizes | more)
    for layer in model.model.layers:
        if (bias := getattr(getattr(layer.mlp, "gate", None), "e_score_correction_bias", None)) is not None:
            bias.normal_(std=0.2)
    return model


def gptj(kind: str = "ForCausalLM", **more):
    sizes = dict(
        vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, n_inner=56, n_positions=SEQ, rotary_dim=6, pad_token_id=0, bos_token_id=1,
        eos_token_id=1,
    )  # fmt: skip
    return getattr(transformers, f"GPTJ{kind}")(transformers.GPTJConfig(**sizes | more))


def falcon(kind: str = "ForCausalLM", **more):
    sizes = dict(
        vocab_size=VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=6, ffn_hidden_size=56, max_position_embeddings=SEQ,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0}, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return getattr(transformers, f"Falcon{kind}")(transformers.FalconConfig(**sizes | more))


def opt(kind: str = "ForCausalLM", **more):
    sizes = dict(
        vocab_size=VOCAB, hidden_size=36, num_hidden_layers=2, num_attention_heads=3, ffn_dim=56, max_position_embeddings=SEQ, pad_token_id=1
    )  # fmt: skip
    return getattr(transformers, f"OPT{kind}")(transformers.OPTConfig(**sizes | more))


def distilbert(kind: str, **more):
    sizes = dict(vocab_size=VOCAB, dim=36, n_layers=2, n_heads=3, hidden_dim=56, max_position_embeddings=SEQ)
    return getattr(transformers, f"DistilBert{kind}")(transformers.DistilBertConfig(**sizes | more))


def like_roberta(family: str, kind: str, **more):
    return encoder(family, kind, **{"max_position_embeddings": SEQ + 2, "type_vocab_size": 1, "pad_token_id": 1} | more)


def mt5(**more):
    sizes = dict(
        vocab_size=VOCAB, d_model=32, d_kv=12, d_ff=40, num_layers=2, num_decoder_layers=2, num_heads=3, decoder_start_token_id=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=10, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    model = transformers.MT5ForConditionalGeneration(transformers.MT5Config(**sizes | more))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.2)
    return model


def without_pooler(family: str, config: transformers.PretrainedConfig):
    return getattr(transformers, f"{family}Model")(config, add_pooling_layer=False)


EXPERTS = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=20)

MODELS: dict[str, Callable] = {
    "gpt2": gpt2,
    "gpt2 untied": lambda: gpt2(tie_word_embeddings=False, activation_function="gelu", n_inner=None),
    "gpt2 classify": lambda: gpt2("ForSequenceClassification", pad_token_id=0, **CLASSES),
    "gpt2 tag": lambda: gpt2("ForTokenClassification", **CLASSES),
    "bloom": bloom,
    "bloom classify": lambda: bloom("ForSequenceClassification", pad_token_id=0, **CLASSES),
    "llama": llama,
    "llama tied": lambda: llama(
        tie_word_embeddings=True, attention_bias=True, mlp_bias=True, num_key_value_heads=6, head_dim=8
    ),
    "llama classify": lambda: llama("ForSequenceClassification", pad_token_id=0, **CLASSES),
    "llama tag": lambda: llama("ForTokenClassification", **CLASSES),
    "gpt_neox": gpt_neox,
    "gpt_neox tied": lambda: gpt_neox(tie_word_embeddings=True),
    "gpt_neox tag": lambda: gpt_neox("ForTokenClassification", **CLASSES),
    "bert": lambda: bert("ForPreTraining"),
    "bert words": lambda: bert("ForMaskedLM", hidden_act="gelu_new"),
    "bert untied": lambda: bert("ForMaskedLM", tie_word_embeddings=False),
    "bert classify": lambda: bert("ForSequenceClassification", **CLASSES),
    "bert tag": lambda: bert("ForTokenClassification", **CLASSES),
    "bert bare": lambda: bert("Model"),
    "bert bare without pooler": lambda: without_pooler("Bert", bert("Model").config),
    "roberta": lambda: roberta("ForMaskedLM"),
    "roberta tag": lambda: roberta("ForTokenClassification", **CLASSES),
    "electra": lambda: electra("ForPreTraining"),
    "electra classify": lambda: electra("ForSequenceClassification", **CLASSES),
    "electra bare": lambda: electra("Model"),
    "electra tag": lambda: electra("ForTokenClassification", **CLASSES),
    "t5 v1.0": t5,
    "t5 v1.1": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": mt5,
    "opt": opt,
    "opt classify": lambda: opt("ForSequenceClassification", activation_function="gelu", **CLASSES),
    "roberta classify": lambda: roberta("ForSequenceClassification", pad_token_id=1, **CLASSES),
    "xlm-roberta": lambda: like_roberta("XLMRoberta", "ForMaskedLM"),
    "xlm-roberta classify": lambda: like_roberta("XLMRoberta", "ForSequenceClassification", **CLASSES),
    "camembert": lambda: like_roberta("Camembert", "ForMaskedLM", layer_norm_eps=1e-5),
    "camembert tag": lambda: like_roberta("Camembert", "ForTokenClassification", **CLASSES),
    "distilbert": lambda: distilbert("ForMaskedLM"),
    "xlm-roberta bare": lambda: without_pooler("XLMRoberta", like_roberta("XLMRoberta", "Model").config),
    "distilbert bare": lambda: distilbert("Model"),
    "distilbert classify": lambda: distilbert("ForSequenceClassification", **CLASSES),
    "distilbert tag": lambda: distilbert("ForTokenClassification", **CLASSES),
    "llama biases apart": lambda: like_llama("Llama", attention_bias=True),
    "llama 3.1": lambda: like_llama("Llama", scaled="llama3"),
    "llama linear": lambda: like_llama("Llama", scaled="linear"),
    "llama yarn": lambda: like_llama("Llama", scaled="yarn"),
    "mistral": lambda: like_llama("Mistral", head_dim=10, sliding_window=None),
    "mistral window": lambda: like_llama("Mistral", sliding_window=5),
    "mistral bare": lambda: like_llama("Mistral", "Model", sliding_window=None),
    "mistral tag": lambda: like_llama("Mistral", "ForTokenClassification", sliding_window=SEQ, **CLASSES),
    "phi3": lambda: like_llama("Phi3", sliding_window=7),
    "phi3 longrope": lambda: like_llama(
        "Phi3",
        num_key_value_heads=6,
        original_max_position_embeddings=8,
        rope=LONGROPE | {"partial_rotary_factor": 0.75},
    ),
    "qwen2": lambda: like_llama("Qwen2", tie_word_embeddings=True),
    "qwen2 windows": lambda: like_llama(
        "Qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1, num_hidden_layers=3, scaled="yarn"
    ),
    "qwen2 classify": lambda: like_llama("Qwen2", "ForSequenceClassification", **CLASSES),
    "qwen3": lambda: like_llama("Qwen3", head_dim=12),
    "qwen3 windows": lambda: like_llama(
        "Qwen3", head_dim=8, use_sliding_window=True, sliding_window=5, max_window_layers=0
    ),
    "smollm3": lambda: like_llama("SmolLM3", num_hidden_layers=5, tie_word_embeddings=True),
    "granite": lambda: like_llama(
        "Granite", embedding_multiplier=3.0, residual_multiplier=0.3, attention_multiplier=0.2, logits_scaling=4.0
    ),
    "starcoder2": lambda: like_llama("Starcoder2", sliding_window=6),
    "starcoder2 no biases": lambda: like_llama(
        "Starcoder2", sliding_window=None, use_bias=False, tie_word_embeddings=False
    ),
    "stablelm": lambda: like_llama("StableLm", use_qkv_bias=True, rope={"partial_rotary_factor": 0.25}),
    "gpt_neox part": lambda: gpt_neox(
        rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.34},
        attention_bias=False,
    ),
    "gpt_neox parallel": lambda: gpt_neox(
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    ),
    "stablelm parallel": lambda: like_llama(
        "StableLm", use_parallel_residual=True, rope={"partial_rotary_factor": 0.75}
    ),
    "gptj": gptj,
    "gptj classify": lambda: gptj("ForSequenceClassification", **CLASSES),
    "phi": lambda: like_llama("Phi", rope={"partial_rotary_factor": 0.5}),
    "phi tag": lambda: like_llama("Phi", "ForTokenClassification", rope={"partial_rotary_factor": 0.25}, **CLASSES),
    "falcon": falcon,
    "falcon groups": lambda: falcon(
        num_kv_heads=2, new_decoder_architecture=True, bias=True, tie_word_embeddings=False
    ),
    "falcon groups, one norm": lambda: falcon(num_kv_heads=2, new_decoder_architecture=True, num_ln_in_parallel_attn=1),
    "falcon in turn": lambda: falcon("ForTokenClassification", multi_query=False, parallel_attn=False, **CLASSES),
    "gemma": lambda: gemma(""),
    "gemma classify": lambda: gemma("", "ForSequenceClassification", **CLASSES),
    "gemma2": lambda: gemma("2"),
    "gemma2 classify": lambda: gemma("2", "ForSequenceClassification", **CLASSES),
    "gemma3": lambda: gemma("3"),
    "olmo": lambda: like_llama("Olmo"),
    "olmo2": lambda: like_llama("Olmo2", tie_word_embeddings=True),
    "olmo3": lambda: like_llama("Olmo3", num_hidden_layers=4, sliding_window=5, rope=by_kind("yarn", local=300.0)),
    "mixtral": lambda: like_llama("Mixtral", num_local_experts=4, head_dim=10),
    "mixtral window, tag": lambda: like_llama(
        "Mixtral", "ForTokenClassification", num_local_experts=3, head_dim=8, sliding_window=5, **CLASSES
    ),
    "qwen2_moe": lambda: like_llama(
        "Qwen2Moe", **EXPERTS, shared_expert_intermediate_size=24, mlp_only_layers=[0], num_hidden_layers=3
    ),
    "qwen3_moe": lambda: like_llama("Qwen3Moe", **EXPERTS, head_dim=12, norm_topk_prob=True),
    "qwen3_moe sparse": lambda: like_llama(
        "Qwen3Moe", **EXPERTS, head_dim=8, decoder_sparse_step=2, num_hidden_layers=4, tie_word_embeddings=True
    ),
    "olmoe": lambda: like_llama("Olmoe", num_experts=5, num_experts_per_tok=3),
    "deepseek_v2": lambda: deepseek("V2", q_lora_rank=None),
    "deepseek_v2 groups": lambda: deepseek(
        "V2", topk_method="group_limited_greedy", n_group=3, topk_group=2, routed_scaling_factor=4.0, scaled="yarn"
    ),
    "deepseek_v3": lambda: deepseek("V3", n_group=3, topk_group=2, num_mtp_layers=0),
    "deepseek_v3 halves": lambda: deepseek(
        "V3", q_lora_rank=None, rope_interleave=False, norm_topk_prob=False, scaled=None, num_mtp_layers=0
    ),
    "olmo3 unscaled": lambda: like_llama("Olmo3", num_hidden_layers=4, sliding_window=5, rope=by_kind(local=300.0)),
}

EVEN: dict[str, Callable] = {
    "gpt2": lambda: gpt2(n_head=2),
    "bloom": lambda: bloom(n_head=2),
    "gpt_neox": lambda: gpt_neox(num_attention_heads=2),
    "opt": lambda: opt(num_attention_heads=2),
    "bert": lambda: bert("ForPreTraining", num_attention_heads=2),
    "roberta": lambda: roberta("ForMaskedLM", num_attention_heads=2),
    "xlm-roberta": lambda: like_roberta("XLMRoberta", "ForMaskedLM", num_attention_heads=2),
    "camembert": lambda: like_roberta("Camembert", "ForMaskedLM", num_attention_heads=2),
    "distilbert": lambda: distilbert("ForMaskedLM", n_heads=2),
    "electra": lambda: electra("ForPreTraining", num_attention_heads=2),
    "t5 v1.0": lambda: t5(num_heads=2),
    "mt5": lambda: mt5(num_heads=2),
}
"""The models of MODELS whose heads two tensor ranks cannot share, with heads that they can."""
FIRST = ("gpt2", "bloom", "llama", "gpt_neox", "opt", "mistral", "phi3", "qwen2", "qwen3", "smollm3", "granite",
    "starcoder2", "stablelm", "falcon", "gptj", "phi", "gemma", "gemma2", "gemma3", "olmo", "olmo2", "olmo3", "mixtral",
    "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3", "bert", "roberta", "xlm-roberta", "camembert", "distilbert", "electra", "t5 v1.0",
    "mt5",
)  # fmt: skip
"""One of MODELS for each model type."""


PADS_AS_ROBERTA = tuple(name for name in MODELS if name.split()[0] in ("roberta", "xlm-roberta", "camembert"))
SPECIALS = {
    "roberta": ["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
    "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"],
    "t5": ["<pad>", "</s>", "<unk>"],
    "gpt": ["<|endoftext|>", "<unk>"],
}


def tokenizer(specials: list[str]):
    """Words w0, w1 … after the special ones, VOCAB in all."""
    import tokenizers

    vocab = {token: i for i, token in enumerate([*specials, *(f"w{n}" for n in range(VOCAB - len(specials)))])}
    unknown = next(token for token in specials if "unk" in token.lower())
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token=unknown))
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(specials)
    return made


def saved(name: str, folder: Path, even: bool = False) -> Path:
    """The model, every weight away from what it begins as. ELECTRA's generator beside it, with the same embedding.
    even: with heads that two tensor ranks can share."""
    torch.manual_seed(sum(map(ord, name)))
    model = (EVEN if even and name in EVEN else MODELS)[name]()
    parts = [model]
    if name == "electra":
        small = electra("ForMaskedLM", hidden_size=24, num_attention_heads=2, intermediate_size=32, num_hidden_layers=1)
        parts.append(small)
    with torch.no_grad():
        for part in parts:
            for weight in part.parameters():
                weight.add_(torch.randn_like(weight), alpha=0.1)
        if name == "electra":
            small.electra.embeddings.load_state_dict(model.electra.embeddings.state_dict())
    model.eval().save_pretrained(folder)
    if name in PADS_AS_ROBERTA:
        tokenizer(SPECIALS["roberta"]).save(str(folder / "tokenizer.json"))
    if name == "electra":
        small.eval().save_pretrained(folder / "generator")
    return folder


def saved_chat_model(folder: Path) -> Path:
    """A small Qwen 3 with a tokenizer that has ChatML's tokens and template, as a released one lies in its folder."""
    from hub_tokenizers import tokenizer_of, write_style

    torch.manual_seed(3)
    config = transformers.Qwen3Config(
        vocab_size=tokenizer_of("chatml").get_vocab_size(), hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, intermediate_size=64, max_position_embeddings=128,
    )  # fmt: skip
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    write_style("chatml", folder)
    return folder


def generator_of(folder: Path) -> Path | None:
    return folder / "generator" if (folder / "generator").is_dir() else None


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.rglob("*.safetensors"))
    return {str(path.parent.relative_to(folder) / name): t for path in files for name, t in load_file(path).items()}
