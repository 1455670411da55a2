"""Names of the sources of held-out text in tables and metrics, and their bytes per token.

data.validation --names--> loss/validation/NAME          + manifests --bytes_per_token--> bits per byte
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from roots_dist.config.sections import Source
from roots_dist.learning.data.manifest import SPLITS, read_manifest, split_stem

ENDINGS = re.compile(r"(\.(bin|idx|jsonl?|csv|tsv|gz|zst|xz|bz2))+$")


def names(sources: Sequence[Source]) -> list[str]:
    """Name of each source: as much of the end of its path as is unique, which is the folder that `roots prepare` made,
    or the file without its extension."""
    parts = [_parts(source.path) for source in sources]
    deepest = max(map(len, parts), default=1)
    depth = next((n for n in range(1, deepest) if len({part[-n:] for part in parts}) == len(parts)), deepest)
    found = ["/".join(part[-depth:]) for part in parts]
    return [f"{name}#{1 + found[:i].count(name)}" if name in found[:i] else name for i, name in enumerate(found)]


def _parts(path: str) -> tuple[str, ...]:
    where = Path(ENDINGS.sub("", path))
    prepared = where.name in map(split_stem, SPLITS) and where.parent.name
    return tuple(part for part in (where.parent if prepared else where).parts if part != "/")


def bytes_per_token(sources: Sequence[Source]) -> float | None:
    """Bytes per token of all sources together, from the manifests that `roots prepare` wrote; None if one has none."""
    tokens = bytes_ = 0
    for source in sources:
        manifest = read_manifest(source.path)
        split = manifest.split_of(source.path) if manifest else None
        if split is None:
            return None
        tokens, bytes_ = tokens + split.tokens, bytes_ + split.bytes
    return bytes_ / tokens if tokens else None
