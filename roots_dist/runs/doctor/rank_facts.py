"""Facts about each rank and its machine, and findings where the ranks' facts differ or are bad.

gather, on every rank --RankFacts--> coordinator --> versions, devices, addresses, check_space: pure, on rank 0
"""

from __future__ import annotations

import hashlib
import platform
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from roots_dist import environment
from roots_dist.accounting.memory import GIB
from roots_dist.checks.facts import free_memory, version_of
from roots_dist.cluster_profile import Finding, RankFacts, format_ranks, hosts_of
from roots_dist.runs.ranks import torch_settings
from roots_dist.runs.ranks.rendezvous import own_address

if TYPE_CHECKING:
    import torch

PACKAGE = Path(__file__).resolve().parents[2]
SHARED_MEMORY = Path("/dev/shm")
DRIVER = Path("/proc/driver/nvidia/version")
FIXES = {
    "python": "start all ranks with one Python, by its full path",
    "torch": "install torch {usual} there, or let all hosts use one environment on a shared folder",
    "deepspeed": "install deepspeed {usual} there, or let all hosts use one environment on a shared folder",
    "roots_dist": "install roots_dist {usual} there",
    "code": "copy the same files of roots_dist there (git status says what was changed)",
    "cuda": "install the same build of torch there",
    "nccl": "install the same build of torch there; LD_LIBRARY_PATH may put another NCCL before it",
    "driver": "install NVIDIA driver {usual} there, or leave that host out",
}
"""Versions that must be equal on all ranks -> the fix if they are not."""
DISK_LEAST = GIB
SHARED_MEMORY_LEAST = 2**26
"""Bytes per rank of a host: NCCL's buffers within a host are there, and docker gives 64 MB to all ranks together."""


def gather(rank: int, device: torch.device, host: str) -> RankFacts:
    """Facts of this process and its machine, under the host name `host`."""
    import torch

    cuda = device.type == "cuda"
    versions: dict[str, str | None] = {name: version_of(name) for name in ("torch", "deepspeed", "roots_dist")}
    versions |= {"python": platform.python_version(), "code": code_hash(PACKAGE)}
    versions |= {"cuda": torch.version.cuda, "nccl": _nccl() if cuda else None, "driver": driver_version()}
    return RankFacts(
        rank=rank,
        host=host,
        device=torch.cuda.get_device_name(device) if cuda else "cpu",
        gpu=str(torch.cuda.get_device_properties(device).uuid) if cuda else None,
        gpus=environment.gpus(),
        versions=versions,
        cores=environment.cores(),
        threads=torch.get_num_threads(),
        settings=torch_settings.in_words(device.type, torch.backends.cuda.matmul.allow_tf32),
        memory_free=free_memory(),
        disk_free=shutil.disk_usage(tempfile.gettempdir()).free,
        shared_memory_free=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else None,
        address=None if environment.is_set("GLOO_SOCKET_IFNAME") else own_address(host),
    )


def code_hash(folder: Path) -> str:
    """Hash of all Python files below a folder, with their names: twelve hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=6)
    for path in sorted(folder.rglob("*.py")):
        for part in (str(path.relative_to(folder)).encode(), path.read_bytes()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def driver_version() -> str | None:
    """Version of NVIDIA's kernel module; None if there is none."""
    try:
        found = re.search(r"Kernel Module(?: +for \S+)? +([\d.]+)", DRIVER.read_text())
    except OSError:
        return None
    return found[1] if found else None


def versions(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Findings for ranks whose versions differ from most ranks'; in a tie the version of the lowest rank counts as
    usual."""
    hosts = hosts_of(ranks)
    for name, fix in FIXES.items():
        values = {facts.rank: facts.versions.get(name) for facts in sorted(ranks, key=lambda facts: facts.rank)}
        usual, agree = Counter(values.values()).most_common(1)[0]  # in a tie the first
        for other in sorted({v for v in values.values() if v != usual}, key=str):
            differing = [rank for rank, value in values.items() if value == other]
            yield Finding(
                check="versions",
                where=format_ranks(differing, hosts),
                found=f"{name} {other or 'missing'}",
                expected=f"{usual or 'none'} as on {agree} of {len(values)} ranks",
                fix=fix.format(usual=usual),
            )


def devices(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Findings for GPUs that torch cannot use, ranks that share a GPU, and devices of several kinds."""
    hosts = hosts_of(ranks)
    unused = [facts.rank for facts in ranks if facts.gpus and facts.device == "cpu"]
    if unused and len(unused) < len(ranks):  # if all ranks do, train.device=cpu was chosen
        yield Finding(
            check="devices",
            where=format_ranks(unused, hosts),
            found="computes on the CPU although its host has GPUs",
            expected="a GPU, as the other ranks have",
            fix="run python -c 'import torch; torch.cuda.init()' there, which prints why torch cannot use it",
        )
    on: dict[tuple[str, str], list[int]] = {}
    for facts in ranks:
        if facts.gpu is not None:
            on.setdefault((facts.host, facts.gpu), []).append(facts.rank)
    for (_, gpu), sharing in on.items():
        if len(sharing) > 1:
            yield Finding(
                check="devices",
                where=format_ranks(sharing, hosts),
                found=f"on one GPU, {gpu}",
                expected="one GPU per rank, which NCCL requires",
                fix="start only as many ranks on a host as it has GPUs",
            )
    kinds = Counter(facts.device for facts in sorted(ranks, key=lambda facts: facts.rank))
    usual = kinds.most_common(1)[0][0]
    for kind in sorted(kinds.keys() - {usual}):
        yield Finding(
            check="devices",
            where=format_ranks([facts.rank for facts in ranks if facts.device == kind], hosts),
            found=f"device {kind}",
            expected=f"{usual} as on most ranks",
            fix="the slowest kind determines the speed; leave its hosts out if they are few",
            serious=False,
        )


def addresses(ranks: Sequence[RankFacts], backend: str) -> Iterator[Finding]:
    """Findings for hosts whose name resolves to themselves: gloo would tell the others to connect to their own
    machine."""
    if backend != "gloo" or len({facts.host for facts in ranks}) == 1:
        return
    for facts in first_rank_of_each_host(ranks):
        if facts.address is not None and facts.address.startswith("127."):
            yield Finding(
                check="addresses",
                where=f"host {facts.host}",
                found=f"its name resolves to {facts.address}, which other hosts take for themselves",
                expected="an address that they can reach",
                fix="set GLOO_SOCKET_IFNAME to the network interface (ip addr lists them), or fix /etc/hosts there",
            )


def check_space(ranks: Sequence[RankFacts]) -> Iterator[Finding]:
    """Findings for hosts whose temporary folder or shared memory is nearly full."""
    for facts in first_rank_of_each_host(ranks):
        here = sum(other.host == facts.host for other in ranks)
        if facts.disk_free < DISK_LEAST:
            yield Finding(
                check="room",
                where=f"host {facts.host}",
                found=f"{facts.disk_free / 2**20:.0f} MiB left in its temporary folder",
                expected=f"{DISK_LEAST / 2**20:.0f} MiB or more",
                fix="free some space there, or set TMPDIR to a larger folder",
            )
        if facts.gpu and facts.shared_memory_free is not None and facts.shared_memory_free < SHARED_MEMORY_LEAST * here:
            yield Finding(
                check="room",
                where=f"host {facts.host}",
                found=f"{facts.shared_memory_free / 2**20:.0f} MiB left in {SHARED_MEMORY}",
                expected=f"{SHARED_MEMORY_LEAST * here / 2**20:.0f} MiB for NCCL between its {here} ranks",
                fix="start the container with a larger one (docker run --shm-size=8g, or --ipc=host)",
            )


def first_rank_of_each_host(ranks: Sequence[RankFacts]) -> list[RankFacts]:
    """The lowest rank of each host, in order of ranks."""
    first: dict[str, RankFacts] = {}
    for facts in sorted(ranks, key=lambda facts: facts.rank):
        first.setdefault(facts.host, facts)
    return list(first.values())


def _nccl() -> str:
    import torch

    return ".".join(map(str, torch.cuda.nccl.version()))
