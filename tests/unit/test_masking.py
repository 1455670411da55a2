"""What is hidden, shown and paired, over many samples: the papers' numbers, and the collator of transformers."""

import math

import numpy as np
import pytest
import torch

from roots_dist.config.schema import Config
from roots_dist.errors import DataError
from roots_dist.learning.data.specials import synthetic_specials
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.models.sample_tokens import sample_tokens
from roots_dist.learning.objectives import OBJECTIVES
from roots_dist.learning.objectives.mlm import hide
from roots_dist.learning.objectives.synthetic import random_source
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.testing.world import on_warm_world
from roots_dist.world import rng
from roots_dist.world.batch import IGNORE, PADDING

VOCAB = 211
SPECIALS = synthetic_specials(VOCAB)


def config(name="mlm", seq=64, **objective) -> Config:
    return Config.model_validate(
        {
            "model": {"vocab": VOCAB, "family": "bert", "segments": 2},
            "objective": {"name": name, **objective},
            "data": {"seq_length": seq},
        }
    )


def near(count: float, n: float, p: float) -> bool:
    """Within five standard deviations of a binomial's mean."""
    return abs(count - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def test_15_per_cent_are_hidden_and_shown_80_10_10():
    draw_ = np.random.default_rng(0)
    tokens = draw_.integers(VOCAB, size=200_000)
    shown, targets = hide(tokens, SPECIALS, config().objective, draw_)
    word, hidden = ~SPECIALS.special[tokens], targets != IGNORE
    assert not hidden[~word].any() and near(hidden.sum(), word.sum(), 0.15)
    assert (targets[hidden] == tokens[hidden]).all() and (shown[~hidden] == tokens[~hidden]).all()
    masked, same = shown[hidden] == SPECIALS.mask, shown[hidden] == tokens[hidden]
    other = shown[hidden][~masked & ~same]
    words, n = len(SPECIALS.words), hidden.sum()
    assert (
        near(masked.sum(), n, 0.8) and near(same.sum(), n, 0.1 + 0.1 / words) and near(len(other), n, 0.1 - 0.1 / words)
    )
    counts = np.bincount(other, minlength=VOCAB)
    assert not counts[SPECIALS.special].any()
    expected = len(other) / words
    chi = ((counts[SPECIALS.words] - expected) ** 2 / expected).sum()
    assert abs(chi - words) < 5 * math.sqrt(2 * words)  # other words are drawn evenly
    halves = hidden[: len(hidden) // 2][word[: len(hidden) // 2]]
    assert near(halves.sum(), len(halves), 0.15)  # and places are


def test_the_collator_of_transformers_hides_as_often():
    import transformers

    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", *(f"w{i}" for i in range(5, VOCAB))]
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    special = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", unk_token="[UNK]")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, seed=0)
    tokens = np.random.default_rng(1).integers(6, VOCAB - 10, size=(400, 100))
    theirs = collate([{"input_ids": row.tolist()} for row in tokens])
    hidden = theirs["labels"].numpy() != IGNORE
    masked = (theirs["input_ids"].numpy() == 3)[hidden]
    mine = [hide(row, SPECIALS, config().objective, np.random.default_rng(i)) for i, row in enumerate(tokens)]
    per_row = np.array([(targets != IGNORE).sum() for _, targets in mine])
    n = tokens.size
    assert near(hidden.sum(), n, 0.15) and near(per_row.sum(), n, 0.15) and near(masked.sum(), hidden.sum(), 0.8)
    # numbers in one text vary alike: each place is chosen on its own
    assert per_row.var() == pytest.approx(100 * 0.15 * 0.85, rel=0.25)
    assert hidden.sum(1).var() == pytest.approx(100 * 0.15 * 0.85, rel=0.25)


def test_whole_words_are_hidden_whole():
    draw_ = np.random.default_rng(0)
    tokens = draw_.choice(SPECIALS.words, size=50_000)
    _, targets = hide(tokens, SPECIALS, config(whole_word_mask=True).objective, draw_)
    hidden, has_past = targets != IGNORE, SPECIALS.is_continuation[tokens]
    has_past[0] = False
    assert (hidden[1:] == hidden[:-1])[has_past[1:]].all()
    first = ~has_past
    assert near(hidden[first].sum(), first.sum(), 0.15)


def test_a_mask_is_a_function_of_seed_and_number_and_another_pass_draws_anew():
    objective = OBJECTIVES["mlm"](config(), SPECIALS)
    source = random_source(config())
    one, again, other = (objective.sample(source, 3, np.random.default_rng(key)) for key in (1, 1, 2))
    assert all((one[name] == again[name]).all() for name in one) and (one["targets"] != other["targets"]).any()
    assert one["tokens"][0] == SPECIALS.cls and one["tokens"][-1] == SPECIALS.sep and len(one["tokens"]) == 64


def test_half_of_the_pairs_follow_and_the_others_come_from_another_document():
    c = config("mlm-nsp")
    objective, source = OBJECTIVES["mlm-nsp"](c, SPECIALS), numbered()
    n, follows, longest = 2000, 0, 0
    for i in range(n):
        found = objective.sample(source, i % objective.num_samples(source), np.random.default_rng(i))
        used = found["document_ids"] != PADDING
        tokens = np.where(found["targets"] != IGNORE, found["targets"], found["tokens"])[used]
        assert tokens[0] == SPECIALS.cls and (np.flatnonzero(tokens == SPECIALS.sep)[-1] == len(tokens) - 1)
        cut = int(np.flatnonzero(tokens == SPECIALS.sep)[0])
        a, b = tokens[1:cut], tokens[cut + 1 : -1]
        assert len(a) and len(b) and len(tokens) <= 64
        assert (found["segment_ids"][: cut + 1] == 0).all() and (found["segment_ids"][cut + 1 : len(tokens)] == 1).all()
        assert (found["tokens"][~used] == SPECIALS.pad).all() and (found["targets"][~used] == IGNORE).all()
        same = set(a) == set(b) and len(set(a)) == 1  # each document is one word, again and again
        assert same == (found["labels"] == 0)
        follows += same
        longest = max(longest, len(tokens))
    assert near(follows, n, 0.5)
    assert longest == 64


def numbered() -> Corpus:
    """60 documents, each of one word of its own, in sentences of 20 tokens."""
    stored = np.repeat(SPECIALS.words[:60], 100)
    lengths = np.full(300, 20, dtype=np.int32)
    offsets = (np.cumsum(lengths) - lengths) * np.int64(stored.itemsize)
    return Corpus("numbered", lengths, offsets, np.arange(0, 301, 5), stored)


def test_a_document_too_short_for_a_pair_does_not_lead_back_to_the_first_text():
    """There are two long documents, each behind a short one: a random text is of the other."""
    objective = OBJECTIVES["mlm-nsp"](config("mlm-nsp"), SPECIALS)
    words, lengths = SPECIALS.words[:4], np.array([2, 70, 2, 70], dtype=np.int32)
    offsets = (np.cumsum(lengths) - lengths) * np.int64(8)
    source = Corpus("short", lengths, offsets, np.arange(5), np.repeat(words, lengths).astype(np.int64))
    for i in range(200):
        found = objective.sample(source, i % objective.num_samples(source), np.random.default_rng(i))
        tokens = np.where(found["targets"] != IGNORE, found["targets"], found["tokens"])
        texts = {*tokens.tolist()} & {*words.tolist()}
        assert len(texts) == 1 + (found["labels"] == 1)


def test_one_document_has_no_other():
    stored = np.arange(100) + 6
    corpus = Corpus("lonely", np.array([100], dtype=np.int32), np.array([0]), np.array([0, 1]), stored)
    with pytest.raises(DataError, match="documents in lonely = 1: expected two or more"):
        OBJECTIVES["mlm-nsp"](config("mlm-nsp"), SPECIALS).num_samples(corpus)


def drawn(rank: int, size: int, n: int) -> list[int]:
    from roots_dist.layout import Layout
    from roots_dist.world.mesh import Mesh

    mesh = Mesh.connect(Layout(tp=size), rank)
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((16, 4), (1, 4)))
    mine = weight.chunk(size)[rank]
    rows = rng.fold(7, torch.arange(n))
    return sample_tokens(TensorParallel(mesh.tp), hidden.expand(n, -1), mine, None, rows, vocab=13).tolist()


def test_draws_follow_the_softmax_and_no_layout():
    n = 20_000
    (alone,) = on_warm_world(1, drawn, n)
    for size in (2, 4):
        assert all(found == alone[:500] for found in on_warm_world(size, drawn, 500))
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((16, 4), (1, 4)))
    p = (hidden @ weight.t())[0, :13].softmax(0).numpy()
    counts = np.bincount(alone, minlength=16)
    assert not counts[13:].any()  # never a padded word
    chi = ((counts[:13] - n * p) ** 2 / (n * p)).sum()
    assert chi < 12 + 5 * math.sqrt(24)
