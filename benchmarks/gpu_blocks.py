"""Predict how long one block's forward and backward take on an H100, from operations counted on the meta device.

    python benchmarks/gpu_blocks.py

Each operation takes the longest of its FLOPs, its bytes and a launch. Kernels of attention with dropout are slower than
large products, and also hash each pair of a query and a key, once forward and twice backward. Head, optimizer and
messages come on top. The share is of the peak in bf16; attention counts the whole square.
"""

from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from roots_dist.assembly.rank_model import build_model
from roots_dist.config.load import load
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.runs.plan.cost_counter import FUSED, CostCounter
from roots_dist.runs.plan.rank_cost import META, fake_mesh, one_microbatch
from roots_dist.testing.watcher import kernels_of_a_gpu

PEAK, PRODUCTS, ATTENTION, HASH = 989e12, 650e12, 400e12, 14e12
"""FLOP/s of a card, of large products, of attention with dropout; 32-bit integer operations per second."""
BYTES, LAUNCH = 2.8e12, 3e-6
HASHED = 20
"""Integer operations of a hash."""
BLOCKS = (
    ("llama-3-8b", {"train.micro_batch": 1}),
    ("gpt2-xl", {"train.micro_batch": 8, "model.dropout": 0.0, "model.attention_dropout": 0.0}),
    ("gpt2-xl", {"train.micro_batch": 8}),
    ("bert-base", {"train.micro_batch": 32}),
    ("bert-large", {"train.micro_batch": 32}),
)
WHOLE = {
    "parallel.tp": 1,
    "parallel.pp": 1,
    "parallel.virtual_stages": 1,
    "parallel.schedule": "1f1b",
    "parallel.sequence_parallel": False,
    "train.recompute": "none",
    "train.precision": "bf16",
}


class Operation(NamedTuple):
    flops: float
    bytes: float
    attends: bool

    def seconds(self, hashed: float) -> float:
        """hashed: pairs of a query and a key that dropout draws."""
        dropping = self.attends and hashed
        time = max(self.flops / (ATTENTION if dropping else PRODUCTS), self.bytes / BYTES, LAUNCH)
        return time + hashed * HASHED / HASH if dropping else time


class Operations(CostCounter):
    """Notes which operations attend."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Operation] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        once = {id(leaf): leaf.nbytes for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)}
        for flops, _ in self.take().operations:
            self.found.append(Operation(flops, sum(once.values()), func.overloadpacket in FUSED))
        return out


def counted(config: Config) -> tuple[list[Operation], list[Operation]]:
    """Operations of a block's forward and backward, the second time."""
    with META, kernels_of_a_gpu():
        block = dict(build_model(config, fake_mesh(Layout(), 0, None)).pieces())["blocks.1"]
        batch = one_microbatch(config).to(META)
        x = torch.zeros(*batch.tokens.shape, config.model.hidden, dtype=torch.bfloat16, requires_grad=True)
        for parameter in block.parameters():
            parameter.requires_grad_(True)
        for _ in range(2):
            forward, backward = Operations(), Operations()
            with forward:
                out = block({"hidden": x}, batch)["hidden"]
            with backward:
                out.backward(torch.zeros_like(out))
    return forward.found, backward.found


def main() -> None:
    for name, changes in BLOCKS:
        config = load(f"configs/{name}.yaml").changed(WHOLE | changes)
        forward, backward = counted(config)
        m, tokens = config.model, (config.train.micro_batch, config.data.seq_length)
        hashed = tokens[0] * m.heads * tokens[1] ** 2 if m.attention_dropout else 0
        time = sum(operation.seconds(hashed) for operation in forward + backward)
        moved = sum(operation.bytes for operation in forward + backward) / 1e9
        share = 3 * sum(operation.flops for operation in forward) / time / PEAK
        print(
            f"{name}{'' if m.dropout else ', no dropout'}: {tokens[0]} × {tokens[1]} tokens, "
            f"{len(forward)} + {len(backward)} launches, {moved:.2f} GB, {time * 1e3:.2f} ms, {share:.0%}"
        )


if __name__ == "__main__":
    main()
