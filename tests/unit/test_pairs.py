"""Where the two texts of a pair come from, place by place, against the words of their rules."""

import numpy as np
import pytest

from roots_dist.config.schema import Config
from roots_dist.learning.data.specials import synthetic_specials
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.objectives.nsp import MaskedPairs, fitted
from roots_dist.world.batch import IGNORE, PADDING

VOCAB = 211
SPECIALS = synthetic_specials(VOCAB)
DOCUMENTS = [[3, 4, 2], [5, 5], [7], [6, 0, 1], [2, 1, 1, 1, 9], [8], [1, 4]]
"""Lengths of the sentences of each. The last token of each second document is the one that ends documents."""
WORD = int(SPECIALS.words[0])


def pairs(seq: int = 12) -> MaskedPairs:
    tree = {
        "model": {"vocab": VOCAB, "family": "bert", "segments": 2},
        "objective": {"name": "mlm-nsp"},
        "data": {"seq_length": seq},
    }
    return MaskedPairs(Config.model_validate(tree), SPECIALS)


def corpus(documents: list[list[int]]) -> Corpus:
    lengths = np.array([n for sentences in documents for n in sentences], dtype=np.int32)
    stored = np.full(lengths.sum(), WORD)
    ends = np.cumsum([sum(sentences) for sentences in documents])
    stored[ends[::2] - 1], stored[ends[2] - 1] = SPECIALS.end, SPECIALS.sep
    offsets = (np.cumsum(lengths) - lengths) * np.int64(stored.itemsize)
    return Corpus("t", lengths, offsets, np.cumsum([0, *map(len, documents)]), stored)


def sentences(document: int) -> list[tuple[int, int]]:
    """Begin and end in the stream of each one that holds a token, without the token that ends the document."""
    begin = sum(map(sum, DOCUMENTS[:document]))
    last = begin + sum(DOCUMENTS[document]) - (document % 2 == 0)
    found = []
    for length in DOCUMENTS[document]:
        found.append((begin, min(begin + length, last)))
        begin += length
    return [(first, end) for first, end in found if first < end]


@pytest.mark.parametrize("document", range(len(DOCUMENTS)))
def test_a_run_is_of_whole_sentences_that_fill_the_room(document):
    objective, source, known = pairs(), corpus(DOCUMENTS), sentences(document)
    begins, end = objective._sentences(source, document)
    assert (begins.tolist(), end) == ([first for first, _ in known], known[-1][1])
    for position in range(source.num_tokens):
        for room in range(1, 14):
            for least in (1, 2):
                start, ends = objective._run(source, document, position, room, least)
                if len(known) == 1:
                    ((first, last),) = known
                    begun = min(max(position, first), last - least)
                    assert (start, ends.tolist()) == (begun, [min(last, begun + room)])
                    continue
                behind = [i for i, (first, _) in enumerate(known) if first >= position]
                at = min(behind[0] if behind else len(known), len(known) - least)
                taken = [known[at]]
                while taken[-1][1] - taken[0][0] < room and at + len(taken) < len(known):
                    taken.append(known[at + len(taken)])
                assert (start, ends.tolist()) == (taken[0][0], [last for _, last in taken])


class Counted:
    """In place of a generator: its n-th number."""

    def __init__(self, n: int):
        self.n, self.of = n, 0

    def integers(self, of: int) -> int:
        self.of = of
        return self.n


def test_the_first_texts_of_an_epoch_are_of_every_usable_document():
    """A sample for each room of tokens begins in the document in which that room begins."""
    documents = [[4, 4, 4], [5, 5, 2], [6, 6], [3, 3, 6]]
    lengths = [sum(sentences) for sentences in documents]
    source, objective = corpus(documents), pairs(seq=15)
    stored = np.repeat(np.arange(len(documents)) + WORD, lengths)  # each document has a word of its own
    source = Corpus("t", source.lengths, source.offsets, source.documents, stored)
    for index in range(objective.num_samples(source)):
        fields = objective.sample(source, index, np.random.default_rng(index))
        document = int(np.searchsorted(np.cumsum(lengths), index * objective.room, side="right"))
        first = fields["tokens"][1] if fields["targets"][1] == IGNORE else fields["targets"][1]
        assert first == document + WORD, (index, document)


@pytest.mark.parametrize("document", range(len(DOCUMENTS)))
def test_a_random_place_is_any_token_of_the_other_documents(document):
    objective, source = pairs(), corpus(DOCUMENTS)
    begin, length = sum(map(sum, DOCUMENTS[:document])), sum(DOCUMENTS[document])
    others = [*range(begin), *range(begin + length, source.num_tokens)]
    draws = [Counted(n) for n in range(len(others))]
    assert [objective._outside(source, document, draw) for draw in draws] == others
    assert {draw.of for draw in draws} == {len(others)}


def test_one_pair_in_twenty_is_of_two_tokens_where_there_is_room_for_three():
    """One in ten is made shorter, and half of these are drawn the whole length."""
    objective, source, count = pairs(seq=6), corpus([[4] * 10] * 6), 600
    number = objective.num_samples(source)
    samples = [objective.sample(source, i % number, np.random.default_rng(i)) for i in range(count)]
    lengths = np.array([(sample["document_ids"] != PADDING).sum() - 3 for sample in samples])
    assert set(lengths) == {2, 3}
    assert abs((lengths == 2).mean() - 0.05) < 5 * np.sqrt(0.05 * 0.95 / count)


def test_the_longer_text_is_cut_first_at_both_ends():
    """Token by token, as truncate_seq_pair of the original; at each a coin says which end."""
    draw = np.random.default_rng(0)
    for one in range(1, 9):
        for two in range(1, 9):
            for room in range(2, 18):
                lengths = [one, two]
                while sum(lengths) > room:
                    lengths[0 if lengths[0] > lengths[1] else 1] -= 1
                found = fitted(range(10, 10 + one), range(30, 30 + two), room, draw)
                assert [*map(len, found)] == lengths
                assert {*found[0]} <= {*range(10, 10 + one)} and {*found[1]} <= {*range(30, 30 + two)}
    starts = [fitted(range(8), range(9), 9, draw)[1].start for _ in range(2000)]  # loses 5 of 9
    shares = np.bincount(starts, minlength=6) / len(starts)
    assert np.abs(shares - np.array([1, 5, 10, 10, 5, 1]) / 32).max() < 5 * np.sqrt(0.25 / 2000)
