"""Mutants that a comparison of layouts alone lets live, by what hides them: each needed another model, another loop, or
something that is not ours."""

from __future__ import annotations

HIDDEN: dict[str, tuple[str, ...]] = {
    "two stages of a small model share fewer parameters than those of the whole one": (
        "third_holder_of_a_tied_weight_is_left_out",
        "the_bridge_keeps_its_words_to_itself",
    ),
    "a microbatch of one sequence has no other": (
        "document_mask_of_the_first_row",
        "tiles_of_the_first_row",
        "encoder_padding_of_the_first_row",
        "classifier_reads_the_last_place_of_all_rows",
        "generators_noise_is_keyed_on_the_place",
        "dropout_is_keyed_on_the_place_in_the_microbatch",
        "samples_are_keyed_on_the_place_in_the_microbatch",
        "loss_is_a_mean_of_means",
    ),
    "layout and one process compute it alike": (
        "padded_words_have_probability",
        "encoded_gradient_is_that_of_one_block",
        "z_loss_gradient_is_halved",
        "smoothing_is_over_the_padded_vocabulary",
        "smoothing_is_missing_from_the_targets_gradient",
        "smoothing_stays_on_in_evaluation",
        "residual_scale_is_not_by_the_root",
        "grouped_heads_are_repeated_in_turns",
        "alibi_slopes_of_other_numbers_of_heads",
        "dropout_forgets_the_step",
        "dropout_forgets_the_site",
    ),
    "only some shapes of model and schedule meet": (
        "row_output_is_summed_twice",
        "put_off_weight_gradients_come_after_partial_sums",
        "adapters_put_off_come_after_partial_sums",
    ),
    "only the training loop does it": (
        "a_resumed_run_reads_from_the_first_sample",
        "a_resumed_run_warms_up_again",
        "rows_that_fill_up_are_scored",
        "tied_copies_do_not_start_from_the_weights",
        "norm_is_that_of_its_own_part",
    ),
}
"""Why it was hidden -> names of mutants."""
