"""The checkpoints of a run that its commands would take, every hash compared."""

from pathlib import Path

from roots_dist.storage.checkpoint.keep import found_steps
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.storage.checkpoint.run_identity import run_id
from roots_dist.storage.checkpoint.verified import damage_of, newest_verified
from roots_dist.world.mesh import Mesh


def sound(run: Path) -> list[Place]:
    """All of them, oldest first."""
    found = found_steps(run).items()
    return [path for step, path in found if not damage_of(path, step, run_id(run), Mesh.single())]


def newest(run: Path) -> Place | None:
    """The checkpoint from which the run would go on."""
    return newest_verified(run, Mesh.single())[0]
