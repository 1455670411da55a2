"""Masked tokens against the paper's numbers and against transformers' collator, in distribution; exact where it is
exact."""

from __future__ import annotations

import json

import numpy as np
import pytest

from roots_dist.config.schema import Config
from roots_dist.errors import DataError
from roots_dist.learning.data.specials import Specials, read_specials, synthetic_specials
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.objectives.mlm import MaskedTokens, hide
from roots_dist.world.batch import IGNORE

VOCAB, SEQ, MANY = 60, 64, 4000
MASK = 3


def how(**changes: object):
    return Config(objective={"name": "mlm"} | changes).objective


def drawn(key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=key))


def texts(specials: Specials) -> np.ndarray:
    """int64 [MANY, SEQ]: [CLS], words, of which about one in twenty is special, [SEP]."""
    draw = np.random.default_rng(0)
    found = draw.choice(specials.words, size=(MANY, SEQ))
    found[draw.random(found.shape) < 0.05] = specials.end
    found[:, 0], found[:, -1] = specials.cls, specials.sep
    return found


def hidden(tokens: np.ndarray, specials: Specials, **changes: object) -> tuple[np.ndarray, np.ndarray]:
    pairs = [hide(text, specials, how(**changes), drawn(number)) for number, text in enumerate(tokens)]
    return np.stack([shown for shown, _ in pairs]), np.stack([targets for _, targets in pairs])


class Statistics:
    """What is compared: of any process that hides tokens, given the texts, what it shows and what it asks for."""

    def __init__(self, tokens: np.ndarray, shown: np.ndarray, targets: np.ndarray, ordinary: np.ndarray):
        chosen = targets != IGNORE
        assert np.array_equal(targets[chosen], tokens[chosen]) and np.array_equal(shown[~chosen], tokens[~chosen])
        assert not (chosen & ~ordinary).any()  # no special token is ever asked for
        self.words, self.hidden = int(ordinary.sum()), int(chosen.sum())
        self.masked = int((shown[chosen] == MASK).sum())
        self.other = shown[chosen & (shown != MASK) & (shown != tokens)]
        self.kept = int((shown[chosen] == tokens[chosen]).sum())
        self.by_place = chosen.sum(0) / np.maximum(1, ordinary.sum(0))
        self.per_text = chosen.sum(1)


def near(count: int, of: int, share: float, errors: float = 4.5) -> bool:
    """Within so many standard errors of a share."""
    return abs(count - of * share) < errors * np.sqrt(of * share * (1 - share))


def uniform(draws: np.ndarray, among: np.ndarray) -> bool:
    """χ² over the words, within 4.5 of its standard deviations."""
    counts = np.array([(draws == word).sum() for word in among])
    assert counts.sum() == len(draws)
    expected = len(draws) / len(among)
    freedom = len(among) - 1
    return abs(((counts - expected) ** 2 / expected).sum() - freedom) < 4.5 * np.sqrt(2 * freedom)


def check_the_papers_numbers(s: Statistics, draws_any: int) -> None:
    """draws_any: how many ids a random token is drawn from; one of them is the token itself."""
    assert near(s.hidden, s.words, 0.15)
    itself = 0.1 / draws_any
    assert near(s.masked, s.hidden, 0.8)
    assert near(len(s.other), s.hidden, 0.1 - itself)
    assert near(s.kept, s.hidden, 0.1 + itself)


def test_shares_are_those_of_the_paper():
    """Devlin et al. 2019, 3.1: 15 % of the places; of these 80 % a mask, 10 % random, 10 % as they are."""
    specials = synthetic_specials(VOCAB)
    tokens = texts(specials)
    s = Statistics(tokens, *hidden(tokens, specials), ~specials.special[tokens])
    check_the_papers_numbers(s, len(specials.words))
    assert uniform(s.other, specials.words)  # no special token among them, and each word as often
    inner = s.by_place[1:-1]
    assert s.by_place[0] == s.by_place[-1] == 0
    assert np.abs(inner - 0.15).max() < 4.5 * np.sqrt(0.15 * 0.85 / (0.95 * MANY))  # each place as often
    assert np.std(s.per_text) == pytest.approx(np.sqrt(0.95 * (SEQ - 2) * 0.15 * (1 - 0.15 * 0.95)), rel=0.06)


@pytest.mark.parametrize("mask, random", [(1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5), (0.85, 0.0)])
def test_shares_are_those_of_the_config(mask, random):
    specials = synthetic_specials(VOCAB)
    tokens = texts(specials)[:1000]
    shown, targets = hidden(
        tokens, specials, mask_probability=0.3, mask_replace_probability=mask, random_replace_probability=random
    )
    s = Statistics(tokens, shown, targets, ~specials.special[tokens])
    among = len(specials.words)
    assert near(s.hidden, s.words, 0.3)
    for found, share in (
        (s.masked, mask),
        (len(s.other), random * (1 - 1 / among)),
        (s.kept, 1 - mask - random * (1 - 1 / among)),
    ):
        assert near(found, s.hidden, share) if 1e-9 < share < 1 - 1e-9 else found == round(share) * s.hidden


def tokenizer_of_transformers(folder, words: int):
    """A wordpiece tokenizer of theirs with the ids of `synthetic`: pad 0, cls 1, sep 2, mask 3, unk 4, end 5."""
    import transformers

    names = ["[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]", "<|endoftext|>"]
    vocab = {name: i for i, name in enumerate(names + [f"##w{i}" if i % 3 == 0 else f"w{i}" for i in range(6, words)])}
    tree = {
        "version": "1.0", "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                                     "max_input_chars_per_word": 100, "vocab": vocab},
        "added_tokens": [
            {"id": i, "content": n, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False}
            for i, n in enumerate(names)
        ],
    }  # fmt: skip
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(tree))
    return path, transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(path), pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        unk_token="[UNK]",
        additional_special_tokens=["<|endoftext|>"],
    )  # fmt: skip


def theirs(
    tokens: np.ndarray, tokenizer, offsets: np.ndarray | None = None, **options
) -> tuple[np.ndarray, np.ndarray]:
    import torch
    import transformers

    torch.manual_seed(0)
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15, **options)
    texts_ = [
        {"input_ids": text.tolist()} | ({} if offsets is None else {"offset_mapping": offsets[i]})
        for i, text in enumerate(tokens)
    ]
    made = collate(texts_)
    return made["input_ids"].numpy(), made["labels"].numpy()


def test_it_is_the_distribution_of_transformers_collator(tmp_path):
    path, tokenizer = tokenizer_of_transformers(tmp_path, VOCAB)
    specials = read_specials(path, VOCAB)
    tokens = texts(specials)
    ordinary = ~specials.special[tokens]
    ours = Statistics(tokens, *hidden(tokens, specials), ordinary)
    their = Statistics(tokens, *theirs(tokens, tokenizer), ordinary)  # the same places are never chosen there
    check_the_papers_numbers(ours, VOCAB - 6)
    check_the_papers_numbers(their, VOCAB)  # their random tokens may be special ones
    error = np.sqrt(2 * 0.15 * 0.85 / (0.95 * MANY))
    assert np.abs(ours.by_place - their.by_place).max() < 4.5 * error
    assert np.std(ours.per_text) == pytest.approx(np.std(their.per_text), rel=0.08)
    assert uniform(ours.other, specials.words) and uniform(their.other[their.other >= 6], specials.words)


def words_of(text: np.ndarray, specials: Specials) -> list[list[int]]:
    """The places of each word, as one reads them: a piece that goes on joins the piece before it."""
    found: list[list[int]] = []
    for place, token in enumerate(text):
        if specials.special[token]:
            continue
        joins = specials.is_continuation[token] and found and found[-1][-1] == place - 1
        if joins:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def test_whole_words_are_chosen_together():
    specials = synthetic_specials(VOCAB)
    tokens = texts(specials)[:1500]
    shown, targets = hidden(tokens, specials, whole_word_mask=True)
    s = Statistics(tokens, shown, targets, ~specials.special[tokens])
    words = chosen = mixed = 0
    for text, seen, row in zip(tokens, shown, targets):
        for word in words_of(text, specials):
            asked = row[word] != IGNORE
            assert asked.all() or not asked.any()
            words, chosen = words + 1, chosen + bool(asked[0])
            mixed += len(word) > 1 and asked[0] and len(set(seen[word] == MASK)) == 2
    assert near(chosen, words, 0.15)
    assert near(s.masked, s.hidden, 0.8, errors=6)
    assert mixed > 50  # each piece in its own way
    lengths = np.array([len(word) for text in tokens for word in words_of(text, specials)])
    error = np.sqrt(0.15 * 0.85 * (lengths.astype(float) ** 2).sum())
    assert abs(s.hidden - 0.15 * lengths.sum()) < 4.5 * error


def test_whole_words_are_those_of_transformers(tmp_path):
    """Theirs too draws once for each word, and then shows all of its pieces as masks. It finds words by their
    offsets."""
    path, tokenizer = tokenizer_of_transformers(tmp_path, VOCAB)
    specials = read_specials(path, VOCAB)
    tokens = texts(specials)
    ends = np.cumsum(1 + ~specials.is_continuation[tokens], axis=1)  # a gap before each new word
    options = dict(whole_word_mask=True, mask_replace_prob=1.0, random_replace_prob=0.0)
    shown, targets = theirs(tokens, tokenizer, np.stack([ends - 1, ends], -1), **options)
    ordinary = ~specials.special[tokens]
    ours = Statistics(
        tokens,
        *hidden(tokens, specials, whole_word_mask=True, mask_replace_probability=1.0, random_replace_probability=0.0),
        ordinary,
    )
    their = Statistics(tokens, shown, targets, ordinary)
    for text, row in zip(tokens[:500], targets):
        for word in words_of(text, specials):
            assert len(set(row[word] != IGNORE)) == 1  # their words are ours
    assert ours.masked == ours.hidden and their.masked == their.hidden
    error = np.sqrt(2 * 0.15 * 0.85 / (0.95 * MANY))
    assert np.abs(ours.by_place - their.by_place).max() < 4.5 * error
    assert ours.hidden / ours.words == pytest.approx(their.hidden / their.words, rel=0.02)
    assert np.std(ours.per_text) == pytest.approx(np.std(their.per_text), rel=0.08)


def corpus(tokens: int) -> Corpus:
    """Words in documents of 50."""
    stored = np.random.default_rng(1).integers(6, VOCAB - 14, size=tokens)
    lengths = np.full(tokens // 50, 50)
    return Corpus("t", lengths, np.cumsum(lengths) * 8 - 400, np.arange(len(lengths) + 1), stored)


def objective(seq: int = 32, **changes: object) -> MaskedTokens:
    specials = synthetic_specials(VOCAB)
    config = Config(
        model={"family": "bert", "vocab": VOCAB}, objective={"name": "mlm"} | changes, data={"seq_length": seq}
    )
    return MaskedTokens(config, specials)


def test_a_sample_is_a_window_between_cls_and_sep_across_documents():
    made, source = objective(), corpus(1000)
    assert made.num_samples(source) == 1000 // 30
    for index in (0, 1, 5, 32):
        fields = made.sample(source, index, drawn(index))
        text = np.where(fields["targets"] == IGNORE, fields["tokens"], fields["targets"])
        assert text.tolist() == [made.specials.cls, *source.tokens(30 * index, 30).tolist(), made.specials.sep]


def test_a_mask_is_a_function_of_its_number_and_differs_each_time_that_a_text_comes_by():
    """Dynamic masking (Liu et al. 2019, 4.1): the same window under another number is hidden elsewhere."""
    source = corpus(1000)
    once, again, deferred = (objective().sample(source, 3, drawn(key)) for key in (7, 7, 8))
    assert all(np.array_equal(once[k], again[k]) for k in once)
    assert not np.array_equal(once["targets"], deferred["targets"])


def test_every_epoch_hides_other_places():
    """The number that keys a mask counts on through the epochs, in batches of any size."""
    from roots_dist.learning.data.batches import Batches

    source = corpus(200)
    made = objective()
    count = made.num_samples(source)
    assert count == 6
    seen: list[tuple] = []
    for micro, batch in ((1, 3), (3, 6)):
        config = Config(
            model={"family": "bert", "vocab": VOCAB}, objective={"name": "mlm"}, data={"seq_length": 32},
            train={"global_batch": batch, "micro_batch": micro, "steps": 100},
        )  # fmt: skip
        batches = Batches(config, made, [source], [1.0])
        rows = []
        for step in range(5 * count // batch):
            for b in batches.at(step):
                rows += [(tuple(t.tolist()), tuple(g.tolist())) for t, g in zip(b.tokens, b.targets)]
        seen = seen or rows
        assert rows == seen  # no mask depends on the batch or the microbatch
    texts_ = [tuple(t if g == IGNORE else g for t, g in zip(*row)) for row in seen]
    for text in set(texts_):
        masks = {row[1] for row, its in zip(seen, texts_) if its == text}
        assert len(masks) == texts_.count(text) == 5


def test_what_cannot_be_is_named():
    bare = synthetic_specials(VOCAB)
    config = Config(model={"family": "bert", "vocab": VOCAB}, objective={"name": "mlm"}, data={"seq_length": 32})
    with pytest.raises(DataError, match="mask"):
        MaskedTokens(config, type(bare)("t", bare.special, bare.is_continuation, cls=1, sep=2))
    with pytest.raises(DataError, match="at least 30"):
        objective().num_samples(Corpus("t", np.array([29]), np.array([0]), np.array([0, 1]), np.arange(29)))
