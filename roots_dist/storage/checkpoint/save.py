"""Write a checkpoint that does not depend on the layout, in bounded memory, and commit it by one rename.

    engine.read_state(name) --gather tp slices on the owner--> whole tensors --shards_of--> ShardFile, ShardFile, …
    --write_checkpoint--> .partial/ --rename--> step_N

Parameters are gathered one at a time; the owner of each is one of the (tp, dp) ranks of its pipeline stage, so that all
ranks write in parallel. A shard is written as soon as it is whole, or all of them later by another thread, which needs
no engine. A kill at any moment leaves a hidden folder, which the next save removes.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from roots_dist import __version__
from roots_dist.errors import CheckpointError, EnvironmentProblem
from roots_dist.files import PARTIAL
from roots_dist.parallel.zero.seam import STATE, Engine, master_dtype
from roots_dist.storage.checkpoint.disk import FileFacts, is_there, make_folder, remove, rename, sync_folder, write_file
from roots_dist.storage.checkpoint.format import (
    FORMAT,
    STATE_FILE,
    Author,
    Manifest,
    ShardPlan,
    checkpoints_folder,
    digest,
    index_name,
    plan_shards,
    read_json,
    shard_name,
    step_name,
    write_json,
)
from roots_dist.storage.checkpoint.keep import REPLACED, check_complete, remove_leftovers, set_damaged_aside
from roots_dist.storage.checkpoint.object_store import UNFINISHED, ObjectPath, Place
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.storage.checkpoint.store_owner import refuse_if_taken
from roots_dist.world.mesh import Axis, Mesh
from roots_dist.world.sharding import Param, assemble

SHARD_BYTES = 1 << 30
"""Size of one file. A rank holds at most three of them in memory: weights and both moments."""
DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16"}
"""Dtypes of checkpoints and exports, as safetensors names them."""
DISK_FULL_FIX = "free some space, or choose another track.folder; earlier checkpoints are intact"


@dataclass(frozen=True)
class ShardFile:
    """A file of a checkpoint in the memory of the rank that writes it."""

    kind: str
    """Name of the tensor of the optimizer state (zero.seam.STATE) that the file holds for its parameters."""
    file: str
    tensors: Mapping[str, Tensor]
    """Whole tensors on the CPU, by the names of their parameters."""


def save(
    run: Place,
    step: int,
    engine: Engine,
    params: Sequence[Param],
    mesh: Mesh,
    state: dict[str, Any],
    *,
    author: Author = Author(),
    shard_bytes: int = SHARD_BYTES,
) -> Place:
    """Save to `<run>/checkpoints/step_<step>` at once and return that folder. Collective over the world. The other
    arguments and the errors are those of `write_checkpoint`."""
    state = with_facts(state, step, engine, mesh)
    return write_checkpoint(run, step, shards_of(engine, params, mesh, shard_bytes), state, mesh, author)


def with_facts(state: dict[str, Any], step: int, engine: Engine, mesh: Mesh) -> dict[str, Any]:
    """The content of state.json: a copy of `state`, the rest of the trainer's state as JSON, which is the same on every
    rank, with what is known of the engine and the layout."""
    facts = {"format": FORMAT, "step": step, "version": __version__, "layout": str(mesh.layout)}
    facts["taken"] = {str(border): steps for border, steps in engine.optimizer_steps.items()}
    assert not facts.keys() & state.keys(), facts.keys() & state.keys()
    copy: dict[str, Any] = json.loads(json.dumps(state, allow_nan=False))  # fails here on every rank, not later on one
    return copy | facts


def write_checkpoint(
    run: Place, step: int, shards: Iterable[ShardFile], state: dict[str, Any], mesh: Mesh, author: Author = Author()
) -> Place:
    """Write this rank's shards, and commit when those of all ranks are on disk. The run's folder must exist. Returns
    the checkpoint's folder. Collective over the world: of `mesh.world` alone, besides what `shards` does.

    `state` is from `with_facts`; `author` is rank 0's. If any rank fails (a full disk, a silent store), every rank
    raises CheckpointError with that rank's message, and earlier checkpoints are unchanged.
    """
    final = checkpoints_folder(run) / step_name(step)
    partial = final if isinstance(final, ObjectPath) else final.with_name(f".{final.name}{PARTIAL}")
    failures = SharedFailure(mesh)
    if mesh.rank == 0:
        with failures.attempt(f"cannot begin {final}", DISK_FULL_FIX):
            _refuse_if_taken(final, author)
            make_folder(final.parent)
            remove_leftovers(final.parent)
            begin(partial, final, step)
    try:
        failures.raise_on_all()
    except EnvironmentProblem as error:
        raise CheckpointError(str(error)) from error
    try:
        written = []
        for shard in shards:  # to its end even after a failure: the other ranks gather too
            if not failures.failed:
                with failures.attempt(f"cannot write {partial}", DISK_FULL_FIX):
                    facts = write_shard(partial / shard.file, shard.tensors, mesh.progress.move)
                    written.append({"kind": shard.kind, **facts})
            del shard  # before the next one is gathered
        with failures.attempt(f"cannot write {partial}", DISK_FULL_FIX):
            write_json(part_file(partial, mesh.rank), {"shards": written})
        failures.raise_on_all()
        if mesh.rank == 0:
            with failures.attempt(f"cannot commit {final}", DISK_FULL_FIX):
                _refuse_if_taken(final, author)
                write_metadata(partial, step, state, mesh.world.size, author)
                commit(partial, final, step)
        failures.raise_on_all()
    except (CheckpointError, EnvironmentProblem) as error:
        if mesh.rank == 0:
            with contextlib.suppress(OSError, EnvironmentProblem, CheckpointError):
                _refuse_if_taken(final, author)
                remove(partial)  # all ranks have stopped writing: free the space
                remove_leftovers(final.parent)  # and bring back what the new one was to replace
        raise CheckpointError(str(error)) from error
    return final


def _refuse_if_taken(final: Place, author: Author) -> None:
    """Raise CheckpointError if a later start saves in the same store: there the step has its name from the beginning,
    and what lies under it may be the other's."""
    if isinstance(final, ObjectPath):
        refuse_if_taken(final.parent, author)


def in_new_memory(kind: str, name: str, tensor: Tensor) -> Tensor:
    """The tensor on the CPU."""
    return tensor.cpu().contiguous()


def shards_of(
    engine: Engine,
    params: Sequence[Param],
    mesh: Mesh,
    shard_bytes: int = SHARD_BYTES,
    to_host: Callable[[str, str, Tensor], Tensor] = in_new_memory,
) -> Iterator[ShardFile]:
    """This rank's shards, each as soon as it is whole. `to_host` brings a whole tensor of a kind and a name into CPU
    memory; without it, shards may share memory with the engine, and are to be written before the next step. Collective
    over the world: every rank takes all that there are.

    Experts that are cut over ranks are planned by those that hold the same; each rank of ep has as many shards of them.
    """
    apart = mesh.ep.size > 1
    mine = [[p for p in params if not p.is_copy and (apart and p.spec.of_expert) == kind] for kind in (False, True)]
    plans = [_plan(held, mesh.tp.size * dp.size, shard_bytes) for held, dp in zip(mine, (mesh.dp_cp, mesh.edp))]
    common, each = (plan.num_shards for plan in plans)
    before, total = _shards_of_stages(common + mesh.ep.size * each, mesh)
    for held, plan, dp, first in zip(
        mine, plans, (mesh.dp_cp, mesh.edp), (before, before + common + mesh.ep.rank * each)
    ):
        yield from _shards_of_plan(engine, held, plan, dp, mesh, (first, total), to_host)


def _plan(params: Sequence[Param], owners: int, limit: int) -> ShardPlan:
    sizes = [torch.Size(p.spec.shape).numel() * master_dtype(p.tensor.dtype).itemsize for p in params]
    return plan_shards(sizes, owners, limit)


def _shards_of_plan(
    engine: Engine,
    params: Sequence[Param],
    plan: ShardPlan,
    dp: Axis,
    mesh: Mesh,
    numbers: tuple[int, int],
    to_host: Callable[[str, str, Tensor], Tensor],
) -> Iterator[ShardFile]:
    """This rank's shards of a plan. dp: the ranks that hold the same parameters; numbers: how many shards there are
    before those of the plan, and in total. Collective over dp × tp."""
    before, total = numbers
    missing = [plan.shard.count(number) for number in range(plan.num_shards)]
    collected: dict[str, dict[str, Tensor]] = {kind: {} for kind in STATE}
    for p, owner, shard in zip(params, plan.owner, plan.shard):
        owner_dp, owner_tp = divmod(owner, mesh.tp.size)
        values = engine.read_state(p.name, copy=False)
        if dp.rank != owner_dp:
            continue
        for kind in list(values):
            whole = _whole(p, values.pop(kind), owner_tp, mesh)
            if whole is not None:
                collected[kind][p.name] = to_host(kind, p.name, whole)
        missing[shard] -= 1
        if missing[shard] == 0 and mesh.tp.rank == owner_tp:
            for kind in (kind for kind in STATE if collected[kind]):  # frozen parameters have no moments
                yield ShardFile(kind, shard_name(kind, before + shard + 1, total), collected.pop(kind))
            collected = {kind: {} for kind in STATE}


def _shards_of_stages(mine: int, mesh: Mesh) -> tuple[int, int]:
    """Number of shards that earlier pipeline ranks write, and the total number. Collective over pp."""
    counts = torch.zeros(mesh.pp.size, dtype=torch.int64, device=mesh.device)
    counts[mesh.pp.rank] = mine
    numbers = mesh.pp.sum_(counts).tolist()
    return sum(numbers[: mesh.pp.rank]), sum(numbers)


def _whole(p: Param, tensor: Tensor, owner_tp: int, mesh: Mesh) -> Tensor | None:
    """The whole parameter on the owner, on its device or, where it was cut, on the CPU; None on other ranks. Collective
    over tp."""
    here = mesh.tp.rank == owner_tp
    if p.spec.num_shards(mesh.tp) == 1:
        return tensor if here else None
    tensor = tensor.to(mesh.device).contiguous()
    slices = [torch.empty_like(tensor) for _ in range(mesh.tp.size)] if here else None
    dist.gather(tensor, slices, dst=mesh.tp.ranks[owner_tp], group=mesh.tp.group)
    if slices is None:
        return None
    places = [p.spec.slices(replace(mesh.tp, rank=rank)) for rank in range(mesh.tp.size)]
    return assemble(p.spec.shape, zip(places, (piece.cpu() for piece in slices)))


def write_shard(path: Place, tensors: Mapping[str, Tensor], moved: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Write a shard to disk. Returns its name, size, hash and tensors, as JSON. Calls `moved` for each tensor."""
    size = sum(t.nbytes for t in tensors.values())

    def parts() -> Iterator[bytes | memoryview]:
        for part in safetensors_of(tensors):
            moved()
            yield part

    facts = write_file(path, parts())
    return {"file": path.name, **asdict(facts), "tensors": list(tensors), "tensor_bytes": size}


def safetensors_of(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, tensor by tensor and without a copy, so that they are hashed while they are
    written. The library writes a file of its own, which would have to be read again, with permissions of its own.

    https://huggingface.co/docs/safetensors: size of the header, header, data. The header fills up to 8 bytes.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [end, end := end + tensor.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for tensor in tensors.values():
        yield tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


def part_file(folder: Place, rank: int) -> Place:
    """File in which a rank lists the shards that it has written."""
    return folder / f"part-{rank:05d}.json"


def write_metadata(folder: Place, step: int, state: dict[str, Any], num_ranks: int, author: Author = Author()) -> None:
    """Write the indices, the state and finally the manifest, from the lists of all ranks. Runs on rank 0."""
    parts = []
    for rank in range(num_ranks):
        path = part_file(folder, rank)
        if not is_there(path):
            raise CheckpointError(f"{path}: is not here. Fix: put the run's folder on a disk that all nodes share.")
        parts += read_json(path)["shards"]
        remove(path)
    files = {part["file"]: FileFacts(part["bytes"], part["sha256"]) for part in parts}
    for kind in STATE:
        shards = sorted((p for p in parts if p["kind"] == kind), key=lambda p: p["file"])
        index = {
            "metadata": {"total_size": sum(p["tensor_bytes"] for p in shards)},
            "weight_map": {name: p["file"] for p in shards for name in p["tensors"]},
        }
        files[index_name(kind)] = write_json(folder / index_name(kind), index)
    files[STATE_FILE] = write_json(folder / STATE_FILE, state)
    Manifest(step, files, author, digest(state.get("config"))).write(folder)
    sync_folder(folder)


def begin(partial: Place, final: Place, step: int) -> None:
    """Make the place where a checkpoint is written. In an object store that is the final one, in which an object stands
    until the manifest is there."""
    if isinstance(partial, ObjectPath):
        _make_way(final, step)
        write_file(partial / UNFINISHED, [b"is being written\n"])
    else:
        make_folder(partial)


def commit(partial: Place, final: Place, step: int) -> None:
    """Rename the folder to its final name. An earlier checkpoint of the same step is moved out of the way first, and
    stays valid until the new one is in place; what only has that name is set aside for good. In an object store the
    manifest, which has just been written, was the commit."""
    if isinstance(partial, ObjectPath):
        remove(partial / UNFINISHED)
    else:
        _make_way(final, step)
        rename(partial, final)
        sync_folder(final.parent)
    remove(_aside(final))


def _make_way(final: Place, step: int) -> None:
    if is_there(final):
        try:
            check_complete(final, step)
        except CheckpointError as error:
            set_damaged_aside(final, str(error))
        else:
            rename(final, _aside(final))


def _aside(final: Place) -> Place:
    return final.with_name(f".{final.name}{REPLACED}")
