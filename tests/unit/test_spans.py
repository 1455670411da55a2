"""Span corruption against the paper: exact lengths, which masks there are and how often each comes, sentinels, the
ends.

The reference below is written from Raffel et al. 2020, section 3.1.4 and appendix, and from what their code does: hide
round(density · n) tokens in round(hidden / mean) spans, both cut at random into as many runs; the text begins with a
run that is seen.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from roots_dist.config.load import load
from roots_dist.config.records import num_sentinels, span_lengths_of
from roots_dist.config.schema import Config
from roots_dist.errors import DataError
from roots_dist.learning.data.specials import read_specials, synthetic_specials
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.objectives.spans import Spans, padded_pair, segments
from roots_dist.learning.objectives.synthetic import proof_objective
from roots_dist.world.batch import IGNORE

VOCAB = 400


def config(seq: int, masked: float = 0.15, span: float = 3.0) -> Config:
    sizes = {"family": "t5", "positions": "relative", "vocab": VOCAB}
    return Config.model_validate(
        {
            "model": sizes,
            "data": {"seq_length": seq},
            "objective": {"name": "spans", "mask_probability": masked, "mean_span_length": span},
        }
    )


def specials(vocab: int = VOCAB, sentinels: int = 150):
    """pad 0, end 1, unk 2; sentinels at the end, counted backwards as T5's are."""
    special = (np.arange(vocab) < 3) | (np.arange(vocab) >= vocab - sentinels)
    found = dict(special=special, sentinels=tuple(range(vocab - 1, vocab - 1 - sentinels, -1)), pad=0, end=1)
    return type(synthetic_specials(vocab))(name="t", is_continuation=np.zeros(vocab, dtype=bool), **found)


def stream(tokens: int) -> Corpus:
    """Words 3 … in the order of the numbers, so that each token tells where it stood."""
    stored = 3 + np.arange(tokens) % (VOCAB - 160)
    return Corpus("t", np.array([tokens]), np.array([0]), np.array([0, 1]), stored)


def drawn(objective: Spans, source: Corpus, number: int) -> dict[str, np.ndarray]:
    return objective.sample(
        source, number % objective.num_samples(source), np.random.Generator(np.random.Philox(key=number))
    )


def reference_lengths(seq: int, masked: float, span: float) -> tuple[int, int, int]:
    """The most tokens that fit: what is seen, a sentinel for each span, the end."""

    def inputs_and_targets(tokens: int) -> tuple[int, int]:
        hidden = round(tokens * masked)
        spans = max(1, round(hidden / span))
        return tokens - hidden + spans + 1, hidden + spans + 1

    most = max(tokens for tokens in range(seq // 2, 4 * seq) if inputs_and_targets(tokens)[0] <= seq)
    return most, *inputs_and_targets(most)


def reference_mask(tokens: int, hidden: int, spans: int, draw: np.random.Generator) -> np.ndarray:
    """bool [tokens]: hidden. Runs by shuffling which items begin one, as the paper's code does."""

    def runs(items: int) -> np.ndarray:
        begins = np.arange(items - 1) < spans - 1
        draw.shuffle(begins)
        return np.bincount(np.cumsum(np.concatenate([[0], begins])), minlength=spans)

    lengths = np.stack([runs(tokens - hidden), runs(hidden)], 1).ravel()
    return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)


def mask_of(objective: Spans, fields: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """Which tokens of the window are not in the inputs; every word of a window comes once."""
    return ~np.isin(tokens, fields["tokens"])


def test_the_papers_example():
    """512 positions take 568 tokens and give 114 targets; a quarter of that batch's tokens goes through the decoder."""
    assert span_lengths_of(config(512))[:3] == (568, 512, 114)


@pytest.mark.parametrize("masked", [0.1, 0.15, 0.25, 0.3, 0.5])
@pytest.mark.parametrize("span", [1.5, 2.0, 3.0, 5.0, 10.0])
def test_lengths_are_the_papers(masked, span):
    for seq in [*range(40, 130), 256, 300, 511, 512, 513, 1024, 2048]:
        found = span_lengths_of(config(seq, masked, span))
        assert found[:3] == reference_lengths(seq, masked, span)
        assert found.inputs == seq  # nothing is padded


@pytest.mark.parametrize("seq", range(3, 40))
@pytest.mark.parametrize("masked, span", [(0.15, 3.0), (0.01, 3.0), (0.9, 3.0), (0.5, 1.0), (0.15, 40.0)])
def test_short_and_extreme_settings_hide_something_and_show_something(seq, masked, span):
    c = config(seq, masked, span)
    objective = Spans(c, specials())
    fields = drawn(objective, stream(4000), 1)
    found = span_lengths_of(c)
    assert found.masked >= found.spans >= 1 and found.tokens - found.masked >= found.spans
    assert len(fields["tokens"]) == seq and len(fields["targets"]) == len(fields["decoder_tokens"]) == found.targets


@pytest.mark.parametrize("seq", [16, 64, 512])
def test_a_sample_is_the_window_with_sentinels_for_its_spans(seq):
    objective, source = Spans(config(seq), specials()), stream(20 * 568)
    lengths, sentinels = objective.lengths, set(objective.specials.sentinels)
    for number in range(30):
        fields = drawn(objective, source, number)
        start = number % objective.num_samples(source) * lengths.tokens
        *inputs, end = fields["tokens"].tolist()
        *targets, last = fields["targets"].tolist()
        assert end == last == objective.specials.end
        assert fields["decoder_tokens"].tolist() == [objective.specials.pad, *targets]
        # put each span in the place of its sentinel, and the window is there again
        spans = dict[int, list[int]]()
        for token in targets:
            if token in sentinels:
                spans[token] = []
            else:
                spans[next(reversed(spans))].append(token)
        assert list(spans) == list(objective.specials.sentinels[: lengths.spans])  # in order
        assert [token for token in inputs if token in sentinels] == list(spans)
        assert all(spans.values()) and inputs[0] not in sentinels  # begins with what is seen
        back = [word for token in inputs for word in spans.get(token, [token])]
        assert back == source.tokens(start, lengths.tokens).tolist()


def test_a_decoder_reads_its_targets_one_place_later_whatever_number_a_word_has():
    """A word may have the number 0 where padding has another; only what is not scored is padding to the decoder."""
    fields = padded_pair(np.array([3, 0, 4]), np.array([0, 7, IGNORE]), 5, pad=9)
    assert fields["tokens"].tolist() == [3, 0, 4, 9, 9]
    assert fields["decoder_tokens"].tolist() == [9, 0, 7]
    assert fields["targets"].tolist() == [0, 7, IGNORE]


def test_density_and_mean_span_are_the_papers():
    """15 % and 3, up to the rounding to whole tokens and spans."""
    for seq in (128, 512, 1024):
        lengths = span_lengths_of(config(seq))
        assert lengths.masked / lengths.tokens == pytest.approx(0.15, abs=0.5 / lengths.tokens)
        assert lengths.masked / lengths.spans == pytest.approx(3, abs=3 * 0.5 / lengths.spans)


def test_runs_are_all_ways_to_cut_each_as_often_as_the_others():
    """Seven things into three runs: 15 ways. χ² with 14 degrees of freedom is below 42 with probability 0.9999."""
    draw = np.random.Generator(np.random.Philox(key=5))
    found = Counter(tuple(segments(7, 3, draw).tolist()) for _ in range(6000))
    ways = {tuple(np.diff((0, *cuts, 7)).tolist()) for cuts in combinations(range(1, 7), 2)}
    assert found.keys() == ways
    assert sum((n - 400) ** 2 / 400 for n in found.values()) < 42


def test_masks_come_as_often_as_the_papers_code_draws_them():
    """20 tokens, 8 hidden in 3 spans: 21 · 55 = 1,155 masks; compared position by position, and by the spans'
    lengths."""
    c = config(16, 0.4, 2.5)
    objective = Spans(c, specials())
    tokens, _, _, hidden, spans = objective.lengths
    assert (tokens, hidden, spans) == (20, 8, 3)
    source, draw, many = stream(tokens), np.random.Generator(np.random.Philox(key=9)), 4000
    ours = np.array([mask_of(objective, drawn(objective, source, n), source.tokens(0, tokens)) for n in range(many)])
    theirs = np.array([reference_mask(tokens, hidden, spans, draw) for _ in range(many)])
    assert (ours.sum(1) == hidden).all() and (theirs.sum(1) == hidden).all()
    assert not ours[:, 0].any() and ours[:, -1].all()  # begins with a run that is seen, ends with a span
    assert not theirs[:, 0].any() and theirs[:, -1].all()
    error = np.sqrt(0.5 / many)  # of the difference of two shares, at most
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 4.5 * error

    def first_span(masks: np.ndarray) -> np.ndarray:
        begin = masks.argmax(1)
        return np.bincount([row[b:].argmin() for row, b in zip(masks, begin)], minlength=hidden) / many

    assert np.abs(first_span(ours) - first_span(theirs)).max() < 4.5 * error
    assert len({tuple(row) for row in ours}) > 1000


def test_a_sample_is_a_function_of_its_number():
    objective, source = Spans(config(64), specials()), stream(2000)
    again = [[drawn(Spans(config(64), specials()), source, n)[k] for n in (0, 7)] for k in ("tokens", "targets")]
    for k, (first, second) in zip(("tokens", "targets"), again):
        assert np.array_equal(drawn(objective, source, 0)[k], first)
        assert not np.array_equal(first, second)
    assert objective.num_samples(source) == 2000 // objective.lengths.tokens


def test_what_is_missing_is_named():
    with pytest.raises(DataError, match="117 sentinels.*it has 100"):
        Spans(config(2100), specials(sentinels=100))
    bare = synthetic_specials(50)
    with pytest.raises(DataError, match="pad"):
        Spans(config(16), type(bare)("t", bare.special, bare.is_continuation, bare.sentinels, end=1))
    with pytest.raises(DataError, match="at least 568"):
        Spans(config(512), specials()).num_samples(stream(567))


def test_sentinels_are_found_in_a_unigram_tokenizer(tmp_path):
    """As T5's: pieces with scores, sentinels among the added tokens, numbered backwards."""
    pieces = [["<pad>", 0.0], ["</s>", 0.0], ["<unk>", 0.0], ["▁the", -1.0], ["s", -2.0]]
    added = [{"id": 7 - i, "content": f"<extra_id_{i}>", "special": True} for i in range(3)]
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({"model": {"type": "Unigram", "vocab": pieces}, "added_tokens": added}))
    found = read_specials(path, 9)
    assert found.sentinels == (7, 6, 5) and (found.pad, found.end, found.unk) == (0, 1, 2)
    assert found.words.tolist() == [3, 4] and found.is_continuation.tolist() == [i == 4 for i in range(9)]


@pytest.mark.parametrize("name", ["t5-small", "t5-11b", "mt5-base"])
def test_a_plan_or_proof_of_a_released_size_has_the_sentinels_of_its_samples(name):
    config = load(Path(__file__).parents[2] / "configs" / f"{name}.yaml")
    proof_objective(config)  # refuses too few
    assert num_sentinels(config) > 10
