"""Tokens/s, share of the machine's matmul limit and peak memory, side by side with Hugging Face transformers.

    python benchmarks/compare.py --family gpt|llama|bert|t5 [--rounds 5] [--only "roots;matmul"] [--set KEY=VALUE …]

Same architecture, weights, tokens, dtype, dropout, fused AdamW. The contestants of a group (one process, two
processes, microbatches of one sequence) are started first; then they take turns, one training step each, round after
round, each idle while another computes. So a machine whose speed drifts is unfair to none, and ratios are medians over
rounds of ratios within a round. A group holds up to 15 GB.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

from roots_dist.config.schema import Config
from roots_dist.learning.models.flops import flops_per_sample
from roots_dist.schedule.schedules import DEFAULT, expected_bubble

HERE = Path(__file__).resolve().parent
EIGHT, WHOLE = "roots, 8 microbatches of 1", "roots, 1 microbatch of 8"
PAIRS = (
    ("roots", "transformers"),
    ("roots compiled", "transformers"),
    ("roots compiled", "roots"),
    ("roots TP2", "roots"),
    ("roots TP2 SP", "roots"),
    ("roots DP2", "roots"),
    ("roots DP2 ZeRO-1", "roots"),
    ("roots DP2 ZeRO-2", "roots"),
    ("roots DP2 ZeRO-3", "roots"),
    (EIGHT, WHOLE),
    ("roots PP2 1f1b", EIGHT),
    ("roots PP2 zb-h1", EIGHT),
)
GROUPS = (
    ("matmul", "transformers", "roots", "roots compiled"),
    ("roots", "roots TP2", "roots TP2 SP", "roots DP2", "roots DP2 ZeRO-1", "roots DP2 ZeRO-2", "roots DP2 ZeRO-3"),
    (WHOLE, EIGHT, "roots PP2 1f1b", "roots PP2 zb-h1"),
)
SIZES = {"model.layers": 8, "model.hidden": 512, "model.heads": 8, "model.vocab": 8192, "data.seq_length": 512}
DROPPED = {"model.dropout": 0.1, "model.attention_dropout": 0.1}
FAMILIES = {
    "gpt": {},
    "llama": {
        "model.ffn": 1536,
        "model.positions": "rotary",
        "model.norm": "rmsnorm",
        "model.activation": "swiglu",
        "model.bias": False,
        "model.tied_embeddings": False,
    },
    "bert": {
        "model.family": "bert",
        "model.segments": 2,
        "model.norm_position": "post",
        "model.embedding_norm": True,
        "model.activation": "gelu",
        "objective.name": "mlm",
        "advanced.norm_eps": 1e-12,
        **DROPPED,
    },
    "t5": {
        "model.family": "t5",
        "model.layers": 6,
        "model.ffn": 2048,
        "model.positions": "relative",
        "model.norm": "rmsnorm",
        "model.activation": "relu",
        "model.bias": False,
        "objective.name": "spans",
        "data.seq_length": 130,
        **DROPPED,
    },
}
"""What a family's config has besides SIZES. Samples of T5 are shorter, since a corpus without a tokenizer has few
sentinels, and four times as many: 130, because two tensor ranks share the 30 targets that they have then."""
TOKENS = 2048
"""Tokens of a step, or twice as many where it has eight microbatches."""


def contestants(config: dict[str, object]) -> dict[str, dict]:
    """Name -> job. One process of two threads, or two of one thread: always both cores."""
    few = round(TOKENS / int(config["data.seq_length"]))
    batch = {"train.global_batch": few, "train.micro_batch": few}
    eight = {"train.global_batch": 2 * few, "train.micro_batch": few // 4}

    def job(changes: dict[str, object] | None = None, who: str = "roots", size: int = 1) -> dict:
        return {"who": who, "config": config | batch | (changes or {}), "size": size, "threads": 2 // size}

    def two(changes: dict[str, object]) -> dict:
        return job(changes, size=2)

    def zero(stage: int) -> dict:
        return two({"parallel.zero_stage": stage, "train.micro_batch": few // 2})

    return {
        "matmul": job(who="matmul"),
        "transformers": job(who="transformers"),
        "roots": job(),
        "roots compiled": job({"train.compile": True}),
        "roots TP2": two({"parallel.tp": 2}),
        "roots TP2 SP": two({"parallel.tp": 2, "parallel.sequence_parallel": True}),
        "roots DP2": zero(0),
        "roots DP2 ZeRO-1": zero(1),
        "roots DP2 ZeRO-2": zero(2),
        "roots DP2 ZeRO-3": zero(3),
        WHOLE: job({"train.global_batch": 2 * few, "train.micro_batch": 2 * few}),
        EIGHT: job(eight),
        "roots PP2 1f1b": two(eight | {"parallel.pp": 2}),
        "roots PP2 zb-h1": two(eight | {"parallel.pp": 2, "parallel.schedule": "zb-h1"}),
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
        self.first = self._answers()[0]

    def _answers(self) -> list[dict]:
        lines = [rank.stdout.readline() for rank in self.ranks]
        if not all(lines):
            sys.exit(f"a rank failed: {json.dumps(self.job)}")
        return [json.loads(line) for line in lines]

    @property
    def tokens(self) -> int:
        return self.job["config"]["train.global_batch"] * self.job["config"]["data.seq_length"]

    def turn(self) -> None:
        if ended := [rank.poll() for rank in self.ranks if rank.poll() is not None]:
            sys.exit(f"a rank has ended with {ended[0]}, of: {json.dumps(self.job)}")
        for rank in self.ranks:
            rank.stdin.write("step\n")
            rank.stdin.flush()
        answers = self._answers()
        self.turns.append(
            {
                "tokens_per_s": self.tokens / max(a["seconds"] for a in answers),
                "cpu_per_ktok": sum(a["cpu_seconds"] for a in answers) / self.tokens * 1000,
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
    parser.add_argument("--family", choices=FAMILIES, default="gpt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", help="names of contestants, separated by ;")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other sizes, as model.layers=2")
    args = parser.parse_args()
    said = {key: yaml.safe_load(value) for key, _, value in (word.partition("=") for word in args.set)}
    config = SIZES | FAMILIES[args.family] | said
    jobs = contestants(config)
    for group in (args.only.split(";"),) if args.only else GROUPS:
        race(Config().changed(config), {name: jobs[name] for name in group}, args.rounds)


def race(config: Config, jobs: dict[str, dict], rounds: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        racing = {}
        try:
            for i, (name, job) in enumerate(jobs.items()):
                racing[name] = Contestant(job, Path(folder) / str(i))
            check_same(racing)
            for _ in range(rounds):
                for contestant in racing.values():
                    contestant.turn()
                print(
                    ", ".join(f"{n} {c.turns[-1]['tokens_per_s']:.0f}" for n, c in racing.items()), "tok/s", flush=True
                )
        finally:
            for contestant in racing.values():
                contestant.end()
    report(config, racing)


def check_same(racing: dict[str, Contestant]) -> None:
    """Stop unless contestants with equal batches have equal losses without dropout: they must compute the same."""
    for tokens in {c.tokens for c in racing.values()}:
        losses = {n: c.first["loss"] for n, c in racing.items() if c.tokens == tokens and "loss" in c.first}
        if losses and max(losses.values()) - min(losses.values()) > 1e-4:
            sys.exit(f"the contestants do not compute the same: losses {losses}")


def report(config: Config, racing: dict[str, Contestant]) -> None:
    def median(name: str, key: str) -> float:
        return statistics.median(turn[key] for turn in racing[name].turns)

    def ratio(a: str, b: str, key: str) -> float:
        return statistics.median(x[key] / y[key] for x, y in zip(racing[a].turns, racing[b].turns))

    print(f"\n{'':28} tok/s  CPU-s/ktok  peak GiB  of the matmul limit")
    for name in racing:
        share = ""
        if "matmul" in racing and name != "matmul":
            limit = racing["matmul"]  # runs the products of linear layers; those of attention count too
            attention = flops_per_sample(config) * limit.job["config"]["train.global_batch"] / limit.first["flops"]
            share = f"{ratio(name, 'matmul', 'tokens_per_s') * attention:8.2f}"
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
            made = racing[a].job["config"]
            if "parallel.pp" in made:
                bubble = expected_bubble(made.get("parallel.schedule", DEFAULT), 2, 8) or 0.0
                line += f"; without its bubble of {bubble:.3f}: tokens/s {speed * (1 + bubble):.2f}"
            print(line)


if __name__ == "__main__":
    main()
