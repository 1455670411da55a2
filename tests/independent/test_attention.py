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
from roots_dist.learning.models.attention import Attention, CrossAttention
from roots_dist.learning.models.causal_attention import causal_attention
from roots_dist.learning.models.gpt import make_positions
from roots_dist.learning.models.init_stds import init_stds
from roots_dist.learning.models.positions import Relative, Window
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world import rng
from roots_dist.world.batch import PADDING, MicroBatch
from roots_dist.world.mesh import Mesh

EXACT = dict(rtol=1e-11, atol=1e-12)
SIZE, SEQ, HIDDEN, HEADS, WIDTH = 3, 8, 20, 6, 4
"""Heads are together wider than the residual stream."""
T5 = dict(family="t5", positions="relative", norm="rmsnorm", bias=False, relative_buckets=8, relative_max_distance=16)
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
        layer = Attention(config, tp, "blocks.1", positions, init_stds(config), causal=causal, window=window)
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
    q, k, v = heads_of(x, layer.query), heads_of(keys_from, layer.key), heads_of(keys_from, layer.value)
    if "norms" in case:
        q, k = rms_normed(case, q, layer.query_norm.weight), rms_normed(case, k, layer.key_norm.weight)
    if "in part" in case:  # channels 0 and 1 of each head, which are neighbours
        q, k = (torch.cat([turned(t[..., :2]), t[..., 2:]], -1) for t in (q, k))
    elif "rotary" in case:
        q, k = turned(q), turned(k)
    group = HEADS // k.shape[1]
    k, v = (torch.stack([t[:, head // group] for head in range(HEADS)], 1) for t in (k, v))
    scale = 1.0 if "relative" in case else 0.9 if case == "capped" else 1 / math.sqrt(WIDTH)
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
    draw = rng.dropout

    def noting(x: Tensor, *key) -> Tensor:
        masks.append(draw(torch.ones_like(x), *key) != 0)
        return draw(x, *key)

    monkeypatch.setattr(rng, "dropout", noting)
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
    layer, x, batch = layer_of(case, drop)
    x.requires_grad_()
    masks = kept(monkeypatch)
    found = layer(x, batch)
    assert len(masks) == (drop > 0)
    visible = torch.ones(SIZE, SEQ, SEQ, dtype=torch.bool)
    if layer.causal:
        visible = visible.tril()
    if layer.window is not None:  # so many keys, its own included
        visible = visible.triu(-(CASES[case]["model"]["window"] - 1))
    if batch.document_ids is not None:
        visible = visible & (DOCUMENTS.unsqueeze(2) == DOCUMENTS.unsqueeze(1))
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
    """A whole decoder, two layers; the rows of a microbatch have other borders."""
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
        stage({}, replace(batch, position_ids=places))
        (packed,) = seen
        for row, sizes in enumerate(lengths):
            for text, expected in zip(tokens[row].split(sizes), packed[row].split(sizes)):
                stage({}, MicroBatch(tokens=text[None], targets=text[None], sample_ids=torch.arange(1)))
                torch.testing.assert_close(seen[-1][0], expected, **EXACT)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_later_queries_attend_as_with_a_mask(dtype, bound, device):
    """Output and gradients of a range of queries that sees all keys before it; grouped heads too."""
    for heads, groups, queries, keys in ((4, 4, 8, 24), (8, 2, 5, 7), (4, 1, 2, 9), (4, 2, 64, 300)):
        torch.manual_seed(0)
        shapes = ((2, heads, queries, 8), (2, groups, keys, 8), (2, groups, keys, 8))
        q, k, v = (torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for shape in shapes)
        weights = torch.randn(2, heads, queries, 8, dtype=dtype, device=device)
        found = causal_attention(q, k, v, 0.3)
        seen = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        whole = [t.repeat_interleave(heads // groups, 1) for t in (k, v)]
        scores = (q @ whole[0].transpose(-1, -2) * 0.3).masked_fill(~seen, -torch.inf)
        expected = scores.softmax(-1) @ whole[1]
        pairs = [(found, expected)]
        pairs += zip(*(torch.autograd.grad((out * weights).sum(), (q, k, v)) for out in (found, expected)))
        for mine, right in pairs:
            torch.testing.assert_close(mine, right, rtol=bound, atol=bound)
