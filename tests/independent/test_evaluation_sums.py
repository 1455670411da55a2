"""What evaluation reports, against sums over single samples: each sample alone through the model, without batches.

Dropout, label smoothing and z-loss are on in the config, and rows are filled up at the end: none of it may show.
F1 and MCC are compared in tests/unit/test_task_metrics.py.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from roots_dist.assembly.passes import build_passes
from roots_dist.config.schema import Config
from roots_dist.config.sections import Source
from roots_dist.idx_format import MANIFEST
from roots_dist.learning.data import manifest
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.specials import synthetic_specials
from roots_dist.learning.data.store import Corpus
from roots_dist.learning.objectives import OBJECTIVES
from roots_dist.learning.objectives.synthetic import random_source
from roots_dist.runs.evaluate import held_out
from roots_dist.runs.evaluate.sources import bytes_per_token
from roots_dist.world.batch import IGNORE, MicroBatch, Objective
from roots_dist.world.mesh import Mesh

SEQ, VOCAB, MICRO, COUNT = 12, 61, 4, 9
BERT = dict(family="bert", norm_position="post", embedding_norm=True, activation="gelu", segments=2)
FAMILIES = {"clm": {}, "mlm": BERT, "mlm-nsp": BERT, "rtd": BERT | {"family": "electra"}}


def config(objective: str, sources: int = 1) -> Config:
    sizes = dict(layers=1, hidden=16, heads=2, vocab=VOCAB, init_std=0.4, dropout=0.4, attention_dropout=0.4)
    return Config.model_validate(
        {
            "model": sizes | FAMILIES[objective],
            "objective": {"name": objective, "label_smoothing": 0.3, "z_loss": 0.1, "mask_probability": 0.4},
            "data": {"seq_length": SEQ, "validation": [f"/text/{n}" for n in range(sources)]},
            "train": {"global_batch": MICRO, "micro_batch": MICRO, "eval_sequences": COUNT},
            "advanced": {"float64": True, "vocab_multiple": 8, "loss_chunk": 5},
        }
    )


def objective_of(c: Config) -> Objective:
    return OBJECTIVES[c.objective.name](c, synthetic_specials(VOCAB))


def corpora(c: Config) -> list[Corpus]:
    """As many as data.validation has, of unequal lengths."""
    tokens = random_source(c).tokens(0, 40 * SEQ)
    ends = np.cumsum([15 * SEQ, 4 * SEQ + 1, 9 * SEQ])[: len(c.data.validation)]
    parts = np.split(tokens, ends)[: len(ends)]
    return [
        Corpus(f"/text/{n}", np.array([len(part)]), np.array([0]), np.array([0, 1]), part)
        for n, part in enumerate(parts)
    ]


class Plain:
    """Sums over samples, one at a time: of -log p, of targets, and of targets that are the best guess."""

    def __init__(self, passes):
        (self.stage,) = passes.model.stages.values()
        self.head = self.stage.pieces[-1]
        self.seen: list[torch.Tensor] = []
        self.handle = self.head.register_forward_pre_hook(lambda _, args: self.seen.append(args[0]["hidden"]))

    @torch.no_grad()
    def logits(self, tokens: np.ndarray) -> torch.Tensor:
        """[S, V] of a text, from the stack's output through GPT-2's head as its paper draws it."""
        self.stage.eval()
        batch = MicroBatch(
            tokens=torch.from_numpy(tokens[None].astype(np.int64)),
            targets=torch.full((1, len(tokens)), IGNORE),
            sample_ids=torch.tensor([0]),
        )
        self.stage({}, batch)
        self.stage.train()
        x = self.seen.pop()[0]
        x = F.layer_norm(x, x.shape[-1:], self.head.norm.weight, self.head.norm.bias)
        return (x @ self.head.weight.t())[:, :VOCAB]

    def sums(self, corpus: Corpus, index: int) -> tuple[float, int, int]:
        text = corpus.tokens(index * SEQ, SEQ + 1)
        log_p = self.logits(text[:-1]).log_softmax(1)
        targets = torch.from_numpy(text[1:].astype(np.int64))
        loss = -float(log_p[torch.arange(SEQ), targets].sum())
        return loss, SEQ, int((log_p.argmax(1) == targets).sum())


@pytest.mark.parametrize("at_a_time", [1, 2, 16])
@pytest.mark.parametrize("sources", [1, 3])
def test_loss_perplexity_bits_and_accuracy_are_sums_over_samples(sources, at_a_time, monkeypatch):
    """9 samples in microbatches of 4: three rows are filled up. Each sample's window is read off the corpus here."""
    monkeypatch.setattr(held_out, "AT_A_TIME", at_a_time)
    c = config("clm", sources)
    objective, texts = objective_of(c), corpora(c)
    passes = build_passes(c, Mesh.single())
    batches = Batches(c, objective, texts, [5.0, 1.0, 1.0][:sources])
    found = held_out.score_held_out(passes, objective, batches, COUNT, bytes_per_token=3.7)
    plain = Plain(passes)
    by_source = {text.prefix: np.zeros(3) for text in texts}
    samples = batches.evaluation_samples(COUNT)
    assert len({(text.prefix, index) for text, index in samples}) == COUNT
    for text, index in samples:
        by_source[text.prefix] += plain.sums(text, index)
    loss, count, hits = sum(by_source.values())
    assert count == COUNT * SEQ and found.targets == count and found.terms["clm"].hits == hits > 0
    assert found.loss == pytest.approx(loss / count, rel=1e-12)
    assert found.log_likelihood == pytest.approx(-loss, rel=1e-12)
    metrics = found.metrics()
    assert metrics["perplexity/validation"] == pytest.approx(math.exp(loss / count), rel=1e-11)
    assert metrics["accuracy/validation/clm"] == pytest.approx(hits / count, rel=1e-12)
    assert metrics["bits_per_byte/validation"] == pytest.approx(loss / count / math.log(2) / 3.7, rel=1e-12)
    if sources > 1:
        assert [one.terms["clm"] for one in found.sources.values()] == [
            (pytest.approx(total, rel=1e-12), n, h) for total, n, h in by_source.values()
        ]


@pytest.mark.parametrize("objective", ["mlm", "mlm-nsp", "rtd"])
def test_each_term_of_a_masked_model_is_divided_by_its_own_count(objective):
    """The filled-up rows of the last microbatch have neither targets, labels nor originals; a term's sum is that of
    its samples alone, one at a time."""
    c = config(objective)
    made = objective_of(c)
    passes = build_passes(c, Mesh.single())
    batches = Batches(c, made, [random_source(c)], [1.0])
    found = held_out.score(passes, made, batches.evaluation(COUNT), 3.7)
    (stage,) = passes.model.stages.values()
    stage.eval()
    sums: dict[str, np.ndarray] = {}
    taken = 0
    for batch in batches.evaluation(COUNT):
        for row in range(MICRO):
            if taken == COUNT:
                break
            fields = {n: t[row : row + 1] for n, t in vars(batch).items() if isinstance(t, torch.Tensor)}
            with torch.no_grad():
                for term in stage({}, MicroBatch(**fields, step=0)).results:
                    sums[term.name] = sums.get(term.name, 0) + np.array(
                        [float(term.sum), int(term.count), int(term.hits)]
                    )
            taken += 1
    weights = {"mlm": 1.0, "nsp": 1.0, "rtd": 50.0}
    assert found.terms.keys() == sums.keys()
    for name, (loss, count, hits) in sums.items():
        assert found.terms[name] == (pytest.approx(loss, rel=1e-12), count, hits), name
    assert found.loss == pytest.approx(sum(weights[n] * s[0] / s[1] for n, s in sums.items()), rel=1e-12)
    loss, count, _ = sums["mlm"]
    assert found.perplexity == pytest.approx(math.exp(loss / count), rel=1e-11)
    assert found.bits_per_byte is None  # masked places see what follows


def test_bytes_per_token_are_all_bytes_over_all_tokens(tmp_path):
    """Not the mean of the sources' own; and nothing is said where one of them is unknown."""
    sizes = {"a": (100, 420), "b": (1000, 2500)}
    for name, (tokens, size) in sizes.items():
        (tmp_path / name).mkdir()
        options = manifest.Options(
            text_key="text", vocab=VOCAB, pre_tokenizer=None, tokenizer_sha256=None, end_of_document=None,
            validation=0.1, seed=0, on_error="stop",
        )  # fmt: skip
        made = manifest.CorpusManifest(
            options=options, vocab=VOCAB, end_of_document="", tokenizer_sha256="", defects={}, examples=(), inputs=(),
            outputs=(), train=manifest.Split(documents=1, tokens=7, bytes=7),
            validation=manifest.Split(documents=1, tokens=tokens, bytes=size),
        )  # fmt: skip
        (tmp_path / name / MANIFEST).write_text(made.model_dump_json())
    sources = [Source(path=str(tmp_path / name / manifest.split_stem("validation"))) for name in sizes]
    assert bytes_per_token(sources) == pytest.approx((420 + 2500) / 1100)
    assert bytes_per_token([*sources, Source(path=str(tmp_path / "none"))]) is None
