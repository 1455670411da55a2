"""The device mesh of a running rank: one Axis per dimension of the layout, each with its process group.

    environment.World + layout.Layout --connect--> Mesh, passed explicitly; a layer receives only the Axis it uses

The only file that creates process groups: a bare `new_group` would not inherit the world's timeout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist

from roots_dist.layout import AxisName, Coordinates, Layout
from roots_dist.world.progress import Progress


@dataclass(frozen=True)
class Axis:
    """One dimension of the mesh as one rank sees it. An axis of size 1 has no group, and its collectives return their
    input."""

    name: str
    size: int = 1
    rank: int = 0
    ranks: tuple[int, ...] = (0,)
    group: dist.ProcessGroup | None = field(default=None, repr=False)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce over the axis, in place and outside autograd: layers use parallel/tensor/collectives.py."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor


SINGLE = Axis("single")
BACKGROUND = "background"
"""Title of the group in which the second threads of all ranks meet."""


@dataclass(frozen=True)
class Mesh:
    """The axes of one rank, its place in the layout, and its device."""

    layout: Layout
    rank: int
    device: torch.device
    timeout: timedelta
    tp: Axis
    pp: Axis
    dp: Axis
    """Ranks that read different samples."""
    cp: Axis
    """Ranks that hold different positions of the same samples."""
    dp_cp: Axis
    """dp × cp: ranks that hold the same parameters. Gradients are summed over them."""
    ep: Axis
    """Ranks of dp_cp that hold different experts of the same layers."""
    edp: Axis
    """Ranks of dp_cp that hold the same experts: what dp_cp is for other parameters."""
    shard: Axis
    """Ranks of dp_cp over which ZeRO shards: all, or some neighbours (parallel.zero_ranks)."""
    replica: Axis
    """Ranks of dp_cp that hold the same shards."""
    model: Axis
    """The ranks that together hold one replica of the model: pp × tp."""
    world: Axis
    progress: Progress = field(default_factory=Progress)
    """Current activity of this rank, for the thread that watches it."""

    @property
    def place(self) -> Coordinates:
        return self.layout.place(self.rank)

    @staticmethod
    def single(device: torch.device = torch.device("cpu")) -> Mesh:
        """Mesh of a single process: the 1×1×1×1 layout of the same code."""
        return Mesh.connect(Layout(), 0, device)

    @staticmethod
    def connect(
        layout: Layout,
        rank: int,
        device: torch.device = torch.device("cpu"),
        timeout: timedelta = timedelta(minutes=10),
        progress: Progress | None = None,
    ) -> Mesh:
        """Create every group of the layout. Collective over the world; the default group must exist if the world size
        is above 1."""

        def axis(name: str, groups: list[list[int]]) -> Axis:
            return make_axis(name, groups, rank, timeout)

        def along(name: AxisName) -> Axis:
            return axis(name, layout.groups(name))

        tp, pp, dp, cp = along("tp"), along("pp"), along("dp"), along("cp")
        both = along("dp_cp") if min(layout.dp, layout.cp) > 1 else cp if layout.cp > 1 else dp
        ep = both if layout.ep == layout.dp_cp else along("ep")
        edp = both if layout.ep == 1 else along("edp")
        shard = both if layout.replica == 1 else along("shard")
        world = Axis("world")
        if layout.world_size > 1:
            world = Axis("world", layout.world_size, rank, tuple(range(layout.world_size)), dist.group.WORLD)
        return Mesh(
            layout=layout,
            rank=rank,
            device=device,
            timeout=timeout,
            tp=tp,
            pp=pp,
            dp=dp,
            cp=cp,
            dp_cp=both,
            ep=ep,
            edp=edp,
            shard=shard,
            replica=Axis("replica", ranks=(rank,)) if layout.replica == 1 else along("replica"),
            model=axis("model", layout.model_groups()),
            world=world,
            progress=progress or Progress(),
        )

    def holders(self, of_expert: bool) -> Axis:
        """Ranks that hold the same parameters, of experts or others: gradients are summed over them."""
        return self.edp if of_expert else self.dp_cp

    def shards(self, of_expert: bool) -> Axis:
        """Ranks over which ZeRO cuts parameters, of experts or others. Experts that are cut over ranks are cut over all
        that hold the same ones."""
        return self.edp if of_expert and self.layout.ep > 1 else self.shard

    def new_pp_axis(self, name: str) -> Axis:
        """Create a second pipeline axis with its own group. Collective over the world."""
        return make_axis(name, self.layout.groups("pp"), self.rank, self.timeout)

    def tie_axis(self, name: str, holders: Sequence[int], *, over_data: bool = True) -> Axis:
        """Create an axis over the pipeline ranks that share a parameter, with all of their ranks of dp_cp or with the
        same one only; it has size 1 on other ranks. Collective over the world."""
        layout = self.layout
        data = [(dp, cp) for dp in range(layout.dp) for cp in range(layout.cp)]
        together = [data] if over_data else [[one] for one in data]
        groups = [
            [layout.rank(pp, dp, tp, cp) for pp in holders for dp, cp in ranks]
            for tp in range(layout.tp)
            for ranks in together
        ]
        return make_axis(name, groups, self.rank, self.timeout)

    def for_background(self) -> Mesh:
        """Create the mesh of a second thread of each rank. Its world has a group of its own, over gloo in CPU memory,
        so that what these threads send each other never mixes with what the main threads do; its other axes, which
        are the main thread's, are not to be used. Collective over the world."""
        world = self.world
        if world.size > 1:
            group = dist.new_group(backend="gloo", timeout=self.timeout, group_desc=BACKGROUND)
            world = replace(world, name=BACKGROUND, group=group)
        return replace(self, device=torch.device("cpu"), world=world, progress=Progress())

    def single_rank_group(self) -> dist.ProcessGroup:
        """Create a group of this rank only, for a library that requires a group where an Axis of size 1 has none."""
        group: dist.ProcessGroup = dist.new_group(
            [self.rank], timeout=self.timeout, use_local_synchronization=True, group_desc="alone"
        )
        return group


def make_axis(name: str, groups: list[list[int]], rank: int, timeout: timedelta) -> Axis:
    """Create the group of disjoint groups that contains this rank, and return its axis. Collective over the world.

    There is one call per axis, however large the world: NCCL splits the world's communicator into all groups at once;
    otherwise the members of a group create it by themselves. A rank outside all groups gets one of its own: torch
    names a group by its members and by the number of groups that the process has, so all processes must have equally
    many, or the members of a later group look for each other under different names and wait until the timeout.
    """
    if all(len(ranks) == 1 for ranks in groups):
        return Axis(name, ranks=(rank,))
    mine = next((ranks for ranks in groups if rank in ranks), [rank])
    if _can_split():
        inside = {member for ranks in groups for member in ranks}
        outside = [[other] for other in range(dist.get_world_size()) if other not in inside]
        group = dist.split_group(split_ranks=[*groups, *outside], timeout=timeout, group_desc=name)
    else:
        group = dist.new_group(mine, timeout=timeout, use_local_synchronization=True, group_desc=f"{name}{mine[0]}")
    return Axis(name, len(mine), mine.index(rank), tuple(mine), group if len(mine) > 1 else None)


def _can_split() -> bool:
    """True if the world's group is bound to a device, so that NCCL can split its communicator."""
    world = dist.group.WORLD
    return world is not None and world.bound_device_id is not None
