"""The families: one row for each, and its trials in a file of its own."""

from __future__ import annotations

from . import background, damages, differs, disks, flips, hangs, kills, launchers, power, ranks, signals, syscalls
from .trial import Family

ALL = (
    kills.FAMILY,
    background.FAMILY,
    ranks.FAMILY,
    launchers.FAMILY,
    signals.FAMILY,
    power.FAMILY,
    damages.FAMILY,
    disks.FAMILY,
    syscalls.FAMILY,
    hangs.FAMILY,
    hangs.SAVES_FAMILY,
    flips.FAMILY,
    flips.DEEPSPEED_FAMILY,
    differs.FAMILY,
)
FAMILIES: dict[str, Family] = {family.name: family for family in ALL}
