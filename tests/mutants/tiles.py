"""Mutants of attention without masks: which pairs a tile has, and how tiles are put together."""

from __future__ import annotations

from .mutant import Mutant
from .named import ATTENDS, LAYOUT

TILES, FUSED = "learning/models/tiles.py", "learning/models/fused_attention.py"


def _tiled(case: str) -> str:
    return f"independent/test_attention.py::test_tiles_attend_as_a_mask_of_all_pairs[{case}-cpu-dtype0-1e-12]"


def _packed(case: str) -> str:
    return (
        f"independent/test_attention.py::test_documents_are_packed_as_the_kernel_for_several_lengths_takes_them[{case}]"
    )


TILE_MUTANTS = (
    Mutant(
        name="tiles_of_the_first_row",
        bug="every sequence of a microbatch attends by the document borders of the first one",
        file=TILES,
        before="self.documents[sequence] if self.documents",
        after="self.documents[0] if self.documents",
        test=LAYOUT("llama,tp=2,sequence_parallel=True,objective__reset_at_documents=True"),
    ),
    Mutant(
        name="tiles_take_two_rows_for_alike",
        bug="borders of two kinds count as the same for all sequences",
        file=TILES,
        before="len(set(map(tuple, self.documents))) == 1",
        after="len(set(map(tuple, self.documents))) <= 2",
        test=_tiled("documents"),
    ),
    Mutant(
        name="tiles_cross_borders",
        bug="a document's queries see the keys of all documents before it",
        file=TILES,
        before="yield queries, _both(self.keys, document)",
        after="yield queries, range(self.keys.start, min(self.keys.stop, document.stop))",
        test=_tiled("documents"),
    ),
    Mutant(
        name="tiles_cut_a_window_short",
        bug="the first query of each tile misses the first key of its window",
        file=TILES,
        before="start - self.window + 1)",
        after="start - self.window + 2)",
        test=_tiled("window"),
    ),
    Mutant(
        name="tiles_forget_a_window_that_keys_just_fill",
        bug="with one key more than the window has, all keys are seen",
        file="learning/models/attention.py",
        before="len(keys) <= self.window.size else",
        after="len(keys) <= self.window.size + 1 else",
        test=ATTENDS("window of all but one-0.0"),
    ),
    Mutant(
        name="tiles_take_a_band_from_its_beginning",
        bug="a band stands at the first query and key of a tile, not at the last ones",
        file=FUSED,
        before="band[..., band.shape[-2] - len(queries) :, band.shape[-1] - len(part.keys) :]",
        after="band[..., : len(queries), : len(part.keys)]",
        test=_tiled("alibi"),
    ),
    Mutant(
        name="tiles_keep_the_gradient_of_the_last_one",
        bug="of the tiles that see a key only the last one gives it a gradient",
        file=FUSED,
        before="grad_k[seen] += part_k",
        after="grad_k[seen] = part_k",
        test=_tiled("window"),
    ),
    Mutant(
        name="documents_end_where_another_begins",
        bug="a document that goes on behind another is two documents",
        file="world/batch.py",
        before="        if len(np.unique(row[first])) < len(first):\n            return None\n",
        after="",
        test="unit/test_tiles.py::test_documents_are_runs_of_ids_that_do_not_come_back",
    ),
    Mutant(
        name="kernel_of_lengths_has_a_wider_window",
        bug="on a GPU a window has one key more",
        file=FUSED,
        before="-1 if pattern.window is None else pattern.window - 1",
        after="-1 if pattern.window is None else pattern.window",
        test=_packed("window"),
    ),
    Mutant(
        name="kernel_of_lengths_gets_keys_of_other_documents",
        bug="on a GPU later queries get the keys of documents before theirs",
        file=FUSED,
        before="t[row, :, keys].transpose(0, 1) for row, keys in at",
        after="t[row, :, : keys.stop - keys.start].transpose(0, 1) for row, keys in at",
        test=_packed("documents, later queries"),
    ),
)
