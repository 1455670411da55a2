"""What is generated is what Hugging Face's `generate` says: greedy and with beams, in one process and in TP2, PP2,
TP2×PP2.

Small random models in float64, the same weights on both sides, several prompts of different lengths at once.
"""

import zlib
from dataclasses import replace

import pytest
import torch
from test_t5_transformers import config as t5_config
from test_t5_transformers import copied, their_model
from test_transformers import bloom, gpt2, llama, pair

from roots_dist.assembly.passes import Passes, build_passes
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.request import Request
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.runs.generate.stops import Stops
from roots_dist.testing.world import on_warm_world
from roots_dist.world.mesh import Mesh

GREEDY = Sampling(temperature=0)
PROMPTS = [[5, 17, 3], [60], [8, 8, 2, 40, 91], [33, 7]]
TEXTS = [[5, 17, 3, 12, 90, 4, 1], [60, 1], [8, 8, 2, 40, 91, 22, 31, 70, 66, 1]]
END = 1
GREEDY_REQUEST = Request(max_tokens=7, sampling=GREEDY)
BEAMS = {
    "beams": dict(beams=4),
    "short": dict(beams=4, length_penalty=-1.0),
    "early": dict(beams=3, early_stopping=True, length_penalty=2.0, samples=2),
}


def stirred(passes: Passes) -> Passes:
    """Every parameter away from what it begins as, the same in each layout."""
    with torch.no_grad():
        for p in passes.model.params:
            draw = torch.Generator().manual_seed(zlib.crc32((p.spec.copy_of or p.name).encode()))
            whole = torch.randn(p.spec.shape, dtype=torch.float64, generator=draw)
            p.tensor.add_(whole[p.slices], alpha=0.1)
    return passes


def said(rank: int, size: int, config: dict, start: int | None, ends: list[int], requests: list[Request]) -> list:
    config = Config.model_validate(config)
    layout = Layout(dp=size // (config.parallel.tp * config.parallel.pp), pp=config.parallel.pp, tp=config.parallel.tp)
    passes = stirred(build_passes(config, Mesh.connect(layout, rank)))
    texts, stops = TEXTS if start is not None else PROMPTS, Stops(frozenset(ends))
    return [[[a.tokens for a in one] for one in decode(passes, texts, r, stops, start=start)] for r in requests]


def in_layouts(config: Config, start: int | None, ends: list[int], requests: list[Request], layouts) -> list:
    """What each rank of each layout says; all must be equal. Returns it once."""
    found = [said(0, 1, config.model_dump(), start, ends, requests)]
    for size, keys in layouts:
        tree = config.changed({"train.global_batch": 4, **keys}).model_dump()
        found += on_warm_world(size, said, tree, start, ends, requests)
    assert all(one == found[0] for one in found)
    return found[0]


LAYOUTS = [
    (2, {"parallel.tp": 2}),
    (4, {"parallel.pp": 2}),  # and two data ranks, each with some of the prompts
    (4, {"parallel.tp": 2, "parallel.pp": 2, "parallel.sequence_parallel": True}),
]


def decoder(family):
    """Ours and theirs with our weights."""
    torch.manual_seed(0)
    ours, theirs, ends, where = family()
    theirs = theirs.double().eval()
    passes = stirred(build_passes(ours, Mesh.single()))
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for p in passes.model.params:
            mine, view = pair(p.tensor, p.name, weights, ends, where)
            view.copy_(mine)
    return ours, theirs


def generated(theirs, text: list[int], skip: int, **how) -> list[list[int]]:
    """Their words after the first `skip`, without what only fills up."""
    how = dict(do_sample=False, eos_token_id=END, pad_token_id=0, use_cache=True) | how
    with torch.no_grad():
        rows = theirs.generate(torch.tensor([text]), **how)[:, skip:].tolist()
    return [row[: row.index(END) + 1] if END in row else row for row in rows]


@pytest.mark.parametrize(
    "family, layouts", [(gpt2, LAYOUTS[2:]), (llama, LAYOUTS), (bloom, LAYOUTS[2:])], ids=["gpt2", "llama", "bloom"]
)
def test_decoders_say_what_transformers_says(family, layouts):
    ours, theirs = decoder(family)
    requests = [GREEDY_REQUEST, *(Request(max_tokens=7, **how) for how in BEAMS.values())]
    greedy, *beams = in_layouts(ours, None, [END], requests, layouts)
    for prompt, words in zip(PROMPTS, greedy):
        assert words == generated(theirs, prompt, len(prompt), max_new_tokens=7)
    for how, answers in zip(BEAMS.values(), beams):
        for prompt, words in zip(PROMPTS, answers):
            names = dict(num_beams=how["beams"], num_return_sequences=how.get("samples", 1))
            names |= {name: how[name] for name in ("length_penalty", "early_stopping") if name in how}
            assert words == generated(theirs, prompt, len(prompt), max_new_tokens=7, **names)


@pytest.mark.parametrize("version, layouts", [("v1.0", []), ("v1.1", LAYOUTS[1:])], ids=["v1.0", "v1.1"])
def test_an_encoder_decoder_says_what_transformers_says(version, layouts):
    """Texts of different lengths are padded behind for the encoder; the decoder begins with padding."""
    ours, theirs = t5_config(version), their_model(version, exact_norms=True)
    copied(stirred(build_passes(ours, Mesh.single())).model.params, theirs, ours.model.gated())
    requests = [GREEDY_REQUEST, *(Request(max_tokens=7, **how) for how in BEAMS.values())]
    greedy, *beams = in_layouts(ours, 0, [END], requests, layouts)
    for text, words in zip(TEXTS, greedy):
        assert words == generated(theirs, text, 1, max_new_tokens=7)
    for how, answers in zip(BEAMS.values(), beams):
        for text, words in zip(TEXTS, answers):
            names = dict(num_beams=how["beams"], num_return_sequences=how.get("samples", 1))
            names |= {name: how[name] for name in ("length_penalty", "early_stopping") if name in how}
            assert words == generated(theirs, text, 1, max_new_tokens=7, **names)
    assert len({tuple(one[0]) for one in greedy}) > 1


def test_an_answer_depends_neither_on_its_neighbours_nor_on_how_many_are_decoded_at_once():
    """Drawn too: what is drawn is keyed on the prompt, the sample and the position."""
    ours, _ = decoder(llama)
    passes = stirred(build_passes(ours, Mesh.single()))
    drawn = Request(max_tokens=7, sampling=Sampling(1.0, top_p=0.9), seed=5, samples=3)
    for request in (GREEDY_REQUEST, drawn):
        many, one_by_one = (
            decode(passes, PROMPTS, replace(request, rows=rows), Stops(frozenset({END}))) for rows in (16, 1)
        )
        assert many == one_by_one
    assert len({tuple(a.tokens) for a in many[0]}) > 1
