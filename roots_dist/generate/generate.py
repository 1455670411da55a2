"""`roots generate RUN PROMPT`: continue a text with a run's newest checkpoint, whatever layout wrote it.

    prompt --tokenizer--> ids --decode.py, word by word--> ids --tokenizer--> text, shown as it is made
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from roots_dist.checkpoint.keep import chosen
from roots_dist.checkpoint.load import load_weights
from roots_dist.config.of_run import of_run
from roots_dist.data.tokenizer import load_codec
from roots_dist.errors import DataError, UserError
from roots_dist.generate.decode import decode
from roots_dist.generate.request import Request
from roots_dist.generate.sampling import Sampling
from roots_dist.mesh import Mesh
from roots_dist.train.build import Passes, build_passes


def load_model(folder: Path, device: torch.device) -> Passes:
    """The whole model of a run's newest checkpoint, in this process."""
    config = of_run(folder).config
    checkpoint = chosen(folder)
    passes = build_passes(config, Mesh.single(device))
    load_weights(checkpoint, passes.model.params)
    return passes


def generate(
    folder: Path, prompt: str, *, max_tokens: int, sampling: Sampling, seed: int, show: Callable[[str], None]
) -> None:
    """Print a continuation of the prompt as it is made: `show` gets it in pieces of text."""
    passes = load_model(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    config = passes.config
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
    shown = ""

    def heard(_: int, said: Sequence[int]) -> None:
        nonlocal shown
        text = tokenizer.decode(said)
        if not text.endswith("�"):  # the middle of a character that takes several tokens
            show(text[len(shown) :])
            shown = text

    decode(passes, [ids], Request(max_tokens, sampling, seed), heard=heard)
