"""Keys and values that had another name: a config which still uses one is refused with the new name. Also names that
other systems give to what there cannot be here."""

from __future__ import annotations

RENAMED = {
    "model.tied": "model.tied_embeddings",
    "model.embedding": "model.embedding_size",
    "model.relative_distance": "model.relative_max_distance",
    "objective.borders": "objective.reset_at_documents",
    "objective.masked": "objective.mask_probability",
    "objective.mask_share": "objective.mask_replace_probability",
    "objective.random_share": "objective.random_replace_probability",
    "objective.whole_words": "objective.whole_word_mask",
    "objective.span": "objective.mean_span_length",
    "data.seq": "data.seq_length",
    "data.target_seq": "data.target_seq_length",
    "finetune.start": "finetune.init_from",
    "finetune.learn": "finetune.trainable",
    "finetune.every": "finetune.unfreeze_every",
    "finetune.every_epochs": "finetune.unfreeze_every_epochs",
    "finetune.blocks": "finetune.unfreeze_blocks",
    "finetune.layer_decay": "finetune.layer_lr_decay",
    "finetune.rank": "finetune.lora_rank",
    "finetune.alpha": "finetune.lora_alpha",
    "finetune.targets": "finetune.lora_targets",
    "finetune.text": "finetune.text_column",
    "finetune.pair": "finetune.pair_column",
    "finetune.label": "finetune.label_column",
    "finetune.template": "finetune.chat_template",
    "parallel.chunks": "parallel.virtual_stages",
    "parallel.sequence": "parallel.sequence_parallel",
    "parallel.zero": "parallel.zero_stage",
    "train.batch": "train.global_batch",
    "optim.rate": "optim.lr_schedule",
    "optim.warmup": "optim.warmup_steps",
    "optim.decay": "optim.decay_steps",
    "optim.clip": "optim.clip_grad",
    "advanced.double": "advanced.float64",
    "advanced.sinusoidal_start": "advanced.sinusoidal_init",
}
RENAMED_VALUES = {("advanced.engine", "auto"): "reference"}
"""(Key, its old value) -> the value that does the same."""
NO_EQUAL = dict.fromkeys(
    ("aux_loss", "global_aux_loss", "moe_aux_loss_coeff", "router_aux_loss_coef"),
    "use objective.balance_loss, which is of each sequence; that of a batch would depend on its microbatches "
    "(docs/experts.md)",
)
"""The last part of a key -> what to do instead."""
