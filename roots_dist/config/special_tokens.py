"""Special tokens: what each is called in known tokenizers. No library is loaded.

tokenizer.json --ids_of--> {token: id}
    --found, sentinels--> facts.py (is all there?), learning/data/specials.py (the ids)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

NAMES = {
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
    "end": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]"),
}
"""What tokenizers call each special token, the likeliest first. `end` ends a document, or a text."""
SENTINEL = "<extra_id_{}>"


def called(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({' or '.join(NAMES[name])})" for name in names)


def ids_of(tree: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json. Raises KeyError, TypeError, ValueError or AttributeError if it is none."""
    vocab = tree["model"]["vocab"]
    ids = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    return ids | {token["content"]: token["id"] for token in tree.get("added_tokens", ())}


def found(ids: Mapping[str, int]) -> dict[str, int]:
    """The special tokens that there are: name of ours -> id."""
    first = {field: next((ids[n] for n in names if n in ids), None) for field, names in NAMES.items()}
    return {field: i for field, i in first.items() if i is not None}


def sentinels(ids: Mapping[str, int]) -> list[int]:
    """<extra_id_0>, <extra_id_1> … up to the first that is missing."""
    ordered: list[int] = []
    while (i := ids.get(SENTINEL.format(len(ordered)))) is not None:
        ordered.append(i)
    return ordered
