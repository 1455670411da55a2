"""Join the world that a launcher described: device, threads, process group, and the groups of the layout.

environment.World + Layout --joined--> Mesh, until the run is over
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from roots_dist import environment, logs
from roots_dist.config.schema import Config
from roots_dist.environment import World
from roots_dist.layout import Layout
from roots_dist.world.mesh import Mesh


def device_for(config: Config, local_rank: int) -> torch.device:
    """Device of a rank, by its number on this machine; GPU 0 where a launcher shows each rank only its own GPU."""
    kind = config.train.device
    if kind == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_rank % torch.cuda.device_count())


@contextmanager
def joined(config: Config, world: World, layout: Layout) -> Iterator[Mesh]:
    """Join the world for the duration of the body. Collective over the world.

    Nothing is torn down on failure: peers may hang, and guarded() ends the process.
    """
    device = device_for(config, world.local_rank)
    timeout = timedelta(seconds=config.advanced.timeout_s)
    # DeepSpeed reads the world only from these variables, and would choose an accelerator by itself
    environment.export(environment.variables(world) | {"DS_ACCELERATOR": device.type})
    torch.set_num_threads(config.advanced.threads or max(1, environment.cores() // world.local_size))
    logs.ignore_warnings_of_libraries()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    live = world.size > 1 or config.engine(layout.dp_cp) == "deepspeed"
    if live:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=None if world.size > 1 else dist.HashStore(),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    yield Mesh.connect(layout, world.rank, device, timeout)
    if live:
        dist.barrier()  # no rank closes its connections while others still read
        dist.destroy_process_group()
