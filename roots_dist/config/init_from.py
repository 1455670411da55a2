"""A config that goes on from a model: what that model is, is read where it is, and need not be written again.

    fine-tuning's config + config.yaml of finetune.init_from --begun--> Config with that model, tokenizer and objective

What the file or the command line says all the same must not contradict it. Keys that fine-tuning may choose (dropout)
are taken over only where nothing is said. A run that has begun knows all of this itself: it goes on where its start is
gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from roots_dist.config.load import CONFIG_FILE, Loaded, read
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, Problem, present

FREE = ("model.dropout", "model.attention_dropout", "model.init_std")
"""Keys of model.* that do not say which function the weights are of."""
TAKEN = ("advanced.norm_eps", "advanced.vocab_multiple", "data.tokenizer", "data.seq_length")
"""Keys that are taken over from the run besides model.* and generator.*; the first two say which function it is."""
OF_VOCAB_HEAD = ("model.head_bias", "model.logits_scaling", "model.logit_softcap")
"""Keys of the projection over the vocabulary, which a model that gives labels lacks."""
ADAPTERS = ("finetune.lora_rank", "finetune.lora_alpha", "finetune.lora_targets")
"""Keys that training goes on with if the model has adapters: what they are, and what they are multiplied by."""


def complete_from_model(loaded: Loaded) -> Loaded:
    """The config, completed from the model that it starts from; unchanged if it starts from none. Raises ConfigError if
    there is none, or if it is another one than the config says."""
    start = loaded.config.finetune.init_from
    if start is None:
        return loaded
    try:
        there = _own(loaded.config) or config_of(start, loaded.config.advanced.extensions)
    except ConfigError as error:
        raise ConfigError(loaded.located(error.problems)) from None
    values = dict(_taken(there, loaded))
    problems = [*_unusable(start, there, loaded.config)]
    problems += [
        Problem(
            key=key,
            found=loaded.config.value(key),
            expected=f"{value!r} as in finetune.init_from={start}, or nothing",
            fix=f"leave {key} out",
        )
        for key, value in values.items()
        if key in loaded.origins
        and key not in (*FREE, "data.tokenizer", "data.seq_length")
        and loaded.config.value(key) != value
    ]
    if problems:
        raise ConfigError(loaded.located(problems))
    return replace(
        loaded, config=loaded.config.changed({key: v for key, v in values.items() if key not in loaded.origins})
    )


def _unusable(start: str, there: Config, here: Config) -> Iterator[Problem]:
    if Path(start).resolve() == Path(here.track.folder).resolve():
        expected = (
            "another folder than finetune.init_from: what is written there would take the place of what the run "
            "starts from"
        )
        yield Problem(key="track.folder", found=here.track.folder, expected=expected, fix="name a new folder")
    if there.finetune.strategy == "lora" != here.finetune.strategy:
        expected = "a model without adapters, or finetune.strategy=lora, which goes on with them"
        fix = f"put them into the matrices: roots export {start} MERGED; roots import MERGED RUN; and start from RUN"
        yield Problem(key="finetune.init_from", found=start, expected=expected, fix=fix)


def _own(here: Config) -> Config | None:
    """Read the config of the run that is resumed, if the model that it started from is gone; None otherwise.

    Without a checkpoint the trainer then says what is missing.
    """
    kept = Path(here.track.folder) / CONFIG_FILE
    if (
        (Path(present(here.finetune.init_from)) / CONFIG_FILE).is_file()
        or not here.checkpoint.resume
        or not kept.is_file()
    ):
        return None
    own = read(kept, named=here.advanced.extensions).config
    return own if own.finetune.init_from == here.finetune.init_from else None


def config_of(start: str, extensions: Sequence[str] = ()) -> Config:
    """Read the config of the run or import in this folder; `extensions` are those that a person has named. Raises
    ConfigError if it is neither."""
    path = Path(start) / CONFIG_FILE
    if not path.is_file():
        expected, fix = (
            "the folder of a run or of an import, with its config.yaml",
            "name a run's track.folder, or RUN of `roots import HF_FOLDER RUN`",
        )
        raise ConfigError([Problem(key="finetune.init_from", found=start, expected=expected, fix=fix)])
    return read(path, named=extensions).config


def _taken(there: Config, loaded: Loaded) -> Iterator[tuple[str, object]]:
    model = there.model.model_dump()
    if there.model.positions in ("learned", "rotary"):
        model["max_positions"] = there.model.max_positions or there.data.seq_length
    objective = loaded.config if "objective.name" in loaded.origins else there
    left = OF_VOCAB_HEAD if objective_of(objective).has_labels else ()
    yield from ((f"model.{key}", value) for key, value in model.items() if f"model.{key}" not in left)
    yield from ((f"generator.{key}", value) for key, value in there.generator.model_dump().items())
    yield from ((key, there.value(key)) for key in TAKEN)
    if there.finetune.strategy == loaded.config.finetune.strategy == "lora":
        yield from ((key, there.value(key)) for key in ADAPTERS)
    if "objective.name" not in loaded.origins:
        told = (f"objective.{key}" for key in there.objective.model_dump())
        yield from ((key, there.value(key)) for key in told if key not in loaded.origins)
