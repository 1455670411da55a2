"""Compare an export with its run: logits of both on a few tokens, ours from the checkpoint, transformers' from the new
files.

A wrong export (a padded row, a transposed matrix, an ignored rotary base) still produces fluent text. B texts, S
positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from roots_dist.assembly.passes import build_passes
from roots_dist.config.records import family_of, is_bare, objective_of
from roots_dist.config.rope_scaling import LongRope
from roots_dist.config.run_config import config_of_run
from roots_dist.config.schema import Config
from roots_dist.errors import ExchangeError, missing_package
from roots_dist.learning.data.specials import read_specials
from roots_dist.storage.checkpoint.format import read_index
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.storage.exchange.electra import GENERATOR_NAMES
from roots_dist.storage.exchange.table import GENERATOR
from roots_dist.storage.exchange.tensors import read_json
from roots_dist.world.batch import IGNORE, MicroBatch
from roots_dist.world.mesh import Mesh

BOUND = 1e-4
"""Allowed difference in float32, relative to the largest logit if that is above 1."""
TEXTS, LENGTH = 2, 24
OUTPUTS = ("prediction_logits", "logits", "pooler_output", "last_hidden_state")
"""Names that their classes give to the output; the first that exists is compared: BertForPreTraining has two heads, a
stack alone has none."""
HIDDEN = OUTPUTS[-1]


class Comparison(NamedTuple):
    """Result of a comparison."""

    difference: float
    """Largest absolute difference of all logits."""
    largest: float
    """Largest absolute logit of the run."""

    @property
    def equal(self) -> bool:
        return self.difference <= BOUND * max(1.0, self.largest)


def compare(run: Path, folder: Path, extensions: Sequence[str] = ()) -> Comparison:
    """Compare the run's best or newest checkpoint with the export in `folder`, on the CPU in float32. Raises
    ExchangeError if transformers reports missing or unexpected tensors, and EnvironmentProblem if it is not installed.
    """
    config = config_of_run(run, extensions).config.changed({"train.precision": "fp32", "train.device": "cpu"})
    batch = comparison_batch(config)
    theirs = [their_logits(folder, batch, outputs_of(config))]
    if (folder / GENERATOR).is_dir():
        theirs.insert(0, their_logits(folder / GENERATOR, batch))
    ours = our_logits(config, best_or_newest(run), batch)
    pairs = list(zip(ours, theirs, strict=True))
    assert all(a.shape == b.shape and a.isfinite().all() for a, b in pairs), [(a.shape, b.shape) for a, b in pairs]
    return Comparison(max((a - b).abs().max().item() for a, b in pairs), max(a.abs().max().item() for a in ours))


def outputs_of(config: Config) -> Sequence[str]:
    """Names from OUTPUTS of the output to compare with: a stack alone may have a pooler that our model does not
    have."""
    return (HIDDEN,) if is_bare(config) and objective_of(config).answer == "tag" else OUTPUTS


def comparison_batch(config: Config) -> MicroBatch:
    """A batch of ordinary tokens: special tokens such as padding have a meaning in transformers."""
    m = config.model
    words = torch.arange(2, m.vocab)
    if config.data.tokenizer is not None:
        words = torch.from_numpy(read_specials(config.data.tokenizer, m.vocab).words)
    shape = (TEXTS, min(LENGTH, config.data.seq_length))
    scaling = m.rope_scaling
    if isinstance(scaling, LongRope) and config.data.seq_length > scaling.original_length:
        shape = (TEXTS, scaling.original_length + 1)  # long enough that transformers takes the factors that the run has
    draw = torch.Generator().manual_seed(0)

    def text() -> Tensor:
        return words[torch.randint(len(words), shape, generator=draw)]

    decoder = text() if family_of(config).has_two_stacks else None
    targets = torch.full(shape, IGNORE)  # no masked tokens, so ELECTRA's discriminator reads the tokens unchanged
    return MicroBatch(
        tokens=text(), decoder_tokens=decoder, targets=targets, sample_ids=torch.arange(TEXTS), logits_at=slice(None)
    )


def our_logits(config: Config, checkpoint: Place, batch: MicroBatch) -> list[Tensor]:
    """Logits of each head, in the order of the computation: [B, S, V], [B, S] (ELECTRA), or that of a task head. A
    discriminator alone has its own only: without masked tokens they do not depend on the generator."""
    passes = build_passes(config, Mesh.single())
    alone = objective_of(config).has_generator and is_alone(checkpoint)
    present = [p for p in passes.model.params if not (alone and p.name.startswith(GENERATOR_NAMES))]
    load_weights(checkpoint, present)
    logits = [logits.float() for logits in passes.forward([batch])]
    return logits[1:] if alone else logits


def is_alone(checkpoint: Place) -> bool:
    """True if an ELECTRA checkpoint has no generator, as an import of the discriminator has none."""
    return not any(name.startswith(GENERATOR_NAMES) for name in read_index(checkpoint, "weight"))


def their_logits(folder: Path, batch: MicroBatch, outputs: Sequence[str] = OUTPUTS) -> Tensor:
    """Logits of the class that config.json names, or the first of these outputs that it has."""
    try:
        import transformers
    except ImportError as error:
        raise missing_package("transformers", "exchange") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    name = read_json(folder / "config.json")["architectures"][0]
    how = dict(dtype=torch.float32, output_loading_info=True, local_files_only=True)
    model, loading_info = getattr(transformers, name).from_pretrained(folder, **how)
    missing = loading_info["missing_keys"]
    if tuple(outputs) == (HIDDEN,):
        missing = [key for key in missing if not key.startswith("pooler.")]  # version 5 makes one for every stack
    odd = [*missing, *loading_info["unexpected_keys"]]
    if odd:
        version = transformers.__version__
        raise ExchangeError(f"{folder}: transformers {version} finds {min(odd)} missing or left over. Fix: report it.")
    inputs = {} if batch.decoder_tokens is None else {"decoder_input_ids": batch.decoder_tokens}
    with torch.no_grad():
        found = model.eval()(input_ids=batch.tokens, **inputs)
    logits: Tensor = next(found[name] for name in outputs if name in found)
    return logits.float()
