"""How far an imported model is from the original: logits, and gradients of a loss over every token or label."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from hub_models import tensors_in

from roots_dist.assembly.passes import build_passes
from roots_dist.config.run_config import config_of_run
from roots_dist.learning.models import pieces_of
from roots_dist.learning.models.parameter_locations import shapes
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.storage.exchange import ARCHITECTURES
from roots_dist.storage.exchange.compare import comparison_batch
from roots_dist.storage.exchange.table import rules
from roots_dist.storage.exchange.tensors import read_json
from roots_dist.world.batch import MicroBatch
from roots_dist.world.mesh import Mesh

NEW_NAMES = {"embed_out.weight": "lm_head.weight"}
"""Names in files -> those of version 5's modules, where they differ."""
FLOOR = 4e-3
"""Share of the model's largest gradient below which a tensor's gradient is not expected to have digits: that of key
biases is zero, but for rounding, which on some processors is 2.4e-8 of the largest. The bound of 2e-5 is less than one
rounding of the largest then."""


POSITIONS_AFTER_PADDING = {"roberta.embeddings.position_embeddings.weight", "model.decoder.embed_positions.weight"}


def tensors_that_differ(name: str, theirs: Path, back: Path) -> list[str]:
    """Tensors of a model of MODELS that its export lacks, has besides, or has with another bit."""
    first, second = tensors_in(theirs), tensors_in(back)
    positions = {"embeddings.position_embeddings.weight"} if name == "xlm-roberta bare" else POSITIONS_AFTER_PADDING
    for tensor in positions & first.keys():  # rows of no position
        first[tensor][:2] = 0
    if name == "bert untied":  # what no logits depend on
        first["cls.predictions.bias"] = first["cls.predictions.decoder.bias"]
    alone = first.keys() ^ second.keys()
    return sorted(alone | {n for n in first.keys() - alone if not torch.equal(first[n], second[n])})


class Differences(NamedTuple):
    """Largest differences, and what they are of."""

    logits: float
    largest_logit: float
    gradients: float
    """Relative to the largest entry of the same tensor's gradient, or to FLOOR."""
    worst: str
    """Name of the tensor in which that is."""


def as_in_files(gradients: dict[str, torch.Tensor], model_type: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Experts one by one, as they are in files; version 5 holds those of a layer in one tensor."""
    apart = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, gradient in gradients.items():
        layer, _, part = name.rpartition(".mlp.")
        if layer and model_type == "mixtral":
            layer, name = f"{layer}.block_sparse_moe", f"{layer}.block_sparse_moe.{part}"
        elif layer:
            layer = f"{layer}.mlp"
        if part == "experts.gate_up_proj":
            for j, both in enumerate(gradient):
                yield from zip((f"{layer}.experts.{j}.{matrix}.weight" for matrix in apart[:2]), both.chunk(2))
        elif part == "experts.down_proj":
            yield from ((f"{layer}.experts.{j}.{apart[2]}.weight", one) for j, one in enumerate(gradient))
        else:
            yield name, gradient


def differences(theirs: Path, run: Path) -> Differences:
    """Compare the run, an import, with the folder that it came from. In float32, without dropout."""
    config = config_of_run(run).config.changed({"model.dropout": 0.0, "model.attention_dropout": 0.0})
    batch = comparison_batch(config)
    targets = batch.tokens.roll(1, 1)
    labels = None
    if config.finetune.labels:
        labels = torch.arange(batch.tokens.numel()).view_as(batch.tokens) % len(config.finetune.labels)
        labels = labels if config.objective.name == "tag" else labels[:, 0]
    given = dict(tokens=batch.tokens, decoder_tokens=batch.decoder_tokens, sample_ids=batch.sample_ids)
    learning = MicroBatch(**given, targets=None if labels is not None else targets, labels=labels)

    passes = build_passes(config, Mesh.single())
    load_weights(best_or_newest(run), passes.model.params)
    ours = passes.forward([batch])[0]
    wanted = targets if labels is None else labels
    name = config.objective.name
    terms = passes.forward_backward([learning], {name: 1 / wanted.numel()})
    assert [term.name for term in terms] == [name]
    mine = {p.name: p.tensor.grad for p in passes.model.params if not p.spec.by_rule}

    tree = read_json(theirs / "config.json")
    model = getattr(transformers, tree["architectures"][0]).from_pretrained(theirs, dtype=torch.float32).eval()
    inputs = {} if batch.decoder_tokens is None else {"decoder_input_ids": batch.decoder_tokens}
    logits = model(input_ids=batch.tokens, **inputs).logits
    F.cross_entropy(logits.flatten(0, -2), wanted.flatten()).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = dict(as_in_files(expected, tree["model_type"]))

    table = ARCHITECTURES[tree["model_type"]]
    head = table.head(tree["architectures"][0])
    size = max(grad.abs().max() for grad in expected.values())
    far = {}
    for rule in rules(table, head, config, shapes(pieces_of(config, TensorParallel()))):
        if rule.ours and mine.keys() >= {*rule.ours}:
            names = [NEW_NAMES.get(name, name) for name in rule.names]
            name = next(name for name in names if name in expected)
            found = rule.form.join(config, [mine[name] for name in rule.ours])
            there = expected.pop(name)
            assert there.isfinite().all() and found.shape == there.shape
            far[name] = ((found - there).abs().max() / there.abs().max().clamp(min=FLOOR * size)).item()
    assert not expected
    worst = max(far, key=far.get)
    return Differences((ours - logits).abs().max().item(), logits.abs().max().item(), far[worst], worst)
