"""`roots report`: the page says what the files of the runs say, and nothing of a run is taken for markup."""

from __future__ import annotations

import fcntl
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from xml.etree.ElementTree import tostring

import pytest
from typer.testing import CliRunner

from roots_dist.cli.main import app, main
from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.errors import UserError
from roots_dist.layout import Layout
from roots_dist.runs.report.charts import Line, downsample, line_chart, ticks
from roots_dist.runs.report.layout_picture import layout_picture, shown_ranks
from roots_dist.runs.report.load_picture import load_picture, loads_of
from roots_dist.runs.report.markup import document, tag
from roots_dist.runs.report.page import page
from roots_dist.runs.report.run_list import COLUMNS, find_runs, list_runs
from roots_dist.runs.report.run_record import layout_of, read_runs
from roots_dist.runs.track.metrics import MetricsFile
from roots_dist.runs.track.summary_file import write_summary
from roots_dist.storage.checkpoint.format import step_name


class Reader(HTMLParser):
    """An independent reader: the tags, attributes and words of a page. Fails on tags that are not closed in turn."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, written: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(written)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes += attributes
        if name not in self.VOID:
            self._open.append(name)

    def handle_endtag(self, name):
        assert self._open.pop() == name

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def a_run(
    folder, steps=20, wanted=20, text="We the people | of the Union", layout=Layout(tp=2, pp=2), bad=(), **sections
):
    config = Config.model_validate({"train": {"steps": wanted}, "track": {"folder": str(folder)}, **sections})
    metrics = MetricsFile(folder)
    if steps:
        metrics.log(0, {"loss/validation": 5.0, "f1/validation": 0.125, "time/evaluate_s": 2.0})
    for step in range(1, steps + 1):
        spent = {
            "time/step_s": 2.0,
            "time/compute_s": 1.0,
            "time/pp_wait_s": 0.5,
            "time/dp_s": 0.25,
            "time/data_s": 0.125,
        }
        loss = math.nan if step in bad else 5.0 - step / 10
        metrics.log(
            step, {"loss/train": loss, "optim/lr": 1e-3, "optim/grad_norm": 1.0, "data/tokens": 64.0 * step, **spent}
        )
    if steps:
        metrics.log(steps, {"loss/validation": 3.25, "f1/validation": 0.75, "time/evaluate_s": 3.0})
        metrics.text(steps, "sample", text)
    metrics.close()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "origin.json").write_text(
        json.dumps({"python": "3.11.7", "versions": {"torch": "2.13"}, "layout": str(layout)})
    )
    if steps == wanted:
        write_summary(config, layout, folder)
    return folder


def read(*folders) -> Reader:
    return Reader(page(read_runs(folders, ())))


def test_a_page_holds_what_the_files_say_and_needs_no_other_file(tmp_path):
    found = read(a_run(tmp_path / "first"))
    assert {"Loss", "Layout", "Validation", "Samples of text"} <= set(found.words)
    assert "20 of 20" in found.words and "done" in found.words
    assert "3.25" in found.words and "from 5; best 3.25, step 20" in found.words  # the loss falls
    assert "0.75" in found.words and "from 0.125; best 0.75, step 20" in found.words  # F1 rises
    assert "TP2×PP2×DP1" in found.text and "2.13" in found.words and "of the Union" in found.words
    seconds = {"20.0 s", "10.0 s", "5.0 s", "2.5 s"}  # 20 steps: computing, waiting, data ranks and the rest, batches
    assert seconds <= set(found.words) and "0:45" in found.words  # 40 s of steps, 5 s of evaluations
    assert not set(found.tags) & {"script", "link", "img", "iframe", "object", "use", "image"}
    assert not [a for a in found.attributes if a[0] in ("href", "src", "xlink:href") or a[0].startswith("on")]
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    assert ("content", policy) in found.attributes


def test_no_two_parts_of_the_time_have_one_colour(tmp_path):
    written = page(read_runs([a_run(tmp_path / "run")], ()))
    legend = written.partition("Where the time went")[2].partition("</svg>")[0]
    colours = re.findall(r'<rect[^>]*class="fill-(c\d)"', legend)
    assert len(colours) == len(set(colours)) == 6, "forward, stages, reduction, batches, evaluation, rest"


def test_nothing_of_a_run_is_markup(tmp_path):
    attack = '<script>alert("1")</script><img src=x onerror=alert(1)>"\'&amp;\x00\x1b[31m\ud800'
    hostile = {"track": {"folder": "x", "name": attack.replace("\ud800", ""), "tags": [attack.replace("\ud800", "")]}}
    folder = a_run(tmp_path / "<b>bold<b>", text=attack.replace("\ud800", ""), **hostile)
    (folder / "texts.jsonl").open("a").write(json.dumps({"step": 21, "name": "sample", "text": attack}) + "\n")
    (folder / "metrics.jsonl").open("a").write(json.dumps({"step": 20, f"accuracy/validation/{attack}": 1.0}) + "\n")
    (folder / "origin.json").write_text(json.dumps({attack: attack, "layout": attack, "versions": attack}))
    (folder / "summary.json").write_text(json.dumps({attack: attack}))
    written = page(read_runs([folder, a_run(tmp_path / "other")], ()))
    found = Reader(written)
    assert written.encode("utf-8") and not set(found.tags) & {"script", "img", "b>bold<b"}
    assert not [name for name, _ in found.attributes if name.startswith("on") or name == "src"]
    assert '<script>alert("1")</script>' in found.text  # shown as it stands
    assert not re.search("[\x00-\x08\x0b-\x1f]", written)


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun_has_a_page(tmp_path, steps):
    folder = a_run(tmp_path / "young", steps=steps, wanted=300)
    found = read(folder)
    assert ("nothing logged yet" if steps == 0 else "running, or interrupted") in found.words
    assert f"{steps} of 300" in found.words


def test_a_run_of_which_only_the_record_is_left_has_a_page_and_a_torn_line_is_left_out(tmp_path):
    folder = a_run(tmp_path / "torn")
    for name in ("config.yaml", "origin.json", "summary.json", "texts.jsonl"):
        (folder / name).unlink()
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 21, "loss/tr')
    assert "Loss" in read(folder).words
    (folder / "metrics.jsonl").write_text("")
    assert "nothing logged yet" in read(folder).words


def test_steps_that_are_not_finite_are_named_and_marked(tmp_path):
    found = read(a_run(tmp_path / "bad", bad=(7, 9)))
    assert "bad: loss or gradient was not finite at 2 steps: 7, 9" in found.words
    assert found.words.count("×") == 2
    everything = read(a_run(tmp_path / "worse", bad=range(21)))
    assert "worse: loss or gradient was not finite at 20 steps" in everything.text


def test_a_stop_before_the_last_step_is_told_from_a_run_that_goes_on(tmp_path):
    folder = a_run(tmp_path / "patient", steps=12, wanted=20)
    assert "running, or interrupted" in read(folder).words
    write_summary(Config.model_validate({"train": {"steps": 20}}), Layout(), folder)
    assert "ended early" in read(folder).words


def test_what_differs_between_runs_is_shown_and_what_is_equal_is_not(tmp_path):
    one = a_run(tmp_path / "one", optim={"lr": 0.5}, model={"layers": 6})
    two = a_run(tmp_path / "two", optim={"lr": 0.25}, model={"layers": 6})
    found = read(one, two)
    assert "optim.lr" in found.words and "0.5" in found.words and "0.25" in found.words
    assert "model.layers" not in found.words
    alone = read(one)
    assert "model.layers" in alone.words and "optim.beta1" not in alone.words  # that is the default


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    first, second = (a_run(tmp_path / name / "run") for name in ("a", "b"))
    assert [run.name for run in read_runs([first, second], ())] == [str(first), str(second)]


def test_a_layout_is_read_back_and_every_rank_stands_once():
    assert layout_of(str(Layout(dp=3, pp=2, tp=4))) == Layout(dp=3, pp=2, tp=4)
    assert layout_of(str(Layout(dp=4, tp=2, ep=4))) == Layout(dp=4, tp=2, ep=4)
    for wrong in ("TP1×PP1×DP3 EP2", "", "TP2×PP2", "TPx×PP2×DP1", "TP0×PP1×DP1", "TP1×PP1×DP", "TP²×PP1×DP1"):
        assert layout_of(wrong) is None
    found = Reader(document(layout_picture(Layout(dp=3, pp=2, tp=4))))
    assert sorted(int(word) for word in found.words if word.isdecimal()) == list(range(24))
    assert "rank 23: pp1 dp2 tp3" in found.words
    assert "rank 3: pp0 dp3 tp0, experts 1" in Reader(document(layout_picture(Layout(dp=4, ep=2)))).words
    large = Reader(document(layout_picture(Layout(dp=64, pp=48, tp=8))))
    assert len(large.tags) < 1500 and "…" in large.words and str(64 * 48 * 8 - 1) in large.words
    assert (
        shown_ranks(3, 4) == [0, 1, 2]
        and shown_ranks(9, 4) == [0, 1, None, 8]
        and shown_ranks(9, 5) == [0, 1, None, 7, 8]
    )


def test_the_load_of_experts_is_drawn_and_what_is_none_is_not():
    drawn = Reader(document(load_picture(loads_of('{"blocks.1": [30, 10], "<b>": [0, 0]}'))))
    assert "blocks.1, expert 0: 30 tokens, 1.50 of the mean" in drawn.words and drawn.tags.count("rect") == 4
    for wrong in ("", "7", "[1]", '{"blocks.1": []}', '{"blocks.1": [1, "x"]}', '{"blocks.1": [-1]}', None):
        assert loads_of(wrong) == {}


def test_ticks_are_round_and_inside():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10] and ticks(0.0, 0.004) == [0, 0.001, 0.002, 0.003, 0.004]
    assert ticks(-3, 3, 3) == [-2, 0, 2] and ticks(1.0, 1.0) == [1.0]
    for low, high in ((1e-9, 3e-9), (0.1, 1e7), (-5.5, 5.5), (9.5, 8200.0)):
        assert 2 <= len(ticks(low, high)) <= 12 and all(low <= t <= high for t in ticks(low, high))


def test_a_long_run_is_thinned_and_its_spikes_stay():
    line = Line(range(100_000), [9.0 if step == 54_321 else step % 7 / 10 for step in range(100_000)])
    points = list(downsample(line))
    assert len(points) <= 700 and (54_321, 9.0) in points
    assert points == sorted(points)
    assert len(document(line_chart([line], "loss"))) < 30_000


def test_text_stays_text_between_and_inside_tags():
    written = document(tag("p", "a < b", tag("b", "&"), "c > d", None, title='"<'))
    assert written == '<!DOCTYPE html>\n<p title="&quot;<">a &lt; b<b>&amp;</b>c &gt; d</p>\n'


def test_the_command_writes_a_file_and_refuses_a_folder_without_a_run(tmp_path):
    folder = a_run(tmp_path / "run")
    done = CliRunner().invoke(app, ["report", str(folder)])
    assert done.exit_code == 0 and done.stdout.strip() == str(folder / "report.html")
    assert Reader((folder / "report.html").read_text(encoding="utf-8")).words
    other = CliRunner().invoke(app, ["report", str(folder), str(folder), "--output", str(tmp_path / "new" / "x.html")])
    assert other.exit_code == 0 and (tmp_path / "new" / "x.html").is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        read_runs([tmp_path / "empty"], ())
    assert str(caught.value) == (
        f"RUN = '{tmp_path / 'empty'}': expected the folder of a run, with config.yaml or metrics.jsonl. "
        "Fix: name a track.folder, as runs/quickstart."
    )


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium to read the page")
def test_a_browser_reads_the_page_as_it_is_meant(tmp_path):
    """What it makes of the file has the same words in the same order."""
    (tmp_path / "page.html").write_text(page(read_runs([a_run(tmp_path / "run")], ())), encoding="utf-8")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    command = ["chromium", *quiet, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", str(tmp_path / "page.html")]
    drawn = subprocess.run(command, capture_output=True, text=True, timeout=250, check=True).stdout
    assert Reader(drawn).text == Reader((tmp_path / "page.html").read_text(encoding="utf-8")).text


def test_runs_are_listed_at_the_width_of_the_terminal(tmp_path, monkeypatch, capsys):
    for name, steps, done in (("a", 4, 4), ("deep/b-with-a-longer-name", 4000, 3)):
        folder = tmp_path / "runs" / name
        metrics = MetricsFile(folder)
        metrics.log(done, {"loss/train": 5.25, "data/tokens": 1e6})
        metrics.close()
        config = Config.model_validate({"train": {"steps": steps}, "track": {"folder": str(folder)}})
        (folder / "config.yaml").write_text(to_yaml(config))
        (folder / "origin.json").write_text(json.dumps({"layout": "TP2×PP2×DP1"}))
        (folder / "points_nowhere").symlink_to(folder / "gone")
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "runs" / "a" / "gone_since"
    glob = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, pattern: [*glob(path, pattern), gone])
    with open(tmp_path / "runs" / "a" / ".lock", "w") as lock:
        for columns, shown in ((120, COLUMNS), (80, [c for c in COLUMNS if c not in ("size", "layout", "model")])):
            monkeypatch.setenv("COLUMNS", str(columns))
            fcntl.flock(lock, fcntl.LOCK_EX)
            with pytest.raises(SystemExit) as ended:
                main(["ls"])
            head, *lines = capsys.readouterr().out.splitlines()
            assert not ended.value.code and tuple(head.split()) == tuple(shown)
            assert all(len(line) <= columns for line in lines)
            found = {line.split()[0]: line for line in lines}
            assert "4/4" in found["runs/a"] and found["runs/a"].endswith("running") and "5.250" in found["runs/a"]
            assert found["runs/deep/b-with-a-longer-name"].endswith("interrupted")


def listed(folder):
    """Column -> cell of the only run in a folder, at 200 columns."""
    head, line = list_runs(find_runs(folder), (), 200).lines
    return dict(zip(head.split(), re.split(r"  +", line), strict=True))


def test_the_losses_of_training_and_of_validation_are_told_apart_and_dated(tmp_path):
    """The validation loss of step 0 stood there as the loss of a run at step 19."""
    metrics = MetricsFile(a_run(tmp_path / "run", steps=0))
    metrics.log(0, {"loss/validation": 7.273})
    metrics.log(18, {"loss/train": 3.5})
    metrics.log(19, {"loss/train": 2.952})
    metrics.close()
    found = listed(tmp_path)
    assert (found["step"], found["train_loss"], found["val_loss"]) == ("19/20", "2.952", "7.273@0")


@pytest.mark.parametrize(
    ("saved", "logged", "step", "state"),
    [(4, 0, 4, "interrupted"), (20, 0, 20, "done"), (4, 7, 7, "interrupted"), (9, 7, 9, "interrupted")],
)
def test_a_step_that_is_saved_but_not_logged_counts(tmp_path, saved, logged, step, state):
    """A program that takes the steps itself logs nothing."""
    a_run(tmp_path / "run", steps=logged)
    (tmp_path / "run/checkpoints" / step_name(saved)).mkdir(parents=True)
    found = listed(tmp_path)
    assert (found["step"], found["state"]) == (f"{step}/20", state)


def test_a_config_alone_is_no_run(tmp_path, capsys):
    """`roots init` writes one into the working directory, with runs below it."""
    (tmp_path / "config.yaml").write_text("model: {layers: 2}\n")
    assert find_runs(tmp_path) == []
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "this one has a config, but nothing that a run has written" in capsys.readouterr().err
    run = a_run(tmp_path / "runs/a", steps=0)
    assert find_runs(tmp_path) == [run]
    (run / "metrics.jsonl").unlink(missing_ok=True)
    assert find_runs(tmp_path) == [run], "an import has no metrics"


def test_a_folder_without_runs_is_said_to_have_none(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["ls", str(tmp_path)])
    assert not ended.value.code and capsys.readouterr().out == f"no runs in {tmp_path}\n"
    with pytest.raises(SystemExit):
        main(["ls", str(tmp_path / "none")])
    assert "Fix: name the folder of your runs" in capsys.readouterr().err


def test_a_chart_marks_what_is_cut_and_few_points_and_what_happened():
    steps, values = list(range(10)), [1.0, 9.0, *[1.0] * 7, -5.0]
    events = [(4, "resumed", 0)]
    text = tostring(line_chart([Line(steps, values)], "loss", window=(0.0, 2.0), events=events, unit="nats")).decode()
    assert text.count("<circle") == 10 and "step 1: 9" in text and "step 9: -5" in text
    assert "resumed" in text and "event c0" in text and ">nats<" in text
    many = tostring(line_chart([Line(list(range(100)), [1.0] * 100)], "loss")).decode()
    assert "<circle" not in many and "event" not in many


def test_numbers_of_ones_own_have_a_section(tmp_path):
    (tmp_path / "config.yaml").write_text("train: {steps: 2}\n")
    lines = [{"step": n, "time": 1.0, "loss/train": 2.0, "mine/surprise": 3.0 + n} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = page(read_runs([tmp_path], ()))
    assert "Your own numbers" in said and "mine/surprise" in said
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss/train": 2.0}) + "\n")
    assert "Your own numbers" not in page(read_runs([tmp_path], ()))
