"""What one running rank holds of the world: an Axis per dimension of the layout, each with its live group.

    environment.World + layout.Layout --connect--> Mesh, handed on explicitly; a layer gets the one Axis that it uses

The only file that makes process groups: a bare `new_group` would not inherit the world's timeout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from roots_dist.layout import AxisName, Layout, Place


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh, seen from one rank. Of size 1 it has no group and its collectives return their
    input."""

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the axis, in place. Outside autograd: layers use parallel/tensor/collectives.py."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor


SINGLE = Axis("single")


@dataclass(frozen=True)
class Mesh:
    layout: Layout
    rank: int
    device: torch.device
    timeout: timedelta
    tp: Axis
    pp: Axis
    dp: Axis
    model: Axis
    """The ranks that hold one replica of the model together: pp × tp."""
    world: Axis

    @property
    def place(self) -> Place:
        return self.layout.place(self.rank)

    @staticmethod
    def single(device: torch.device = torch.device("cpu")) -> Mesh:
        """One process: the 1×1×1 layout of the same code."""
        return Mesh.connect(Layout(), 0, device)

    @staticmethod
    def connect(
        layout: Layout,
        rank: int,
        device: torch.device = torch.device("cpu"),
        timeout: timedelta = timedelta(minutes=10),
    ) -> Mesh:
        """Make every group of the layout. Collective over the world; the default group must exist if world size > 1."""

        def axis(name: str, groups: list[list[int]]) -> Axis:
            return make_axis(name, groups, rank, timeout)

        def along(name: AxisName) -> Axis:
            return axis(name, layout.groups(name))

        world = Axis("world", ranks=(rank,))
        if layout.world_size > 1:
            world = Axis("world", layout.world_size, rank, tuple(range(layout.world_size)), dist.group.WORLD)
        return Mesh(
            layout=layout,
            rank=rank,
            device=device,
            timeout=timeout,
            tp=along("tp"),
            pp=along("pp"),
            dp=along("dp"),
            model=axis("model", layout.model_groups()),
            world=world,
        )

    def another_pp(self, name: str) -> Axis:
        """The pipeline axis once more, with a group of its own. Collective over the world."""
        return make_axis(name, self.layout.groups("pp"), self.rank, self.timeout)

    def some_pp(self, name: str, members: Sequence[int]) -> Axis:
        """These ranks of the pipeline, which share a parameter; of size 1 on other ranks. Collective over the world."""
        groups = [[ranks[i] for i in members] for ranks in self.layout.groups("pp")]
        return make_axis(name, groups, self.rank, self.timeout)

    def alone(self) -> dist.ProcessGroup:
        """A group of this rank alone, for a library that wants one where an Axis of size 1 has none."""
        group: dist.ProcessGroup = dist.new_group(
            [self.rank], timeout=self.timeout, use_local_synchronization=True, group_desc="alone"
        )
        return group


def make_axis(name: str, groups: list[list[int]], rank: int, timeout: timedelta) -> Axis:
    """Make the group with this rank, of groups that partition the world or some of it. Collective over the world.

    One call for each axis, however large the world: NCCL splits the world's communicator into all groups at once;
    elsewhere the members of a group make it by themselves. A rank that is in no group makes one of its own: torch names
    a group by its members and by how many groups a process has made, so all processes must have made the same number.
    """
    if all(len(ranks) == 1 for ranks in groups):
        return Axis(name, ranks=(rank,))
    mine = next((ranks for ranks in groups if rank in ranks), [rank])
    if _can_split():
        group = dist.split_group(split_ranks=[r for r in groups if len(r) > 1], timeout=timeout, group_desc=name)
    else:
        group = dist.new_group(mine, timeout=timeout, use_local_synchronization=True, group_desc=f"{name}{mine[0]}")
    return Axis(name, len(mine), mine.index(rank), tuple(mine), group if len(mine) > 1 else None)


def _can_split() -> bool:
    """Whether the world's group has a device of its own, whose communicator NCCL can split."""
    world = dist.group.WORLD
    return world is not None and world.bound_device_id is not None
