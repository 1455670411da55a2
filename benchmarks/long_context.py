"""Peak memory of a step on one long sequence: one process, and context ranks.

    python benchmarks/long_context.py [--seq 16384] [--cp 4] [--kind gather]

Each takes one training step of the same tiny Llama in float32, one after the other, every rank as a process of its own
with one thread. A peak is all that a process ever held at once, Python and its libraries (told apart) included.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.train.step import train_step
from roots_dist.world.mesh import Mesh

RETURNING = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""With this glibc gives large tensors back to the system when they are freed, and a peak is one of tensors."""


def config_of(job: dict) -> Config:
    model = dict(
        layers=job["layers"], hidden=job["hidden"], heads=4, ffn=job["ffn"], vocab=1024, positions="rotary",
        norm="rmsnorm", activation="swiglu", bias=False,
    )  # fmt: skip
    parallel = {"cp": job["size"]} | ({"cp_kind": job["kind"]} if job["size"] > 1 else {})
    return Config.model_validate(
        {
            "model": model,
            "data": {"seq_length": job["seq"]},
            "parallel": parallel,
            "train": {"global_batch": 1, "micro_batch": 1},
            "advanced": {"engine": "reference"},
        }
    )


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rank(job: dict) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    config = config_of(job)
    if job["size"] > 1:
        store = dist.FileStore(job["store"], job["size"])
        dist.init_process_group("gloo", store=store, rank=job["rank"], world_size=job["size"])
    mesh = Mesh.connect(Layout(cp=job["size"]), job["rank"])
    run = build_run(config, mesh, objective=proof_objective(config))
    before, start = peak(), time.process_time()
    loss = train_step(run, random_batches(config, 0, 0, 1), 1e-3).loss
    print(json.dumps({"before": before, "peak": peak(), "cpu": time.process_time() - start, "loss": loss}), flush=True)


def ranks(job: dict) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        jobs = [json.dumps(job | {"rank": r, "store": str(Path(folder) / "store")}) for r in range(job["size"])]
        started = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", one], stdout=subprocess.PIPE, text=True, env=RETURNING
            )
            for one in jobs
        ]
        return [json.loads(one.communicate()[0]) for one in started]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    parser.add_argument("--kind", default="gather", choices=["gather", "heads"])
    for name, default in dict(seq=16384, cp=4, layers=4, hidden=128, ffn=2048).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.rank:
        rank(json.loads(args.rank))
        return
    job = {name: getattr(args, name) for name in ("seq", "layers", "hidden", "ffn", "kind")}
    print(
        "| | GiB before the step | peak GiB | of one process | CPU s, longest rank | loss |\n|---|---|---|---|---|---|"
    )
    (alone,) = ranks(job | {"size": 1})
    for name, found in (("one process", [alone]), (f"CP{args.cp}, {args.kind}", ranks(job | {"size": args.cp}))):
        most = max(found, key=lambda one: one["peak"])
        cpu, loss = max(one["cpu"] for one in found), found[0]["loss"]
        print(
            f"| {name} | {most['before']:.2f} | {most['peak']:.2f} | {most['peak'] / alone['peak']:.2f} | {cpu:.0f} "
            f"| {loss:.6f} |"
        )


if __name__ == "__main__":
    main()
