"""A loss of several terms against the papers' sums: each term over its own count in the whole step, then its weight.

What is masked, replaced and paired is tested in tests/unit (test_mlm, test_masking, test_spans); that heads compute
their terms, in test_cross_entropy.py and tests/reference.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from roots_dist.assembly.run import build_run
from roots_dist.config.schema import Config
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.runs.train.step import train_step
from roots_dist.world.batch import IGNORE
from roots_dist.world.mesh import Mesh

BERT = dict(family="bert", norm_position="post", embedding_norm=True, activation="gelu", segments=2)
ELECTRA = BERT | dict(family="electra", embedding_size=8)
T5 = dict(family="t5", positions="relative", norm="rmsnorm", activation="relu", bias=False)
CASES = {  # model, objective, and the weight of each term in the paper
    "clm": ({}, {}, {"clm": 1.0}),
    "mlm": (BERT, {"mask_probability": 0.5}, {"mlm": 1.0}),
    "mlm-nsp": (
        BERT,
        {"mask_probability": 0.5},
        {"mlm": 1.0, "nsp": 1.0},
    ),  # Devlin et al. 2019, A.2: the sum of both means
    "rtd": (ELECTRA, {}, {"mlm": 1.0, "rtd": 50.0}),  # Clark et al. 2020, section 2: λ = 50
    "rtd, lighter": (ELECTRA, {"discriminator_weight": 7.0}, {"mlm": 1.0, "rtd": 7.0}),
    "spans": (T5, {"mask_probability": 0.4}, {"spans": 1.0}),
}
COUNTED = {"nsp": "labels", "rtd": "originals"}
"""Term -> the field whose places it scores; all others score targets."""


def a_run(case: str, **model):
    family, objective, weights = CASES[case]
    sizes = dict(layers=1, hidden=16, heads=2, vocab=61, init_std=0.3)
    config = Config.model_validate(
        {
            "model": sizes | family | model,
            "objective": {"name": case.partition(",")[0], **objective},
            "data": {"seq_length": 24},
            "train": {"global_batch": 6, "micro_batch": 2},
            "optim": {"clip_grad": 0.0},
            "advanced": {"float64": True, "vocab_multiple": 8},
        }
    )
    return build_run(config, Mesh.single(), objective=proof_objective(config)), weights


def uneven(batches):
    """Microbatches with many and with few scored places, of every term."""
    many, few, rest = batches
    fields = {}
    for name in ("targets", "labels", "originals"):
        value = getattr(few, name)
        if value is not None:
            keep = (
                torch.arange(value.numel()).view_as(value) % 7 == 3 if value.dim() > 1 else torch.tensor([True, False])
            )
            fields[name] = value.masked_fill(~keep, IGNORE)
    return [many, replace(few, **fields), rest]


@pytest.mark.parametrize("case", CASES)
def test_a_step_differentiates_each_term_over_its_own_count(case, monkeypatch):
    run, weights = a_run(case)
    batches = uneven(random_batches(run.config, 0, 0, 1))
    counts = {
        name: sum(int((getattr(b, COUNTED.get(name, "targets")) != IGNORE).sum()) for b in batches) for name in weights
    }
    assert len({*counts.values()}) == len(counts) and all(counts.values())

    (stage,) = run.passes.model.stages.values()
    found = [term for batch in batches for term in stage({}, batch).results]
    values = {n: sum(t.sum for t in found if t.name == n) / counts[n] for n in weights}
    loss = sum(weights[n] * value for n, value in values.items())
    expected = dict(zip((p.name for p in run.params), torch.autograd.grad(loss, [p.tensor for p in run.params])))

    seen, step = {}, run.engine.step
    monkeypatch.setattr(
        run.engine,
        "step",
        lambda *asked: seen.update({p.name: p.tensor.grad.clone() for p in run.params}) or step(*asked),
    )
    report = train_step(run, batches, 1e-3)
    assert report.loss == pytest.approx(loss.item(), rel=1e-12) and report.stop == 0
    assert report.terms == pytest.approx({n: value.item() for n, value in values.items()}, rel=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(seen[name], gradient, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def electra():
    run, _ = a_run("rtd", dropout=0.0)
    (stage,) = run.passes.model.stages.values()
    (batch, *_) = random_batches(run.config, 0, 0, 1)
    return run, stage, batch


def logits_and_text(stage) -> tuple[list, list]:
    """What the discriminator says and what it read, of each pass from now on."""
    head = stage.pieces[stage.names.index("head")]
    said: list[torch.Tensor] = []
    read: list[torch.Tensor] = []
    head.score.register_forward_hook(lambda _, args, out: said.append(out.squeeze(-1)))
    head.register_forward_pre_hook(lambda _, args: read.append(args[0]["tokens"]))
    return said, read


@pytest.mark.parametrize("drawn", ["anything", "the original"])
def test_a_drawn_token_that_is_the_original_counts_as_original(drawn):
    """Clark et al. 2020, section 2. In the second case the generator always draws the one word that was masked."""
    _, stage, batch = electra()
    if drawn == "the original":
        head = stage.pieces[stage.names.index("generator.head")]
        with torch.no_grad():
            head.bias[17] = 1e4
        hidden = (batch.targets != IGNORE) | (batch.tokens != batch.originals)
        originals = batch.originals.masked_fill(hidden, 17)
        batch = replace(batch, originals=originals, targets=originals.masked_fill(~hidden, IGNORE))
    batch.originals[0, :3] = IGNORE
    said, read = logits_and_text(stage)
    _, rtd = stage({}, batch).results
    (logits,), (text,) = said, read
    scored = batch.originals != IGNORE
    replaced = text != batch.originals
    assert (replaced & scored).any() == (drawn == "anything")
    p = logits.sigmoid()
    expected = -torch.where(replaced, p.log(), (1 - p).log())[scored].sum()
    torch.testing.assert_close(rtd.sum, expected, rtol=1e-10, atol=1e-10)
    assert 0 < rtd.count == scored.sum() <= scored.numel() - 3
    assert rtd.hits == ((p > 0.5) == replaced)[scored].sum()


def test_the_generator_learns_from_its_own_term_alone():
    """No gradient flows back through the draw (section 2), and the two share the embedding (section 3.2)."""
    run, stage, batch = electra()
    mlm, rtd = stage({}, batch).results
    reach = {}
    for term in (mlm, rtd):
        grads = torch.autograd.grad(term.sum, [p.tensor for p in run.params], retain_graph=True, allow_unused=True)
        reach[term.name] = {p.name for p, g in zip(run.params, grads) if g is not None and g.any()}
    names = {p.name for p in run.params}
    generator = {name for name in names if name.startswith("generator.")}
    shared = {name for name in names if name.startswith("embed.")}
    assert generator and shared and names - generator - shared
    noise = {name for name in names if name.endswith("key.bias")}  # softmax forgets it: zero or rounding
    assert reach["mlm"] - noise == (generator | shared) - noise
    assert reach["rtd"] - noise == names - generator - noise


def test_hidden_places_alone_teach_the_generator():
    """Its loss is a mean over masked places; F.cross_entropy over them is the paper's."""
    _, stage, batch = electra()
    head = stage.pieces[stage.names.index("generator.head")]
    inputs: list[torch.Tensor] = []
    head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]["hidden"]))
    mlm, _ = stage({}, batch).results
    logits = F.linear(head.transform(inputs[0]), head.weight, head.bias)[..., :61]
    hidden = batch.targets != IGNORE
    mean = F.cross_entropy(logits[hidden], batch.targets[hidden])
    torch.testing.assert_close(mlm.sum / mlm.count, mean, rtol=1e-12, atol=1e-12)
    assert mlm.count == hidden.sum() < hidden.numel()
