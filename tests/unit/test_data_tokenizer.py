"""Tokenizers: what is trained is exact and repeatable, what is given is checked."""

import json
import subprocess
import sys

import pytest
import tokenizers as hf

from roots_dist.errors import DataError
from roots_dist.learning.data.tokenizer import BLOOM_PATTERN, from_json, load, load_codec, train

TEXTS = [
    "The state of the union is strong, and the union of the states is stronger. " * 20,
    "Zwölf Boxkämpfer jagen 12345. 三十六計",
]
HOSTILE = [
    "\x00\x01",
    "🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301 \u202e",
    "<|endoftext|> said he",
    "\ufeff \r\n\t  \n\n",
    "a" * 100_000,
    "ﬁ ½ Ⅷ \U0010ffff",
]


@pytest.mark.parametrize("pre_tokenizer", ["gpt2", "bloom"])
@pytest.mark.parametrize("text", TEXTS + HOSTILE, ids=range(len(TEXTS + HOSTILE)))
def test_decoding_returns_the_text(pre_tokenizer, text):
    tokenizer = train(TEXTS, 300, pre_tokenizer)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.end_of_document not in ids and max(ids) < tokenizer.vocab == 300


def test_training_gives_the_same_in_another_process():
    code = f"from roots_dist.learning.data.tokenizer import train; print(train({TEXTS!r}, 330).sha256)"
    seen = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    assert seen == {train(TEXTS, 330).sha256 + "\n"}


def test_the_pre_tokenizers_cut_as_published():
    gpt2, bloom = (train(TEXTS, 300, name).backend.pre_tokenizer for name in ("gpt2", "bloom"))
    words = lambda cutter, text: [word for word, _ in cutter.pre_tokenize_str(text)]
    assert words(gpt2, "I'll pay 42, ok") == ["I", "'ll", "Ġpay", "Ġ42", ",", "Ġok"]
    assert words(bloom, "I'll pay 42, ok") == ["I'll", "Ġpay", "Ġ42", ",", "Ġok"]
    assert BLOOM_PATTERN == r" ?[^(\s|[.,!?…。，、।۔،])]+"


def test_few_texts_give_a_smaller_vocabulary():
    assert 257 < train(["ab ab ab"], 5000).vocab < 300


def test_a_saved_tokenizer_comes_back_the_same_whole_and_without_padding(tmp_path):
    trained = train(TEXTS, 300)
    trained.backend.enable_truncation(4)
    trained.backend.enable_padding(length=9)
    trained.backend.post_processor = hf.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    trained.backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXTS[0]) == train(TEXTS, 300).encode(TEXTS[0])
    assert load(tmp_path / "tokenizer.json").sha256 == loaded.sha256


def test_the_end_of_a_document_is_found_or_named():
    word_level = json.loads(hf.Tokenizer(hf.models.WordLevel({"a": 0, "</s>": 7, "STOP": 9}, unk_token="a")).to_str())
    assert (from_json(json.dumps(word_level)).end_of_document, from_json(json.dumps(word_level)).vocab) == (7, 10)
    assert from_json(json.dumps(word_level), end_of_document="STOP").end_of_document == 9
    with pytest.raises(DataError, match="end_of_document = '<end>': expected a token of"):
        from_json(json.dumps(word_level), end_of_document="<end>")
    del word_level["model"]["vocab"]["</s>"]
    with pytest.raises(DataError, match=r"by default one of <\|endoftext\|>"):
        from_json(json.dumps(word_level))


def test_text_is_read_and_written_without_knowing_what_ends_a_document(tmp_path):
    path = tmp_path / "tokenizer.json"
    backend = train(TEXTS, 300).backend
    backend.post_processor = hf.processors.TemplateProcessing(single="a $A", special_tokens=[("a", 5)])
    backend.enable_truncation(2)
    path.write_text(backend.to_str().replace("<|endoftext|>", "<stop>"))
    codec = load_codec(path)
    assert codec.encode(TEXTS[0]) == train(TEXTS, 300).encode(TEXTS[0])
    assert codec.decode(codec.encode(TEXTS[0])) == TEXTS[0]
    path.write_text("{}")
    for bad in (path, tmp_path / "nowhere.json"):
        with pytest.raises(DataError, match=r"^tokenizer = .*Fix: ") as refused:
            load_codec(bad)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "NoSuch"}}', b"x" * 10_000])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(DataError, match=r"tokenizer = '.*tokenizer.json': expected"):
        load(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="can be read"):
        load(tmp_path / "missing.json")


def test_impossible_wishes_are_refused():
    with pytest.raises(DataError, match="vocab = 256: expected at least 257"):
        train(TEXTS, 256)
    with pytest.raises(DataError, match=r"pre_tokenizer = 'gpt3': expected one of \['gpt2', 'bloom'\]"):
        train(TEXTS, 300, "gpt3")
