"""Masks are filled in as the fill-mask pipeline of Hugging Face does it: BERT and ELECTRA's generator, one process and
TP2×PP2."""

import pytest
import torch
import transformers
from test_encoders_transformers import config as encoder
from test_encoders_transformers import cut, name_of, their_sizes
from test_generation_transformers import stirred

from roots_dist.assembly.passes import build_passes
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.data.tokenizer import load_codec, train
from roots_dist.runs.generate.fill import encode_masked, fill, fill_masks
from roots_dist.runs.generate.prompts import Prompt, open_prompt_encoder
from roots_dist.testing.world import on_warm_world
from roots_dist.world.mesh import Mesh

TEXTS = ["The [MASK] met.", "it [MASK] [MASK] in May", "[MASK] and the rain", "We <mask> it"]
TOP = 4
SMALL = dict(hidden_size=16, num_attention_heads=2, intermediate_size=40, num_hidden_layers=2)
KINDS = ("weight", "bias")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("fill") / "tokenizer.json"
    path.write_text(
        train(["It rained in May and we met the people; they met it and rained."] * 3, 97, kind="wordpiece").json
    )
    return path


def their_tokenizer(path):
    """With the template that BERT's users have."""
    backend = load_codec(path).backend
    backend.encode_special_tokens = False
    ids = [("[CLS]", backend.token_to_id("[CLS]")), ("[SEP]", backend.token_to_id("[SEP]"))]
    from tokenizers.processors import TemplateProcessing

    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ids)
    named = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def bert(path):
    """Our config, their model, and theirs for a name of ours."""
    theirs = transformers.BertForMaskedLM(transformers.BertConfig(**their_sizes()))
    ends = {"head.weight": "cls.predictions.decoder.weight", "head.bias": "cls.predictions.bias"}
    for kind in KINDS:
        ends[f"head.dense.{kind}"] = f"cls.predictions.transform.dense.{kind}"
        ends[f"head.norm.{kind}"] = f"cls.predictions.transform.LayerNorm.{kind}"
    return encoder("bert", "mlm"), theirs, lambda name: name_of(name, "bert", ends)


def electra(path):
    """The generator alone: what it fills in, no discriminator has a say in."""
    theirs = transformers.ElectraForMaskedLM(transformers.ElectraConfig(**their_sizes(embedding_size=32, **SMALL)))
    ends = {"generator.head.bias": "generator_lm_head.bias"}
    for kind in KINDS:
        ends[f"generator.head.dense.{kind}"] = f"generator_predictions.dense.{kind}"
        ends[f"generator.head.norm.{kind}"] = f"generator_predictions.LayerNorm.{kind}"

    def names(name):
        if name.startswith(("generator.", "embed.")):
            return name_of(name if name in ends else name.removeprefix("generator."), "electra", ends)
        return None

    return encoder("electra", "rtd", {"hidden": 16, "heads": 2, "ffn": 40, "layers": 2}), theirs, names


def filled(rank: int, size: int, tree: dict) -> list:
    config = Config.model_validate(tree)
    p = config.parallel
    passes = stirred(build_passes(config, Mesh.connect(Layout(dp=size // (p.tp * p.pp), pp=p.pp, tp=p.tp), rank)))
    words = open_prompt_encoder(config, talks=False)
    ids = encode_masked([Prompt(text) for text in TEXTS], words)
    found = fill(passes, ids, words, TOP)
    texts = [fill_masks(text, masks, words) for text, masks in zip(ids, found)]
    return [texts, [[[(g.id, g.probability) for g in mask] for mask in masks] for masks in found]]


@pytest.mark.parametrize("family", [bert, electra], ids=lambda f: f.__name__)
def test_masks_are_filled_in_as_transformers_fills_them(family, tokenizer):
    torch.manual_seed(0)
    ours, theirs, names = family(tokenizer)
    ours = ours.changed({"data.tokenizer": str(tokenizer)})
    theirs = theirs.double().eval()
    weights = dict(theirs.named_parameters())
    with torch.no_grad():
        for p in stirred(build_passes(ours, Mesh.single())).model.params:
            if names(p.name) is not None:
                weights[names(p.name)].copy_(cut(p.tensor, weights[names(p.name)]))
    pipeline = transformers.pipeline(
        "fill-mask", model=theirs, tokenizer=their_tokenizer(tokenizer), top_k=TOP, device="cpu"
    )
    texts, found = filled(0, 1, ours.model_dump())
    for text, masks in zip(TEXTS, found):
        expected = pipeline(text.replace("<mask>", "[MASK]"))
        expected = [expected] if isinstance(expected[0], dict) else expected
        assert [[i for i, _ in mask] for mask in masks] == [[guess["token"] for guess in mask] for mask in expected]
        for mask, guesses in zip(masks, expected):
            assert [p for _, p in mask] == pytest.approx([guess["score"] for guess in guesses], rel=1e-5)
    assert texts[0] == pipeline(TEXTS[0])[0]["sequence"]

    tree = ours.changed(
        {"parallel.tp": 2, "parallel.pp": 2, "parallel.sequence_parallel": True, "train.global_batch": 4}
    ).model_dump()
    for other_texts, other in on_warm_world(4, filled, tree):
        assert other_texts == texts
        for masks, expected in zip(other, found):
            for mask, guesses in zip(masks, expected):
                assert [i for i, _ in mask] == [i for i, _ in guesses]
                assert [p for _, p in mask] == pytest.approx([p for _, p in guesses], rel=1e-5)
