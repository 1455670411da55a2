"""Write a checkpoint that no layout can be seen in, in bounded memory, and commit it by one rename.

    engine.read_state(name) --gather tp slices on the owner--> whole tensors --shards--> .partial/ --rename--> step_N

One parameter at a time; its owner is one of the (tp, dp) ranks of its pipeline stage, so all ranks write, in parallel.
A kill at any moment leaves a hidden folder that the next save removes. Called by the trainer's duties.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from roots_dist import __version__
from roots_dist.errors import CheckpointError
from roots_dist.parallel.zero.seam import STATE, Engine, master_dtype
from roots_dist.storage.checkpoint.format import (
    FORMAT,
    STATE_FILE,
    FileFacts,
    Manifest,
    checkpoints_folder,
    index_name,
    measure,
    plan_shards,
    read_json,
    shard_name,
    step_name,
    sync,
    write_json,
)
from roots_dist.storage.checkpoint.keep import PARTIAL, REPLACED, sweep
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param, assemble

SHARD_BYTES = 1 << 30
"""Of one file. A rank holds at most three of them in memory: weights and both moments."""
ROOM = "make room there, or choose another track.folder; the checkpoints from before are whole"


def save(
    run: Path,
    step: int,
    engine: Engine,
    params: Sequence[Param],
    mesh: Mesh,
    state: dict[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Save to `<run>/checkpoints/step_<step>` and return that folder. Collective over the world.

    `state` is what else the trainer needs to go on, as JSON, the same on every rank. If any rank fails (a full disk),
    every rank raises CheckpointError with that rank's words, and the checkpoints from before are untouched.
    """
    facts = {"format": FORMAT, "step": step, "version": __version__, "layout": str(mesh.layout)}
    facts["taken"] = {str(border): steps for border, steps in engine.optimizer_steps.items()}
    assert not facts.keys() & state.keys(), facts.keys() & state.keys()
    json.dumps(state, allow_nan=False)  # what is not JSON fails here, on every rank, and not later on one of them
    final = checkpoints_folder(run) / step_name(step)
    partial = final.with_name(f".{final.name}{PARTIAL}")
    together = SharedFailure(mesh)
    if mesh.rank == 0:
        with together.attempt(f"cannot begin {final}", ROOM):
            final.parent.mkdir(parents=True, exist_ok=True)
            sweep(final.parent)
            partial.mkdir()
    together.meet()
    try:
        written = _write_tensors(partial, engine, params, mesh, together, shard_bytes)
        with together.attempt(f"cannot write {partial}", ROOM):
            write_json(part_file(partial, mesh.rank), {"shards": written})
        together.meet()
        if mesh.rank == 0:
            with together.attempt(f"cannot commit {final}", ROOM):
                describe(partial, step, {**state, **facts}, mesh.world.size)
                commit(partial, final)
        together.meet()
    except CheckpointError:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # all ranks have met, none writes any more: give the space back
        raise
    return final


def _write_tensors(
    folder: Path, engine: Engine, params: Sequence[Param], mesh: Mesh, together: SharedFailure, shard_bytes: int
) -> list[dict[str, Any]]:
    """Write this rank's shards. Returns their names, sizes, hashes and tensors, as JSON. Collective over the world."""
    mine = [p for p in params if not p.is_copy]
    sizes = [torch.Size(p.spec.shape).numel() * master_dtype(p.tensor.dtype).itemsize for p in mine]
    plan = plan_shards(sizes, mesh.tp.size * mesh.dp.size, shard_bytes)
    before, total = _shards_of_stages(plan.num_shards, mesh)
    missing = [plan.shard.count(number) for number in range(plan.num_shards)]
    collected: dict[str, dict[str, Tensor]] = {kind: {} for kind in STATE}
    written: list[dict[str, Any]] = []
    for p, owner, shard in zip(mine, plan.owner, plan.shard):
        owner_dp, owner_tp = divmod(owner, mesh.tp.size)
        values = engine.read_state(p.name)
        if mesh.dp.rank != owner_dp:
            continue
        for kind in list(values):
            whole = _whole(p, values.pop(kind), owner_tp, mesh)
            if whole is not None and not together.failed:
                collected[kind][p.name] = whole
        missing[shard] -= 1
        if missing[shard] == 0 and mesh.tp.rank == owner_tp and not together.failed:
            with together.attempt(f"cannot write {folder}", ROOM):
                for kind in (kind for kind in STATE if collected[kind]):  # what does not learn has no moments
                    path = folder / shard_name(kind, before + shard + 1, total)
                    written.append({"kind": kind, **write_shard(path, collected[kind])})
            collected = {kind: {} for kind in STATE}
    return written


def _shards_of_stages(mine: int, mesh: Mesh) -> tuple[int, int]:
    """How many shards the pipeline ranks before this one write, and how many all of them do. Collective over pp."""
    counts = torch.zeros(mesh.pp.size, dtype=torch.int64, device=mesh.device)
    counts[mesh.pp.rank] = mine
    numbers = mesh.pp.sum_(counts).tolist()
    return sum(numbers[: mesh.pp.rank]), sum(numbers)


def _whole(p: Param, tensor: Tensor, owner_tp: int, mesh: Mesh) -> Tensor | None:
    """The whole parameter, in this machine's memory, on the owner; None on the others. Collective over tp."""
    here = mesh.tp.rank == owner_tp
    if p.spec.num_parts(mesh.tp) == 1:
        return tensor.cpu().contiguous() if here else None
    tensor = tensor.to(mesh.device).contiguous()
    slices = [torch.empty_like(tensor) for _ in range(mesh.tp.size)] if here else None
    dist.gather(tensor, slices, dst=mesh.tp.ranks[owner_tp], group=mesh.tp.group)
    if slices is None:
        return None
    places = [p.spec.mine(replace(mesh.tp, rank=rank)) for rank in range(mesh.tp.size)]
    return assemble(p.spec.shape, zip(places, (piece.cpu() for piece in slices)))


def write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """To the disk. Returns name, size, hash and tensors, as JSON."""
    save_file(tensors, path, metadata={"format": "pt"})
    sync(path)
    size = sum(t.nbytes for t in tensors.values())
    return {"file": path.name, **asdict(measure(path)), "tensors": list(tensors), "tensor_bytes": size}


def part_file(folder: Path, rank: int) -> Path:
    """Where a rank says which shards it has written."""
    return folder / f"part-{rank:05d}.json"


def describe(folder: Path, step: int, state: dict[str, Any], num_ranks: int) -> None:
    """From what each rank has written: the indices, the state, and last the manifest. On rank 0."""
    parts = []
    for rank in range(num_ranks):
        path = part_file(folder, rank)
        if not path.exists():
            raise CheckpointError(f"{path}: is not here. Fix: put the run's folder on a disk that all nodes share.")
        parts += read_json(path)["shards"]
        path.unlink()
    files = {part["file"]: FileFacts(part["bytes"], part["sha256"]) for part in parts}
    for kind in STATE:
        shards = sorted((p for p in parts if p["kind"] == kind), key=lambda p: p["file"])
        index = {
            "metadata": {"total_size": sum(p["tensor_bytes"] for p in shards)},
            "weight_map": {name: p["file"] for p in shards for name in p["tensors"]},
        }
        write_json(folder / index_name(kind), index)
    write_json(folder / STATE_FILE, state)
    files |= {name: measure(folder / name) for name in [*map(index_name, STATE), STATE_FILE]}
    Manifest(step, files).write(folder)
    sync(folder)


def commit(partial: Path, final: Path) -> None:
    """One rename. If the step was saved before, that one is set aside first and counts until the new one is there."""
    aside = final.with_name(f".{final.name}{REPLACED}")
    if final.exists():
        os.rename(final, aside)
    os.rename(partial, final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
