"""Size of a model: stacks, blocks and parameters of every family, by arithmetic alone.

    Config --parameters--> checks on a login node, memory, banners, reports

learning/models/parameter_locations.py counts the same by building the model on the meta device, which needs torch; this
file takes a millisecond without it. A test holds both equal for every objective of every family.
"""

from __future__ import annotations

from roots_dist.config.model import ModelConfig
from roots_dist.config.records import family_of, objective_of
from roots_dist.config.schema import Config


def generator_of(config: Config) -> Config:
    """Config of ELECTRA's generator as a model of its own. Its widths default to a quarter of the discriminator's
    (Clark et al. 2020, section 3.2), with heads of the same width."""
    m, g = config.model, config.generator
    heads = g.heads or max(1, m.heads // 4)
    hidden = g.hidden or heads * m.width_of_head()
    values = {
        "layers": g.layers or m.layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": None,
        "head_dim": m.head_dim,
        "ffn": g.ffn or max(1, m.width_of_ffn() * hidden // m.hidden),
        "embedding_size": m.width_of_embedding(),
    }
    return config.changed({f"model.{key}": value for key, value in values.items()})


def decoder_of(config: Config) -> Config:
    """Config of T5's decoder as a stack of its own."""
    return config.changed({"model.layers": config.model.num_decoder_layers()})


def num_blocks(config: Config) -> int:
    """Number of Transformer blocks of the whole model; each pipeline stage needs one."""
    m = config.model
    second = m.num_decoder_layers() if family_of(config).has_two_stacks else 0
    generator = generator_of(config).model.layers if objective_of(config).has_generator else 0
    return m.layers + second + generator


def parameters(config: Config) -> int:
    """Number of parameters of the whole model in any layout: vocabulary padded, tied copies counted once, adapters left
    out."""
    m, family, objective = config.model, family_of(config), objective_of(config)
    vocab, width = config.padded_vocab(), m.width_of_embedding()
    per_channel = (2 if m.norm == "layernorm" else 1) if m.norm_affine else 0
    embed = vocab * width + m.segments * width + (width * per_channel if m.embedding_norm else 0)
    embed += (m.max_positions or config.data.seq_length) * width if m.positions == "learned" else 0

    def linear(inputs: int, outputs: int, bias: bool) -> int:
        return inputs * outputs + (outputs if bias else 0)

    def norm(width: int) -> int:
        return width * per_channel

    def attention(of: Config) -> int:
        n = of.model
        if n.kv_lora_rank is not None:
            return latent_attention(n, n.kv_lora_rank)
        hq, hkv = n.heads * n.width_of_head(), n.num_kv_heads() * n.width_of_head()
        qkv = linear(n.hidden, hq, n.bias_of_qkv()) + 2 * linear(n.hidden, hkv, n.bias_of_qkv())
        norms = {"none": 0, "head": 2 * n.width_of_head(), "whole": hq + hkv}[n.qk_norm]
        return qkv + linear(hq, n.hidden, n.bias_of_out()) + norms

    def latent_attention(n: ModelConfig, latent: int) -> int:
        width, queries = n.hidden, 0
        if n.q_lora_rank is not None:
            width, queries = n.q_lora_rank, n.hidden * n.q_lora_rank + norm(n.q_lora_rank)
        queries += width * n.heads * n.width_of_head()
        down = n.hidden * (latent + n.qk_rope_head_dim) + norm(latent)
        up = latent * n.heads * (n.qk_nope_head_dim + n.v_head_dim)
        return queries + down + up + linear(n.heads * n.v_head_dim, n.hidden, n.bias_of_out())

    def stack(of: Config) -> int:
        n = of.model
        norms = 4 if n.norm_position == "sandwich" else 1 if n.branches == "parallel_one_norm" else 2
        sparse = n.num_expert_layers()
        mlps = (n.layers - sparse) * _mlp(n, n.width_of_ffn()) + sparse * _experts(n)
        return n.layers * (attention(of) + norms * norm(n.hidden)) + mlps

    def words(hidden: int, out: int) -> int:
        """Parameters of the head of masked tokens: a layer, a norm, and a bias per token; its projection is the
        embedding if tied."""
        return hidden * out + out + norm(out) + vocab + (0 if m.tied_embeddings else vocab * out)

    def project(hidden: int) -> int:
        return (width + 1) * hidden if width != hidden else 0

    total = embed + project(m.hidden) + stack(config)
    if family.has_two_stacks:
        decoder = decoder_of(config)
        tables = 2 * m.relative_buckets * m.heads if m.positions == "relative" else 0
        cross = decoder.model.layers * (attention(decoder) + norm(m.hidden))
        total += stack(decoder) + cross + tables + 2 * norm(m.hidden)
    elif family.last_norm and m.ends_with_norm():
        total += norm(m.hidden)
    if objective.has_labels:
        return total + _task_head(config)
    if objective.has_generator:
        generator = generator_of(config)
        total += project(generator.model.hidden) + stack(generator) + words(generator.model.hidden, width)
        return total + m.hidden * (m.hidden + 1) + m.hidden + 1
    if objective.pairs:
        total += m.hidden * (m.hidden + 1) + 2 * (m.hidden + 1)
    if objective.masks:
        return total + words(m.hidden, width)
    return total + (0 if m.tied_embeddings else vocab * m.hidden) + (vocab if m.head_bias else 0)


def expert_parameters(config: Config) -> int:
    """Number of parameters of all experts that tokens are sent to, which parallel.ep cuts over ranks."""
    m = config.model
    return m.num_expert_layers() * (m.experts or 0) * _mlp(m, m.width_of_expert())


def active_parameters(config: Config) -> int:
    """Number of parameters that a token uses: without those of the experts that it is not sent to."""
    m = config.model
    used = expert_parameters(config) * m.experts_per_token // (m.experts or 1)
    return parameters(config) - expert_parameters(config) + used


def parameters_in_words(config: Config) -> str:
    """`2,566,272 parameters`, and how many of them a token uses, where that are not all."""
    every, active = parameters(config), active_parameters(config)
    return f"{every:,} parameters" + (f", {active:,} for each token" if active < every else "")


def _mlp(m: ModelConfig, width: int) -> int:
    matrices = (3 if m.gated() else 2) * m.hidden * width
    return matrices + ((2 if m.gated() else 1) * width + m.hidden if m.bias_of_mlp() else 0)


def _experts(m: ModelConfig) -> int:
    """Parameters of the experts of one block, of their router, and of the shared one with its gate."""
    shared = _mlp(m, m.shared_expert_ffn) if m.shared_expert_ffn else 0
    routed = (m.experts or 0) * (m.hidden + (1 if m.router_bias else 0) + _mlp(m, m.width_of_expert()))
    return routed + shared + (m.hidden if m.shared_expert_gate else 0)


def _task_head(config: Config) -> int:
    """Number of parameters of a task's head over classes (learning/models/heads.py)."""
    m, one_label, classes = config.model, objective_of(config).answer == "classify", len(config.finetune.labels)
    if one_label and family_of(config).pooling == "last":
        return m.hidden * classes
    return (m.hidden + 1) * (classes + (m.hidden if one_label else 0))
