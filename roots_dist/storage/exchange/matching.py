"""Tensors of a folder, matched to the rules of its architecture: each is there once, of the right shape and dtype.

rules + files --match_and_check--> name in a rule -> its tensor, read when it is asked for
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from roots_dist.accounting.sizes import num_blocks
from roots_dist.config.schema import Config
from roots_dist.errors import ExchangeError
from roots_dist.storage.exchange.table import GENERATOR, Architecture, Rule, Shapes
from roots_dist.storage.exchange.tensors import FLOATS, QUANTISED, Tensors, exchange_error, one_line

OF_THESE_FILES = "use the config.json that belongs to these files"
AGAIN = "get the files again, or take an earlier checkpoint: what such a model computes is no number either"
IN_ONE_DTYPE = "save it in one dtype: model.to(torch.float32).save_pretrained(NEW) in transformers"
LEFTOVER = {
    r"scale_inv$|_scale$|\.(qweight|qzeros|scales|g_idx|absmax|SCB)$|quant_(map|state)": QUANTISED,
    r"^base_model\.model\.": "merge the adapter into its base model, with peft's merge_and_unload, and save that",
    r"^(module|_orig_mod)\.": "save the model itself and not what wraps it: model.module or model._orig_mod",
}
"""Names of tensors that no model has -> what to do about them. A pattern each."""


@dataclass(frozen=True)
class MatchedTensors:
    """Tensors of one or two folders, matched to the names in the rules."""

    tensors: Mapping[str, tuple[Tensors, str]]
    """Name in a rule -> the folder's tensors, and the name in its files."""
    unmatched: tuple[str, ...]
    """Tensors that match no rule."""

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """The unmatched tensors whose names match one of the patterns."""
        return [name for name in self.unmatched if _fits(name, patterns)]

    def get(self, name: str) -> Tensor:
        tensors, file_name = self.tensors[name]
        return tensors.get(file_name)

    def finite(self, name: str) -> Tensor:
        """The same. Raises ExchangeError for one that holds NaN or infinity."""
        tensors, file_name = self.tensors[name]
        return refuse_not_finite(tensors, file_name, tensors.get(file_name))


def refuse_not_finite(tensors: Tensors, file_name: str, w: Tensor) -> Tensor:
    """The tensor, or an ExchangeError if it holds NaN or infinity."""
    if not all(map(math.isfinite, (float(end) for end in w.aminmax()))):  # without a mask of its size
        raise _tensor_error(tensors, file_name, "holds NaN or infinity: expected numbers", AGAIN)
    return w


def refuse_absurd_sizes(config: Config, tensors: Mapping[str, Tensors]) -> None:
    """Raise ExchangeError before an absurd number of blocks or experts is built. Sizes are bounded by the config."""
    files, m = sum(len(folder.files) for folder in tensors.values()), config.model
    where = f"{tensors[''].folder}/config.json"
    for what, number in (("layers", num_blocks(config)), ("experts", m.experts or 0)):
        if number > files:
            raise exchange_error(
                where, f"{number:,} {what}", f"at most {files:,}, the tensors there are", OF_THESE_FILES
            )


def match_and_check(
    table: Sequence[Rule],
    config: Config,
    model: Shapes,
    tensors: Mapping[str, Tensors],
    architecture: Architecture,
    left_out: Sequence[str] = (),
) -> MatchedTensors:
    """Match tensors to rules and check that every tensor exists with the right shape and dtype, that none is left over
    but those of the patterns in `left_out`, and that duplicates are equal."""
    found = _match(table, tensors, architecture)
    for name in found.unmatched:
        if not _fits(name.removeprefix(GENERATOR), (*architecture.unused, *left_out)):
            bare, what = name.removeprefix(GENERATOR), "is not part of the model that config.json describes"
            fix = next((fix for pattern, fix in LEFTOVER.items() if re.search(pattern, bare)), OF_THESE_FILES)
            raise _tensor_error(_folder(tensors, name), bare, what, fix)
    for rule in table:
        for name in rule.needed:
            if name not in found.tensors:
                raise _tensor_error(_folder(tensors, name), name.removeprefix(GENERATOR), "is missing")
        wanted = tuple(rule.form.join(config, [torch.empty(model[n], device="meta") for n in rule.ours]).shape)
        for name in (name for name in rule.names if name in found.tensors):
            where, file_name = found.tensors[name]
            told = name.removeprefix(GENERATOR)
            if (shape := where.shape(file_name)) != wanted:
                raise _tensor_error(where, told, f"has shape {shape}: expected {wanted}")
            if (dtype := where.dtype(file_name)) not in FLOATS:
                fix = IN_ONE_DTYPE if dtype == "F64" else QUANTISED
                raise _tensor_error(where, told, f"has dtype {dtype}: expected one of {', '.join(FLOATS)}", fix)
            if name != rule.theirs:
                _refuse_other(found.tensors[rule.theirs], (where, file_name), told, rule.theirs)
    return found


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _refuse_other(
    one: tuple[Tensors, str], two: tuple[Tensors, str], name: str, other: str, fix: str = OF_THESE_FILES
) -> None:
    """Raise ExchangeError unless two tensors of one meaning, `two` called name and `one` called other, are equal."""
    a, b = (tensors.get(file_name) for tensors, file_name in (one, two))
    if a.shape == b.shape and torch.equal(a.to(torch.float32), b.to(torch.float32)):
        return
    for (tensors, file_name), w in ((one, a), (two, b)):
        refuse_not_finite(tensors, file_name, w)
    same = "expected the same, because our model has it once"
    if a.dtype != b.dtype:
        kinds = [tensors.dtype(file_name) for tensors, file_name in (two, one)]
        raise _tensor_error(two[0], name, f"({kinds[0]}) differs from {other} ({kinds[1]}): {same}", IN_ONE_DTYPE)
    raise _tensor_error(two[0], name, f"differs from {other}: {same}", fix)


def _match(table: Sequence[Rule], tensors: Mapping[str, Tensors], architecture: Architecture) -> MatchedTensors:
    wanted = {name for rule in table for name in (*rule.names, *rule.idle)}
    found: dict[str, tuple[Tensors, str]] = {}
    unmatched: list[str] = []
    for folder, files in tensors.items():
        for file_name in files.files:
            modern = re.sub(
                r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", file_name)
            )
            names = (folder + modern, f"{folder}{architecture.base}.{modern}")  # some omit the prefix of the stack
            name = next((name for name in names if name in wanted), None)
            if name is None:
                unmatched.append(folder + file_name)
                continue
            if name in found:  # under an older name and a newer one
                fix = "keep the one that is right: it is the same tensor under two names"
                _refuse_other(found[name], (files, file_name), file_name, found[name][1], fix)
            found[name] = files, file_name
    return MatchedTensors(found, tuple(unmatched))


def _folder(tensors: Mapping[str, Tensors], name: str) -> Tensors:
    return tensors[GENERATOR if name.startswith(GENERATOR) else ""]


def _tensor_error(tensors: Tensors, name: str, what: str, fix: str = OF_THESE_FILES) -> ExchangeError:
    return ExchangeError(f"{tensors.folder}: tensor {one_line(name)} {what}. Fix: {fix}.")
