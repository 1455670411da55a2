"""The families: one row for each, and its trials in a file of its own."""

from __future__ import annotations

from . import background, damages, differs, disks, flips, hangs, kills, power
from .trial import Family

ALL = (
    kills.FAMILY,
    power.FAMILY,
    damages.FAMILY,
    disks.FAMILY,
    hangs.FAMILY,
    flips.FAMILY,
    differs.FAMILY,
    background.FAMILY,
)
FAMILIES: dict[str, Family] = {family.name: family for family in ALL}
