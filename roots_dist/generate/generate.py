"""Continue a text. With a run's folder in one process, keys and values cached; or live, in the layout that trains.

    prompt --tokenizer--> ids --pieces, one new token at a time--> ids --tokenizer--> text

A checkpoint does not know the layout that wrote it, so any run can be read by one process that can hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from roots_dist.checkpoint.keep import newest
from roots_dist.checkpoint.load import load_weights
from roots_dist.config.of_run import of_run
from roots_dist.config.schema import Config
from roots_dist.data.tokenizer import load_codec
from roots_dist.errors import CheckpointError, DataError, UserError
from roots_dist.generate.sampling import Sampling
from roots_dist.mesh import Mesh
from roots_dist.objectives.base import Cache, MicroBatch, Scored
from roots_dist.train.build import Passes, build_model


def continue_ids(pieces: list[nn.Module], ids: list[int], count: int, sampling: Sampling, seed: int) -> Iterator[int]:
    """`count` more ids, one by one. pieces: the whole model in one process, in order, in eval mode."""
    cache, generator = Cache(), torch.Generator().manual_seed(seed)
    device = next(pieces[0].parameters()).device
    new = ids
    for _ in range(count):
        tokens = torch.tensor([new], device=device)
        batch = MicroBatch(tokens=tokens, samples=torch.zeros_like(tokens[:, 0]), read=-1, cache=cache)
        with torch.no_grad():
            payload: dict | Scored = {}
            for piece in pieces:
                payload = piece(payload, batch)
        cache.length += len(new)
        (logits,) = payload.found
        new = sampling.choose(logits, generator).tolist()
        yield new[0]


def continue_live(passes: Passes, ids: list[int], count: int, sampling: Sampling, seed: int) -> list[int]:
    """`count` more ids from the model as it stands on all ranks, in any layout. Collective over the world.

    For the samples of a training run: it reads the whole context again for each token.
    """
    generator = torch.Generator().manual_seed(seed)
    ids, seq = list(ids), passes.config.data.seq
    shape = (1, seq)
    for _ in range(count):
        context = ids[-seq:]
        tokens = torch.zeros(shape, dtype=torch.int64)
        tokens[:, : len(context)] = torch.tensor(context)  # what comes after cannot be seen: attention is causal
        batch = MicroBatch(tokens=tokens, samples=torch.zeros_like(tokens[:, 0]), read=len(context) - 1)
        ids.append(_chosen(passes, batch, sampling, generator))
    return ids[-count:]


def answer_live(passes: Passes, batch: MicroBatch, count: int, sampling: Sampling, seed: int) -> list[int]:
    """The first `count` words that a decoder says to the first text of `batch`, which its encoder reads. As continue_live."""
    generator = torch.Generator().manual_seed(seed)
    fields = {name: value[:1] for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    decoder = fields["decoder_tokens"][:, :1].repeat(1, batch.decoder_tokens.shape[1])  # the start; what comes later is not seen
    said: list[int] = []
    for place in range(min(count, decoder.shape[1])):
        reading = MicroBatch(**fields | {"decoder_tokens": decoder, "targets": None}, read=place)
        said.append(_chosen(passes, reading, sampling, generator))
        decoder[:, place + 1 : place + 2] = said[-1]
    return said


def _chosen(passes: Passes, batch: MicroBatch, sampling: Sampling, generator: torch.Generator) -> int:
    """The word that the first data rank's model says where batch.read asks, on all ranks."""
    mesh = passes.mesh
    found = passes.forward([batch.to(mesh.device)])
    chosen = torch.zeros(1, dtype=torch.int64, device=mesh.device)
    if found and mesh.tp.rank == 0 and mesh.dp.rank == 0:
        chosen[0] = sampling.choose(found[0][:1], generator)[0]
    return int(mesh.world.sum_(chosen).item())


def load_model(folder: Path, device: torch.device) -> tuple[Config, list[nn.Module]]:
    """The config and the whole model of a run's newest checkpoint, in this process, in eval mode."""
    config = of_run(folder).config
    checkpoint = newest(folder)
    if checkpoint is None:
        raise CheckpointError(f"{folder} holds no complete checkpoint. Fix: train it first, or name another run's folder.")
    model = build_model(config, Mesh.single(device))
    load_weights(checkpoint, model.params)
    model.module.eval()
    return config, [piece for _, piece in model.pieces()]


def generate(
    folder: Path, prompt: str, *, max_tokens: int, sampling: Sampling, seed: int, show: Callable[[str], None]
) -> None:
    """Print a continuation of the prompt as it is made: `show` gets it in pieces of text."""
    config, pieces = load_model(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if config.data.tokenizer is None:
        raise DataError(f"{folder}/config.yaml names no data.tokenizer, so text cannot be read or written.")
    tokenizer = load_codec(config.data.tokenizer)
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("the prompt is empty: expected at least one token. Fix: give it a word to begin with.")
    limit = config.data.seq if config.model.positions == "learned" else None
    if limit is not None and len(ids) + max_tokens > limit:
        room = f", or --max-tokens {limit - len(ids)}" if len(ids) < limit else ""
        raise UserError(
            f"prompt and continuation = {len(ids)} + {max_tokens} tokens: expected at most data.seq = {limit}, the learned "
            f"positions there are. Fix: a shorter prompt{room}."
        )
    said: list[int] = []
    shown = ""
    for token in continue_ids(pieces, ids, max_tokens, sampling, seed):
        said.append(token)
        text = tokenizer.decode(said)
        if not text.endswith("�"):  # the middle of a character that takes several tokens
            show(text[len(shown) :])
            shown = text
