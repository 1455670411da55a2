"""Facts that every rank of a run must have in common, as texts by name: compared by handshake.py before the first step.

    config, corpus, code, versions, layout --fingerprint--> {part: {name: text}} --digests--> {part: digest}

A digest for each part is sent by every rank; names and texts only if digests differ, so that one of them can be named.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import torch

from roots_dist import environment
from roots_dist.config.schema import Config
from roots_dist.files import why
from roots_dist.idx_format import MANIFEST
from roots_dist.scrub import known_secrets, scrub_text

Fingerprint = Mapping[str, Mapping[str, str]]

PACKAGE = Path(__file__).resolve().parents[2]
OWN_KEYS = frozenset({"advanced.threads"})
"""Keys that may differ, because machines do."""
PACKAGES = ("torch", "deepspeed", "numpy", "safetensors", "tokenizers", "transformers", "pydantic", "triton")
"""Packages that compute, read or write what ranks share."""
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "MKL_CBWR",
    "NCCL_ALGO",
    "NCCL_NVLS_ENABLE",
    "NCCL_PROTO",
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
)
"""Environment variables that change numbers, or how messages are cut."""
WHOLE_BYTES = 1 << 22
"""Files up to this size are read whole; of larger ones BLOCKS blocks, evenly spaced, and the size are compared."""
BLOCKS, BLOCK_BYTES = 64, 4096
FILES = 64
"""Files of a folder that are read; of others the names and sizes are compared."""
SHOWN = 80
"""Characters of a value that are shown."""


def fingerprint(config: Config, layout: str, device: torch.device, said: Sequence[str] = ()) -> Fingerprint:
    """Fingerprint of this rank. layout: of the world as this rank knows it; said: the command, and its options if they
    are not in the config."""
    return {
        "layout": {"layout": layout, "device": device.type},
        "command": {"command": " ".join(said)},
        "config": of_config(config),
        "versions": of_versions(),
        "code": of_code(),
        "corpus": of_files(paths_of(config)),
        "environment": {name: environment.all_variables().get(name, "") for name in VARIABLES},
    }


def digests(found: Fingerprint) -> dict[str, str]:
    """One digest for each part."""
    return {part: _digest(json.dumps(values, sort_keys=True).encode()) for part, values in found.items()}


def of_config(config: Config) -> dict[str, str]:
    """The value of each key as JSON."""
    tree, secrets = config.model_dump(mode="json"), known_secrets()
    return {
        f"{section}.{key}": scrub_text(json.dumps(value, ensure_ascii=False), secrets)
        for section, keys in tree.items()
        for key, value in keys.items()
        if f"{section}.{key}" not in OWN_KEYS
    }


def of_versions() -> dict[str, str]:
    """Versions of Python, of CUDA, and of the packages that are installed."""
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def of_code(package: Path = PACKAGE) -> dict[str, str]:
    """A digest of each file of this package."""
    return {str(path.relative_to(package.parent)): _content(path) for path in sorted(package.rglob("*.py"))}


def paths_of(config: Config) -> Iterator[Path]:
    """Files and folders that a run reads on every rank: its sources, their manifests, and the tokenizer."""
    for source in (*config.data.train, *config.data.validation):
        prefix = Path(source.path)
        if prefix.exists():
            yield prefix
        yield from (path for path in (Path(f"{prefix}.bin"), Path(f"{prefix}.idx")) if path.exists())
        yield prefix.parent / MANIFEST
    if config.data.tokenizer is not None:
        yield Path(config.data.tokenizer)


def of_files(paths: Iterator[Path]) -> dict[str, str]:
    """Size and a digest of each file, by its path; a folder stands for its files."""
    found: dict[str, str] = {}
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.is_file())
            found |= {str(file): _content(file) for file in inside[:FILES]}
            found |= {str(file): f"{file.stat().st_size} bytes" for file in inside[FILES:]}
        elif path.is_file():
            found[str(path)] = _content(path)
        else:
            found[str(path)] = "not there"
    return found


def _content(path: Path) -> str:
    """Size and digest of a file; of a large one only of some blocks, so that terabytes cost milliseconds."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            if size <= WHOLE_BYTES:
                return f"{size} bytes, digest {_digest(file.read())}"
            read = b""
            for number in range(BLOCKS):
                file.seek(number * (size - BLOCK_BYTES) // (BLOCKS - 1))
                read += file.read(BLOCK_BYTES)
            return f"{size} bytes, digest {_digest(read)} of {BLOCKS} blocks"
    except OSError as error:
        return f"not readable ({why(error)})"


def _digest(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def shown(value: str) -> str:
    """A value for a message."""
    return value if len(value) <= SHOWN else f"{value[:SHOWN]}…"
