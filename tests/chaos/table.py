"""The families: one row for each, and its trials in a file of its own."""

from __future__ import annotations

from . import damages, hangs
from .trial import Family

FAMILIES: dict[str, Family] = {family.name: family for family in (damages.FAMILY, hangs.FAMILY)}
