"""The class of transformers that a config.json names, and what to do about one that is not read.

config.json: model_type, architectures --architecture_of--> a table of ARCHITECTURES and one of its heads
"""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from roots_dist.errors import ExchangeError, present
from roots_dist.storage.exchange import ARCHITECTURES
from roots_dist.storage.exchange.electra import GENERATOR_CLASS
from roots_dist.storage.exchange.table import Architecture, Head
from roots_dist.storage.exchange.tensors import Tensors, exchange_error


class Unread(NamedTuple):
    """A model type that is known and not read."""

    expected: str
    fix: str


def _text_of(name: str) -> Unread:
    fix = (
        f"save its text part in transformers: text = {name}(model.config.text_config); text.model = "
        "model.model.language_model; text.lm_head = model.lm_head; text.save_pretrained(NEW)"
    )
    return Unread("a model of text alone: this one reads images too", fix)


def _like(*kinds: str) -> Unread:
    return Unread("a model type that is read, and this one is not", f"use a model of type {' or '.join(kinds)}")


def _older(kind: str, files: str) -> Unread:
    return Unread(f"{kind!r}, as the class of transformers calls it", f"use {files}")


_ENCODERS, _DECODERS = _like("bert", "roberta", "electra"), _like("llama", "qwen3")
UNREAD: dict[str, Unread] = {
    "gemma3": _text_of("Gemma3ForCausalLM"),
    "mistral3": _text_of("MistralForCausalLM"),
    "bart": _like("t5"),
    "albert": _ENCODERS,
    "modernbert": _ENCODERS,
    **dict.fromkeys(("glm", "glm4", "chatglm", "minicpm", "internlm", "internlm2", "internlm3"), _DECODERS),
    "Yi": _older("llama", "its newer files, which are of type llama"),
    "RefinedWeb": _older("falcon", "its newer files, which are of type falcon"),
    "RefinedWebModel": _older("falcon", "its newer files, which are of type falcon"),
    "stablelm_epoch": _older("stablelm", "its newer files, which are of type stablelm"),
    "hf_olmo": _older("olmo", "the files whose name ends in -hf, which are of type olmo"),
}
"""Model types that are known and refused."""
USUAL = ["llama", "qwen3", "bert", "t5"]
"""Model types that are named where none is called alike."""


def architecture_of(tree: Mapping[str, Any], folder: Path, tensors: Tensors) -> tuple[Architecture, Head]:
    """Architecture and head of the class that config.json names. Raises ExchangeError for one that is not read."""
    names, model_type = tree.get("architectures") or [None], tree.get("model_type")
    name = names[0] if isinstance(names, list) else names
    where = f"{folder}/config.json"
    if name == GENERATOR_CLASS:
        fix = f"name the discriminator's folder, and this one by --generator {folder}"
        expected = "ElectraForPreTraining: the generator is half of the model"
        raise exchange_error(f"{where}: architectures", name, expected, fix)
    architecture = ARCHITECTURES.get(model_type) if isinstance(model_type, str) else None
    if architecture is None:
        raise _unread_type(where, model_type, name)
    head = architecture.head(name)
    if head is None:
        classes = ", ".join(dict.fromkeys(head.architecture for head in architecture.heads))
        fix = "use a model of one of these classes"
        if not isinstance(name, str):
            fix = f'write the class that it is of, as "architectures": ["{architecture.heads[0].architecture}"]'
        raise exchange_error(f"{where}: architectures", name, f"one of {classes}", fix)
    if head.bare and not _has_tensors(head, architecture, tensors):  # BERT without its pooler
        head = next(h for h in reversed(architecture.heads) if h.architecture == head.architecture)
    if head.architecture == "BertForMaskedLM" and "cls.seq_relationship.weight" in tensors.files:
        head = present(architecture.head("BertForPreTraining"))  # many released BERT checkpoints name the smaller class
    return architecture, head


def _unread_type(where: str, model_type: object, name: object) -> ExchangeError:
    """The error for a model type that has no table."""
    where, known = f"{where}: model_type", UNREAD.get(str(model_type))
    if known is not None:
        return exchange_error(where, model_type, *known)
    of_class = next((kind for kind, table in ARCHITECTURES.items() if table.head(str(name))), None)
    if of_class is not None:
        fix = f'write "model_type": "{of_class}" there, if it is that model'
        return exchange_error(where, model_type, f"{of_class!r}, as {name} has", fix)
    close = get_close_matches(str(model_type).lower(), ARCHITECTURES, n=3) or USUAL
    expected = f"a model type that is read, such as {' or '.join(close)}"
    fix = f"use a model of one of the {len(ARCHITECTURES)} types that `roots import --help` lists"
    return exchange_error(where, model_type, expected, fix)


def _has_tensors(head: Head, architecture: Architecture, tensors: Tensors) -> bool:
    """True if the folder has what the head adds to the stack, named with or without the prefix of the stack."""
    names = [entry.theirs.replace("*", "weight") for entry in head.entries if "{i}" not in entry.theirs]
    return all(n in tensors.files or n.removeprefix(f"{architecture.base}.") in tensors.files for n in names)
