"""Tokenizer files in both directions: copied into a run, and exported so that transformers 4 and 5 read them alike.

tokenizer.json, tokenizer_config.json, chat_template.jinja, special_tokens_map.json, and what config.json and
generation_config.json say of tokens
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from roots_dist.config.families import FamilyRecord
from roots_dist.config.records import family_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import (
    BY_NAME,
    COMPANIONS,
    GENERATION,
    KINDS,
    MAP,
    MODEL,
    SETTINGS,
    SpecialTokens,
    ids_of,
    listed_ids,
    read_companions,
    special_tokens,
    token_text,
)
from roots_dist.idx_format import TOKENIZER
from roots_dist.learning.data.ends import ends_of
from roots_dist.learning.data.template_files import DEFAULT_NAME, FILE, FOLDER, find_templates
from roots_dist.learning.data.tokenizer import load_codec
from roots_dist.storage.exchange.tensors import exchange_error, read_json

FILES = (TOKENIZER, FILE, *COMPANIONS)
HF_NAMES = {"pad": "pad", "cls": "cls", "sep": "sep", "mask": "mask", "unk": "unk", "end": "eos"}
"""Our special tokens -> their names in transformers."""
DROPPED_KEYS = ("chat_template", "auto_map", "tokenizer_file", "vocab_file", "backend", "is_local", "name_or_path")
"""Keys of an imported tokenizer_config.json that are not exported: paths, code, and what has a file of its own."""
TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
"""Keys that name several special tokens."""


def vocab_of(folder: Path) -> int | None:
    """Largest id of the folder's tokenizer.json + 1; None if there is none. Raises DataError if it cannot be read."""
    if not (folder / TOKENIZER).is_file():
        return None
    ids = load_codec(folder / TOKENIZER).backend.get_vocab(with_added_tokens=True).values()
    if not ids:
        fix = (
            "take the tokenizer.json that belongs to the model, or remove it and name data.tokenizer where text is read"
        )
        raise exchange_error(f"{folder}/{TOKENIZER}", "0 tokens", "a vocabulary", fix)
    return max(ids) + 1


def copy_tokenizer(folder: Path, run: Path, beyond: Mapping[str, int]) -> None:
    """Copy the tokenizer's files, without the added tokens that are beyond the model's vocabulary."""
    for name in FILES:
        if not (folder / name).is_file():
            continue
        if beyond and name in (TOKENIZER, SETTINGS, MAP):
            tree = _without_tokens(read_json(folder / name), beyond)
            (run / name).write_text(json.dumps(tree, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        else:
            shutil.copyfile(folder / name, run / name)
    for template in (folder / FOLDER).glob("*.jinja"):
        (run / FOLDER).mkdir(exist_ok=True)
        shutil.copyfile(template, run / FOLDER / template.name)


def tokens_beyond(folder: Path, vocab: int) -> dict[str, int]:
    """Added tokens of the folder's tokenizer.json that a model of `vocab` words has no embedding for. Raises
    ExchangeError if the tokenizer cannot do without them."""
    tree = read_json(folder / TOKENIZER)
    ids = ids_of(tree)
    beyond = {token: i for token, i in ids.items() if i >= vocab}
    added = {token["content"] for token in tree.get("added_tokens", ())}
    specials = special_tokens(tree, read_companions(folder))
    needed = {specials.bos, specials.end, *specials.before, *specials.after}
    missing = [token for token, i in beyond.items() if token not in added or i in needed]
    if missing:
        expected = f"at most vocab_size = {vocab}, the words that the model has, and {missing[0]!r} is beyond them"
        fix = "give the model more words: model.resize_token_embeddings(len(tokenizer)) in transformers, and save both"
        raise exchange_error(f"{folder}/{TOKENIZER}", f"{max(ids.values()) + 1} ids", expected, fix)
    return beyond


def _without_tokens(tree: Mapping[str, Any], gone: Mapping[str, int]) -> dict[str, Any]:
    """The content of tokenizer.json, tokenizer_config.json or special_tokens_map.json without some tokens."""

    def stays(value: object) -> bool:
        text = value.get("content") if isinstance(value, dict) else value
        return not isinstance(text, str) or text not in gone

    kept = {key: value for key, value in tree.items() if not key.endswith("_token") or stays(value)}
    for key in ("added_tokens", *TOKEN_LISTS):
        if isinstance(kept.get(key), list):
            kept[key] = list(filter(stays, kept[key]))
    if isinstance(kept.get("added_tokens_decoder"), dict):
        kept["added_tokens_decoder"] = {i: token for i, token in kept["added_tokens_decoder"].items() if stays(token)}
    vocab = kept.get("model", {}).get("vocab")
    if isinstance(vocab, dict):
        kept["model"] = kept["model"] | {"vocab": {token: i for token, i in vocab.items() if token not in gone}}
    if isinstance(vocab, list):
        kept["model"] = kept["model"] | {"vocab": [entry for entry in vocab if entry[0] not in gone]}
    return kept


def specials_of(config: Config) -> SpecialTokens:
    """Special tokens of the run's tokenizer, by the files beside it; none without a tokenizer."""
    if config.data.tokenizer is None:
        return SpecialTokens()
    path = Path(config.data.tokenizer)
    return special_tokens(_read_tokenizer(path), read_companions(path.parent))


def special_ids(config: Config) -> dict[str, int]:
    """Special tokens that the run's family has: transformers' name (pad, eos, …) -> id. Empty without a tokenizer."""
    specials, family = specials_of(config), family_of(config)
    found = specials.found()
    named = {HF_NAMES[ours]: found[ours] for ours in family.special_tokens if ours in found}
    classifies = family.is_decoder and objective_of(config).answer == "classify"
    if classifies and specials.end is not None and named.get("pad", specials.unk) == specials.unk:
        named["pad"] = specials.end  # batches are padded with what no text has
    bos = specials.end if specials.bos is None and specials.sources.get("bos") == BY_NAME else specials.bos
    return named | ({"bos": bos} if family.is_decoder and bos is not None else {})


def token_settings(config: Config, run: Path, special: Mapping[str, int]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of config.json and of generation_config.json that are about tokens: as they came with the tokenizer, and the
    run's own. Both name all tokens that end what the run writes."""
    beside = read_companions(run if config.data.tokenizer is None else Path(config.data.tokenizer).parent)
    given, generation = beside.get(MODEL, {}), beside.get(GENERATION, {})

    def came(kind: str, settings: Mapping[str, Any], file: str) -> list[int]:
        return [i for i in listed_ids(settings, kind, file) if i < config.model.vocab]

    ids: dict[str, Any] = {f"{kind}_token_id": None for kind in ("bos", "eos", "pad")}
    ids |= {f"{kind}_token_id": i for kind, i in special.items()}
    ends = ends_of(config, load_codec(config.data.tokenizer), specials_of(config)) if config.data.tokenizer else ()
    for kind in KINDS:
        if kind == "eos" or (kind == "pad" and "pad" in special and objective_of(config).answer != "write"):
            continue
        if of_model := came(kind, given, MODEL):
            ids[f"{kind}_token_id"] = of_model[0]
    of_model, of_generation = came("eos", given, MODEL), came("eos", generation, GENERATION)
    more = [i for i in ends if i not in (of_generation or of_model)]
    if of_model or more:
        ids["eos_token_id"] = _one_or_several([*of_model, *(i for i in more if i not in of_model)])
    if not generation:
        return ids, {key: value for key, value in ids.items() if value is not None}
    if more or not of_generation:
        generation = generation | {"eos_token_id": _one_or_several([*of_generation, *more])}
    return ids, dict(generation)


def _one_or_several(ids: list[int]) -> int | list[int] | None:
    return ids if len(ids) > 1 else ids[0] if ids else None


def write_tokenizer(config: Config, folder: Path) -> None:
    """Write the run's tokenizer as users of its family expect it, adding the tokens that begin and end a text."""
    if config.data.tokenizer is None:
        return
    path = Path(config.data.tokenizer)
    tree, beside = _read_tokenizer(path), read_companions(path.parent)
    ids, specials = ids_of(tree), special_tokens(tree, beside)
    texts = {i: token for token, i in ids.items()}
    named = {name: texts[i] for name, i in special_ids(config).items()}
    tree["post_processor"] = _post_processor(tree.get("post_processor"), specials, family_of(config), named, ids)
    tree |= {"truncation": None, "padding": None}
    (folder / TOKENIZER).write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    settings = _settings(config, beside.get(SETTINGS, {}), named, specials, ids)
    chats = objective_of(config).chats
    templates = find_templates(config.finetune.chat_template if chats else None, path)
    if chats or templates.name != DEFAULT_NAME:
        (folder / FILE).write_text(templates.default, encoding="utf-8")
    for name, text in templates.named.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / FOLDER / f"{Path(name).name}.jinja").write_text(text, encoding="utf-8")
    (folder / SETTINGS).write_text(json.dumps(settings, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    if MAP in beside:
        kept = _tokens_that_are(beside[MAP], named, ids)
        (folder / MAP).write_text(json.dumps(kept, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _settings(
    config: Config, given: Mapping[str, Any], named: Mapping[str, str], specials: SpecialTokens, ids: Mapping[str, int]
) -> dict[str, Any]:
    """Content of tokenizer_config.json. Version 5 of transformers names a class that version 4 refuses; the class named
    here is known to both and reads tokenizer.json unchanged. Without model_input_names it would return segments for
    every model, which GPT-2 would add to its embedding."""
    settings = {key: value for key, value in given.items() if key not in DROPPED_KEYS}
    settings = _tokens_that_are(settings, named, ids)
    around = {"add_bos_token": specials.add_bos, "add_eos_token": specials.add_eos}
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
        | {f"{name}_token": token for name, token in named.items()}
        | settings
        | {key: value for key, value in around.items() if key in settings}
        | {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": inputs}
    )


def _tokens_that_are(settings: Mapping[str, Any], named: Mapping[str, str], ids: Mapping[str, int]) -> dict[str, Any]:
    """Settings with the run's tokens where theirs differ, and without those that tokenizer.json lacks: transformers
    would add them, beyond the model's vocabulary."""
    kept = dict(settings)
    for kind in KINDS:
        key = f"{kind}_token"
        if key not in kept:
            continue
        token = token_text(kept[key], key)
        if kind in named and token != named[kind]:
            kept[key] = named[kind]
        elif token is not None and token not in ids:
            del kept[key]
    return kept


def _post_processor(
    given: Mapping[str, Any] | None,
    specials: SpecialTokens,
    family: FamilyRecord,
    named: Mapping[str, str],
    ids: Mapping[str, int],
) -> Mapping[str, Any] | None:
    """The tokenizer's own, which puts the same tokens around a text as it does in the run; or else [CLS] A [SEP] B
    [SEP], A </s> B </s>, and nothing for decoders."""
    before, after = specials.before, specials.after
    own = special_tokens({"model": {"vocab": dict(ids)}, "post_processor": given}, {})
    if (own.before, own.after) != (before, after):  # add_bos_token and add_eos_token add the others
        first = [specials.text(i) for i in before[: len(before) - len(own.before)]]
        last = [specials.text(i) for i in after[len(own.after) :]]
        template = _template([*first, 0, *last], [*first, 1, *last], ids)
        return template if given is None else {"type": "Sequence", "processors": [given, template]}
    if given is not None:
        return given
    if family.is_encoder and {"cls", "sep"} <= named.keys():
        cls, sep = named["cls"], named["sep"]
        return _template([cls, 0, sep], [1, sep], ids, segment=1)
    if family.has_two_stacks and "eos" in named:
        return _template([0, named["eos"]], [1, named["eos"]], ids)
    return None


def _template(
    first: Sequence[str | int], second: Sequence[str | int], ids: Mapping[str, int], segment: int = 0
) -> dict[str, Any]:
    """Template with the tokens around a text (0), and around a second one (1), which has another segment for BERT."""

    def items(parts: Sequence[str | int], segment: int) -> list[dict[str, Any]]:
        return [
            {"Sequence": {"id": "AB"[part], "type_id": segment}}
            if isinstance(part, int)
            else {"SpecialToken": {"id": part, "type_id": segment}}
            for part in parts
        ]

    single = items(first, 0)
    tokens = {t: {"id": t, "ids": [ids[t]], "tokens": [t]} for t in (*first, *second) if isinstance(t, str)}
    pair = [*single, *items(second, segment)]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}


def _read_tokenizer(path: str | Path) -> dict[str, Any]:
    if not Path(path).is_file():
        fix = "run the command in the folder that the path begins in"
        raise exchange_error("data.tokenizer", str(path), "the run's tokenizer.json", fix)
    return read_json(Path(path))
