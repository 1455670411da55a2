"""Small tokenizers with the files of released chat models: the same keys, names of tokens and post-processors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = (
    "the people of the united states are the people of one union and the union of the states is one people\n"
    "our common defence general welfare and liberty secure what we ordain for every citizen\n"
) * 5
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
    "{% else %}{{ '<｜Assistant｜>' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}"
)
ORDINARY = ("<｜User｜>", "<｜Assistant｜>")
"""Added tokens that are not special."""


class Style(NamedTuple):
    special: tuple[str, ...]
    settings: Mapping[str, Any]
    """tokenizer_config.json"""
    template: str
    bos: str | None
    """bos_token_id of config.json and generation_config.json; tokenizer_config.json may name none."""
    of_model: str | tuple[str, ...]
    """eos_token_id of config.json"""
    ends: tuple[str, ...]
    """eos_token_id of generation_config.json"""
    generation: Mapping[str, Any]
    before: tuple[str, ...]
    """Tokens that begin every text."""
    first: str
    """Token that begins a text whose first token is scored."""
    documents: str
    """Token that ends a document."""
    pad: str | None = None


def added(token: str) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": token, "lstrip": False, "normalized": False}


STYLES = {
    "chatml": Style(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        settings={
            "add_bos_token": False, "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
            "unk_token": None, "tokenizer_class": "Qwen2Tokenizer", "additional_special_tokens": ["<|im_start|>"],
            "clean_up_tokenization_spaces": False, "errors": "replace", "split_special_tokens": False,
        },
        template=CHATML, bos="<|endoftext|>", of_model="<|im_end|>", ends=("<|im_end|>", "<|endoftext|>"),
        generation={"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7, "top_k": 20, "top_p": 0.8},
        before=(), first="<|im_end|>", documents="<|im_end|>", pad="<|endoftext|>",
    ),
    "llama-2": Style(
        special=("<unk>", "<s>", "</s>"),
        settings={
            "add_bos_token": True, "add_eos_token": False, "bos_token": added("<s>"),
            "eos_token": added("</s>"), "unk_token": added("<unk>"),
            "pad_token": None, "legacy": False, "tokenizer_class": "LlamaTokenizer",
            "clean_up_tokenization_spaces": False, "padding_side": "right",
        },
        template=LLAMA_2, bos="<s>", of_model="</s>", ends=("</s>",),
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        before=("<s>",), first="<s>", documents="</s>",
    ),
    "llama-3": Style(
        special=(
            "<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|start_header_id|>",
            "<|end_header_id|>",
        ),
        settings={
            "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True,
            "model_input_names": ["input_ids", "attention_mask"], "tokenizer_class": "PreTrainedTokenizerFast",
        },
        template=LLAMA_3, bos="<|begin_of_text|>", of_model=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        generation={"do_sample": True, "temperature": 0.6, "top_p": 0.9},
        before=("<|begin_of_text|>",), first="<|begin_of_text|>", documents="<|eot_id|>",
    ),
    "deepseek": Style(
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        settings={
            "add_bos_token": True, "add_eos_token": False, "unk_token": None, "legacy": True,
            "bos_token": added("<｜begin▁of▁sentence｜>"),
            "eos_token": added("<｜end▁of▁sentence｜>"),
            "pad_token": added("<｜end▁of▁sentence｜>"),
            "clean_up_tokenization_spaces": False, "tokenizer_class": "LlamaTokenizerFast",
        },
        template=DEEPSEEK, bos="<｜begin▁of▁sentence｜>", of_model="<｜end▁of▁sentence｜>",
        ends=("<｜end▁of▁sentence｜>",), generation={"_from_model_config": True},
        before=("<｜begin▁of▁sentence｜>",), first="<｜begin▁of▁sentence｜>", documents="<｜end▁of▁sentence｜>",
        pad="<｜end▁of▁sentence｜>",
    ),
}  # fmt: skip


def tokenizer_of(style: str) -> Tokenizer:
    """Llama 2 has SentencePiece's pieces, which begin with ▁, and bytes; the others are byte-level. DeepSeek's
    tokenizer.json adds no token: its class does, by add_bos_token."""
    special = list(STYLES[style].special)
    if style == "llama-2":
        made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        space = decoders.Replace("▁", " ")
        made.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
        named = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
        made.train_from_iterator(
            TEXT.split(), trainers.BpeTrainer(vocab_size=320, special_tokens=named, show_progress=False)
        )
        tree = json.loads(made.to_str())  # bytes are words, no special tokens
        tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] in special]
        made = Tokenizer.from_str(json.dumps(tree))
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", made.token_to_id("<s>"))]
        )
        return made
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    for token in special:
        made.add_tokens([AddedToken(token, special=token not in ORDINARY, normalized=False)])
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    if style == "llama-3":
        begin = "<|begin_of_text|>"
        template = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, made.token_to_id(begin))]
        )
        made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return made


def write_style(style: str, folder: Path) -> Tokenizer:
    """Write the tokenizer's files and generation_config.json; the keys of a config.json that is there are completed."""
    folder.mkdir(exist_ok=True)
    made, s = tokenizer_of(style), STYLES[style]
    made.save(str(folder / "tokenizer.json"))
    ids = {token: made.token_to_id(token) for token in s.special}

    def write(name: str, tree: Mapping[str, Any]) -> None:
        (folder / name).write_text(json.dumps(tree, ensure_ascii=False))

    decoder = {str(i): {"content": token, "special": True} for token, i in ids.items()}
    write("tokenizer_config.json", {**s.settings, "added_tokens_decoder": decoder, "chat_template": s.template})
    named = {key: s.settings[key] for key in ("bos_token", "eos_token", "pad_token") if s.settings.get(key)}
    write("special_tokens_map.json", named)
    of_model = {"bos_token_id": ids[s.bos] if s.bos else None, "eos_token_id": _ids(s.of_model, ids)}
    ends = {"eos_token_id": _ids(s.ends, ids)}  # a list of one stays one
    pad = {"pad_token_id": ids[s.pad]} if s.pad else {}
    write("generation_config.json", {**of_model, **ends, **pad, **s.generation, "transformers_version": "4.44.0"})
    there = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    write("config.json", there | of_model)
    return made


def _ids(tokens: str | tuple[str, ...], ids: Mapping[str, int]) -> int | list[int]:
    return ids[tokens] if isinstance(tokens, str) else [ids[token] for token in tokens]
