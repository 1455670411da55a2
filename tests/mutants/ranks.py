"""Mutants of what ranks find out of each other: who differs, who hangs, whose copies drift."""

from __future__ import annotations

from .mutant import Mutant

HANDSHAKE = "runs/ranks/handshake.py"
NAMED = "launch/test_handshake.py::test_the_key_the_rank_and_its_host_are_named_on_all_ranks"

HANGS = "launch/test_hangs.py::"

RANKS = (
    Mutant(
        name="the_handshake_compares_rank_0_with_itself",
        bug="rank 0 takes its own digests for those of every rank",
        file=HANDSHAKE,
        before='rows = {rank: json.loads(row)["digests"] for rank, row in enumerate(store.multi_get(keys))}',
        after="rows = {rank: digests(mine) for rank in range(size)}",
        test=NAMED,
    ),
    Mutant(
        name="the_fewest_ranks_are_taken_for_the_right_ones",
        bug="of ranks that differ those are named that are alike",
        file=HANDSHAKE,
        before="key=lambda ranks: (-len(ranks), ranks[0])",
        after="key=lambda ranks: (len(ranks), ranks[0])",
        test=NAMED,
    ),
    Mutant(
        name="a_large_file_is_compared_by_its_size",
        bug="of a corpus that is not read whole no byte is compared",
        file="runs/ranks/fingerprint.py",
        before="                read += file.read(BLOCK_BYTES)\n",
        after="",
        test="launch/test_handshake.py::test_files_are_compared_by_content_and_large_ones_by_blocks",
    ),
    Mutant(
        name="a_rank_that_waits_is_a_cause",
        bug="of ranks that hang, one that waits for another is named too",
        file="runs/ranks/hang.py",
        before="rank for rank in awaited if not states[rank].operation",
        after="rank for rank in awaited",
        test=HANGS + "test_ranks_in_different_operations_wait_for_each_other",
    ),
    Mutant(
        name="a_rank_has_begun_what_it_has_not",
        bug="a rank that is one operation behind is taken to have called it",
        file="runs/ranks/hang.py",
        before="return other.begun[state.group] >= state.number",
        after="return other.begun[state.group] >= state.number - 1",
        test=HANGS + "test_a_rank_that_answers_and_waits_for_nobody_is_the_cause",
    ),
)
