"""What a user asks of a run's model: the options of `roots generate` and `roots chat`, and which of them go together.

    command line --Asked--> check(config), before any process starts --> request(config) for decode.py

No torch: what cannot be answered is refused within a moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from roots_dist.config.families import HIDES
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem

if TYPE_CHECKING:
    from roots_dist.generate.request import Request

Kind = Literal["write", "fill", "classify", "tag"]
MAX_TOKENS, TEMPERATURE, TOP = 100, 0.8, 5
"""What is taken where nothing is asked."""


def kind_of(config: Config) -> Kind:
    """What a model answers with: words that it writes, words for masks, or labels."""
    name = config.objective.name
    return name if name in ("classify", "tag") else "fill" if name in HIDES else "write"


def is_unicode(text: str) -> bool:
    """Python gives bytes of the command line that it cannot decode as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class Asked:
    """None, (), False: not asked."""

    prompt: str | None = None
    prompts: Path | None = None
    output: Path | None = None
    pair: str | None = None
    top: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    greedy: bool = False
    beams: int | None = None
    length_penalty: float | None = None
    samples: int | None = None
    stop: tuple[str, ...] = ()
    keep_end: bool = False
    raw: bool = False
    seed: int = 0

    def check(self, config: Config) -> None:
        """Raises ConfigError with all that cannot be, for this model."""
        if problems := [*self._of_others(config), *self._contradictions()]:
            raise ConfigError(problems)

    def request(self, config: Config) -> Request:
        """How a model that writes is to write. A decoder over an encoder is greedy unless told otherwise."""
        from roots_dist.generate.request import Request
        from roots_dist.generate.sampling import Sampling

        drawn = self.given(DRAWN) or self.given(("samples",)) or config.model.family != "t5"
        temperature = TEMPERATURE if self.temperature is None else self.temperature
        sampling = Sampling(
            temperature if drawn and not self.greedy else 0.0,
            self.top_k,
            self.top_p,
            self.min_p,
            self.repetition_penalty or 1.0,
        )
        return Request(
            self.max_tokens or MAX_TOKENS,
            sampling,
            self.seed,
            samples=self.samples or 1,
            beams=self.beams or 0,
            length_penalty=1.0 if self.length_penalty is None else self.length_penalty,
        )

    def given(self, names: tuple[str, ...] = ()) -> list[str]:
        """Which options of these (of all) were asked."""
        defaults = {field.name: field.default for field in fields(self)}
        return [name for name in names or defaults if getattr(self, name) != defaults[name]]

    def _of_others(self, config: Config) -> Iterator[Problem]:
        """Options that this model has no use for: they would say nothing, silently."""
        kind, name = kind_of(config), config.objective.name
        for option in self.given():
            if option not in EVERYBODYS + USED[kind]:
                yield self._problem(option, f"nothing here: a model of objective.name={name} {DOES[kind]}")
        if self.raw and kind == "write" and name != "instruct":
            yield self._problem("raw", f"nothing here: with objective.name={name} every prompt is read as it is")
        if kind == "classify" and config.finetune.pair is None and self.pair is not None:
            yield self._problem("pair", "nothing here: this model has learned from single texts")

    def _contradictions(self) -> Iterator[Problem]:
        if self.greedy:
            for option in self.given(DRAWN):
                yield self._problem(option, "nothing beside --greedy, which always takes the likeliest token")
        if self.beams is not None:
            for option in self.given(("greedy", *DRAWN, "repetition_penalty")):
                yield self._problem(option, "nothing beside --beams, which takes the likeliest texts")
            if (self.samples or 1) > self.beams:
                fix = f"raise --beams to {self.samples}, or lower --samples"
                yield Problem(key="--samples", found=self.samples, expected=f"at most --beams = {self.beams}", fix=fix)
        else:
            if self.length_penalty is not None:
                yield self._problem("length_penalty", "nothing without --beams", "add --beams 4")
            if (self.samples or 1) > 1 and (self.greedy or self.temperature == 0):
                fix = "draw with --temperature 0.8, or use --beams"
                yield self._problem("samples", "1, since greedy answers are all the same", fix)
        if "" in self.stop:
            yield Problem(key="--stop", found="", expected="a text that is not empty", fix="leave it out")
        if not all(map(is_unicode, self.stop)):
            yield Problem(key="--stop", found=ascii(self.stop), expected="text in Unicode", fix="give it in the terminal's encoding")

    def _problem(self, option: str, expected: str, fix: str | None = None) -> Problem:
        flag = f"--{option.replace('_', '-')}"
        return Problem(key=flag, found=getattr(self, option), expected=expected, fix=fix or f"leave {flag} out")


EVERYBODYS = ("prompt", "prompts", "output", "seed")
DRAWN = ("temperature", "top_k", "top_p", "min_p")
"""Options of choosing by chance."""
WRITING = (
    "max_tokens", *DRAWN, "repetition_penalty", "greedy", "beams", "length_penalty", "samples", "stop", "keep_end", "raw",
)  # fmt: skip
USED: dict[Kind, tuple[str, ...]] = {"write": WRITING, "fill": ("top",), "classify": ("pair",), "tag": ()}
DOES: dict[Kind, str] = {
    "write": "writes",
    "fill": "fills masks in",
    "classify": "gives a text a label",
    "tag": "gives each word a label",
}
