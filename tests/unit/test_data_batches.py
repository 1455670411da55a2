"""Batches: the same samples in every layout, checked ids, each validation sample once."""

import re

import numpy as np
import pytest
import torch

from roots_dist.config.model import ModelConfig
from roots_dist.config.schema import Config
from roots_dist.config.sections import DataConfig, Source, TrainConfig
from roots_dist.errors import ConfigError, DataError
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.prepare import prepare
from roots_dist.learning.data.store import Writer
from roots_dist.learning.objectives.clm import CausalTokens
from roots_dist.world.batch import IGNORE

SEQ, VOCAB = 8, 1000


def corpus(path, num_tokens, first=0):
    """A stream that counts: what stands where is known without reading. Documents of 7 tokens."""
    ids = (np.arange(num_tokens) + first) % VOCAB
    with Writer(path, np.dtype("<u2")) as writer:
        for start in range(0, num_tokens, 7):
            writer.add(ids[start : start + 7].astype("<u2"))
        writer.commit()
    return str(path)


def opened(config, sources, **place):
    return Batches.open(config, CausalTokens(config), sources, **place)


def config(*sources, **train):
    return Config(
        model=ModelConfig(vocab=VOCAB),
        data=DataConfig(seq_length=SEQ),
        train=TrainConfig(**{"global_batch": 12, "micro_batch": 1, **train}),
    ), sources


def rows(batches):
    """Sample number -> (tokens, targets)."""
    found = {}
    for batch in batches:
        for number, tokens, targets in zip(batch.sample_ids.tolist(), batch.tokens.tolist(), batch.targets.tolist()):
            assert number not in found
            found[number] = (tokens, targets)
    return found


@pytest.fixture
def two(tmp_path):
    return Source(path=corpus(tmp_path / "a", 410), weight=3), Source(path=corpus(tmp_path / "b", 200, 500), weight=1)


def test_a_sample_is_a_window_of_the_stream_and_targets_follow_tokens(tmp_path):
    batches = opened(*config(Source(path=corpus(tmp_path / "a", 81)), global_batch=10))
    assert batches.num_samples == 10
    for epoch in range(2):
        found = rows(batches.at(epoch))
        assert sorted(found) == list(range(10 * epoch, 10 * epoch + 10))
        assert sorted(tokens[0] for tokens, _ in found.values()) == list(range(0, 80, SEQ))
        assert all(
            [*tokens, targets[-1]] == list(range(tokens[0], tokens[0] + SEQ + 1)) for tokens, targets in found.values()
        )


@pytest.mark.parametrize("dp, micro", [(1, 4), (1, 12), (2, 1), (2, 3), (3, 2), (4, 3), (12, 1)])
def test_a_step_holds_the_same_samples_in_every_layout(two, dp, micro):
    for step in (0, 1, 7, 40):
        alone = rows(opened(*config(*two)).at(step))
        shared = {}
        for rank in range(dp):
            mine = opened(*config(*two, micro_batch=micro), dp_rank=rank, dp_size=dp).at(step)
            assert {batch.tokens.shape for batch in mine} == {(micro, SEQ)} and {batch.step for batch in mine} == {step}
            shared |= rows(mine)
        assert shared == alone and len(alone) == 12


def test_sources_are_blended_by_weight_and_each_is_permuted_in_its_own_way(tmp_path):
    same = [Source(path=corpus(tmp_path / name, 801)) for name in "ab"]
    first = [tokens[0] for _, (tokens, _) in sorted(rows(opened(*config(*same, global_batch=100)).at(0)).items())]
    assert first[0::2] != first[1::2]
    weighted = [
        Source(path=corpus(tmp_path / "c", 410), weight=3),
        Source(path=corpus(tmp_path / "d", 200, 500), weight=1),
    ]
    found = rows(opened(*config(*weighted, global_batch=40)).at(3))
    assert sum(tokens[0] >= 500 for tokens, _ in found.values()) == 10


def test_the_ramp_goes_on_without_gap(two):
    batches = opened(*config(*two, batch_ramp=(4, 4, 24)))
    numbers = [number for step in range(6) for number in sorted(rows(batches.at(step)))]
    assert numbers == list(range(len(numbers)))
    assert [len(batches.at(step)) for step in range(6)] == [4, 4, 4, 8, 8, 12]


def test_what_a_sample_draws_is_the_same_on_every_rank_and_after_a_resume(two):
    """Its number is the key of its draws, and nothing else is."""

    class Drawing(CausalTokens):
        def sample(self, source, index, draw):
            fields = super().sample(source, index, draw)
            return fields | {"tokens": draw.integers(0, VOCAB, len(fields["tokens"]))}

    made, sources = config(*two)
    alone, again = (rows(Batches.open(made, Drawing(made), sources).at(3)) for _ in range(2))
    shared = [rows(Batches.open(made, Drawing(made), sources, dp_rank=rank, dp_size=3).at(3)) for rank in range(3)]
    assert alone == again == {number: row for found in shared for number, row in found.items()}
    assert len({tuple(tokens) for tokens, _ in alone.values()}) == len(alone)


def test_another_seed_is_another_order(two):
    assert rows(opened(*config(*two)).at(0)) != rows(opened(*config(*two, seed=1)).at(0))


@pytest.mark.parametrize("dp, micro, count", [(1, 1, 5), (1, 4, 5), (2, 2, 5), (3, 1, 7), (2, 4, 1), (2, 3, 10**6)])
def test_evaluation_takes_each_sample_once_and_ranks_stay_together(two, dp, micro, count):
    batch = dp * micro
    parts = [
        list(opened(*config(*two, global_batch=batch, micro_batch=micro), dp_rank=r, dp_size=dp).evaluation(count))
        for r in range(dp)
    ]
    assert len({len(part) for part in parts}) == 1
    everything = rows([batch for part in parts for batch in part])
    scored = {number: row for number, row in everything.items() if set(row[1]) != {IGNORE}}
    wanted = min(count, 75)  # 51 samples in a, 24 in b
    assert sorted(scored) == list(range(wanted)) and len({tuple(tokens) for tokens, _ in scored.values()}) == wanted
    assert scored == rows(list(opened(*config(*two, global_batch=1)).evaluation(count)))
    objective = CausalTokens(config()[0])
    assert sum(objective.counts(batch)["clm"] for part in parts for batch in part) == wanted * SEQ


def test_held_out_samples_are_drawn_from_all_sources(two):
    """Evenly, whatever their weights, and by the seed; not the first ones of the first source."""
    few = [
        [tokens[0] for tokens, _ in rows(list(opened(*config(*two, global_batch=1, seed=s)).evaluation(25))).values()]
        for s in (0, 1)
    ]
    assert few[0] != few[1]
    for firsts in few:
        assert 3 <= sum(first >= 500 for first in firsts) <= 14  # of 75 samples 24 are in the second source


@pytest.mark.parametrize("at", [0, 8, 40, 80])
def test_an_id_outside_the_vocabulary_names_its_document(tmp_path, at):
    ids = np.arange(81, dtype="<u2")
    ids[at] = VOCAB
    with Writer(tmp_path / "a", ids.dtype) as writer:
        for start in range(0, 81, 10):
            writer.add(ids[start : start + 10])
        writer.commit()
    with pytest.raises(DataError) as error:
        opened(*config(Source(path=str(tmp_path / "a")), global_batch=10)).at(0)
    text = str(error.value)
    assert re.match(rf"token id in sample ({at // SEQ}|{max(at - 1, 0) // SEQ}) of {tmp_path / 'a'} = 1000: ", text)
    assert "expected 0 or more and below model.vocab = 1000. Fix: set model.vocab" in text


def test_negative_ids_are_found(tmp_path):
    with Writer(tmp_path / "a", np.dtype("<i4")) as writer:
        writer.add(np.array([1] * 20 + [-7] + [1] * 20, dtype="<i4"))
        writer.commit()
    with pytest.raises(DataError, match=r"sample 2 of .*/a = -7"):
        opened(*config(Source(path=str(tmp_path / "a")), global_batch=5)).at(0)


def test_what_cannot_make_batches_is_refused(tmp_path, two):
    with pytest.raises(DataError, match=r"tokens in .*/c = 8: expected at least 9, one sample"):
        opened(*config(Source(path=corpus(tmp_path / "c", 8))))
    with pytest.raises(DataError, match=r"data sources = \[\]: expected at least one prefix"):
        opened(*config())
    with pytest.raises(ConfigError) as error:
        opened(*config(*two, micro_batch=4), dp_rank=0, dp_size=2)
    assert [(p.key, p.found) for p in error.value.problems] == [("train.global_batch", 12)]
    with pytest.raises(ConfigError) as error:
        opened(*config(*two, micro_batch=4, batch_ramp=(6, 6, 100)))
    assert [(p.key, p.found) for p in error.value.problems] == [("train.batch_ramp gives a batch", 6)]


def test_sources_of_two_tokenizers_are_not_mixed(tmp_path):
    for name, words in (("a", "one two three four "), ("b", "five six seven eight ")):
        (tmp_path / f"{name}.txt").write_text(words * 50)
        prepare([tmp_path / f"{name}.txt"], tmp_path / name, vocab=270, validation=0)
    mixed = [Source(path=str(tmp_path / name / "train_text_document")) for name in "ab"]
    with pytest.raises(DataError, match="data source = .*b/train_text_document.*but it was made with another"):
        opened(*config(*mixed))
    assert opened(*config(mixed[0])).num_samples > 0


def test_a_microbatch_is_of_whole_numbers_and_counts_what_is_scored(two):
    batch = opened(*config(*two, micro_batch=4)).at(0)[0]
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64 and batch.tokens.is_contiguous()
    batch.targets[0, :3] = IGNORE
    assert CausalTokens(config()[0]).counts(batch) == {"clm": 4 * SEQ - 3}


def test_borders_begin_anew_with_each_document(tmp_path):
    changed = config()[0].changed({"objective.reset_at_documents": True})
    (source,) = (Source(path=corpus(tmp_path / "a", 81)),)
    objective = CausalTokens(changed)
    found = objective.sample(objective.open(source.path), 1, np.random.default_rng(0))
    assert found["tokens"].tolist() == list(range(8, 16)) and found["targets"].tolist() == list(range(9, 17))
    assert found["document_ids"].tolist() == [1] * 6 + [2] * 2  # documents of 7 tokens: 7-13, 14-20
    assert found["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
