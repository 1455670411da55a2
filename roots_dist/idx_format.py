"""The header of Megatron's `.bin` / `.idx` corpus format: read by the checks on a login node, and by
learning/data/store.py when the corpus is opened. Both refuse the same files."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from roots_dist.errors import DataError

MANIFEST, TOKENIZER = "manifest.json", "tokenizer.json"
"""Files that `roots prepare` writes beside a corpus; a corpus of other software may lie alone."""
MAGIC, OLD_MAGIC = b"MMIDIDX\x00\x00", b"TNTIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, token type, number of sequences, length of the document index; little endian."""
TOKEN_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""Token type code -> numpy's name of the dtype. Ids are integers: a corpus of type 6 or 7 is refused."""
OTHER_TABLES = "DeepSpeed's own writer numbers types otherwise (6 uint16, 7 uint32, 8 uint64), GPT-NeoX has 6 float32"


@dataclass(frozen=True)
class IdxHeader:
    """The content of a corpus, by its index."""

    token_type: str
    """numpy's name of the dtype in which ids are stored."""
    num_sequences: int
    num_documents: int

    @property
    def token_bytes(self) -> int:
        return int(self.token_type[-1])

    @property
    def tables_end(self) -> int:
        """Byte of the `.idx` at which the header and the three tables end."""
        return HEADER.size + 12 * self.num_sequences + 8 * (self.num_documents + 1)


class IdxError(DataError):
    """An index that cannot be read, in the parts of its message."""

    def __init__(self, prefix: str, found: str, expected: str, fix: str):
        self.found, self.expected, self.fix = found, expected, fix
        super().__init__(f"corpus {prefix!r}: {found}, expected {expected}. Fix: {fix}.")


def read_header(prefix: str) -> IdxHeader:
    """Read the header of PREFIX.idx, and compare it with the file's size. Raises IdxError and OSError."""

    def refuse(found: str, expected: str, fix: str) -> IdxError:
        return IdxError(prefix, found, expected, fix)

    index = Path(f"{prefix}.idx")
    size = index.stat().st_size
    with index.open("rb") as file:
        head = file.read(HEADER.size)
    if head.startswith(OLD_MAGIC):
        raise refuse("the .idx begins TNTIDX, an older format", "MMIDIDX", "convert it, or prepare the corpus anew")
    if not head.startswith(MAGIC):
        raise refuse(f"the .idx begins {head[:9]!r}", f"{MAGIC!r}", "check that this is the .idx of a Megatron corpus")
    if len(head) < HEADER.size:
        raise refuse(f"the .idx has {size} bytes", f"a header of {HEADER.size}", "copy the truncated file again")
    _, version, code, num_sequences, document_index = HEADER.unpack(head)
    if version != 1:
        raise refuse(f"version {version}", "version 1", "write it with a current tool")
    if code not in TOKEN_TYPES or "f" in TOKEN_TYPES[code]:
        raise refuse(
            f"token type code {code}", "1-5 or 8, integers", f"rewrite it with Megatron's table; {OTHER_TABLES}"
        )
    header = IdxHeader(TOKEN_TYPES[code], num_sequences, document_index - 1)
    if size not in (header.tables_end, header.tables_end + num_sequences):  # with modes, one byte each
        expected = f"{header.tables_end} for {num_sequences} sequences"
        raise refuse(f"the .idx has {size} bytes", expected, "copy the truncated file again")
    if num_sequences == 0 or header.num_documents < 1:
        raise refuse("no documents", "at least one", "prepare it from inputs with text")
    return header
