"""When a text is over and what of it is shown, held against decoding the whole text anew after each token."""

import random

import pytest

from roots_dist.learning.data.tokenizer import Codec, train
from roots_dist.runs.generate.stops import CONTEXT, Stops, TextStreamer

TEXTS = [
    f"The people of Łódź met in {1800 + n} – \U0001f600 unquestionably, it rained; 人民 said naïve things."
    for n in range(30)
]
STRINGS = {"none": (), "one": ("\U0001f600 un",), "several": ("rain", "met in 18", "人", "zzzz"), "letters": ("e",)}


@pytest.fixture(scope="module")
def codecs() -> dict[str, Codec]:
    return {kind: train(TEXTS, 300, kind=kind) for kind in ("bpe", "wordpiece", "unigram")}


def said_of(codec: Codec, seed: int) -> list[int]:
    """Text that makes sense, with tokens here and there that do not: bytes that are no character."""
    draw = random.Random(seed)
    ids = codec.encode(" ".join(draw.choices(TEXTS, k=2)))
    for _ in range(seed % 4):
        ids.insert(draw.randrange(len(ids)), draw.randrange(codec.backend.get_vocab_size()))
    return ids


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece"])
@pytest.mark.parametrize("strings", STRINGS.values(), ids=STRINGS)
def test_a_text_is_over_as_soon_as_it_holds_a_stop_string(codecs, kind, strings):
    codec = codecs[kind]
    stops = Stops(strings=strings, codec=codec)
    for seed in range(8):
        said = said_of(codec, seed)
        over = next((n for n in range(1, len(said) + 1) if any(s in codec.decode(said[:n]) for s in strings)), None)
        found = next((n for n in range(1, len(said) + 1) if stops.reached(said[:n])), None)
        assert found == over
        text = stops.text(said[:over])
        assert not any(s in text for s in strings)
        assert codec.decode(said[:over]).startswith(text) and (over is None) == (text == codec.decode(said))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("strings", STRINGS.values(), ids=STRINGS)
def test_what_is_shown_piece_by_piece_is_the_text_and_nothing_is_taken_back(codecs, kind, strings):
    codec = codecs[kind]
    stops = Stops(frozenset({1}), strings, codec)
    for seed in range(8):
        before, said = codec.encode("In the beginning"), said_of(codec, seed)
        pieces: list[str] = []
        streamed, so_far = TextStreamer(stops, before, pieces.append), []
        for word in said:
            so_far.append(word)
            streamed(0, so_far)
            whole = codec.decode(before + so_far)[len(codec.decode(before)) :]
            assert stops.before_stop(whole).startswith("".join(pieces))
            if stops.reached(so_far):
                break
        early = "".join(pieces)
        streamed.finish(stops.text(so_far, before))
        assert "".join(pieces) == stops.text(so_far, before)
        if not strings and kind == "bpe" and seed % 4 == 0:
            assert early == "".join(pieces)  # nothing had been held back


def test_a_character_of_several_tokens_is_shown_when_it_is_whole(codecs):
    codec = codecs["bpe"]
    ids = codec.encode("a \U0001f680 b")  # unknown to it: a token for each byte
    shown: list[str] = []
    streamed = TextStreamer(Stops(codec=codec), [], shown.append)
    for n in range(1, len(ids) + 1):
        streamed(0, ids[:n])
    assert len(ids) > 5 and "".join(shown) == "a \U0001f680 b" and all("�" not in piece for piece in shown)


def test_what_may_become_a_stop_string_is_held_back_until_it_cannot():
    assert Stops(strings=("user:",)).settled("It rained.\nus") == "It rained.\n"
    assert Stops(strings=("user:", "\nuser:")).settled("It rained.\n") == "It rained."
    assert Stops(strings=("user:",)).settled("It rained.\nuseful") == "It rained.\nuseful"
    assert Stops().settled("half �") == "half "


def test_the_end_is_not_shown_unless_it_is_to_be_kept_and_special_tokens_are_not(codecs):
    codec = codecs["bpe"]
    end = codec.backend.token_to_id("<|endoftext|>")
    said = [*codec.encode("The people met"), end]
    stops = Stops(frozenset({end}), codec=codec)
    assert stops.reached(said) and not stops.reached(said[:-1])
    assert stops.text(said) == "The people met"
    assert Stops(frozenset({end}), codec=codec, keep_end=True).text(said) == "The people met<|endoftext|>"
    assert Stops(codec=codec, hidden=frozenset({end})).text([end, *said]) == "The people met"
    assert Stops(codec=codec).text([end, *said]) == "<|endoftext|>The people met<|endoftext|>"


def test_a_word_of_a_long_text_costs_no_more_than_one_of_a_short_text(codecs):
    """Counted in tokens that are decoded."""

    class Counting(Codec):
        def decode(self, ids):
            ids = list(ids)
            lengths.append(len(ids))
            return super().decode(ids)

    lengths: list[int] = []
    codec = Counting(codecs["bpe"].backend)
    stops = Stops(strings=("zzzz",), codec=codec)
    said = codecs["bpe"].encode(" ".join(TEXTS))
    streamed = TextStreamer(stops, (), lambda text: None)
    for n in range(1, len(said) + 1):
        streamed(0, said[:n])
        stops.reached(said[:n])
    assert len(said) > 500 and max(lengths) <= 4 + CONTEXT + 8
