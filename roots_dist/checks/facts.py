"""Facts of the machine and the files that a run depends on, gathered once so that the checks themselves stay pure.

Reads headers, never tokens: a corpus of a terabyte is looked at in a millisecond. Neither torch nor DeepSpeed is
imported; their versions come from the packages' metadata.
"""

from __future__ import annotations

import difflib
import glob
import importlib.metadata
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from uuid import uuid4

from roots_dist import environment
from roots_dist.config import special_tokens
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.config.store_url import is_url, why_no_store
from roots_dist.errors import DataError
from roots_dist.files import read_plain, where, why
from roots_dist.idx_format import MANIFEST, TOKENIZER, IdxError, read_header


@dataclass(frozen=True)
class CorpusFacts:
    tokens: int = 0
    documents: int | None = None
    vocab: int | None = None
    """Vocabulary size, from the manifest beside the corpus; None if other software made it."""
    trouble: str | None = None
    """The reason why the corpus cannot be used; None if it can."""
    fix: str | None = None
    """The fix for it, if the file itself says one."""
    beside: tuple[str, ...] = ()
    """Prefixes of corpora that were probably meant, if there is none of this name: in the folder of this name, or
    beginning with it, or beside a file of this name, or of a similar name."""
    is_file: bool = False
    """True if there is a file of just this name."""
    made_with: str | None = None
    """The tokenizer beside it, where that has other ids than the config's: its tokens are other words."""


@dataclass(frozen=True)
class Facts:
    corpora: Mapping[str, CorpusFacts] = field(default_factory=dict)
    """Facts about each corpus, by the prefix that the config gives."""
    tokenizer_vocab: int | None = None
    tokenizer_trouble: str | None = None
    tokenizer_beside: str | None = None
    """The tokenizer.json that is meant, where there is none of the config's name: in the folder of this name, or beside
    a corpus of the config."""
    special_tokens: frozenset[str] = frozenset()
    """The names in special_tokens.NAMES that the tokenizer has."""
    sentinels: int = 0
    """T5's <extra_id_0>, <extra_id_1> …"""
    folder_trouble: str | None = None
    store_trouble: str | None = None
    """The reason why checkpoint.url or checkpoint.fallback_folder cannot be reached from here: a package is missing."""
    local_size: int = 1
    """Processes on this machine, which share its memory."""
    memory: int | None = None
    """Bytes that this machine can still give; None: not known."""
    gpus: int = 0
    compiler: bool = True
    """True if torch.compile finds a C++ compiler here."""
    versions: Mapping[str, str | None] = field(default_factory=dict)
    """Installed packages; None: not installed."""
    pinned: Mapping[str, str] = field(default_factory=dict)
    """The versions that this package was tried with; empty when it runs from a plain checkout."""


def gather(config: Config, local_size: int) -> Facts:
    """Look at this machine. Called once by who starts the run, on every machine of a job."""
    ids, tokenizer_trouble = _tokenizer(config.data.tokenizer)
    specials, tokenizer_trouble = _special_tokens(config.data.tokenizer, tokenizer_trouble)
    sources = () if objective_of(config).rows else (*config.data.train, *config.data.validation)
    return Facts(
        corpora={
            source.path: replace(corpus(source.path), made_with=_made_with(Path(source.path), ids))
            for source in sources
        },
        tokenizer_vocab=max(ids.values()) + 1 if ids else None,
        tokenizer_trouble=tokenizer_trouble,
        tokenizer_beside=_tokenizer_meant(config) if tokenizer_trouble else None,
        special_tokens=frozenset(specials),
        sentinels=len(special_tokens.sentinels(ids)),
        folder_trouble=_folder_trouble(Path(config.track.folder)),
        store_trouble=_store_trouble(config.checkpoint.url, config.checkpoint.fallback_folder),
        local_size=local_size,
        memory=free_memory(),
        gpus=environment.gpus() if config.train.device != "cpu" else 0,
        compiler=environment.has_cpp_compiler(),
        versions={name: version_of(name) for name in ("torch", "deepspeed", "scikit-learn")},
        pinned=_pinned(),
    )


def words_of(config: Config) -> int | None:
    """Number of ids of the config's tokenizer, or else of the corpora that `roots prepare` made; None: not known."""
    ids, _ = _tokenizer(config.data.tokenizer)
    if ids:
        return max(ids.values()) + 1
    sources = () if objective_of(config).rows else (*config.data.train, *config.data.validation)
    found = [_manifest_vocab(Path(source.path)) for source in sources]
    return None if None in found else max((vocab for vocab in found if vocab is not None), default=None)


def corpus(prefix: str) -> CorpusFacts:
    """The facts about a corpus that the header of its .bin/.idx pair tells."""
    tokens_file = Path(f"{prefix}.bin")
    try:
        header = read_header(prefix)
        bin_size = tokens_file.stat().st_size
        with tokens_file.open("rb"):
            pass  # it may be read
    except OSError as error:
        beside, is_file = tuple(_meant(Path(prefix))), Path(prefix).is_file()
        return CorpusFacts(trouble=f"{why(error)}: {where(error.filename)}", beside=beside, is_file=is_file)
    except IdxError as error:
        return CorpusFacts(trouble=f"{error.found}, expected {error.expected}", fix=error.fix)
    if bin_size % header.token_bytes:
        return CorpusFacts(trouble=f"{tokens_file} is cut off: {bin_size} bytes are no whole number of tokens")
    return CorpusFacts(
        tokens=bin_size // header.token_bytes, documents=header.num_documents, vocab=_manifest_vocab(Path(prefix))
    )


def _meant(prefix: Path) -> list[str]:
    """Prefixes of corpora that are meant by one that there is not, the likeliest first."""
    around, name = prefix.parent, glob.escape(prefix.name)
    exact = [*prefix.glob("*.idx"), *around.glob(f"{name}*.idx")] or (
        [*around.glob("*.idx")] if prefix.is_file() or prefix.name in (MANIFEST, TOKENIZER) else []
    )
    if exact:
        return sorted(str(path.with_suffix("")) for path in exact)
    names = [path.name for path in around.parent.iterdir() if path.is_dir()] if around.parent.is_dir() else []
    folders = [around, *(around.with_name(name) for name in difflib.get_close_matches(around.name, names, 1, 0.8))]
    near = [str(path.with_suffix("")) for folder in folders for path in folder.glob("*.idx")]
    return difflib.get_close_matches(str(prefix), near, 1, 0.85)


def _manifest_vocab(prefix: Path) -> int | None:
    """`vocab` from the manifest that `roots prepare` writes beside the corpus, if there is one."""
    try:
        vocab = json.loads((prefix.parent / MANIFEST).read_text(encoding="utf-8"))["vocab"]
    except (OSError, ValueError, KeyError, TypeError):
        return None  # other software's corpora have none, or another kind
    return vocab if isinstance(vocab, int) else None


def _made_with(prefix: Path, ids: Mapping[str, int]) -> str | None:
    """Words that the config's tokenizer has added mean nothing to the corpus; files may differ that have the same
    ids."""
    beside = prefix.parent / TOKENIZER
    if not ids or _manifest_vocab(prefix) is None or not beside.is_file():
        return None
    there, _ = _tokenizer(str(beside))
    return str(beside) if any(ids.get(token) != i for token, i in there.items()) else None


def _tokenizer(name: str | None) -> tuple[dict[str, int], str | None]:
    """The tokens of a tokenizer.json with their ids, or why it cannot be read."""
    if name is None:
        return {}, None
    try:
        ids = special_tokens.ids_of(json.loads(read_plain(Path(name)).decode()))
        return (ids, None) if max(ids.values()) >= 0 else ({}, "its ids are below 0")
    except OSError as error:
        return {}, f"{why(error)}: {where(name)}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}, "no tokenizer of Hugging Face's format"


def _tokenizer_meant(config: Config) -> str | None:
    sources = () if objective_of(config).rows else (*config.data.train, *config.data.validation)
    named = Path(config.data.tokenizer or "/dev/null")
    folders = [named, *(Path(source.path).parent for source in sources if not named.suffix)]  # not for a file's path
    return next((str(folder / TOKENIZER) for folder in folders if (folder / TOKENIZER).is_file()), None)


def _special_tokens(name: str | None, trouble: str | None) -> tuple[dict[str, int], str | None]:
    """Names of the tokenizer's special tokens with their ids, or why the files beside it cannot be used."""
    if name is None or trouble is not None:
        return {}, trouble
    try:
        return special_tokens.read_special_tokens(name).found(), None
    except DataError as error:
        return {}, str(error).partition(". Fix: ")[0]


def _folder_trouble(folder: Path) -> str | None:
    """The reason why the folder cannot be written, tried by writing: permission bits do not tell of full disks and
    read-only mounts."""
    existing, missing = folder, None
    while not existing.exists() and existing != existing.parent:
        existing, missing = existing.parent, existing
    try:
        with tempfile.TemporaryFile(dir=existing):
            return None
    except NotADirectoryError:
        return f"{existing} is no folder"
    except OSError as error:
        wrong = f"{missing} cannot be made" if missing else f"{existing} takes no files"
        return wrong if isinstance(error, FileNotFoundError) else f"{wrong}: {why(error)}"


def _store_trouble(*places: str | None) -> str | None:
    """The reason why a store cannot be used, tried by writing an object and removing it: a bucket may be missing,
    closed, or only for readers."""
    for place in (place for place in places if place is not None and is_url(place)):
        protocol = place.partition("://")[0]
        if why_not := why_no_store(place):
            return f"{protocol}://: {why_not}"
        try:
            import fsspec  # type: ignore[import-untyped]

            store, trial = fsspec.filesystem(protocol), f"{place}/.trial-{uuid4().hex}"
            store.pipe_file(trial, b"1")
            store.rm_file(trial)
        except Exception as error:  # no such package, store or bucket, no key, no right to write
            return f"{protocol}://: {type(error).__name__}: {error}"
    return None


def free_memory() -> int | None:
    """Bytes that this machine, or the container, can still give."""
    import psutil

    available = int(psutil.virtual_memory().available)
    try:  # a container may have less than its machine
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        used = Path("/sys/fs/cgroup/memory.current").read_text().strip()
        return available if limit == "max" else min(available, int(limit) - int(used))
    except (OSError, ValueError):
        return available


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pinned() -> dict[str, str]:
    try:
        requirements = importlib.metadata.requires("roots_dist") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"(torch|deepspeed)==([\w.]+)$", requirement) for requirement in requirements)
    return {match[1]: match[2] for match in found if match}
