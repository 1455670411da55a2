"""Whole runs as users start them: whoever starts the processes, in whatever layout, interrupted or not, it is one
curve."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from checkpoints import newest
from commands import roots
from patience import comes_true, gone

from roots_dist.assembly.passes import build_passes
from roots_dist.cli.main import main
from roots_dist.config.load import to_yaml
from roots_dist.config.run_config import config_of_run
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.data.store import Writer
from roots_dist.runs.generate.decode import decode
from roots_dist.runs.generate.generate import load_model
from roots_dist.runs.generate.request import Request
from roots_dist.runs.generate.sampling import Sampling
from roots_dist.runs.plan import at_start
from roots_dist.runs.plan.plan_table import size
from roots_dist.runs.plan.predict import predict
from roots_dist.runs.track.metrics import METRICS_FILE, read_lines
from roots_dist.runs.train.loop import train
from roots_dist.testing.world import on_world
from roots_dist.world.mesh import Mesh

ROOT = Path(__file__).parents[2]
LAUNCHERS_OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
ENVIRON = {k: v for k, v in os.environ.items() if k not in LAUNCHERS_OWN} | {
    "PYTHONPATH": str(ROOT),
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "GLOO_SOCKET_IFNAME": "lo",
    "OMP_NUM_THREADS": "1",
}
PYTHON = [sys.executable, "-m"]
TRAIN = ["roots_dist", "train"]
VOCAB, STEPS = 61, 4
FOUR = {"parallel.tp": 2, "parallel.pp": 2, "parallel.sequence_parallel": "true"}
GREEDY = Sampling(0.0)


def settings(place: Path) -> Config:
    return Config.model_validate(
        {
            "model": {"layers": 4, "hidden": 32, "heads": 4, "vocab": VOCAB, "dropout": 0.1, "init_std": 0.1},
            "data": {"train": str(place / "text"), "validation": str(place / "text"), "seq_length": 16},
            "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 2, "device": "cpu", "eval_sequences": 4},
            "optim": {"lr": 1e-2, "warmup_steps": 2},
            "checkpoint": {"every": 2, "keep": 9},
            "track": {"folder": str(place / "alone"), "wandb": "disabled"},
            "advanced": {"threads": 1, "timeout_s": 60},
        }
    )


def trained(rank: int, size: int, config: Config) -> None:
    train(config, Mesh.connect(Layout(pp=size), rank))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A corpus, a config, and a run of it in one process."""
    found = tmp_path_factory.mktemp("runs")
    with Writer(found / "text", np.dtype("<u2")) as writer:
        writer.add(np.random.default_rng(0).integers(0, VOCAB // 2, 3000).astype("<u2"))
        writer.commit()
    (found / "run.yaml").write_text(to_yaml(settings(found)))
    on_world(1, trained, settings(found))
    return found


@pytest.fixture(scope="module")
def four(place) -> Path:
    """On four ranks."""
    words = [f"{key}={value}" for key, value in FOUR.items()]
    said = said_by(roots("train", *words_of(place, "four", *words), ranks=4, main=main_that_plans))
    (place / "four" / "said").write_text(said)
    return place / "four"


def main_that_plans(words: Sequence[str]) -> object:
    """`roots`, with time for the plan of its opening even on a busy machine (tests/brief.py leaves none)."""
    at_start.LIMIT_S = 60.0
    return main(words)


def words_of(place: Path, folder: str, *overrides: str) -> list[str]:
    return [str(place / "run.yaml"), f"track.folder={place / folder}", *overrides]


def start(command: list[str], place: Path, folder: str, *overrides: str) -> str:
    words = [*PYTHON, *command, *TRAIN, *words_of(place, folder, *overrides)]
    return said_by(subprocess.run(words, env=ENVIRON, capture_output=True, text=True, timeout=250))


def said_by(found: subprocess.CompletedProcess[str]) -> str:
    assert found.returncode == 0, found.stderr
    return found.stdout + found.stderr


def curve(folder: Path) -> dict[int, dict[str, float]]:
    """What was logged, by step. A step that is logged twice is a mistake."""
    found: dict[int, dict[str, float]] = {}
    for line in read_lines(folder / METRICS_FILE):
        here = found.setdefault(line["step"], {})
        names = [name for name in line if name.startswith(("loss/", "optim/"))]
        assert not here.keys() & set(names), (line["step"], names)
        here |= {name: line[name] for name in names}
    return found


def assert_one_curve(first: Path, second: Path) -> None:
    a, b = curve(first), curve(second)
    assert sorted(a) == sorted(b) == list(range(STEPS + 1))
    for step, numbers in a.items():
        assert b[step] == pytest.approx(numbers, rel=1e-5), step


def test_a_run_on_four_ranks_is_the_run_of_one_process(place, four):
    assert_one_curve(place / "alone", four)
    assert curve(four)[STEPS]["loss/train"] < curve(four)[1]["loss/train"] - 0.05


def test_a_run_begins_with_what_its_largest_process_is_planned_to_hold(place, four):
    planned = predict(settings(place).changed({**FOUR, "parallel.sequence_parallel": True}), Layout(tp=2, pp=2))
    assert f"\n{size(planned.peak_with_copy)} of tensors planned per process\n" in (four / "said").read_text()


def test_no_step_and_no_process_takes_less_than_is_said_to_be_possible(four):
    reports = [line for line in read_lines(four / METRICS_FILE) if "time/step_s" in line]
    assert len(reports) == STEPS
    for report in reports:
        assert (
            0 < report["plan/step_s"] < report["time/step_s"]
            and 0 < report["plan/memory_gib"] < report["memory/peak_gib"]
        )


def half_way(whole: Path, copy: Path) -> None:
    """The run as it was when it had been killed after the third step: what that logged is not in a checkpoint."""
    shutil.copytree(whole, copy)
    shutil.rmtree(copy / "checkpoints" / f"step_{STEPS:08d}")
    lines = (copy / METRICS_FILE).read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < STEPS]
    (copy / METRICS_FILE).write_text("".join(kept) + '{"step": 4, "loss/tr')


def test_a_run_goes_on_as_if_nothing_had_happened(place):
    """The same samples, rates, moments and dropout masks, whether or not it was evaluated at its beginning."""
    half_way(place / "alone", place / "resumed")
    on_world(1, trained, settings(place).changed({"track.folder": str(place / "resumed")}))
    assert_one_curve(place / "alone", place / "resumed")


@pytest.mark.parametrize("launcher", ["the tests", pytest.param("torchrun", marks=pytest.mark.full)])
def test_a_run_goes_on_in_another_layout_and_engine(place, four, launcher):
    """TP2 × PP2 by the reference engine, then two data ranks with DeepSpeed's ZeRO-2. What torchrun starts is tested
    in tests/launch too."""
    half_way(four, place / launcher)
    zero = ("parallel.zero_stage=2", "advanced.engine=deepspeed")
    if launcher == "torchrun":
        torchrun = ["torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", "2", "-m"]
        said = start(torchrun, place, launcher, *zero)
    else:
        said = said_by(roots("train", *words_of(place, launcher, *zero), ranks=2))
    assert "resumed after step 2" in said and "parallel.tp = 1 (was 2)" in said
    assert_one_curve(place / "alone", place / launcher)


@pytest.mark.full
def test_deepspeeds_launcher_trains_the_same(place):
    """It puts --local_rank=N before the command, and finds its processes by itself. In every run of the suite it starts
    one in tests/launch."""
    port = str(20000 + os.getpid() % 10000)
    launcher = ["deepspeed.launcher.runner", "--num_accelerators", "2", "--master_port", port, "--module"]
    start(launcher, place, "deepspeed", "parallel.pp=2", "parallel.schedule=zb-h1")
    assert_one_curve(place / "alone", place / "deepspeed")


def test_a_rank_that_is_killed_costs_the_steps_since_the_last_save_and_nothing_else(place):
    folder = place / "killed"
    words = words_of(place, folder.name, "parallel.tp=2", "checkpoint.every=1")
    run = subprocess.Popen([*PYTHON, *TRAIN, *words], env=ENVIRON, stderr=subprocess.PIPE, text=True)
    try:
        assert comes_true(lambda: newest(folder) is not None or run.poll() is not None)
        ranks = psutil.Process(run.pid).children(recursive=True)
        victim = next(p for p in ranks if p.environ().get("RANK") == "1")
        victim.send_signal(signal.SIGKILL)
        _, err = run.communicate(timeout=250)
    finally:
        run.kill()
    assert run.returncode == 1 and "rank 1 was killed by SIGKILL" in err
    assert gone(process.pid for process in ranks)
    again = {"track.folder": str(folder), "parallel.pp": 2, "parallel.schedule": "zb-h1"}
    on_world(2, trained, settings(place).changed(again))
    assert_one_curve(place / "alone", folder)


def test_the_text_is_the_same_whatever_layout_was_trained(place, four):
    """Greedy, with the checkpoint of one process and with that of four."""
    prompt = [3, 1, 4, 1, 5]
    texts = []
    for folder in (place / "alone", four):
        ((answer,),) = decode(load_model(config_of_run(folder).config, Mesh.single()), [prompt], Request(11, GREEDY))
        texts.append(answer.tokens)
    assert texts[0] == texts[1] and len(texts[0]) == 11


KEPT = {
    positions: {"model.positions": positions} for positions in ("learned", "rotary", "sinusoidal", "alibi", "none")
} | {
    "window": {"model.positions": "rotary", "model.window": 6, "model.layer_kinds": ["window", "full"]},
    "capped": {"model.attention_softcap": 1.0, "model.logit_softcap": 2.0, "model.window": 5},
    "branches": {"model.branches": "parallel", "model.qk_norm": "whole", "model.positions": "rotary"},
    "latents": {
        "model.positions": "rotary",
        "model.bias": False,
        "model.kv_lora_rank": 12,
        "model.qk_nope_head_dim": 6,
        "model.qk_rope_head_dim": 4,
        "model.v_head_dim": 7,
    },
}


@pytest.mark.parametrize("features", KEPT)
def test_kept_keys_and_values_say_what_reading_it_all_again_says(place, features):
    """Token by token with a cache, and with the whole context read anew for each: two ways of attention, one text."""
    changes = {"model.kv_heads": 2 if features != "latents" else None, **KEPT[features]}
    changes |= {"model.init_std": 0.3, "data.seq_length": 32}
    passes = build_passes(settings(place).changed(changes), Mesh.single())
    prompt, varied = [7, 7, 30, 2], Sampling(temperature=0, repetition_penalty=3.0)
    ((cached,),) = decode(passes, [prompt], Request(24, varied))
    anew: list[int] = []
    while len(anew) < 24:
        ((word,),) = decode(passes, [prompt + anew], Request(1, varied))
        anew += word.tokens
    assert cached.tokens == anew
    assert len(set(anew)) > 3
