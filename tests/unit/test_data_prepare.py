"""`prepare`: the same bytes on any number of workers, complete or not there, a word for everything that is wrong."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import psutil
import pytest
from patience import comes_true, gone

from roots_dist.errors import DataError
from roots_dist.learning.data import encode
from roots_dist.learning.data.encode import encode_texts
from roots_dist.learning.data.manifest import read_manifest
from roots_dist.learning.data.order import fraction
from roots_dist.learning.data.prepare import prepare
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.data.tokenizer import load, train

TEXTS = [f"Document {i}: the union of {i * i} states, {'strong ' * (i % 17)}and {i % 5} more." for i in range(300)]


def write_lines(path, texts=TEXTS):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "manifest.json"}


@pytest.fixture
def lines(tmp_path):
    return write_lines(tmp_path / "a.jsonl")


def test_the_folder_holds_every_document_once_in_its_split(tmp_path, lines, monkeypatch):
    monkeypatch.setattr(
        "roots_dist.learning.data.prepare.BATCH_BYTES", 1000
    )  # numbers of documents run on over batches
    manifest = prepare([lines], tmp_path / "out", vocab=400, validation=0.2, seed=5)
    tokenizer = load(tmp_path / "out/tokenizer.json")
    held_out = fraction(5, np.arange(len(TEXTS))) < 0.2
    for split, mine in (("train", ~held_out), ("validation", held_out)):
        corpus = Corpus.open(tmp_path / f"out/{split}_text_document")
        expected = [text for text, take in zip(TEXTS, mine) if take]
        found = [corpus.document(i) for i in range(corpus.num_documents)]
        assert [tokenizer.decode(ids[:-1]) for ids in found] == expected
        assert {int(ids[-1]) for ids in found} == {tokenizer.end_of_document}
        size = read_manifest(tmp_path / f"out/{split}_text_document").split_of(f"{split}_text_document")
        assert (size.documents, size.tokens) == (len(expected), corpus.num_tokens)
        assert size.bytes == sum(len(text.encode()) for text in expected)
    assert manifest.tokenizer_sha256 == tokenizer.sha256 and 30 < held_out.sum() < 90
    assert f"{manifest.train.documents:,} documents" in manifest.summary()


def test_the_tokenizer_never_sees_held_out_text(tmp_path):
    held_out = fraction(1234, np.arange(200)) < 0.5
    texts = ["zqzqzq zqzqzq" if out else "plain words here" for out in held_out]
    prepare([write_lines(tmp_path / "a.jsonl", texts)], tmp_path / "out", vocab=300, validation=0.5)
    assert "zq" not in load(tmp_path / "out/tokenizer.json").backend.get_vocab()


def test_several_workers_write_the_same_bytes_as_one(tmp_path, lines):
    more = write_lines(tmp_path / "b.jsonl", [text * 60 for text in TEXTS])  # several batches
    for workers in (1, 2):
        prepare([lines, more], tmp_path / f"out{workers}", vocab=400, workers=workers)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2") and len(contents(tmp_path / "out1")) == 5


def test_again_with_the_same_is_up_to_date_and_anything_else_is_not(tmp_path, lines):
    run = lambda **changed: prepare([lines], tmp_path / "out", **{"vocab": 300, **changed})
    assert not run().reused
    start = time.process_time()
    again = run()
    assert again.reused and time.process_time() - start < 1 and "up to date" in again.summary()
    os.utime(lines)
    assert run().reused, "touched, but the same"
    assert not run(vocab=301).reused and run(vocab=301, workers=2).reused
    stored = tmp_path / "out/train_text_document.bin"
    stored.write_bytes(stored.read_bytes()[:-2] + b"\x00\x01")
    assert not run(vocab=301).reused, "an output was changed"
    state = stored.stat()
    stored.write_bytes(stored.read_bytes()[:-2])
    os.utime(stored, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert not run(vocab=301).reused, "an output was cut, and its time set back"
    (tmp_path / "out/tokenizer.json").unlink()
    assert not run(vocab=301).reused, "an output is missing"
    (tmp_path / "out/manifest.json").write_text('{"format": "roots-corpus-1"')
    assert not run(vocab=301).reused, "the manifest is damaged"
    write_lines(lines, TEXTS[:-1])
    assert not run(vocab=301).reused and run(vocab=301).reused


def test_a_given_tokenizer_is_used_as_it_is(tmp_path, lines):
    train(["other words"], 280).backend.save(str(tmp_path / "given.json"))
    manifest = prepare([lines], tmp_path / "out", tokenizer=tmp_path / "given.json", vocab=9999)
    assert (
        load(tmp_path / "out/tokenizer.json").sha256
        == load(tmp_path / "given.json").sha256
        == manifest.tokenizer_sha256
    )
    assert "as given" in manifest.summary() and manifest.end_of_document == "<|endoftext|>"


def a_tokenizer(folder, **settings):
    """Byte-level, with <s>, </s> and <turn>, and what its tokenizer_config.json says."""
    folder.mkdir(exist_ok=True)
    made = train(TEXTS, 300).backend
    made.add_special_tokens(["<s>", "</s>", "<turn>"])
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


@pytest.mark.parametrize("split_sentences", [False, True])
def test_each_document_begins_with_the_tokenizers_bos_if_it_is_to(split_sentences, tmp_path, lines):
    given = a_tokenizer(tmp_path / "given", bos_token="<turn>", eos_token="</s>")
    write_lines(lines, [f"{text} It rained. Then it stopped." for text in TEXTS])
    how = {"tokenizer": given, "split_sentences": split_sentences}
    plain = prepare([lines], tmp_path / "plain", **how)
    begun = prepare([lines], tmp_path / "out", begin_of_document=True, **how)
    bos, eos = (load(given).backend.token_to_id(token) for token in ("<turn>", "</s>"))
    one, other = (Corpus.open(tmp_path / name / "train_text_document") for name in ("plain", "out"))
    for i in range(one.num_documents):
        assert other.document(i).tolist() == [bos, *one.document(i).tolist()] and one.document(i)[-1] == eos
    assert begun.train.tokens == plain.train.tokens + plain.train.documents
    assert "document   <turn> TEXT </s>" in begun.summary() and "document   TEXT </s>" in plain.summary()


def test_the_files_of_a_given_tokenizer_go_with_it(tmp_path, lines):
    given = a_tokenizer(tmp_path / "given", bos_token="<s>", eos_token="</s>")
    (given.parent / "generation_config.json").write_text('{"eos_token_id": [301, 302]}')
    run = lambda **more: prepare([lines], tmp_path / "out", **{"tokenizer": given} | more)
    assert run().end_of_document == "</s>" and run().reused
    found = load(tmp_path / "out" / "tokenizer.json")
    assert found.specials == load(given).specials and found.specials.bos is not None and len(found.specials.eos) == 2
    assert prepare([lines, tmp_path / "out"], tmp_path / "out", tokenizer=given).reused, "they are no inputs"
    a_tokenizer(given.parent, bos_token="<s>", eos_token="<turn>")
    assert (again := run()).end_of_document == "<turn>" and not again.reused
    assert not run(tokenizer=None, vocab=300).reused
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "tokenizer.json" in names and not names & {"tokenizer_config.json", "generation_config.json"}


def test_what_a_tokenizer_loses_is_counted_and_said(tmp_path, lines):
    """Only what its own normalizer does not change: lower case is none, an unknown letter and white space are."""
    assert prepare([lines], tmp_path / "bpe", vocab=300).losses == {}
    train(TEXTS, 200, kind="wordpiece").backend.save(str(tmp_path / "lower.json"))
    texts = ["Strong STATES union. More", "strong  states", "strong ☃ states, 七 more", "more ☃", " union ", "union"]
    how = {"tokenizer": tmp_path / "lower.json", "validation": 0}
    found = prepare([write_lines(lines, texts)], tmp_path / "out", **how)
    assert found.losses == {"characters": 2, "white space": 2}
    assert found.loss_example == "'☃ states, 七 more' -> '[unk] states, [unk] more'"
    told = "lossy      of 6 documents 2 lose characters, 2 lose white space when decoded, first '☃ states, 七 more' -> "
    assert told in found.summary() and read_manifest(tmp_path / "out").losses == found.losses


def test_a_prepared_folder_may_lie_among_its_inputs(tmp_path):
    write_lines(tmp_path / "a.jsonl")
    assert not prepare([tmp_path], tmp_path, vocab=300).reused
    assert prepare([tmp_path], tmp_path, vocab=300).reused


def test_an_input_that_changes_while_it_is_read_is_refused(tmp_path, lines):
    with pytest.raises(DataError, match=r"input = '.*a.jsonl': expected a file that stays the same"):
        prepare([lines], tmp_path / "out", vocab=300, progress=lambda p: lines.write_bytes(lines.read_bytes()))
    assert list((tmp_path / "out").iterdir()) == []


def test_progress_ends_at_its_total(tmp_path, lines):
    seen = []
    prepare([lines], tmp_path / "out", vocab=300, progress=seen.append)
    assert [p.stage for p in seen] == ["tokenizer", "tokens"]
    assert seen[-1].done == seen[-1].total == lines.stat().st_size and seen[-1].documents == len(TEXTS)


def test_defects_stop_or_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good one"}\n{"text": ""}\nbroken\n{"text": "good two"}\n{"text": "\xff"}\nbroken\n')
    with pytest.raises(DataError) as error:
        prepare([path], tmp_path / "out", vocab=300)
    assert str(error.value) == f"{path}:2: empty document. Fix: correct it, or skip it with --on-error skip."
    assert list((tmp_path / "out").iterdir()) == []
    manifest = prepare([path], tmp_path / "out", vocab=300, validation=0, on_error="skip")
    assert manifest.defects == {"empty document": 1, "corrupt JSON": 2, "bad UTF-8": 1}
    assert manifest.examples[1].startswith(f"{path}:3: corrupt JSON") and manifest.train.documents == 2
    assert "skipped    1 empty document, 2 corrupt JSON, 1 bad UTF-8" in manifest.summary()


def test_what_is_passed_over_is_said_and_linked_folders_are_read(tmp_path):
    """Also when nothing is to be done; but not what is the command's own."""
    for folder in ("corpus", "else"):
        (tmp_path / folder).mkdir()
        write_lines(tmp_path / folder / "a.jsonl", TEXTS[:30] if folder == "corpus" else TEXTS[30:90])
    (tmp_path / "corpus/linked").symlink_to(tmp_path / "else")
    (tmp_path / "corpus/dead.jsonl").symlink_to("nowhere")
    (tmp_path / "corpus/note.md").write_text("no corpus")
    for _ in range(2):
        manifest = prepare([tmp_path / "corpus"], tmp_path / "corpus", vocab=300)
        assert manifest.train.documents + manifest.validation.documents == 90
        assert "not read   1 × dead link, 1 × file ending in .md" in manifest.summary()
    assert manifest.reused
    (tmp_path / "corpus/note.md").unlink()
    (tmp_path / "corpus/dead.jsonl").unlink()
    assert "not read" not in prepare([tmp_path / "corpus"], tmp_path / "corpus", vocab=300).summary()


def test_a_missing_key_is_told_with_its_option(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "good one"}\n')
    said = (
        "missing key ('text'; there are ['content']). Fix: name it with --text-key content, or skip it with --on-error"
    )
    with pytest.raises(DataError) as error:
        prepare([path], tmp_path / "out", vocab=300)
    assert said in str(error.value)
    with pytest.raises(DataError, match="Fix: name it with --text-key content"):
        prepare([path], tmp_path / "out", vocab=300, on_error="skip")
    assert prepare([path], tmp_path / "out", vocab=300, validation=0, text_key="content").train.documents == 1


MESSAGES = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
CHATS = {
    "messages": ({"messages": MESSAGES}, ""),
    "messages as JSON text": ({"messages": json.dumps(MESSAGES)}, ""),
    "ShareGPT": ({"id": 7, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, ""),
    "messages of another name": ({"dialog": MESSAGES}, " finetune.text_column=dialog"),
    "Alpaca": ({"instruction": "a", "input": "", "output": "b"}, ""),
    "prompt and completion": ({"prompt": "a", "completion": "b"}, ""),
    "prompt and response": (
        {"prompt": "a", "response": "b"},
        " finetune.text_column=prompt finetune.label_column=response, or read one of their texts with --text-key prom",
    ),
    "in capitals": ({"Question": "a", "Answer": "b"}, " finetune.text_column=Question finetune.label_column=Answer"),
    "chosen and rejected": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "dpo"),
}


@pytest.mark.parametrize("case", CHATS)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_rows_of_chats_are_answered_with_how_to_train_on_them(tmp_path, case, ending):
    import pyarrow
    from pyarrow import parquet

    (row, words), path = CHATS[case], tmp_path / f"my chats.{ending}"
    if ending == "jsonl":
        path.write_text(json.dumps(row))
    else:
        parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    objective = " objective.name=" + ("dpo" if words == "dpo" else f"instruct{words}")
    expected = (
        "Fix: train on these chats as they are, roots finetune CONFIG finetune.init_from=RUN "
        f"data.train='{path}'{objective}"
    )
    for options in ({}, {"text_key": "dialog"}, {"on_error": "skip"}):
        with pytest.raises(DataError) as error:
            prepare([path], tmp_path / "out", vocab=300, **options)
        assert expected in str(error.value), options


def test_rows_that_are_no_chats_keep_the_key_of_their_text(tmp_path):
    for row in ({"title": "a", "body": "b"}, {"words": ["a"], "body": "b"}, {"parts": [{"n": 1}], "body": "b"}):
        (tmp_path / "a.jsonl").write_text(json.dumps(row))
        with pytest.raises(DataError, match="Fix: name it with --text-key body, or"):
            prepare([tmp_path / "a.jsonl"], tmp_path / "out", vocab=300)


WRONG = {
    "validation = 1.0: expected a share": {"validation": 1.0},
    "validation = nan: expected a share": {"validation": float("nan")},
    "validation = 0.999999: expected documents left for training": {"validation": 0.999999},
    "workers = 0: expected at least 1": {"workers": 0},
    "on_error = 'ignore': expected stop or skip": {"on_error": "ignore"},
    "end_of_document = '</s>': expected none with a tokenizer that is trained": {"end_of_document": "</s>"},
    "begin_of_document = True: expected a tokenizer that is given": {"begin_of_document": True},
    "vocab = 10: expected at least 257": {"vocab": 10},
    "vocab = 1000000000: expected at most 16,777,216, the largest model.vocab": {"vocab": 10**9},
    "vocab = 99999999999999999999: expected at most": {"vocab": 10**20 - 1},
    "pre_tokenizer = 'llama': expected one of": {"pre_tokenizer": "llama"},
    "tokenizer = 'none.json': expected a tokenizer.json that can be read": {"tokenizer": "none.json"},
    "a.jsonl:1: missing key ('body'; there are ['text'])": {"text_key": "body"},
    "input = 'none.jsonl': expected a file, a folder or a glob": {"inputs": ["none.jsonl"]},
    "output = 'a.jsonl/out': expected a folder that can be created": {"output": "a.jsonl/out"},
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_wishes_leave_no_file(tmp_path, lines, monkeypatch, message):
    monkeypatch.chdir(tmp_path)
    changed = {"inputs": ["a.jsonl"], "output": "out", "vocab": 300, **WRONG[message]}
    with pytest.raises(DataError) as error:
        prepare(changed.pop("inputs"), changed.pop("output"), **changed)
    assert str(error.value).startswith(message) and "Fix:" in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").rglob("*"))


def test_no_document_at_all_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\n\n")
    with pytest.raises(DataError, match=r"inputs = '1 files': expected a document in them \(the files are empty\)"):
        prepare([tmp_path / "a.jsonl"], tmp_path / "out")


def test_one_document_cannot_be_held_out_from(tmp_path):
    manifest = prepare([write_lines(tmp_path / "a.jsonl", TEXTS[:1])], tmp_path / "out", vocab=300)
    assert (manifest.train.documents, manifest.validation.documents) == (1, 0)
    assert "no document fell to validation" in manifest.summary()
    assert not (tmp_path / "out/validation_text_document.bin").exists()


def test_two_at_once_in_a_folder_are_kept_apart(tmp_path, lines):
    entered, leave = threading.Event(), threading.Event()

    def hold(_):
        entered.set()
        leave.wait(20)

    first = threading.Thread(target=prepare, args=([lines], tmp_path / "out"), kwargs={"vocab": 300, "progress": hold})
    first.start()
    assert entered.wait(20)
    with pytest.raises(DataError, match="another `roots prepare` is running"):
        prepare([lines], tmp_path / "out", vocab=300)
    leave.set()
    first.join()
    assert prepare([lines], tmp_path / "out", vocab=300).reused


def test_foreign_and_damaged_manifests(tmp_path):
    assert read_manifest(tmp_path / "some_text_document") is None
    (tmp_path / "manifest.json").write_text('{"made by": "others"}')
    assert read_manifest(tmp_path) is None
    (tmp_path / "manifest.json").write_text('{"format": "roots-corpus-1"}')
    with pytest.raises(DataError, match="manifest = .*: expected what `roots prepare` wrote"):
        read_manifest(tmp_path)


def _die(*_):
    os._exit(9)


def test_a_worker_that_dies_is_reported_and_the_others_end(tmp_path, monkeypatch):
    monkeypatch.setattr(encode, "_encode", _die)
    with pytest.raises(DataError, match="workers = 2: expected workers that keep running, but one died"):
        list(encode_texts(iter([["a"], ["b"]]), tmp_path / "none", "x", np.dtype("<u2"), workers=2))
    assert not [
        child for child in psutil.Process().children(recursive=True) if "spawn_main" in " ".join(child.cmdline())
    ]


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_interrupted_it_leaves_no_half_file_and_no_process_and_starts_clean(tmp_path, lines, how):
    big = write_lines(
        tmp_path / "big.jsonl", [f"{text} {i} " * 40 for i in range(40) for text in TEXTS]
    )  # seconds of work
    train(TEXTS, 300).backend.save(str(tmp_path / "given.json"))
    code = (
        "import sys\nfrom roots_dist.learning.data.prepare import prepare\n"
        "if __name__ == '__main__':\n    prepare([sys.argv[1]], sys.argv[2], tokenizer='given.json', workers=2)\n"
    )
    (tmp_path / "run.py").write_text(code)
    out, partial = tmp_path / "out", tmp_path / "out/.partial/train_text_document.bin.partial"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.Popen(
        [sys.executable, "run.py", str(big), str(out)],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert comes_true(lambda: (partial.exists() and partial.stat().st_size > 0) or child.poll() is not None)
    assert child.poll() is None
    workers = psutil.Process(child.pid).children(recursive=True)
    assert len(workers) >= 2
    if how == signal.SIGINT:
        os.killpg(child.pid, how)  # Ctrl-C reaches the workers too
    else:
        child.send_signal(how)
    _, errors = child.communicate(timeout=250)
    told = errors.count(b"Traceback") - errors.count(b"direct cause")  # in a codec Python makes two of one interrupt
    assert child.returncode != 0 and told <= 1
    assert not [p.name for p in out.iterdir() if p.name != ".partial"]
    assert how == signal.SIGKILL or not (out / ".partial").exists()
    assert gone((worker.pid for worker in workers), within=30)
    prepare([lines], out, vocab=300)
    prepare([lines], tmp_path / "undisturbed", vocab=300)
    assert contents(out) == contents(tmp_path / "undisturbed")
