"""Tokens/s, share of the machine's matmul limit and peak memory, side by side with Hugging Face transformers.

    python benchmarks/compare.py [--rounds 5] [--only transformers,roots] [--layers 8 --hidden 512 ...]

Same architecture (GPT-2), weights, tokens, dtype, AdamW. All contestants are started first; then they take turns, one
training step each, round after round, each idle while another computes. So a machine whose speed drifts is unfair to
none, and ratios are medians over rounds of ratios within a round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from roots_dist.config.schema import Config
from roots_dist.learning.models.flops import flops_per_sample
from roots_dist.schedule.schedules import DEFAULT, expected_bubble

HERE = Path(__file__).resolve().parent
PAIRS = (
    ("roots", "transformers"),
    ("roots", "transformers, fused AdamW"),
    ("roots TP2", "roots"),
    ("roots TP2 SP", "roots"),
    ("roots DP2", "roots"),
    ("roots PP2 1f1b", "roots, 8 microbatches"),
    ("roots PP2 zb-h1", "roots, 8 microbatches"),
)


def contestants(args: argparse.Namespace) -> dict[str, dict]:
    """Name -> job. One process of two threads, or two of one thread: always both cores."""
    base = {
        "model": {"layers": args.layers, "hidden": args.hidden, "heads": args.heads, "vocab": args.vocab},
        "seq": args.seq, "batch": 4, "micro_batch": 4, "recompute": "none", "fused": False,
        "threads": 2, "size": 1, "parallel": {}, "who": "roots",
    }  # fmt: skip
    two = {"threads": 1, "size": 2}
    eight = {"batch": 8, "micro_batch": 1}
    return {
        "matmul": base | {"who": "matmul"},
        "transformers": base | {"who": "transformers"},
        "transformers, fused AdamW": base | {"who": "transformers", "fused": True},
        "roots": base,
        "roots TP2": base | two | {"parallel": {"tp": 2}},
        "roots TP2 SP": base | two | {"parallel": {"tp": 2, "sequence_parallel": True}},
        "roots DP2": base | two | {"parallel": {"zero_stage": 0}, "micro_batch": 2},
        "roots, 8 microbatches": base | eight,
        "roots PP2 1f1b": base | two | eight | {"parallel": {"pp": 2}},
        "roots PP2 zb-h1": base | two | eight | {"parallel": {"pp": 2, "schedule": "zb-h1"}},
    }


class Contestant:
    """The processes of one contestant, alive from beginning to end."""

    def __init__(self, job: dict, store: Path):
        self.job, self.turns = job, []
        self.ranks = [
            subprocess.Popen(
                [sys.executable, HERE / "contestant.py", json.dumps(job | {"rank": rank, "store": str(store)})],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(job["size"])
        ]
        self.first_loss = self._answers()[-1]["first_loss"]

    def _answers(self) -> list[dict]:
        lines = [rank.stdout.readline() for rank in self.ranks]
        if not all(lines):
            sys.exit(f"a rank failed: {json.dumps(self.job)}")
        return [json.loads(line) for line in lines]

    def turn(self) -> None:
        for rank in self.ranks:
            rank.stdin.write("step\n")
            rank.stdin.flush()
        answers = self._answers()
        tokens = self.job["batch"] * self.job["seq"]
        self.turns.append(
            {
                "tokens_per_s": tokens / max(a["seconds"] for a in answers),
                "cpu_per_ktok": sum(a["cpu_seconds"] for a in answers) / tokens * 1000,
                "peak_gib": max(a["peak_gib"] for a in answers),
            }
        )

    def end(self) -> None:
        for rank in self.ranks:
            rank.stdin.close()
        for rank in self.ranks:
            rank.wait(timeout=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in dict(layers=8, hidden=512, heads=8, vocab=8192, seq=512, rounds=5).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--only", help="comma-separated names of contestants")
    args = parser.parse_args()
    jobs = contestants(args)
    if args.only:
        jobs = {name: jobs[name] for name in args.only.split(",")}

    with tempfile.TemporaryDirectory() as folder:
        racing = {name: Contestant(job, Path(folder) / str(i)) for i, (name, job) in enumerate(jobs.items())}
        try:
            check_same(racing)
            for _ in range(args.rounds):
                for contestant in racing.values():
                    contestant.turn()
                print(
                    ", ".join(f"{n} {c.turns[-1]['tokens_per_s']:.0f}" for n, c in racing.items()), "tok/s", flush=True
                )
        finally:
            for contestant in racing.values():
                contestant.end()
    report(args, racing)


def check_same(racing: dict[str, Contestant]) -> None:
    """Those with equal batches must begin with equal losses, else they do not compute the same."""
    for batch in {c.job["batch"] for c in racing.values()}:
        losses = {n: c.first_loss for n, c in racing.items() if c.job["batch"] == batch and c.job["who"] != "matmul"}
        if losses and max(losses.values()) - min(losses.values()) > 1e-4:
            sys.exit(f"the contestants do not compute the same: first losses {losses}")


def report(args: argparse.Namespace, racing: dict[str, Contestant]) -> None:
    def median(name: str, key: str) -> float:
        return statistics.median(turn[key] for turn in racing[name].turns)

    def ratio(a: str, b: str, key: str) -> float:
        return statistics.median(x[key] / y[key] for x, y in zip(racing[a].turns, racing[b].turns))

    config = Config.model_validate(
        {"model": next(iter(racing.values())).job["model"], "data": {"seq_length": args.seq}}
    )
    linear = 6 * (12 * args.layers * args.hidden**2 + args.hidden * args.vocab)
    attention = (
        flops_per_sample(config) / config.data.seq_length / linear
    )  # the limit runs the linear layers' products; attention's count too
    print(f"\n{'':28} tok/s  CPU-s/ktok  peak GiB  of the matmul limit")
    for name in racing:
        share = (
            f"{ratio(name, 'matmul', 'tokens_per_s') * attention:8.2f}"
            if "matmul" in racing and name != "matmul"
            else ""
        )
        print(
            f"{name:28} {median(name, 'tokens_per_s'):5.0f}  {median(name, 'cpu_per_ktok'):10.2f}  "
            f"{median(name, 'peak_gib'):8.2f}  {share}"
        )
    print()
    for a, b in PAIRS:
        if a in racing and b in racing:
            speed = ratio(a, b, "tokens_per_s")
            line = (
                f"{a} / {b}: tokens/s {speed:.2f}, CPU time {ratio(a, b, 'cpu_per_ktok'):.2f}, peak memory "
                f"{ratio(a, b, 'peak_gib'):.2f}"
            )
            parallel = racing[a].job["parallel"]
            if "pp" in parallel:
                bubble = expected_bubble(parallel.get("schedule", DEFAULT), 2, 8) or 0.0
                line += f"; without its bubble of {bubble:.3f}: tokens/s {speed * (1 + bubble):.2f}"
            print(line)


if __name__ == "__main__":
    main()
