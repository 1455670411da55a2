"""Context parallelism beside picotron's ring attention: tokens/s, peak memory, and how far gradients are from float64.

    git clone https://github.com/huggingface/picotron
    python benchmarks/ring.py picotron [--seq 2048] [--rounds 5]

The same Llama, weights and tokens on two processes with one thread each, in float32, with torch's fused AdamW. All
contestants are started first and take turns, one training step each; ratios are medians over rounds. picotron has its
ring of key/value blocks over contiguous halves, and its own reduction of gradients; flash-attn, which it imports and
does not call on a CPU, is replaced by an empty module.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import torch.distributed as dist

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective
from roots_dist.runs.train.step import train_step
from roots_dist.testing.parity import recording_engine
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh

OURS, THEIRS = {"gather": "ours, gather", "heads": "ours, heads"}, "picotron, ring"
LINEARS = {
    "attention.query": "attention.q_proj",
    "attention.key": "attention.k_proj",
    "attention.value": "attention.v_proj",
    "attention.out": "attention.out_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
"""Our name in a block -> picotron's."""


def config_of(job: dict, **changes: object) -> Config:
    model = dict(
        layers=job["layers"], hidden=job["hidden"], heads=job["heads"], kv_heads=job["heads"], ffn=job["ffn"],
        vocab=job["vocab"], positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tied_embeddings=False,
    )  # fmt: skip
    made = Config.model_validate(
        {
            "model": model,
            "data": {"seq_length": job["seq"]},
            "train": {"global_batch": job["batch"], "micro_batch": job["batch"], "steps": 1000},
            "optim": {"lr": 1e-4, "lr_schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
            "advanced": {"engine": "reference", "norm_eps": 1e-5},
        }
    )
    return made.changed({key.replace("__", "."): value for key, value in changes.items()})


def tokens_of(job: dict, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    drawn = torch.randint(job["vocab"], (job["batch"], job["seq"] + 1), generator=draw)
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def ours(job: dict):
    """A step, which returns the loss, and the gradients of the last one by name, summed over ranks."""
    config = config_of(job, **job["config"])
    recorded: list = []
    mesh = Mesh.connect(Layout(cp=job["size"]), job["rank"])
    run = build_run(config, mesh, recording_engine(recorded), proof_objective(config))
    if job["weights"]:  # the same, to the bit of float32
        drawn = torch.load(job["weights"], weights_only=True)
        with torch.no_grad():
            for p in run.params:
                p.tensor.copy_(drawn[p.name])

    def step(number: int) -> float:
        tokens, targets = tokens_of(job, number)
        samples = torch.arange(job["batch"])
        del recorded[0].gradients[:]
        batch = MicroBatch(tokens=tokens, targets=targets, sample_ids=samples, step=number)
        return train_step(run, [batch], 1e-4).loss

    def gradients() -> dict[str, torch.Tensor]:
        return {name: mesh.dp_cp.sum_(grad.clone()) for name, grad in recorded[0].gradients[0].items()}

    return step, gradients


def theirs(job: dict):
    """The same of picotron."""
    os.environ |= {
        "FLASH_ATTEN": "0", "DTYPE": "float32", "DEVICE": "cpu", "LOCAL_RANK": str(job["rank"]),
        "CONTEXT_PARALLEL": "1",
    }  # fmt: skip
    names = ("flash_attn_interface", "layers", "layers.rotary", "ops", "ops.triton", "ops.triton.layer_norm")
    for name in ("flash_attn", *(f"flash_attn.{name}" for name in names)):
        module = ModuleType(name)
        module.flash_attn_func = module.apply_rotary_emb = module.layer_norm_fn = None
        sys.modules[name] = module
    sys.path.insert(0, job["picotron"])
    torch.cuda.synchronize = lambda: None
    import picotron.process_group_manager as pgm
    from picotron.data_parallel.data_parallel import DataParallelBucket
    from picotron.model import Llama

    pgm.setup_process_group_manager(tp_size=1, cp_size=job["size"], pp_size=1, dp_size=1)
    config = SimpleNamespace(
        hidden_size=job["hidden"], num_attention_heads=job["heads"], num_key_value_heads=job["heads"],
        rms_norm_eps=1e-5, max_position_embeddings=job["seq"], rope_theta=10000.0, vocab_size=job["vocab"],
        num_hidden_layers=job["layers"], intermediate_size=job["ffn"],
    )  # fmt: skip
    model = Llama(config)
    named = dict(model.named_parameters())
    known = {"embed.tokens": "embedding", "head.norm": "final_norm", "head": "final_proj"}
    for i in range(job["layers"]):
        known |= {f"blocks.{i}.{mine}": f"decoder_layers.{i}.{other}" for mine, other in LINEARS.items()}
    pairs = {f"{mine}.weight": named[f"{other}.weight"] for mine, other in known.items()}
    assert len(pairs) == len(named)
    drawn = torch.load(job["weights"], weights_only=True)
    with torch.no_grad():
        for name, p in pairs.items():
            p.copy_(drawn[name])
    wrapped = DataParallelBucket(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    mine = slice(job["rank"] * job["seq"] // job["size"], (job["rank"] + 1) * job["seq"] // job["size"])

    def step(number: int) -> float:
        tokens, targets = (t[:, mine].contiguous() for t in tokens_of(job, number))
        logits = wrapped(input_ids=tokens)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        step.gradients = {name: p.grad.clone() for name, p in pairs.items()} if number == 0 else {}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        wrapped.reset()
        total = loss.detach()
        dist.all_reduce(total)
        return float(total) / job["size"]

    return step, lambda: step.gradients


def rank(job: dict) -> None:
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(1)
    if job["size"] > 1:
        store = dist.FileStore(job["store"], job["size"])
        dist.init_process_group("gloo", store=store, rank=job["rank"], world_size=job["size"])
    step, gradients = theirs(job) if "picotron" in job else ours(job)
    loss = step(0)
    found = gradients()
    if job["rank"] == 0:
        torch.save({name: grad.double() for name, grad in found.items()}, job["gradients"])
    print(json.dumps({"loss": loss}), flush=True)
    for number, _ in enumerate(sys.stdin, 1):
        start, cpu = time.perf_counter(), time.process_time()
        step(number)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        spent = {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu, "gib": peak}
        print(json.dumps(spent), flush=True)


class Contestant:
    def __init__(self, job: dict, folder: Path):
        folder.mkdir()
        job |= {"store": str(folder / "store"), "gradients": str(folder / "gradients.pt")}
        self.job, self.turns = job, []
        self.ranks = [
            subprocess.Popen(
                [sys.executable, __file__, "--rank", json.dumps(job | {"rank": r})],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for r in range(job["size"])
        ]  # fmt: skip
        self.loss = self._answers()[0]["loss"]

    def _answers(self) -> list[dict]:
        lines = [rank.stdout.readline() for rank in self.ranks]
        if not all(lines):
            sys.exit(f"a rank failed: {json.dumps(self.job)}")
        return [json.loads(line) for line in lines]

    def turn(self) -> None:
        for one in self.ranks:
            one.stdin.write("step\n")
            one.stdin.flush()
        answers = self._answers()
        tokens = self.job["batch"] * self.job["seq"]
        self.turns.append(
            {
                "tokens": tokens / max(a["seconds"] for a in answers),
                "cpu": sum(a["cpu"] for a in answers) / tokens * 1000,
                "gib": max(a["gib"] for a in answers),
            }
        )

    def end(self) -> None:
        for one in self.ranks:
            one.stdin.close()
        for one in self.ranks:
            one.wait(timeout=60)


def far(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest relative error of a parameter's gradient."""
    return max(float((found[name] - exact).norm() / exact.norm()) for name, exact in truth.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picotron", nargs="?", help="folder of a checkout")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    sizes = dict(layers=4, hidden=256, heads=4, ffn=768, vocab=4096, seq=2048, batch=1, size=2, rounds=5)
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.rank:
        rank(json.loads(args.rank))
        return
    job = {name: getattr(args, name) for name in sizes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = config_of(job)
        run = build_run(alone, Mesh.single(), objective=proof_objective(alone))
        weights = str(folder / "weights.pt")
        torch.save({p.name: p.tensor.detach().clone() for p in run.params}, weights)
        job |= {"weights": weights, "config": {}}
        exact = {"advanced__float64": True}
        truth = Contestant(job | {"size": 1, "config": exact}, folder / "truth")
        truth.end()
        jobs = {OURS["gather"]: {"config": {"parallel__cp": args.size}}}
        jobs[OURS["heads"]] = {"config": {"parallel__cp": args.size, "parallel__cp_kind": "heads"}}
        jobs[THEIRS] = {"picotron": str(Path(args.picotron).resolve())}
        racing = {name: Contestant(job | own, folder / str(i)) for i, (name, own) in enumerate(jobs.items())}
        try:
            for _ in range(args.rounds):
                for contestant in racing.values():
                    contestant.turn()
        finally:
            for contestant in racing.values():
                contestant.end()
        exact_gradients = torch.load(truth.job["gradients"], weights_only=True)
        print(
            "| | tokens/s | to picotron's | CPU s for 1,000 tokens | peak GiB of a process | gradients' error | loss |"
        )
        print("|---|---|---|---|---|---|---|")
        for name, contestant in racing.items():
            middle = {
                key: statistics.median(turn[key] for turn in contestant.turns) for key in ("tokens", "cpu", "gib")
            }
            pairs = zip(contestant.turns, racing[THEIRS].turns)
            ratio = statistics.median(mine["tokens"] / other["tokens"] for mine, other in pairs)
            error = far(torch.load(contestant.job["gradients"], weights_only=True), exact_gradients)
            print(
                f"| {name} | {middle['tokens']:.0f} | {ratio:.2f} | {middle['cpu']:.2f} | {middle['gib']:.2f} "
                f"| {error:.1e} | {contestant.loss - truth.loss:+.1e} |"
            )


if __name__ == "__main__":
    main()
