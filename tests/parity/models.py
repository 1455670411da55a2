"""The small models on which layouts are compared, each with features that have broken parity somewhere.

cases.py makes the cases of each: whoever adds a model here writes no other line.
"""

from typing import get_args

from roots_dist.config.model import ModelConfig
from roots_dist.config.objectives import OBJECTIVES as RECORDS
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
    "gemma": dict(
        layers=4, hidden=32, heads=4, kv_heads=2, head_dim=12, ffn=48, vocab=101, init_std=0.1, positions="rotary", norm="rmsnorm",
        norm_position="sandwich", zero_centered_norm=True, activation="geglu", bias=False, embedding_multiplier=5.7, qk_norm="head",
        attention_scale=0.2, attention_softcap=2.0, logit_softcap=1.5, layer_kinds=["window", "full"], window=5, window_rope_theta=100.0,
        rope_scaling={"type": "linear", "factor": 2.0},
    ),
    "olmo": dict(
        layers=4, hidden=32, heads=8, kv_heads=2, ffn=48, vocab=101, dropout=0.1, init_std=0.1, positions="rotary", norm="rmsnorm",
        norm_position="branch", activation="swiglu", bias=False, tied_embeddings=False, qk_norm="whole", window=6,
        layer_kinds=["window", "nope", "full"], rope_scaling={"type": "yarn", "factor": 4.0, "original_length": 8},
    ),
    "stable": dict(
        layers=4, hidden=32, heads=4, vocab=101, dropout=0.1, init_std=0.1, positions="rotary", rotary_fraction=0.5,
        rotary_interleaved=True, bias=False, qkv_bias=True, mlp_bias=True, head_bias=True, tied_embeddings=False, norm_affine=False,
        residual_multiplier=0.7, logits_scaling=2.0, window=7,
    ),
    "neox": dict(
        layers=4, hidden=32, heads=4, vocab=101, dropout=0.1, attention_dropout=0.1, init_std=0.1, positions="rotary",
        rotary_fraction=0.25, branches="parallel", tied_embeddings=False,
    ),
    "falcon": dict(
        layers=4, hidden=32, heads=4, kv_heads=1, vocab=101, init_std=0.1, positions="rotary", branches="parallel_one_norm",
        activation="gelu", bias=False,
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


def _words(key: str) -> tuple[str, ...]:
    return get_args(ModelConfig.model_fields[key].annotation)


WORDS = {
    "positions": _words("positions"),
    "norm": _words("norm"),
    "norm_position": _words("norm_position"),
    "activation": _words("activation"),
}
"""What a key of the model may say. A word that no model above has gets one: gpt with this word."""
MODELS |= {
    f"gpt-{word}": MODELS["gpt"] | {key: word}
    for key, words in WORDS.items()
    for word in words
    if all(getattr(ModelConfig(**model), key) != word for model in MODELS.values())
}
MODELS |= {
    "mixtral": dict(
        layers=4, hidden=32, heads=8, kv_heads=2, ffn=24, vocab=101, dropout=0.1, init_std=0.1, positions="rotary", norm="rmsnorm",
        activation="swiglu", bias=False, tied_embeddings=False, experts=5, experts_per_token=2,
    ),
    "qwen-moe": dict(
        layers=4, hidden=32, heads=4, ffn=40, vocab=101, init_std=0.1, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False,
        qkv_bias=True, experts=7, experts_per_token=3, expert_ffn=12, shared_expert_ffn=20, shared_expert_gate=True, dense_layers=1,
        router_score="sigmoid", normalize_expert_weights=False, routed_scaling_factor=1.5,
    ),
    "deepseek": dict(
        layers=4, hidden=32, heads=4, ffn=40, vocab=101, dropout=0.1, init_std=0.1, positions="rotary", rotary_interleaved=True,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_length": 8, "mscale": 0.7, "mscale_all_dim": 0.9}, norm="rmsnorm",
        activation="swiglu", bias=False, tied_embeddings=False, kv_lora_rank=10, q_lora_rank=14, qk_nope_head_dim=6, qk_rope_head_dim=4,
        v_head_dim=7, experts=4, experts_per_token=2, expert_ffn=12, shared_expert_ffn=24, dense_layers=1, expert_groups=2,
        groups_per_token=1, group_score_experts=1, normalize_expert_weights=False, routed_scaling_factor=1.5,
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
    "llama-packed": ("llama", "instruct"),
    "gpt-prefers": ("gpt", "dpo"),
    "t5-seq2seq": ("t5", "seq2seq"),
}
"""Name -> the model, and the task that it is fine-tuned on."""
STRATEGIES = {
    "full": dict(finetune__layer_lr_decay=0.8),
    "partial": dict(
        finetune__strategy="partial", finetune__trainable=["head.*", "blocks.2.*", "blocks.0.norm1.weight"]
    ),
    "progressive": dict(
        finetune__strategy="progressive",
        finetune__unfreeze_every=1,
        finetune__unfreeze_blocks=2,
        finetune__layer_lr_decay=0.9,
    ),
    "lora": dict(
        finetune__strategy="lora", finetune__lora_rank=3, finetune__lora_targets=["query", "value", "out", "up", "down"]
    ),
}
"""What learns. `bert-classify+lora` is bert-classify learned so."""
OBJECTIVES = {
    "mixtral": {"balance_loss": 0.1, "router_z_loss": 0.01},
    "qwen-moe": {"balance_loss": 0.05},
    "bert": {"name": "mlm-nsp"},
    "roberta": {"name": "mlm", "whole_word_mask": True},
    "electra": {"name": "rtd"},
    "t5": {"name": "spans", "mask_probability": 0.4},  # the stacks weigh alike, and their border falls anywhere
    "t5-v1.1": {"name": "spans", "mask_probability": 0.4},
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

    Where tensor or context ranks talk, two to four microbatches must do instead of eight: a sum over gloo costs milliseconds,
    whatever its size, and each microbatch has dozens.
    """
    model, _, strategy = model.partition("+")
    changes = (STRATEGIES[strategy] if strategy else {}) | changes
    if changes.get("parallel__tp", 1) > 1 or changes.get("parallel__cp", 1) > 1:
        several = changes.get("parallel__pp", 1) > 1 or changes.get("parallel__zero_stage", 0) > 0
        changes = {"train__micro_batch": 2 if several else 4} | changes
    objective = COMMON["objective"] | OBJECTIVES.get(model, {})
    sections = SECTIONS.get(model, {})
    if model in FINETUNED:
        task = RECORDS[objective["name"]]
        pair = {"pair_column": "other"} if model == "bert-pairs" else {}
        pair |= {"packing": True} if model == "llama-packed" else {}
        seqs = {"seq_length": 16, "target_seq_length": 12} if model == "t5-seq2seq" else {"seq_length": 16}
        sections = {"finetune": (LABELS if task.has_labels else {}) | pair, "data": seqs}
        if task.has_references:
            objective = {key: value for key, value in objective.items() if key != "z_loss"}
        if task.has_labels:  # these predict no tokens, and a key without a use is refused
            objective = {key: value for key, value in objective.items() if key != "z_loss"}
            sections["advanced"] = {key: v for key, v in COMMON["advanced"].items() if key != "loss_chunk"}
    name = FINETUNED.get(model, (model,))[0]
    base = Config.model_validate({"model": MODELS[name], **COMMON, "objective": objective, **sections})
    return base.changed({key.replace("__", "."): value for key, value in changes.items()})
