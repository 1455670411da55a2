"""Degrees of a small run: the nearest to those of the run that a laptop has processes for.

tp, pp, dp, cp --degrees--> at most MAX_RANKS ranks --ranks_of_experts, ranks_of_shards--> parts of dp × cp
"""

from __future__ import annotations

import math

MAX_RANKS = 12


def degrees(tp: int, pp: int, dp: int, cp: int = 1) -> tuple[int, int, int, int]:
    """Nearest degrees (tp, pp, dp, cp) with at most MAX_RANKS ranks. More than 2 data ranks are 3, which is no power of
    two, or 2 where 3 are too many; then the largest one of cp, pp and tp is halved."""
    dp = min(dp, 3)
    if dp == 3 and tp * pp * cp * dp > MAX_RANKS >= tp * pp * cp * 2:
        dp = 2
    while tp * pp * cp * dp > MAX_RANKS:
        if cp >= max(tp, pp) and cp > 2:
            cp = (cp + 1) // 2
        elif pp >= tp and pp > 2:
            pp = (pp + 1) // 2
        elif tp > 2:
            tp = 1 << ((tp + 1) // 2).bit_length() - 1  # heads are split by powers of two
        else:
            dp -= 1
    return tp, pp, dp, cp


def ranks_of_experts(ep: int, tp: int, pp: int, dp: int, cp: int) -> tuple[int, int]:
    """Nearest degrees (dp, ep) with at most MAX_RANKS ranks: up to 4 ranks with different experts, and where there are
    three data ranks or more two that hold the same, if they fit."""
    for small in (size for size in (4, 3, 2) if ep % size == 0 or size == 2):
        unit = small // math.gcd(small, cp)
        most = MAX_RANKS // (tp * pp * cp * unit)
        if most:
            return unit * min(most, 2 if dp > 2 else 1), small
    return dp, 1


def ranks_of_shards(tp: int, pp: int, dp: int, cp: int) -> tuple[int, int | None]:
    """Number of data ranks, and of ranks with different shards: two groups of two, if there are several data ranks and
    they fit."""
    four = 4 // math.gcd(4, cp)
    return (four, 2) if dp > 1 and tp * pp * cp * four <= MAX_RANKS else (dp, None)
