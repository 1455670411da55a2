"""The n-gram baseline: as nltk's, as the paper's formula read word for word, and a probability distribution in every
context."""

import math
from collections import Counter, defaultdict
from functools import lru_cache

import numpy as np
import pytest

from roots_dist.config.schema import Config
from roots_dist.config.sections import Source
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.store import Writer
from roots_dist.learning.objectives.clm import CausalTokens
from roots_dist.runs.evaluate.baseline import ngram_baselines
from roots_dist.runs.evaluate.ngram import FALLBACK, count, estimate_discounts

VOCAB = 12
PAD = VOCAB


def documents(number: int = 30, length: int = 25, seed: int = 0) -> list[list[int]]:
    """Each token depends on the two before it, and the last id never occurs."""
    rng = np.random.default_rng(seed)
    wanted = rng.dirichlet(np.full(VOCAB - 1, 0.15), (VOCAB, VOCAB))
    made = []
    for _ in range(number):
        said = [0, 0]
        for _ in range(int(rng.integers(1, length))):
            said.append(int(rng.choice(VOCAB - 1, p=wanted[said[-2], said[-1]])))
        made.append(said[2:])
    return made


def text(given: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate(given).astype("<u2"), np.cumsum([0, *map(len, given)])[:-1]


def distribution(model, context: tuple[int, ...]) -> np.ndarray:
    """[1 + n, V]: p(w | context) by every order."""
    tokens, starts = text([[*context, word] for word in range(VOCAB)])
    places = starts + len(context)
    return np.exp(model.log_probabilities(tokens, starts, places))


CONTEXTS = [(), (3,), (10,), (0, 1), (1, 0, 2, 7), (11, 11, 11), (4, 5, 6, 7, 8), (2, 2)]


@pytest.mark.parametrize("order", [2, 3, 4])
def test_with_a_fixed_discount_it_is_nltks(order):
    from nltk import lm
    from nltk.util import everygrams

    given, discount = documents(), 0.3
    padded = [["<s>"] * (order - 1) + [str(i) for i in one] for one in given]
    grams = [[g for g in everygrams(one, max_len=order) if g[-1] != "<s>"] for one in padded]
    theirs = lm.KneserNeyInterpolated(order, discount=discount)
    theirs.fit(grams, [str(i) for i in range(VOCAB)] + ["<s>"])
    fixed = [(0.0,) * 3] + [(discount,) * 3] * (order - 1)  # nltk's unigrams are not discounted
    model = count(*text(given), order, VOCAB, discounts=fixed)
    for context in CONTEXTS:
        words = (["<s>"] * (order - 1) + [str(i) for i in context])[-(order - 1) :]
        wanted = [theirs.score(str(word), words) for word in range(VOCAB)]
        with np.errstate(divide="ignore"):  # nltk gives an id that never occurred no probability
            np.testing.assert_allclose(distribution(model, context)[-1], wanted, rtol=1e-12, atol=1e-15)


def paper(given: list[list[int]], order: int):
    """p(w | h), the formulas of Chen & Goodman 1998, section 4.1.6, over dictionaries."""
    occurs = Counter()
    for one in given:
        padded = [PAD] * (order - 1) + one
        for i in range(order - 1, len(padded)):
            for k in range(1, order + 1):
                occurs[tuple(padded[i - k + 1 : i + 1])] += 1

    def c(gram: tuple[int, ...]) -> int:
        return (
            occurs[gram]
            if len(gram) == order
            else sum(other[1:] == gram for other in occurs if len(other) == len(gram) + 1)
        )

    counts = {gram: c(gram) for gram in occurs}
    following = defaultdict(dict)
    for gram, number in counts.items():
        following[gram[:-1]][gram[-1]] = number

    @lru_cache(None)
    def discounts(k: int) -> tuple[float, ...]:
        n = Counter(number for gram, number in counts.items() if len(gram) == k)
        if not all(n[i] for i in (1, 2, 3, 4)):
            return (0.0, *FALLBACK)
        y = n[1] / (n[1] + 2 * n[2])
        found = 0.0, 1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]
        return found if all(0 < d < i for i, d in enumerate(found[1:], 1)) else (0.0, *FALLBACK)

    def p(word: int, context: tuple[int, ...]) -> float:
        lower = p(word, context[1:]) if context else 1 / VOCAB
        after = following.get(context)
        if not after:
            return lower
        d, total, mine = discounts(len(context) + 1), sum(after.values()), after.get(word, 0)
        n = Counter(min(number, 3) for number in after.values())
        left = sum(d[i] * n[i] for i in (1, 2, 3)) / total
        return max(mine - d[min(mine, 3)], 0) / total + left * lower

    return p


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_with_estimated_discounts_it_is_the_papers_formula(order):
    given = documents(number=40)
    model, p = count(*text(given), order, VOCAB), paper(given, order)
    assert order == 1 or any(level.as_highest.discounts != FALLBACK for level in model.levels)
    for context in CONTEXTS:
        last = ((PAD,) * (order - 1) + context)[len(context) :]
        np.testing.assert_allclose(distribution(model, context)[-1], [p(w, last) for w in range(VOCAB)], rtol=1e-12)


@pytest.mark.parametrize("order", [1, 3, 5])
def test_every_context_has_a_distribution_in_which_nothing_is_impossible(order):
    given = documents()
    model = count(*text(given), order, VOCAB)
    for context in {*CONTEXTS, *(tuple(one[i : i + order - 1]) for one in given for i in range(len(one)))}:
        found = distribution(model, context)
        assert found.shape == (order + 1, VOCAB) and (found > 0).all()
        np.testing.assert_allclose(found.sum(1), 1, rtol=1e-12)


def test_each_lower_order_is_the_model_of_that_order():
    given, held_out = documents(), text(documents(seed=1))
    places = np.arange(len(held_out[0]))
    whole = count(*text(given), 4, VOCAB).log_probabilities(*held_out, places)
    assert np.allclose(whole[0], -math.log(VOCAB))
    for order in (1, 2, 3):
        alone = count(*text(given), order, VOCAB).log_probabilities(*held_out, places)
        np.testing.assert_allclose(whole[: order + 1], alone, rtol=1e-12)


def test_a_context_ends_where_its_document_begins():
    model = count(*text(documents()), 3, VOCAB)
    tokens = np.array([5, 6, 7], "<u2")
    alone = model.log_probabilities(tokens, np.array([0, 2]), np.array([2]))
    assert np.array_equal(alone, model.log_probabilities(tokens[2:], np.array([0]), np.array([0])))
    assert not np.allclose(alone[-1], model.log_probabilities(tokens, np.array([0]), np.array([2]))[-1])


def test_discounts_are_estimated_or_else_those_that_others_fall_back_to():
    counts = np.repeat([1, 2, 3, 4, 9], [100, 40, 20, 12, 7])
    y = 100 / 180
    assert estimate_discounts(counts) == pytest.approx((1 - 2 * y * 0.4, 2 - 3 * y * 0.5, 3 - 4 * y * 0.6))
    assert estimate_discounts(np.array([1, 1, 2, 3])) == FALLBACK  # nothing occurs four times
    assert estimate_discounts(np.repeat([1, 2, 3, 4], [1, 1, 10, 1])) == FALLBACK  # D2 would be below zero


def test_it_learns_from_a_run_s_corpora_and_is_asked_for_the_targets_of_its_samples(tmp_path):
    seq, given = 8, [documents(20, 30, seed) for seed in range(3)]
    paths = []
    for number, some in enumerate(given):
        paths.append(str(tmp_path / f"corpus{number}"))
        with Writer(paths[-1], np.dtype("<u2")) as writer:
            for one in some:
                writer.add(np.array(one, "<u2"))
            writer.commit()
    data = {"train": paths[:2], "validation": paths[2], "seq_length": seq}
    config = Config.model_validate({"model": {"vocab": VOCAB}, "data": data})
    held_out = Batches.open(config, CausalTokens(config), [Source(path=paths[2])])
    targets = np.concatenate([batch.targets.numpy().ravel() for batch in held_out.evaluation(10**6)])
    p, sizes = paper(given[0] + given[1], 2), [sum(map(len, some)) for some in given]

    stream, starts = text(given[2])
    places = np.arange(1, 1 + len(targets))
    assert sorted(stream[places]) == sorted(targets)
    expected = np.mean([-math.log(p(int(stream[i]), (PAD if i in starts else int(stream[i - 1]),))) for i in places])
    found = ngram_baselines(config, held_out, 10**6, 2, most=10**6)
    assert [one.name for one in found.orders] == ["uniform", "unigram", "bigram"]
    assert found.orders[0].loss == pytest.approx(math.log(VOCAB)) and found.orders[2].loss == pytest.approx(
        expected, rel=1e-12
    )
    assert found.used == found.available == sizes[0] + sizes[1]
    half = ngram_baselines(config, held_out, 10**6, 2, most=sum(sizes[:2]) // 2)
    assert abs(half.used - found.used / 2) <= 2 and half.orders[2].loss != found.orders[2].loss
