"""What one rank computes from its config before its first step, as the world grows: seconds, and calls for groups.

    python benchmarks/startup.py [--repeats 2]

One process of one thread is one rank of each world, in the middle of the pipeline, through the code of `roots train`:
the checks before the first process group, the mesh, the model on the meta device (no weights are allocated or drawn),
ties, this rank's program. torch's fake backend makes groups without peers. Not counted: imports, files, weights, and
waiting for other ranks. All rows have 2,048 microbatches and 126 blocks, so that only the world differs, except where
more stages need more blocks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from roots_dist.assembly.passes import inference_program, training_program
from roots_dist.assembly.rank_model import stage_runs
from roots_dist.assembly.run import build_run
from roots_dist.checks import unused
from roots_dist.checks.checks import check_used, layout_for
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.models import pieces_of
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.schedule import program
from roots_dist.world.mesh import Mesh

MICROBATCHES = 2048
LAYERS = 126
LARGEST = Layout(tp=8, pp=64, dp=32)
INTERLEAVED = {"parallel.schedule": "interleaved"}
WORLDS: tuple[tuple[Layout, dict[str, object]], ...] = (
    (Layout(tp=2, pp=2, dp=2), {}),
    (Layout(tp=4, pp=4, dp=4), {}),
    (Layout(tp=8, pp=8, dp=8), {}),
    (Layout(tp=8, pp=16, dp=32), {}),
    (Layout(tp=8, pp=16, dp=128), {}),
    (LARGEST, {}),
    (LARGEST, {"parallel.schedule": "zb-h1"}),
    (LARGEST, {**INTERLEAVED, "parallel.virtual_stages": 2, "model.layers": 128}),
    (LARGEST, {**INTERLEAVED, "parallel.virtual_stages": 8, "model.layers": 1024}),
)


@dataclass
class Start:
    """The start of one rank: CPU seconds of each part, and the number of calls that make groups."""

    seconds: dict[str, float] = field(default_factory=dict)
    group_calls: int = 0

    def time(self, part: str, work: Callable[[], object]) -> None:
        begin = time.process_time()
        work()
        self.seconds[part] = time.process_time() - begin


def config_for(layout: Layout, changes: dict[str, object]) -> Config:
    tree = {
        "model": {"layers": LAYERS, "hidden": 1024, "heads": 16, "vocab": 50304, "positions": "rotary"},
        "data": {"seq_length": 1024},
        "parallel": {"tp": layout.tp, "pp": layout.pp, "sequence_parallel": True, "zero_stage": 1},
        "train": {"global_batch": MICROBATCHES * layout.dp, "micro_batch": 1},
    }
    return Config.model_validate(tree).changed(changes)


def start(config: Config, layout: Layout) -> Start:
    """Start one rank in the middle of the pipeline."""
    found, world, rank = Start(), layout.world_size, layout.rank(layout.pp // 2, layout.dp // 2, layout.tp // 2)
    program._violations.cache_clear()
    found.time(
        "checks", lambda: (unused.check(config), check_used(config, world, rank=rank), layout_for(config, world))
    )
    specs = pieces_of(config, TensorParallel())
    found.time("partition", lambda: stage_runs(config, specs))

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    meshes: list[Mesh] = []
    with mock.patch.object(dist, "new_group", wraps=dist.new_group) as new_group:
        found.time("mesh", lambda: meshes.append(Mesh.connect(layout, rank, torch.device("meta"))))
        found.time("model, ties", lambda: build_run(config, meshes[0], make_engine=lambda *_: None))
    found.group_calls = new_group.call_count
    dist.destroy_process_group()

    pp = layout.place(rank).pp
    found.time("program", lambda: (training_program(config, MICROBATCHES, pp), inference_program(config, 8, pp)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=2, help="starts of each rank, of which the quickest is shown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    start(config_for(*WORLDS[0]), WORLDS[0][0])  # imports on first use
    parts = ("checks", "mesh", "model, ties", "program")
    print(f"| ranks | layout | stages | {' | '.join(parts)} | all, CPU-s | of it partition | group calls |")
    print("|---" * (len(parts) + 6) + "|")
    for layout, changes in WORLDS:
        config = config_for(layout, changes)
        starts = [start(config, layout) for _ in range(args.repeats)]
        best = min(starts, key=lambda s: sum(s.seconds[part] for part in parts))
        total = sum(best.seconds[part] for part in parts)
        words = [f"{best.seconds[part]:.3f}" for part in parts]
        words += [f"**{total:.2f}**", f"{best.seconds['partition']:.3f}", str(best.group_calls)]
        named = f"{layout} {config.parallel.schedule}"
        print(f"| {layout.world_size:,} | {named} | {config.num_stages()} | {' | '.join(words)} |")


if __name__ == "__main__":
    main()
