"""An import is a run like any other: TP2 × PP2 loads its slices and says what one process says; exports write the same
texts."""

import pytest
import torch
import transformers
from hub_models import FIRST, generator_of, saved

from roots_dist.assembly.passes import build_passes
from roots_dist.assembly.run import build_run
from roots_dist.config.init_from import complete_from_model
from roots_dist.config.load import Loaded
from roots_dist.config.run_config import config_of_run
from roots_dist.config.schema import Config
from roots_dist.errors import UserError
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.request import Request
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.runs.train.init_weights import load_init_weights
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.storage.exchange.compare import comparison_batch, our_logits
from roots_dist.storage.exchange.exporting import export_model
from roots_dist.storage.exchange.importing import import_model
from roots_dist.testing.world import on_warm_world
from roots_dist.world.mesh import Mesh

TEXTS = [[5, 17, 3, 12], [60, 22], [33, 7, 91]]
NEW = 7


def loaded(run, mesh: Mesh, overrides=()):
    config = config_of_run(run, overrides).config
    passes = build_passes(config, mesh)
    load_weights(best_or_newest(run), passes.model.params, mesh)
    return config, passes


def read_in_layout(rank: int, size: int, run: str) -> list[torch.Tensor]:
    mesh = Mesh.connect(Layout(dp=1, pp=2, tp=2), rank)
    config, passes = loaded(run, mesh, ["parallel.tp=2", "parallel.pp=2", "train.global_batch=2"])
    with passes.model.tp.without_sequence_sharding():
        return [logits.float() for logits in passes.forward([comparison_batch(config)])]


def test_a_discriminator_alone_can_be_fine_tuned_and_nothing_else(tmp_path):
    theirs, run = saved("electra", tmp_path / "theirs"), tmp_path / "run"
    assert "without its generator it can be fine-tuned, not pre-trained" in import_model(theirs, run)
    asked = Config.model_validate(
        {"objective": {"name": "classify"}, "finetune": {"init_from": str(run), "labels": ["a", "b"]}}
    )
    config = complete_from_model(Loaded(asked, {"objective.name": "x", "finetune.labels": "x"})).config
    tuned = build_run(config, Mesh.single(), objective=proof_objective(config))
    drawn = {p.name: p.tensor.clone() for p in tuned.params}
    load_init_weights(tuned)
    model = transformers.AutoModel.from_pretrained(theirs)
    here = {p.name: p.tensor for p in tuned.params}
    words = model.embeddings.word_embeddings.weight
    assert torch.equal(here["embed.tokens.weight"][: len(words)], words)
    assert torch.equal(here["blocks.0.mlp.up.weight"], model.encoder.layer[0].intermediate.dense.weight)
    assert torch.equal(here["head.classifier.weight"], drawn["head.classifier.weight"])
    with pytest.raises(UserError, match="generator.* is missing"):
        loaded(run, Mesh.single())


def logits_of_layout(run) -> list[list[torch.Tensor]]:
    """What each tensor rank of TP2 × PP2 computes, found by the pipeline ranks that have a head."""
    ranks = on_warm_world(4, read_in_layout, str(run))
    return [[logits for pipe in (0, 1) for logits in ranks[2 * pipe + tensor_rank]] for tensor_rank in (0, 1)]


ALWAYS = ("gpt2", "electra", "t5 v1.0")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.full] * (name not in ALWAYS)) for name in FIRST]
)
def test_a_layout_reads_its_slices_of_an_import(name, tmp_path):
    theirs, run = saved(name, tmp_path / "theirs", even=True), tmp_path / "run"
    import_model(theirs, run, generator_of(theirs))
    config = config_of_run(run).config
    alone = our_logits(config, best_or_newest(run), comparison_batch(config))
    for found in logits_of_layout(run):
        assert len(found) == len(alone)
        for a, b in zip(found, alone):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


WRITERS = ["gpt2", "bloom", "llama", "gpt_neox tied", "t5 v1.0", "t5 v1.1"]
WRITERS += ["mistral window", "gemma2", "gemma3", "smollm3", "falcon groups", "gptj", "olmo3", "deepseek_v3"]


@pytest.mark.parametrize("name", WRITERS)
def test_transformers_generates_from_an_export_what_the_run_does(name, tmp_path):
    run, back = tmp_path / "run", tmp_path / "back"
    import_model(saved(name, tmp_path / "theirs"), run)
    export_model(run, back)
    config, passes = loaded(run, Mesh.single())
    start = 0 if config.model.family == "t5" else None
    answers = decode(passes, TEXTS, Request(max_tokens=NEW, sampling=Sampling(temperature=0)), start=start)
    kind = transformers.AutoModelForCausalLM if start is None else transformers.AutoModelForSeq2SeqLM
    model = kind.from_pretrained(back)
    model.generation_config.eos_token_id = None  # neither stops, nor is kept from what would stop it
    for text, (answer,) in zip(TEXTS, answers):
        (row,) = model.generate(torch.tensor([text]), max_new_tokens=NEW, do_sample=False).tolist()
        assert answer.tokens == row[len(text) if start is None else 1 :]
