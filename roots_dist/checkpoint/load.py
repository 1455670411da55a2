"""Read a checkpoint into any layout: each rank reads only its own slices, after all have checked that it fits.

    manifest, sizes, hashes (shared out over ranks) --> names, shapes, dtypes --> engine.write_state | parameters

Nothing is written into engine or model before every check has passed on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from roots_dist.checkpoint.format import STATE_FILE, Manifest, index_name, read_index, read_json
from roots_dist.checkpoint.together import Together
from roots_dist.errors import CheckpointError
from roots_dist.mesh import Mesh
from roots_dist.sharding import Param
from roots_dist.zero.seam import STATE, Engine, master_dtype

DTYPES = {torch.float32: "F32", torch.float64: "F64"}
"""As safetensors spells what checkpoints hold."""
FIX = "Fix: use the config that the checkpoint was saved with"


def load(folder: Path, engine: Engine, params: Sequence[Param], mesh: Mesh, *, verify: bool = True) -> dict:
    """Set weights, moments and step count of the engine from a checkpoint of any layout; return its saved state.

    A step that was skipped (state["skipped"] of them) is none for the optimizer: bias correction goes on from the rest.

    Collective over the world. `verify` compares sha256 of every file, shared out over the ranks; sizes are always
    compared. Raises CheckpointError on every rank if anything does not fit, before anything is changed.
    """
    reader = _open(Path(folder), params, mesh, STATE, verify, same_dtype=True)
    state = reader.state
    for p in params:
        engine.write_state(p.name, {kind: reader.slice(kind, p) for kind in STATE})
    engine.finish_loading(state["step"] - state.get("skipped", 0))
    return state


@torch.no_grad()
def load_weights(folder: Path, params: Sequence[Param], mesh: Mesh | None = None, *, verify: bool = True) -> dict:
    """Fill the parameters themselves from the master weights, in the parameters' dtype; return the saved state.

    For evaluation and generation, without an engine. Collective over the mesh, which one process may leave out.
    """
    reader = _open(Path(folder), params, mesh or Mesh.single(), ("weight",), verify, same_dtype=False)
    for p in params:
        p.tensor.copy_(reader.slice("weight", p))
    return reader.state


class _Reader:
    """Slices of tensors, by name. Files are mapped, so only what is asked for is read."""

    def __init__(self, folder: Path, kinds: Sequence[str]):
        self.folder = folder
        self.state = read_json(folder / STATE_FILE)
        self.files = {kind: read_index(folder, kind) for kind in kinds}
        self._open: dict[str, safe_open] = {}

    def _entry(self, kind: str, name: str):
        file = self.files[kind][name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: {name}: {error}. Fix: use another checkpoint.") from error

    def slice(self, kind: str, p: Param) -> Tensor:
        return self._entry(kind, p.name)[p.mine]

    def check(self, kind: str, p: Param, same_dtype: bool) -> None:
        if p.name not in self.files[kind]:
            raise CheckpointError(f"{self.folder / index_name(kind)}: {p.name} is missing. {FIX}.")
        where = f"{self.folder / self.files[kind][p.name]}: {p.name}"
        entry = self._entry(kind, p.name)
        if tuple(entry.get_shape()) != p.spec.shape:
            raise CheckpointError(f"{where}: shape = {tuple(entry.get_shape())}: expected {p.spec.shape}. {FIX}.")
        wanted = DTYPES[master_dtype(p.tensor.dtype)]
        if same_dtype and entry.get_dtype() != wanted:
            raise CheckpointError(f"{where}: dtype = {entry.get_dtype()}: expected {wanted}. {FIX} (advanced.double).")


def _open(
    folder: Path, params: Sequence[Param], mesh: Mesh, kinds: Sequence[str], verify: bool, *, same_dtype: bool
) -> _Reader:
    """A reader of a checkpoint that has passed every check, on every rank. Collective over the world."""
    together = Together(mesh)
    with together.attempt(f"cannot read {folder}"):
        manifest = Manifest.read(folder)
        for name in sorted(manifest.files)[mesh.world.rank :: mesh.world.size]:
            manifest.check_size(folder, name)
            if verify:
                manifest.check_hash(folder, name)
    together.meet()
    with together.attempt(f"cannot read {folder}"):
        reader = _Reader(folder, kinds)
        if reader.state.get("step") != manifest.step:
            raise CheckpointError(
                f"{folder / STATE_FILE}: step = {reader.state.get('step')!r}: expected {manifest.step} as in the "
                "manifest. Fix: use another checkpoint."
            )
        for kind in kinds:
            unlisted = set(reader.files[kind].values()) - manifest.files.keys()
            if unlisted:
                where = folder / index_name(kind)
                raise CheckpointError(f"{where}: {min(unlisted)} is not in the manifest. Fix: use another checkpoint.")
            for p in params:
                reader.check(kind, p, same_dtype)
    together.meet()
    with together.attempt(f"cannot read {folder}"):
        for kind in kinds:
            _refuse_extras(folder / index_name(kind), sorted(reader.files[kind]), params, mesh)
    together.meet()
    return reader


def _refuse_extras(index: Path, names: list[str], params: Sequence[Param], mesh: Mesh) -> None:
    """A tensor that no rank holds means another model: an untied head, more layers. Collective over pp."""
    mine = {p.name for p in params}
    held = mesh.pp.sum_(torch.tensor([int(name in mine) for name in names], device=mesh.device))
    extra = [name for name, count in zip(names, held.tolist()) if count == 0]
    if extra:
        more = f" and {len(extra) - 1} more" if len(extra) > 1 else ""
        raise CheckpointError(f"{index}: {extra[0]}{more}: not in this model. {FIX}.")
