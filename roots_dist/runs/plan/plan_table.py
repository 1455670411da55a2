"""A plan as text for a terminal, and as data for scripts."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from roots_dist.accounting.peaks import format_flops
from roots_dist.accounting.sizes import parameters_in_words
from roots_dist.config.proposals import as_written
from roots_dist.layout import Layout
from roots_dist.runs.plan.advice import Way
from roots_dist.runs.plan.cluster_speed import ClusterSpeed
from roots_dist.runs.plan.predict import Plan, RankPlan

UNITS = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
AXES = ("tp", "cp", "ep", "pp", "dp")
GPUS_GIB = (16, 24, 32, 40, 48, 80, 96, 141, 192, 288)
"""Memory of data-centre GPUs."""
SET_ASIDE = 2 * 2**30
"""Bytes of a GPU that are not planned for tensors: its context, libraries' workspaces, buffers of messages."""
COLUMNS = ("weights", "optimizer", "gradients", "activations", "peak")


def size(count: float) -> str:
    """5368709120 -> 5.00 GiB"""
    unit, name = next(((unit, name) for unit, name in UNITS if count >= unit), (1, "B"))
    return f"{count / unit:.3g} {name}"


def lines(
    plan: Plan,
    cluster: ClusterSpeed | None,
    free: int | None = None,
    width: int = 200,
    gpus: Sequence[int] = GPUS_GIB,
    way: Way | None = None,
) -> list[str]:
    """Lines that say if the run fits, the table of pipeline ranks, and the parts of a step's time. free: bytes that
    this machine can give to all processes together, if it is the one that trains; width: columns of the terminal;
    gpus: as in `fits`; way: changes with which it fits."""
    layout = plan.layout
    state = ["pp", "parameters", *COLUMNS]
    axes = [axis for axis in AXES if axis not in _unused(layout)]
    sent = [f"sent {axis}" for axis in axes]
    rows = [[*state, *sent], *(_row(rank, axes) for rank in plan.ranks)]
    table = _columns(rows)
    if max(map(len, table)) > width:  # what is held, and below it what is sent
        held, sends = [row[: len(state)] for row in rows], [[row[0], *row[len(state) :]] for row in rows]
        table = [*_columns(held), "", *_columns(sends)]
    processes = "1 process" if layout.world_size == 1 else f"{layout.world_size:,} processes"
    adapters = f" and {plan.adapters:,} of adapters" if plan.adapters else ""
    title = f"{layout}, {processes}, {parameters_in_words(plan.config)}{adapters}; per process and step"
    does, told = fits(plan, free, gpus)
    room = None if free is not None else gpus[-1] * 2**30 - SET_ASIDE
    fix = _way(way, layout.world_size) if way else _advice(plan, room)
    answer, head, times = (
        [part for line in some for part in textwrap.wrap(line, width)]
        for some in (
            [told] if does else [f"✗ {told}", f"Fix: {fix}"],
            [title],
            [*_save_copy(plan), *_time(plan, cluster)],
        )
    )
    return [*answer, *head, "", *table, "", *times]


def _unused(layout: Layout) -> set[str]:
    """Axes that are not told, because most layouts do not have them."""
    return {axis for axis in ("cp", "ep") if getattr(layout, axis) == 1}


def _save_copy(plan: Plan) -> list[str]:
    copy = max(rank.save_copy for rank in plan.ranks)
    return [f"from the first checkpoint on: {size(copy)} more of host memory per process (checkpoint.asynchronous)"] * (
        copy > 0
    )


def fits(plan: Plan, free: int | None, gpus: Sequence[int] = GPUS_GIB) -> tuple[bool, str]:
    """Return whether it fits, and in one line what the process that needs most needs, and where that fits. free: as in
    `lines`; if that is None, gpus are those that there are, by their memory in GiB, the smallest first."""
    if free is None:
        told = f"{size(plan.peak)} per process"
        room = next((gib for gib in gpus if gib * 2**30 - SET_ASIDE >= plan.peak), None)
        if room is None:
            return False, f"{told}: does not fit a GPU of {gpus[-1]} GiB, of which {size(SET_ASIDE)} are set aside"
        left = size(room * 2**30 - plan.peak)
        return True, f"{told}: fits GPUs of {room} GiB, with {left} left for libraries and fragmentation"
    each, processes = plan.peak_with_copy, plan.layout.world_size
    of = f"{size(free)} that this machine has free, with {processes} × {size(each)} of tensors"
    does = each * processes < free
    return does, f"fits into the {of}" if does else f"does not fit into the {of}"


def _way(way: Way, processes: int) -> str:
    written = " ".join(f"{key}={as_written(value)}" for key, value in way.changes.items())
    more = f" --processes {way.processes}" if way.processes != processes else ""
    return f"write {written}{more}, with which a process needs {size(way.peak)}"


def _advice(plan: Plan, room: int | None) -> str:
    """The keys that make the largest part of the process that needs most smaller. room: bytes of a GPU for tensors,
    from which follows how many ranks that part has to be cut over; None where all processes share them."""
    most, config = max(plan.ranks, key=lambda rank: rank.peak), plan.config
    p, train = config.parallel, config.train
    state = most.weights + most.optimizer + most.gradients
    ways = []
    if most.activations > state:
        ways += ["train.recompute=full"] if train.recompute != "full" else []
        ways += ["a smaller train.micro_batch"] if train.micro_batch > 1 else []
        ways += ["parallel.sequence_parallel=true"] if p.tp > 1 and not p.sequence_parallel else []
        ways += [_more("tp or parallel.cp", p.tp * p.cp, most.peak, room)]
        part = f"activations take {size(most.activations)} of it"
    else:
        ways += ["parallel.zero_stage=3"] if plan.layout.dp_cp > 1 and p.zero_stage < 3 else []
        ways += ["train.precision=bf16"] if train.precision != "bf16" and train.device != "cpu" else []
        ways += [_more("tp or parallel.pp", p.tp * p.pp, most.peak, room)]
        part = f"weights, optimizer and gradients take {size(state)} of it"
    return f"{part}: try {', '.join(ways[:-1])} or {ways[-1]}" if len(ways) > 1 else f"{part}: try {ways[0]}"


def _more(keys: str, ranks: int, peak: float, room: int | None) -> str:
    """The advice to cut over more ranks than the `ranks` that `keys` say now. Nothing shrinks faster than their number
    grows, so that fewer than those which it names cannot do."""
    if room is None or peak <= room:
        return f"a larger parallel.{keys}"
    product = keys.replace("tp or", "tp ×")
    return f"parallel.{product} of at least {next_power_of_two(ranks * peak / room)} instead of {ranks}"


def next_power_of_two(number: float) -> int:
    return 1 << math.ceil(math.log2(number))


def _columns(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]


def _row(rank: RankPlan, axes: Sequence[str]) -> list[str]:
    return [
        str(rank.pp),
        f"{rank.parameters:,}",
        *(size(getattr(rank, column)) for column in COLUMNS),
        *(size(rank.sent[axis]) if rank.sent[axis] else "–" for axis in axes),
    ]


def _time(plan: Plan, cluster: ClusterSpeed | None) -> list[str]:
    if cluster is None or plan.seconds is None:
        return ["time: unknown without a cluster profile (roots doctor --json FILE, then --profile FILE)"]
    shown = {name: seconds for name, seconds in asdict(plan.seconds).items() if name not in _unused(plan.layout)}
    parts = ", ".join(f"{name} {seconds:.3g}" for name, seconds in shown.items())
    share = "" if plan.mfu is None else f", MFU {plan.mfu:.1%}"
    rate = f"{format_flops(cluster.flops_per_s)} of products, {size(cluster.bytes_per_s)}/s of memory"
    rate += f", {cluster.op_overhead_s * 1e6:.3g} µs per operation"
    return [f"{plan.seconds.step:.3g} s per step{share}: {parts}", f"each process: {rate}"]


def facts(plan: Plan) -> dict[str, object]:
    """The plan as data, in bytes and seconds."""
    ranks = [{**asdict(rank), "peak": rank.peak} for rank in plan.ranks]
    seconds = plan.seconds and {**asdict(plan.seconds), "step": plan.seconds.step}
    return {"layout": str(plan.layout), "ranks": ranks, "peak_bytes": plan.peak, "seconds": seconds, "mfu": plan.mfu}
