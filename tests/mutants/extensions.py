"""Mutants of what users add: whose code is run, which names it may have, and the kit that proves a layer."""

from __future__ import annotations

from .mutant import Mutant

FILE, KIT = "config/extensions.py", "testing/layers.py"
HERE, LAYER = "test_extensions.py::", "unit/test_prove_layer.py::"
REFUSED = HERE + "test_a_file_that_cannot_be_used_is_refused_in_a_line"
FOLDER = HERE + "test_a_runs_folder_runs_no_code_by_itself"
FORGOTTEN = LAYER + "test_what_is_wrong_is_told"

EXTENSIONS = (
    Mutant(
        name="a_folder_of_a_run_runs_its_code",
        bug="the extensions that a run's folder names are run though no person has named them",
        file=FILE,
        before="        if pin not in trusted:",
        after="        trusted.setdefault(pin, path)\n        if False:",
        test=FOLDER,
    ),
    Mutant(
        name="other_code_stands_in_for_a_runs",
        bug="a run is read with another extension than the one that it was trained with",
        file=FILE,
        before="    if missing:",
        after="    if False:",
        test=FOLDER,
    ),
    Mutant(
        name="a_changed_file_has_its_old_digest",
        bug="a file that has changed since it was recorded is run all the same",
        file=FILE,
        before="    if pin and pin != found:",
        after="    if False:",
        test=HERE + "test_a_file_trains_and_is_resumed_and_a_change_of_the_models_code_is_refused",
    ),
    Mutant(
        name="an_extension_takes_the_packages_names",
        bug="a name of the package's own may be given to something else",
        file=FILE,
        before="{*ours, *together[kind]}",
        after="{*together[kind]}",
        test=REFUSED + "[a name of ours]",
    ),
    Mutant(
        name="the_last_of_two_files_wins",
        bug="of two extensions with one name the second is taken in silence",
        file=FILE,
        before="{*ours, *together[kind]}",
        after="{*ours}",
        test=HERE + "test_two_files_are_one_extension_unless_they_share_a_name",
    ),
    Mutant(
        name="a_record_may_have_another_name",
        bug="a record says another name than the one that configs say",
        file=FILE,
        before="if inner is not None and inner.name != name:",
        after="if False:",
        test=REFUSED + "[a record of another name]",
    ),
    Mutant(
        name="a_file_is_run_again_for_each_config",
        bug="each config has classes of its own from the same file",
        file=FILE,
        before="@lru_cache\ndef _run",
        after="def _run",
        test=HERE + "test_two_files_are_one_extension_unless_they_share_a_name",
    ),
    Mutant(
        name="every_name_is_an_extensions",
        bug="with extensions, a name that nobody knows is taken",
        file=FILE,
        before="isinstance(known, AnyName) or value in (getattr(known, table) if known else ())",
        after="isinstance(known, AnyName) or known is not None",
        test=HERE + "test_the_names_of_a_file_are_values_and_its_records_are_asked",
    ),
    Mutant(
        name="a_rule_of_ones_own_is_not_asked",
        bug="with an optimizer rule of an extension AdamW steps all the same",
        file="parallel/zero/reference.py",
        before="        if self.own_rule is not None:",
        after="        if False:",
        test=HERE + "test_a_rule_of_ones_own_steps_as_torchs_own_optimizer_of_that_name",
    ),
    Mutant(
        name="a_rule_decays_everything",
        bug="an extension's rule is told to decay norms and biases as well",
        file="parallel/optim/groups.py",
        before='lr=rate, weight_decay=group.adamw_options(optim)["weight_decay"], count=count',
        after="lr=rate, weight_decay=optim.weight_decay, count=count",
        test=HERE + "test_a_rule_of_ones_own_steps_as_torchs_own_optimizer_of_that_name",
    ),
    Mutant(
        name="the_state_of_another_rule_is_taken",
        bug="a run goes on with another optimizer rule, to which the saved moments mean something else",
        file="storage/checkpoint/same_model.py",
        before='    if now != was:\n        expected = f"{was} as in {checkpoint}, whose state',
        after='    if False:\n        expected = f"{was} as in {checkpoint}, whose state',
        test=HERE + "test_the_state_of_one_rule_is_not_given_to_another",
    ),
    Mutant(
        name="the_kit_gives_equal_gradients",
        bug="each number of the output has the same gradient, and an exchange of them is not seen",
        file=KIT,
        before="torch.linspace(0.5, 1.5, y.numel()).cos().view_as(y)",
        after="torch.ones_like(y)",
        test=FORGOTTEN + "[an exchange of gradients]",
    ),
    Mutant(
        name="the_kit_looks_at_the_first_rank",
        bug="output and input gradient of the other ranks are not compared",
        file=KIT,
        before="for r, one in enumerate(ranks)\n",
        after="for r, one in enumerate(ranks[:1])\n",
        test=FORGOTTEN + "[one rank alone]",
    ),
    Mutant(
        name="the_kit_takes_copies_together",
        bug="of a gradient that several ranks hold one copy is compared",
        file=KIT,
        before="            for index, part in slices:  # copies too, each for itself\n",
        after="            for index, part in slices[:0]:\n",
        test=FORGOTTEN + "[a partial gradient that is said to be whole]",
    ),
    Mutant(
        name="the_kit_lets_nan_pass",
        bug="a layer that computes NaN differs by nothing",
        file=KIT,
        before="not row.difference <= bound",
        after="row.difference > bound",
        test=FORGOTTEN + "[not a number]",
    ),
    Mutant(
        name="the_kit_compares_what_fits",
        bug="an output of another shape is compared with as much as there is of it",
        file=KIT,
        before='    if one.shape != other.shape:\n        return float("inf")\n',
        after="",
        test=FORGOTTEN + "[another shape]",
    ),
    Mutant(
        name="the_kit_computes_in_float32",
        bug="layers are compared in float32, in which a small difference is rounding",
        file=KIT,
        before="    torch.set_default_dtype(torch.float64)\n",
        after="",
        test=LAYER + "test_a_right_layer_is_proven",
    ),
)
