"""Names of tests that several mutants die in: `LAYOUT("gpt,tp=2")` is that case of parity."""

from __future__ import annotations

from collections.abc import Callable


def _of(file: str, function: str) -> Callable[[str], str]:
    def named(case: str) -> str:
        return f"{file}::{function}[{case}]"

    return named


LAYOUT = _of("parity/test_layouts.py", "test_nothing_depends_on_the_layout")
BITS = _of("parity/test_exact.py", "test_no_bit_depends_on_the_layout")
IN_CONTEXT = _of("parity/test_context.py", "test_nothing_depends_on_the_layout")
EXPERT_LAYOUT = _of("parity/test_expert_parallel.py", "test_nothing_depends_on_where_experts_are")
FAMILY = _of("parity/test_families.py", "test_nothing_depends_on_the_layout")
T5_LAYOUT = _of("parity/test_t5_layouts.py", "test_nothing_depends_on_the_layout")
STRATEGY = _of("parity/test_finetuning.py", "test_a_strategy_computes_what_one_process_computes")
ENGINE = _of("conformance/test_zero.py", "test_equals_one_process_of_plain_torch")
DECODER = _of("reference/test_transformers.py", "test_loss_and_gradients_equal_transformers")
BERT = _of("reference/test_encoders_transformers.py", "test_bert_is_that_of_transformers")
ELECTRA = _of("reference/test_encoders_transformers.py", "test_electra_is_that_of_transformers")
ENCODER_TASK = _of("reference/test_heads_transformers.py", "test_an_encoder_with_a_head_is_that_of_transformers")
DECODER_TASK = _of("reference/test_heads_transformers.py", "test_a_decoder_with_a_head_is_that_of_transformers")
CROSS_ENTROPY = _of("independent/test_cross_entropy.py", "test_loss_and_gradients_are_those_of_plain_autograd")
SMOOTHED = _of("independent/test_cross_entropy.py", "test_heads_smooth_in_training_and_score_plainly_in_evaluation")
TERMS = _of("independent/test_loss_terms.py", "test_a_step_differentiates_each_term_over_its_own_count")
SUMS = _of("independent/test_evaluation_sums.py", "test_loss_perplexity_bits_and_accuracy_are_sums_over_samples")
ADAMW = _of("independent/test_adamw.py", "test_twelve_steps_are_those_of_torch")
MASKS = _of("independent/test_random_numbers.py", "test_no_two_masks_of_a_model_are_alike")
BEGINNINGS = _of("independent/test_initial_weights.py", "test_each_kind_of_parameter_begins_as_its_paper_says")
CAPPED = _of("independent/test_cross_entropy.py", "test_capped_logits_have_the_gradients_of_plain_autograd")
SCALED = _of("independent/test_positions.py", "test_scaled_rotary_rates_are_those_of_transformers")
ATTENDS = _of("independent/test_attention.py", "test_self_attention_is_its_definition")
T5 = _of("reference/test_t5_transformers.py", "test_loss_and_gradients_equal_transformers")
PACKED = _of("unit/test_packing.py", "test_packed_rows_are_learned_as_if_each_were_a_sample")
EXPERTS = _of("independent/test_experts.py", "test_output_terms_and_gradients_are_those_of_the_definition")
PREFERS = _of("unit/test_dpo.py", "test_loss_and_gradients_are_those_of_the_paper")
GRADIENTS = _of("exchange/test_exchange_families.py", "test_gradients_equal_those_of_transformers")
