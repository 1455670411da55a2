"""Does every family learn, and the same in one process and in TP2 × PP2? Curves, last losses and what is trivial, side
by side.

    python benchmarks/families.py [--only llama,bert] [--steps 0.5] [--folder runs/families] [--png docs/families.png]

Trains each quickstart twice on the embedded corpus (runs that are there go on, or are just read), and holds the
held-out loss of each term against: uniform (no idea), unigram (each word by how often it is a target; where a hidden
word is shown after all, as often as that happens), and of yes-or-no questions the entropy of their answers (ln 2 of
"does it follow?"; of "was it replaced?" by the share of words that the trained generator replaces, special tokens
known).
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from roots_dist.assembly.passes import build_passes
from roots_dist.config.load import load
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.specials import read_specials
from roots_dist.learning.models.electra import ReplacedTokensHead
from roots_dist.learning.objectives import make_objective
from roots_dist.runs.track.metrics import METRICS_FILE, read_lines
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.world.batch import IGNORE
from roots_dist.world.mesh import Mesh

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = {
    "GPT": "quickstart",
    "Llama": "llama-quickstart",
    "BLOOM": "bloom-quickstart",
    "BERT": "bert-quickstart",
    "RoBERTa-style": "roberta-quickstart",
    "ELECTRA": "electra-quickstart",
    "T5": "t5-quickstart",
}
LAYOUTS = {
    "one process": ["parallel.tp=1", "parallel.pp=1"],
    "TP2×PP2": ["parallel.tp=2", "parallel.pp=2"],
}
COUNTED = 150
"""Microbatches of training whose targets are counted for the unigram."""
REPLACED = 40
"""Held-out microbatches in which replaced tokens are counted."""


@dataclass(frozen=True)
class Line:
    """A term of a family's loss."""

    term: str
    losses: list[float]
    """held out, at the end, of each layout"""
    uniform: float
    trivial: float


def train(config: str, folder: Path, words: list[str], share: float) -> None:
    steps = max(1, round(load(ROOT / "configs" / f"{config}.yaml").train.steps * share))
    command = [
        sys.executable,
        "-m",
        "roots_dist",
        "train",
        f"configs/{config}.yaml",
        f"track.folder={folder}",
        "track.wandb=disabled",
    ]
    subprocess.run([*command, f"train.steps={steps}", "train.eval_sequences=256", *words], cwd=ROOT, check=True)


def curves(folder: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Held-out loss of each term, and of training altogether: steps, values."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for record in read_lines(folder / METRICS_FILE):
        for name, value in record.items():
            if name.startswith("loss/"):
                steps, values = found.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return found


def unigram(config: Config) -> float:
    """Held-out targets under how often each word is a target in training (one half more, so that none is impossible).
    Of hidden words, some are shown in their place: what stands there is right as often as it is."""
    objective = make_objective(config)
    training = Batches.open(config, objective, config.data.train)
    counts = np.full(config.model.vocab, 0.5)
    batches = (batch for step in range(COUNTED) for batch in training.at(step))
    for _, batch in zip(range(COUNTED), batches):
        counts += np.bincount(batch.targets[batch.targets != IGNORE].numpy(), minlength=config.model.vocab)
    chance = counts / counts.sum()
    held_out = list(Batches.open(config, objective, config.data.validation).evaluation(256))
    targets = np.concatenate([batch.targets[batch.targets != IGNORE].numpy() for batch in held_out])
    guessed = chance[targets]
    if objective_of(config).masks:
        shown = np.concatenate([batch.tokens[batch.targets != IGNORE].numpy() for batch in held_out])
        seen = shown != read_specials(config.data.tokenizer, config.model.vocab).mask
        right = (shown == targets)[seen].mean()
        guessed = np.where(seen, right * (shown == targets) + (1 - right) * guessed, guessed)
    return float(-np.log(guessed).mean())


@torch.no_grad()
def entropy_of_replaced(config: Config, folder: Path) -> float:
    """Entropy of the answer to "was this token replaced?", as often as the run's own generator replaces a word;
    special tokens never."""
    passes = build_passes(config, Mesh.single())
    load_weights(best_or_newest(folder), passes.model.params)
    special = torch.from_numpy(read_specials(config.data.tokenizer, config.model.vocab).special)
    replaced = words = scored = 0

    def count(head: ReplacedTokensHead, given: tuple) -> None:
        nonlocal replaced, words, scored
        payload, batch = given
        judged = batch.originals != IGNORE
        replaced += int(((payload["tokens"] != batch.originals) & judged).sum())
        words += int((~special[batch.originals[judged]]).sum())
        scored += int(judged.sum())

    (head,) = (piece for _, piece in passes.model.pieces() if isinstance(piece, ReplacedTokensHead))
    head.register_forward_pre_hook(count)
    held_out = Batches.open(config, make_objective(config), config.data.validation).evaluation(
        REPLACED * config.train.micro_batch
    )
    for batch in held_out:
        passes.forward([batch])
    share = replaced / words
    return words / scored * (-share * math.log(share) - (1 - share) * math.log(1 - share))


def lines(config: Config, folders: list[Path]) -> list[Line]:
    found = [curves(folder) for folder in folders]
    terms = list(make_objective(config).weights)
    made = []
    for term in terms:
        name = f"loss/validation/{term}" if len(terms) > 1 else "loss/validation"
        if term == "nsp":
            uniform = trivial = math.log(2)
        elif term == "rtd":
            uniform, trivial = math.log(2), entropy_of_replaced(config, folders[0])
        else:
            uniform, trivial = math.log(config.model.vocab), unigram(config)
        made.append(Line(term, [curve[name][1][-1] for curve in found], uniform, trivial))
    return made


def draw(panels: dict[str, tuple[Line, list[tuple[list[int], list[float]]]]], png: Path) -> None:
    """One panel for each term: held-out loss of both layouts, uniform and trivial."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 3
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 2.7 * rows), dpi=100, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, (title, (line, both)) in zip(axes, panels.items()):
        for (steps, values), colour, style, label in zip(both, ("#2f6db5", "#d9622b"), ("-", "--"), LAYOUTS):
            axis.plot(steps, values, style, color=colour, linewidth=2.4 if style == "-" else 1.6, label=label)
        axis.axhline(line.uniform, color="#8a8f98", linewidth=0.8, linestyle=":", label="uniform")
        axis.axhline(line.trivial, color="#2b2f36", linewidth=0.9, linestyle="-.", label="trivial")
        axis.set_title(title, fontsize=10, loc="left")
        axis.tick_params(labelsize=8)
    for axis in axes[len(panels) :]:
        axis.axis("off")
    axes[0].legend(fontsize=8, frameon=False)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("held-out loss (nats)", fontsize=9)
    figure.savefig(png)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="families, by the name of their config: bert,t5")
    parser.add_argument("--steps", type=float, default=1.0, help="share of each config's steps")
    parser.add_argument("--folder", type=Path, default=Path("runs/families"))
    parser.add_argument("--png", type=Path)
    args = parser.parse_args()
    panels = {}
    table = ["| family | term | one process | TP2×PP2 | trivial | uniform |", "|---|---|---|---|---|---|"]
    for family, config in FAMILIES.items():
        if args.only and config.partition("-quickstart")[0] not in args.only.split(","):
            continue
        folders = [args.folder / f"{config}-{i}" for i in range(len(LAYOUTS))]
        for folder, words in zip(folders, LAYOUTS.values()):
            train(config, folder, words, args.steps)
        for line in lines(load(folders[0] / "config.yaml"), folders):
            name = f"loss/validation/{line.term}"
            both = [curves(folder) for folder in folders]
            panels[f"{family}: {line.term}"] = line, [curve.get(name, curve["loss/validation"]) for curve in both]
            told = " | ".join(f"{value:.4f}" for value in (*line.losses, line.trivial, line.uniform))
            table.append(f"| {family} | `{line.term}` | {told} |")
    if args.png:
        draw(panels, args.png)
    print("\n".join(table))


if __name__ == "__main__":
    main()
