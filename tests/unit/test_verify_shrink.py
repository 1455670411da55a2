"""A proof's small model loses nothing that a layout could get wrong, and says what it changes."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_configs_shipped import STARTS, whole

from roots_dist.checks.checks import check_used
from roots_dist.config.load import load
from roots_dist.config.schema import Config
from roots_dist.verify.degrees import degrees
from roots_dist.verify.proofs import in_one_process
from roots_dist.verify.shrink import SILENT, SmallConfig, shrink
from roots_dist.verify.ties import holders

CONFIGS = Path(__file__).parents[2] / "configs"
QUICK = sorted(path.stem for path in CONFIGS.glob("*-quickstart.yaml"))


def shipped(name: str, **values: object) -> Config:
    return load(CONFIGS / f"{name}.yaml").changed({key.replace("__", "."): value for key, value in values.items()})


def small(config: Config, dp: int = 1) -> SmallConfig:
    return shrink(config, dp, "float64")


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_the_small_run_of_every_shipped_config_can_start(name, tmp_path, monkeypatch):
    """So can that of the model which fine-tuning starts from, with the run's objective and vocabulary."""
    monkeypatch.chdir(tmp_path)
    config = whole(name, tmp_path)
    for dp in (1, 2, 3):
        found = small(config, dp)
        assert check_used(found.config, found.ranks) == []
        assert found.config.train.micro_batch >= 2
    if name in STARTS:
        start = load(CONFIGS / f"{STARTS[name]}.yaml")
        assert check_used(in_one_process(found.source), 1) == []
        assert found.source.objective == start.objective
        assert found.source.model.vocab == found.config.model.vocab


def test_groups_of_shards_stay_several_where_data_ranks_are():
    config = shipped("quickstart", parallel__zero_ranks=8, parallel__pp=1)
    for dp, cp, expected in ((1, 1, (1, None)), (3, 1, (4, 2)), (3, 2, (2, 2))):
        found = small(config.changed({"parallel.cp": cp}), dp)
        assert (found.dp, found.config.parallel.zero_ranks) == expected
        assert check_used(found.config, found.ranks) == []


@pytest.mark.parametrize(
    "name, layout",
    [
        *((name, {}) for name in QUICK),
        ("t5-base", dict(parallel__pp=2)),
        ("t5-11b", dict(parallel__tp=1, parallel__pp=4)),
        ("electra-base", dict(parallel__pp=3, parallel__virtual_stages=2, parallel__schedule="interleaved")),
        ("electra-large", dict(parallel__pp=4)),
    ],
)
def test_the_same_stages_share_the_same_parameters(name, layout):
    config = shipped(name, **layout)
    assert holders(small(config).config) == holders(config)
    assert small(config).notes == (small(config).notes[0],) and "ties" not in small(config).notes[0]


@pytest.mark.parametrize(
    "tp, heads, kv_heads",
    [(1, 32, 8), (2, 8, 8), (2, 8, 2), (4, 8, 2), (8, 64, 8), (3, 6, 3), (4, 12, 1), (2, 6, 2)],
)
def test_heads_keep_their_group_and_their_share_of_a_tensor_rank(tp, heads, kv_heads):
    config = Config.model_validate(
        {"model": {"hidden": 8 * heads, "heads": heads, "kv_heads": kv_heads}, "parallel": {"tp": tp}}
    )
    m = small(config).config.model
    assert m.heads // m.num_kv_heads() == heads // kv_heads
    assert m.num_kv_heads() / tp == min(kv_heads / tp, 2)


def test_heads_that_are_not_as_wide_as_the_residual_stream_stay_so():
    wide = Config.model_validate({"model": {"hidden": 64, "heads": 4, "head_dim": 32}})
    m = small(wide).config.model
    assert m.heads * m.width_of_head() == 2 * m.hidden


def test_more_than_two_data_ranks_are_three_as_long_as_they_fit():
    assert [degrees(1, 1, dp)[2] for dp in (1, 2, 3, 4, 64)] == [1, 2, 3, 3, 3]
    assert (
        degrees(2, 2, 64) == (2, 2, 3, 1) and degrees(4, 1, 8) == (4, 1, 3, 1) and degrees(1, 1, 4, 8) == (1, 1, 3, 4)
    )
    assert degrees(4, 12, 8)[2] >= 2


@pytest.mark.parametrize(
    "layout, dp, small_dp, ep",
    [
        ({}, 1, 4, 4),  # up to four ranks with different experts
        ({}, 64, 8, 4),  # and two with the same
        (dict(parallel__ep=2), 3, 4, 2),
        (dict(parallel__pp=2), 64, 4, 4),
        (dict(parallel__tp=2, parallel__pp=2), 64, 2, 2),
        (dict(parallel__cp=2, parallel__tp=2), 8, 2, 4),
        (dict(parallel__tp=8, parallel__pp=4), 8, 2, 2),
    ],
)
def test_experts_stay_on_several_ranks(layout, dp, small_dp, ep):
    config = shipped("mixtral-8x7b", **{"parallel__tp": 1, "parallel__pp": 1, "parallel__ep": 8} | layout)
    found = small(config, dp)
    assert (found.dp, found.config.parallel.ep) == (small_dp, ep) and found.config.model.experts > ep
    assert check_used(found.config, found.ranks) == []


def test_ramp_precision_and_phases_stay_those_of_the_run():
    config = shipped("bloom-176b")
    found = shrink(config, 3, "bf16").config
    start, step, samples = found.train.batch_ramp
    assert start < found.train.global_batch and (found.train.global_batch - start) % step == 0 and samples <= 2 * start
    assert found.train.precision == "bf16" and found.train.recompute == config.train.recompute


def test_every_key_that_changes_is_told():
    config = shipped("bloom-176b")
    found = small(config, 2)
    changed = {
        f"{section}.{key}"
        for section, keys in found.config.model_dump().items()
        for key, value in keys.items()
        if value != config.model_dump()[section][key]
    }
    told = set(re.findall(r"(\w+\.\w+) .+? → ", found.notes[-1]))
    assert {key for key in changed if not key.startswith(SILENT)} == told


@pytest.mark.parametrize(
    "name, words, wrong",
    [
        ("quickstart", ["parallel.pp=5", "parallel.tp=1"], "model.layers = 4 ("),
        ("llama-quickstart", ["parallel.tp=4", "parallel.pp=1"], "parallel.tp = 4 (command line): "),
        ("quickstart", ["model.decoder_layers=2"], "model.decoder_layers = 2 (command line): "),
        ("quickstart", ["--processes", "6"], "world size = 6: "),
        ("quickstart", ["--processes", "64"], "train.global_batch = 8 ("),
        ("quickstart", ["--device", "cuda"], "--device cuda: "),
    ],
)
def test_what_training_refuses_is_refused_in_a_line_before_torch_is_imported(name, words, wrong):
    code = "import sys; from roots_dist.cli.main import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, "verify", str(CONFIGS / f"{name}.yaml"), *words]
    environ = os.environ | {"PYTHONPATH": str(CONFIGS.parent), "COLUMNS": "200", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60)
    assert found.returncode == 2, found.stdout + found.stderr
    (line,) = (line for line in found.stderr.splitlines() if wrong in line)
    assert "expected" in line and "Fix: " in line and "Traceback" not in found.stderr


def test_features_of_few_families_stay_those_of_the_run():
    """Every kind of block, a window that is shorter than the text, a part of a head, and the list for long texts."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    model = {
        "layers": 24, "heads": 8, "hidden": 192, "positions": "rotary", "rotary_fraction": 0.5, "window": 512,
        "layer_kinds": ["window"] * 5 + ["full", "nope"], "max_positions": 8192,
        "rope_scaling": {"type": "longrope", "original_length": 2048, **factors},
    }  # fmt: skip
    config = Config.model_validate({"model": model, "data": {"seq_length": 4096}})
    for dtype in ("float64", "float32"):
        found = shrink(config, 2, dtype).config
        m, scaling = found.model, found.model.rope_scaling
        assert {*m.kinds()} == {"window", "full", "nope"} and m.window < found.data.seq_length
        assert 0 < m.rotary_width() < m.width_of_head() and scaling.original_length < found.data.seq_length
        assert len(scaling.long_factor) == m.rotary_width() // 2 and check_used(found, 2) == []
