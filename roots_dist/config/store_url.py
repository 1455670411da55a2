"""URLs of object stores: which ones are taken, from a config and from the folder of a run that somebody else has made.

fsspec opens much more: files of this machine, other hosts, archives, and chains of all these. Nobody may be led there
by a file in a folder.
"""

from __future__ import annotations

import re

STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "memory")
"""Protocols of object stores, as fsspec names them; the last is for tests, and of this process alone."""
PARTS = re.compile(r"[A-Za-z0-9_=+,~-][A-Za-z0-9_.=+,~-]*(/[A-Za-z0-9_=+,~-][A-Za-z0-9_.=+,~-]*)*")
"""A bucket, and names in it: no wildcard, no query, no step upwards."""
LONGEST = 1024


def is_url(text: str) -> bool:
    return "://" in text


def why_no_store(url: str) -> str:
    """The reason why a URL is refused, as a part of a sentence; empty if it is accepted."""
    protocol, separator, place = url.partition("://")
    if not separator or "::" in url:
        return "one URL, as s3://bucket/runs/mine"
    if protocol not in STORES:
        return f"{protocol[:20]}:// is none of the object stores {', '.join(STORES[:-1])}"
    if "@" in place.partition("/")[0]:
        return "keys belong into the environment, not into a URL that a run writes down"
    if not PARTS.fullmatch(place) or len(url) > LONGEST:
        return "a bucket and plain names after it"
    return ""
