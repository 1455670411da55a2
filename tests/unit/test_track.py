"""What a run tells: the record on disk, the line on the terminal, the picture."""

import io
import json
import math
import re
import time
from types import SimpleNamespace

import pytest
from patience import comes_true
from rich.console import Console

from roots_dist import logs
from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.config.sections import TrackConfig, TrainConfig
from roots_dist.runs.report.page import page
from roots_dist.runs.report.run_record import read_runs
from roots_dist.runs.track.curve import draw_curve, resumes, smooth
from roots_dist.runs.track.machine_facts import machine_facts, peak_memory_gib
from roots_dist.runs.track.metrics import METRICS_FILE, TEXTS_FILE, MetricsFile, read_lines
from roots_dist.runs.track.progress import ProgressTracker as Progress
from roots_dist.runs.track.progress import clock, short
from roots_dist.runs.track.trackers import Trackers, open_trackers
from roots_dist.runs.train.resume import rate_line
from roots_dist.scrub import known_secrets, scrub, scrub_text

ALL = {
    "loss/train": 4.2134,
    "optim/lr": 2.9e-4,
    "optim/grad_norm": 0.91,
    "speed/tokens_per_s": 18_234.0,
    "util/mfu_fraction": 0.412,
    "memory/peak_gib": 1.234,
}


def records(folder, name=METRICS_FILE):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def test_a_line_is_on_disk_when_log_returns_and_is_json(tmp_path):
    metrics = MetricsFile(tmp_path / "new" / "run")
    metrics.log(1, {"loss/train": 2.5})
    metrics.log(2, {"loss/train": math.nan, "optim/grad_norm": math.inf})
    metrics.text(2, "sample", "Fellow citizens,\nü")
    first, second = records(tmp_path / "new" / "run")
    assert first.pop("time") > 1.7e9 and first == {"step": 1, "loss/train": 2.5}
    assert second["loss/train"] is None and second["optim/grad_norm"] is None
    assert records(tmp_path / "new" / "run", TEXTS_FILE)[0]["text"] == "Fellow citizens,\nü"
    metrics.close()


def test_no_step_is_logged_twice_after_a_resume(tmp_path, caplog):
    before = MetricsFile(tmp_path)
    for step in range(1, 8):
        before.log(step, {"loss/train": 10.0 - step})
        before.text(step, "sample", "old")
    before.close()
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 8, "loss/tr')  # killed while it wrote
    after = MetricsFile(tmp_path, resumed_step=4)
    for step in range(5, 9):
        after.log(step, {"loss/train": 0.0})
    after.close()
    assert [r["step"] for r in records(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [r["loss/train"] for r in records(tmp_path)] == [9.0, 8.0, 7.0, 6.0, 0.0, 0.0, 0.0, 0.0]
    assert [r["step"] for r in records(tmp_path, TEXTS_FILE)] == [1, 2, 3, 4]
    assert f"{METRICS_FILE}, line 8: not a record" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == [METRICS_FILE, TEXTS_FILE]


def test_lines_that_are_no_records_are_left_out(tmp_path, caplog):
    (tmp_path / "m").write_bytes(b'\xff\xfe\n[1]\n{"loss": 1}\n{"step": "1"}\n{"step": 3}\n')
    assert list(read_lines(tmp_path / "m")) == [{"step": 3}]
    assert len(caplog.records) == 4


def shown(width: int, terminal: bool, total: int = 200, steps=(), **first) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, height=30, highlight=False, legacy_windows=False)
    progress = Progress(total, console=console, **first)
    for step in steps:
        progress.log(step, ALL)
    progress.log(total, {"loss/validation": 3.5, "perplexity/validation": 33.1, "bits_per_byte/validation": 1.25})
    progress.text(total, "sample", "We [the] people")
    progress.close()
    return out.getvalue()


def test_without_a_terminal_there_are_about_fifty_plain_lines():
    text = shown(80, False, steps=range(1, 201))
    lines = [line for line in text.splitlines() if "loss 4.213" in line]
    assert lines[0].startswith("step   1/200  loss 4.213  lr 2.9e-04  norm 0.91  18.2k tok/s  MFU 41%  1.23 GiB  0:")
    assert [int(re.match(r"step +(\d+)/", line)[1]) for line in lines] == [1, *range(4, 201, 4)]
    assert "\x1b" not in text
    assert "step 200  validation  loss 3.5000  perplexity 33.10  bits per byte 1.2500" in text
    assert "We [the] people" in text


@pytest.mark.parametrize(
    "width, has, lacks",
    [
        (160, ["step 200/200", "━", "loss 4.213", "lr", "norm", "tok/s", "MFU", "GiB", "left"], []),
        (80, ["step 200/200", "loss 4.213", "tok/s", "left"], ["GiB"]),
        (40, ["step 200/200", "loss 4.213"], ["MFU", "norm"]),
    ],
)
def test_on_a_terminal_one_line_shows_what_fits(width, has, lacks):
    text = shown(width, True, steps=range(1, 201))
    final = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.split("\r")[-1].split("validation")[0])
    line = next(line for line in final.splitlines() if "200/200" in line)
    assert len(line.rstrip()) <= width
    assert all(words in line for words in has) and not any(words in line for words in lacks), line


def test_what_keeps_the_next_step_waiting_is_shown_on_a_terminal_alone():
    for terminal in (True, False):
        out = io.StringIO()
        progress = Progress(9, console=Console(file=out, force_terminal=terminal, width=80, legacy_windows=False))
        trackers = Trackers([progress], progress.doing)
        with trackers.doing("evaluating ..."):
            pass
        progress.log(3, ALL)
        with trackers.doing("saving ..."):
            assert out.getvalue().rstrip().endswith("saving ...") == terminal
        last = out.getvalue().split("\r")[-1]
        assert "step 3/9" in last and "loss 4.213" in last and "saving" not in last
        assert ("evaluating" in out.getvalue()) == terminal
        progress.close()


def test_time_left_counts_from_the_resumed_step(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("roots_dist.runs.track.progress.time.monotonic", lambda: now[0])
    out = io.StringIO()
    progress = Progress(300, first_step=100, console=Console(file=out, width=200))
    now[0] += 500.0
    progress.log(100, {"loss/validation": 4.0})  # done before the first step
    now[0] += 20.0  # ten steps of 2 s, 190 to go
    progress.log(110, {"loss/train": 1.0})
    progress.log(114, {"loss/train": 1.0})
    assert "4:26 left" in out.getvalue()  # 20 s for fourteen steps, 186 to go


def test_numbers_are_short():
    assert [short(v) for v in (0, 999, 1000, 18_234, 1.5e6, 2e9)] == ["0", "999", "1k", "18.2k", "1.5M", "2G"]
    assert short(999.6) == "1k"
    assert [clock(s) for s in (0, 59.6, 61, 3600, 90061)] == ["0:00", "1:00", "1:01", "1:00:00", "25:01:01"]


def test_smoothing_does_not_lag_or_shift():
    straight = [float(i) for i in range(200)]
    assert smooth(straight)[4:190] == pytest.approx(straight[4:190])
    assert smooth([3.0] * 50) == pytest.approx([3.0] * 50)
    assert smooth([]) == [] and smooth([1.0]) == [1.0]


@pytest.mark.parametrize("steps", [0, 1, 2, 300])
def test_a_curve_is_drawn_from_any_record(tmp_path, steps):
    metrics = MetricsFile(tmp_path)
    for step in range(1, steps + 1):
        loss = math.nan if step == 7 else 9 / step
        metrics.log(step, {"loss/train": loss, "optim/lr": 1e-3, "data/tokens": step * 100})
        if step % 2 == 0:
            metrics.log(step, {"loss/validation": 10 / step})
    metrics.close()
    png = draw_curve(tmp_path / METRICS_FILE, tmp_path / "loss.png", "a run")
    content = png.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 10_000
    assert int.from_bytes(content[16:20], "big") == 1350  # pixels wide


def test_a_resume_is_marked_with_its_layout(tmp_path):
    config = Config.model_validate({"track": {"wandb": "disabled", "tensorboard": "off"}})
    for resumed_step, layout in ((0, "TP2×PP2×DP1"), (2, "TP1×PP4×DP1"), (3, "TP1×PP1×DP4")):
        trackers = open_trackers(config, tmp_path, rank0=True, resumed_step=resumed_step, facts={"layout": layout})
        for step in range(resumed_step + 1, 5):
            trackers.log(step, {"loss/train": 5.0 - step})
        trackers.close()
    assert resumes(read_lines(tmp_path / "texts.jsonl")) == [(2, "TP1×PP4×DP1"), (3, "TP1×PP1×DP4")]
    assert draw_curve(tmp_path / METRICS_FILE, tmp_path / "curve.png").stat().st_size > 10_000
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    written = page(read_runs([tmp_path], ()))
    assert "was resumed after step 2 as TP1×PP4×DP1, step 3 as TP1×PP1×DP4." in written
    assert "Samples of text" not in written


def test_what_becomes_of_the_learning_rate_is_said_where_a_resume_changes_it():
    def config(steps: int, lr: float = 1e-3) -> Config:
        return Config.model_validate({"train": {"steps": steps}, "optim": {"lr": lr}})

    line = rate_line(config(100).model_dump(mode="json"), config(200), 100)
    assert line == "the learning rate of step 101 is 5.0e-04; that of step 100 was 2.5e-07"
    assert rate_line(config(100).model_dump(mode="json"), config(100, 2e-3), 50) is not None
    assert rate_line(config(100).model_dump(mode="json"), config(100), 50) is None
    assert rate_line({"model": "of another version"}, config(100), 50) is None


def test_work_that_takes_long_says_so_now_and_then(monkeypatch, caplog):
    monkeypatch.setattr(logs, "FIRST_S", 0.02)
    monkeypatch.setattr(logs, "EVERY_S", 0.02)
    caplog.set_level("INFO")
    with logs.still_busy("counting"):
        time.sleep(0.1)
    assert list(logs.counted((time.sleep(0.03) for _ in range(3)), "scoring", 3)) == [None] * 3
    with logs.still_busy("short work"):
        pass
    said = [record.message for record in caplog.records]
    assert "counting: 0 s so far" in said and "scoring: 1 of 3 batches done" in said
    assert not any("short" in line for line in said)


def test_a_log_file_says_what_delays_a_step_and_that_steps_are_slow(monkeypatch, caplog):
    monkeypatch.setattr(logs, "FIRST_S", 0.0)
    caplog.set_level("INFO")
    out, now = io.StringIO(), [1000.0]
    progress = Progress(5000, console=Console(file=out, width=200))
    with Trackers([progress], progress.doing).doing("saving ..."):
        assert comes_true(lambda: bool(caplog.records))
    assert [record.message for record in caplog.records] == ["saving: 0 s so far"]
    monkeypatch.setattr("roots_dist.runs.track.progress.time", SimpleNamespace(monotonic=lambda: now[0]))
    for step in (1, 2, 3, 4):
        now[0] += 20.0
        progress.log(step, ALL)
    assert [line.split()[1] for line in out.getvalue().splitlines()] == ["1/5000", "3/5000"]


def test_secrets_are_scrubbed_and_nothing_else():
    tree = {
        "url": "https://me:hunter2@host/x?y=1",
        "command": ["train", "--api-key", "abcdef123", "HF_TOKEN=hf_abc run", 'X_SECRET="a b"', "password: p4ss"],
        "WANDB_API_KEY": "0123",
        "nested": {"client_secret": "s3", "tokenizer": "tokens/tok.json", "tokens": 5, "monkey": "ape", "key": None},
        "path": "https://host:8080/a@b",
    }
    found = scrub(tree)
    text = json.dumps(found)
    for secret in ("hunter2", "abcdef123", "hf_abc", "a b", "p4ss", "0123", "s3"):
        assert secret not in text, secret
    assert found["nested"]["tokenizer"] == "tokens/tok.json" and found["nested"]["tokens"] == 5
    assert found["nested"]["monkey"] == "ape" and found["nested"]["key"] is None
    assert found["path"] == tree["path"] and found["url"] == "https://***@host/x?y=1"
    assert scrub_text("each token is tokenized by key") == "each token is tokenized by key"


@pytest.mark.parametrize(
    "text, left",
    [
        ("postgres://me:p@ss:w0rd@db/x", "postgres://***@db/x"),
        ("https://ghs_token@github.com/a@b", "https://***@github.com/a@b"),
        ("Authorization: Bearer abc.def-123", "Authorization: Bearer ***"),
        ("s3://b/k?X-Amz-Signature=00ff", "s3://b/k?X-Amz-Signature=***"),
        ("x sk-abcdefghijklmnop1234 y", "x *** y"),
        ("hf_AbCdEfGhIjKlMnOpQr", "***"),
        ("eyJhbGciOiJI.eyJzdWIiOiIx.c2lnbmF0", "***"),
        ("run of K7-known-value, twice K7-known-value", "run of ***, twice ***"),
        ("lr=0.1 basic tokens: 5, risk-free sketches", "lr=0.1 basic tokens: 5, risk-free sketches"),
    ],
)
def test_secrets_are_known_by_place_by_look_and_by_value(text, left):
    assert scrub_text(text, {"K7-known-value"}) == left
    assert scrub({"a": [text], text: 1}, {"K7-known-value"}) == {"a": [left], left: 1}


def test_the_environment_says_what_is_secret(monkeypatch):
    for name, value in {"PGPASSWORD": "long-enough-1", "MY_API_KEY": "long-enough-2", "A_TOKEN": "short"}.items():
        monkeypatch.setenv(name, value)
    for name in ("TOKENIZERS_PARALLELISM", "KEYBOARD"):
        monkeypatch.setenv(name, "no-secret-at-all")
    assert {"long-enough-1", "long-enough-2"} <= known_secrets() and not {"short", "no-secret-at-all"} & known_secrets()


def test_other_ranks_have_trackers_that_do_nothing(tmp_path):
    config = Config(track=TrackConfig(wandb="disabled"), train=TrainConfig(steps=3))
    others = open_trackers(config, tmp_path / "run", rank0=False)
    others.log(1, ALL)
    others.text(1, "sample", "x")
    others.close()
    assert not (tmp_path / "run").exists()


def test_rank_0_writes_and_shows(tmp_path, capsys):
    config = Config(track=TrackConfig(wandb="disabled"), train=TrainConfig(steps=3))
    trackers = open_trackers(config, tmp_path / "run", rank0=True)
    trackers.log(1, ALL)
    trackers.close()
    assert records(tmp_path / "run")[0]["loss/train"] == 4.2134
    assert "step 1/3  loss 4.213" in capsys.readouterr().out


def test_memory_is_the_peak_and_facts_are_json():
    before = peak_memory_gib("cpu")
    block = bytearray(200 << 20)
    assert peak_memory_gib("cpu") >= before and block is not None
    del block
    after = peak_memory_gib("cpu")
    assert 0.15 < after < 100
    assert json.loads(json.dumps(machine_facts()))["versions"]["torch"].startswith("2.")
