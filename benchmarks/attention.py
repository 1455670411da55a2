"""Memory and time of attention with borders, windows and ALiBi: tiles beside a mask of all pairs.

    python benchmarks/attention.py [--seq 1024 2048 4096] [--rounds 5]

One layer's attention, forward and backward, float32, one thread. Bytes are those that are alive at once beside q, k, v
and their gradients, and FLOPs those of the kernels' products, both counted from the operations; the seconds are CPU
seconds, the median of rounds by turns.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from roots_dist.learning.models.fused_attention import fused_attention
from roots_dist.learning.models.positions import Alibi, Window
from roots_dist.learning.models.tiles import Pattern
from roots_dist.runs.plan.cost_counter import CostCounter

BATCH, HEADS, GROUPS, WIDTH = 2, 8, 4, 64


def cases(seq: int) -> dict[str, Pattern]:
    positions = range(seq)
    documents = (tuple(range(start, start + 256) for start in range(0, seq, 256)),) * (BATCH - 1)
    documents += (
        (range(128), *(range(start, start + 256) for start in range(128, seq - 128, 256)), range(seq - 128, seq)),
    )
    return {
        "documents of 256": Pattern(positions, positions, True, documents),
        "window of 256": Pattern(positions, positions, True, window=256),
        "ALiBi": Pattern(positions, positions, True, biased=True),
    }


def attention(pattern: Pattern, q, k, v):
    """By tiles, and by a mask as attention was before; both as functions."""
    alibi, window, keys = Alibi(HEADS, slice(0, HEADS)), Window(pattern.window or 2**30), len(pattern.keys)

    def band(n: int, m: int):
        places = range(m - n, m)
        return alibi.bias(places, m, q).unsqueeze(0) if pattern.biased else window.bias(places, m, q)

    def masked():
        bias = band(keys, keys)
        if pattern.documents:
            ids = torch.stack(
                [torch.arange(len(row)).repeat_interleave(torch.tensor([*map(len, row)])) for row in pattern.documents]
            )
            bias = bias.masked_fill((ids.unsqueeze(2) != ids.unsqueeze(1)).unsqueeze(1), -torch.inf)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)

    return {"tiles": lambda: fused_attention(q, k, v, pattern, WIDTH**-0.5, band), "mask": masked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| | positions | MiB, tiles | mask | GFLOP, tiles | mask | CPU s, tiles | mask |")
    print("|---|---|---|---|---|---|---|---|")
    for name in cases(args.seq[0]):
        for seq in args.seq:
            pattern = cases(seq)[name]
            q = torch.randn(BATCH, HEADS, seq, WIDTH, requires_grad=True)
            k, v = (torch.randn(BATCH, GROUPS, seq, WIDTH, requires_grad=True) for _ in range(2))
            weights = torch.randn_like(q)
            cells = []
            for way in ("tiles", "mask"):
                counter = CostCounter()
                with counter:
                    grads = torch.autograd.grad((attention(pattern, q, k, v)[way]() * weights).sum(), (q, k, v))
                own = sum(g.nbytes for g in grads)
                cells.append((counter.peak - own, counter.take().flops))
            seconds = {"tiles": [], "mask": []}
            ways = attention(pattern, q, k, v)
            for _ in range(args.rounds):
                for way, run in ways.items():
                    start = time.process_time()
                    torch.autograd.grad((run() * weights).sum(), (q, k, v))
                    seconds[way].append(time.process_time() - start)
            times = [f"{statistics.median(found):.3f}" for found in seconds.values()]
            memory, flops = (
                [f"{f(cell):.1f}" for cell in cells] for f in (lambda c: c[0] / 2**20, lambda c: c[1] / 1e9)
            )
            print(f"| {name} | {seq:,} | {' | '.join([*memory, *flops, *times])} |", flush=True)


if __name__ == "__main__":
    main()
