"""Check which options of `roots generate` and `roots chat` can be combined, and which a model uses.

No torch: a command that cannot work is refused at once.
"""

from __future__ import annotations

from collections.abc import Iterator

from roots_dist.config.objectives import Answer
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem
from roots_dist.runs.generate.options import GenerateOptions


def is_unicode(text: str) -> bool:
    """True if text is valid Unicode: Python represents undecodable bytes of the command line as halves of surrogate
    pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


COMMON = ("prompt", "prompts", "output", "seed")
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p")
"""Options of sampling."""
WRITING_OPTIONS = (
    "max_tokens", *SAMPLING_OPTIONS, "repetition_penalty", "greedy", "beams", "length_penalty", "samples", "stop",
    "keep_end", "raw",
)  # fmt: skip
ALLOWED: dict[Answer, tuple[str, ...]] = {
    "write": WRITING_OPTIONS,
    "fill": ("top",),
    "classify": ("pair",),
    "tag": (),
}
ACTIONS: dict[Answer, str] = {
    "write": "writes",
    "fill": "fills masks",
    "classify": "gives a text a label",
    "tag": "gives each word a label",
}


def check_options(options: GenerateOptions, config: Config) -> None:
    """Raise ConfigError with all problems of the options for this model."""
    if problems := [*_unused_options(options, config), *_contradictions(options)]:
        raise ConfigError(problems)


def _unused_options(options: GenerateOptions, config: Config) -> Iterator[Problem]:
    """Options that this model does not use and would ignore silently."""
    objective, name = objective_of(config), config.objective.name
    kind = objective.answer
    for option in options.given():
        if option not in COMMON + ALLOWED[kind]:
            yield _problem(options, option, f"no value: a model of objective.name={name} {ACTIONS[kind]}")
    if options.raw and kind == "write" and not objective.chats:
        yield _problem(options, "raw", f"no value: with objective.name={name} every prompt is read as it is")
    if kind == "classify" and config.finetune.pair_column is None and options.pair is not None:
        yield _problem(options, "pair", "no value: this model was trained on single texts")


def _contradictions(options: GenerateOptions) -> Iterator[Problem]:
    if options.greedy:
        for option in options.given(SAMPLING_OPTIONS):
            yield _problem(options, option, "no value with --greedy, which always takes the likeliest token")
    if options.beams is not None:
        for option in options.given(("greedy", *SAMPLING_OPTIONS, "repetition_penalty")):
            yield _problem(options, option, "no value with --beams, which takes the likeliest texts")
        if (options.samples or 1) > options.beams:
            fix = f"raise --beams to {options.samples}, or lower --samples"
            yield Problem(
                key="--samples", found=options.samples, expected=f"at most --beams = {options.beams}", fix=fix
            )
    else:
        if options.length_penalty is not None:
            yield _problem(options, "length_penalty", "no value without --beams", "add --beams 4")
        if (options.samples or 1) > 1 and (options.greedy or options.temperature == 0):
            fix = "sample with --temperature 0.8, or use --beams"
            yield _problem(options, "samples", "1, because all greedy answers are the same", fix)
    if "" in options.stop:
        yield Problem(key="--stop", found="", expected="text that is not empty", fix="leave it out")
    if not all(map(is_unicode, options.stop)):
        yield Problem(
            key="--stop",
            found=ascii(options.stop),
            expected="text in Unicode",
            fix="type it in the terminal's encoding",
        )


def _problem(options: GenerateOptions, option: str, expected: str, fix: str | None = None) -> Problem:
    flag = f"--{option.replace('_', '-')}"
    return Problem(key=flag, found=getattr(options, option), expected=expected, fix=fix or f"leave {flag} out")
