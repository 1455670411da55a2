"""Special tokens of a tokenizer: which ids begin, end and pad a text, by the files that it came with. No library is
loaded.

    tokenizer.json, the files beside it --read_special_tokens--> SpecialTokens
        --> checks (is all there?), prepare, objectives, prompts, stops, the first token of a likelihood, export

What says it first counts:

1. tokenizer_config.json, then special_tokens_map.json: the token by its name; null means that there is none
2. generation_config.json, then config.json: the token by its id
3. NAMES, what known tokenizers call it: for what no file names

eos is the token that 1 names, followed by the list in 2: the first one ends a document, each of them ends what a model
writes. The tokens around every text are those of tokenizer.json's post-processor; add_bos_token and add_eos_token of
tokenizer_config.json add theirs if it does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roots_dist.errors import DataError, Problem
from roots_dist.files import read_plain, reason

SETTINGS, MAP, GENERATION, MODEL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
COMPANIONS = (SETTINGS, MAP, GENERATION, MODEL)
"""Files beside tokenizer.json that say which special tokens there are."""
NAMES = {
    "pad": ("[PAD]", "<pad>", "<|padding|>"),
    "cls": ("[CLS]", "<s>"),
    "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
    "unk": ("[UNK]", "<unk>"),
    "end": ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]", "[SEP]"),
}
"""Usual names of each special token, the likeliest first. `end` ends a document, or a text."""
BEGINS = ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]")
"""The same for the token that begins a text. It is not asked where the files name an eos and no bos."""
SENTINEL = "<extra_id_{}>"
BY_NAME = "by its name"
"""The source of a token that no file names."""
KINDS = ("bos", "eos", "pad", "unk", "cls", "sep", "mask")
"""Special tokens as transformers names them."""


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """Ids of the special tokens of one tokenizer."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    """The first ends a document and a text; each of them ends what a model writes."""
    pad: int | None = None
    unk: int | None = None
    cls: int | None = None
    sep: int | None = None
    mask: int | None = None
    before: tuple[int, ...] = ()
    """Tokens that the tokenizer puts before every text."""
    after: tuple[int, ...] = ()
    """Tokens that the tokenizer puts after every text."""
    eos_is_listed: bool = False
    """True if generation_config.json says which tokens end what the model writes."""
    texts: Mapping[int, str] = field(default_factory=dict)
    """The tokens of these ids."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """bos, eos, pad … -> the file that names it."""

    @property
    def end(self) -> int | None:
        """Token that ends a document."""
        return self.eos[0] if self.eos else None

    @property
    def first(self) -> int | None:
        """Token that begins a text whose first token is scored too: bos, or else what ends the text before (GPT-2)."""
        return self.end if self.bos is None else self.bos

    @property
    def add_bos(self) -> bool:
        return self.bos is not None and self.bos in self.before

    @property
    def add_eos(self) -> bool:
        return self.end is not None and self.end in self.after

    def found(self) -> dict[str, int]:
        """Return the id of each special token that there is, by its name in NAMES."""
        ids = {name: getattr(self, name) for name in NAMES}
        return {name: i for name, i in ids.items() if i is not None}

    def text(self, token: int) -> str:
        return self.texts.get(token, f"id {token}")

    def line(self) -> str:
        """Describe the tokens and who names them, in one line."""
        parts = []
        for kind in KINDS:
            ids = self.eos if kind == "eos" else tuple(i for i in (getattr(self, kind),) if i is not None)
            tokens = ", ".join(f"{self.text(i)} = {i}" for i in ids)
            parts += [f"{kind} {tokens} ({self.sources[kind]})"] if ids else []
        around = " ".join([*map(self.text, self.before), "TEXT", *map(self.text, self.after)])
        return "; ".join([*parts, f"a text is read as {around}"])


def called(names: Iterable[str]) -> str:
    return ", ".join(f"{name} ({' or '.join(NAMES[name])})" for name in names)


def fix_of(names: Iterable[str]) -> str:
    """The fix for a tokenizer without tokens of these names."""
    kinds = " and ".join("eos_token" if name == "end" else f"{name}_token" for name in names)
    return f"name its {kinds} in {SETTINGS} beside it, or make one: roots prepare --kind wordpiece (t5: --kind unigram)"


def ids_of(tree: Mapping[str, Any]) -> dict[str, int]:
    """Every token of a tokenizer.json. Raises KeyError, TypeError, ValueError or AttributeError if it is none."""
    vocab = tree["model"]["vocab"]
    ids = {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)
    return ids | {token["content"]: token["id"] for token in tree.get("added_tokens", ())}


def sentinels(ids: Mapping[str, int]) -> list[int]:
    """<extra_id_0>, <extra_id_1> … up to the first that is missing."""
    ordered: list[int] = []
    while (i := ids.get(SENTINEL.format(len(ordered)))) is not None:
        ordered.append(i)
    return ordered


def read_special_tokens(path: str | Path) -> SpecialTokens:
    """Special tokens of a tokenizer.json, by the files beside it. Raises DataError for a file that cannot be read or
    that names a bos or eos that is no token."""
    try:
        tree = _read(Path(path))
        ids_of(tree)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _unreadable(Path(path), error) from error
    return special_tokens(tree, read_companions(Path(path).parent))


def describe(path: str | None) -> str:
    """Describe the special tokens of data.tokenizer in one line: which, by which file, or why none can be read."""
    if path is None:
        return "special tokens: none, because data.tokenizer names no tokenizer.json"
    try:
        return f"special tokens of {path}: {read_special_tokens(path).line()}"
    except DataError as error:
        return f"special tokens: {error}"


def read_companions(folder: Path) -> dict[str, dict[str, Any]]:
    """Content of those of COMPANIONS that the folder has."""
    return {name: _read(folder / name) for name in COMPANIONS if (folder / name).is_file()}


def special_tokens(tree: Mapping[str, Any], companions: Mapping[str, Mapping[str, Any]]) -> SpecialTokens:
    """Special tokens of a tokenizer, from the content of tokenizer.json and of the files beside it."""
    ids = ids_of(tree)
    known = set(ids.values())
    found: dict[str, int | None] = {}
    sources: dict[str, str] = {}

    def name(kind: str, token: int | None, source: str) -> None:
        if kind not in found:
            found[kind], sources[kind] = token, source

    for file in (SETTINGS, MAP):
        for kind in KINDS:
            token = token_text(companions.get(file, {}).get(f"{kind}_token"), f"{file}: {kind}_token")
            if token in ids:
                name(kind, ids[token], file)
            elif token is not None and kind in ("bos", "eos"):
                fix = "correct it, or take the tokenizer.json that it was written with"
                problem = Problem(
                    key=f"{file}: {kind}_token", found=token, expected="a token of tokenizer.json", fix=fix
                )
                raise DataError(problem)
    for kind in KINDS:
        if kind != "eos" and companions.get(SETTINGS, {}).get(f"{kind}_token", ...) is None:
            name(kind, None, SETTINGS)
    listed: list[int] = []
    for file in (GENERATION, MODEL):
        for kind in KINDS:
            given = [i for i in listed_ids(companions.get(file, {}), kind, file) if i in known]
            if given:
                name(kind, given[0], file)
            if kind == "eos":
                listed = listed or given
    if "eos" not in found:
        name("bos", next((ids[token] for token in BEGINS if token in ids), None), BY_NAME)
    for kind, names in NAMES.items():
        token_id = next((ids[token] for token in names if token in ids), None)
        name("eos" if kind == "end" else kind, token_id, BY_NAME)
    end, bos = found.pop("eos"), found.get("bos")
    eos = tuple(dict.fromkeys([*([] if end is None else [end]), *listed]))
    before, after = _around(tree.get("post_processor"))
    settings = companions.get(SETTINGS, {})
    if settings.get("add_bos_token") is True and bos is not None and bos not in before:
        before = (bos, *before)
    if settings.get("add_eos_token") is True and end is not None and end not in after:
        after = (*after, end)
    special = {*eos, *before, *after, *(i for i in found.values() if i is not None)}
    return SpecialTokens(
        bos=bos,
        eos=eos,
        pad=found.get("pad"),
        unk=found.get("unk"),
        cls=found.get("cls"),
        sep=found.get("sep"),
        mask=found.get("mask"),
        before=before,
        after=after,
        eos_is_listed=bool(listed_ids(companions.get(GENERATION, {}), "eos", GENERATION)),
        texts={i: token for token, i in ids.items() if i in special},
        sources=sources,
    )


def token_text(value: object, key: str) -> str | None:
    """The token that a setting names: a string, or an object with its content. Text that is empty names none."""
    value = value.get("content") if isinstance(value, dict) else value
    if value is None or isinstance(value, str):
        return value or None
    raise DataError(Problem(key=key, found=value, expected="a token, or null", fix="correct it"))


def listed_ids(settings: Mapping[str, Any], kind: str, file: str) -> list[int]:
    """The ids that config.json or generation_config.json gives for a token: one, several or none (null, or below 0)."""
    value = settings.get(f"{kind}_token_id")
    several = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in several):
        expected = "the id of a token, a list of them, or null"
        raise DataError(Problem(key=f"{file}: {kind}_token_id", found=value, expected=expected, fix="correct it"))
    return [i for i in several if i >= 0]


def _around(processor: Mapping[str, Any] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that a post-processor of tokenizer.json puts before and after a single text."""
    processor = processor or {}
    before: tuple[int, ...] = ()
    after: tuple[int, ...] = ()
    match processor.get("type"):
        case "Sequence":
            for part in processor.get("processors", ()):
                outer_before, outer_after = _around(part)
                before, after = outer_before + before, after + outer_after
        case "TemplateProcessing":
            text_seen = False
            for item in processor["single"]:
                if "Sequence" in item:
                    text_seen = True
                    continue
                ids = tuple(processor["special_tokens"][item["SpecialToken"]["id"]]["ids"])
                before, after = (before, after + ids) if text_seen else (before + ids, after)
        case "BertProcessing" | "RobertaProcessing":
            before, after = (processor["cls"][1],), (processor["sep"][1],)
    return before, after


def _read(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(read_plain(path))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(tree, dict):
        raise _unreadable(path, ValueError("it is no object"))
    return tree


def _unreadable(path: Path, error: Exception) -> DataError:
    expected = f"a {path.name} that can be read ({reason(error, path)})"
    return DataError(Problem(key="data.tokenizer", found=str(path), expected=expected, fix="check the file"))
