"""Constants of Megatron's `.bin` / `.idx` corpus format: read by the checks on a login node and by
learning/data/store.py."""

from __future__ import annotations

import struct

MAGIC, OLD_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, token type, number of sequences, length of the document index; little endian."""
TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""Token type code -> numpy's name of the dtype."""


def token_bytes(code: int) -> int:
    return int(TOKEN_TYPES[code][-1])
