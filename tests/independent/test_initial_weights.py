"""Initial weights of every family against the numbers of the papers, written down here by the kind of parameter.

T5's are compared with transformers in tests/reference/test_t5_transformers.py; what is here is its formula.
"""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch

from roots_dist.assembly.rank_model import build_model
from roots_dist.config.schema import Config
from roots_dist.world import rng
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param

LAYERS, HIDDEN, HEADS, FFN, VOCAB = 3, 96, 6, 160, 300
BERT = dict(family="bert", norm_position="post", embedding_norm=True, activation="gelu", segments=2)
T5 = dict(family="t5", positions="relative", norm="rmsnorm", activation="geglu", bias=False, head_dim=24)
ZERO, ONE = 0.0, 1.0

# Name of a parameter -> standard deviation of its normal draws, or ("all", what every entry is). The first match holds.
COMMON = [(r"norm\w*\.weight|\.final\.weight", ("all", ONE)), (r"bias", ("all", ZERO))]
GPT2 = [  # Radford et al. 2019, 2.3: 0.02, and by 1/√N less for the N = 2 · layers matrices that end residual branches
    *COMMON,
    (r"(attention\.out|mlp\.down)\.weight", 0.02 / math.sqrt(2 * LAYERS)),
    (r"weight|position_embedding", 0.02),
]
PLAIN = [*COMMON, (r"weight|_embedding", 0.02)]  # BERT, appendix A.2 and its code: 0.02 for every matrix
T5_V11 = [  # mesh-tensorflow and T5's code: 1 over the root of the inputs; queries also by the head's width
    *COMMON,
    (r"embed\.tokens\.weight", 1.0),
    (r"query\.weight", (HIDDEN * 24) ** -0.5),
    (r"(key|value|up|gate|relative)\.weight", HIDDEN**-0.5),
    (r"(attention|cross)\.out\.weight", (HEADS * 24) ** -0.5),
    (r"down\.weight", FFN**-0.5),
    (r"head\.weight", HIDDEN**-0.5),
]
LORA = [(r"lora\.b\.weight", ("all", ZERO)), (r"(query|up)\.lora\.a\.weight", HIDDEN**-0.5)]
LORA += [(r"down\.lora\.a\.weight", FFN**-0.5), *GPT2]
GPT2_IN_PARTS = [  # the same for each expert, and for what projects to and from latents
    *COMMON,
    (r"(attention\.out|\.down)\.weight", 0.02 / math.sqrt(2 * LAYERS)),
    (r"weight", 0.02),
]
LLAMA = dict(positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tied_embeddings=False)
EXPERTS = dict(
    experts=3, experts_per_token=2, expert_ffn=40, shared_expert_ffn=48, shared_expert_gate=True, dense_layers=1
)
LATENTS = dict(kv_lora_rank=20, q_lora_rank=28, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=14)
CASES: dict[str, tuple[dict[str, dict[str, object]], list]] = {
    "gpt": ({}, GPT2),
    "llama": ({"model": LLAMA}, GPT2),
    "experts": ({"model": LLAMA | EXPERTS}, GPT2_IN_PARTS),
    "latents": ({"model": LLAMA | LATENTS | dict(rotary_interleaved=True)}, GPT2_IN_PARTS),
    "norms of heads, centered": (
        {"model": LLAMA | dict(norm_position="sandwich", zero_centered_norm=True, qk_norm="head")},
        [(r"norm\w*\.weight", ("all", ZERO)), *GPT2],
    ),
    "bloom": ({"model": dict(positions="alibi", embedding_norm=True)}, GPT2),
    "bert": ({"model": BERT, "objective": {"name": "mlm-nsp"}}, PLAIN),
    "bert, pre-norm": ({"model": BERT | dict(norm_position="pre"), "objective": {"name": "mlm"}}, PLAIN),
    "electra": ({"model": BERT | dict(family="electra", embedding_size=64), "objective": {"name": "rtd"}}, PLAIN),
    "t5": ({"model": T5 | dict(tied_embeddings=False), "objective": {"name": "seq2seq"}}, T5_V11),
    "classes": ({"model": BERT, "objective": {"name": "classify"}, "finetune": {"labels": ["a", "b", "c"]}}, PLAIN),
    "lora": (
        {
            "objective": {"name": "instruct"},
            "finetune": {"strategy": "lora", "lora_targets": ["query", "up", "down"], "lora_rank": 16},
        },
        LORA,
    ),
}


def parameters(case: str, seed: int = 7, **model: object) -> list[Param]:
    sections, _ = CASES[case]
    sizes = dict(layers=LAYERS, hidden=HIDDEN, heads=HEADS, ffn=FFN, vocab=VOCAB)
    made = {
        "data": {"seq_length": 64},
        "train": {"seed": seed},
        **sections,
        "model": sizes | sections.get("model", {}) | model,
    }
    return build_model(Config.model_validate(made), Mesh.single()).params


@pytest.mark.parametrize("case", CASES)
def test_each_kind_of_parameter_begins_as_its_paper_says(case):
    _, rules = CASES[case]
    drawn = 0
    for p in parameters(case):
        expected = next(value for pattern, value in rules if re.search(pattern, p.name))
        x = p.tensor.detach().double()
        if isinstance(expected, tuple):
            assert (x == expected[1]).all(), p.name
            continue
        drawn, n = drawn + 1, x.numel()
        assert float(x.std()) == pytest.approx(expected, rel=5 / math.sqrt(2 * n)), p.name
        assert abs(float(x.mean())) < 5 * expected / math.sqrt(n), p.name
    assert drawn >= 6


@pytest.mark.parametrize("case", ["gpt", "bert", "t5"])
def test_another_standard_deviation_is_for_all_of_them(case):
    """model.init_std. T5's is then that of BERT; GPT's residual matrices keep their factor."""
    for p in parameters(case, init_std=0.3):
        if p.tensor.dim() < 2:
            continue
        ends_branch = case == "gpt" and re.search(r"(out|down)\.weight", p.name)
        expected = 0.3 / math.sqrt(2 * LAYERS) if ends_branch else 0.3
        assert p.tensor.std().item() == pytest.approx(expected, rel=5 / math.sqrt(2 * p.tensor.numel())), p.name


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


def random_ones(case: str, seed: int) -> dict[str, torch.Tensor]:
    return {p.name: p.tensor.detach().double() for p in parameters(case, seed) if p.spec.std}


@pytest.mark.parametrize("case", ["gpt", "electra", "experts", "latents"])
def test_no_two_parameters_and_no_two_seeds_begin_alike(case):
    """As many numbers as both have, in order: those of one stream cut at two places would correlate."""
    one, again, other = (random_ones(case, seed) for seed in (7, 7, 8))
    for name, x in one.items():
        assert torch.equal(x, again[name])
        assert abs(correlation(x, other[name])) < 5 / math.sqrt(x.numel()), name
    for (a, x), (b, y) in itertools.combinations(one.items(), 2):
        n = min(x.numel(), y.numel())
        assert abs(correlation(x.flatten()[:n], y.flatten()[:n])) < 5 / math.sqrt(n), (a, b)


def test_beyond_a_block_of_the_generator_numbers_go_on_as_one_by_one():
    """It works on blocks of 4 million numbers. Rows on both sides of a border are drawn again, each alone."""
    rows, columns = 2052, 2048
    key = rng.key("init", 7, "embed.tokens.weight")
    x = rng.normal_(torch.empty(rows, columns), key, range(rows), range(columns), 0.02)
    for row in (0, 1, 2046, 2047, 2048, 2049, 2051):
        alone = rng.normal_(torch.empty(1, columns), key, range(row, row + 1), range(columns), 0.02)
        assert torch.equal(x[row : row + 1], alone), row
    border = (1 << 22) // columns
    assert abs(correlation(x[: rows - border], x[border:])) < 5 / math.sqrt(4 * columns)
    assert float(x.double().std()) == pytest.approx(0.02, rel=5 / math.sqrt(2 * x.numel()))


def test_a_row_may_be_longer_than_a_block():
    wide = (1 << 22) + 5
    x = rng.normal_(torch.empty(2, wide), 3, range(2), range(wide), 1.0)
    ends = rng.normal_(torch.empty(2, 10), 3, range(2), range(wide - 10, wide), 1.0)
    assert torch.equal(x[:, -10:], ends) and abs(correlation(x[0, :9999], x[1, :9999])) < 0.05
