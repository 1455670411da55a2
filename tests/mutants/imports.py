"""Mutants of imports: a model from elsewhere that is read as another one, without a word."""

from __future__ import annotations

from .mutant import Edit, Mutant

MATCHING, KEYS = "storage/exchange/matching.py", "storage/exchange/common_keys.py"
REFUSALS = "exchange/test_exchange_refusals.py"

IMPORTS = (
    Mutant(
        name="older_norms_are_read_the_wrong_way_round",
        bug="gamma and beta of an older file, which have one shape, are taken for bias and weight of a norm",
        file=MATCHING,
        before=r'r"LayerNorm\.gamma$", "LayerNorm.weight", re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", file_name)',
        after=r'r"LayerNorm\.gamma$", "LayerNorm.bias", re.sub(r"LayerNorm\.beta$", "LayerNorm.weight", file_name)',
        test=f"{REFUSALS}::test_names_of_older_files_are_understood",
    ),
    Mutant(
        name="twins_are_compared_by_their_shape",
        bug="of two tensors that should be one, as a tied head and its embedding, any is taken if the shapes fit",
        file=MATCHING,
        before="if a.shape == b.shape and torch.equal(a.to(torch.float32), b.to(torch.float32)):",
        after="if a.shape == b.shape:",
        test=f"{REFUSALS}::test_tensors_that_do_not_fit_are_refused_by_name[untied]",
    ),
    Mutant(
        name="infinity_hides_behind_a_number",
        bug="a tensor is taken for finite if its smallest or its largest number is",
        file=MATCHING,
        before="if not all(map(math.isfinite",
        after="if not any(map(math.isfinite",
        test=f"{REFUSALS}::test_tensors_that_do_not_fit_are_refused_by_name[infinite at one end]",
    ),
    Mutant(
        name="tensors_without_a_rule_are_left_behind",
        bug="what a file holds beside the model that its config describes is dropped without a word",
        file=MATCHING,
        before="    for name in found.unmatched:\n",
        after="    for name in ():\n",
        test=f"{REFUSALS}::test_tensors_that_do_not_fit_are_refused_by_name[extra]",
    ),
    Mutant(
        name="interleaved_rotary_is_read_as_halves",
        bug="a key that pairs other channels of rotary heads counts as harmless",
        file=KEYS,
        before=' ("rope_interleaved", False),',
        after="",
        also=(Edit(file=KEYS, before='"torchscript", ', after='"torchscript", "rope_interleaved", '),),
        test=f"{REFUSALS}::test_a_config_that_says_something_else_is_refused_by_its_key[llama: rope_interleaved=True]",
    ),
    Mutant(
        name="whatever_is_used_is_harmless",
        bug="a pattern for the keys that tools leave behind is wide enough for keys that change the computation",
        file=KEYS,
        before="^(use_)?flash_att|",
        after="^(use_|flash_att)|",
        test=f"{REFUSALS}::test_a_config_that_says_something_else_is_refused_by_its_key[gpt2: use_alibi=True]",
    ),
)
