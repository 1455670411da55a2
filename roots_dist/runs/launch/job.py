"""A job for a cluster, checked: which config, on how many nodes with how many processes each, and what the site asks for.

command line --make--> Job --launchers.py--> Plan --submit.py--> written, shown, begun
"""

from __future__ import annotations

import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from roots_dist.config.load import Loaded, read
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.runs.launch import hosts as hostfiles
from roots_dist.runs.launch.hosts import Host
from roots_dist.runs.launch.quoting import argument, no_option, refused, variable
from roots_dist.runs.ranks.local import SIGNALS
from roots_dist.runs.ranks.run_on_ranks import ready
from roots_dist.runs.ranks.verb import Verb

OF_THE_NODES = frozenset({"train.device", "model"})
"""Of what is checked before a job is begun: GPUs and memory are the nodes' business, not this machine's."""
TIME = re.compile(r"([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{2}){0,2}")

RESTARTS = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""torch elastic 2.13 gives a restarted group the old one's store, in which keys of the dead still stand."""
ONLY_FOR = {
    "meet": ("torchrun",),
    "runner": ("deepspeed", "mpi"),
    "max_restarts": ("torchrun", "slurm", "kubernetes"),
    "grace": ("torchrun", "slurm", "kubernetes"),
    "program": ("slurm", "mpi", "kubernetes"),
    "template": ("slurm", "kubernetes"),
    **dict.fromkeys(("time", "partition", "account", "array", "spare"), ("slurm",)),
    **dict.fromkeys(("image", "claim", "namespace", "kind"), ("kubernetes",)),
}
"""Option -> the launchers that it says something to."""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """The options of `roots launch`, as they were given."""

    on: str
    nodes: int | None = None
    per_node: int | None = None
    gpus: bool = False
    hostfile: Path | None = None
    include: str | None = None
    exclude: str | None = None
    runner: str | None = None
    meet: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    array: int | None = None
    spare: int = 0
    max_restarts: int = 0
    grace: int = 120
    name: str | None = None
    env: tuple[str, ...] = ()
    image: str | None = None
    namespace: str = "default"
    claim: str | None = None
    kind: str = "job"
    python: str | None = None
    program: str | None = None
    extra: tuple[str, ...] = ()
    template: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """Every text in it is one line; none of it has been read by a shell."""

    wishes: Wishes
    verb: str
    words: tuple[str, ...]
    """CONFIG and overrides."""
    layout: Layout
    nodes: int
    per_node: int
    hosts: tuple[Host, ...]
    """Those to run on, where a hostfile names them."""
    gpus: bool
    """One for each process."""
    name: str
    directory: Path
    """That paths are relative to, on every node."""
    folder: Path
    """Of the run; what is written for the launcher goes into its subfolder `launch`."""
    python: str
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def command(self) -> tuple[str, ...]:
        """What each rank runs, after `python`."""
        return ("-m", "roots_dist", self.verb, *self.words)

    def agent(self, handed_on: str = SIGNALS) -> tuple[str, ...]:
        """Options of a node's torchrun, but for how it meets the others."""
        return (
            f"--nproc-per-node={self.per_node}",
            f"--max-restarts={self.wishes.max_restarts}",
            f"--signals-to-handle={handed_on}",
            f"--shutdown-timeout={self.wishes.grace}",
        )

    @property
    def variables(self) -> dict[str, str]:
        """Of every rank that a torchrun starts."""
        return {**(RESTARTS if self.wishes.max_restarts else {}), **self.env}

    @property
    def files(self) -> Path:
        return self.folder / "launch"

    @property
    def port(self) -> int:
        """Where the ranks meet, if nobody says: the same on every machine, another for another run."""
        return 29400 + zlib.crc32(str(self.folder).encode()) % 1000


@dataclass(frozen=True, kw_only=True)
class Plan:
    command: tuple[str, ...]
    logs: str
    """Where what is said can be read."""
    files: Mapping[Path, str] = field(default_factory=dict)
    """To be written before, whole."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the command, beside what is set already."""
    unset: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def make(
    verb_for: Callable[[Config], Verb], subject: str, overrides: Sequence[str], wishes: Wishes, directory: Path
) -> Job:
    """Raises UserError with all that is wrong with the config on that many processes, or the first wrong option."""
    _heard(wishes)
    words = (
        argument("CONFIG", no_option(subject)),
        *(argument(f"override {i}", o) for i, o in enumerate(overrides, 1)),
    )
    asked = read(subject, overrides)
    verb = verb_for(asked.config)
    hosts = _hosts(wishes)
    nodes = len(hosts) or wishes.nodes or 1
    per_node = hostfiles.slots_of_each(hosts) if hosts else wishes.per_node or _of_each(asked.config, nodes)
    loaded, layout = _checked(verb, subject, overrides, nodes * per_node, wishes.on)
    if wishes.time is not None and seconds(wishes.time) <= wishes.grace:
        raise refused(
            "--time",
            wishes.time,
            f"more than --grace {wishes.grace} s, after which it is told to stop",
            "give it more time",
        )
    for option in ("partition", "account", "program", "python", "image", "claim"):
        if (value := getattr(wishes, option)) is not None:
            argument(f"--{option}", value)
    for extra in wishes.extra:
        argument("--extra", extra)
    return Job(
        wishes=wishes,
        verb=verb.name,
        words=words,
        layout=layout,
        nodes=nodes,
        per_node=per_node,
        hosts=hosts,
        gpus=wishes.gpus or loaded.config.train.device == "cuda",
        name=argument("--name", wishes.name) if wishes.name is not None else _name(Path(subject).stem),
        directory=Path(argument("the current folder", str(directory))),
        folder=Path(argument("track.folder", no_option(loaded.config.track.folder))),
        python=wishes.python or sys.executable,
        env=dict(map(variable, wishes.env)),
    )


def _checked(verb: Verb, subject: str, overrides: Sequence[str], size: int, on: str) -> tuple[Loaded, Layout]:
    """The files too, which the nodes see as this machine does; not so on Kubernetes, where they lie in a volume."""
    here = on != "kubernetes"
    loaded = verb.fit(verb.read(subject, overrides), size)
    layout = ready(loaded, size, local_size=1 if here else None, ignored_keys=OF_THE_NODES)
    if here:
        verb.check(loaded.config)
    return loaded, layout


def seconds(time: str) -> int:
    """Of a time as Slurm writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM or D-HH:MM:SS. Raises UserError."""
    if not TIME.fullmatch(time):
        raise refused("--time", time, "minutes, HH:MM:SS or D-HH:MM:SS", "write it so")
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:
        hours, minutes, secs = [*parts, 0, 0][:3]
        return ((int(days) * 24 + hours) * 60 + minutes) * 60 + secs
    if len(parts) == 1:
        return parts[0] * 60
    hours, minutes, secs = parts if len(parts) == 3 else (0, *parts)
    return (hours * 60 + minutes) * 60 + secs


def _heard(wishes: Wishes) -> None:
    """An option that does nothing is a mistake: who asks for restarts counts on them. So is a variable of a shell that is empty."""
    for option in fields(wishes):
        key, value = f"--{option.name.replace('_', '-')}", getattr(wishes, option.name)
        launchers = ONLY_FOR.get(option.name, (wishes.on,))
        if value != option.default and wishes.on not in launchers:
            found = str(value) if isinstance(value, Path) else value
            raise refused(
                key, found, f"nothing with --on {wishes.on}", f"leave it out, or choose {' or '.join(launchers)}"
            )
        if option.name not in ("include", "exclude") and (value == "" or (isinstance(value, tuple) and "" in value)):
            raise refused(key, "", "a text", f"leave {key} out, or fill it")


def _hosts(wishes: Wishes) -> tuple[Host, ...]:
    if wishes.hostfile is None:
        for option in ("include", "exclude"):
            if getattr(wishes, option) is not None:
                raise refused(
                    f"--{option}", getattr(wishes, option), "a hostfile to choose from", "add --hostfile FILE"
                )
        return ()
    if wishes.on not in ("deepspeed", "mpi"):
        expected = f"nothing with --on {wishes.on}, which finds its machines by itself"
        raise refused("--hostfile", str(wishes.hostfile), expected, "leave it out, or choose deepspeed or mpi")
    for option, value in (("--nodes", wishes.nodes), ("--processes-per-node", wishes.per_node)):
        if value is not None:
            raise refused(
                option,
                value,
                "nothing beside --hostfile, whose lines and slots say it",
                "choose with --include HOST:0,1",
            )
    argument("--hostfile", str(wishes.hostfile))
    return hostfiles.choose(hostfiles.read(wishes.hostfile), wishes.include, wishes.exclude)


def _of_each(config: Config, nodes: int) -> int:
    """As many as one replica of the model needs, if that many can be shared out."""
    model = config.parallel.tp * config.parallel.pp
    if model % nodes:
        expected = (
            f"a number, since the {model} processes of one replica (tp × pp) cannot be shared out among {nodes} nodes"
        )
        raise refused("--processes-per-node", None, expected, "add --processes-per-node N")
    return model // nodes


def _name(stem: str) -> str:
    """A name for the job that every launcher takes."""
    return re.sub(r"[^a-z0-9]+", "-", stem.lower()).lstrip("-0123456789")[:40].strip("-") or "roots"
