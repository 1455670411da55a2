"""Settings that torch reads once, before its first process group and its first tensor on a GPU, and never again.

    joined() --export, unless the user has set them--> torch;  in_words() --> `roots doctor`

| variable | why |
|---|---|
| TORCH_FR_BUFFER_SIZE | the flight recorder is on, so that a hang has a name (flight_recorder.py) |
| PYTORCH_CUDA_ALLOC_CONF | segments that grow: tensors of many sizes, as gathered pieces are, leave no gaps |
"""

from __future__ import annotations

from collections.abc import Mapping

from roots_dist import environment
from roots_dist.runs.ranks import flight_recorder

ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Names of one variable: torch reads the first that is set."""
GROWING = "expandable_segments:True"


def export(device: str) -> None:
    """Set them for a rank on this kind of device, where nobody else has."""
    environment.export(settings(device, environment.all_variables()), replace=False)


def settings(device: str, found: Mapping[str, str]) -> dict[str, str]:
    """Variables that a rank sets in addition to those that are found."""
    is_free = not any(name in found for name in ALLOCATOR)
    return flight_recorder.SIZE | ({ALLOCATOR[0]: GROWING} if device == "cuda" and is_free else {})


def in_words(device: str, tf32: bool) -> dict[str, str]:
    """Settings with which a rank computes. tf32: True if torch may round the factors of float32 products to TF32."""
    found = environment.all_variables()
    found = settings(device, found) | found
    words = {"flight recorder": f"{found['TORCH_FR_BUFFER_SIZE']} operations"}
    if device == "cuda":
        words["allocator"] = next(found[name] for name in ALLOCATOR if name in found)
        words["TF32"] = "on" if tf32 else "off"
    return words
