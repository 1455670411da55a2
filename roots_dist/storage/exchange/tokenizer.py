"""Tokenizer files in both directions: copied into a run, and exported so that transformers 4 and 5 read them alike.

tokenizer.json, tokenizer_config.json, chat_template.jinja, special_tokens_map.json
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roots_dist.config.families import FamilyRecord
from roots_dist.config.records import family_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import NAMES, found, ids_of
from roots_dist.learning.data.chat import find_template
from roots_dist.learning.data.tokenizer import load_codec
from roots_dist.storage.exchange.tensors import exchange_error, read_json

TOKENIZER, SETTINGS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
FILES = (TOKENIZER, SETTINGS, TEMPLATE, "special_tokens_map.json")
HF_NAMES = {"pad": "pad", "cls": "cls", "sep": "sep", "mask": "mask", "unk": "unk", "end": "eos"}
"""Our special tokens -> their names in transformers."""
DROPPED_KEYS = ("chat_template", "auto_map", "tokenizer_file", "vocab_file", "backend", "is_local", "name_or_path")
"""Keys of an imported tokenizer_config.json that are not exported: paths, code, and what has a file of its own."""


def vocab_of(folder: Path) -> int | None:
    """Largest id of the folder's tokenizer.json + 1; None if there is none. Raises DataError if it cannot be read."""
    if not (folder / TOKENIZER).is_file():
        return None
    codec = load_codec(folder / TOKENIZER)
    return max(codec.backend.get_vocab(with_added_tokens=True).values()) + 1


def copy_tokenizer(folder: Path, run: Path) -> None:
    for name in FILES:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, run / name)


def special_ids(config: Config) -> dict[str, int]:
    """Special tokens of the run's tokenizer: transformers' name (pad, eos, …) -> id. Empty without a tokenizer."""
    if config.data.tokenizer is None:
        return {}
    ids = ids_of(_read_tokenizer(config.data.tokenizer))
    named = _special_tokens(config, ids) | {"bos": _bos(config, ids)}
    return {name: ids[token] for name, token in named.items() if token in ids}


def write_tokenizer(config: Config, folder: Path) -> None:
    """Write the run's tokenizer as users of its family expect it, adding the tokens that begin and end a text."""
    if config.data.tokenizer is None:
        return
    path = Path(config.data.tokenizer)
    tree = _read_tokenizer(path)
    ids = ids_of(tree)
    named = _special_tokens(config, ids)
    if tree.get("post_processor") is None:
        tree["post_processor"] = _post_processor(family_of(config), named, ids)
    tree |= {"truncation": None, "padding": None}
    (folder / TOKENIZER).write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    settings = _settings(config, path.with_name(SETTINGS), named, _bos(config, ids))
    chats = objective_of(config).chats
    name, template, _ = find_template(config.finetune.chat_template if chats else None, path)
    if chats or name != "the default template":
        (folder / TEMPLATE).write_text(template, encoding="utf-8")
    (folder / SETTINGS).write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _settings(config: Config, beside: Path, named: Mapping[str, str], bos: str | None) -> dict[str, Any]:
    """Content of tokenizer_config.json. Version 5 of transformers names a class that version 4 refuses; the class named
    here is known to both and reads tokenizer.json unchanged. Without model_input_names it would return segments for
    every model, which GPT-2 would add to its embedding."""
    given = read_json(beside) if beside.is_file() else {}
    settings = {key: value for key, value in given.items() if key not in DROPPED_KEYS}
    tokens = {f"{name}_token": token for name, token in named.items()} | ({"bos_token": bos} if bos else {})
    inputs = (
        ["input_ids", "token_type_ids", "attention_mask"]
        if config.model.segments > 1
        else ["input_ids", "attention_mask"]
    )
    return (
        {
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.model.max_positions or config.data.seq_length,
        }
        | tokens
        | settings
        | {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    )


def _special_tokens(config: Config, ids: Mapping[str, int]) -> dict[str, str]:
    """transformers' name -> token, for special tokens that both the family and the tokenizer have."""
    there = found(ids)
    tokens = {ours: next(name for name in NAMES[ours] if name in ids) for ours in there}
    named = {HF_NAMES[ours]: tokens[ours] for ours in family_of(config).special_tokens if ours in tokens}
    if objective_of(config).answer == "classify" and "eos" in named:
        named.setdefault("pad", named["eos"])  # decoders: pads batches of texts
    return named


def _bos(config: Config, ids: Mapping[str, int]) -> str | None:
    """Decoders only: the bos_token in the tokenizer's config, or else the end-of-document token, as in GPT-2."""
    if not family_of(config).is_decoder:
        return None
    beside = Path(str(config.data.tokenizer)).with_name(SETTINGS)
    given = read_json(beside).get("bos_token") if beside.is_file() else None
    given = given.get("content") if isinstance(given, dict) else given
    return given if given in ids else _special_tokens(config, ids).get("eos")


def _post_processor(family: FamilyRecord, named: Mapping[str, str], ids: Mapping[str, int]) -> dict[str, Any] | None:
    """[CLS] A [SEP] B [SEP], or A </s> B </s>; None for decoders, which add nothing."""

    def special(name: str, segment: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": named[name], "type_id": segment}}

    def text(which: str, segment: int) -> dict[str, Any]:
        return {"Sequence": {"id": which, "type_id": segment}}

    if family.is_encoder and {"cls", "sep"} <= named.keys():
        names: tuple[str, ...] = ("cls", "sep")
        single = [special("cls", 0), text("A", 0), special("sep", 0)]
        pair = [*single, text("B", 1), special("sep", 1)]
    elif family.has_two_stacks and "eos" in named:
        names = ("eos",)
        single = [text("A", 0), special("eos", 0)]
        pair = [*single, text("B", 0), special("eos", 0)]
    else:
        return None
    tokens = {named[n]: {"id": named[n], "ids": [ids[named[n]]], "tokens": [named[n]]} for n in names}
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def _read_tokenizer(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        fix = "run the command in the folder that the path begins in"
        raise exchange_error("data.tokenizer", str(path), "the run's tokenizer.json", fix)
    return read_json(Path(path))
