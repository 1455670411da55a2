"""Proofs of one layout: the run, evaluated and logged; then resumed from half-way in one process, and the other way
round; and in bf16 its distance from the truth.

    SmallConfig --trainer_trace.py on real processes, in folders of their own--> Trace --differences--> Proof
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from roots_dist.config.run_config import ONE_PROCESS
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.runs.evaluate.references import REFERENCES
from roots_dist.storage.checkpoint.format import CHECKPOINTS, step_name
from roots_dist.testing.parity import FLOAT64_BOUNDS, Trace, differences, merge
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.verify.choices import Choices
from roots_dist.verify.proof import Proof
from roots_dist.verify.shrink import SmallConfig
from roots_dist.verify.trainer_trace import trace_training

FLOAT32_BOUNDS: Mapping[str, float] = {
    "loss": 1e-5, "norm": 1e-5, "gradient": 1e-5, "weight": 1e-4, "exp_avg": 1e-6, "exp_avg_sq": 1e-8,
}  # fmt: skip
"""Bounds for float32 through DeepSpeed: sums are rounded in another order, and Adam amplifies it (a weight moves by up
to lr per step whatever its gradient's size, so tiny gradients turn rounding into steps)."""
TIMEOUT_S = 300


@dataclass(frozen=True)
class Place:
    """A folder in which small runs happen."""

    folder: Path

    def run(self, config: Config, ranks: int, name: str) -> Trace:
        """Train in the folder of this name, from where it stands to the end."""
        return merge(self.traces(config, ranks, name))

    def traces(self, config: Config, ranks: int, name: str, choices: Choices | None = None) -> list[dict[str, Any]]:
        """The same, as each rank has seen it. choices: as in trace_training."""
        return self.on_ranks(trace_training, config, ranks, name, choices)

    def on_ranks(
        self, trace: Callable[..., dict[str, Any]], config: Config, ranks: int, name: str, *others: object
    ) -> list[dict[str, Any]]:
        """Run trace(rank, size, config, *others) on each rank, in the folder of this name."""
        config = config.changed({"track.folder": str(self.folder / name)})
        device = config.train.device
        if device == "cpu" and config.advanced.engine == "reference":
            return on_warm_world(ranks, trace, config, *others, timeout=TIMEOUT_S)
        return on_world(ranks, trace, config, *others, timeout=TIMEOUT_S, device=device)

    def hand_over(self, name: str, step: int, to: str) -> None:
        """Give a new run the checkpoint that another one saved after this step, and its references (dpo)."""
        saved, new = (self.folder / n / CHECKPOINTS / step_name(step) for n in (name, to))
        shutil.copytree(saved, new)
        if (references := self.folder / name / REFERENCES).is_file():
            shutil.copyfile(references, self.folder / to / REFERENCES)


def describe(small: SmallConfig) -> str:
    p = small.config.parallel
    layout = Layout(small.dp, p.pp, p.tp, p.cp, p.ep, p.zero_ranks)
    parts = [str(layout)]
    parts += ["SP"] if p.sequence_parallel else []
    parts += [p.schedule if p.virtual_stages == 1 else f"{p.schedule} × {p.virtual_stages} chunks"] if p.pp > 1 else []
    parts += [f"ZeRO-{p.zero_stage}"] if layout.dp_cp > 1 else []
    parts += [f"over {layout.shard} of {layout.dp_cp}"] if layout.replica > 1 else []
    return " ".join(parts)


def in_one_process(config: Config, *, micro_batch: int = 1) -> Config:
    """The config for one process and the reference engine, one sequence at a time: nothing of the layout is left."""
    return config.changed(
        {**ONE_PROCESS, "train.micro_batch": micro_batch, "train.recompute": "none", "train.compile": False}
    )


def prove(small: SmallConfig) -> Iterator[Proof]:
    """Compare the layout's run with that of one process; then each of them resumed by the other from half-way."""
    with tempfile.TemporaryDirectory(prefix="roots-verify-") as folder:
        place = Place(Path(folder))
        config = started(small, place)
        alone = in_one_process(config)
        float64 = config.advanced.float64
        bounds = FLOAT64_BOUNDS if float64 else FLOAT32_BOUNDS
        title = f"{describe(small)}, {'float64' if float64 else 'float32'}"
        truth = place.run(alone, 1, "alone")
        found = place.run(config, small.ranks, "layout")
        yield Proof(title, small.notes, tuple(differences(truth, found, bounds)))
        if small.ranks == 1:
            return
        half = config.checkpoint.every
        rest = truth.after(half)
        for words, saved, resumed, ranks in resumes(alone, config, small.ranks):
            place.hand_over(saved, half, f"after-{saved}")
            found = place.run(resumed, ranks, f"after-{saved}")
            yield Proof(f"{title}, {words} after step {half}", (), tuple(differences(rest, found, bounds)))


def resumes(alone: Config, config: Config, ranks: int) -> Iterator[tuple[str, str, Config, int]]:
    """A run of one process and that of a layout, each resumed by the other: the title in words, the folder of the run
    that is resumed, and by what on how many ranks."""
    yield "saved in this layout, resumed in one process", "layout", alone, 1
    yield "saved by one process, resumed in this layout", "alone", config, ranks


def started(small: SmallConfig, place: Place) -> Config:
    """The small config, after the model that it starts from has been trained, if it starts from one."""
    if small.source is None:
        return small.config
    place.run(in_one_process(small.source), 1, "start")
    return small.config.changed({"finetune.init_from": str(place.folder / "start")})
