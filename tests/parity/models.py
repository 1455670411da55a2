"""The small models on which layouts are compared, each with features that have broken parity somewhere."""

from roots_dist.config.schema import Config

COMMON = {
    "data": {"seq_length": 16},
    "train": {"global_batch": 8, "micro_batch": 1, "steps": 10, "seed": 7},
    "optim": {"lr": 1e-2, "warmup_steps": 2, "clip_grad": 0.05, "weight_decay": 0.1},
    "objective": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "advanced": {"float64": True, "engine": "reference", "vocab_multiple": 8, "loss_chunk": 5, "norm_eps": 1e-5},
}
"""Clipping is active, dropout is on, some targets are not scored, the vocabulary is not divisible by any tp."""

MODELS = {
    "gpt": dict(layers=4, hidden=32, heads=4, vocab=101, dropout=0.1, attention_dropout=0.1, init_std=0.1),
    "llama": dict(
        layers=4, hidden=32, heads=8, kv_heads=2, ffn=48, vocab=101, dropout=0.1, init_std=0.1,
        positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tied_embeddings=False,
    ),
    "bloom": dict(layers=4, hidden=32, heads=4, vocab=101, dropout=0.1, init_std=0.1, positions="alibi", embedding_norm=True),
    "post": dict(
        layers=4, hidden=32, heads=4, vocab=101, dropout=0.1, init_std=0.1, positions="sinusoidal", norm_position="post", activation="gelu"
    ),
    "bert": dict(
        family="bert", layers=4, hidden=32, heads=4, vocab=101, dropout=0.1, attention_dropout=0.1, init_std=0.1, segments=2,
        norm_position="post", embedding_norm=True, activation="gelu",
    ),
    "roberta": dict(
        family="bert", layers=4, hidden=32, heads=4, vocab=101, dropout=0.1, init_std=0.1, norm_position="post",
        embedding_norm=True, activation="gelu", tied_embeddings=False,
    ),
    "electra": dict(
        family="electra", layers=4, hidden=32, heads=8, embedding_size=24, vocab=101, dropout=0.1, attention_dropout=0.1, init_std=0.1,
        segments=2, norm_position="post", embedding_norm=True, activation="gelu",
    ),
    "t5": dict(
        family="t5", layers=4, decoder_layers=3, hidden=32, heads=4, head_dim=12, ffn=48, vocab=101, dropout=0.1, attention_dropout=0.1,
        positions="relative", relative_buckets=8, relative_max_distance=16, norm="rmsnorm", activation="relu", bias=False,
    ),
    "t5-v1.1": dict(
        family="t5", layers=3, decoder_layers=4, hidden=32, heads=4, ffn=48, vocab=101, dropout=0.1, positions="relative",
        relative_buckets=8, relative_max_distance=16, norm="rmsnorm", activation="geglu", bias=False, tied_embeddings=False,
    ),
}  # fmt: skip


FINETUNED = {
    "bert-classify": ("bert", "classify"),
    "bert-pairs": ("bert", "classify"),
    "bert-tag": ("bert", "tag"),
    "electra-classify": ("electra", "classify"),
    "electra-tag": ("electra", "tag"),
    "gpt-classify": ("gpt", "classify"),
    "gpt-tag": ("llama", "tag"),
    "gpt-instruct": ("gpt", "instruct"),
    "t5-seq2seq": ("t5", "seq2seq"),
}
"""Name -> the model, and the task that it is fine-tuned on."""
OBJECTIVES = {
    "bert": {"name": "mlm-nsp"},
    "roberta": {"name": "mlm", "whole_word_mask": True},
    "electra": {"name": "rtd"},
    "t5": {"name": "spans"},
    "t5-v1.1": {"name": "spans"},
    **{name: {"name": task} for name, (_, task) in FINETUNED.items()},
}
"""clm, if not said; with COMMON's label smoothing and z-loss."""
SECTIONS = {
    "electra": {"generator": {"hidden": 16, "heads": 4, "ffn": 24, "layers": 3}, "data": {"seq_length": 24}},
    "bert": {"data": {"seq_length": 24}},
    "t5": {"data": {"seq_length": 32}},
    "t5-v1.1": {"data": {"seq_length": 32}},
}


LABELS = {"labels": ["a", "b", "c"]}


def config(model: str = "gpt", **changes: object) -> Config:
    """A model by name, with changes to the config by `section.key` (written `section__key`).

    Where tensor ranks talk, two to four microbatches must do instead of eight: a sum over gloo costs milliseconds,
    whatever its size, and each microbatch has dozens.
    """
    if changes.get("parallel__tp", 1) > 1:
        several = changes.get("parallel__pp", 1) > 1 or changes.get("parallel__zero_stage", 0) > 0
        changes = {"train__micro_batch": 2 if several else 4} | changes
    objective = COMMON["objective"] | OBJECTIVES.get(model, {})
    sections = SECTIONS.get(model, {})
    if model in FINETUNED:
        pair = {"pair_column": "other"} if model == "bert-pairs" else {}
        seqs = {"seq_length": 16, "target_seq_length": 12} if model == "t5-seq2seq" else {"seq_length": 16}
        sections = {"finetune": LABELS | pair, "data": seqs}
    name = FINETUNED.get(model, (model,))[0]
    base = Config.model_validate({"model": MODELS[name], **COMMON, "objective": objective, **sections})
    return base.changed({key.replace("__", "."): value for key, value in changes.items()})
