"""Tokens/s, share of the machine's matmul limit, MFU and peak memory, side by side with Hugging Face transformers.

    python benchmarks/compare.py [--rounds 3] [--steps 4] [--only single,tp2] [--layers 8 --hidden 512 ...]

Same architecture (GPT-2), weights, tokens, dtype, AdamW. Contestants take turns, round after round, each in fresh
processes, so that a machine whose speed drifts is unfair to none; ratios are medians over rounds of ratios within a round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from roots_dist.config.schema import Config
from roots_dist.pipeline.check import Times, expected_bubble
from roots_dist.plan.flops import flops_per_step

HERE = Path(__file__).resolve().parent


def contestants(args: argparse.Namespace) -> dict[str, dict]:
    """Name -> job. `whole` batches are computed at once; the last three compare two processes of one thread with one of two."""
    base = {
        "model": {"layers": args.layers, "hidden": args.hidden, "heads": args.heads, "vocab": args.vocab},
        "seq": args.seq, "batch": args.batch, "micro_batch": args.micro_batch, "recompute": "none", "fused": False,
        "threads": 2, "size": 1, "parallel": {}, "steps": args.steps, "who": "roots",
    }  # fmt: skip
    two = {"threads": 1, "size": 2}
    per_rank = max(1, args.micro_batch // 2)
    return {
        "matmul": base | {"who": "matmul"},
        "transformers": base | {"who": "transformers"},
        "transformers, fused AdamW": base | {"who": "transformers", "fused": True},
        "roots": base,
        "roots TP2": base | two | {"parallel": {"tp": 2}},
        "roots TP2 SP": base | two | {"parallel": {"tp": 2, "sequence": True}},
        "roots DP2": base | two | {"parallel": {"zero": 0}, "micro_batch": per_rank},
        "roots, 8 microbatches": base | {"micro_batch": max(1, args.batch // 8)},
        "roots PP2, 8 microbatches": base | two | {"parallel": {"pp": 2}, "micro_batch": max(1, args.batch // 8)},
        "roots PP2 zb-h1, 8 microbatches": base | two | {"parallel": {"pp": 2, "schedule": "zb-h1"}, "micro_batch": max(1, args.batch // 8)},
    }


def race(job: dict) -> dict:
    """Run one contestant's processes. The slowest rank's time, the largest rank's memory, all ranks' CPU time."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank in range(job["size"]):
            mine = job | {"rank": rank, "store": f"{folder}/store", "result": f"{folder}/{rank}.json"}
            ranks.append(subprocess.Popen([sys.executable, HERE / "contestant.py", json.dumps(mine)]))
        if any(process.wait() for process in ranks):
            sys.exit(f"a rank failed: {json.dumps(job)}")
        found = [json.loads(Path(f"{folder}/{rank}.json").read_text()) for rank in range(job["size"])]
    seconds = statistics.median(max(rank["seconds"][i] for rank in found) for i in range(job["steps"]))
    tokens = job["batch"] * job["seq"]
    return {
        "tokens_per_s": tokens / seconds,
        "cpu_per_ktok": sum(r["cpu_seconds"] for r in found) / tokens * 1000,
        "peak_gib": max(r["peak_gib"] for r in found),
        "first_loss": found[-1]["first_loss"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = dict(layers=8, hidden=512, heads=8, vocab=8192, seq=512, batch=8, micro_batch=4, rounds=3, steps=3)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--only", help="comma-separated parts of contestants' names")
    args = parser.parse_args()
    jobs = contestants(args)
    if args.only:
        wanted = args.only.split(",")
        jobs = {name: job for name, job in jobs.items() if any(part in name for part in wanted)}

    rounds: list[dict[str, dict]] = []
    for number in range(args.rounds):
        rounds.append({name: race(job) for name, job in jobs.items()})
        print(f"round {number + 1}: " + ", ".join(f"{n} {r['tokens_per_s']:.0f} tok/s" for n, r in rounds[-1].items()), flush=True)

    losses = {round(r["first_loss"], 3) for name, r in rounds[0].items() if name != "matmul"}
    if len(losses) != 1:
        sys.exit(f"the contestants do not compute the same: first losses {losses}")
    report(jobs, rounds)


def report(jobs: dict[str, dict], rounds: list[dict[str, dict]]) -> None:
    def median(name: str, key: str) -> float:
        return statistics.median(r[name][key] for r in rounds)

    def ratio(a: str, b: str, key: str) -> float:
        return statistics.median(r[a][key] / r[b][key] for r in rounds)

    any_job = next(iter(jobs.values()))
    config = Config.model_validate({"model": any_job["model"], "data": {"seq": any_job["seq"]}, "train": {"batch": any_job["batch"]}})
    model_flops = flops_per_step(config) / (any_job["batch"] * any_job["seq"])
    products = 6 * (12 * config.model.layers * config.model.hidden**2 + config.model.hidden * config.model.vocab)
    print(f"\n{'':34} tok/s  CPU-s/ktok  peak GiB  of matmul limit")
    for name in jobs:
        share = ""
        if "matmul" in jobs and name != "matmul":
            # the limit is of the linear layers' products; attention's are model FLOPs too
            share = f"{ratio(name, 'matmul', 'tokens_per_s') * model_flops / products:8.2f}"
        print(f"{name:34} {median(name, 'tokens_per_s'):5.0f}  {median(name, 'cpu_per_ktok'):10.2f}  {median(name, 'peak_gib'):8.2f}  {share}")
    print()
    pairs = [
        ("roots", "transformers"), ("roots", "transformers, fused AdamW"), ("roots TP2", "roots"), ("roots TP2 SP", "roots"),
        ("roots DP2", "roots"), ("roots PP2, 8 microbatches", "roots, 8 microbatches"),
        ("roots PP2 zb-h1, 8 microbatches", "roots, 8 microbatches"),
    ]  # fmt: skip
    for a, b in pairs:
        if a in jobs and b in jobs:
            line = f"{a} / {b}: tokens/s {ratio(a, b, 'tokens_per_s'):.2f}, peak memory {ratio(a, b, 'peak_gib'):.2f}"
            if jobs[a]["parallel"].get("pp"):
                schedule = jobs[a]["parallel"].get("schedule", "1f1b")
                bubble = expected_bubble(schedule, 2, 8, times=Times())
                line += f"; without the bubble of {bubble:.3f}: {ratio(a, b, 'tokens_per_s') * (1 + bubble):.2f}"
            print(line)


if __name__ == "__main__":
    main()
