"""What the sources of held-out text are called in tables and metrics, and how many bytes a token of them stands for.

data.validation --names--> loss/validation/NAME          + manifests --bytes_per_token--> bits per byte
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from roots_dist.config.schema import Source
from roots_dist.learning.data.manifest import SPLITS, read_manifest, split_stem

ENDINGS = re.compile(r"(\.(bin|idx|jsonl?|csv|tsv|gz|zst|xz|bz2))+$")


def names(given: Sequence[Source]) -> list[str]:
    """Of each source the end of its path, as much of it as tells it from the others: the folder that `roots prepare`
    made, or the file without its ending."""
    parts = [_parts(source.path) for source in given]
    deepest = max(map(len, parts), default=1)
    depth = next((n for n in range(1, deepest) if len({part[-n:] for part in parts}) == len(parts)), deepest)
    found = ["/".join(part[-depth:]) for part in parts]
    return [f"{name}#{1 + found[:i].count(name)}" if name in found[:i] else name for i, name in enumerate(found)]


def _parts(path: str) -> tuple[str, ...]:
    where = Path(ENDINGS.sub("", path))
    prepared = where.name in map(split_stem, SPLITS) and where.parent.name
    return tuple(part for part in (where.parent if prepared else where).parts if part != "/")


def bytes_per_token(given: Sequence[Source]) -> float | None:
    """Of all sources together, from the manifests that `roots prepare` wrote; None if one has none."""
    tokens = bytes_ = 0
    for source in given:
        manifest = read_manifest(source.path)
        split = manifest.split_of(source.path) if manifest else None
        if split is None:
            return None
        tokens, bytes_ = tokens + split.tokens, bytes_ + split.bytes
    return bytes_ / tokens if tokens else None
