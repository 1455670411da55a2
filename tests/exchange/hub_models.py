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
    "roberta": lambda: roberta("ForMaskedLM"),
    "roberta tag": lambda: roberta("ForTokenClassification", **CLASSES),
    "electra": lambda: electra("ForPreTraining"),
    "electra classify": lambda: electra("ForSequenceClassification", **CLASSES),
    "electra tag": lambda: electra("ForTokenClassification", **CLASSES),
    "t5 v1.0": t5,
    "t5 v1.1": lambda: t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
}


PADS_AS_ROBERTA = ("roberta", "roberta tag")
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


def saved(name: str, folder: Path) -> Path:
    """The model, every weight away from what it begins as. ELECTRA's generator beside it, with the same embedding."""
    torch.manual_seed(sum(map(ord, name)))
    model = MODELS[name]()
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


def generator_of(folder: Path) -> Path | None:
    return folder / "generator" if (folder / "generator").is_dir() else None


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    files = sorted(folder.rglob("*.safetensors"))
    return {str(path.parent.relative_to(folder) / name): t for path in files for name, t in load_file(path).items()}
