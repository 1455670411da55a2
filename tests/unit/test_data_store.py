"""The .bin/.idx pair: golden bytes both ways, another reader, foreign layouts, and every way to be damaged."""

import struct
from pathlib import Path

import numpy as np
import pytest

from roots_dist.checks import facts as gathering
from roots_dist.errors import DataError
from roots_dist.idx_format import TOKEN_TYPES
from roots_dist.learning.data.store import Corpus, Writer, token_type

GOLDEN = Path(__file__).parents[1] / "golden" / "three_documents"
DOCUMENTS = [[1, 2, 3], [4, 5], [6]]


def write(prefix, documents, dtype="<u2"):
    with Writer(prefix, np.dtype(dtype)) as writer:
        for document in documents:
            writer.add(np.array(document, dtype=dtype))
        writer.commit()
    return Corpus.open(prefix)


def write_index(prefix, lengths, offsets, documents, code=8, version=1, magic=b"MMIDIDX\x00\x00", tail=b""):
    """By hand, from the published table, so that the writer is not its own judge."""
    head = magic + struct.pack("<QBQQ", version, code, len(lengths), len(documents))
    body = struct.pack(f"<{len(lengths)}i{len(offsets)}q{len(documents)}q", *lengths, *offsets, *documents)
    Path(f"{prefix}.idx").write_bytes(head + body + tail)


def test_the_writer_makes_the_golden_files(tmp_path):
    write(tmp_path / "c", DOCUMENTS)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"c{ending}").read_bytes() == Path(f"{GOLDEN}{ending}").read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.bin", "c.idx"]


@pytest.mark.parametrize("name", ["{}", "{}.bin", "{}.idx"])
def test_the_reader_reads_the_golden_files(name):
    corpus = Corpus.open(name.format(GOLDEN))
    assert (corpus.num_documents, corpus.num_tokens) == (3, 6)
    assert [corpus.document(i).tolist() for i in range(3)] == DOCUMENTS
    assert corpus.tokens(1, 4).tolist() == [2, 3, 4, 5]
    assert [corpus.document_at(t) for t in range(6)] == [0, 0, 0, 1, 1, 2]


def test_large_vocabularies_take_four_bytes(tmp_path):
    assert (token_type(65_499), token_type(65_500)) == (np.dtype("<u2"), np.dtype("<i4"))
    write(tmp_path / "c", DOCUMENTS, "<i4")
    index = (tmp_path / "c.idx").read_bytes()
    assert index[17] == 4 and struct.unpack_from("<3q", index, 34 + 12) == (0, 12, 20)


def test_deepspeeds_reader_reads_what_is_written_here(tmp_path):
    from deepspeed.runtime.data_pipeline.data_sampling import indexed_dataset as other

    ours = write(tmp_path / "c", DOCUMENTS, "<i4")  # its table agrees on int32 alone
    theirs = other.MMapIndexedDataset(str(tmp_path / "c"), skip_warmup=True)
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.doc_idx.tolist() == ours.documents.tolist()


@pytest.mark.parametrize("modes", [b"", b"\x01\x02\x03\x04"])
def test_sequences_may_lie_anywhere_and_documents_hold_several(tmp_path, modes):
    stored = np.arange(10, 20, dtype="<u2")
    stored.tofile(tmp_path / "c.bin")
    write_index(tmp_path / "c", [3, 0, 5, 2], [14, 0, 0, 10], [0, 2, 2, 4], tail=modes)
    corpus, stream = Corpus.open(tmp_path / "c"), [17, 18, 19, 10, 11, 12, 13, 14, 15, 16]
    assert [corpus.document(i).tolist() for i in range(3)] == [stream[:3], [], stream[3:]]
    for start in range(11):
        for length in range(11 - start):
            assert corpus.tokens(start, length).tolist() == stream[start : start + length]
    assert [corpus.document_at(t) for t in range(10)] == [0] * 3 + [2] * 7


def test_random_cuts_of_the_stream_equal_the_documents_laid_end_to_end(tmp_path):
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 60_000, draw.integers(1, 40)).tolist() for _ in range(200)]
    corpus, stream = write(tmp_path / "c", documents), np.concatenate(documents)
    for start in draw.integers(0, len(stream) - 60, 200).tolist():
        assert (corpus.tokens(start, 60) == stream[start : start + 60]).all()
        borders = np.cumsum([len(d) for d in documents])
        assert corpus.document_at(start) == np.searchsorted(borders, start, side="right")


def golden_parts():
    return bytearray(Path(f"{GOLDEN}.idx").read_bytes()), Path(f"{GOLDEN}.bin").read_bytes()


DAMAGE = {
    "wrong magic": (lambda i, b: (b"GARBAGE!!" + i[9:], b), "MMIDIDX"),
    "older format": (lambda i, b: (b"TNTIDX\x00\x00" + i[8:], b), "TNTIDX, an older format"),
    "empty index": (lambda i, b: (b"", b), "begins b''"),
    "index cut in the header": (lambda i, b: (i[:20], b), "20 bytes, expected a header of 34"),
    "index cut in a table": (lambda i, b: (i[:-8], b), "94 bytes, expected 102"),
    "index with more": (lambda i, b: (i + b"\x00" * 8, b), "110 bytes, expected 102"),
    "version 2": (lambda i, b: (i[:9] + b"\x02" + i[10:], b), "version 2"),
    "unknown type": (lambda i, b: (i[:17] + b"\x63" + i[18:], b), "token type code 99"),
    "DeepSpeed's uint16": (lambda i, b: (i[:17] + b"\x06" + i[18:], b), "DeepSpeed's own writer"),
    "another type's size": (
        lambda i, b: (i[:17] + b"\x04" + i[18:], b),
        "12 bytes, expected 14 by the .idx (token type int32)",
    ),
    "truncated tokens": (lambda i, b: (i, b[:-2]), "10 bytes, expected 12"),
    "more tokens": (lambda i, b: (i, b + b"\x00\x00"), "14 bytes, expected 12"),
    "a count beyond all bounds": (
        lambda i, b: (i[:18] + b"\xff" * 8 + i[26:], b),
        "expected 221360928884514619446 for",
    ),
    "negative length": (lambda i, b: (i[:34] + b"\xff" * 4 + i[38:], b), "a length or offset that cannot be"),
    "offset that would wrap": (
        lambda i, b: (i[:46] + b"\xff" * 7 + b"\x7f" + i[54:], b),
        "a length or offset that cannot be",
    ),
    "odd offset": (lambda i, b: (i[:54] + b"\x05" + i[55:], b), "no multiple of 2"),
    "documents that fall": (lambda i, b: (i[:78] + b"\x03" + i[79:86] + b"\x01" + i[87:], b), "does not rise"),
    "documents beyond the sequences": (lambda i, b: (i[:94] + b"\x09" + i[95:], b), "does not rise"),
}


@pytest.mark.parametrize("code", TOKEN_TYPES)
def test_a_type_is_refused_before_a_run_if_it_cannot_be_opened(tmp_path, code):
    """The checks on a login node and the run judge a corpus alike: ids are integers."""
    stored = np.array([1, 2, 3]).astype(TOKEN_TYPES[code])
    stored.tofile(tmp_path / "c.bin")
    write_index(tmp_path / "c", [3], [0], [0, 1], code=code)
    found = gathering.corpus(str(tmp_path / "c"))
    if stored.dtype.kind == "f":
        assert f"token type code {code}" in found.trouble and "Megatron's table" in found.fix
        with pytest.raises(DataError, match=f"token type code {code}"):
            Corpus.open(tmp_path / "c")
    else:
        assert found.trouble is None and found.tokens == 3
        assert Corpus.open(tmp_path / "c").tokens(0, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage):
    change, message = DAMAGE[damage]
    index, stored = change(*golden_parts())
    (tmp_path / "c.idx").write_bytes(index)
    (tmp_path / "c.bin").write_bytes(stored)
    with pytest.raises(DataError) as error:
        Corpus.open(tmp_path / "c")
    assert message in str(error.value) and "Fix:" in str(error.value) and "\n" not in str(error.value)


def test_nothing_in_it_is_refused(tmp_path):
    (tmp_path / "c.bin").write_bytes(b"")
    write_index(tmp_path / "c", [], [], [0])
    with pytest.raises(DataError, match="no documents"):
        Corpus.open(tmp_path / "c")
    write_index(tmp_path / "c", [0], [0], [0, 1])
    with pytest.raises(DataError, match="no tokens"):
        Corpus.open(tmp_path / "c")


def test_a_folder_or_a_missing_pair_names_what_is_near(tmp_path):
    write(tmp_path / "train_text_document", DOCUMENTS)
    for wrong in (tmp_path, tmp_path / "trian"):
        with pytest.raises(DataError, match="choose one of .*train_text_document"):
            Corpus.open(wrong)
    (tmp_path / "train_text_document.bin").unlink()
    with pytest.raises(DataError, match="train_text_document.bin is missing"):
        Corpus.open(tmp_path / "train_text_document")


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), Writer(tmp_path / "c", np.dtype("<u2")) as writer:  # noqa: PT012
        writer.add(np.array([1, 2]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
