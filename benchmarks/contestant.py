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
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from roots_dist.assembly.rank_model import build_model
from roots_dist.assembly.run import Run, build_run
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.train.step import count_targets, train_step
from roots_dist.storage.exchange.exporting import architecture_for
from roots_dist.storage.exchange.hf_config import hf_config_of
from roots_dist.storage.exchange.table import rules
from roots_dist.world.batch import IGNORE, PADDING, MicroBatch
from roots_dist.world.mesh import Mesh

BEFORE = {"train.steps": 1000, "optim.lr": 1e-4, "optim.clip_grad": 1.0, "optim.lr_schedule": "constant"}
Step = Callable[[int], None]


def config_of(job: dict) -> Config:
    return Config().changed(BEFORE | job["config"])


def make_run(job: dict) -> Run:
    config = config_of(job)
    p = config.parallel
    mesh = Mesh.connect(Layout(job["size"] // (p.tp * p.pp), p.pp, p.tp), job["rank"])
    return build_run(config, mesh, objective=proof_objective(config))


def batches_of(config: Config, step: int, rank: int = 0, size: int = 1) -> list[MicroBatch]:
    """Random microbatches in which each token has a target, as in a text, but where some are masked."""
    batches = random_batches(config, step, rank, size)
    if objective_of(config).masks:
        return batches
    return [replace(batch, targets=batch.targets.clamp(min=0)) for batch in batches]


def roots(job: dict) -> tuple[Step, dict[str, float]]:
    """One optimizer step as a function of its number, and the loss before the first one, without dropout."""
    run = make_run(job)

    def batches(step: int) -> list[MicroBatch]:
        return batches_of(run.config, step, run.mesh.dp.rank, run.mesh.dp.size)

    def step(number: int) -> None:
        train_step(run, batches(number), run.config.optim.lr)

    first = batches(0)
    counts = count_targets(run, first)
    terms = run.passes.forward(first)
    mine = sum(float(term.sum) / float(counts[term.name]) for term in terms) if run.mesh.tp.rank == 0 else 0.0
    return step, {"loss": float(run.mesh.world.sum_(torch.tensor(mine, dtype=torch.float64)))}


def transformers(job: dict) -> tuple[Step, dict[str, float]]:
    """The loop that a user would write: the class of the family, cross-entropy, clip_grad_norm_, torch's AdamW."""
    config = config_of(job)
    model = their_model(config)
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        lr=config.optim.lr,
        betas=(0.9, 0.95),
        fused=True,
    )

    def loss_of(batch: MicroBatch) -> torch.Tensor:
        more: dict[str, Any] = {}
        if batch.decoder_tokens is not None:
            more["decoder_input_ids"] = batch.decoder_tokens
        if batch.document_ids is not None:
            more["attention_mask"] = (batch.document_ids != PADDING).long()
        logits = model(input_ids=batch.tokens, **more).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")

    def step(number: int) -> None:
        batches = batches_of(config, number)
        count = sum(int((batch.targets != IGNORE).sum()) for batch in batches)
        for batch in batches:
            (loss_of(batch) / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    model.eval()
    first = batches_of(config, 0)
    with torch.no_grad():
        total = sum(float(loss_of(batch)) for batch in first)
    model.train()
    return step, {"loss": total / sum(int((batch.targets != IGNORE).sum()) for batch in first)}


def their_model(config: Config) -> Any:
    """The same model in transformers, with the initial weights of our run."""
    import transformers as hf

    architecture, head = architecture_for(config, {})
    settings = hf_config_of(config, architecture, head) | {"use_cache": False, "pad_token_id": None}
    if architecture.model_type == "t5":
        settings |= {"pad_token_id": 0, "decoder_start_token_id": 0}
    kind = settings.pop("model_type")
    model = getattr(hf, head.architecture)(hf.AutoConfig.for_model(kind, **settings))
    ours = {p.name: p.tensor.detach() for p in build_model(config, Mesh.single()).params}
    shapes = {name: tuple(tensor.shape) for name, tensor in ours.items()}
    written = {
        name: rule.form.join(config, [ours[n] for n in rule.ours])
        for rule in rules(architecture, head, config, shapes)
        for name in rule.written
    }
    missing, unexpected = model.load_state_dict(written, strict=False)
    tied = [name for name in missing if any(written.get(other) is not None for other in tied_to(model, name))]
    assert set(missing) == set(tied) and not unexpected, (missing, unexpected)
    return model


def tied_to(model: Any, name: str) -> list[str]:
    """Other names of the same parameter or buffer."""
    state = model.state_dict()
    return [other for other, tensor in state.items() if tensor.data_ptr() == state[name].data_ptr() and other != name]


class Products(TorchDispatchMode):
    """Records the matrix products of what runs inside: the strides and shapes of their factors."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[torch.Size, tuple[int, ...]], ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            self.found.append(tuple((t.shape, t.stride()) for t in args[-2:]))
        return func(*args, **(kwargs or {}))


def matmul(job: dict) -> tuple[Step, dict[str, float]]:
    """The machine's limit: the products of linear layers in one step, forward and backward, as plain torch calls."""
    run = make_run(job)
    with Products() as products:
        train_step(run, batches_of(run.config, 0), 0.0)
    made = {
        factor: torch.randn(1 + sum((n - 1) * s for n, s in zip(*factor))).as_strided(*factor)
        for factor in {factor for pair in products.found for factor in pair}
    }

    def step(number: int) -> None:
        for a, b in products.found:
            torch.mm(made[a], made[b])

    flops = sum(2.0 * a[0][0] * a[0][1] * b[0][1] for a, b in products.found)
    return step, {"flops": flops}


def main() -> None:
    job = json.loads(sys.argv[1])
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(job["threads"])
    if job["size"] > 1:
        store = dist.FileStore(job["store"], job["size"])
        dist.init_process_group("gloo", store=store, rank=job["rank"], world_size=job["size"])
    step, first = {"roots": roots, "transformers": transformers, "matmul": matmul}[job["who"]](job)
    step(0)
    print(json.dumps(first), flush=True)
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
