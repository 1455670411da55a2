"""T5's parameters and FLOPs by arithmetic: against the model that is built, torch's own counter, and published
counts."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from roots_dist.accounting.sizes import parameters
from roots_dist.config.records import target_seq
from roots_dist.config.schema import Config
from roots_dist.learning.models.flops import flops_per_sample
from roots_dist.learning.models.t5 import pieces
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.batch import MicroBatch
from roots_dist.world.sharding import initialize, parameters_of

FIXED = dict(family="t5", positions="relative", norm="rmsnorm", bias=False)
SHAPES = {
    "v1.0": dict(activation="relu"),
    "v1.1": dict(activation="geglu", tied_embeddings=False),
    "uneven stacks, narrow heads, grouped": dict(activation="geglu", decoder_layers=3, head_dim=4, kv_heads=2, ffn=40),
    "biases and layernorm": dict(activation="relu", bias=True, norm="layernorm"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_and_flops_are_those_of_the_model(shape):
    """The math kernel computes attention in full. The stages are balanced by the same numbers, causal attention
    half."""
    sizes = FIXED | dict(layers=2, hidden=32, heads=4, vocab=60) | SHAPES[shape]
    objective = {"name": "spans", "mask_probability": 0.3}
    c = Config.model_validate(
        {"model": sizes, "objective": objective, "data": {"seq_length": 24}, "advanced": {"vocab_multiple": 1}}
    )
    specs, built = pieces(c, TensorParallel()), {}
    for spec in specs:
        built[spec.name] = spec.build(built)
    params = parameters_of(built.items())
    initialize(params, 0)
    assert parameters(c) == sum(p.tensor.numel() for p in params if not p.is_copy)

    targets = torch.randint(60, (3, target_seq(c)))
    batch = MicroBatch(
        tokens=torch.randint(60, (3, 24)), targets=targets, decoder_tokens=targets, sample_ids=torch.arange(3)
    )
    for p in params:
        p.tensor.requires_grad_(False)  # else the loss computes its gradients at once
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        payload = {}
        for piece in built.values():
            payload = piece(payload, batch)
        forward = counter.get_total_flops()
    unseen = c.model.num_decoder_layers() * 4 * target_seq(c) ** 2 * c.model.heads * c.model.width_of_head() / 2
    assert forward == pytest.approx((flops_per_sample(c) / 3 + unseen) * 3, rel=1e-12)


def test_a_stage_weighs_what_its_stack_computes():
    """At T5's own lengths, 512 and 114: a decoder block reads the encoder's output in full, but few positions of its
    own."""
    sizes = FIXED | dict(layers=12, hidden=768, heads=12, ffn=3072, vocab=32128)
    c = Config.model_validate({"model": sizes, "objective": {"name": "spans"}, "data": {"seq_length": 512}})
    cost = {spec.name: spec.cost for spec in pieces(c, TensorParallel())}
    width, long, short = 768, 512, 114
    encoder = 8 * long * width**2 + 4 * long**2 * width + 16 * long * width**2
    cross = 4 * short * width**2 + 4 * long * width**2 + 4 * short * long * width
    decoder = 8 * short * width**2 + 2 * short**2 * width + 16 * short * width**2 + cross
    assert cost["encoder.blocks.3"] == encoder and cost["decoder.blocks.3"] == decoder
    assert cost["head"] == 2 * short * width * 32128
