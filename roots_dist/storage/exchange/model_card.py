"""Model card of an export: README.md with what the model is, what it learned from, how far, and how it is loaded.

run's config, origin.json, summary.json, manifests of its corpora --model_card--> text; what nobody recorded is left out

The licence is a placeholder: only a person knows what the texts and the model that training began with allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from roots_dist.accounting.sizes import parameters
from roots_dist.config.records import family_of, objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import DataError
from roots_dist.learning.data.manifest import CorpusManifest, read_manifest
from roots_dist.storage.exchange.tensors import ORIGIN, read_json

CARD = "README.md"
SUMMARY = "summary.json"
"""File that a run writes when it ends (runs/track/summary_file.py)."""
NUMBERS = {
    "loss/train": "training loss, nats per target",
    "loss/validation": "validation loss, nats per target",
    "perplexity/validation": "perplexity of held-out text",
    "bits_per_byte/validation": "bits per byte of held-out text",
    "f1/validation": "F1",
    "mcc/validation": "Matthews correlation",
}
LICENCE = "FILL IN: a licence that the training texts{base} allow"


def model_card(config: Config, run: Path, checkpoint: str, architecture: str) -> str:
    """The card's text, Markdown with Hugging Face's header."""
    origin, summary = (read_json(run / name) if (run / name).is_file() else {} for name in (ORIGIN, SUMMARY))
    base = config.finetune.init_from or origin.get("imported_from")
    licence = LICENCE.format(base=" and the model that it began with" if base else "")
    header = ["---", "library_name: transformers", f"license: other  # {licence}", "---"]
    name = config.track.name or Path(config.track.folder).name
    parts = [*header, f"# {name}", _what(config, architecture), *_learned(config, base), *_how_far(origin, summary)]
    parts += [f"Exported from the checkpoint `{checkpoint}`.", *_loading(config, architecture)]
    parts += [
        "## Licence and use",
        f"{licence}.",
        "FILL IN: what it is for, what it must not be used for, its known faults.",
    ]
    return "\n".join(header) + "\n\n" + "\n\n".join(parts[len(header) :]) + "\n"


def _what(config: Config, architecture: str) -> str:
    family, objective = family_of(config), objective_of(config)
    return f"{architecture}, {parameters(config):,} parameters ({family.title}), trained on: {objective.title}."


def _learned(config: Config, base: object) -> Iterator[str]:
    yield "## What it learned from"
    if base:
        yield f"It began with the weights of `{base}`."
    rows = []
    for source in config.data.train:
        manifest = None if objective_of(config).rows else _manifest(source.path)
        size = f": {manifest.train.documents:,} documents, {manifest.train.tokens:,} tokens" if manifest else ""
        rows.append(f"- `{source.path}`{size}" + (f", weight {source.weight:g}" if len(config.data.train) > 1 else ""))
    yield "\n".join(rows) if rows else "Nothing: it is as it was imported."


def _manifest(path: str) -> CorpusManifest | None:
    """The corpus's own words of its size; None where it is gone or damaged: the export needs no corpus."""
    try:
        return read_manifest(path)
    except DataError:
        return None


def _how_far(origin: dict[str, Any], summary: dict[str, Any]) -> Iterator[str]:
    rows = [("layout", summary.get("layout") or origin.get("layout"))]
    tokens = summary.get("data/tokens")
    rows += [("steps", summary.get("steps")), ("tokens read", f"{tokens:,.0f}" if isinstance(tokens, float) else None)]
    rows += [(words, f"{summary[key]:.4g}") for key, words in NUMBERS.items() if isinstance(summary.get(key), float)]
    versions = origin.get("versions")
    if isinstance(versions, dict):
        rows.append(("trained with", ", ".join(f"{name} {version}" for name, version in list(versions.items())[:3])))
    known = [f"| {what} | {value} |" for what, value in rows if value is not None]
    if known:
        yield "## How far"
        yield "\n".join(["| | |", "|---|---|", *known])


def _loading(config: Config, architecture: str) -> Iterator[str]:
    yield "## How to load it"
    if objective_of(config).answer == "write" and family_of(config).is_decoder:
        lines = [
            "inputs = tokenizer('The people', return_tensors='pt')",
            "print(tokenizer.decode(model.generate(**inputs)[0]))",
        ]
    else:
        lines = ["outputs = model(**tokenizer('The people', return_tensors='pt'))"]
    code = [
        f"from transformers import AutoTokenizer, {architecture}",
        "",
        "folder = '.'  # of this file",
        f"model = {architecture}.from_pretrained(folder)",
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        *lines,
    ]
    yield "\n".join(["```python", *code, "```"])
