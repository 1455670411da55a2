"""Is the exported model the run's? Logits of both on a few words: ours from the checkpoint, transformers' from the new
files.

An export that has gone wrong (a padded row, a turned matrix, a base of angles that is ignored) still says something
fluent. B texts, S positions, V words.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from roots_dist.assembly.passes import build_passes
from roots_dist.config.run_config import config_of_run
from roots_dist.config.schema import Config
from roots_dist.errors import ExchangeError, needs
from roots_dist.learning.data.specials import read_specials
from roots_dist.storage.checkpoint.keep import chosen
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.exchange.table import GENERATOR
from roots_dist.storage.exchange.tensors import read_json
from roots_dist.world.batch import IGNORE, MicroBatch
from roots_dist.world.mesh import Mesh

BOUND = 1e-4
"""In float32; of the largest logit, where that is above 1."""
TEXTS, LENGTH = 2, 24


class Comparison(NamedTuple):
    difference: float
    """The largest, of all logits."""
    largest: float
    """Of the run's logits, without its sign."""

    @property
    def equal(self) -> bool:
        return self.difference <= BOUND * max(1.0, self.largest)


def compare(run: Path, folder: Path) -> Comparison:
    """The run's chosen checkpoint with the export in `folder`, on the CPU in float32. Raises ExchangeError if
    transformers finds tensors missing or left over, and EnvironmentProblem if it is not installed."""
    config = config_of_run(run).config.changed({"train.precision": "fp32", "train.device": "cpu"})
    batch = a_batch(config)
    ours = our_logits(config, chosen(run), batch)
    theirs = [their_logits(folder, batch)]
    if (folder / GENERATOR).is_dir():
        theirs.insert(0, their_logits(folder / GENERATOR, batch))
    pairs = list(zip(ours, theirs, strict=True))
    assert all(a.shape == b.shape and a.isfinite().all() for a, b in pairs), [(a.shape, b.shape) for a, b in pairs]
    return Comparison(max((a - b).abs().max().item() for a, b in pairs), max(a.abs().max().item() for a in ours))


def a_batch(config: Config) -> MicroBatch:
    """Words alone: special tokens mean something to transformers (padding)."""
    m = config.model
    words = torch.arange(2, m.vocab)
    if config.data.tokenizer is not None:
        words = torch.from_numpy(read_specials(config.data.tokenizer, m.vocab).words)
    shape = (TEXTS, min(LENGTH, config.data.seq_length))
    draw = torch.Generator().manual_seed(0)

    def text() -> Tensor:
        return words[torch.randint(len(words), shape, generator=draw)]

    decoder = text() if m.family == "t5" else None
    targets = torch.full(shape, IGNORE)  # ELECTRA's discriminator reads what its generator has filled in: nothing
    return MicroBatch(
        tokens=text(), decoder_tokens=decoder, targets=targets, samples=torch.arange(TEXTS), read=slice(None)
    )


def our_logits(config: Config, checkpoint: Path, batch: MicroBatch) -> list[Tensor]:
    """Of each head, in the order of the computation: [B, S, V], [B, S] (ELECTRA) or what a task's head has."""
    passes = build_passes(config, Mesh.single())
    load_weights(checkpoint, passes.model.params)
    return [logits.float() for logits in passes.forward([batch])]


def their_logits(folder: Path, batch: MicroBatch) -> Tensor:
    """Of the class that config.json names."""
    try:
        import transformers
    except ImportError as error:
        raise needs("transformers", "exchange") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = read_json(folder / "config.json")["architectures"][0]
    how = dict(dtype=torch.float32, output_loading_info=True, local_files_only=True)
    model, told = getattr(transformers, name).from_pretrained(folder, **how)
    odd = [*told["missing_keys"], *told["unexpected_keys"]]
    if odd:
        version = transformers.__version__
        raise ExchangeError(f"{folder}: transformers {version} finds {min(odd)} missing or left over. Fix: report it.")
    inputs = {} if batch.decoder_tokens is None else {"decoder_input_ids": batch.decoder_tokens}
    with torch.no_grad():
        found = model.eval()(input_ids=batch.tokens, **inputs)
    logits: Tensor = (
        found.prediction_logits if "prediction_logits" in found else found.logits
    )  # BertForPreTraining has two heads
    return logits.float()
