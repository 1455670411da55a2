"""Report page about one run or several: what they are, how they learned, where the time went, what they generate, how
they differ.

    run_record.py: RunRecords --page--> one HTML document without scripts or other files; a run's text is never markup
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from xml.etree.ElementTree import Element

from roots_dist.config.schema import Config
from roots_dist.runs.report.charts import COLOURS, bar_chart, colour, legend
from roots_dist.runs.report.curves import losses, own_metrics, rates
from roots_dist.runs.report.layout_picture import layout_picture
from roots_dist.runs.report.load_picture import MOST, load_picture, loads_of
from roots_dist.runs.report.markup import Inside, document, section, table, tag
from roots_dist.runs.report.run_record import STEP_PARTS, RunRecord
from roots_dist.runs.report.style import style
from roots_dist.runs.track.closing_lines import label_of
from roots_dist.runs.track.metrics import LOADS, RESUMED
from roots_dist.runs.track.progress import clock, short

SAMPLES, SAMPLE_LETTERS = 3, 900
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Content security policy of the page: no script runs and nothing is fetched, whatever the page contains."""


def page(runs: Sequence[RunRecord]) -> str:
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    curves = (losses, own_metrics, rates)
    sections = (
        _overview,
        *curves,
        _layouts,
        _times,
        _expert_loads,
        _validations,
        _samples,
        _config_differences,
        _origins,
    )
    parts = [part(runs) for part in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title} · roots"),
        tag("style", style()),
    )
    times = [record["time"] for run in runs for record in run.records if isinstance(record.get("time"), (int, float))]
    words = f"newest record {_when(max(times))}" if times else "nothing logged yet"  # type: ignore[type-var]
    body = tag("body", tag("h1", title), tag("p", words, class_="dim"), [part for part in parts if part is not None])
    return document(tag("html", head, body, lang="en"))


def _when(seconds: object) -> str:
    try:
        return f"{datetime.fromtimestamp(float(seconds), timezone.utc):%Y-%m-%d %H:%M} UTC"  # type: ignore[arg-type]
    except (OverflowError, ValueError, OSError):
        return "unknown"


def _name(runs: Sequence[RunRecord], index: int) -> Element:
    return tag("span", tag("i", class_=f"key back-{colour(index)}"), runs[index].name, class_="run")


def _number(value: object, form: Callable[[float], str] = short) -> str:
    return form(value) if isinstance(value, (int, float)) else "–"


def _overview(runs: Sequence[RunRecord]) -> Element:
    rows: list[list[Inside]] = []
    for index, run in enumerate(runs):
        of = f" of {run.steps:,}" if run.steps is not None else ""
        trained = sum(seconds for part, seconds in run.seconds().items() if part not in ("evaluate", "checkpoint"))
        rows.append(
            [
                _name(runs, index),
                f"{run.config.get('model.family', '–')}, {run.config.get('objective.name', '–')}",
                _number(run.parameters),
                str(run.layout or "–"),
                tag("span", f"{run.step:,}{of}", tag("small", run.state)),
                _number(run.last("data/tokens")),
                _number(run.last("loss/train"), "{:.3f}".format),
                _number(run.last("loss/validation"), "{:.3f}".format),
                tag(
                    "span",
                    clock(trained) if trained else "–",
                    _lower_bound(run, "time/step_s", "plan/step_s", "{:.3g} s"),
                ),
                tag(
                    "span",
                    _number(run.last("memory/peak_gib"), "{:.2f} GiB".format),
                    _lower_bound(run, None, "plan/memory_gib", "{:.2g} GiB"),
                ),
            ]
        )
    head = [
        "",
        "model",
        "parameters",
        "layout",
        "steps",
        "tokens",
        "training loss",
        "validation loss",
        "training",
        "memory",
    ]
    return section(
        "Runs" if len(runs) > 1 else "The run", table(head, rows, "short"), [_nonfinite_steps(run) for run in runs]
    )


def _lower_bound(run: RunRecord, measured: str | None, planned: str, form: str) -> Element | None:
    """Measured value and its lower bound (accounting/bounds.py)."""
    least = run.last(planned)
    if not isinstance(least, (int, float)):
        return None
    took = run.last(measured) if measured else None
    step = f"{form.format(took)} a step, " if isinstance(took, (int, float)) else ""
    return tag("small", f"{step}at least {form.format(least)}")


def _nonfinite_steps(run: RunRecord) -> Inside:
    if not run.nonfinite_steps:
        return None
    some = ", ".join(map(str, run.nonfinite_steps[:12])) + (" …" if len(run.nonfinite_steps) > 12 else "")
    return tag("p", f"{run.name}: loss or gradient was not finite at {len(run.nonfinite_steps)} steps: {some}")


def _layouts(runs: Sequence[RunRecord]) -> Element | None:
    figures = []
    for run in runs:
        if run.layout:
            processes = "one process" if run.layout.world_size == 1 else f"{run.layout.world_size} processes"
            words = f"{run.name}: {run.layout}, {processes}"
            caption = tag("figcaption", words, tag("br"), _batch(run))
            figures.append(
                tag("figure", caption, layout_picture(run.layout), class_="whole" if run.layout.pp > 5 else None)
            )
    note = (
        "A box holds the tensor ranks of one stage and replica; stages from left to right, replicas from top to bottom."
    )
    return section("Layout", tag("div", figures, class_="two"), tag("p", note, class_="dim")) if figures else None


def _batch(run: RunRecord) -> str:
    """`schedule 1f1b, ZeRO 1, 4 × 256 tokens × 2 microbatches × dp 1`"""
    micro, seq, batch = (run.config.get(key) for key in ("train.micro_batch", "data.seq_length", "train.global_batch"))
    words = f"schedule {run.config.get('parallel.schedule', '–')}, ZeRO {run.config.get('parallel.zero_stage', '–')}"
    if run.layout and all(isinstance(n, int) and n > 0 for n in (micro, seq, batch)):
        times = batch // (micro * run.layout.dp)  # type: ignore[operator]
        words += f", {micro} × {seq} tokens × {times} microbatches × dp {run.layout.dp} a step"
    return words


def _times(runs: Sequence[RunRecord]) -> Element | None:
    spent = [run.seconds() for run in runs]
    order = [part for part in STEP_PARTS if any(part in seconds for seconds in spent)]
    rows: list[tuple[str, Sequence[tuple[str, float, int]], str]] = []
    found: list[list[Inside]] = []
    for index, (run, seconds) in enumerate(zip(runs, spent)):
        if seconds:
            parts = [(STEP_PARTS[part], seconds[part], _paint(order, part)) for part in order if part in seconds]
            rows.append((run.name, parts, clock(sum(seconds.values()))))
            found.append([_name(runs, index), *(_number(seconds.get(part), "{:.1f} s".format) for part in order)])
    if not rows:
        return None
    note = "Mean over ranks, without loading and samples of text."
    keys = legend([(STEP_PARTS[part], _paint(order, part)) for part in order])
    seconds_of = table(["", *(STEP_PARTS[part] for part in order)], found)
    return section(
        "Where the time went",
        keys,
        tag("div", bar_chart(rows), class_="wide"),
        seconds_of,
        tag("p", note, class_="dim"),
    )


def _paint(order: Sequence[str], part: str) -> int:
    """The colour of one of the parts that a page shows: each its own; the last one, a grey, for what is not split."""
    split = [other for other in order if other not in list(STEP_PARTS)[-2:]]
    return min(split.index(part), COLOURS - 1) if part in split else COLOURS - 1


def _expert_loads(runs: Sequence[RunRecord]) -> Element | None:
    """Pictures of the tokens of each expert, at the last report of each run that has experts; they show how even the
    loads are."""
    figures = []
    for run in runs:
        records = [(t["step"], loads_of(t.get("text"))) for t in run.texts if t.get("name") == LOADS]
        found = [(step, loads) for step, loads in records if loads]
        if found:
            step, loads = found[-1]
            entropy = _number(run.last("experts/entropy"), "{:.1%}".format)
            words = f"{run.name}, step {step:,}: entropy {entropy} of even loads"
            figures.append(tag("figure", tag("figcaption", words), load_picture(loads), class_="whole"))
    note = f"The darker, the more tokens: darkest at {MOST:g} times the mean of the layer. No token is dropped."
    return section("Load of experts", figures, tag("p", note, class_="dim")) if figures else None


def _validations(runs: Sequence[RunRecord]) -> Element | None:
    names = list(dict.fromkeys(name for run in runs for record in run.records for name in record if label_of(name)))
    rows: list[list[Inside]] = []
    for index, run in enumerate(runs):
        if any(run.series(name)[0] for name in names):
            rows.append([_name(runs, index), *(_progress(run, name) for name in names)])
    if not rows:
        return None
    note = "Last evaluation; below it the first and the best one."
    return section("Validation", table(["", *(label_of(name) for name in names)], rows), tag("p", note, class_="dim"))


def _progress(run: RunRecord, metric: str) -> Inside:
    steps, values = run.series(metric)
    if not values:
        return "–"
    falls = metric.startswith(("loss/", "perplexity/", "bits_per_byte/"))
    best = (min if falls else max)(range(len(values)), key=values.__getitem__)
    return tag(
        "span",
        f"{values[-1]:.4g}",
        tag("small", f"from {values[0]:.4g}; best {values[best]:.4g}, step {steps[best]:,}"),
    )


def _samples(runs: Sequence[RunRecord]) -> Element | None:
    found = [part for run in runs for part in _run_samples(run, titled=len(runs) > 1)]
    return section("Samples of text", found) if found else None


def _run_samples(run: RunRecord, titled: bool) -> Iterator[Element]:
    texts = [
        t for t in run.texts if isinstance(t.get("text"), str) and t["text"] and t.get("name") not in (RESUMED, LOADS)
    ]
    if titled and texts:
        yield tag("h3", run.name)
    chosen = sorted({round(i * (len(texts) - 1) / max(1, SAMPLES - 1)) for i in range(SAMPLES)}) if texts else []
    for text in (texts[i] for i in chosen):
        prompt, bar, answer = str(text["text"])[:SAMPLE_LETTERS].strip().partition(" | ")
        yield tag("p", f"step {text['step']:,}", class_="dim")
        yield tag("blockquote", tag("b", f"{prompt} ") if bar else prompt, answer)


def _config_differences(runs: Sequence[RunRecord]) -> Element | None:
    """Differences between the configs, or of a single run's config from the defaults."""
    if len(runs) == 1:
        usual = {f"{s}.{k}": v for s, keys in Config().model_dump(mode="json").items() for k, v in keys.items()}
        given = runs[0].config
        rows = [
            [key, _format(value), _format(usual.get(key))] for key, value in given.items() if value != usual.get(key)
        ]
        return section("What the config changes", table(["key", "value", "default"], rows)) if rows else None
    keys = list(dict.fromkeys(key for run in runs for key in run.config))
    rows = [[key, *(_format(run.config.get(key)) for run in runs)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    names = [_name(runs, index) for index in range(len(runs))]
    same = tag("p", "The configs are equal.")
    return section("What differs between the configs", table(["key", *names], rows) if rows else same)


def _format(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_format, value)) or "none"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {_format(inner)}" for name, inner in value.items())
    if value is None:
        return "–"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _origins(runs: Sequence[RunRecord]) -> Element | None:
    flat = []
    for run in runs:
        versions = run.origin.get("versions")
        flat.append(
            {k: v for k, v in run.origin.items() if k != "versions"} | (versions if isinstance(versions, dict) else {})
        )
    keys = list(dict.fromkeys(key for facts in flat for key in facts))
    rows = [[key.replace("_", " "), *(_format(facts.get(key)) for facts in flat)] for key in keys]
    names = [_name(runs, index) for index in range(len(runs))]
    return section("Versions and machine", table(["", *names], rows)) if rows else None
