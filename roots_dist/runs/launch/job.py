"""A job for a cluster, checked: which config, on how many nodes, with how many processes each, with which options.

JobOptions --make--> Job --launchers.py--> LaunchPlan --submit.py--> shown, written, begun
"""

from __future__ import annotations

import math
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from roots_dist.config.load import Loaded, read
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.runs.launch import hosts as hostfiles
from roots_dist.runs.launch import render
from roots_dist.runs.launch.hosts import Host
from roots_dist.runs.launch.options import HostfileOptions, JobOptions, SlurmOptions
from roots_dist.runs.launch.quoting import argument, no_option, refused, variable
from roots_dist.runs.launch.render import Setting
from roots_dist.runs.ranks.command import Command
from roots_dist.runs.ranks.run_on_ranks import ready

OF_THE_NODES = frozenset({"train.device", "model"})
"""Keys that are not checked here: GPUs and memory are the nodes', not this machine's."""
TIME = re.compile(r"([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{2}){0,2}")


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job: what is run, where, and with which options. Every text in it is one line, which no shell has read."""

    options: JobOptions
    roots_command: str
    words: tuple[str, ...]
    """CONFIG and overrides."""
    layout: Layout
    nodes: int
    processes_per_node: int
    hosts: tuple[Host, ...]
    """The chosen hosts of the hostfile, if there is one."""
    gpus: bool
    """True if each process uses a GPU."""
    threads: int
    """CPU threads of each process, as advanced.threads says; 1 where it says nothing."""
    name: str
    directory: Path
    """The folder from which relative paths begin, on every node."""
    folder: Path
    """The run's folder. Its subfolder `launch` holds what is written for the launcher."""
    python: str
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> tuple[str, ...]:
        """Arguments of `python` on each rank."""
        return ("-m", "roots_dist", self.roots_command, *self.words)

    @property
    def files(self) -> Path:
        return self.folder / "launch"

    @property
    def port(self) -> int:
        """The default port of rank 0: the same on every machine, another one for another run."""
        return 29400 + zlib.crc32(str(self.folder).encode()) % 1000

    def script(self, settings: Mapping[str, Setting], *, variables: Mapping[str, str], comment: str = "") -> str:
        """The text of templates/LAUNCHER.sh, or of the site's own template, with these settings."""
        return render.script(
            f"{self.options.launcher}.sh",
            self.options.template,
            {"COMMAND": self.roots_command, **settings, "PYTHON": self.python},
            arguments=self.words,
            directory=self.directory,
            variables=variables,
            comment=comment,
        )


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """The actions of `roots launch`: write files, then become a command."""

    command: tuple[str, ...]
    logs: str
    """Place where the output can be read."""
    files: Mapping[Path, str] = field(default_factory=dict)
    unset: tuple[str, ...] = ()
    """Variables that are removed from the command's environment."""
    programs: Mapping[str, str] = field(default_factory=dict)
    """Programs that have to be there -> the option that names another one."""
    notes: tuple[str, ...] = ()


def make(
    command_for: Callable[[Config], Command],
    subject: str,
    overrides: Sequence[str],
    options: JobOptions,
    directory: Path,
) -> Job:
    """Check the config on as many processes, and the options. Raises UserError."""
    words = (
        argument("CONFIG", no_option(subject)),
        *(argument(f"override {i}", o) for i, o in enumerate(overrides, 1)),
    )
    asked = read(subject, overrides)
    command = command_for(asked.config)
    hosts = _hosts(options)
    nodes = len(hosts) or options.nodes or 1
    given = options.gpus_per_node or options.processes_per_node
    per_node = hostfiles.slots_of_each(hosts) if hosts else given or _default_per_node(asked.config, nodes)
    loaded, layout = _checked(command, subject, overrides, nodes * per_node, options.launcher)
    if isinstance(options, SlurmOptions) and options.time is not None and seconds(options.time) <= options.grace:
        expected = f"more than the {options.grace} s of --grace, since the job is signaled that long before its end"
        raise refused("--time", options.time, expected, "raise --time, or lower --grace")
    for option in ("partition", "account", "program", "python", "image", "pvc"):
        if (value := getattr(options, option, None)) is not None:
            argument(f"--{option}", value)
    for extra in options.extra:
        argument("--extra", extra)
    return Job(
        options=options,
        roots_command=command.name,
        words=words,
        layout=layout,
        nodes=nodes,
        processes_per_node=per_node,
        hosts=hosts,
        gpus=options.gpus_per_node is not None or loaded.config.train.device == "cuda",
        threads=loaded.config.advanced.threads or 1,
        name=argument("--name", options.name) if options.name is not None else _name(Path(subject).stem),
        directory=Path(argument("the current folder", str(directory))),
        folder=Path(argument("track.folder", no_option(loaded.config.track.folder))),
        python=options.python or sys.executable,
        env=dict(map(variable, options.env)),
    )


def _checked(
    command: Command, subject: str, overrides: Sequence[str], size: int, launcher: str
) -> tuple[Loaded, Layout]:
    """Check the config, and its files too, except on Kubernetes, where they lie in a volume that is not seen here."""
    here = launcher != "kubernetes"
    loaded = command.fit(command.read(subject, overrides), size)
    layout = ready(loaded, size, local_size=1 if here else None, ignored_keys=OF_THE_NODES, trains=command.trains)
    if here:
        command.check(loaded.config)
    return loaded, layout


def seconds(time: str) -> int:
    """Convert a time as Slurm writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. Raises UserError."""
    if not TIME.fullmatch(time):
        fix = "write it in one of these forms"
        if (meant := re.fullmatch(r"(\d+)\s*(m|h|d)\w*", time.lower())) is not None:
            number, unit = int(meant[1]), meant[2]
            fix = f"write --time {f'{number}-00' if unit == 'd' else f'{number:02}:00:00' if unit == 'h' else number}"
        raise refused("--time", time, "minutes, HH:MM:SS or D-HH:MM:SS", fix)
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + secs
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, secs = parts if len(parts) == 3 else (0, *parts)
    return (hours * 60 + minutes) * 60 + secs


def _hosts(options: JobOptions) -> tuple[Host, ...]:
    if not isinstance(options, HostfileOptions):
        return ()
    if options.hostfile is None:
        for option, value in (("--include", options.include), ("--exclude", options.exclude)):
            if value is not None:
                raise refused(option, value, "a hostfile to choose hosts from", "add --hostfile FILE")
        return ()
    for option, number in (
        ("--nodes", options.nodes),
        ("--processes-per-node", options.processes_per_node),
        ("--gpus-per-node", options.gpus_per_node),
    ):
        if number is not None:
            expected = "only one of it and --hostfile, which says it by its lines and slots"
            raise refused(option, number, expected, f"remove {option}, and choose with --include HOST:0,1")
    argument("--hostfile", str(options.hostfile))
    return hostfiles.choose(hostfiles.read(options.hostfile), options.include, options.exclude)


def _default_per_node(config: Config, nodes: int) -> int:
    """The processes of one replica of the model, shared out among the nodes."""
    model = config.parallel.least_ranks()
    if model % nodes:
        product = " × ".join(key.removeprefix("parallel.") for key in config.parallel.factors())
        expected = (
            f"a number: the {model} processes of one replica ({product}) cannot be shared out among {nodes} nodes"
        )
        each = model // math.gcd(model, nodes)
        fix = f"add --processes-per-node {each}, say, for {each * nodes} processes"
        raise refused("--processes-per-node", None, expected, fix)
    return model // nodes


def _name(stem: str) -> str:
    """Make a name for the job that every launcher accepts."""
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).lstrip("-0123456789")[:40].strip("-") or "roots"
