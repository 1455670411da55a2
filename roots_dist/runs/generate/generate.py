"""`roots generate RUN PROMPT`: a run's model answers a text, in one process or in any layout.

    config, GenerateOptions --check--> ids --decode.py | fill.py | predict.py--> Replies --rank 0--> terminal or jsonl

A decoder continues a text or answers it, an encoder-decoder answers, an encoder fills masks, and a fine-tuned
classifier gives labels.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from roots_dist.assembly.passes import Passes, build_passes
from roots_dist.config.objectives import Answer
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import DataError, Problem
from roots_dist.files import why, write_atomically
from roots_dist.logs import still_busy
from roots_dist.runs.generate.check_options import check_options
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.fill import encode_masked, fill, fill_masks
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.generate.predict import Labels, classify, cut_texts, examples, tag
from roots_dist.runs.generate.prompts import (
    Prompt,
    PromptEncoder,
    beyond_training,
    encode_prompts,
    open_prompt_encoder,
    read_prompts,
)
from roots_dist.runs.generate.request import TOP, make_request
from roots_dist.runs.generate.stops import TextStreamer
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.world.mesh import Mesh

log = logging.getLogger(__name__)
Show = Callable[[str], None]
"""Called with text as it is generated; adds no line breaks."""
Load = Callable[[], Passes]
"""Gives the model."""


class Reply(NamedTuple):
    record: dict[str, object]
    """One line of the jsonl output."""
    shown: str


def load_model(config: Config, mesh: Mesh) -> Passes:
    """Load the model from the chosen checkpoint of the run track.folder. Collective over the world."""
    with still_busy(f"loading {config.track.folder}"):
        checkpoint = best_or_newest(Path(config.track.folder), mesh)
        passes = build_passes(config, mesh)
        load_weights(checkpoint, passes.model.params, mesh, verify=False)
    passes.model.module.eval()
    return passes


def generate(config: Config, mesh: Mesh, *, options: GenerateOptions, show: Show) -> None:
    """Answer the prompts. `show` is called on rank 0 only. Collective over the world."""
    prompts, encoder = read_prompts(options), _open_encoder(config, options)
    with ExitStack() as answering:

        def load() -> Passes:
            passes = load_model(config, mesh)
            if not _is_streamed(prompts, options):
                what = "the prompt" if len(prompts) == 1 else f"{len(prompts):,} prompts"
                answering.enter_context(still_busy(f"answering {what}"))
            return passes

        replies = reply(prompts, encoder, load, options, show)
    if mesh.rank > 0 or not replies:
        return
    if options.output is None:
        show("\n\n".join(reply.shown for reply in replies) + "\n")
        return
    lines = "".join(json.dumps(reply.record, ensure_ascii=False) + "\n" for reply in replies)
    write_atomically(options.output, lines)
    show(f"{len(replies)} answers in {options.output}\n")


def _is_streamed(prompts: list[Prompt], options: GenerateOptions) -> bool:
    """True if the answer, provided that it is a text, is shown while it is generated."""
    return len(prompts) == 1 and (options.samples or 1) == 1 and not options.beams and options.output is None


def reply(
    prompts: list[Prompt], encoder: PromptEncoder, load: Load, options: GenerateOptions, show: Show | None = None
) -> list[Reply]:
    """Answer each prompt, as its model does. `load` is called once the prompts are known to fit. With `show`, a single
    text is shown while it is generated, and not returned. Collective over the world."""
    return ANSWERS[objective_of(encoder.config).answer](prompts, encoder, load, options, show)


def check(config: Config, options: GenerateOptions) -> None:
    """Raise UserError for what `generate` would refuse. Called before any process starts; loads no model."""
    check_options(options, config)
    prompts, encoder, kind = read_prompts(options), _open_encoder(config, options), objective_of(config).answer
    if kind == "write":
        encode_prompts(prompts, encoder, options.max_tokens)
    elif kind == "fill":
        encode_masked(prompts, encoder)
    else:
        examples(prompts, encoder)
    if options.output is not None:
        _check_output(options.output)


def _check_output(path: Path) -> None:
    """Check the output file by writing beside it: permission bits do not show full disks and read-only mounts."""
    expected, fix = None, "choose another file"
    if not path.parent.is_dir():
        expected, fix = "a file in an existing folder", f"make {path.parent}"
    elif path.is_dir():
        expected = "a file, and this is a folder"
    else:
        try:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
            if path.exists():
                path.open("a").close()
        except OSError as error:
            expected = f"a file that can be written ({why(error)})"
    if expected is not None:
        raise DataError(Problem(key="--output", found=str(path), expected=expected, fix=fix))


def _open_encoder(config: Config, options: GenerateOptions) -> PromptEncoder:
    return open_prompt_encoder(config, talks=objective_of(config).chats and not options.raw)


def _warn(mesh: Mesh, remark: str | None) -> None:
    if remark is not None and mesh.rank == 0:
        log.warning("%s", remark)


def _write(
    prompts: list[Prompt], encoder: PromptEncoder, load: Load, options: GenerateOptions, show: Show | None
) -> list[Reply]:
    """Generate text. A single answer to a single prompt is shown while it is generated, and no replies are returned
    then."""
    ids, most = encode_prompts(prompts, encoder, options.max_tokens)
    request = replace(make_request(options, encoder.config), max_tokens=most)
    stops = encoder.stops(options.stop, options.keep_end, tuple(one.text for one in prompts))
    passes = load()
    mesh = passes.mesh
    _warn(mesh, beyond_training(ids, encoder))
    has_past = encoder.start is None and encoder.chat is None  # the answer is read together with the prompt
    before = [text if has_past else [] for text in ids]
    if show and _is_streamed(prompts, options):
        on_token = TextStreamer(stops, before[0], show if mesh.rank == 0 else lambda text: None)
        if mesh.rank == 0 and has_past:
            show(prompts[0].text)
        ((answer,),) = decode(passes, ids, request, stops, start=encoder.start, on_token=on_token)
        on_token.finish(stops.text(answer.tokens, before[0]))
        if mesh.rank == 0:
            show("\n")
        return []
    replies = []
    for one, lead, answers in zip(prompts, before, decode(passes, ids, request, stops, start=encoder.start)):
        for answer in answers:
            text = stops.text(answer.tokens, lead)
            record: dict[str, object] = {"prompt": one.text, "text": text}
            record |= {"score": answer.score} if request.beams else {}
            heading = one.text if has_past else f"{one.text}\n" if len(prompts) > 1 else ""
            replies.append(Reply(record, heading + (text if has_past else text.strip())))
    return replies


def _fill(
    prompts: list[Prompt], encoder: PromptEncoder, load: Load, options: GenerateOptions, show: Show | None
) -> list[Reply]:
    ids = encode_masked(prompts, encoder)
    passes = load()
    _warn(passes.mesh, beyond_training(ids, encoder))
    found = fill(passes, ids, encoder, options.top or TOP)
    replies = []
    for one, text, masks in zip(prompts, ids, found):
        filled = fill_masks(text, masks, encoder)
        guesses = [
            [{"word": encoder.codec.decode([g.id]), "probability": g.probability} for g in mask] for mask in masks
        ]
        lines = [
            f"{f'mask {number}' if i == 0 else '':<8}{guess['probability']:7.2%}  {guess['word']}"
            for number, mask in enumerate(guesses, 1)
            for i, guess in enumerate(mask)
        ]
        replies.append(Reply({"prompt": one.text, "text": filled, "masks": guesses}, "\n".join([*lines, filled])))
    return replies


def _classify(
    prompts: list[Prompt], encoder: PromptEncoder, load: Load, options: GenerateOptions, show: Show | None
) -> list[Reply]:
    rows = examples(prompts, encoder)
    passes = load()
    _warn(passes.mesh, cut_texts(rows, encoder))
    found = classify(passes, rows)
    replies = []
    for one, labels in zip(prompts, found):
        record = {"prompt": one.text, **({"pair": one.pair} if one.pair else {}), **_labelled(labels)}
        lines = [f"{p:7.2%}  {label}" for label, p in labels.items()]
        replies.append(Reply(record, "\n".join([one.text, *lines] if len(prompts) > 1 else lines)))
    return replies


def _tag(
    prompts: list[Prompt], encoder: PromptEncoder, load: Load, options: GenerateOptions, show: Show | None
) -> list[Reply]:
    rows = examples(prompts, encoder)
    found = tag(load(), rows)
    replies = []
    for one, labels in zip(prompts, found):
        words = one.text.split()
        wide = max(map(len, words))
        lines = [f"{word:<{wide}}  {next(iter(p))}  {next(iter(p.values())):.2%}" for word, p in zip(words, labels)]
        if left := len(words) - len(labels):
            lines.append(f"({left} more words do not fit data.seq_length = {encoder.config.data.seq_length})")
        tags = [{"word": word, **_labelled(p)} for word, p in zip(words, labels)]
        replies.append(Reply({"prompt": one.text, "words": tags}, "\n".join(lines)))
    return replies


def _labelled(labels: Labels) -> dict[str, object]:
    return {"label": next(iter(labels)), "probabilities": labels}


ANSWERS: dict[Answer, Callable[..., list[Reply]]] = {"write": _write, "fill": _fill, "classify": _classify, "tag": _tag}
"""Kind of answer -> function that returns the replies."""
