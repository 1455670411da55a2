"""`roots sample`: what an objective makes of a corpus, in words."""

from __future__ import annotations

import numpy as np
import pytest
from typer.testing import CliRunner

from roots_dist.cli.main import app
from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.errors import DataError
from roots_dist.learning.data.store import Writer
from roots_dist.learning.data.tokenizer import train
from roots_dist.learning.objectives.show_sample import ranges, sample_lines

TEXTS = [f"Fellow citizens of the year {year}, the Treasury and the Navy are in order." for year in range(1790, 1860)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shown")
    tokenizer = train(TEXTS, 220, kind="unigram")
    (folder / "tokenizer.json").write_text(tokenizer.json)
    with Writer(folder / "text", np.dtype("<u2")) as writer:
        for text in TEXTS:
            writer.add(np.array([*tokenizer.encode(text), tokenizer.end_of_document]))
        writer.commit()
    return folder


def config(place, **sections) -> Config:
    data = {"train": str(place / "text"), "tokenizer": str(place / "tokenizer.json"), "seq_length": 40} | sections.pop(
        "data", {}
    )
    return Config.model_validate({"model": {"vocab": 220}, "data": data} | sections)


T5 = {"model": {"family": "t5", "positions": "relative", "vocab": 220}, "objective": {"name": "spans"}}


def test_spans_are_shown_as_texts_with_sentinels(place):
    tokens, targets, decoder = list(sample_lines(config(place, **T5), step=0))
    assert tokens.startswith("tokens, 40\n    ") and tokens.endswith("</s>")
    for line in (tokens, targets, decoder):
        assert line.count("<extra_id_0>") == line.count("<extra_id_1>") == 1
    said = targets.split("\n    ")[1]
    assert decoder.split("\n    ")[1] == "<pad>" + said.removesuffix("</s>").strip()
    assert next(iter(sample_lines(config(place, **T5), step=1))) != tokens


def test_numbers_are_shown_in_runs_and_without_a_tokenizer_ids(place):
    c = config(place, objective={"reset_at_documents": True}, data={"tokenizer": None})
    shown = dict(line.split("\n    ") for line in sample_lines(c, step=0))
    assert all(word.isdecimal() for word in shown["tokens, 40"].split())
    assert sum(int(run.strip(")").partition("×")[2]) for run in shown["document_ids, 40"].split(", ")) == 40


def test_what_is_missing_is_named(place):
    with pytest.raises(DataError, match="data.tokenizer = None.*pad"):
        list(sample_lines(config(place, **T5, data={"tokenizer": None}), step=0))
    with pytest.raises(DataError, match="nowhere.bin"):
        list(sample_lines(config(place, data={"train": "nowhere"}), step=0))


def test_positions_are_shown_as_stretches():
    assert ranges([0, 1, 2, 0, 1, 0, 0]) == [(0, 2), (0, 1), (0, 0), (0, 0)]


def test_the_command_shows_the_special_tokens_too(place, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(config(place, **T5)))
    done = CliRunner().invoke(app, ["sample", str(tmp_path / "config.yaml")])
    last = done.output.rstrip("\n").rpartition("\n")[2]
    assert last.startswith(f"special tokens of {place}/tokenizer.json: ") and "eos </s> = 1 (by its name)" in last
