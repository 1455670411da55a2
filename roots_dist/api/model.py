"""A trained model in Python: what it thinks of a text, and what it answers.

    load("runs/quickstart") --> Model.logits, score, generate, answers

What `roots generate` and `roots evaluate` use does the work. S tokens of a text, V words of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_origin, get_type_hints

import torch

from roots_dist import environment
from roots_dist.api.arguments import checked, kind_of, refuse_others
from roots_dist.assembly.passes import Passes
from roots_dist.cli.generate import GENERATE
from roots_dist.config.records import family_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.config.unknown_keys import nearest
from roots_dist.errors import ArgumentError, DataError, Problem, Short, UserError, present
from roots_dist.runs.generate.cached_decoder import broadcast
from roots_dist.runs.generate.check_options import check_options, is_unicode
from roots_dist.runs.generate.generate import load_model, reply
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.generate.prompts import Prompt, PromptEncoder, open_prompt_encoder
from roots_dist.runs.ranks.join import device_for
from roots_dist.runs.ranks.run_on_ranks import ready
from roots_dist.world.batch import IGNORE, MicroBatch
from roots_dist.world.mesh import Mesh

HALVES = "remove U+D800 to U+DFFF, which are halves of characters"


class TextScore(NamedTuple):
    """The likelihood of a text under a model."""

    log_probability: float
    """Natural logarithm of the probability of all scored tokens together."""
    tokens: int
    """Number of scored tokens: a first token that nothing stands before is not scored."""

    @property
    def perplexity(self) -> float:
        return math.exp(-self.log_probability / self.tokens)


@dataclass(frozen=True, eq=False)
class Model:
    """A model and its tokenizer. In a run on several ranks, all ranks call the same methods with the same arguments."""

    passes: Passes
    """The model as the trainer holds it: `passes.model.module` is a torch module with this rank's parameters."""

    @property
    def config(self) -> Config:
        """The run's config, with the layout that this process has."""
        return self.passes.config

    @checked()
    def tokens(self, text: str) -> list[int]:
        """Ids of a text as the model reads it, with the special tokens that its kind puts around a text."""
        if not is_unicode(text):
            raise _unfit("text", Short(text), "text in Unicode", HALVES)
        ids = self._raw.ids(text)
        if family_of(self.config).is_encoder:
            s = self._raw.specials
            ids = [present(s.cls), *self._raw.codec.encode_with_specials(text), present(s.sep)]
        if not ids:
            raise _unfit("text", text, "text that has at least one token", "give another text")
        return self._checked(ids)

    @checked()
    def text(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return self._raw.codec.decode(self._known(ids))

    @checked()
    def logits(self, text: str | Sequence[int]) -> torch.Tensor:
        """Logits of a text or of ids, float32 [S, V] on the CPU: of a decoder those of the token after each position,
        of an encoder those of the token at each position. Raises UserError for a model that has no such logits."""
        if objective_of(self.config).has_labels or family_of(self.config).has_two_stacks:
            raise self._cannot("logits", "a decoder, or an encoder that fills masks", "use generate() or answers()")
        ids = self.tokens(text) if isinstance(text, str) else self._checked(self._known(text))
        found = self._forward(ids, [IGNORE] * len(ids), slice(None))
        logits = next((part for part in found if isinstance(part, torch.Tensor) and part.dim() == 3), None)
        return self._everywhere(logits, (1, len(ids), self.config.model.vocab), torch.float32)[0]

    @checked()
    def score(self, text: str, given: str = "") -> TextScore:
        """Log-probability of a text, or of how `given` goes on with it. Only decoders have one. Raises UserError for
        other models and for an empty text."""
        if objective_of(self.config).has_labels or not family_of(self.config).is_decoder:
            raise self._cannot("score", "a decoder", "use logits(), generate() or answers()")
        ids = self.tokens(given + text)
        known = len(self._raw.ids(given)) or len(self._raw.specials.tokens.before) or 1
        if len(ids) <= known:
            raise _unfit("text", text, "text with a token that another one stands before", "give a longer text")
        targets = [IGNORE if place + 1 < known else token for place, token in enumerate(ids[1:])]
        found = self._forward(ids[:-1], targets, "targets")
        scores = next((part[0] for part in found if isinstance(part, tuple)), None)
        each = self._everywhere(scores, (1, len(targets)), torch.float64)
        return TextScore(float(each.sum()), len(ids) - known)

    @checked(prompt="give one text; answers() takes a list of them")
    def generate(self, prompt: str, **options: Any) -> str:
        """Answer a prompt as `roots generate` does: a continuation, an answer, a text with its masks filled, a label.
        Options are those of the command: max_tokens=50, temperature=0.7, top_p=0.9, greedy=True, stop=("end",), seed=1.
        """
        (first, *_) = self.answers([prompt], **options)
        return str(first["text"] if "text" in first else first.get("label", first))

    @checked()
    def answers(self, prompts: Sequence[str], **options: Any) -> list[dict[str, object]]:
        """Answer several prompts at a time. Each answer is a line of `roots generate --output`: prompt and text, the
        guesses for masks, or labels with their probabilities; samples=3 gives three lines per prompt."""
        chosen = _options(options)
        check_options(chosen, self.config)
        encoder = self._chat if objective_of(self.config).chats and not chosen.raw else self._raw
        asked = [Prompt(prompt, chosen.pair, f"prompt {number}") for number, prompt in enumerate(prompts, 1)]
        for one in asked:
            if not one.text.strip():
                raise one.problem("text that is not empty", "give at least one word")
            if not is_unicode(f"{one.text}{one.pair or ''}"):
                raise one.problem("text in Unicode", HALVES)
        return [each.record for each in reply(asked, encoder, lambda: self.passes, chosen)]

    @cached_property
    def _raw(self) -> PromptEncoder:
        return open_prompt_encoder(self.config, talks=False)

    @cached_property
    def _chat(self) -> PromptEncoder:
        return open_prompt_encoder(self.config, talks=True)

    def _checked(self, ids: list[int]) -> list[int]:
        m = self.config.model
        limit = self._raw.positions if m.positions == "learned" else None
        if limit is not None and len(ids) > limit:
            raise _unfit("tokens of the text", len(ids), f"at most {limit}, the learned positions", "a shorter text")
        return self._known(ids)

    def _known(self, ids: Sequence[int]) -> list[int]:
        vocab = self.config.model.vocab
        if wrong := [i for i in ids if not 0 <= i < vocab]:
            raise _unfit("token id", wrong[0], f"0 to {vocab - 1}", "use ids of the run's tokenizer")
        return list(map(int, ids))

    def _forward(self, ids: list[int], targets: list[int], at: slice | Literal["targets"]) -> list[Any]:
        batch = MicroBatch(
            tokens=torch.tensor([ids]),
            targets=torch.tensor([targets]),
            sample_ids=torch.zeros(1, dtype=torch.int64),
            logits_at=at,
        )
        with self.passes.model.tp.without_sequence_sharding():  # a text has any length
            return self.passes.forward([batch.to(self.passes.mesh.device)])

    def _everywhere(self, mine: torch.Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        mesh = self.passes.mesh
        return broadcast(mesh.model, mine if mesh.tp.rank == 0 else None, shape, dtype, mesh.device)

    def _cannot(self, what: str, expected: str, fix: str) -> UserError:
        return _unfit(f"{what}() of a model of objective.name", self.config.objective.name, expected, fix)


@checked(run="give the folder of a run, as runs/quickstart")
def load(run: str | Path, overrides: Sequence[str] = ()) -> Model:
    """Load the best or newest checkpoint of a run or an import into this process, whatever layout wrote it. On a GPU if
    there is one; `overrides` are `section.key=value`, as of `roots generate`. Raises UserError."""
    loaded = GENERATE.fit(GENERATE.read(str(run), overrides), 1)
    layout = ready(loaded, 1, local_size=1, ignored_keys=GENERATE.not_required, trains=False)
    world = environment.discover() or environment.single_process()
    return Model(load_model(loaded.config, Mesh.connect(layout, 0, device_for(loaded.config, world.local_rank))))


def _options(given: dict[str, Any]) -> GenerateOptions:
    """The options by their names. Raises ArgumentError for an unknown one, and for a value that it does not take."""
    hints = get_type_hints(GenerateOptions)
    known = [name for name in hints if name not in ("prompt", "prompts", "output")]
    problems = []
    for name, value in given.items():
        if name not in known:
            near = nearest(name, known)
            takes_it = near is not None and kind_of(hints[near]).fits(value)
            fix = f"write {near}={Short(value)}" if takes_it else "leave it out"
            problems.append(Problem(key=name, found=Short(value), expected=f"one of {', '.join(known)}", fix=fix))
    if problems:
        raise ArgumentError(problems)
    refuse_others({name: (kind_of(hints[name]), value) for name, value in given.items()})
    lists: dict[str, Any] = {name: tuple(value) for name, value in given.items() if get_origin(hints[name]) is tuple}
    options = GenerateOptions(**given | lists)
    if problems := [*_out_of_range(options)]:
        raise ArgumentError(problems)
    return options


def _out_of_range(options: GenerateOptions) -> Iterator[Problem]:
    """Numbers that the command line would not take either: the bounds stand beside each option."""
    for name, hint in get_type_hints(GenerateOptions, include_extras=True).items():
        value, (bounds,) = getattr(options, name), hint.__metadata__
        least, most = getattr(bounds, "min", None), getattr(bounds, "max", None)
        if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if (least is not None and value < least) or (most is not None and value > most):
            expected = f"{least:g} or more" + (f", and at most {most:g}" if most is not None else "")
            yield Problem(key=name, found=value, expected=expected, fix="choose another, or leave it out")


def _unfit(key: str, found: object, expected: str, fix: str) -> DataError:
    return DataError(Problem(key=key, found=found, expected=expected, fix=fix))
