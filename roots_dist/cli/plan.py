"""`roots plan` on the command line: memory, traffic and time of a layout before any process is started."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from roots_dist.cli.arguments import ConfigArgument, Overrides
from roots_dist.cli.options import with_options

if TYPE_CHECKING:
    from roots_dist.config.schema import Config
    from roots_dist.layout import Layout


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of the prediction and of its output."""

    processes: Annotated[
        int | None,
        typer.Option(min=1, max=1 << 24, help="processes of the whole run [default: tp × cp × pp]", show_default=False),
    ] = None
    profile: Annotated[
        Path | None,
        typer.Option(
            help="cluster profile of roots doctor --json, to predict time", metavar="FILE", show_default=False
        ),
    ] = None
    gpu_memory: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1 << 20,
            help="memory of each GPU in GiB: exit code 1 if a process needs more [default: any GPU that there is]",
            metavar="GIB",
            show_default=False,
        ),
    ] = None
    measure: Annotated[bool, typer.Option("--measure", help="with --profile: time a rank's passes on this device")] = (
        False
    )
    json: Annotated[
        Path | None, typer.Option(help="also write the numbers here", metavar="FILE", show_default=False)
    ] = None


@with_options
def plan(
    config: ConfigArgument,
    options: PlanOptions,
    overrides: Overrides = None,
) -> None:
    """Predict what each process of a layout holds and sends in a step and, with a cluster profile, how long it takes.

    Each kind of pipeline rank runs a step on shapes alone, so a laptop plans thousands of GPUs in seconds. The exit
    code is 1 if the layout does not fit.

    \b
    roots plan configs/bloom-176b.yaml --processes 384 --gpu-memory 80
    roots plan configs/quickstart.yaml parallel.pp=1 parallel.tp=4 \\
        --profile cluster.json
    """
    from json import dumps
    from shutil import get_terminal_size

    from roots_dist.checks.facts import free_memory
    from roots_dist.cli.read_config import read_config
    from roots_dist.cli.terminal import busy
    from roots_dist.errors import UserError
    from roots_dist.files import write_output
    from roots_dist.runs.ranks.run_on_ranks import ready

    loaded = read_config(config, overrides or ())
    parallel = loaded.config.parallel
    layout = ready(loaded, options.processes or parallel.least_ranks(), local_size=None)
    cluster = None
    if options.profile is not None:
        from roots_dist.cluster_profile import read
        from roots_dist.runs.plan.cluster_speed import cluster_speed_of, measure_op_overhead

        cluster = cluster_speed_of(read(options.profile), measure_op_overhead())
    elif options.measure:
        raise UserError(
            "--measure: expected --profile FILE too, for the time of messages. Fix: run roots doctor --json FILE first."
        )
    from roots_dist import logs
    from roots_dist.runs.plan.plan_table import GPUS_GIB, SET_ASIDE, facts, fits, lines
    from roots_dist.runs.plan.predict import predict
    from roots_dist.runs.ranks.join import device_for

    logs.ignore_warnings_of_libraries()
    device = device_for(loaded.config, local_rank=0) if options.measure else None
    with busy("planning"):
        found = predict(loaded.config, layout, cluster, device)
    gpus = GPUS_GIB if options.gpu_memory is None else [options.gpu_memory]
    free = free_memory() if loaded.config.train.device == "cpu" and options.gpu_memory is None else None
    does, _ = fits(found, free, gpus)
    way = None
    if not does and free is None:
        from dataclasses import replace

        from roots_dist.runs.plan.advice import changes_that_fit

        def layout_of(changed: Config, size: int) -> Layout:
            return ready(replace(loaded, config=changed), size, local_size=None)

        room = gpus[-1] * 2**30 - SET_ASIDE
        with busy("looking for a change that fits"):
            way = changes_that_fit(loaded.config, options.processes, room, layout_of)
            if way is None and options.processes is not None:  # with more of them, perhaps
                way = changes_that_fit(loaded.config, None, room, layout_of)
    typer.echo("\n".join(lines(found, cluster, free, get_terminal_size((200, 24)).columns, gpus, way)))
    from roots_dist.checks.remarks import remarks

    for remark in remarks(loaded.config, layout, None):
        typer.echo(remark)
    if options.json is not None:
        content, fix = dumps(facts(found), indent=1) + "\n", "name another file; the plan above is complete"
        write_output("--json", options.json, content, fix)
    if not does:
        raise typer.Exit(1)
