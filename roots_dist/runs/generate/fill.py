"""Fill masks with an encoder: predict the tokens at masked places. For an ELECTRA model its generator predicts them.

    text with [MASK] --encode_masked--> ids --[CLS] … [SEP], padded--> Passes --softmax at masks--> the likeliest tokens

Each mask is predicted on its own while all others stay masked, as in transformers' fill-mask pipeline. B texts, S
positions of the longest, V vocabulary, M masks of all texts together.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from roots_dist.assembly.passes import Passes
from roots_dist.config.special_tokens import NAMES
from roots_dist.errors import present
from roots_dist.runs.generate.cached_decoder import broadcast
from roots_dist.runs.generate.prompts import Prompt, PromptEncoder
from roots_dist.world.batch import IGNORE, PADDING, MicroBatch

AT_ONCE = 16
"""Number of texts in one forward pass."""


class Guess(NamedTuple):
    id: int
    probability: float


def encode_masked(prompts: Sequence[Prompt], encoder: PromptEncoder) -> list[list[int]]:
    """Ids of each text, enclosed in [CLS] and [SEP]. Any known tokenizer's spelling of the mask is accepted. Raises
    DataError for a text that has no mask or is longer than the learned positions."""
    s, found = encoder.specials, []
    cls, sep = present(s.cls), present(s.sep)
    name = present(encoder.codec.backend.id_to_token(present(s.mask)))
    for one in prompts:
        text = one.text
        for other in NAMES["mask"]:
            text = text.replace(other, name)
        ids = [cls, *encoder.codec.encode_with_specials(text), sep]
        if s.mask not in ids:
            raise one.problem(f"a text with a mask ({name})", f"write {name} where a word is missing")
        if encoder.config.model.positions == "learned" and len(ids) > encoder.positions:
            expected = (
                f"at most {encoder.positions - 2} tokens of {encoder.positions} learned positions, because two tokens "
            )
            raise one.problem(f"{expected}enclose it; these are {len(ids) - 2}", "a shorter text")
        found.append(ids)
    return found


def fill(passes: Passes, texts: Sequence[Sequence[int]], encoder: PromptEncoder, top: int) -> list[list[list[Guess]]]:
    """The `top` likeliest tokens for each mask of each text, in order. The result is on every rank; collective over the
    world."""
    found: list[list[list[Guess]]] = []
    for first in range(0, len(texts), AT_ONCE):
        found += _some(passes, texts[first : first + AT_ONCE], encoder, min(top, encoder.config.model.vocab))
    return found


def _some(passes: Passes, texts: Sequence[Sequence[int]], encoder: PromptEncoder, top: int) -> list[list[list[Guess]]]:
    mesh, mask, length = passes.mesh, present(encoder.specials.mask), max(map(len, texts))
    pad = encoder.specials.pad or 0
    tokens = torch.tensor([[*text, *[pad] * (length - len(text))] for text in texts])  # [B, S]
    place = torch.arange(length)
    documents = torch.where(place < torch.tensor([[len(text)] for text in texts]), 0, PADDING)
    row, column = torch.nonzero(tokens == mask, as_tuple=True)  # position of each mask
    begin, end = int(column.min()), int(column.max()) + 1
    batch = MicroBatch(
        tokens=tokens,
        targets=torch.where(tokens == mask, tokens, IGNORE),  # where ELECTRA's generator samples
        document_ids=documents,
        sample_ids=torch.arange(len(texts)),
        logits_at=slice(begin, end),
    ).to(mesh.device)
    with passes.model.tp.without_sequence_sharding():
        read = passes.forward([batch])
    logits = next(
        (scores for scores in read if scores.dim() == 3), None
    )  # [B, S', V]; ELECTRA's discriminator scores are [B, S']
    best = None
    if logits is not None and mesh.tp.rank == 0:
        best = logits[row.to(logits.device), column.to(logits.device) - begin].double().softmax(-1).topk(top)
        best = torch.stack([best.values, best.indices.double()])
    probabilities, ids = broadcast(mesh.model, best, (2, len(row), top), torch.float64, mesh.device)
    guesses: list[list[list[Guess]]] = [[] for _ in texts]
    for i, which, p in zip(row.tolist(), ids.long().tolist(), probabilities.tolist()):
        guesses[i].append([Guess(*guess) for guess in zip(which, p)])
    return guesses


def fill_masks(text: Sequence[int], guesses: Sequence[Sequence[Guess]], encoder: PromptEncoder) -> str:
    """The text with the likeliest token at each mask, without [CLS] and [SEP]."""
    likeliest = iter(guesses)
    return encoder.codec.decode([next(likeliest)[0].id if i == encoder.specials.mask else i for i in text[1:-1]])
