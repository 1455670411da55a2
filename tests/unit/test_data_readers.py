"""Documents out of files: every kind and compression, and a table of everything that is not a document."""

import bz2
import gzip
import json
import lzma

import pytest

from roots_dist.errors import DataError
from roots_dist.learning.data import embedded, readers
from roots_dist.learning.data.readers import Defect, Document

TEXTS = ["One.", "Zwei — dos.\u2028Same line.", "三\n"]
LINES = "".join(json.dumps({"text": t, "n": 1}, ensure_ascii=False) + "\n" for t in TEXTS).encode()


def zstd(data):
    import zstandard

    return zstandard.compress(data)


COMPRESSIONS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def read(path, key="text"):
    return list(readers.read(path, key))


@pytest.mark.parametrize("ending", COMPRESSIONS)
def test_lines_and_texts_are_read_in_every_compression(tmp_path, ending):
    lines, text = tmp_path / f"a.jsonl{ending}", tmp_path / f"b.TXT{ending}"
    lines.write_bytes(COMPRESSIONS[ending](LINES))
    text.write_bytes(COMPRESSIONS[ending]("\ufeffWhole\nfile".encode()))
    assert [(d.text, d.line, d.file) for d in read(lines)] == [(t, i, str(lines)) for i, t in enumerate(TEXTS, 1)]
    assert [d.text for d in read(text)] == ["Whole\nfile"]


LIST = [{"text": "One."}, {"text": 'a ] in it, "quoted"'}, {"n": [1, {"text": "no"}], "text": "三\n"}]
LISTS = {
    "on one line": (json.dumps(LIST), [1, 1, 1]),
    "on many": (json.dumps(LIST, indent=2, ensure_ascii=False) + "\n\n", [2, 5, 8]),
    "after a byte order mark": ("\ufeff  \n" + json.dumps(LIST), [2, 2, 2]),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_of_objects_is_read_as_lines_are(tmp_path, monkeypatch, case):
    path, (text, lines) = tmp_path / "a.json", LISTS[case]
    path.write_text(text, encoding="utf-8")
    for chunk in (1, 7, 1 << 16):
        monkeypatch.setattr("roots_dist.learning.data.json_objects.CHUNK", chunk)
        assert [(d.text, d.line) for d in read(path)] == [(r["text"], n) for r, n in zip(LIST, lines)]


BROKEN = {
    '[{"text": "a"}\n, {"text": "b"': (1, "corrupt JSON"),
    '[{"text": "a"}\n {"text": "b"}]': (1, "followed by neither a comma"),
    '[{"text": "a"}] 5': (1, "something follows the list"),
    '[{"text": "a"},]': (1, "corrupt JSON"),
    '[{"text": "a"}, {"n": {"a": 1, "a": 2}}]': (1, "key 'a' stands twice"),
    '[{"text": "a"}, 7]': (1, "int in a list of objects"),
    "[": (0, "does not end"),
    "[{]": (0, "corrupt JSON"),
}


@pytest.mark.parametrize("text", BROKEN)
def test_what_is_before_a_damage_of_a_list_is_read(tmp_path, text):
    path, (count, reason) = tmp_path / "a.json", BROKEN[text]
    path.write_text(text)
    *documents, last = read(path)
    assert len(documents) == count and isinstance(last, Defect) and reason in str(last)


def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    from roots_dist.errors import DataError
    from roots_dist.learning.data.rows import rows

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"]), path)
    assert list(map(str, read(path))) == [f"{path}:1: two columns of one name (text)"]
    with pytest.raises(DataError, match="a.parquet:1 = 'text': expected a name of its own for each column. Fix: ren"):
        list(rows(path))


def test_an_empty_list_has_no_documents(tmp_path):
    (tmp_path / "a.json").write_text(" [ ] ")
    assert read(tmp_path / "a.json") == []


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_archives_may_be_joined(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(COMPRESSIONS[ending](LINES) * 2)
    assert [d.text for d in read(path)] == TEXTS * 2


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99, -1])
@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_truncated_archive_is_a_defect_with_its_place(tmp_path, ending, keep):
    lines = b"".join(b'{"text": "%d"}\n' % (i * 7919**3) for i in range(5000))
    packed = COMPRESSIONS[ending](lines)
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(packed[: int(len(packed) * keep) if isinstance(keep, float) else keep])
    *documents, last = read(path)
    assert all(isinstance(d, Document) or d.kind == "corrupt JSON" for d in documents)
    assert isinstance(last, Defect) and last.kind == "truncated or damaged archive"
    assert last.line == len(documents) + 1


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_damaged_archive_is_a_defect(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(b"not an archive at all\n")
    assert [d.kind for d in read(path)] == ["truncated or damaged archive"]


HOSTILE = {  # a line: the kind and a word of the detail
    b'{"text": "cut of': ("corrupt JSON", "Unterminated"),
    b"plain words": ("corrupt JSON", "Expecting value"),
    b"[" * 100_000: ("corrupt JSON", "recursion"),
    b'{"text": ' + b"9" * 5000 + b"}": ("corrupt JSON", "digits"),
    b'{"text": "\xff"}': ("bad UTF-8", "at byte 10"),
    '{"text": "a"}'.encode("utf-16"): ("bad UTF-8", "at byte 0"),
    b'{"txt": "a", "id": 1}': ("missing key", "'text'; there are ['id', 'txt']"),
    b'{"text": "a", "text": "b"}': ("corrupt JSON", "key 'text' stands twice"),
    b'["a"]': ("not a JSON object", "list"),
    b'"a"': ("not a JSON object", "str"),
    b"null": ("not a JSON object", "NoneType"),
    b'{"text": 5}': ("text is not a string", "int"),
    b'{"text": null}': ("text is not a string", "NoneType"),
    b'{"text": {"text": "a"}}': ("text is not a string", "dict"),
    b'{"text": ""}': ("empty document", ""),
    b'{"text": " \\n\\t"}': ("empty document", ""),
    b'{"text": "half \\ud83d of a pair"}': ("text is not valid Unicode", "lone surrogate at 5"),
}


@pytest.mark.parametrize("line", HOSTILE, ids=lambda line: line[:24].decode("latin-1"))
def test_a_bad_line_is_named_and_the_next_is_read(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n\n' + line + b'\n{"text": "after"}')
    before, *defects, after = read(path)
    kind, word = HOSTILE[line]
    assert (before.text, after.text) == ("before", "after")
    assert defects[0].kind == kind and defects[0].line == 3 and word in defects[0].detail
    assert str(defects[0]).startswith(f"{path}:3: {kind}")


def test_bad_utf8_in_a_text_is_found_at_its_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\nfine\nb\xe9d\n")
    assert read(path) == [Defect(str(path), 3, "bad UTF-8", "at byte 11")]


def test_a_line_without_end_does_not_fill_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_BYTES", 1000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 5000 + b'"}\n{"text": "after"}\n')
    (tmp_path / "a.txt").write_bytes(b"x" * 1001)
    long, after = read(tmp_path / "a.jsonl")
    assert (long.kind, long.line, after.text, after.line) == ("document too long", 1, "after", 2)
    assert [d.kind for d in read(tmp_path / "a.txt")] == ["document too long"]


def test_rows_of_parquet(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "body": ["one", None, "", "four"]}), path, row_group_size=2)
    assert [d.text if isinstance(d, Document) else d.kind for d in read(path, "body")] == [
        "one", "text is not a string", "empty document", "four",
    ]  # fmt: skip
    assert [d.line for d in read(path, "body")] == [1, 2, 3, 4]
    assert [d.kind for d in read(path, "text")] == ["missing key"]
    assert {d.kind for d in read(path, "id")} == {"text is not a string"}
    path.write_bytes(path.read_bytes()[:-9])
    assert [d.kind for d in read(path, "body")] == ["truncated or damaged archive"]


def test_files_are_found_in_folders_globs_and_names_each_once(tmp_path):
    for name in ("b.jsonl", "a.txt", "sub/c.jsonl.gz", "note.md", ".hidden/d.txt", "e.parquet.gz", "odd[1].txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    names = lambda *inputs: [str(p.relative_to(tmp_path)) for p in readers.find(inputs)]
    assert names(tmp_path) == ["a.txt", "b.jsonl", "odd[1].txt", "sub/c.jsonl.gz"]
    assert names(tmp_path / "b.jsonl", tmp_path, tmp_path / "*.txt")[0] == "b.jsonl"
    assert len(names(tmp_path / "b.jsonl", tmp_path, tmp_path / "**/*.txt")) == 4
    assert names(tmp_path / "odd[1].txt") == ["odd[1].txt"]


def test_links_are_followed_once_and_what_is_passed_over_is_counted(tmp_path):
    """Linked folders and files, a link to its own parent, links to nothing, other endings, hidden files."""
    for name in ("corpus/a.jsonl", "else/b.txt", "else/deep/c.jsonl", "corpus/note.md", "corpus/d.md", "corpus/bare",
                 "corpus/e.parquet.gz", "corpus/.git/f.txt", "one.txt"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    corpus = tmp_path / "corpus"
    for link, target in (("linked", "../else"), ("again", "../else/deep"), ("round", "."), ("file.txt", "../one.txt"),
                         ("same.jsonl", "a.jsonl"), ("dead.jsonl", "none.jsonl"), ("dead", "nowhere")):  # fmt: skip
        (corpus / link).symlink_to(target)
    passed = readers.PassedOver()
    found = readers.find([corpus], passed)
    assert sorted(path.resolve().name for path in found) == ["a.jsonl", "b.txt", "c.jsonl", "one.txt"]
    assert {what: count for what, count in passed.items() if count} == {
        "file ending in .md": 2, "file ending in nothing": 1, "file ending in .parquet.gz": 1, "dead link": 2,
        "hidden file or folder": 1,
    }  # fmt: skip
    assert readers.listed(passed).startswith("2 × dead link, 2 × file ending in .md, 1 × ")
    for pattern, names in (("*.jsonl", ["a.jsonl"]), ("linked/*", ["b.txt"])):
        passed = readers.PassedOver()
        assert [path.name for path in readers.find([corpus / pattern], passed) if not path.is_symlink()] == names
        said = {"*.jsonl": "1 × dead link", "linked/*": "1 × folder that a glob matches"}
        assert readers.listed(passed) == said[pattern]


NESTED = {
    "meta.text": ({"meta": {"text": "a"}}, "a"),
    "a.b.c": ({"a": {"b": {"c": "a"}}}, "a"),
    "a.b": ({"a.b": "a", "a": {"b": "not this"}}, "a"),
    "x.y.z": ({"x.y": {"z": "a"}, "x": {}}, "a"),
}


@pytest.mark.parametrize("key", NESTED)
def test_a_key_may_be_nested(tmp_path, key):
    import pyarrow
    from pyarrow import parquet

    value, text = NESTED[key]
    (tmp_path / "a.jsonl").write_text(json.dumps(value))
    parquet.write_table(
        pyarrow.Table.from_pylist([{"id": 1, **{k: v for k, v in value.items() if v}}]), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.parquet"):
        assert [d.text for d in read(tmp_path / name, key)] == [text]


OTHER_KEYS = {
    "content": {"content": "a"},
    "meta.text": {"id": "a long identifier", "meta": {"text": "a"}},
    "story": {"id": "7", "story": "It rained.", "n": 3},
    "KEY": {"id": 7},
    "KEY ": {"text.md": None, "text": {}},
}


@pytest.mark.parametrize("key", OTHER_KEYS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_missing_key_is_told_with_the_key_that_may_be_meant(tmp_path, key, ending):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / f"a.{ending}"
    if ending == "jsonl":
        path.write_text(json.dumps(OTHER_KEYS[key]))
    else:
        parquet.write_table(pyarrow.Table.from_pylist([{k: v or None for k, v in OTHER_KEYS[key].items()}]), path)
    (defect,) = read(path, "words.text")
    assert (defect.kind, defect.fix) == ("missing key", f"name it with --text-key {key.strip()}")
    assert defect.detail == f"'words.text'; there are {sorted(OTHER_KEYS[key])}"


@pytest.mark.parametrize(
    "given, message",
    [
        ([], "inputs = []: expected at least one"),
        (["nowhere.jsonl"], "'nowhere.jsonl': expected a file, a folder or a glob that matches"),
        (["*.jsonl"], "'*.jsonl': expected a file"),
        (["."], "'.': expected a folder with .txt, .jsonl"),
        (["note.md"], "'note.md': expected a name ending in one of .txt"),
        (["e.parquet.gz"], "all but parquet also with .gz"),
        (["embedded:moby"], "expected embedded: and one of ['human-rights', 'state-of-the-union']"),
    ],
)
def test_inputs_that_are_none_are_refused(tmp_path, monkeypatch, given, message):
    monkeypatch.chdir(tmp_path)
    for name in ("note.md", "e.parquet.gz"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError) as error:
        readers.find(given)
    assert message in str(error.value)


def test_the_declaration_is_whole_in_every_language():
    documents = read(embedded.path_of("embedded:human-rights"))
    assert len(documents) == 93 and sum(len(d.text.encode()) for d in documents) == 1_416_291
    paragraphs = [d.text.split("\n\n") for d in documents]
    assert all(len(found) > 80 and all(found) for found in paragraphs)
    assert not any(bad in d.text for d in documents for bad in ("&amp;", "<", "  ", "\ufffd"))


def test_the_embedded_corpus_is_whole():
    documents = read(embedded.path_of("embedded:state-of-the-union"))
    assert len(documents) == 233 and all(isinstance(d, Document) for d in documents)
    assert sum(len(d.text.encode()) for d in documents) == 10_761_013
    assert not any(bad in d.text for d in documents for bad in ("&quot;", "\x02", "  ", "\ufffd"))
    assert documents[-1].position <= embedded.path_of("embedded:state-of-the-union").stat().st_size
