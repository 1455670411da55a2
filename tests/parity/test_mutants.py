"""The proof can fail: break one rule at a time, and parity goes red and names what is wrong."""

import mutants
import pytest
from cases import STEPS, alone
from models import config

from roots_dist.testing.parity import FLOAT64_BOUNDS, differences, merge
from roots_dist.testing.world import on_world

TP, SP = dict(parallel__tp=2), dict(parallel__tp=2, parallel__sequence_parallel=True)
PP = dict(parallel__pp=2)
EMBEDDING = "embed.tokens.weight"

# mutant, model, layout, data ranks, the comparison that must fail, and the tensor or step that it must name first
BROKEN = [
    ("column_input_gradient_is_not_summed", "gpt", TP, 1, "gradients", "embed.position_embedding"),
    ("column_input_gradient_is_not_summed", "llama", SP, 1, "gradients", EMBEDDING),
    ("row_output_is_not_summed", "gpt", TP, 1, "loss", "step 0"),
    ("row_output_is_not_summed", "bloom", SP, 1, "loss", "step 0"),
    ("row_output_is_summed_twice", "llama", TP, 1, "loss", "step 0"),
    ("row_bias_is_added_on_every_rank", "gpt", TP, 1, "gradients", "blocks.0.attention.out.bias"),
    ("embedding_is_not_summed", "llama", TP, 1, "loss", "step 0"),
    ("head_input_gradient_is_not_summed", "gpt", TP, 1, "gradients", "embed.position_embedding"),
    ("replicated_gradients_are_not_summed", "gpt", SP, 1, "gradients", "embed.position_embedding"),
    ("replicated_gradients_are_not_summed", "llama", SP, 1, "gradients", "blocks.0.norm1.weight"),
    (
        "replicated_gradients_are_not_summed",
        "llama",
        dict(parallel__tp=4),
        1,
        "gradients",
        "blocks.0.attention.key.weight",
    ),
    ("every_replicated_gradient_is_summed", "gpt", TP, 1, "gradients", "embed.position_embedding"),
    ("tied_gradients_are_not_summed", "gpt", PP, 1, "gradients", EMBEDDING),
    ("norm_counts_replicas_on_every_rank", "gpt", TP, 1, "gradient norm", "step 0"),
    ("norm_counts_the_tied_copy", "gpt", PP, 1, "gradient norm", "step 0"),
    ("one_rank_does_not_clip", "gpt", TP, 1, "weights", "embed.position_embedding"),
    ("one_rank_does_not_clip", "gpt", TP, 1, "copies on other ranks", "embed.position_embedding"),
    ("loss_is_divided_by_the_rank_own_count", "gpt", {}, 2, "loss", "step 0"),
    ("loss_is_divided_by_the_rank_own_count", "gpt", {}, 2, "copies on other ranks", "losses"),
    ("loss_is_a_mean_of_means", "gpt", PP, 1, "loss", "step 0"),
    ("padded_words_have_probability", "gpt", TP, 1, "loss", "step 0"),
    ("softmax_sees_its_own_words_only", "gpt", TP, 1, "loss", "step 0"),
    ("dropout_is_keyed_on_the_rank", "llama", SP, 1, "loss", "step 0"),
    ("dropout_is_keyed_on_the_rank", "llama", {}, 2, "loss", "step 0"),
    ("dropout_is_keyed_on_the_local_position", "llama", SP, 1, "loss", "step 0"),
    ("dropout_is_keyed_on_the_place_in_the_microbatch", "llama", {}, 1, "loss", "step 0"),
    ("positions_are_counted_from_zero_on_every_rank", "gpt", SP, 1, "loss", "step 0"),
    ("every_rank_draws_the_first_slice", "llama", TP, 1, "loss", "step 0"),
    ("initial_weights_are_keyed_on_the_order", "llama", PP, 1, "loss", "step 0"),
    ("residual_scale_uses_the_stage_layers", "gpt", PP, 1, "loss", "step 0"),
    ("alibi_slopes_are_those_of_the_first_heads", "bloom", TP, 1, "loss", "step 0"),
    (
        "put_off_weight_gradients_are_lost",
        "gpt",
        PP | dict(parallel__schedule="zb-h1"),
        1,
        "gradients",
        "blocks.0.attention.query.weight",
    ),
    ("microbatches_are_swapped_on_the_last_stage", "llama", PP, 1, "loss", "step 0"),
    ("gradients_are_not_summed_over_data_ranks", "gpt", dict(parallel__zero_stage=0), 2, "gradient norm", "step 0"),
    ("recomputation_sees_another_step", "llama", dict(train__recompute="full"), 1, "gradients", EMBEDDING),
    ("loss_of_every_tensor_rank_is_reported", "gpt", TP, 1, "loss", "step 0"),
]


@pytest.mark.parametrize(
    "mutant, model, layout, dp, what, where", BROKEN, ids=lambda v: v if isinstance(v, str) else ""
)
def test_parity_goes_red(mutant, model, layout, dp, what, where):
    broken = config(model, **layout)
    ranks = on_world(broken.parallel.tp * broken.parallel.pp * dp, mutants.mutated_trace, mutant, broken, 0, STEPS)
    red = {row.what: row for row in differences(alone(broken), merge(ranks), FLOAT64_BOUNDS) if not row.passed}
    assert what in red, f"only {list(red)} went red"
    assert red[what].where.split(",")[0] == where
    assert red[what].largest > 100 * red[what].bound  # far from noise


def test_every_mutant_is_used():
    written = {
        name for name, value in vars(mutants).items() if callable(value) and value.__module__ == mutants.__name__
    }
    helpers = {"mutated_trace"} | {name for name in written if name.startswith("_")}
    assert written - helpers == {row[0] for row in BROKEN}
