"""Read a checkpoint into any layout: each rank reads only its own slices, after all have checked that it fits.

    manifest, sizes, hashes (shared out over ranks) --> names, shapes, dtypes --> engine.write_state | parameters

Nothing is written into engine or model before every check has passed on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from roots_dist.errors import CheckpointError
from roots_dist.parallel.optim.trainable import has_trained
from roots_dist.parallel.zero.seam import STATE, Engine, master_dtype
from roots_dist.storage.checkpoint.format import STATE_FILE, Manifest, index_name, read_index, read_json
from roots_dist.storage.checkpoint.shared_failure import SharedFailure
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param

DTYPES = {torch.float32: "F32", torch.float64: "F64"}
"""As safetensors spells what checkpoints hold."""
Kinds = Callable[[str, int], Sequence[str]]
FIX = "Fix: use the config that the checkpoint was saved with"


def load(folder: Path, engine: Engine, params: Sequence[Param], mesh: Mesh, *, verify: bool = True) -> dict[str, Any]:
    """Set weights, moments and step count of the engine from a checkpoint of any layout; return its saved state.

    What has not learned yet, or never does, has no moments. Bias correction goes on from the optimizer's steps that
    were taken (a skipped step is none).

    Collective over the world. `verify` compares sha256 of every file, shared out over the ranks; sizes are always
    compared. Raises CheckpointError on every rank if anything does not fit, before anything is changed.
    """

    def kinds(name: str, step: int) -> Sequence[str]:
        return STATE if has_trained(engine.trainable, name, step) else STATE[:1]

    reader = _open(Path(folder), params, mesh, kinds, verify, same_dtype=True)
    state = reader.state
    engine.unfreeze(max(0, state["step"] - 1))
    taken = {
        int(border): steps
        for border, steps in state.get("taken", {"0": state["step"] - state.get("skipped", 0)}).items()
    }
    if taken.keys() != engine.optimizer_steps.keys():
        raise CheckpointError(
            f"{folder / STATE_FILE}: more began to learn after steps {sorted(taken)}: expected "
            f"{sorted(engine.optimizer_steps)}. {FIX} (finetune)."
        )
    for p in params:
        engine.write_state(p.name, {kind: reader.slice(kind, p) for kind in kinds(p.name, state["step"])})
    engine.finish_loading(taken)
    return state


@torch.no_grad()
def load_weights(
    folder: Path, params: Sequence[Param], mesh: Mesh | None = None, *, verify: bool = True
) -> dict[str, Any]:
    """Fill the parameters themselves from the master weights, in the parameters' dtype; return the saved state.

    For evaluation and generation, without an engine. Collective over the mesh, which one process may leave out.
    """
    reader = _open(Path(folder), params, mesh or Mesh.single(), lambda name, step: STATE[:1], verify, same_dtype=False)
    for p in params:
        p.tensor.copy_(reader.slice("weight", p))
    return reader.state


def load_start(
    folder: Path,
    engine: Engine,
    params: Sequence[Param],
    mesh: Mesh,
    *,
    fresh: Collection[str] = (),
    left: Collection[str] = (),
) -> None:
    """Take the weights of a checkpoint, of any layout and without moments: training begins with them.

    fresh: names that keep what they are; left: names of the checkpoint that this model has no use for. Collective over
    the world. Raises CheckpointError on every rank, before anything is changed, if anything else is missing or left
    over.
    """
    reader = _open(
        Path(folder),
        params,
        mesh,
        lambda name, step: () if name in fresh else STATE[:1],
        verify=True,
        same_dtype=False,
        left=left,
    )
    for p in params:
        if p.name not in fresh:
            state = engine.read_state(p.name)  # moments as they are: zeros
            engine.write_state(p.name, state | {"weight": reader.slice("weight", p).to(state["weight"])})
    engine.finish_loading(engine.optimizer_steps)


class _Reader:
    """Slices of tensors, by name. Files are mapped, so only what is asked for is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.state = read_json(folder / STATE_FILE)
        self.files = {kind: read_index(folder, kind) for kind in STATE}
        self._open: dict[str, safe_open] = {}

    def _entry(self, kind: str, name: str) -> Any:
        """safetensors' slice of a tensor, for which it has no type."""
        file = self.files[kind][name]
        try:
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_slice(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{self.folder / file}: {name}: {error}. Fix: use another checkpoint.") from error

    def slice(self, kind: str, p: Param) -> Tensor:
        mine: Tensor = self._entry(kind, p.name)[p.mine]
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
    folder: Path,
    params: Sequence[Param],
    mesh: Mesh,
    kinds: Kinds,
    verify: bool,
    *,
    same_dtype: bool,
    left: Collection[str] = (),
) -> _Reader:
    """A reader of a checkpoint that has passed every check, on every rank. Collective over the world.

    kinds(name, steps done): of STATE, what must be there of a parameter. left: what else may be there.
    """
    together = SharedFailure(mesh)
    with together.attempt(f"cannot read {folder}"):
        manifest = Manifest.read(folder)
        for name in sorted(manifest.files)[mesh.world.rank :: mesh.world.size]:
            manifest.check_size(folder, name)
            if verify:
                manifest.check_hash(folder, name)
    together.meet()
    with together.attempt(f"cannot read {folder}"):
        reader = _Reader(folder)
        if reader.state.get("step") != manifest.step:
            raise CheckpointError(
                f"{folder / STATE_FILE}: step = {reader.state.get('step')!r}: expected {manifest.step} as in the "
                "manifest. Fix: use another checkpoint."
            )
        for kind in STATE:
            unlisted = set(reader.files[kind].values()) - manifest.files.keys()
            if unlisted:
                where = folder / index_name(kind)
                raise CheckpointError(f"{where}: {min(unlisted)} is not in the manifest. Fix: use another checkpoint.")
        for p in params:
            for kind in kinds(p.name, manifest.step):
                reader.check(kind, p, same_dtype)
    together.meet()
    with together.attempt(f"cannot read {folder}"):
        for kind in STATE:
            _refuse_extras(folder / index_name(kind), sorted(reader.files[kind].keys() - set(left)), params, mesh)
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
