"""Attention as the papers define it: scores of all pairs, what a query may see, softmax, dropout of its probabilities.

Both ways through the layer, the fused one and the one with dropout, for every kind of position, for grouped heads, for
packed documents and padding; output and every gradient, in float64. Whole models are compared with transformers in
tests/reference, which knows no packed documents and drops nothing in grouped heads.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roots_dist.assembly.rank_model import build_model
from roots_dist.config.schema import Config
from roots_dist.learning.models import fused_attention as kernels
from roots_dist.learning.models.attention import Attention
from roots_dist.learning.models.cross_attention import CrossAttention
from roots_dist.learning.models.fused_attention import fused_attention
from roots_dist.learning.models.gpt import make_positions
from roots_dist.learning.models.init_stds import init_stds
from roots_dist.learning.models.latent_attention import LatentAttention
from roots_dist.learning.models.positions import Alibi, Relative, Window
from roots_dist.learning.models.tiles import Pattern
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world import rng
from roots_dist.world.batch import PADDING, MicroBatch
from roots_dist.world.mesh import Mesh

EXACT = dict(rtol=1e-11, atol=1e-12)
SIZE, SEQ, HIDDEN, HEADS, WIDTH = 3, 8, 20, 6, 4
"""Heads are together wider than the residual stream."""
T5 = dict(family="t5", positions="relative", norm="rmsnorm", bias=False, relative_buckets=8, relative_max_distance=16)
LATENTS = dict(
    positions="rotary", norm="rmsnorm", bias=False, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=2
)
DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 2, 2, 2, PADDING, PADDING]])
CASES: dict[str, dict] = {  # what is said of the model; causal; with documents
    "causal": dict(causal=True),
    "causal, grouped": dict(causal=True, model=dict(kv_heads=2)),
    "causal, one key head": dict(causal=True, model=dict(kv_heads=1)),
    "causal, documents": dict(causal=True, documents=True, model=dict(kv_heads=3)),
    "rotary, grouped": dict(causal=True, model=dict(positions="rotary", kv_heads=2, bias=False)),
    "rotary, documents": dict(causal=True, documents=True, model=dict(positions="rotary")),
    "alibi": dict(causal=True, model=dict(positions="alibi")),
    "alibi, documents, grouped": dict(causal=True, documents=True, model=dict(positions="alibi", kv_heads=3)),
    "window": dict(causal=True, model=dict(window=3)),
    "window of all but one": dict(causal=True, model=dict(window=SEQ - 1)),
    "window, alibi": dict(causal=True, model=dict(window=2, positions="alibi")),
    "window, rotary, grouped, documents": dict(
        causal=True, documents=True, model=dict(window=4, positions="rotary", kv_heads=2)
    ),
    "capped": dict(causal=True, model=dict(attention_softcap=0.7, attention_scale=0.9)),
    "capped, documents": dict(causal=True, documents=True, model=dict(attention_softcap=1.1)),
    "head norms, rotary": dict(causal=True, model=dict(qk_norm="head", positions="rotary", kv_heads=2)),
    "whole norms, rotary": dict(causal=True, model=dict(qk_norm="whole", positions="rotary", kv_heads=3)),
    "head norms, zero-centered": dict(
        causal=True, model=dict(qk_norm="head", norm="rmsnorm", zero_centered_norm=True, qkv_bias=False)
    ),
    "rotary in part, interleaved": dict(
        causal=True, model=dict(positions="rotary", rotary_fraction=0.5, rotary_interleaved=True)
    ),
    "latents": dict(causal=True, model=LATENTS),
    "latents, also of queries, documents": dict(causal=True, documents=True, model=LATENTS | dict(q_lora_rank=9)),
    "latents, window": dict(causal=True, model=LATENTS | dict(window=3)),
    "both ways": dict(model=dict(family="bert")),
    "both ways, documents": dict(documents=True, model=dict(family="bert")),
    "relative": dict(documents=True, model=T5),
    "relative, causal": dict(causal=True, model=T5),
}


def layer_of(case: str, drop: float, cross: bool = False):
    known = CASES[case]
    model = dict(layers=2, hidden=HIDDEN, heads=HEADS, head_dim=WIDTH, attention_dropout=drop) | known.get("model", {})
    config = Config.model_validate({"model": model, "data": {"seq_length": SEQ}, "advanced": {"float64": True}})
    tp, causal = TensorParallel(), known.get("causal", False)
    relative = Relative(config, tp, causal) if model.get("positions") == "relative" else None
    if cross:
        layer: Attention = CrossAttention(config, tp, "blocks.1.cross", init_stds(config))
    else:
        positions = relative or make_positions(config, tp)
        window = None if config.model.window is None else Window(config.model.window)
        kind = Attention if config.model.kv_lora_rank is None else LatentAttention
        layer = kind(config, tp, "blocks.1", positions, init_stds(config), causal=causal, window=window)
    draw = torch.Generator().manual_seed(1)
    layer = layer.double()
    for p in layer.parameters():
        nn.init.normal_(p, std=0.4, generator=draw)
    x = torch.randn(SIZE, SEQ, HIDDEN, generator=draw, dtype=torch.float64)
    batch = MicroBatch(tokens=torch.zeros(SIZE, SEQ), sample_ids=torch.arange(SIZE), step=3)
    return layer, x, replace(batch, document_ids=DOCUMENTS) if known.get("documents") else batch


def heads_of(x: Tensor, linear: nn.Module) -> Tensor:
    """[B, S, D] -> [B, heads, S, K]"""
    return F.linear(x, linear.weight, linear.bias).unflatten(-1, (-1, WIDTH)).transpose(1, 2)


def turned(x: Tensor) -> Tensor:
    """Rotary positions, as complex numbers."""
    width = x.shape[-1]
    rate = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    angle = torch.arange(x.shape[2], dtype=torch.float64).unsqueeze(1) * rate
    left, right = x.chunk(2, -1)
    both = torch.complex(left, right) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([both.real, both.imag], -1)


def rms_normed(case: str, x: Tensor, weight: Tensor) -> Tensor:
    """x [B, heads, S, K], normalized over each head, or over all heads together."""
    x = x if "head norms" in case else x.transpose(1, 2).flatten(2)
    x = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + weight if "zero" in case else weight)
    return x if "head norms" in case else x.unflatten(-1, (-1, WIDTH)).transpose(1, 2)


def projected(layer: Attention, x: Tensor, keys_from: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return heads_of(x, layer.query), heads_of(keys_from, layer.key), heads_of(keys_from, layer.value)


def of_latents(layer: LatentAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equations 9 to 19 of DeepSeek-V2, and norms of latents."""

    def normed(latent: Tensor, norm: nn.Module) -> Tensor:
        return latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight

    down = x @ layer.kv_down.weight.t()
    up = normed(down[..., :5], layer.kv_down_norm) @ layer.kv_up.weight.t()
    k, v = up.view(SIZE, SEQ, HEADS, 5).transpose(1, 2).split([3, 2], -1)
    shared = turned(down[..., 5:].unsqueeze(1))
    if layer.query_down is not None:
        x = normed(x @ layer.query_down.weight.t(), layer.query_down_norm)
    q = (x @ layer.query.weight.t()).view(SIZE, SEQ, HEADS, 7).transpose(1, 2)
    q = torch.cat([q[..., :3], turned(q[..., 3:])], -1)
    return q, torch.cat([k, torch.stack([shared[:, 0]] * HEADS, 1)], -1), v


def position_bias(case: str, layer: Attention) -> Tensor | float:
    distance = torch.arange(SEQ) - torch.arange(SEQ).unsqueeze(1)  # key - query
    if "alibi" in case:  # 6 heads: the slopes of 4, then two of those of 8 (Press et al. 2022)
        slopes = torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3], dtype=torch.float64)
        return slopes[:, None, None] * distance
    if layer.relative is not None:
        return layer.relative.weight[layer.relative.bucket(distance)].permute(2, 0, 1)
    return 0.0


def plain(case: str, layer: Attention, x: Tensor, keys_from: Tensor, visible: Tensor, mask: Tensor | None) -> Tensor:
    """visible: bool [B, Q, S]. mask: what dropout keeps of the probabilities [B, H, Q, S], at the layer's rate."""
    q, k, v = of_latents(layer, x) if isinstance(layer, LatentAttention) else projected(layer, x, keys_from)
    if "norms" in case:
        q, k = rms_normed(case, q, layer.query_norm.weight), rms_normed(case, k, layer.key_norm.weight)
    if "in part" in case:  # channels 0 and 1 of each head, which are neighbours
        q, k = (torch.cat([turned(t[..., :2]), t[..., 2:]], -1) for t in (q, k))
    elif "rotary" in case:
        q, k = turned(q), turned(k)
    group = HEADS // k.shape[1]
    k, v = (torch.stack([t[:, head // group] for head in range(HEADS)], 1) for t in (k, v))
    scale = 1.0 if "relative" in case else 0.9 if case == "capped" else 1 / math.sqrt(q.shape[-1])
    scores = torch.einsum("bhqk,bhsk->bhqs", q, k) * scale
    cap = CASES[case].get("model", {}).get("attention_softcap")
    scores = (scores if cap is None else cap * (scores / cap).tanh()) + position_bias(case, layer)
    p = scores.masked_fill(~visible.unsqueeze(1), -math.inf).softmax(-1)
    if mask is not None:
        p = p * mask / (1 - layer.drop)
    y = torch.einsum("bhqs,bhsk->bqhk", p, v).flatten(2)
    return F.linear(y, layer.out.weight, layer.out.bias)


def kept(monkeypatch) -> list[Tensor]:
    """Masks of dropout, from now on."""
    masks: list[Tensor] = []
    draw, mask = rng.dropout, rng.mask

    def noting(x: Tensor, *key, **how) -> Tensor:
        masks.append(draw(torch.ones_like(x), *key) != 0)
        return draw(x, *key, **how)

    def noted(*key) -> Tensor:
        masks.append(mask(*key))
        return mask(*key)

    monkeypatch.setattr(rng, "dropout", noting)
    monkeypatch.setattr(rng, "mask", noted)
    return masks


def compare(layer: Attention, inputs: list[Tensor], found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **EXACT)
    weighed = torch.randn(found.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    leaves = [*inputs, *layer.parameters()]
    grads, wanted = (torch.autograd.grad((y * weighed).sum(), leaves) for y in (found, expected))
    torch.testing.assert_close(grads, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("case", CASES)
def test_self_attention_is_its_definition(case, drop, monkeypatch):
    """By a mask, and where the host knows the documents by tiles, three queries at a time."""
    monkeypatch.setitem(kernels.BLOCKS, "cpu", 3)
    layer, x, batch = layer_of(case, drop)
    x.requires_grad_()
    masks = kept(monkeypatch)
    visible = torch.ones(SIZE, SEQ, SEQ, dtype=torch.bool)
    if layer.causal:
        visible = visible.tril()
    if layer.window is not None:  # so many keys, its own included
        visible = visible.triu(-(CASES[case]["model"]["window"] - 1))
    if batch.document_ids is not None:
        visible = visible & (DOCUMENTS.unsqueeze(2) == DOCUMENTS.unsqueeze(1))
    for known in [batch] if batch.document_ids is None else [batch, batch.with_document_ranges()]:
        masks.clear()
        found = layer(x, known)
        assert len(masks) == (drop > 0)
        compare(layer, [x], found, plain(case, layer, x, x, visible, masks[0] if masks else None))


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("padded", [False, True])
def test_cross_attention_sees_the_encoder_but_its_padding(padded, drop, monkeypatch):
    """Documents of the encoder do not part it: the decoder's text answers all of them."""
    layer, encoded, batch = layer_of("relative", drop, cross=True)
    encoded.requires_grad_()
    x = torch.randn(
        SIZE, 5, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True
    )
    masks = kept(monkeypatch)
    found = layer(x, batch if padded else replace(batch, document_ids=None), encoded)
    visible = torch.ones(SIZE, 5, SEQ, dtype=torch.bool)
    if padded:
        visible = visible & (DOCUMENTS != PADDING).unsqueeze(1)
    compare(layer, [x, encoded], found, plain("relative", layer, x, encoded, visible, masks[0] if masks else None))


@pytest.mark.parametrize("positions", ["learned", "sinusoidal", "rotary", "alibi", "none"])
def test_packed_documents_are_read_as_if_each_were_alone(positions):
    """A whole decoder, two layers; the rows of a microbatch have other borders, which the host knows."""
    model = dict(layers=2, hidden=24, heads=HEADS, vocab=61, init_std=0.4, positions=positions)
    config = Config.model_validate({"model": model, "data": {"seq_length": SEQ}, "advanced": {"float64": True}})
    (stage,) = build_model(config, Mesh.single()).stages.values()
    seen: list[Tensor] = []
    stage.pieces[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]["hidden"]))
    tokens = torch.randint(61, (2, SEQ), generator=torch.Generator().manual_seed(3))
    lengths = ([3, 4, 1], [1, 2, 5])
    documents = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(n)) for n in lengths])
    places = torch.tensor([[i for n in row for i in range(n)] for row in lengths])
    batch = MicroBatch(tokens=tokens, targets=tokens, sample_ids=torch.arange(2), document_ids=documents)
    with torch.no_grad():
        stage({}, replace(batch, position_ids=places).with_document_ranges())
        (packed,) = seen
        for row, sizes in enumerate(lengths):
            for text, expected in zip(tokens[row].split(sizes), packed[row].split(sizes)):
                stage({}, MicroBatch(tokens=text[None], targets=text[None], sample_ids=torch.arange(1)))
                torch.testing.assert_close(seen[-1][0], expected, **EXACT)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PRECISIONS = [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


def against_a_mask(q, k, v, pattern: Pattern, bound: float, alibi: Alibi | None = None, attend=fused_attention):
    """Output and gradients of attention and of scores with a mask of all pairs."""
    seen = torch.zeros(q.shape[0], len(pattern.queries), len(pattern.keys), dtype=torch.bool, device=q.device)
    queries, keys = (torch.tensor(list(r), device=q.device) for r in (pattern.queries, pattern.keys))
    for row in range(q.shape[0]):
        for document in pattern.documents[row] if pattern.documents else [range(10**6)]:
            here, there = ((t >= document.start) & (t < document.stop) for t in (queries, keys))
            seen[row] |= here.unsqueeze(1) & there
    distance = queries.unsqueeze(1) - keys
    if pattern.causal:
        seen &= (distance >= 0) & (distance < (pattern.window or 10**6))
    whole = [t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v)]
    scores = q @ whole[0].transpose(-1, -2) * 0.3
    if alibi is not None:
        scores = scores - alibi.slopes.to(q)[:, None, None] * distance
    expected = scores.masked_fill(~seen.unsqueeze(1), -torch.inf).softmax(-1) @ whole[1]

    def band(n: int, m: int) -> Tensor:
        places = range(m - n, m)
        window = Window(pattern.window or 10**6)
        bias = window.bias(places, m, q)
        return bias if alibi is None else alibi.bias(places, m, q).unsqueeze(0) + bias

    found = attend(q, k, v, pattern, 0.3, band)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(found)
    pairs = [(found, expected)]
    pairs += zip(*(torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, expected)))
    for mine, right in pairs:
        torch.testing.assert_close(mine, right, rtol=bound, atol=bound)


def drawn(heads: int, groups: int, queries: int, keys: int, dtype: torch.dtype, device: str, rows: int = 2):
    torch.manual_seed(0)
    shapes = ((rows, heads, queries, 8), (rows, groups, keys, 8), (rows, groups, keys, 8))
    return [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dtype, bound", PRECISIONS)
@pytest.mark.parametrize("device", DEVICES)
def test_later_queries_attend_as_with_a_mask(dtype, bound, device):
    """Output and gradients of a range of queries that sees all keys before it; grouped heads too."""
    for heads, groups, queries, keys in ((4, 4, 8, 24), (8, 2, 5, 7), (4, 1, 2, 9), (4, 2, 64, 300)):
        pattern = Pattern(range(keys - queries, keys), range(keys), causal=True)
        against_a_mask(*drawn(heads, groups, queries, keys, dtype, device), pattern, bound)


BORDERS = ((range(70), range(70, 71), range(71, 300)), (range(150), range(150, 230), range(230, 300)))
PATTERNS = {  # queries, first key, what else
    "documents": (0, 0, dict(documents=BORDERS)),
    "documents, later queries": (150, 0, dict(documents=BORDERS)),
    "documents, both ways": (0, 0, dict(documents=BORDERS, causal=False)),
    "documents, both ways, later queries": (200, 0, dict(documents=BORDERS, causal=False)),
    "window": (0, 0, dict(window=40)),
    "window, later queries": (200, 0, dict(window=40)),
    "window, a cache without the first keys": (200, 161, dict(window=40)),
    "window, documents": (100, 0, dict(window=40, documents=BORDERS)),
    "alibi": (0, 0, dict(biased=True)),
    "alibi, window, documents": (150, 0, dict(biased=True, window=40, documents=BORDERS)),
}


@pytest.mark.parametrize("dtype, bound", PRECISIONS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", PATTERNS)
def test_tiles_attend_as_a_mask_of_all_pairs(case, dtype, bound, device, monkeypatch):
    monkeypatch.setitem(kernels.BLOCKS, "cpu", 32)
    start, first, more = PATTERNS[case]
    pattern = Pattern(range(start, 300), range(first, 300), **{"causal": True} | more)
    q, k, v = drawn(4, 2, 300 - start, 300 - first, dtype, device)
    against_a_mask(q, k, v, pattern, bound, Alibi(4, slice(0, 4)) if pattern.biased else None)


@pytest.mark.parametrize("case", [case for case in PATTERNS if "alibi" not in case])
def test_documents_are_packed_as_the_kernel_for_several_lengths_takes_them(case, monkeypatch):
    """Its documented meaning stands for the kernel, which only a GPU has: queries and keys of document i lie between
    the starts i and i + 1, and the last query is at the last key."""
    from torch.nn.attention import varlen

    def defined(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
        assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max() and cu_seq_q.dtype == torch.int32
        assert cu_seq_k[-1] == len(key) == len(value) and cu_seq_q[-1] == len(query) and enable_gqa
        parts = []
        for (a, b), (c, d) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist()):
            distance = torch.arange(b - a).unsqueeze(1) + (d - c) - (b - a) - torch.arange(d - c)
            left, right = (size if size >= 0 else 10**6 for size in window_size)
            bias = torch.zeros_like(distance, dtype=query.dtype)
            bias = bias.masked_fill((distance > left) | (-distance > right), -torch.inf)
            one = (query[a:b], key[c:d], value[c:d])
            y = F.scaled_dot_product_attention(
                *(t.transpose(0, 1)[None] for t in one), bias[None, None], scale=scale, enable_gqa=True
            )
            parts.append(y[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(varlen, "varlen_attn", defined)
    start, first, more = PATTERNS[case]
    pattern = Pattern(range(start, 300), range(first, 300), **{"causal": True} | more)
    inputs = drawn(4, 2, 300 - start, 300 - first, torch.float64, "cpu")
    against_a_mask(*inputs, pattern, 1e-12, attend=lambda *args: kernels._of_lengths(*args[:-1]))


@pytest.mark.parametrize(
    "dtype, width, capability, takes",
    [
        (torch.bfloat16, 64, (8, 0), True),
        (torch.float16, 192, (8, 6), True),
        (torch.bfloat16, 256, (9, 0), True),
        (torch.bfloat16, 264, (9, 0), False),
        (torch.bfloat16, 200, (8, 9), False),  # backward would fail there
        (torch.bfloat16, 200, (12, 0), False),
        (torch.bfloat16, 100, (9, 0), False),
        (torch.bfloat16, 64, (7, 5), False),
        (torch.float32, 64, (9, 0), False),
        (torch.float64, 64, (9, 0), False),
    ],
)
def test_the_kernel_for_several_lengths_is_called_with_what_it_takes(dtype, width, capability, takes):
    assert kernels.OF_LENGTHS.take(dtype, width, capability) is takes
