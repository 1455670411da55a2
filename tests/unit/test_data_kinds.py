"""Tokenizers of every kind, and sentences as sequences, held against the readers of transformers and the texts
themselves."""

import json
import re

import numpy as np
import pytest

from roots_dist.errors import DataError
from roots_dist.learning.data.prepare import prepare
from roots_dist.learning.data.sentences import sentences
from roots_dist.learning.data.specials import read_specials
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.data.tokenizer import load, train

TEXTS = [
    f"The people of State {n} met Mr. Smith. They spoke, then left! Did it rain in {1800 + n}? Yes; unquestionably."
    for n in range(60)
]


def test_wordpiece_is_what_bert_reads(tmp_path):
    import transformers

    ours = train(TEXTS, 160, kind="wordpiece")
    (tmp_path / "tokenizer.json").write_text(ours.json)
    theirs = transformers.BertTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    for text in TEXTS[:5]:
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)
    found = read_specials(tmp_path / "tokenizer.json", ours.vocab)
    assert (found.pad, found.unk, found.cls, found.sep, found.mask) == (0, 1, 2, 3, 4)
    tokens = {i: t for t, i in ours.backend.get_vocab().items()}
    assert [i for i in range(ours.vocab) if found.is_continuation[i]] == [
        i for i in sorted(tokens) if tokens[i].startswith("##")
    ]
    assert ours.end_token == "[SEP]"


def test_unigram_has_sentinels_where_t5_has_them(tmp_path):
    ours = train(TEXTS, 220, kind="unigram")
    (tmp_path / "tokenizer.json").write_text(ours.json)
    found = read_specials(tmp_path / "tokenizer.json", ours.vocab)
    assert found.pad == 0 and found.end == 1 and found.unk == 2
    assert found.sentinels == tuple(ours.vocab - 1 - i for i in range(100))  # <extra_id_0> is the last id
    assert ours.decode(ours.encode("The people of State 7 met.")) == "The people of State 7 met."
    assert not found.is_continuation[ours.encode("people")[0]]


def test_words_are_those_of_the_text_that_occur_often_enough():
    ours = train(TEXTS, 1000, kind="words", min_count=2)
    words = re.findall(r"[^\W\d_]+", " ".join(TEXTS).lower())
    assert set(ours.backend.get_vocab()) == {*words, "<unk>", "<eos>"}
    assert ours.decode(ours.encode("The PEOPLE, of Mars!")) == "the people of <unk>"
    rare = train([*TEXTS, "solitary"], 1000, kind="words", min_count=2)
    assert rare.decode(rare.encode("solitary people")) == "<unk> people"


@pytest.mark.parametrize(
    "kind, vocab, said",
    [("bytes", 300, "kind = 'bytes'"), ("unigram", 100, "vocab = 100"), ("bpe", 100, "vocab = 100")],
)
def test_what_cannot_be_trained_is_refused(kind, vocab, said):
    with pytest.raises(DataError, match=said):
        train(TEXTS, vocab, kind=kind)


def test_sentences_add_up_to_the_text_and_end_where_they_should():
    for text in [*TEXTS, "", "no end", 'A. B. Smith came.\n\nThen  he went… Where? "There." 12 of them. u.s. law']:
        assert "".join(sentences(text)) == text
    assert [s.strip() for s in sentences(TEXTS[1])] == [
        "The people of State 1 met Mr. Smith.", "They spoke, then left!", "Did it rain in 1801?", "Yes; unquestionably."
    ]  # fmt: skip


def test_a_corpus_of_sentences_has_a_sequence_for_each(tmp_path):
    source = tmp_path / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([source], tmp_path / "whole", vocab=160, kind="wordpiece", validation=0)
    options = dict(tokenizer=tmp_path / "whole" / "tokenizer.json", validation=0)
    made = prepare([source], tmp_path / "split", split_sentences=True, **options)
    whole, split = (Corpus.open(tmp_path / name / "train_text_document") for name in ("whole", "split"))
    assert whole.num_documents == split.num_documents == 60 == len(whole.lengths) and len(split.lengths) == 240
    assert np.array_equal(whole.tokens(0, whole.num_tokens), split.tokens(0, split.num_tokens))
    end = load(tmp_path / "split" / "tokenizer.json").end_of_document
    assert all(split.document(i)[-1] == end for i in range(60))
    assert not made.reused and prepare([source], tmp_path / "split", split_sentences=True, **options).reused
    assert not prepare([source], tmp_path / "split", **options).reused
