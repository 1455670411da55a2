"""Turn the failure of one rank into a failure of all ranks, at points where all of them meet, so that none waits for
another.

Between two such points a rank that has failed still takes part in collectives, but no longer touches files.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from roots_dist.errors import CheckpointError, EnvironmentProblem
from roots_dist.world.mesh import Mesh
from roots_dist.world.words import words_of


class SharedFailure:
    """Collects a failure on this rank, and raises it on all ranks."""

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._failure: str | None = None
        self._no_answer: str | None = None

    @property
    def failed(self) -> bool:
        """True if this rank has failed so far."""
        return self._failure is not None or self._no_answer is not None

    @contextmanager
    def attempt(self, what: str, fix: str = "") -> Iterator[None]:
        """Run file operations that may fail, and keep the first failure for `raise_on_all`. Callers skip their work
        once `failed`."""
        try:
            yield
        except CheckpointError as error:
            self._failure = self._failure or str(error)
        except EnvironmentProblem as error:
            self._no_answer = self._no_answer or str(error)
        except (OSError, SafetensorError) as error:
            self._failure = self._failure or f"{what}: {error}" + (f". Fix: {fix}." if fix else "")

    def raise_on_all(self) -> None:
        """Raise CheckpointError on every rank if any rank has failed, with the message of the first one. Collective;
        raises EnvironmentProblem as `on_all` does."""
        if why := self.on_all():
            raise CheckpointError(why)

    def on_all(self) -> str:
        """Message of the first rank that has failed, the same on every rank; empty if none has. Collective.

        Raises EnvironmentProblem on every rank if the disk or the store of any rank does not answer: then nothing is
        known of what is there."""
        has_answered, why = self._found()
        if not has_answered:
            raise EnvironmentProblem(why)
        return why

    def words(self) -> str:
        """The message of `on_all`, for a failure that is only said: it never raises. Collective."""
        return self._found()[1]

    def _found(self) -> tuple[bool, str]:
        """Two values: True if all disks and stores have answered, and the message. Collective."""
        world = self._mesh.world
        if world.size == 1:
            return self._no_answer is None, self._no_answer or self._failure or ""
        device = self._mesh.device
        mine = 0 if self._no_answer is not None else 1 if self._failure is not None else 2
        first = torch.tensor(mine * world.size + world.rank, device=device)
        dist.all_reduce(first, op=dist.ReduceOp.MIN, group=world.group)
        self._mesh.progress.move()
        kind, source = divmod(int(first), world.size)
        if kind == 2:
            return True, ""
        words = f"rank {source} ({self._mesh.place}): {self._no_answer or self._failure}"
        return kind == 1, words_of(world, source, words, device)
