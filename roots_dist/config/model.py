"""The model section of the config: one Transformer, its features as keys, in sizes of the whole model.

    model.* --ModelConfig--> learning/models/: layers        storage/exchange/: config.json of transformers

Defaults are GPT-2's. A key that belongs to few released models names one of them.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from roots_dist.config.activations import GATED, ActivationName
from roots_dist.config.extensions import or_extended
from roots_dist.config.families import FAMILIES, FamilyName
from roots_dist.config.rope_scaling import RopeScaling, score_factor
from roots_dist.config.section import Section

LayerKind = Literal["full", "window", "nope"]

MOST_LAYERS, MOST_HEADS, WIDEST = 1 << 14, 1 << 14, 1 << 20
LARGEST_VOCAB = 1 << 24
"""Bounds far above any model: within them counts, and plans that list blocks, end."""


class ModelConfig(Section):
    """One Transformer. Sizes are global, whatever the layout."""

    family: Annotated[FamilyName, or_extended("families")] = Field(
        "gpt", description="; ".join(f"{r.name}: {r.title}" for r in FAMILIES.values())
    )
    layers: int = Field(4, ge=1, le=MOST_LAYERS, description="number of Transformer blocks (t5: of the encoder)")
    decoder_layers: int | None = Field(
        None, ge=1, le=MOST_LAYERS, description="t5: blocks of the decoder; default: layers"
    )
    hidden: int = Field(256, ge=1, le=WIDEST, description="width of the residual stream")
    heads: int = Field(4, ge=1, le=MOST_HEADS, description="query heads")
    kv_heads: int | None = Field(None, ge=1, description="key/value heads (grouped-query attention); default: heads")
    head_dim: int | None = Field(None, ge=1, le=WIDEST, description="width of a head; default: hidden / heads")
    ffn: int | None = Field(None, ge=1, description="width of the MLP; default: 4 × hidden")
    vocab: int = Field(4096, ge=2, le=LARGEST_VOCAB, description="number of token ids, before padding")
    embedding_size: int | None = Field(
        None, ge=1, description="width of the embedding, projected where hidden differs (electra); default: hidden"
    )
    segments: int = Field(
        0, ge=0, description="kinds of segments with a learned vector each (bert, electra: 2); 0: none"
    )
    positions: Literal["learned", "rotary", "sinusoidal", "alibi", "relative", "none"] = Field(
        "learned", description="how the model knows where a token stands; relative: T5's learned bias"
    )
    max_positions: int | None = Field(
        None,
        ge=1,
        description="learned: positions there are; rotary: length that it is made for; default: data.seq_length",
    )
    relative_buckets: int = Field(32, ge=2, description="relative: distances with a bias of their own")
    relative_max_distance: int = Field(128, ge=2, description="relative: beyond it, one bucket for all")
    rope_theta: float = Field(10000.0, gt=0, description="base of the rotary frequencies")
    rope_scaling: RopeScaling | None = Field(
        None, description="rotary frequencies for longer texts: {type: linear, llama3, yarn or longrope, factor: ...}"
    )
    rotary_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="share of a head's width that is rotated: whole channels, rounded down as in transformers",
    )
    rotary_interleaved: bool = Field(False, description="rotate neighbouring channels (GPT-J), not the two halves")
    layer_kinds: tuple[LayerKind, ...] = Field(
        (),
        description="attention of each block, repeated over the blocks: full; window: to the last model.window tokens; "
        "nope: full without rotary positions; default: window if model.window is set, otherwise full",
    )
    window: int | None = Field(None, ge=1, description="keys that a query sees in a window block, its own included")
    window_rope_theta: float | None = Field(
        None, gt=0, description="base of the rotary frequencies of window blocks, unscaled; default: as in the others"
    )
    qk_norm: Literal["none", "head", "whole"] = Field(
        "none", description="RMSNorm of queries and keys: of each head (Qwen 3), or of all heads together (OLMo 2)"
    )
    attention_scale: float | None = Field(
        None, gt=0, description="factor of the scores; default: 1 / sqrt(width of a key's head)"
    )
    attention_softcap: float | None = Field(None, gt=0, description="scores are capped: c tanh(score / c) (Gemma 2)")
    kv_lora_rank: int | None = Field(
        None,
        ge=1,
        le=WIDEST,
        description="latent attention: width of the vector of a position that keys and values of all heads are made "
        "from (DeepSeek-V2 and V3: 512); default: they are made from the residual stream",
    )
    q_lora_rank: int | None = Field(
        None,
        ge=1,
        le=WIDEST,
        description="latent attention: the same for queries (DeepSeek-V3: 1536); default: from the residual stream",
    )
    qk_nope_head_dim: int = Field(
        128,
        ge=1,
        le=WIDEST,
        description="latent attention: channels of a head of queries and keys that are not rotated",
    )
    qk_rope_head_dim: int = Field(
        64, ge=2, le=WIDEST, description="latent attention: those that are rotated; all heads share these of the key"
    )
    v_head_dim: int = Field(128, ge=1, le=WIDEST, description="latent attention: width of a value's head")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="rmsnorm has no mean and no bias")
    norm_position: Literal["pre", "post", "branch", "sandwich"] = Field(
        "pre",
        description="before each branch; after its sum; branch: on its output (OLMo 2); sandwich: before it and on its "
        "output (Gemma 2)",
    )
    branches: Literal["sequential", "parallel", "parallel_one_norm"] = Field(
        "sequential",
        description="parallel: attention and MLP read the same input, each through its own norm (GPT-NeoX) or both "
        "through one (GPT-J), and are summed at once",
    )
    norm_affine: bool = Field(True, description="norms have weights (OLMo 1: no)")
    zero_centered_norm: bool = Field(False, description="norms multiply by 1 + weight (Gemma)")
    embedding_norm: bool = Field(False, description="a norm right after the embedding, as BLOOM has")
    activation: Annotated[ActivationName, or_extended("activations")] = Field(
        "gelu_tanh", description=f"of the MLP; {' and '.join(GATED)} (T5 v1.1) have a third matrix, the gate"
    )
    pooler_activation: Literal["tanh", "relu"] = Field(
        "tanh", description="after the layer between a text's first position and its classes; relu: DistilBERT"
    )
    experts: int | None = Field(
        None, ge=2, description="MLPs of a block of which each token uses some (Mixtral: 8); default: one MLP for all"
    )
    experts_per_token: int = Field(2, ge=1, description="experts that a token uses: those with the highest scores")
    expert_ffn: int | None = Field(None, ge=1, description="width of an expert; default: model.ffn")
    shared_expert_ffn: int | None = Field(
        None, ge=1, description="width of one more expert that every token uses (Qwen2-MoE); default: there is none"
    )
    shared_expert_gate: bool = Field(False, description="a sigmoid of its own scales the shared expert (Qwen2-MoE)")
    router_score: Literal["softmax", "sigmoid"] = Field(
        "softmax", description="what the router makes of its logits: over all experts, or each alone (DeepSeek-V3)"
    )
    normalize_expert_weights: bool = Field(
        True, description="the scores of a token's experts are divided by their sum (OLMoE: no)"
    )
    expert_groups: int = Field(
        1, ge=1, description="groups of neighbouring experts, of which a token uses some (DeepSeek-V3: 8)"
    )
    groups_per_token: int = Field(
        1, ge=1, description="those of model.expert_groups whose best experts have the highest sum of scores"
    )
    group_score_experts: int = Field(
        2, ge=1, description="the best experts of a group whose scores are summed to compare groups (DeepSeek-V2: 1)"
    )
    router_bias: bool = Field(
        False,
        description="experts are chosen by their score and a bias that each step moves towards even use (DeepSeek-V3)",
    )
    routed_scaling_factor: float = Field(1.0, gt=0, description="factor of the experts' weights (DeepSeek-V3: 2.5)")
    dense_layers: int = Field(0, ge=0, description="the first blocks, which have one MLP all the same (DeepSeek-V3: 3)")
    expert_every: int = Field(
        1, ge=1, description="of the others every n-th block of the model has experts (decoder_sparse_step)"
    )
    bias: bool = Field(True, description="biases in the linear layers")
    qkv_bias: bool | None = Field(None, description="bias of query, key and value; default: model.bias")
    out_bias: bool | None = Field(None, description="bias of attention's output; default: model.bias")
    mlp_bias: bool | None = Field(None, description="biases of the MLP; default: model.bias")
    head_bias: bool = Field(False, description="bias of the output projection over the vocabulary")
    embedding_multiplier: float = Field(1.0, gt=0, description="factor of the token embedding (Gemma: sqrt(hidden))")
    residual_multiplier: float = Field(1.0, gt=0, description="factor of each branch (Granite)")
    logits_scaling: float = Field(1.0, gt=0, description="logits are divided by it (Granite)")
    logit_softcap: float | None = Field(None, gt=0, description="logits are capped: c tanh(logit / c) (Gemma 2)")
    tied_embeddings: bool = Field(True, description="the output projection is the token embedding")
    dropout: float = Field(0.0, ge=0, lt=1, description="after the embedding and after each residual branch")
    attention_dropout: float = Field(0.0, ge=0, lt=1, description="on attention probabilities; needs the slow path")
    init_std: float | None = Field(
        None, gt=0, description="standard deviation of initial weights; default: 0.02, t5: by each matrix's inputs"
    )

    def num_kv_heads(self) -> int:
        return self.kv_heads or self.heads

    def width_of_head(self) -> int:
        """Width of the heads of queries and keys."""
        if self.kv_lora_rank is not None:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.head_dim or self.hidden // self.heads

    def width_of_value(self) -> int:
        """Width of the heads of values."""
        return self.width_of_head() if self.kv_lora_rank is None else self.v_head_dim

    def usual_attention_scale(self) -> float:
        """Factor of the scores, if attention_scale does not say another one."""
        scale: float = self.width_of_head() ** -0.5
        return scale if self.kv_lora_rank is None else scale * score_factor(self.rope_scaling)

    def width_of_ffn(self) -> int:
        return self.ffn or 4 * self.hidden

    def width_of_expert(self) -> int:
        return self.expert_ffn or self.width_of_ffn()

    def has_experts(self, block: int) -> bool:
        """True if this block, counted from 0, has experts in the place of its MLP."""
        return self.experts is not None and block >= self.dense_layers and (block + 1) % self.expert_every == 0

    def num_expert_layers(self) -> int:
        if self.experts is None or self.dense_layers > self.layers:
            return 0
        return self.layers // self.expert_every - self.dense_layers // self.expert_every

    def widths_of_mlps(self) -> dict[str, int]:
        """Widths of all kinds of MLP that the model has, by the key that says them."""
        sparse = self.num_expert_layers()
        widths = {"model.ffn": self.width_of_ffn()} if sparse < self.layers else {}
        if sparse:
            widths["model.expert_ffn" if self.expert_ffn else "model.ffn"] = self.width_of_expert()
            if self.shared_expert_ffn:
                widths["model.shared_expert_ffn"] = self.shared_expert_ffn
        return widths

    def std(self) -> float:
        """Standard deviation of initial weights, except where a matrix's own width sets it."""
        return self.init_std or 0.02

    def width_of_embedding(self) -> int:
        return self.embedding_size or self.hidden

    def num_decoder_layers(self) -> int:
        """Number of layers in the decoder of an encoder-decoder; `layers` counts those of its encoder."""
        return self.decoder_layers or self.layers

    def gated(self) -> bool:
        return self.activation in GATED

    def has_parallel_branches(self) -> bool:
        return self.branches != "sequential"

    def ends_with_norm(self) -> bool:
        """True if a norm follows the last block; False if each block already ends with one on the residual stream."""
        return self.norm_position != "post"

    def bias_of_qkv(self) -> bool:
        return self.bias if self.qkv_bias is None else self.qkv_bias

    def bias_of_out(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    def bias_of_mlp(self) -> bool:
        return self.bias if self.mlp_bias is None else self.mlp_bias

    def rotary_width(self) -> int:
        """Channels of a head that are rotated."""
        if self.kv_lora_rank is not None:
            return self.qk_rope_head_dim
        return int(self.width_of_head() * self.rotary_fraction + 1e-5)  # 1/3 of 48 are 16, as written in decimals

    def rotary_share_is_rounded(self) -> bool:
        """True if rotary_fraction of a head is not a whole number of channels."""
        asked = self.width_of_head() * self.rotary_fraction
        whole = self.positions != "rotary" or self.kv_lora_rank is not None
        return not whole and abs(asked - self.rotary_width()) > 1e-3 * asked

    def kinds(self) -> tuple[LayerKind, ...]:
        """Kind of attention of each block."""
        pattern: tuple[LayerKind, ...] = self.layer_kinds or (("full",) if self.window is None else ("window",))
        return tuple(pattern[i % len(pattern)] for i in range(self.layers))


class GeneratorConfig(Section):
    """ELECTRA's small model that replaces tokens; the rest of it is as model.* says."""

    layers: int | None = Field(None, ge=1, le=MOST_LAYERS, description="blocks; default: model.layers")
    hidden: int | None = Field(None, ge=1, le=WIDEST, description="width; default: a quarter of model.hidden")
    heads: int | None = Field(None, ge=1, le=MOST_HEADS, description="heads; default: a quarter of model.heads")
    ffn: int | None = Field(None, ge=1, description="width of the MLP; default: a quarter of the model's")
