"""How large a model is and how much it computes: parameters and FLOPs of every family, by arithmetic alone.

    Config --parameters, parts--> checks, memory (readiness.py), balance of stages (models/), MFU (accounting/flops.py)

The formulas of a block stand here once; the models' pieces take their costs from them. FLOPs are of matrix products,
forward, of one sample. S positions (of the encoder), T of the decoder, D width, F MLP width, V words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from roots_dist.config.schema import Config


def generator_of(config: Config) -> Config:
    """ELECTRA's generator as a model of its own: a quarter of the widths, if not told otherwise (Clark et al. 2020,
    section 3.2), heads as wide as the discriminator's."""
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
    """T5's decoder as a stack of its own."""
    return config.changed({"model.layers": config.model.num_decoder_layers()})


class Lengths(NamedTuple):
    """Of a sample of span corruption."""

    tokens: int
    """read from the corpus"""
    inputs: int
    targets: int
    hidden: int
    """tokens, in"""
    spans: int


def span_lengths(config: Config) -> Lengths:
    """The most tokens whose corrupted text, with a sentinel for each span and the end, fills at most data.seq_length
    positions (Raffel et al. 2020, section 3.1.4, and its code: 512 positions take 568 tokens and give 114 targets)."""
    o, seq = config.objective, config.data.seq_length

    def of(tokens: int) -> Lengths:
        hidden = min(max(round(tokens * o.mask_probability), 1), tokens - 1)
        spans = min(max(round(hidden / o.mean_span_length), 1), hidden, tokens - hidden)
        return Lengths(tokens, tokens - hidden + spans + 1, hidden + spans + 1, hidden, spans)

    found = of(max(2, seq - 1))  # no longer than seq, because each sentinel stands for one token or more
    while (larger := of(found.tokens + 1)).inputs <= seq:
        found = larger
    return found


def tokens_of_a_sample(config: Config) -> int:
    """That a corpus must hold at least."""
    name, seq = config.objective.name, config.data.seq_length
    if name == "spans":
        return span_lengths(config).tokens
    return {"mlm": seq - 2, "rtd": seq - 2, "mlm-nsp": 6}.get(name, seq + 1)  # pairs: of two documents of three tokens


def target_seq(config: Config) -> int:
    """Positions of the decoder."""
    return (
        span_lengths(config).targets
        if config.objective.name == "spans"
        else config.data.target_seq_length or config.data.seq_length
    )


def num_blocks(config: Config) -> int:
    """Transformer blocks of the whole model: each pipeline stage needs one."""
    m = config.model
    if m.family == "t5":
        return m.layers + m.num_decoder_layers()
    if m.family == "electra" and config.objective.name == "rtd":
        return m.layers + generator_of(config).model.layers
    return m.layers


def attention_flops(config: Config, queries: int, keys: float, inputs: int) -> float:
    """Of `queries` positions over `keys` of them, of which `inputs` are projected."""
    m = config.model
    hq, hkv = m.heads * m.width_of_head(), m.num_kv_heads() * m.width_of_head()
    return 4.0 * queries * m.hidden * hq + 4.0 * inputs * m.hidden * hkv + 4.0 * queries * keys * hq


def mlp_flops(config: Config, seq: int) -> float:
    m = config.model
    return 2.0 * seq * (3 if m.gated() else 2) * m.hidden * m.width_of_ffn()


class Part(NamedTuple):
    """A run of equal pieces, and what one of them computes."""

    count: int  # type: ignore[assignment] # hides a tuple's method, which nobody calls
    dense: float
    """FLOPs of matrices with weights"""
    scores: float
    """FLOPs of attention scores and their sums, every position with every other"""
    causal: bool = False
    """half of the scores are never looked at"""
    is_block: bool = True


def parts(config: Config) -> Iterator[Part]:
    """What a training sample goes through. Padded words are not counted: they are never multiplied."""
    m, o, seq = config.model, config.objective, config.data.seq_length
    width, hidden_positions = m.width_of_embedding(), o.mask_probability * seq

    def blocks(of: Config, seq: int, causal: bool) -> Part:
        scores = 4.0 * seq * seq * of.model.heads * of.model.width_of_head()
        return Part(of.model.layers, attention_flops(of, seq, 0, seq) + mlp_flops(of, seq), scores, causal)

    def head(flops: float) -> Part:
        return Part(1, flops, 0.0, is_block=False)

    if m.family == "t5":
        target, decoder = target_seq(config), decoder_of(config)
        yield blocks(config, seq, causal=False)
        yield blocks(decoder, target, causal=True)
        yield Part(
            decoder.model.layers,
            attention_flops(config, target, 0, seq),
            4.0 * target * seq * m.heads * m.width_of_head(),
        )
        yield head(2.0 * target * m.hidden * m.vocab)
        return
    if m.family == "electra" and o.name == "rtd":
        generator = generator_of(config)
        small = generator.model.hidden
        yield head(2.0 * seq * width * small if width != small else 0.0)
        yield blocks(generator, seq, causal=False)
        yield head(2.0 * seq * small * width + 2.0 * hidden_positions * width * m.vocab)
    if width != m.hidden:
        yield head(2.0 * seq * width * m.hidden)
    yield blocks(config, seq, causal=m.family == "gpt")
    if o.name in ("clm", "instruct"):
        yield head(2.0 * seq * m.hidden * m.vocab)
    elif o.name in ("mlm", "mlm-nsp"):
        yield head(2.0 * seq * m.hidden * width + 2.0 * hidden_positions * width * m.vocab)
    elif o.name == "rtd":
        yield head(2.0 * seq * m.hidden * (m.hidden + 1))


def parameters(config: Config) -> int:
    """Of the whole model in any layout, vocabulary padded, copies counted once, adapters left out."""
    m, o = config.model, config.objective
    vocab, width = config.padded_vocab(), m.width_of_embedding()
    bias = m.norm == "layernorm"
    embed = vocab * width + m.segments * width + (width * (1 + bias) if m.embedding_norm else 0)
    embed += (m.max_positions or config.data.seq_length) * width if m.positions == "learned" else 0

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + (outputs if m.bias else 0)

    def norm(width: int) -> int:
        return width * (1 + bias)

    def attention(of: Config) -> int:
        n = of.model
        hq, hkv = n.heads * n.width_of_head(), n.num_kv_heads() * n.width_of_head()
        return linear(n.hidden, hq) + 2 * linear(n.hidden, hkv) + linear(hq, n.hidden)

    def stack(of: Config) -> int:
        n = of.model
        mlp = (2 if n.gated() else 1) * linear(n.hidden, n.width_of_ffn()) + linear(n.width_of_ffn(), n.hidden)
        return n.layers * (attention(of) + mlp + 2 * norm(n.hidden))

    def words(hidden: int, out: int) -> int:
        """A masked word's head: a layer, a norm, a bias for each word; the projection is the embedding."""
        return hidden * out + out + norm(out) + vocab + (0 if m.tied_embeddings else vocab * out)

    def project(hidden: int) -> int:
        return (width + 1) * hidden if width != hidden else 0

    if m.family == "t5":
        decoder = decoder_of(config)
        tables = 2 * m.relative_buckets * m.heads if m.positions == "relative" else 0
        cross = decoder.model.layers * (attention(decoder) + norm(m.hidden))
        return (
            embed
            + stack(config)
            + stack(decoder)
            + cross
            + tables
            + 2 * norm(m.hidden)
            + (0 if m.tied_embeddings else vocab * m.hidden)
        )
    if m.family == "gpt":
        last = norm(m.hidden) if m.norm_position == "pre" else 0
        words_of_its_own = 0 if m.tied_embeddings or o.name not in ("clm", "instruct") else vocab * m.hidden
        return embed + stack(config) + last + words_of_its_own + _task_head(config)
    total = embed + project(m.hidden) + stack(config)
    total += norm(m.hidden) if m.family == "bert" and m.norm_position == "pre" else 0
    if o.name == "rtd":
        generator = generator_of(config)
        total += project(generator.model.hidden) + stack(generator) + words(generator.model.hidden, width)
        return total + m.hidden * (m.hidden + 1) + m.hidden + 1
    if o.name in ("mlm", "mlm-nsp"):
        total += words(m.hidden, width)
    if o.name == "mlm-nsp":
        total += m.hidden * (m.hidden + 1) + 2 * (m.hidden + 1)
    return total + _task_head(config)


def _task_head(config: Config) -> int:
    """Parameters of a head over the classes of a task (learning/models/heads.py)."""
    m, name, classes = config.model, config.objective.name, len(config.finetune.labels)
    if name not in ("classify", "tag"):
        return 0
    if m.family == "gpt" and name == "classify":
        return m.hidden * classes
    return (m.hidden + 1) * (classes + (m.hidden if name == "classify" else 0))
