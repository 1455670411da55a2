"""Training objectives. OBJECTIVES maps objective.name to a class as world/batch.py describes it: which samples a source
holds, what each is (a pure function of seed and number), which terms its loss has and what each is divided by."""

from __future__ import annotations

from collections.abc import Callable

from roots_dist.config.records import special_tokens_of
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import called
from roots_dist.errors import DataError, Problem
from roots_dist.learning.data.specials import Specials, no_specials, read_specials
from roots_dist.learning.objectives.classify import TextClasses
from roots_dist.learning.objectives.clm import CausalTokens
from roots_dist.learning.objectives.dpo import Preferences
from roots_dist.learning.objectives.instruct import InstructAnswers
from roots_dist.learning.objectives.mlm import MaskedTokens
from roots_dist.learning.objectives.nsp import MaskedPairs
from roots_dist.learning.objectives.prefix import Prefix
from roots_dist.learning.objectives.rtd import ReplacedTokens
from roots_dist.learning.objectives.seq2seq import TextToText
from roots_dist.learning.objectives.spans import Spans
from roots_dist.learning.objectives.tag import WordClasses
from roots_dist.world.batch import Objective, RowObjective

OBJECTIVES: dict[str, Callable[[Config, Specials], Objective]] = {
    "clm": CausalTokens,
    "mlm": MaskedTokens,
    "mlm-nsp": MaskedPairs,
    "rtd": ReplacedTokens,
    "spans": Spans,
    "prefix": Prefix,
    "classify": TextClasses,
    "tag": WordClasses,
    "instruct": InstructAnswers,
    "dpo": Preferences,
    "seq2seq": TextToText,
}


def objective_class(config: Config) -> Callable[[Config, Specials], Objective]:
    """The class of the config's objective, or of its extension's."""
    added = config.extension.objectives.get(config.objective.name)
    return added.make if added else OBJECTIVES[config.objective.name]


def make_objective(config: Config) -> Objective:
    """The config's, with the special tokens of its tokenizer. Raises DataError if it needs some that are not there."""
    name, tokens = config.data.tokenizer, special_tokens_of(config)
    if tokens and name is None:
        expected = f"the tokenizer of the corpus, for its {called(tokens)}"
        raise DataError(
            Problem(
                key="data.tokenizer", found=None, expected=expected, fix="name the tokenizer.json beside the corpus"
            )
        )
    vocab = config.model.vocab
    return objective_class(config)(config, read_specials(name, vocab) if name else no_specials(vocab))


def make_row_objective(config: Config) -> RowObjective:
    """Make the config's, which reads rows of a task."""
    objective = make_objective(config)
    assert isinstance(objective, RowObjective), config.objective.name
    return objective
