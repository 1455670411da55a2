"""What the verbs that run on ranks have in common, as data: where the config comes from, what is checked, what is done.

    cli.py --TRAIN | FINETUNE | EVALUATE …--> start.py, which starts the ranks or is one

torch is imported by `work`, on a rank, when everything has been checked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from roots_dist.config.load import Loaded, read
from roots_dist.config.of_run import of_run
from roots_dist.config.schema import Config
from roots_dist.config.special_tokens import TASKS
from roots_dist.config.start import begun
from roots_dist.errors import ConfigError, Problem
from roots_dist.evaluate.wishes import Wishes


def _as_it_is(loaded: Loaded, world_size: int) -> Loaded:
    return loaded


def _nothing(config: Config) -> None:
    pass


@dataclass(frozen=True)
class Verb:
    name: str
    read: Callable[[str, Sequence[str]], Loaded]
    """(what the user named, overrides) -> config."""
    work: Callable[..., int | None]
    """(config, mesh), on every rank: the exit code, if it is another than 0."""
    fit: Callable[[Loaded, int], Loaded] = _as_it_is
    """The config for a world of this size, where it depends on that."""
    needless: frozenset[str] = frozenset()
    """Keys that training needs and this verb does not: what is wrong with them does not matter."""
    look: Callable[[Config], None] = _nothing
    """What else is checked before the first process group, once the config is sound. Raises UserError."""
    spreads: bool = True
    """Bare, it takes all GPUs of this machine; else those of one replica of the model."""


def read_whole(path: str, overrides: Sequence[str]) -> Loaded:
    """The config as training or fine-tuning has it: completed from the model that it starts from, and from its rows."""
    loaded = begun(read(path, overrides))
    if loaded.config.objective.name not in TASKS and loaded.config.finetune.epochs is None is loaded.config.finetune.every_epochs:
        return loaded
    from roots_dist.data.told import told

    return replace(loaded, config=told(loaded.config))


def _read_for_training(path: str, overrides: Sequence[str]) -> Loaded:
    asked = read(path, overrides)
    if asked.config.finetune.start is not None:
        expected, fix = "nothing: training begins with weights that are drawn", f"roots finetune {path}, or leave it out"
        problem = Problem(key="finetune.start", found=asked.config.finetune.start, expected=expected, fix=fix)
        raise ConfigError(asked.located([problem]))
    return read_whole(path, overrides)


def _read_for_finetuning(path: str, overrides: Sequence[str]) -> Loaded:
    asked = read(path, overrides)
    if asked.config.finetune.start is None:
        expected, fix = "the folder of a run, or of an import, to start from", "set finetune.start=RUN, or begin anew with roots train"
        raise ConfigError(asked.located([Problem(key="finetune.start", found=None, expected=expected, fix=fix)]))
    return read_whole(path, overrides)


def _look(config: Config) -> None:
    """At the rows of a task, and at the names of what learns."""
    if config.objective.name in TASKS:
        from roots_dist.data.told import look

        look(config)
    if config.finetune.strategy in ("partial", "lora"):
        from roots_dist.mesh import SINGLE
        from roots_dist.models import pieces_of
        from roots_dist.models.outline import outline
        from roots_dist.optim.phases import learned
        from roots_dist.tensor.collectives import Later, Split

        places = outline(pieces_of(config, Split(SINGLE, False, Later())))
        learned(config, {name: place.depth for name, place in places.items()})


def _look_at_held_out(config: Config) -> None:
    """At the rows that are evaluated; those of training need not be there any more."""
    if config.objective.name in TASKS and config.data.validation:
        from roots_dist.data.told import look

        look(config.changed({"data.train": ()}))


def _train(config: Config, mesh) -> int:
    from roots_dist.train.loop import train

    return train(config, mesh)


def _evaluate(config: Config, mesh, wishes: Wishes = Wishes()) -> None:
    from roots_dist.evaluate.evaluate import evaluate

    evaluate(config, mesh, wishes)


def _read_for_evaluation(run: str, overrides: Sequence[str], wishes: Wishes = Wishes()) -> Loaded:
    """All of the held-out text, unless told otherwise."""
    loaded = of_run(run, overrides, {"train.eval_sequences": sys.maxsize})
    if problems := wishes.problems(loaded.config):
        raise ConfigError(problems)
    return loaded


def _without_training_batch(loaded: Loaded, world_size: int) -> Loaded:
    """Evaluation has no optimizer step whose size could fit the world or not."""
    config = loaded.config
    ranks = max(1, world_size // config.parallel.tp)  # of dp × pp: a multiple of every number that batches are cut by
    values = {"train.batch": config.train.micro_batch * ranks, "train.batch_ramp": None}
    return replace(loaded, config=config.changed(values))


def _generate(config: Config, mesh, **how) -> None:
    from roots_dist.generate.generate import generate

    generate(config, mesh, **how)


def _chat(config: Config, mesh, **how) -> None:
    from roots_dist.generate.chat import chat

    chat(config, mesh, **how)


def _look_at_prompts(config: Config, **how) -> None:
    from roots_dist.generate.generate import check

    check(config, **how)


def _look_at_chat(config: Config, **how) -> None:
    from roots_dist.generate.chat import check

    check(config, **how)


def _read_for_generation(run: str, overrides: Sequence[str]) -> Loaded:
    """On a GPU where there is one, whatever trained it; without the corpora, which are not read."""
    loaded = of_run(run, overrides, {"train.device": "auto"})
    return replace(loaded, config=loaded.config.changed({"data.train": (), "data.validation": ()}))


TRAIN = Verb("train", _read_for_training, _train, look=_look)
FINETUNE = Verb("finetune", _read_for_finetuning, _train, look=_look)
EVALUATE = Verb(
    "evaluate",
    _read_for_evaluation,
    _evaluate,
    _without_training_batch,
    look=_look_at_held_out,
    needless=frozenset({"data.train", "data.tokenizer", "track.folder", "model"}),  # model: memory for optimizer states
)
GENERATE = Verb(
    "generate",
    _read_for_generation,
    _generate,
    _without_training_batch,
    needless=frozenset({"data.train", "track.folder", "model"}),
    look=_look_at_prompts,
    spreads=False,
)
CHAT = replace(GENERATE, name="chat", work=_chat, look=_look_at_chat)


def evaluation(wishes: Wishes) -> Verb:
    """EVALUATE with more: an n-gram baseline learns from the training text, which must be there."""
    needless = EVALUATE.needless - ({"data.train"} if wishes.ngram is not None else set())
    read_run, work = partial(_read_for_evaluation, wishes=wishes), partial(_evaluate, wishes=wishes)
    return replace(EVALUATE, read=read_run, work=work, needless=needless)


def asking(verb: Verb, asked: object, **how: object) -> Verb:
    """GENERATE or CHAT, with what the command line asks for (generate/asked.py) and who hears and shows."""
    return replace(verb, work=partial(verb.work, asked=asked, **how), look=partial(verb.look, asked=asked))
