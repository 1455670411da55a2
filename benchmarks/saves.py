"""For how long does a checkpoint stop training? The same saves in turn, waited for and in the background.

    python benchmarks/saves.py [--repeat 7] [--layers 8] [--hidden 512] [--folder DIR] [--json FILE]

One process on this machine's CPU and the disk of DIR; medians, side by side, so that what else the machine does touches
both. Besides: what reading back costs, how much slower a step is while a save is under way, and the memory of the copy
beside the planned one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from roots_dist.accounting.memory import save_copy_bytes
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.data.store import Writer
from roots_dist.runs.train.loop import open_run, take_step
from roots_dist.runs.train.saving import checkpoint, settle
from roots_dist.runs.train.state import TrainState
from roots_dist.storage.checkpoint.format import checkpoints_folder, step_name
from roots_dist.storage.checkpoint.verified import damage_of
from roots_dist.world.mesh import Mesh

MIB = 2**20


def config_of(folder: Path, layers: int, hidden: int) -> Config:
    text = folder / "text"
    with Writer(text, np.dtype("<u2")) as writer:
        writer.add(np.random.default_rng(0).integers(0, 512, 20_000).astype("<u2"))
        writer.commit()
    tree = {
        "model": {"layers": layers, "hidden": hidden, "heads": 8, "vocab": 512},
        "data": {"train": str(text), "seq_length": 64},
        "train": {"steps": 10_000, "global_batch": 2, "micro_batch": 2, "device": "cpu"},
        "checkpoint": {"every": 1},
        "advanced": {"check_copies_every": 0},
        "track": {"folder": str(folder / "run"), "wandb": "disabled", "tensorboard": "off"},
    }
    return Config.model_validate(tree)


def seconds(work: Callable[[], object]) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


def measure(state: TrainState, repeat: int) -> dict[str, float]:
    background, mesh = state.saves.background, state.mesh
    found: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        found.setdefault(name, []).append(value)

    def step() -> float:
        return seconds(lambda: take_step(state, state.batches_at, 1e-4))

    for _ in range(2):
        step()
    for _ in range(repeat):
        note("step", step())
        state.saves.background = None
        note("save, waited for", seconds(lambda: checkpoint(state)))
        path = checkpoints_folder(state.folder) / step_name(state.step)
        note("of it reading back", seconds(lambda path=path: damage_of(path, state.step, "", mesh)))
        step()
        state.saves.background = background
        note("stop of a save in the background", seconds(lambda: checkpoint(state)))
        under_way = state.saves.under_way
        assert under_way is not None
        note("copy, bytes", sum(t.nbytes for shard in under_way.job.shards for t in shard.tensors.values()))
        while not under_way.is_over:
            took = step()
            if not under_way.is_over:
                note("step while a save is under way", took)
        note("save in the background", under_way.seconds)
        settle(state)
    return {name: statistics.median(values) for name, values in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        config = config_of(Path(folder), asked.layers, asked.hidden)
        (Path(folder) / "run").mkdir()
        state = open_run(Path(folder) / "run", config, Mesh.single())
        numbers = sum(p.tensor.numel() for p in state.run.params)
        found = measure(state, asked.repeat)
    planned = save_copy_bytes(config, Layout(), numbers, numbers)
    print(f"{numbers:,} parameters, checkpoints of {planned / MIB:.0f} MiB; medians of {asked.repeat}")
    for name, value in found.items():
        print(f"{name:36}" + (f"{value / MIB:10.0f} MiB" if name.endswith("bytes") else f"{value * 1000:10.1f} ms"))
    print(f"{'planned for the copy':36}{planned / MIB:10.0f} MiB")
    share = found["stop of a save in the background"] / found["save, waited for"]
    print(f"training stops for {share:.1%} of a save that is waited for")
    if asked.json is not None:
        asked.json.write_text(json.dumps({"parameters": numbers, "planned": planned, "stop_share": share, **found}))


if __name__ == "__main__":
    main()
