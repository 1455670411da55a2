"""The state of a training run besides the step function: its folder, held-out text, trackers, and how far it has
come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import InitVar, dataclass, field
from pathlib import Path

from roots_dist.accounting.bounds import Bounds
from roots_dist.assembly.run import Run
from roots_dist.config.batch_ramp import samples_before
from roots_dist.config.schema import Config
from roots_dist.errors import present
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.tokenizer import Codec
from roots_dist.runs.evaluate.sources import bytes_per_token
from roots_dist.runs.ranks.stop_signal import StopSignal
from roots_dist.runs.track.trackers import Trackers
from roots_dist.runs.train.best_evaluation import BestEvaluation
from roots_dist.runs.train.save_job import BackgroundSave
from roots_dist.runs.train.spikes import Spikes
from roots_dist.storage.checkpoint.format import Author
from roots_dist.storage.checkpoint.host_copies import HostCopies
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh

OnEvaluation = Callable[["TrainState", Mapping[str, float]], None]
"""Called on every rank after an evaluation, with its metrics."""
OnCheckpoint = Callable[["TrainState", Place], None]
"""Called on every rank after a checkpoint is saved, with its folder."""


@dataclass
class Saves:
    """The outcome of the run's saves so far (runs/train/saving.py)."""

    step: int
    """Step of the newest checkpoint."""
    author: Author = field(default_factory=Author)
    """Author in the checkpoint's manifest; on rank 0."""
    verified: set[int] = field(default_factory=set)
    """Steps of the checkpoints whose hashes this process has compared."""
    failures: int = 0
    """Number of saves that have failed since the last that did not."""
    next_try: int = 0
    """Step after which a failed save is tried again; 0 if none is to be."""
    elsewhere: Place | None = None
    """The newest checkpoint, if it is in checkpoint.fallback_folder and not in the run's folder."""
    background: Mesh | None = None
    """Mesh of the threads that save while training goes on; None if training waits."""
    copies: HostCopies = field(default_factory=HostCopies)
    """Memory of what these threads save."""
    under_way: BackgroundSave | None = None
    """The save that goes on in the background, until all ranks have taken note of its end."""
    has_waited: bool = False
    """True if a save has waited for the one before."""

    def succeeded(self, step: int, elsewhere: Place | None = None) -> None:
        self.step, self.failures, self.next_try, self.elsewhere = step, 0, 0, elsewhere
        if elsewhere is None:
            self.verified.add(step)

    def failed(self, step: int, every: int) -> None:
        """Try again twice as many steps later each time, but no later than the next checkpoint is due."""
        wait = 1 << self.failures
        self.failures += 1
        self.next_try = step + (min(wait, every) if every else wait)


@dataclass
class TrainState:
    """State of a training run. Only step, saves, skipped, spikes and best change; the trackers are opened when
    everything else is there, and anew if the run goes back."""

    config: Config
    run: Run
    folder: Path
    training: Batches
    held_out: Batches | None
    tokenizer: Codec | None
    peak_flops: float | None
    """Peak FLOP/s of all devices of the run together; None if unknown."""
    bounds: Bounds
    """Lower bounds of a step's time and a process's memory."""
    trackers: Trackers = field(default_factory=Trackers)
    on_evaluation: tuple[OnEvaluation, ...] = ()
    on_checkpoint: tuple[OnCheckpoint, ...] = ()
    best: BestEvaluation | None = None
    """Best evaluation so far; None if the run neither keeps its best checkpoint nor stops early."""
    step: int = 0
    """Number of steps done."""
    spikes: Spikes = field(default_factory=Spikes)
    """The losses and norms that a step is judged by."""
    skipped: int = 0
    """Number of steps that changed nothing, because a number was not finite or a spike."""
    stop: StopSignal = field(default_factory=StopSignal)
    author: InitVar[Author] = Author()
    background: InitVar[Mesh | None] = None
    saves: Saves = field(init=False)
    bytes_per_token: float | None = field(init=False)

    def __post_init__(self, author: Author, background: Mesh | None) -> None:
        self.bytes_per_token = bytes_per_token(self.config.data.validation)
        self.saves = Saves(self.step, author, {self.step}, background=background)

    @property
    def mesh(self) -> Mesh:
        return self.run.mesh

    @property
    def tokens(self) -> int:
        """Number of tokens read so far."""
        return samples_before(self.config.train, self.step) * self.config.data.seq_length

    def batches_at(self, step: int) -> list[MicroBatch]:
        """This data rank's microbatches of a step (counted from 0)."""
        return self.training.at(step, self.spikes.samples_left_out(step))

    @property
    def should_continue(self) -> bool:
        return self.step < self.config.train.steps and not (self.best and self.best.should_stop)

    def reason_to_stop(self) -> str:
        if self.step < self.config.train.steps:
            return (
                f"stopped after step {self.step}: no better evaluation since step {present(self.best).step}; "
                f"a larger finetune.patience continues the run"
            )
        longer = "train.steps" if self.config.finetune.epochs is None else "finetune.epochs"
        return f"all {self.step} steps are done; a larger {longer} continues the run"
