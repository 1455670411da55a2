"""Training in Python: a config, its batches, steps of one's own, and a whole run that calls back.

    read_config --> batches | training --step by step--> StepReport | train --Moment--> functions of one's own

Every function is what `roots train` and `roots finetune` call. Started with torchrun (or deepspeed, mpirun, srun), a
program is one rank of the config's layout; without a launcher it is the only process.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from roots_dist import environment, logs
from roots_dist.api.arguments import call_name, checked, refuse, takes_one
from roots_dist.api.model import Model
from roots_dist.cli.read_config import read_config as read_and_complete
from roots_dist.cli.train import TRAIN
from roots_dist.config.load import Loaded
from roots_dist.config.records import learning_rate_of
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, DataError, Problem
from roots_dist.failures import RankIdentity, guarded
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.objectives import make_objective
from roots_dist.runs.ranks.join import joined
from roots_dist.runs.ranks.run_on_ranks import ready
from roots_dist.runs.track.metrics import OURS, is_own
from roots_dist.runs.train import callbacks, loop, saving
from roots_dist.runs.train.origin import write_origin
from roots_dist.runs.train.run_folder import hold_folder
from roots_dist.runs.train.state import TrainState
from roots_dist.runs.train.step import StepReport
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh


@dataclass(frozen=True)
class Moment:
    """The state of a training run, as a function of one's own receives it."""

    step: int
    """Number of steps done."""
    metrics: Mapping[str, float]
    """Metrics of a step (loss/train, each term, optim/grad_norm and optim/lr), or all that an evaluation found."""
    model: Model
    """The model as it is now. All ranks are called, because its methods need all of them."""
    folder: Path
    """The run's folder."""
    checkpoint: Place | None = None
    """The folder of the checkpoint that has just been saved."""
    rank: int = 0


OnMoment = Callable[[Moment], Mapping[str, float] | None]
"""A function of one's own. What it returns is logged: `section/name` -> number."""
ConfigOrFile = Config | str | Path
"""A config, or the YAML file of one."""


@checked(file="give the path of a YAML file; a Config is changed with config.changed({'section.key': value})")
def read_config(file: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config and complete it as `roots train` does. Raises ConfigError with all unknown keys and wrong values of
    the file; what values mean for each other is checked when a run is opened."""
    return read_and_complete(str(file), overrides).config


@checked()
def batches(config: ConfigOrFile, overrides: Sequence[str] = (), *, first_step: int = 0) -> Iterator[list[MicroBatch]]:
    """Iterate over the microbatches of each step of a config, those of the whole global batch, up to train.steps.
    Raises UserError for what `roots train` would refuse."""
    if first_step < 0:
        raise refuse("first_step", first_step, "0 or more steps", "leave it out")
    loaded = _loaded(config, overrides)
    resolved = loaded.config
    ready(loaded, resolved.parallel.least_ranks(), local_size=None)
    packed = resolved.finetune.packing
    found = Batches.open(resolved, make_objective(resolved), resolved.data.train, packed=packed)
    return (found.at(step) for step in range(first_step, resolved.train.steps))


class Training:
    """A run that is trained step by step. Methods are collective over the world."""

    def __init__(self, state: TrainState) -> None:
        self._state = state
        self._rate = learning_rate_of(state.config)

    @property
    def config(self) -> Config:
        return self._state.config

    @property
    def steps_done(self) -> int:
        """Number of steps done, those before a resume included."""
        return self._state.step

    @property
    def model(self) -> Model:
        """The model as it is now."""
        return Model(self._state.run.passes)

    @checked()
    def batches(self, step: int | None = None) -> list[MicroBatch]:
        """This data rank's microbatches of a step (default: the next), on its device."""
        chosen = self._state.step if step is None else step
        if chosen < 0:
            raise refuse("step", step, "0 or more; the first step is 0", "leave it out for the next step")
        return [batch.to(self._state.mesh.device) for batch in self._state.batches_at(chosen)]

    @checked(batches="give what batches() returns, a list of this rank's microbatches")
    def step(self, batches: list[MicroBatch] | None = None, lr: float | None = None) -> StepReport:
        """Take an optimizer step. Without arguments it is the one that `roots train` would take next."""
        if batches is not None and not batches:
            raise refuse("batches", batches, "at least one microbatch", "leave it out for the next step's")
        if lr is not None and lr < 0:
            raise refuse("lr", lr, "0 or more", "leave it out for the rate of the config")
        state = self._state
        rate = self._rate(state.step) if lr is None else lr
        report = loop.take_step(state, state.batches_at if batches is None else lambda _: batches, rate)
        callbacks.check_ranks_if_due(state)
        return report

    @checked()
    def evaluate(self) -> dict[str, float]:
        """Score the held-out text. Metrics under their names in metrics.jsonl; empty without data.validation."""
        return dict(callbacks.evaluate(self._state))

    @checked()
    def save(self) -> Place:
        """Save a checkpoint from which `roots train`, `roots generate` and load() go on, and return its folder: in the
        run's own, or in checkpoint.fallback_folder if that could not take it."""
        state = self._state
        if state.mesh.rank == 0:
            write_origin(state.folder, state.config, state.mesh.layout, state.bounds.facts())
        saved = saving.checkpoint(state, last=True)
        assert saved is not None
        return saved


class Opening(AbstractContextManager[Training]):
    """A run that a with statement opens, and closes behind it."""

    def __init__(self, opened: AbstractContextManager[Training]) -> None:
        self._opened = opened

    def __enter__(self) -> Training:
        return self._opened.__enter__()

    def __exit__(self, *failure: Any) -> bool | None:
        return self._opened.__exit__(*failure)

    def __getattr__(self, name: str) -> NoReturn:
        fix = f"write `with training(config) as run:` and, inside it, run.{name}"
        raise AttributeError(f"{name} of training(): the run is not open. Fix: {fix}")


@checked()
def training(config: ConfigOrFile, overrides: Sequence[str] = ()) -> AbstractContextManager[Training]:
    """Open a run, in a with statement, to train it step by step, from its newest checkpoint if it has one. Raises
    UserError for what `roots train` would refuse."""
    return Opening(_opened(config, overrides))


@contextmanager
def _opened(config: ConfigOrFile, overrides: Sequence[str]) -> Iterator[Training]:
    with _on_this_rank(config, overrides) as (resolved, mesh), ExitStack() as held:
        folder = Path(resolved.track.folder)
        if mesh.rank == 0:
            held.enter_context(hold_folder(folder))
        yield Training(loop.open_run(folder, resolved, mesh, loop.TrainParts(peak_of_devices=lambda *_: None)))


@checked()
def train(
    config: ConfigOrFile,
    overrides: Sequence[str] = (),
    *,
    on_step: OnMoment | None = None,
    every: int = 1,
    on_evaluation: OnMoment | None = None,
    on_checkpoint: OnMoment | None = None,
) -> Path:
    """Train as `roots train` does, and return the run's folder. The functions are called on every rank: `on_step` after
    every `every` steps and the last one, the others after each evaluation and checkpoint. The numbers that they return
    go where the run's own go: terminal, metrics.jsonl, TensorBoard, W&B and report. Raises UserError for what `roots
    train` would refuse, and SystemExit if a signal stopped the run."""
    if every < 1:
        raise refuse("every", every, "1 or more steps", "leave it out")
    for name, call in (("on_step", on_step), ("on_evaluation", on_evaluation), ("on_checkpoint", on_checkpoint)):
        if call is not None and not takes_one(call):
            raise refuse(name, call, "a function of one argument, a Moment", f"write def {call_name(call)}(moment): …")
    with _on_this_rank(config, overrides) as (resolved, mesh):
        rate = learning_rate_of(resolved)

        def after_step(state: TrainState, report: StepReport) -> None:
            if state.step % every and state.step < resolved.train.steps:
                return
            terms = {f"loss/train/{name}": value for name, value in report.terms.items()}
            own = {"loss/train": report.loss, "optim/grad_norm": report.grad_norm, "optim/lr": rate(state.step - 1)}
            _tell(on_step, state, own | terms)

        parts = loop.TrainParts(
            on_step=(after_step,) if on_step else (),
            on_evaluation=((lambda state, found: _tell(on_evaluation, state, found)),) if on_evaluation else (),
            on_checkpoint=((lambda state, path: _tell(on_checkpoint, state, {}, path)),) if on_checkpoint else (),
        )
        code = loop.train(resolved, mesh, parts)
    if mesh.rank == 0:
        loop.close_run(resolved, mesh.layout)
    if code:
        raise SystemExit(code)
    return Path(resolved.track.folder)


def _tell(call: OnMoment | None, state: TrainState, metrics: Mapping[str, float], saved: Place | None = None) -> None:
    assert call is not None
    moment = Moment(state.step, metrics, Model(state.run.passes), state.folder, saved, state.mesh.rank)
    given = call(moment)
    if not isinstance(given, Mapping | None) or not all(_is_metric(*item) for item in (given or {}).items()):
        expected = "a mapping of section/name to a number, or None"
        name = getattr(call, "__name__", type(call).__name__)
        raise refuse(f"what {name} returned", given, expected, "return {'mine/name': 1.0}, say")
    found = {name: float(value) for name, value in (given or {}).items()}
    for name, value in found.items():
        if not is_own(name):
            expected = f"section/name, with another section than {', '.join(sorted(OURS))}"
            raise DataError(Problem(key=f"metric {name}", found=value, expected=expected, fix="call it mine/NAME"))
    if found:
        state.trackers.log(state.step, found)


def _is_metric(name: object, value: object) -> bool:
    """True for a name and what is a number: those of numpy and torch are."""
    try:
        float(value)  # type: ignore[arg-type] # what is none raises
    except (TypeError, ValueError, RuntimeError):
        return False
    return isinstance(name, str) and not isinstance(value, (str, bytes))


@contextmanager
def _on_this_rank(config: ConfigOrFile, overrides: Sequence[str]) -> Iterator[tuple[Config, Mesh]]:
    """Check the config, and join the world of the launcher that started this process, if there is one."""
    started = environment.discover()
    world = started or environment.single_process()
    loaded = _loaded(config, overrides)
    parallel = loaded.config.parallel
    if started is None and (size := parallel.least_ranks()) > 1:
        expected = f"a launcher for its {size} processes, because a Python program is one of them"
        fix = f"start it with torchrun --nproc-per-node {size} PROGRAM, or set parallel.tp=1 and parallel.pp=1"
        raise ConfigError([Problem(key=" × ".join(parallel.factors()), found=size, expected=expected, fix=fix)])
    who = RankIdentity(world.rank, world.size, folder=Path(loaded.config.track.folder), local_size=world.local_size)
    with ExitStack() as held:
        if world.size > 1:  # the others must not wait for one that has failed
            held.enter_context(guarded(who))
        else:
            held.enter_context(environment.restored())
        layout = ready(loaded, world.size, world.local_size, rank=world.rank)
        TRAIN.check(loaded.config)
        if not logging.getLogger().handlers:
            logs.setup(world.rank, str(layout.place(world.rank)) if world.size > 1 else "")
        yield loaded.config, held.enter_context(joined(loaded.config, world, layout, who=who))


def _loaded(config: ConfigOrFile, overrides: Sequence[str]) -> Loaded:
    if not isinstance(config, Config):
        return read_and_complete(str(config), overrides)
    if overrides:
        fix = "use config.changed({'section.key': value}), or name the file"
        raise ConfigError([Problem(key="overrides", found=list(overrides), expected="none beside a Config", fix=fix)])
    return Loaded(config)
