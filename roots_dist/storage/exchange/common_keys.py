"""Keys of config.json that files of many model types have: what changes the computation, and what changes none."""

from __future__ import annotations

import re

from roots_dist.storage.exchange.tensors import QUANTISED

COMMON: tuple[tuple[str, object], ...] = (
    ("is_decoder", False), ("add_cross_attention", False), ("tie_encoder_decoder", False), ("pruned_heads", {}),
    ("cross_attention_hidden_size", None), ("quantization_config", None), ("sliding_window", None),
    ("use_sliding_window", False), ("position_embedding_type", "absolute"), ("rope_interleaved", False),
    ("use_mrope", False),
)  # fmt: skip
"""Keys of any model type that change the computation, and the only values that we support."""
FIXES = dict.fromkeys(("quantization_config", "compression_config"), QUANTISED)
"""The fix for a key, where it is not simply to use another model."""
WINDOW_KEYS = ("sliding_window", "max_window_layers")
"""Keys that have no effect if use_sliding_window is false."""
LEFT_BEHIND = re.compile(
    r"^_"  # what transformers notes for itself, or an older version did
    r"|^unsloth_|^(use_)?flash_att|^use_flash_attn|^base_model(_name_or_path)?$|^gradient_checkpointing_kwargs$"
    r"|^(tokenizer_)?(model_max_length|padding_side)$|^max_sequence_length$"
    r"|^custom_pipelines$|^sbert_ce_default_activation_function$|^sentence_transformers$"
)
"""Keys that tools write into config.json and that no class of transformers reads."""
HARMLESS = frozenset([
    "_name_or_path", "architectures", "auto_map", "model_type", "transformers_version", "dtype", "torch_dtype",
    "torchscript", "use_bfloat16", "tokenizer_class", "name_or_path", "return_dict", "return_dict_in_generate",
    "output_attentions", "output_hidden_states", "output_scores", "use_cache", "cache_implementation",
    "use_return_dict", "problem_type", "id2label", "label2id", "num_labels", "finetuning_task",
    "task_specific_params", "prefix", "chunk_size_feed_forward", "tf_legacy_loss", "pad_token_id", "bos_token_id",
    "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id", "unk_token_id", "decoder_start_token_id",
    "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens", "suppress_tokens", "bad_words_ids",
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups", "num_return_sequences",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty", "length_penalty",
    "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "remove_invalid_values",
    "exponential_decay_length_penalty", "initializer_range", "initializer_factor", "gradient_checkpointing",
    "output_past", "n_ctx", "n_special", "n_inner", "predict_special_tokens", "classifier_dropout", "summary_type",
    "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "summary_last_dropout", "directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
    "pooler_size_per_head", "pooler_type", "generator_size", "embedding_dropout", "unk_index",
    "attention_softmax_in_fp32", "bias_dropout_fusion", "masked_softmax_fusion", "skip_bias_add", "skip_bias_add_qkv",
    "offset_alibi", "pretraining_tp", "slow_but_exact", "seq_length", "n_positions", "_attn_implementation",
    "attn_implementation", "is_llama_config", "transformers.js_config",
])  # fmt: skip
"""Keys that do not affect an unmasked forward pass: names, dropout of heads, generation, execution."""
