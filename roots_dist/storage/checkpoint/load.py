"""Read a checkpoint into any layout: each rank reads only its own slices, after all ranks have checked that it fits.

    manifest, sizes, hashes (divided among ranks) --> names, shapes, dtypes --> engine.write_state | parameters

Engine and model are unchanged until every check has passed on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from roots_dist.errors import CheckpointError
from roots_dist.parallel.optim.trainable import has_trained
from roots_dist.parallel.zero.seam import STATE, Engine, master_dtype
from roots_dist.storage.checkpoint.format import STATE_FILE, Manifest, index_name, read_index, read_json
from roots_dist.storage.checkpoint.keep import check_state
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.storage.checkpoint.object_tensors import open_tensors
from roots_dist.storage.checkpoint.save import DTYPES
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param

Kinds = Callable[[str, int], Sequence[str]]
FIX = "Fix: use the config that the checkpoint was saved with"


def load(
    folder: str | Place, engine: Engine, params: Sequence[Param], mesh: Mesh, *, verify: bool = True
) -> dict[str, Any]:
    """Set weights, moments and step counts of the engine from a checkpoint of any layout; return the saved state.

    Parameters that have not been trained yet have no moments. Bias correction continues from the optimizer steps taken,
    which exclude skipped steps.

    Collective over the world. `verify` compares the sha256 of every file, divided among the ranks; sizes are always
    compared. Raises CheckpointError on every rank if anything does not fit, before any weight or moment is changed.
    """

    def kinds(name: str, step: int) -> Sequence[str]:
        return STATE if has_trained(engine.trainable, name, step) else STATE[:1]

    folder = _place(folder)
    reader = _open(folder, params, mesh, kinds, verify, same_dtype=True)
    state = reader.state
    engine.unfreeze(max(0, state["step"] - 1))
    taken = {
        int(border): steps
        for border, steps in state.get("taken", {"0": state["step"] - state.get("skipped", 0)}).items()
    }
    if taken.keys() != engine.optimizer_steps.keys():
        raise CheckpointError(
            f"{folder / STATE_FILE}: parameters are trained from steps {sorted(taken)}: "
            f"expected {sorted(engine.optimizer_steps)}. {FIX} (finetune)."
        )
    for p in params:
        engine.write_state(p.name, {kind: reader.slice(kind, p) for kind in kinds(p.name, state["step"])})
    engine.finish_loading(taken)
    return state


@torch.no_grad()
def load_weights(
    folder: str | Place, params: Sequence[Param], mesh: Mesh | None = None, *, verify: bool = True
) -> dict[str, Any]:
    """Fill the parameters from the master weights, in the dtype of the parameters; return the saved state.

    For evaluation and generation, without an engine. Collective over the mesh, which a single process may omit.
    """
    folder, mesh = _place(folder), mesh or Mesh.single()
    reader = _open(folder, params, mesh, lambda name, step: STATE[:1], verify, same_dtype=False)
    for p in params:
        p.tensor.copy_(reader.slice("weight", p))
    return reader.state


def load_initial_weights(
    folder: str | Place,
    engine: Engine,
    params: Sequence[Param],
    mesh: Mesh,
    *,
    untrained: Collection[str] = (),
    unused: Collection[str] = (),
    verify: bool = True,
) -> None:
    """Start training from the weights of a checkpoint of any layout, without moments.

    untrained: names that keep their initial values; unused: names in the checkpoint that this model does not have.
    Collective over the world. Raises CheckpointError on every rank, before anything is changed, if any other name is
    missing or left over.
    """
    reader = _open(
        _place(folder),
        params,
        mesh,
        lambda name, step: () if name in untrained else STATE[:1],
        verify=verify,
        same_dtype=False,
        unused=unused,
    )
    for p in params:
        if p.name not in untrained:
            state = engine.read_state(p.name)  # the moments stay zero
            engine.write_state(p.name, state | {"weight": reader.slice("weight", p).to(state["weight"])})
    engine.finish_loading(engine.optimizer_steps)


class _Reader:
    """Reads slices of tensors by name. Files are memory-mapped, so only the requested slices are read."""

    def __init__(self, folder: Place):
        self.folder = folder
        self.state = read_json(folder / STATE_FILE)
        self.files = {kind: read_index(folder, kind) for kind in STATE}
        self._opened: dict[str, Any] = {}

    def _entry(self, kind: str, name: str) -> Any:
        """safetensors' slice of a tensor, for which it has no type."""
        file = self.files[kind][name]
        try:
            if file not in self._opened:
                self._opened[file] = open_tensors(self.folder / file)
            return self._opened[file].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: {name}: {error}. Fix: use another checkpoint.") from error

    def slice(self, kind: str, p: Param) -> Tensor:
        mine: Tensor = self._entry(kind, p.name)[p.slices]
        return mine

    def check(self, kind: str, p: Param, same_dtype: bool) -> None:
        if p.name not in self.files[kind]:
            raise CheckpointError(f"{self.folder / index_name(kind)}: {p.name} is missing. {FIX}.")
        where = f"{self.folder / self.files[kind][p.name]}: {p.name}"
        entry = self._entry(kind, p.name)
        if tuple(entry.get_shape()) != p.spec.shape:
            raise CheckpointError(f"{where}: shape = {tuple(entry.get_shape())}: expected {p.spec.shape}. {FIX}.")
        wanted = DTYPES[master_dtype(p.tensor.dtype)]
        if same_dtype and entry.get_dtype() != wanted:
            raise CheckpointError(f"{where}: dtype = {entry.get_dtype()}: expected {wanted}. {FIX} (advanced.float64).")


def _open(
    folder: Place,
    params: Sequence[Param],
    mesh: Mesh,
    kinds: Kinds,
    verify: bool,
    *,
    same_dtype: bool,
    unused: Collection[str] = (),
) -> _Reader:
    """Open a checkpoint that passes every check on every rank. Collective over the world.

    kinds(name, steps done): the tensors of STATE that must exist for a parameter. unused: names that may exist in
    addition.
    """
    failures = SharedFailure(mesh)
    with failures.attempt(f"cannot read {folder}"):
        manifest = Manifest.read(folder)
        for name in sorted(manifest.files)[mesh.world.rank :: mesh.world.size]:
            manifest.check_size(folder, name)
            if verify:
                manifest.check_hash(folder, name)
        check_state(folder, manifest)
    failures.raise_on_all()
    with failures.attempt(f"cannot read {folder}"):
        reader = _Reader(folder)
        for kind in STATE:
            unlisted = set(reader.files[kind].values()) - manifest.files.keys()
            if unlisted:
                where = folder / index_name(kind)
                raise CheckpointError(f"{where}: {min(unlisted)} is not in the manifest. Fix: use another checkpoint.")
        for p in params:
            for kind in kinds(p.name, manifest.step):
                reader.check(kind, p, same_dtype)
    failures.raise_on_all()
    with failures.attempt(f"cannot read {folder}"):
        for kind in STATE:
            _refuse_extras(folder / index_name(kind), sorted(reader.files[kind].keys() - set(unused)), params, mesh)
    failures.raise_on_all()
    return reader


def _refuse_extras(index: Place, names: list[str], params: Sequence[Param], mesh: Mesh) -> None:
    """Raise if a tensor is held by no rank, which indicates another model (an untied head, more layers). Collective
    over pp and ep."""
    mine = {p.name for p in params}
    held = mesh.ep.sum_(mesh.pp.sum_(torch.tensor([int(name in mine) for name in names], device=mesh.device)))
    extra = [name for name, count in zip(names, held.tolist()) if count == 0]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(f"{index}: {extra[0]}{more}: not in this model. {FIX}.")


def _place(folder: str | Place) -> Place:
    return Path(folder) if isinstance(folder, str) else folder
