"""A plan as text for a terminal, and as data for scripts."""

from __future__ import annotations

from dataclasses import asdict

from roots_dist.accounting.peaks import format_flops
from roots_dist.accounting.sizes import parameters
from roots_dist.runs.plan.cluster_speed import ClusterSpeed
from roots_dist.runs.plan.predict import Plan, RankPlan

UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
COLUMNS = ("weights", "optimizer", "gradients", "activations", "peak")


def size(count: float) -> str:
    """5368709120 -> 5.00 GiB"""
    unit, name = next(((unit, name) for unit, name in UNITS if count >= unit), (1, "B"))
    return f"{count / unit:.3g} {name}"


def lines(plan: Plan, cluster: ClusterSpeed | None) -> list[str]:
    """Table of pipeline ranks, and the parts of a step's time."""
    layout = plan.layout
    head = ["pp", "parameters", *COLUMNS, *(f"sent {axis}" for axis in ("tp", "pp", "dp"))]
    rows = [head, *map(_row, plan.ranks)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    processes = "1 process" if layout.world_size == 1 else f"{layout.world_size:,} processes"
    adapters = f" and {plan.adapters:,} of adapters" if plan.adapters else ""
    title = f"{layout}, {processes}, {parameters(plan.config):,} parameters{adapters}; per process and step"
    return [title, "", *table, "", *_time(plan, cluster)]


def _row(rank: RankPlan) -> list[str]:
    return [
        str(rank.pp),
        f"{rank.parameters:,}",
        *(size(getattr(rank, column)) for column in COLUMNS),
        *(size(rank.sent[axis]) if rank.sent[axis] else "–" for axis in ("tp", "pp", "dp")),
    ]


def _time(plan: Plan, cluster: ClusterSpeed | None) -> list[str]:
    most = (
        f"peak of the process that needs most: {size(plan.peak)} of tensors, plus libraries and allocator fragmentation"
    )
    if cluster is None or plan.seconds is None:
        return [most, "time: unknown without a cluster profile (roots doctor --json FILE, then --profile FILE)"]
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in asdict(plan.seconds).items())
    share = "" if plan.mfu is None else f", MFU {plan.mfu:.1%}"
    rate = f"{format_flops(cluster.flops_per_s)} of products, {size(cluster.bytes_per_s)}/s of memory"
    rate += f", {cluster.op_overhead_s * 1e6:.3g} µs per operation"
    return [most, f"{plan.seconds.step:.3g} s per step{share}: {parts}", f"each process: {rate}"]


def facts(plan: Plan) -> dict[str, object]:
    """The plan as data, in bytes and seconds."""
    ranks = [{**asdict(rank), "peak": rank.peak} for rank in plan.ranks]
    seconds = plan.seconds and {**asdict(plan.seconds), "step": plan.seconds.step}
    return {"layout": str(plan.layout), "ranks": ranks, "peak_bytes": plan.peak, "seconds": seconds, "mfu": plan.mfu}
