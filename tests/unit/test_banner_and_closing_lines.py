"""What a run says first and last, and keeps as its summary."""

import io
import json
import logging
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from roots_dist import logs
from roots_dist.accounting.bounds import bounds
from roots_dist.accounting.peaks import format_flops, measured_cpu_peak
from roots_dist.checks.facts import words_of
from roots_dist.checks.remarks import remarks
from roots_dist.cli.main import main
from roots_dist.config.load import load
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.data.prepare import prepare
from roots_dist.learning.models.flops import flops_per_step
from roots_dist.runs.plan import at_start
from roots_dist.runs.plan.symbols import ANSWERS, DYNAMO
from roots_dist.runs.track import closing_lines as closing
from roots_dist.runs.track import try_next
from roots_dist.runs.track.machine_facts import peak_memory_gib
from roots_dist.runs.track.metrics import METRICS_FILE, MetricsFile
from roots_dist.runs.track.summary_file import summary, write_summary
from roots_dist.runs.train import banner as opening
from roots_dist.testing.world import on_world
from roots_dist.world.mesh import Mesh

CONFIG = Config.model_validate(
    {"train": {"steps": 6, "global_batch": 4}, "data": {"seq_length": 8, "tokenizer": "t.json"}}
)


def peaks(rank: int, size: int) -> float:
    opening.PEAK_S = 0.5  # as without tests/brief.py
    return opening.peak_of_devices(CONFIG, Mesh.connect(Layout(dp=size), rank))


def test_the_peak_is_that_of_the_cores_in_use_and_the_same_on_all_ranks():
    one = measured_cpu_peak(1)
    assert measured_cpu_peak(7) == pytest.approx(7 * one, rel=0.6)  # a busy machine is not steady
    first, second = on_world(2, peaks)
    assert first == second == pytest.approx(min(2, opening.cores()) * one, rel=0.6)


def test_the_opening_names_layout_size_peak_and_batch():
    bound = bounds(CONFIG, Mesh.single().layout, flops_per_step(CONFIG), 9.54e10)
    lines = opening.banner(CONFIG, Mesh.single(), 9.54e10, bound).splitlines()
    assert lines[0].startswith("TP1×PP1×DP1, 4,") and lines[0].endswith("reference engine, peak 95.4 GFLOP/s measured")
    assert lines[1] == "1 × 8 tokens × 4 microbatches × dp 1 = 32 tokens per step"
    least = re.fullmatch(r"at least (\S+) s per step; \d+ threads? per process \(advanced.threads\)", lines[2])
    assert least and float(least[1]) == pytest.approx(bound.step_s, rel=1e-2)
    held = re.fullmatch(r"at least (\S+) GiB per process; roots plan counts all of it", lines[3])
    assert held and bound.memory_gib < 0.1
    assert 0.1 < float(held[1]) == pytest.approx(peak_memory_gib(torch.device("cpu")), rel=0.05)
    assert bound.step_s == flops_per_step(CONFIG) / 9.54e10
    assert "no MFU" in opening.banner(CONFIG, Mesh.single(), None, replace(bound, step_s=None))
    assert [format_flops(v) for v in (9.895e14, 3.9e15, 12.0)] == ["990 TFLOP/s", "3.9 PFLOP/s", "12 FLOP/s"]


LARGER = "model.vocab = 32,000 is more than the 4,096 words of the tokenizer"
REMARKS = {
    "a vocabulary of the tokenizer": ({}, Layout(), 4096, []),
    "a padded vocabulary": ({"model.vocab": 4096}, Layout(), 4000, []),
    "no tokenizer": ({"model.vocab": 32000}, Layout(), None, []),
    "a released model": ({"model.vocab": 32000, "finetune.init_from": "runs/qwen"}, Layout(), 4096, []),
    "a larger vocabulary": (
        {"model.vocab": 32000},
        Layout(),
        4096,
        [
            f"{LARGER}: model.vocab=4096 makes 4,210,176 parameters of 11,353,600",
        ],
    ),
    "a schedule without a pipeline": (
        {"parallel.schedule": "zb-h1"},
        Layout(dp=2),
        None,
        ["parallel.schedule=zb-h1 gains nothing with parallel.pp=1: no rank waits for another one"],
    ),
    "a schedule of a pipeline": ({"parallel.schedule": "zb-h1", "parallel.pp": 2}, Layout(pp=2), None, []),
    "stages of ZeRO on one rank": (
        {"parallel.zero_stage": 3},
        Layout(pp=2),
        None,
        ["parallel.zero_stage=3 shards nothing: there is one data rank"],
    ),
    "stages of ZeRO on context ranks": ({"parallel.zero_stage": 2}, Layout(cp=2), None, []),
}


@pytest.mark.parametrize("case", REMARKS)
def test_what_a_config_has_and_does_not_need_is_remarked(case):
    changes, layout, words, said = REMARKS[case]
    assert list(remarks(CONFIG.changed(changes), layout, words)) == said


def test_words_are_those_of_the_tokenizer_or_else_of_the_corpora(tmp_path):
    (tmp_path / "a.txt").write_text("The people of State met Mr. Smith. " * 40)
    prepare([tmp_path / "a.txt"], tmp_path / "out", vocab=280, workers=1, validation=0)
    corpus = CONFIG.changed({"data.train": [str(tmp_path / "out/train_text_document")], "data.tokenizer": None})
    found = words_of(corpus)
    assert found == words_of(corpus.changed({"data.tokenizer": str(tmp_path / "out/tokenizer.json")}))
    assert found is not None and 256 <= found <= 280
    assert words_of(CONFIG.changed({"data.tokenizer": None, "data.train": ["none"]})) is None


PLANNED = (
    ("quickstart.yaml", 4, {}),
    ("quickstart.yaml", 1, {"parallel.tp": 1, "parallel.pp": 1, "train.device": "auto"}),
    ("llama-quickstart.yaml", 4, {"parallel.pp": 1, "parallel.zero_stage": 3}),
)


@pytest.mark.parametrize("file, processes, changes", PLANNED, ids=lambda value: str(value) or "as it is")
def test_the_opening_plans_what_roots_plan_says(file, processes, changes, monkeypatch, capsys):
    monkeypatch.setattr(at_start, "LIMIT_S", 60.0)  # a busy machine may need longer than a start should wait
    path = Path(__file__).parents[2] / "configs" / file
    config = load(path).changed(changes)
    parallel = config.parallel
    layout = Layout(tp=parallel.tp, pp=parallel.pp, dp=processes // (parallel.tp * parallel.pp))
    before = torch.get_rng_state()
    planned = at_start.planned_bytes(config, layout)
    assert torch.equal(torch.get_rng_state(), before), "a run would draw other numbers"
    bound = bounds(config, layout, flops_per_step(config), 2.85e11)
    *others, memory = opening.banner(
        config, replace(Mesh.single(), layout=layout), 2.85e11, bound, planned
    ).splitlines()
    said = re.fullmatch(r"(\S+ [KMG]iB) of tensors planned per process", memory)
    assert said and all(len(line) <= 80 for line in others)
    with pytest.raises(SystemExit):
        main(["plan", str(path), "--processes", str(processes), *(f"{key}={value}" for key, value in changes.items())])
    first = capsys.readouterr().out.splitlines()[0]
    assert f"{processes} × {said[1]} of tensors" in first or first.startswith(f"{said[1]} per process: "), first


def test_an_opening_does_not_wait_for_a_plan_that_takes_long_nor_fail_with_it(monkeypatch):
    attention, modules = F.scaled_dot_product_attention, {*sys.modules}
    monkeypatch.setattr(at_start, "LIMIT_S", 0.0)
    assert at_start.planned_bytes(CONFIG, Layout()) is None
    assert F.scaled_dot_product_attention is attention and not {DYNAMO, *ANSWERS} & ({*sys.modules} - modules)
    monkeypatch.setattr(at_start, "LIMIT_S", 60.0)
    monkeypatch.setattr(F, "layer_norm", lambda x, *_: x * x.sum().item())  # as an extension may
    assert at_start.planned_bytes(CONFIG, Layout()) is None
    monkeypatch.setattr(at_start, "predict", None)
    many = CONFIG.changed({"train.global_batch": 1 + at_start.MOST_PASSES})
    assert at_start.planned_bytes(many, Layout()) is None


def test_a_log_line_goes_to_the_stderr_of_the_moment(monkeypatch):
    """A live line puts another stream there; what goes to the first one is drawn over."""
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(root, "level", root.level)
    logs.setup(0, "pp0 dp0 tp0")
    first, second = io.StringIO(), io.StringIO()
    log = logging.getLogger("roots_dist.somewhere")
    for stream, word in ((first, "one"), (second, "two")):
        monkeypatch.setattr(sys, "stderr", stream)
        log.warning(word)
    assert first.getvalue() == "[pp0 dp0 tp0] warning: one\n" and second.getvalue() == "[pp0 dp0 tp0] warning: two\n"


def test_the_summary_holds_what_scripts_compare(tmp_path):
    metrics = MetricsFile(tmp_path)
    metrics.log(0, {"loss/validation": 4.0})
    for step, seconds, share in ((3, 2.0, 0.5), (6, 4.0, 0.25)):
        numbers = {"time/step_s": seconds, "util/mfu_fraction": share, "data/tokens": step * 32.0}
        metrics.log(step, {"loss/train": 4.0 - step / 2, **numbers})
    metrics.log(6, {"loss/validation": float("nan")})
    metrics.close()
    found = json.loads(write_summary(CONFIG, Layout(tp=2), tmp_path).read_text())
    assert found["layout"] == "TP2×PP1×DP1" and found["processes"] == 2 and found["steps"] == 6
    assert found["loss/train"] == 1.0 and found["loss/validation/before"] == 4.0 and found["loss/validation"] is None
    assert found["time/training_s"] == 18.0  # 3 × 2 + 3 × 4
    assert found["data/tokens"] == 192 and found["speed/tokens_per_s"] == pytest.approx(192 / 18)
    assert (
        found["util/mfu_fraction"] == pytest.approx((6 * 0.5 + 12 * 0.25) / 18)
        and "causal" in found["util/mfu_convention"]
    )
    assert sorted(path.name for path in tmp_path.iterdir() if "summary" in path.name) == ["summary.json"]


def test_a_run_without_a_record_has_a_summary_too():
    found = summary([], CONFIG, Layout())
    assert found["time/training_s"] == 0.0 and "loss/train" not in found and "util/mfu_fraction" not in found


def test_the_closing_says_what_to_try_next(tmp_path, capsys, monkeypatch):
    metrics = MetricsFile(tmp_path)
    metrics.log(0, {"loss/validation": 4.0, "perplexity/validation": 54.6})
    metrics.log(6, {"loss/validation": 1.5, "perplexity/validation": float("nan")})
    metrics.close()
    monkeypatch.setattr(try_next.shutil, "which", lambda name: "/usr/bin/roots")
    closing.closing_lines(CONFIG, tmp_path)
    said = capsys.readouterr().out
    assert "before (step 0)" in said and "after (step 6)" in said
    assert [line.split() for line in said.splitlines() if "loss" in line or "perpl" in line] == [
        ["validation", "loss", "4.000", "1.500"],
        ["perplexity", "54.600", "-"],
    ]
    assert (
        f'next   roots generate {tmp_path} "a text"\n' in said
        and f"       roots verify {tmp_path / 'config.yaml'}\n" in said
    )
    assert (tmp_path / "curve.png").exists() and (tmp_path / METRICS_FILE).exists()


def test_a_shell_that_does_not_find_roots_is_told_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(try_next.shutil, "which", lambda name: None)
    monkeypatch.chdir(tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    assert try_next.command() == ".venv/bin/python -m roots_dist"
    python.parent.mkdir(parents=True)
    (python.parent / "roots").touch()
    assert try_next.command() == ".venv/bin/roots"


PROMPTS = {
    ("clm", "bpe"): "generate 'my runs/a' \"Fellow citizens of the whole State\"",
    ("mlm", "wordpiece"): "generate 'my runs/a' \"fellow citizens of the [MASK] state\"",
    ("spans", "unigram"): "generate 'my runs/a' \"Fellow citizens of the <extra_id_0> State\"",
    ("instruct", "bpe"): "chat 'my runs/a'",
}


@pytest.mark.parametrize("objective, kind", PROMPTS)
def test_what_to_try_next_pastes_as_it_stands_and_is_of_the_runs_own_text(tmp_path, monkeypatch, objective, kind):
    (tmp_path / "a.txt").write_text("\n\nFellow citizens of the whole State, I say: it rained, and it stopped.\n" * 5)
    prepare([tmp_path / "a.txt"], tmp_path / "out", vocab=280, kind=kind, workers=1, validation=0)
    data = {"train": str(tmp_path / "out/train_text_document"), "tokenizer": str(tmp_path / "out/tokenizer.json")}
    config = Config.model_validate({"objective": {"name": objective}, "data": data})
    monkeypatch.setattr(try_next.shutil, "which", lambda name: "/usr/bin/roots")
    first, second = try_next.next_commands(config, Path("my runs/a"))
    assert first == f"roots {PROMPTS[objective, kind]}" and second == "roots verify 'my runs/a/config.yaml'"
