"""Write a checkpoint that does not depend on the layout, in bounded memory, and commit it by one rename.

    engine.read_state(name) --gather tp slices on the owner--> whole tensors --shards--> .partial/ --rename--> step_N

Parameters are written one at a time; the owner of each is one of the (tp, dp) ranks of its pipeline stage, so that all
ranks write in parallel. A kill at any moment leaves a hidden folder, which the next save removes. Called by the
trainer's callbacks.
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
    file_facts,
    index_name,
    plan_shards,
    read_json,
    shard_name,
    step_name,
    sync,
    write_json,
)
from roots_dist.storage.checkpoint.keep import PARTIAL, REPLACED, remove_leftovers
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param, assemble

SHARD_BYTES = 1 << 30
"""Size of one file. A rank holds at most three of them in memory: weights and both moments."""
DISK_FULL_FIX = "free some space, or choose another track.folder; earlier checkpoints are intact"


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

    `state` is the rest of the trainer's state as JSON, the same on every rank. If any rank fails (a full disk), every
    rank raises CheckpointError with that rank's message, and earlier checkpoints are unchanged.
    """
    facts = {"format": FORMAT, "step": step, "version": __version__, "layout": str(mesh.layout)}
    facts["taken"] = {str(border): steps for border, steps in engine.optimizer_steps.items()}
    assert not facts.keys() & state.keys(), facts.keys() & state.keys()
    json.dumps(state, allow_nan=False)  # fail here on every rank, not later on one
    final = checkpoints_folder(run) / step_name(step)
    partial = final.with_name(f".{final.name}{PARTIAL}")
    failures = SharedFailure(mesh)
    if mesh.rank == 0:
        with failures.attempt(f"cannot begin {final}", DISK_FULL_FIX):
            final.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(final.parent)
            partial.mkdir()
    failures.raise_on_all()
    try:
        written = _write_tensors(partial, engine, params, mesh, failures, shard_bytes)
        with failures.attempt(f"cannot write {partial}", DISK_FULL_FIX):
            write_json(part_file(partial, mesh.rank), {"shards": written})
        failures.raise_on_all()
        if mesh.rank == 0:
            with failures.attempt(f"cannot commit {final}", DISK_FULL_FIX):
                write_metadata(partial, step, {**state, **facts}, mesh.world.size)
                commit(partial, final)
        failures.raise_on_all()
    except CheckpointError:
        if mesh.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)  # all ranks have stopped writing: free the space
        raise
    return final


def _write_tensors(
    folder: Path, engine: Engine, params: Sequence[Param], mesh: Mesh, failures: SharedFailure, shard_bytes: int
) -> list[dict[str, Any]]:
    """Write this rank's shards. Returns their names, sizes, hashes and tensors, as JSON. Collective over the world."""
    mine = [p for p in params if not p.is_copy]
    sizes = [torch.Size(p.spec.shape).numel() * master_dtype(p.tensor.dtype).itemsize for p in mine]
    plan = plan_shards(sizes, mesh.tp.size * mesh.dp_cp.size, shard_bytes)
    before, total = _shards_of_stages(plan.num_shards, mesh)
    missing = [plan.shard.count(number) for number in range(plan.num_shards)]
    collected: dict[str, dict[str, Tensor]] = {kind: {} for kind in STATE}
    written: list[dict[str, Any]] = []
    for p, owner, shard in zip(mine, plan.owner, plan.shard):
        owner_dp, owner_tp = divmod(owner, mesh.tp.size)
        values = engine.read_state(p.name)
        if mesh.dp_cp.rank != owner_dp:
            continue
        for kind in list(values):
            whole = _whole(p, values.pop(kind), owner_tp, mesh)
            if whole is not None and not failures.failed:
                collected[kind][p.name] = whole
        missing[shard] -= 1
        if missing[shard] == 0 and mesh.tp.rank == owner_tp and not failures.failed:
            with failures.attempt(f"cannot write {folder}", DISK_FULL_FIX):
                for kind in (kind for kind in STATE if collected[kind]):  # frozen parameters have no moments
                    path = folder / shard_name(kind, before + shard + 1, total)
                    written.append({"kind": kind, **write_shard(path, collected[kind])})
            collected = {kind: {} for kind in STATE}
    return written


def _shards_of_stages(mine: int, mesh: Mesh) -> tuple[int, int]:
    """Number of shards that earlier pipeline ranks write, and the total number. Collective over pp."""
    counts = torch.zeros(mesh.pp.size, dtype=torch.int64, device=mesh.device)
    counts[mesh.pp.rank] = mine
    numbers = mesh.pp.sum_(counts).tolist()
    return sum(numbers[: mesh.pp.rank]), sum(numbers)


def _whole(p: Param, tensor: Tensor, owner_tp: int, mesh: Mesh) -> Tensor | None:
    """The whole parameter in CPU memory on the owner; None on other ranks. Collective over tp."""
    here = mesh.tp.rank == owner_tp
    if p.spec.num_shards(mesh.tp) == 1:
        return tensor.cpu().contiguous() if here else None
    tensor = tensor.to(mesh.device).contiguous()
    slices = [torch.empty_like(tensor) for _ in range(mesh.tp.size)] if here else None
    dist.gather(tensor, slices, dst=mesh.tp.ranks[owner_tp], group=mesh.tp.group)
    if slices is None:
        return None
    places = [p.spec.slices(replace(mesh.tp, rank=rank)) for rank in range(mesh.tp.size)]
    return assemble(p.spec.shape, zip(places, (piece.cpu() for piece in slices)))


def write_shard(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write a shard to disk. Returns its name, size, hash and tensors, as JSON."""
    save_file(tensors, path, metadata={"format": "pt"})
    sync(path)
    size = sum(t.nbytes for t in tensors.values())
    return {"file": path.name, **asdict(file_facts(path)), "tensors": list(tensors), "tensor_bytes": size}


def part_file(folder: Path, rank: int) -> Path:
    """File in which a rank lists the shards that it has written."""
    return folder / f"part-{rank:05d}.json"


def write_metadata(folder: Path, step: int, state: dict[str, Any], num_ranks: int) -> None:
    """Write the indices, the state and finally the manifest, from the lists of all ranks. Runs on rank 0."""
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
    files |= {name: file_facts(folder / name) for name in [*map(index_name, STATE), STATE_FILE]}
    Manifest(step, files).write(folder)
    sync(folder)


def commit(partial: Path, final: Path) -> None:
    """Rename the folder to its final name. An earlier checkpoint of the same step is set aside first, and stays valid
    until the new one is in place."""
    aside = final.with_name(f".{final.name}{REPLACED}")
    if final.exists():
        os.rename(final, aside)
    os.rename(partial, final)
    sync(final.parent)
    shutil.rmtree(aside, ignore_errors=True)
