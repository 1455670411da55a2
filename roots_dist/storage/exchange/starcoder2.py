"""StarCoder2 (Lozhkov et al. 2024) and StableLM 2 (Bellagente et al. 2024) in transformers: Llama's names, with
LayerNorm."""

from __future__ import annotations

from roots_dist.storage.exchange.llama import LLAMA, OURS, L
from roots_dist.storage.exchange.rotary import EVERY_LAYER, nested
from roots_dist.storage.exchange.table import ConfigKey, Fixed, same_layout, variant

PLAIN = {"gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_MLP = [f"{L}.mlp.{part}_proj.*" for part in ("gate", "up", "down")]
STARCODER2 = variant(
    LLAMA,
    "starcoder2",
    "Starcoder2",
    stack=(
        *(entry for entry in LLAMA.stack if entry.theirs not in _MLP),
        *same_layout({f"{L}.mlp.c_fc": f"{OURS}.mlp.up", f"{L}.mlp.c_proj": f"{OURS}.mlp.down"}),
    ),
    ours={"model.norm": "layernorm"},
    without=("attention_bias", "mlp_bias", "head_dim", "rms_norm_eps"),
    keys=[
        ConfigKey("hidden_act", "model.activation", "gelu_pytorch_tanh", PLAIN),
        *(ConfigKey("use_bias", name, True) for name in ("model.qkv_bias", "model.out_bias", "model.mlp_bias")),
        ConfigKey("norm_epsilon", "advanced.norm_eps", 1e-5),
        ConfigKey("residual_dropout", "model.dropout", 0.0),
        ConfigKey("embedding_dropout", "model.dropout", 0.0),
        ConfigKey("sliding_window", "model.window"),
    ],
    fixed=[Fixed("mlp_type", "default", written=False), Fixed("norm_type", "layer_norm", written=False)],
    defaults=dict(
        vocab_size=49152,
        hidden_size=3072,
        intermediate_size=12288,
        num_hidden_layers=30,
        num_attention_heads=24,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    ),
    derived=EVERY_LAYER,
    inert=("activation_function", "layer_norm_epsilon", "scale_attn_weights", "scale_attention_softmax_in_fp32"),
    kinds=("full", "window"),
)
"""The inert keys are of the first StarCoder: released files have them, and nothing reads them."""

STABLELM = variant(
    LLAMA,
    "stablelm",
    "StableLm",
    ours={"model.norm": "layernorm", "model.out_bias": False, "model.mlp_bias": False},
    without=("attention_bias", "mlp_bias", "head_dim", "rms_norm_eps", "partial_rotary_factor"),
    keys=[
        ConfigKey("use_qkv_bias", "model.qkv_bias", False),
        ConfigKey("layer_norm_eps", "advanced.norm_eps", 1e-5),
        ConfigKey("partial_rotary_factor", "model.rotary_fraction", 0.25),
        ConfigKey("hidden_dropout", "model.dropout", 0.0),
        ConfigKey("use_parallel_residual", "model.branches", False, {False: "sequential", True: "parallel_one_norm"}),
    ],
    fixed=[Fixed("qk_layernorm", False)],
    defaults=dict(
        vocab_size=50304, hidden_size=2560, intermediate_size=6912, num_key_value_heads=32, max_position_embeddings=4096
    ),
    nest=lambda tree: nested(tree, usual_share=0.25),
)
