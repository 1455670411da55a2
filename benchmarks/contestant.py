"""One rank of one contestant of compare.py: takes a training step for each line on stdin, and answers with a line of
JSON.

    python benchmarks/contestant.py '{"who": "roots", "rank": 0, "size": 1, ...}'

A process of its own, so that peak memory is this contestant's alone; and idle between its steps, so that contestants
can take turns step by step on a machine whose speed drifts.
"""

import json
import resource
import sys
import time
import warnings

import torch
import torch.distributed as dist


def config_for(job: dict):
    from roots_dist.config.schema import Config

    return Config.model_validate(
        {
            "model": job["model"],
            "data": {"seq_length": job["seq"]},
            "parallel": job["parallel"],
            "train": {
                "global_batch": job["batch"],
                "micro_batch": job["micro_batch"],
                "steps": 1000,
                "recompute": job["recompute"],
            },
            "optim": {"lr": 1e-4, "clip_grad": 1.0, "lr_schedule": "constant"},
        }
    )


def roots(job: dict):
    """One optimizer step as a function of its number, which returns the loss."""
    from roots_dist.assembly.run import build_run
    from roots_dist.layout import Layout
    from roots_dist.learning.objectives.synthetic import random_batches
    from roots_dist.runs.train.step import train_step
    from roots_dist.world.mesh import Mesh

    config = config_for(job)
    p = config.parallel
    mesh = Mesh.connect(Layout(job["size"] // (p.tp * p.pp), p.pp, p.tp), job["rank"])
    run = build_run(config, mesh)
    return lambda step: train_step(run, random_batches(config, step, mesh.dp.rank, mesh.dp.size), 1e-4).loss


def transformers(job: dict):
    """The loop that a user would write: GPT2LMHeadModel, its own loss, clip_grad_norm_, torch's AdamW."""
    import transformers as hf

    from roots_dist.learning.objectives.synthetic import random_batches

    config = config_for(job)
    m = config.model
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(
            vocab_size=config.padded_vocab(),
            n_positions=job["seq"],
            n_embd=m.hidden,
            n_layer=m.layers,
            n_head=m.heads,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            use_cache=False,
        )
    )
    fill_with_our_weights(model, config)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=1e-4,
        betas=(0.9, 0.95),
        fused=job["fused"],
    )

    def step(number: int) -> float:
        batches = random_batches(config, number, 0, 1)
        count = sum(int((b.targets != -100).sum()) for b in batches)
        total = 0.0
        for batch in batches:
            logits = model(batch.tokens).logits
            loss = (
                torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
                / count
            )
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


@torch.no_grad()
def fill_with_our_weights(model, config) -> None:
    """The initial weights of our run, so that the first losses must agree."""
    from roots_dist.assembly.rank_model import build_model
    from roots_dist.world.mesh import Mesh

    ours = {p.name: p.tensor for p in build_model(config, Mesh.single()).params}
    theirs = dict(model.named_parameters())
    theirs["transformer.wte.weight"].copy_(ours["embed.tokens.weight"])
    theirs["transformer.wpe.weight"].copy_(ours["embed.position_embedding"])
    parts = {
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    for kind in ("weight", "bias"):
        theirs[f"transformer.ln_f.{kind}"].copy_(ours[f"head.norm.{kind}"])
        for i in range(config.model.layers):
            qkv = [ours[f"blocks.{i}.attention.{part}.{kind}"] for part in ("query", "key", "value")]
            theirs[f"transformer.h.{i}.attn.c_attn.{kind}"].copy_(torch.cat(qkv).t())
            for part, name in parts.items():
                theirs[f"transformer.h.{i}.{name}.{kind}"].copy_(ours[f"blocks.{i}.{part}.{kind}"].t())


def matmul(job: dict):
    """The machine's limit: the step's matrix products alone, forward and backward, as plain torch calls."""
    m, rows = job["model"], job["micro_batch"] * job["seq"]
    f = m.get("ffn") or 4 * m["hidden"]
    shapes = ([(m["hidden"], m["hidden"])] * 4 + [(m["hidden"], f), (f, m["hidden"])]) * m["layers"] + [
        (m["hidden"], m["vocab"])
    ]
    tensors = {s: (torch.randn(rows, s[0]), torch.randn(s[1], s[0]), torch.randn(rows, s[1])) for s in set(shapes)}

    def step(number: int) -> float:
        for _ in range(job["batch"] // job["micro_batch"]):
            for shape in shapes:
                x, w, grad = tensors[shape]
                torch.nn.functional.linear(x, w)
                grad @ w
                grad.t() @ x
        return 0.0

    return step


def main() -> None:
    job = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(job["threads"])
    if job["size"] > 1:
        store = dist.FileStore(job["store"], job["size"])
        dist.init_process_group("gloo", store=store, rank=job["rank"], world_size=job["size"])
    step = {"roots": roots, "transformers": transformers, "matmul": matmul}[job["who"]](job)
    print(json.dumps({"first_loss": step(0)}), flush=True)
    for number, _ in enumerate(sys.stdin, 1):
        start, cpu = time.perf_counter(), time.process_time()
        step(number)
        found = {
            "seconds": time.perf_counter() - start,
            "cpu_seconds": time.process_time() - cpu,
            "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        }
        print(json.dumps(found), flush=True)
    if job["size"] > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
