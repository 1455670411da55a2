"""A model of transformers becomes a run and goes back: the same logits on the way, the same bits at the end."""

import pytest
import torch
import transformers
from hub_checks import tensors_that_differ
from hub_models import MODELS, generator_of, saved, tensors_in

from roots_dist.assembly.passes import build_passes
from roots_dist.config.run_config import config_of_run
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.storage.exchange.compare import comparison_batch, our_logits, outputs_of, their_logits
from roots_dist.storage.exchange.exporting import export_model
from roots_dist.storage.exchange.importing import import_model
from roots_dist.storage.exchange.values import spelled_out
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh

BOUND = 1e-5


def imported(name, tmp_path):
    theirs = saved(name, tmp_path / "theirs")
    import_model(theirs, tmp_path / "run", generator_of(theirs))
    return theirs, tmp_path / "run"


def logits_of(folder, batch, config):
    parts = [generator_of(folder), folder]
    return [their_logits(part, batch, outputs_of(config)) for part in parts if part is not None]


def test_next_sentences_are_judged_as_theirs_does(tmp_path):
    """What logits of words do not show."""
    theirs, run = imported("bert", tmp_path)
    config = config_of_run(run).config
    passes = build_passes(config, Mesh.single())
    load_weights(best_or_newest(run), passes.model.params)
    draw = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(2, 97, (2, 5, 16), generator=draw)
    labels, segments = torch.tensor([0, 1, 1, 0, 1]), (torch.arange(16) > 6).long().expand(5, -1)
    batch = MicroBatch(tokens=tokens, targets=targets, segment_ids=segments, labels=labels, sample_ids=torch.arange(5))
    terms = passes.forward([batch])
    model = transformers.BertForPreTraining.from_pretrained(theirs)
    with torch.no_grad():
        loss = model(tokens, token_type_ids=segments, labels=targets, next_sentence_label=labels).loss
    torch.testing.assert_close(sum(term.sum / term.count for term in terms), loss, rtol=BOUND, atol=BOUND)
    assert [term.name for term in terms] == ["mlm", "nsp"]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_imported_exported_and_imported_again(name, tmp_path):
    theirs, run = imported(name, tmp_path)
    config = config_of_run(run).config
    batch = comparison_batch(config)
    expected = logits_of(theirs, batch, config)
    ours = our_logits(config, best_or_newest(run), batch)
    assert len(ours) == len(expected) and expected[0].std() > 0.05
    for a, b in zip(ours, expected):
        torch.testing.assert_close(a, b, rtol=BOUND, atol=BOUND)

    back = tmp_path / "back"
    export_model(run, back)
    for a, b in zip(logits_of(back, batch, config), expected):
        torch.testing.assert_close(a, b, rtol=BOUND, atol=BOUND)
    assert tensors_that_differ(name, theirs, back) == []

    import_model(back, tmp_path / "again", generator_of(back))
    once, twice = tensors_in(run), tensors_in(tmp_path / "again")
    assert once.keys() == twice.keys() and all(torch.equal(once[n], twice[n]) for n in once)
    said, said_again = (spelled_out(config_of_run(r).config) for r in (run, tmp_path / "again"))
    paths = ("track.folder", "data.tokenizer")
    assert {k: v for k, v in said.items() if k not in paths} == {k: v for k, v in said_again.items() if k not in paths}
