"""The records of families and objectives, held equal to what the config allows and to what is built."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import get_args

import pytest
import torch

from roots_dist.accounting.sizes import parameters
from roots_dist.config.families import FAMILIES, POSITIONS
from roots_dist.config.model import GATED, ModelConfig
from roots_dist.config.objectives import OBJECTIVES, Answer, Rows, learned_by
from roots_dist.config.records import objective_of, shortest_seq, special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.config.sections import ObjectiveConfig
from roots_dist.config.special_tokens import NAMES
from roots_dist.learning import objectives
from roots_dist.learning.data.specials import synthetic_specials
from roots_dist.learning.data.tasks import ROW_READERS
from roots_dist.learning.models import MODELS, pieces_of
from roots_dist.learning.models.activations import FUNCTIONS, POOLER_FUNCTIONS, activation
from roots_dist.learning.models.parameter_locations import shapes
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.runs.evaluate.held_out import Score, TermSums
from roots_dist.runs.generate.generate import ANSWERS
from roots_dist.world.batch import QuestionObjective, RowObjective


def test_names_are_the_same_in_the_config_the_records_and_the_classes():
    """A record without a class, or a class without a record, is added in config/ or in learning/."""
    assert get_args(ModelConfig.model_fields["family"].annotation) == tuple(FAMILIES) and set(FAMILIES) == set(MODELS)
    assert get_args(ObjectiveConfig.model_fields["name"].annotation) == tuple(OBJECTIVES)
    assert set(OBJECTIVES) == set(objectives.OBJECTIVES)
    assert {record.rows for record in OBJECTIVES.values()} - {None} == set(ROW_READERS) == set(get_args(Rows))
    assert {record.answer for record in OBJECTIVES.values()} == set(ANSWERS) == set(get_args(Answer))
    assert get_args(ModelConfig.model_fields["positions"].annotation) == POSITIONS


def config_of(name: str, family: str | None = None, more: Mapping[str, object] = MappingProxyType({})) -> Config:
    family = family or OBJECTIVES[name].families[0]
    model = {
        "family": family,
        "positions": FAMILIES[family].positions[0],
        "segments": 2 if OBJECTIVES[name].pairs else 0,
    }
    sections = {"model": model | dict(more)}
    return Config.model_validate(
        {"objective": {"name": name}, "finetune": {"labels": ["a", "b"]}, "data": {"seq_length": 32}} | sections
    )


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_record_says_what_its_class_is(name):
    """What has a perplexity has a term of that name; rows and their answers are read where the record says so."""
    record, config = OBJECTIVES[name], config_of(name)
    objective = objectives.OBJECTIVES[name](config, synthetic_specials(config.model.vocab))
    assert (objective.perplexity_term is None) == (record.has_labels or record.has_references)
    assert objective.perplexity_term in {None, *objective.weights}
    assert isinstance(objective, RowObjective) == (record.rows is not None)
    assert isinstance(objective, QuestionObjective) == (
        record.rows is not None and record.answer == "write" and not record.has_references
    )
    assert set(special_tokens_of(config)) <= set(NAMES)
    assert shortest_seq(config) <= config.data.seq_length and record.prompt.format(
        run="runs/x", text="a", masked="a", hollow="a"
    )


LEARNED = [(family, objective) for family in FAMILIES for objective in learned_by(family)]


@pytest.mark.parametrize("family, objective", LEARNED)
@pytest.mark.parametrize("more", [{}, {"norm_position": "post", "norm": "rmsnorm", "activation": "geglu"}], ids=str)
def test_the_formula_counts_the_parameters_that_are_built(family, objective, more):
    """accounting/sizes.py, without torch, and the model itself on the meta device."""
    config = config_of(objective, family, {} if family == "t5" else more)
    built = shapes(pieces_of(config, TensorParallel()))
    assert parameters(config) == sum(math.prod(shape) for shape in built.values())


OF_DECODERS = (
    {"norm_position": "sandwich", "norm": "rmsnorm", "qk_norm": "head", "qkv_bias": False, "kv_heads": 1},
    {"norm_position": "branch", "qk_norm": "whole", "out_bias": False, "mlp_bias": False, "kv_heads": 1},
    {"branches": "parallel", "norm_affine": False, "activation": "swiglu", "bias": False, "qkv_bias": True},
    {"branches": "parallel_one_norm", "head_bias": True, "tied_embeddings": False},
)


@pytest.mark.parametrize("features", OF_DECODERS, ids=lambda features: next(iter(features.values())))
def test_the_formula_knows_the_features_of_decoders(features):
    config = config_of("clm", "gpt", features)
    built = shapes(pieces_of(config, TensorParallel()))
    assert parameters(config) == sum(math.prod(shape) for shape in built.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_something_before_it_is_fine_tuned(name):
    first, *others = learned_by(name)
    assert not OBJECTIVES[first].rows and any(OBJECTIVES[other].rows for other in others)
    assert set(FAMILIES[name].unfit_positions) < set(POSITIONS)
    assert set(FAMILIES[name].encloses_with) <= set(FAMILIES[name].special_tokens) <= set(NAMES)


def test_what_a_decoder_parts_its_pairs_with_is_needed():
    config = config_of("classify")
    assert special_tokens_of(config) == () and not objective_of(config).masks
    assert special_tokens_of(config.changed({"finetune.pair_column": "other"})) == ("end",)
    assert special_tokens_of(config.changed({"model.family": "bert"})) == ("cls", "sep", "pad")


def test_an_activation_is_a_function_or_a_gate_with_one():
    allowed = set(get_args(ModelConfig.model_fields["activation"].annotation))
    assert set(GATED) <= allowed and set(GATED.values()) <= set(FUNCTIONS)
    assert allowed - set(GATED) == set(FUNCTIONS) - {"silu"}, (
        "add it to the Literal in config/model.py, or to FUNCTIONS"
    )
    assert set(get_args(ModelConfig.model_fields["pooler_activation"].annotation)) == set(POOLER_FUNCTIONS)
    up, gate = torch.tensor([2.0, 3.0]), torch.tensor([-1.0, 1.0])
    assert activation(Config(), "swiglu")(gate, up).tolist() == (torch.sigmoid(gate) * gate * up).tolist()
    assert [ModelConfig(activation=name).gated() for name in ("relu", "geglu")] == [False, True]


def test_bits_per_byte_are_of_objectives_that_predict_every_token():
    """One bit for each of 8 tokens of 4 bytes; an objective that scores only some of the tokens has none."""
    every = Score({"a": TermSums(8 * math.log(2), 8, 0)}, {"a": 1.0}, "a", 4.0, every_token=True)
    assert every.bits_per_byte == pytest.approx(1 / 4) and replace(every, bytes_per_token=None).bits_per_byte is None
    assert replace(every, every_token=False).bits_per_byte is None
    assert [name for name, record in OBJECTIVES.items() if record.every_token] == ["clm"]
