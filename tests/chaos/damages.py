"""Damages to the newest checkpoint of a run, by kind. A run that is resumed must not take it for sound."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from roots_dist.errors import UserError
from roots_dist.runs.train.resume import resume

from .small_run import save_step, small_run, step_of_weights
from .trial import Family, Outcome


def _file(draw: random.Random, folder: Path) -> Path:
    return draw.choice(sorted(path for path in folder.iterdir() if path.stat().st_size))


def _flip(draw: random.Random, folder: Path) -> None:
    path = _file(draw, folder)
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def _zeros(draw: random.Random, folder: Path) -> None:
    """A block of zeros, as a disk leaves that had not written it yet."""
    path = _file(draw, folder)
    content = bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at : at + 512] = bytes(len(content[at : at + 512]))
    path.write_bytes(content)


def _cut(draw: random.Random, folder: Path) -> None:
    path = _file(draw, folder)
    with path.open("r+b") as file:
        file.truncate(draw.randrange(path.stat().st_size))


def _grow(draw: random.Random, folder: Path) -> None:
    with _file(draw, folder).open("ab") as file:
        file.write(bytes(draw.randrange(1, 100)))


def _remove(draw: random.Random, folder: Path) -> None:
    _file(draw, folder).unlink()


def _swap(draw: random.Random, folder: Path) -> None:
    """Two files have each other's names."""
    one, other = draw.sample(sorted(folder.iterdir()), 2)
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def _older_file(draw: random.Random, folder: Path) -> None:
    """A file of the checkpoint before, under the same name."""
    path = _file(draw, folder)
    before = sorted(folder.parent.glob("step_*"))[-2] / path.name
    shutil.copy(before, path)


def _renamed(draw: random.Random, folder: Path) -> None:
    """The folder of another step."""
    folder.rename(folder.with_name("step_00000009"))


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "one bit flipped": _flip,
    "a block of zeros": _zeros,
    "cut short": _cut,
    "bytes at the end": _grow,
    "a file removed": _remove,
    "two files swapped": _swap,
    "a file of the step before": _older_file,
    "a folder under another step's name": _renamed,
}


def trial(draw: random.Random, place: Path) -> Outcome:
    """Damage the newest of three checkpoints, resume, and look at the weights: those of the one before, or, where the
    damage changed nothing, of the newest."""
    kind = draw.choice(list(KINDS))
    run = small_run()
    for step in (1, 2, 3):
        newest = save_step(run, place, step)
    sound = {path.name: path.read_bytes() for path in newest.iterdir()}
    KINDS[kind](draw, newest)
    same = newest.is_dir() and sound == {path.name: path.read_bytes() for path in newest.iterdir()}
    again = small_run()
    try:
        step = resume(again, place).step
    except UserError as error:
        return Outcome(kind, held=False, words=f"refused: {error}")
    wanted = 3 if same else 2
    held = step == wanted == step_of_weights(again)
    return Outcome(kind, held, "" if held else f"resumed after step {step}, expected {wanted}")


FAMILY = Family(
    "damages",
    harm="the newest of three checkpoints is damaged",
    promise="the damage is noticed and the run resumes from the one before, to the bit",
    trial=trial,
    sample=5,
)
