"""What the same bits cost, and what they look like: docs/exact.json, of which docs/make_exact.py makes a page and a
picture.

    python benchmarks/exact.py messages steps      # sums over ranks and whole steps, with and without, side by side
    python benchmarks/exact.py curves [--folder DIR]  # 300 steps in five layouts, and over 1, 8, 2 and 4 processes

Whatever is compared runs in turn in the same processes, so that what else the machine does touches both: medians of
seconds, and of steps the medians of the ratios of neighbours, which a machine that slows down for a while changes
least.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import itertools
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.track.metrics import METRICS_FILE, read_lines
from roots_dist.runs.train.step import train_step
from roots_dist.testing.world import on_world
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.tree_sum import start_tree_reduce_scatter, tree_all_reduce

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "exact.json"
SIZES = (1 << 14, 1 << 18, 1 << 20, 1 << 22)
"""Bytes of the tensors that are summed."""
TIMES = 21
STEPS = 11
MODEL = {"layers": 4, "heads": 8, "positions": "rotary", "init_std": 0.05}
MODELS: dict[str, tuple[dict[str, int], dict[str, int]]] = {
    "256 channels, 1,024 tokens": ({"hidden": 256, "vocab": 1024}, {"seq_length": 128}),
    "512 channels, 2,048 tokens": ({"hidden": 512, "vocab": 8192}, {"seq_length": 256}),
}
"""What else model and data are: width, and tokens of a step of 8 texts."""
CASES: dict[str, tuple[Layout, dict[str, int], dict[str, object]]] = {
    "tp 2": (Layout(tp=2), {"tensor": 2, "data": 1}, {}),
    "tp 2, SP": (Layout(tp=2), {"tensor": 2, "data": 1}, {"parallel.sequence_parallel": True}),
    "dp 2, ZeRO 1": (Layout(dp=2), {"tensor": 1, "data": 2}, {"parallel.zero_stage": 1}),
    "tp 2 × dp 2, ZeRO 1": (Layout(tp=2, dp=2), {"tensor": 2, "data": 2}, {"parallel.zero_stage": 1}),
    "one process for T = D = 2": (Layout(), {"tensor": 2, "data": 2}, {}),
    "one process for T = D = 8": (Layout(), {"tensor": 8, "data": 8}, {"train.micro_batch": 1}),
}
"""Layout, degrees and changes; the first ones are those of a production run, where each rank has one shard."""
SMALL = """
configs/quickstart.yaml model.layers=2 model.hidden=64 model.heads=4 data.seq_length=64 optim.decay_steps=300
train.global_batch=8 train.micro_batch=2 train.eval_every=0 train.eval_sequences=16 checkpoint.every=75
'train.exact={tensor: 2, data: 4}' advanced.threads=1 advanced.loss_chunk=1024
track.wandb=disabled parallel.tp=1 parallel.pp=1
"""
"""The quickstart, made small: words of the command."""
CURVES: dict[str, tuple[int, str]] = {
    "one process": (1, ""),
    "pp 2, zb-h1": (2, "parallel.pp=2 parallel.schedule=zb-h1"),
    "dp 4, ZeRO 3": (4, "parallel.zero_stage=3"),
    "pp 2 × dp 4, ZeRO 1": (8, "parallel.pp=2 parallel.zero_stage=1"),
    "tp 2": (2, "parallel.tp=2"),
}
"""Number of processes, and the layout in words of the command."""
GROWING = ("one process", "pp 2 × dp 4, ZeRO 1", "tp 2", "dp 4, ZeRO 3")
"""Layouts of one run, each for a quarter of its steps."""


Clock = Callable[[], float]


def seconds_in_turn(
    ways: Mapping[str, Callable[[], object]], times: int, clocks: Sequence[Clock] = (time.perf_counter,)
) -> list[list[float]]:
    """All seconds that each takes, in turn, by one clock and then by the next; the first time is not counted."""
    found: dict[tuple[Clock, str], list[float]] = {(clock, name): [] for clock in clocks for name in ways}
    for _ in range(times + 1):
        for name, do in ways.items():
            if dist.is_initialized():
                dist.barrier()
            since = [clock() for clock in clocks]
            do()
            for clock, begun in zip(clocks, since):
                found[clock, name].append(clock() - begun)
    return [seconds[1:] for seconds in found.values()]


def median_seconds(ways: Mapping[str, Callable[[], object]], times: int) -> list[float]:
    return [statistics.median(seconds) for seconds in seconds_in_turn(ways, times)]


def reduce_scatter(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """This rank's part of the tree's sum."""
    arriving, work, finish = start_tree_reduce_scatter(x, axis)
    work.wait()
    return finish(arriving)


def sums(rank: int, size: int) -> list[list[float]]:
    """Rows of bytes, and seconds of gloo's sum and of the tree's: all-reduce, reduce-scatter."""
    axis = Axis("tp", size, rank, tuple(range(size)), dist.group.WORLD)
    rows = []
    for nbytes in SIZES:
        x = torch.randn(nbytes // 4)
        part = torch.empty(x.numel() // size)
        ways = {
            "all_reduce": functools.partial(dist.all_reduce, x.clone()),
            "tree_all_reduce": lambda x=x: tree_all_reduce(x, axis),
            "reduce_scatter": functools.partial(dist.reduce_scatter_tensor, part, x),
            "tree_reduce_scatter": lambda x=x: reduce_scatter(x, axis),
        }
        rows.append([float(nbytes), *median_seconds(ways, TIMES)])
    return rows


def whole_steps(rank: int, size: int, of: str, name: str) -> list[float]:
    """Seconds of a step without and with train.exact, and their ratio: those of the clock, and those of this rank's
    processor."""
    (model, data), (layout, degrees, changes) = MODELS[of], CASES[name]
    plain = Config.model_validate(
        {
            "model": MODEL | model,
            "data": data,
            "train": {"global_batch": 8, "micro_batch": 2, "device": "cpu"},
            "parallel": {"tp": layout.tp},
            "advanced": {"threads": 1},
        }
    ).changed(changes)
    mesh = Mesh.connect(layout, rank)
    ways = {}
    for config in (plain, plain.changed({"train.exact": degrees})):
        run = build_run(config, mesh, objective=proof_objective(config))
        batches = random_batches(config, 0, mesh.dp.rank, mesh.dp.size)
        ways[str(config.train.exact)] = functools.partial(train_step, run, batches, 1e-4)
    told, seconds = [], seconds_in_turn(ways, STEPS, (time.perf_counter, time.process_time))
    for pair in (seconds[:2], seconds[2:]):
        ratios = [exact / without for without, exact in zip(*pair)]
        told += [statistics.median(values) for values in (*pair, ratios)]
    return told


def all_steps() -> dict[str, dict[str, list[float]]]:
    """Size of the model -> case -> seconds and ratios, the mean of its ranks."""
    made: dict[str, dict[str, list[float]]] = {of: {} for of in MODELS}
    for of, name in itertools.product(MODELS, CASES):
        ranks = on_world(CASES[name][0].world_size, whole_steps, of, name, timeout=900)
        made[of][name] = [statistics.mean(seconds) for seconds in zip(*ranks)]
        print(of, name, *(round(seconds, 3) for seconds in made[of][name]), flush=True)
    return made


def train(folder: Path, processes: int, words: str, steps: int) -> None:
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {processes} -m roots_dist train"
    whole = [
        sys.executable,
        *shlex.split(f"{launcher} {SMALL} {words}"),
        f"track.folder={folder}",
        f"train.steps={steps}",
    ]
    subprocess.run(whole, cwd=ROOT, check=True)


def curve(folder: Path) -> dict[int, list[str]]:
    """Loss and norm of each step, to the last bit."""
    lines = [line for line in read_lines(folder / METRICS_FILE) if "loss/train" in line]
    return {line["step"]: [float(line["loss/train"]).hex(), float(line["optim/grad_norm"]).hex()] for line in lines}


def curves(folder: Path) -> dict[str, object]:
    for number, name in enumerate(GROWING, 1):
        train(folder / "growing", *CURVES[name], 75 * number)
    for name, (processes, words) in CURVES.items():
        train(folder / name.replace(" ", ""), processes, words, 300)
    found = {name: curve(folder / name.replace(" ", "")) for name in CURVES}
    found["over " + ", ".join(str(CURVES[name][0]) for name in GROWING) + " processes"] = curve(folder / "growing")
    return {
        "digests": {name: hashlib.sha256(json.dumps(of).encode()).hexdigest()[:16] for name, of in found.items()},
        "steps": {name: len(of) for name, of in found.items()},
        "values": {name: [round(float.fromhex(loss), 5) for loss, _ in of.values()] for name, of in found.items()},
        "growing": list(GROWING),
    }


def write(what: str, found: object) -> None:
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[what] = found
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", choices=["messages", "steps", "curves"])
    parser.add_argument("--folder", type=Path, default=Path("runs/exact"))
    args = parser.parse_args()
    if "messages" in args.what:
        write("messages", {str(size): on_world(size, sums, timeout=600)[0] for size in (2, 4)})
    if "steps" in args.what:
        write("steps", all_steps())
    if "curves" in args.what:
        write("curves", curves(args.folder))


if __name__ == "__main__":
    main()
