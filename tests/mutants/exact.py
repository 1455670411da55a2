"""Mutants of exact runs: they round otherwise, which a comparison in float64 can hardly see."""

from __future__ import annotations

from .mutant import Mutant
from .named import BITS

EXACT = (
    Mutant(
        name="shards_are_added_one_after_another",
        bug="the shards that one rank holds are added in their order, not as a tree",
        file="world/tree_sum.py",
        before="return tree_sum_of(dict(enumerate(parts)))",
        after="return sum(parts[1:], parts[0])",
        test=BITS("llama-degrees1-changes1"),
    ),
    Mutant(
        name="data_shards_share_an_accumulator",
        bug="a rank with several data shards adds the gradients of all its microbatches one after another",
        file="world/exact.py",
        before="self._data = microbatch // self._per_shard",
        after="self._data = 0",
        test=BITS("gpt-degrees0-changes0"),
    ),
    Mutant(
        name="exact_norm_is_a_sum_of_fractions",
        bug="squares of gradients are added as floating-point numbers, in an order that the layout decides",
        file="parallel/zero/reference.py",
        before="return (exact_group_norms if self.exact else group_norms)(",
        after="return group_norms(",
        test=BITS("gpt-degrees0-changes0"),
    ),
)
