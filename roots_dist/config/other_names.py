"""Names that other systems give to a key: a config or command line that uses their word is told ours.

    learning_rate, --tensor-model-parallel-size, sliding_window --key_for--> optim.lr, parallel.tp, model.window

Names are those of Hugging Face's configs and TrainingArguments, of Megatron-LM's and DeepSpeed's options, and of
nanoGPT.
"""

from __future__ import annotations

from collections.abc import Iterable

from roots_dist.schedule.schedules import SCHEDULES

OTHER_NAMES: dict[str, tuple[str, ...]] = {
    "model.family": ("model_type",),
    "model.layers": ("num_layers", "num_hidden_layers", "n_layer", "n_layers", "encoder_layers"),
    "model.decoder_layers": ("num_decoder_layers", "decoder_num_layers"),
    "model.hidden": ("hidden_size", "n_embd", "d_model", "hidden_dim", "dim"),
    "model.heads": ("num_attention_heads", "num_heads", "n_head", "n_heads"),
    "model.kv_heads": ("num_key_value_heads", "num_query_groups", "n_kv_heads"),
    "model.head_dim": ("kv_channels", "d_kv"),
    "model.ffn": ("intermediate_size", "ffn_hidden_size", "d_ff", "n_inner", "ffn_dim"),
    "model.vocab": ("vocab_size", "padded_vocab_size"),
    "model.segments": ("type_vocab_size",),
    "model.positions": ("position_embedding_type",),
    "model.max_positions": ("max_position_embeddings", "n_positions", "n_ctx"),
    "model.relative_buckets": ("relative_attention_num_buckets",),
    "model.relative_max_distance": ("relative_attention_max_distance",),
    "model.rope_theta": ("rotary_base", "rotary_emb_base"),
    "model.rotary_fraction": ("partial_rotary_factor", "rotary_pct", "rotary_percent"),
    "model.layer_kinds": ("layer_types",),
    "model.window": ("sliding_window", "window_size", "attention_window"),
    "model.window_rope_theta": ("rope_local_base_freq", "local_rope_theta"),
    "model.attention_softcap": ("attn_logit_softcapping",),
    "model.logit_softcap": ("final_logit_softcapping",),
    "model.norm": ("normalization", "norm_type"),
    "model.branches": ("parallel_attn", "parallel_attention", "use_parallel_residual"),
    "model.activation": ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj"),
    "model.experts": ("num_experts", "num_local_experts", "n_routed_experts"),
    "model.experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_router_topk"),
    "model.expert_ffn": ("moe_intermediate_size", "moe_ffn_hidden_size"),
    "model.shared_expert_ffn": ("shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"),
    "model.router_score": ("scoring_func", "moe_router_score_function"),
    "model.normalize_expert_weights": ("norm_topk_prob",),
    "model.expert_groups": ("n_group", "moe_router_num_groups"),
    "model.groups_per_token": ("topk_group", "moe_router_group_topk"),
    "model.router_bias": ("moe_router_enable_expert_bias",),
    "model.dense_layers": ("first_k_dense_replace",),
    "model.expert_every": ("decoder_sparse_step", "moe_layer_freq"),
    "model.qkv_bias": ("attention_bias", "add_qkv_bias"),
    "model.tied_embeddings": ("tie_word_embeddings", "tie_embeddings"),
    "model.dropout": ("hidden_dropout", "hidden_dropout_prob", "resid_pdrop", "dropout_rate"),
    "model.attention_dropout": ("attention_probs_dropout_prob", "attn_pdrop"),
    "model.init_std": ("initializer_range", "init_method_std"),
    "objective.mask_probability": ("mlm_probability", "mask_prob"),
    "objective.label_smoothing": ("label_smoothing_factor",),
    "objective.z_loss": ("z_loss_coeff", "cross_entropy_z_loss"),
    "objective.router_z_loss": ("moe_z_loss_coeff", "router_z_loss_coef"),
    "objective.reset_at_documents": ("reset_attention_mask", "reset_position_ids"),
    "data.train": ("data_path", "train_file", "train_data_path", "dataset", "dataset_name"),
    "data.validation": ("valid_data_path", "validation_file", "eval_dataset"),
    "data.tokenizer": ("tokenizer_name", "tokenizer_model", "tokenizer_path", "tokenizer_name_or_path"),
    "data.seq_length": ("max_seq_length", "max_seq_len", "max_length", "block_size", "context_length", "seq_len"),
    "finetune.init_from": ("model_name_or_path", "pretrained", "pretrained_model", "load"),
    "finetune.epochs": ("num_train_epochs", "num_epochs"),
    "finetune.lora_rank": ("lora_r", "r"),
    "finetune.lora_targets": ("target_modules", "lora_target_modules"),
    "finetune.patience": ("early_stopping_patience",),
    "parallel.tp": (
        "tensor_model_parallel_size",
        "tensor_parallel_size",
        "tp_size",
        "tensor_parallel",
        "parallel_tensor",
    ),
    "parallel.pp": (
        "pipeline_model_parallel_size",
        "pipeline_parallel_size",
        "pp_size",
        "pipeline_parallel",
        "parallel_pipeline",
    ),
    "parallel.cp": ("context_parallel_size", "cp_size", "context_parallel", "parallel_context"),
    "parallel.cp_kind": ("cp_comm_type",),
    "parallel.ep": (
        "expert_model_parallel_size",
        "expert_parallel_size",
        "ep_size",
        "expert_parallel",
        "parallel_expert",
    ),
    "parallel.zero_ranks": ("data_parallel_shard_degree", "dp_shard", "mics_shard_size", "zero_hpz_partition_size"),
    "parallel.virtual_stages": ("num_virtual_stages_per_pipeline_rank", "virtual_pipeline_model_parallel_size"),
    "train.steps": ("train_iters", "max_steps", "max_iters", "num_train_steps", "total_steps"),
    "train.global_batch": ("global_batch_size", "train_batch_size", "batch_size"),
    "train.micro_batch": ("micro_batch_size", "per_device_train_batch_size", "train_micro_batch_size_per_gpu"),
    "train.batch_ramp": ("rampup_batch_size",),
    "train.precision": ("dtype", "torch_dtype", "mixed_precision"),
    "train.compile": ("torch_compile",),
    "train.recompute": ("recompute_granularity", "gradient_checkpointing", "activation_checkpointing"),
    "train.log_every": ("log_interval", "logging_steps"),
    "train.eval_every": ("eval_interval", "eval_steps"),
    "optim.lr": ("learning_rate",),
    "optim.min_lr": ("min_learning_rate",),
    "optim.lr_schedule": ("lr_scheduler_type", "lr_scheduler", "lr_decay_style"),
    "optim.warmup_steps": ("num_warmup_steps", "warmup_iters", "lr_warmup_iters", "warmup_num_steps"),
    "optim.decay_steps": ("lr_decay_iters", "lr_decay_steps"),
    "optim.beta1": ("adam_beta1",),
    "optim.beta2": ("adam_beta2",),
    "optim.eps": ("adam_epsilon", "adam_eps"),
    "optim.router_bias_rate": ("moe_router_bias_update_rate",),
    "optim.clip_grad": ("max_grad_norm", "gradient_clipping", "gradient_clip_val", "grad_clip"),
    "checkpoint.every": ("save_steps", "save_interval", "save_every", "checkpoint_interval", "checkpoint_steps"),
    "checkpoint.keep": ("save_total_limit", "keep_last_n"),
    "checkpoint.resume": ("resume_from_checkpoint",),
    "checkpoint.asynchronous": ("async_save",),
    "track.folder": (
        "output_dir",
        "out_dir",
        "save_dir",
        "checkpoint_dir",
        "checkpoint_folder",
        "checkpoint_path",
        "ckpt_dir",
        "run_dir",
    ),
    "track.project": ("wandb_project",),
    "track.name": ("run_name", "wandb_run_name", "wandb_exp_name"),
    "track.tensorboard": ("tensorboard_dir",),
    "advanced.norm_eps": ("layer_norm_eps", "rms_norm_eps", "layernorm_epsilon", "layer_norm_epsilon", "norm_epsilon"),
    "advanced.vocab_multiple": ("make_vocab_size_divisible_by",),
    "advanced.timeout_s": ("ddp_timeout",),
}
"""Key -> the last part of its names elsewhere, with underscores."""


OTHER_VALUES: dict[tuple[str, str], tuple[str, ...]] = {
    ("model.family", "gpt"): ("gpt2", "llama", "bloom", "mistral", "mixtral", "qwen2", "qwen3", "gemma", "decoder"),
    ("model.family", "bert"): ("roberta", "distilbert", "camembert", "xlm-roberta", "encoder"),
    ("model.family", "t5"): ("mt5", "encoder-decoder"),
    ("model.positions", "learned"): ("absolute", "learned_absolute"),
    ("model.positions", "rotary"): ("rope",),
    ("model.norm", "layernorm"): ("ln",),
    ("model.norm", "rmsnorm"): ("rms",),
    ("model.norm_position", "pre"): ("pre_norm", "pre_ln"),
    ("model.norm_position", "post"): ("post_norm", "post_ln"),
    ("model.activation", "gelu_tanh"): ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
    ("model.activation", "swiglu"): ("silu", "swish"),
    ("model.activation", "geglu"): ("gated_gelu",),
    ("objective.name", "clm"): ("causal", "causal_lm", "lm"),
    ("objective.name", "mlm"): ("masked", "masked_lm"),
    ("objective.name", "mlm-nsp"): ("nsp",),
    ("objective.name", "rtd"): ("replaced_tokens", "electra"),
    ("objective.name", "spans"): ("span_corruption", "denoising"),
    ("objective.name", "prefix"): ("prefix_lm",),
    ("objective.name", "classify"): ("classification", "text_classification", "sequence_classification"),
    ("objective.name", "tag"): ("ner", "token_classification"),
    ("objective.name", "instruct"): ("sft", "chat"),
    ("finetune.strategy", "lora"): ("peft", "adapter"),
    **{("parallel.schedule", name): schedule.other_names for name, schedule in SCHEDULES.items()},
    ("parallel.cp_kind", "gather"): ("all_gather",),
    ("parallel.cp_kind", "heads"): ("ulysses", "a2a", "all_to_all"),
    ("train.precision", "fp32"): ("float32", "32", "no", "false"),
    ("train.precision", "bf16"): ("bfloat16", "bf16_mixed", "mixed"),
    ("train.recompute", "none"): ("false", "no"),
    ("train.recompute", "full"): ("true", "uniform", "block"),
    ("train.device", "cuda"): ("gpu", "cuda:0"),
    ("optim.lr_schedule", "constant"): ("constant_with_warmup",),
    ("optim.lr_schedule", "wsd"): ("warmup_stable_decay",),
    ("optim.optimizer", "adamw"): ("adam", "adamw_torch", "adamw_torch_fused", "fused_adam"),
}
"""Key and one of its words -> what other systems write for it."""


def value_for(key: str, found: object, choices: Iterable[object]) -> str | None:
    """The choice that is meant by a word of another system, or by one in other letters; None if none is."""
    word = _plain(str(found))
    same = (choice for choice in choices if isinstance(choice, str) and _plain(choice) == word)
    theirs = (ours for (k, ours), names in OTHER_VALUES.items() if k == key and word in map(_plain, names))
    return next(same, None) or next(theirs, None)


def _plain(word: str) -> str:
    return word.lower().replace("-", "").replace("_", "").replace(" ", "")


OTHER_LAYERS: dict[str, tuple[str, ...]] = {
    "query": ("q_proj", "q", "wq", "q_lin", "query_proj"),
    "key": ("k_proj", "k", "wk", "k_lin", "key_proj"),
    "value": ("v_proj", "v", "wv", "v_lin", "value_proj"),
    "query, key, value": ("qkv", "qkv_proj", "c_attn", "query_key_value", "wqkv", "in_proj", "linear_qkv"),
    "out": ("o_proj", "o", "wo", "out_proj", "out_lin", "linear_proj"),
    "out, down": ("c_proj", "dense"),
    "up": ("up_proj", "fc1", "c_fc", "wi", "wi_1", "w3", "lin1", "dense_h_to_4h"),
    "gate": ("gate_proj", "wi_0", "w1"),
    "gate, up": ("gate_up_proj", "linear_fc1"),
    "down": ("down_proj", "fc2", "w2", "lin2", "dense_4h_to_h", "linear_fc2"),
    "query_down": ("q_a_proj",),
    "kv_down": ("kv_a_proj_with_mqa",),
    "kv_up": ("kv_b_proj",),
}
"""Linear layers of a block -> the last part of their names in models of Hugging Face, Megatron-LM and Meta."""


def layers_for(name: str) -> list[str]:
    """The linear layers that other systems call `name`; none if there are none."""
    last = name.rpartition(".")[2].lower()
    return next((ours.split(", ") for ours, names in OTHER_LAYERS.items() if last in names), [])


DATA_RANKS = frozenset(("dp", "data_parallel", "data_parallel_size", "dp_size"))
"""Names of what is not a key: data ranks are what the other axes leave of the processes."""
NO_DATA_RANKS = (
    "leave it out: the number of data ranks is that of the processes (--processes N) divided by tp × cp × pp"
)
NUMBER_OF_PROCESSES = frozenset(("-n", "-np", "--np", "--nproc", "--nproc-per-node", "--num-gpus", "--gpus", "--ngpus"))
"""Options of launchers that our own calls --processes."""


def key_for(name: str) -> str | None:
    """The key that another system calls `name`, whatever section is written before it and however words are joined;
    None if there is none."""
    plain = name.lstrip("-").replace("-", "_").lower()
    return _KEYS.get(plain.replace(".", "_")) or _KEYS.get(plain.rpartition(".")[2])


_KEYS = {name: key for key, names in OTHER_NAMES.items() for name in names}
