"""Progress of training on rank 0: one live line on a terminal, a plain line now and then in a log file.

    step 120/1000 ━━━━━━╸━━━━━━━━  loss 4.213  lr 2.9e-04  norm 0.91  18.2k tok/s  MFU 41%  1.2 GiB  2:31 left

Fields that do not fit the terminal's width are dropped. Validation results and samples of text scroll up above the
line.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from roots_dist.logs import still_busy
from roots_dist.runs.track.metrics import is_own
from roots_dist.storage.checkpoint.object_store import Place

PLAIN_LINES = 50
"""Approximate number of lines that a whole run writes without a terminal."""
QUIET_S = 30.0
"""Seconds after which a log file gets a line, though by the number of steps none is due."""
REDRAW_S = 0.1


def short(value: float) -> str:
    """12345 -> 12.3k"""
    for unit in ("", "k", "M", "G"):  # noqa: B007 # read after the loop
        if abs(value) < 999.5:
            break
        value /= 1000
    return f"{value:.3g}{unit}"


def clock(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


FIELDS: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss/train", lambda v: f"loss {v:.3f}"),
    ("speed/tokens_per_s", lambda v: f"{short(v)} tok/s"),
    ("time/left_s", lambda v: f"{clock(v)} left"),
    ("optim/lr", lambda v: f"lr {v:.1e}"),
    ("optim/grad_norm", lambda v: f"norm {v:.2f}"),
    ("util/mfu_fraction", lambda v: f"MFU {v:.0%}"),
    ("memory/peak_gib", lambda v: f"{v:.2f} GiB"),
)
"""Metric -> how it is shown; the most important comes first."""
ORDER = (
    "loss/train",
    "optim/lr",
    "optim/grad_norm",
    "speed/tokens_per_s",
    "util/mfu_fraction",
    "memory/peak_gib",
    "time/left_s",
)
"""Display order."""
ACCURACY = "accuracy/validation/"
VALIDATION: tuple[tuple[str, Callable[[float], str]], ...] = (
    ("loss/validation", lambda v: f"loss {v:.4f}"),
    ("perplexity/validation", lambda v: f"perplexity {v:.2f}"),
    ("bits_per_byte/validation", lambda v: f"bits per byte {v:.4f}"),
    ("f1/validation", lambda v: f"F1 {v:.3f}"),
    ("mcc/validation", lambda v: f"MCC {v:.3f}"),
)


def validation_words(metrics: Mapping[str, float]) -> list[str]:
    """An evaluation in words. The accuracy of next tokens is left out, because they have a perplexity; a single
    accuracy is shown without its term's name."""
    words = [show(metrics[name]) for name, show in VALIDATION if name in metrics]
    terms = [name for name in metrics if name.startswith(ACCURACY) and name != f"{ACCURACY}clm"]
    named = len(terms) > 1
    return words + [
        f"{name.removeprefix(ACCURACY) + ' ' if named else ''}accuracy {metrics[name]:.1%}" for name in terms
    ]


class _Line:
    """One line as wide as the terminal is when it is drawn."""

    def __init__(self, step: int, total: int, metrics: Mapping[str, float], doing: str = ""):
        self.step, self.total, self.metrics, self.doing = step, total, metrics, doing

    def fields(self, width: int | None = None) -> list[str]:
        """Fields that fit into the width, in display order; or what is done between two steps."""
        if self.doing:
            return [self.doing]
        chosen: dict[str, str] = {}
        for name, show in FIELDS:
            if name in self.metrics:
                words = show(self.metrics[name])
                if width is not None and sum(len(w) + 2 for w in chosen.values()) + len(words) + 2 > width:
                    break
                chosen[name] = words
        shown = [chosen[name] for name in ORDER if name in chosen]
        for name in filter(is_own, self.metrics):
            word = f"{name.partition('/')[2]} {self.metrics[name]:.4g}"
            if width is None or sum(len(field) + 2 for field in [*shown, word]) <= width:
                shown.append(word)
        return shown

    @property
    def head(self) -> str:
        return f"step {self.step:>{len(str(self.total))}}/{self.total}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        room = options.max_width - len(self.head) - 1
        fields = self.fields(room)
        room -= sum(len(words) + 2 for words in fields)
        grid = Table.grid(padding=(0, 1, 0, 0))
        cells: list[Text | ProgressBar] = [Text(self.head, "bold", no_wrap=True)]
        if room >= 8:
            cells.append(ProgressBar(self.total, self.step, width=min(room - 2, 30)))
        cells.append(Text("  ".join(fields), no_wrap=True, overflow="crop"))
        grid.add_row(*cells)
        yield grid


class ProgressTracker:
    """A tracker. The time left is estimated from the first step that it sees."""

    def __init__(self, total: int, first_step: int = 0, console: Console | None = None):
        self._console = console or Console(highlight=False)
        self._total, self._first = total, first_step
        self._every = max(1, total // PLAIN_LINES)
        self._start = time.monotonic()
        self._drawn = float("-inf")
        self._said = time.monotonic()
        self._at = first_step
        self._shown: dict[str, float] = {}
        self._own: dict[str, float] = {}
        self._live: Live | None = None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._own |= {name: value for name, value in metrics.items() if is_own(name)}
        if "loss/train" in metrics:
            self._shown = {**metrics, **self._own}
            done = step - self._first
            if done > 0:
                self._shown["time/left_s"] = (time.monotonic() - self._start) / done * (self._total - step)
            self._at = step
            self._step(_Line(step, self._total, self._shown))
        if "loss/validation" in metrics:
            if step == self._first:
                self._start = time.monotonic()  # the evaluation before the first step must not count as training time
            words = "  ".join(validation_words(metrics))
            self._console.print(Text(f"step {step}  validation  {words}", "green"), soft_wrap=True)

    def _step(self, line: _Line) -> None:
        last = line.step >= self._total
        if self._console.is_terminal:
            self._draw(line, now=last or time.monotonic() - self._drawn >= REDRAW_S)
        elif self._is_due(line.step) or last:
            self._said = time.monotonic()
            self._console.print("  ".join([line.head, *line.fields()]), soft_wrap=True, markup=False)

    def _is_due(self, step: int) -> bool:
        """True if a log file gets a line of this step."""
        by_number = step == self._first + 1 or step % self._every == 0
        return by_number or time.monotonic() - self._said >= QUIET_S

    def _draw(self, line: _Line, now: bool) -> None:
        if self._live is None:  # drawn by our calls, without a thread; output to sys.stderr scrolls up above it
            self._live = Live(line, console=self._console, auto_refresh=False)
            self._live.start()
        self._live.update(line, refresh=now)
        if now:
            self._drawn = time.monotonic()

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show on a terminal what delays the next step; in a log file, if it takes longer than a few seconds."""
        if not self._console.is_terminal:
            with still_busy(what.removesuffix(" ...")):
                yield
            return
        self._draw(_Line(self._at, self._total, self._shown, what), now=True)
        yield
        self._draw(_Line(self._at, self._total, self._shown), now=True)

    def text(self, step: int, name: str, text: str) -> None:
        self._console.print(Text.assemble((f"step {step}  {name}\n", "cyan"), text), soft_wrap=True)

    def checkpoint(self, step: int, path: Place) -> None:
        """Nothing to show: later lines say that it was saved."""

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
