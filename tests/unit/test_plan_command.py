"""`roots plan`: what it prints of a large layout and of a small one, how it tells time, what it refuses."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from roots_dist.checks.checks import check_used, layout_for
from roots_dist.cli.main import main
from roots_dist.cluster_profile import MeasuredLink, Profile, RankFacts, Speed, write
from roots_dist.config.load import load
from roots_dist.config.proposals import as_written
from roots_dist.errors import ConfigError, DataError
from roots_dist.layout import Layout
from roots_dist.learning.models.flops import flops_per_step
from roots_dist.runs.plan import advice
from roots_dist.runs.plan.advice import changes_that_fit
from roots_dist.runs.plan.cluster_speed import ClusterSpeed, Link, cluster_speed_of, ring_bytes
from roots_dist.runs.plan.plan_table import lines
from roots_dist.runs.plan.predict import predict

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def profile(hosts: str = "aa", between: bool = False) -> Profile:
    same = {"device": "cpu", "versions": {}, "cores": 1, "threads": 1, "memory_free": None, "disk_free": 1}
    ranks = tuple(RankFacts(rank=i, host=host, **same) for i, host in enumerate(hosts))

    def link(where: str, operation: str, size: int, seconds: float, rate: float) -> MeasuredLink:
        return MeasuredLink(
            where=where, operation=operation, ranks=2, groups=1, bytes=size, seconds=seconds, bus_bytes_per_s=rate,
            slowest_seconds=seconds, slowest=(0, 1),
        )  # fmt: skip

    links = [
        link(where, operation, size, seconds, rate)
        for where in ("inside", *(["between"] if between else []))
        for operation in ("all_reduce", "all_gather", "send")
        for size, seconds, rate in ((1 << 10, 1e-4, 1e7), (1 << 24, 1e-2, 2e9))
    ]
    speeds = tuple(
        Speed(rank=i, precision="fp32", matmul_flops=rate, copy_bytes_per_s=1e10, peak_flops=5e10)
        for i, rate in enumerate((4e10, 3e10))
    )
    return Profile(
        when="", seconds=1, launcher="", backend="gloo", world_size=len(hosts), layout=None, ranks=ranks,
        clock_offsets_s={},
        folder=None, wrote=(), speeds=speeds, links=tuple(links), findings=(),
    )  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, words)])
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out + err


def test_a_laptop_plans_the_384_gpus_of_bloom(capsys, tmp_path):
    code, said = run(capsys, ROOT / "configs" / "bloom-176b.yaml", "--processes", 384, "--json", tmp_path / "plan.json")
    assert code == 0 and "TP4×PP12×DP8, 384 processes, 176,247,271,424 parameters" in said
    found = json.loads((tmp_path / "plan.json").read_text())
    assert [rank["pp"] for rank in found["ranks"]] == list(range(12)) and found["seconds"] is None
    held = sum(rank["parameters"] for rank in found["ranks"]) * 4  # tensor ranks
    assert held == pytest.approx(
        176_247_271_424, rel=0.03
    )  # the last stage has a copy of the embedding, and norms are not cut
    middle = [rank["activations"] for rank in found["ranks"][1:-1]]
    assert middle == sorted(middle, reverse=True), "a stage holds one microbatch less than the one before it"


def test_a_plan_says_first_whether_it_fits(capsys):
    plan = predict(load(QUICKSTART), Layout(pp=2, tp=2))
    here, others = (lines(plan, None, free)[0] for free in (2**30, 4 * plan.peak))
    assert here.startswith("fits into the 1 GiB that this machine has free, with 4 × ")
    assert others.startswith("✗ does not fit into the ")
    assert re.fullmatch(r"[\d.]+ MiB per process: fits GPUs of 16 GiB, with 15.9 GiB left for .*", lines(plan, None)[0])
    huge = replace(plan, ranks=(replace(plan.ranks[0], weights=2**40),))
    assert lines(huge, None)[0] == "✗ 1 TiB per process: does not fit a GPU of 288 GiB, of which 2 GiB are set aside"
    assert lines(huge, None)[1].startswith("Fix: weights, optimizer and gradients take 1 TiB of it: try ")
    wide = replace(plan, ranks=(replace(plan.ranks[0], activations=39 * 2**30),))
    assert "fits GPUs of 48 GiB" in lines(wide, None)[0], "a GPU of 40 GiB has no 39 for tensors"
    cut = lines(replace(plan, ranks=(replace(plan.ranks[0], weights=3 * 286 * 2**30),)), None)[1]
    assert cut.endswith("try parallel.tp × parallel.pp of at least 16 instead of 4"), cut
    hidden = lines(replace(plan, ranks=(replace(plan.ranks[0], activations=2**40),)), None)[1]
    assert "try train.recompute=full, a smaller train.micro_batch, parallel.sequence_parallel=true or" in hidden
    for width in (80, 120):
        assert all(len(line) <= width for line in lines(plan, None, 2**30, width)), width
    assert len(lines(plan, None, None, 80)) > len(lines(plan, None, None, 120))


def checked_layout(config, processes):
    if problems := check_used(config, processes):
        raise ConfigError(problems)
    return layout_for(config, processes)


@pytest.mark.parametrize(
    ("share", "changes"),
    [
        (0.9, {"train.recompute": "full"}),
        (0.4, {"train.recompute": "full", "train.micro_batch": 1}),
    ],
)
def test_a_plan_that_does_not_fit_names_changes_with_which_it_does(share, changes, monkeypatch):
    config = load(QUICKSTART)
    plan = predict(config, Layout(pp=2, tp=2))
    found = changes_that_fit(config, None, int(share * plan.peak), checked_layout)
    assert found is not None and found[0] == changes and found[1] <= share * plan.peak
    told = lines(replace(plan, ranks=(replace(plan.ranks[0], weights=2**40),)), None, way=found)[1]
    assert told.startswith("Fix: write ") and all(
        f"{key}={as_written(value)}" in told for key, value in changes.items()
    )
    monkeypatch.setattr(advice, "LONGEST_S", -1.0)
    assert changes_that_fit(config, None, int(share * plan.peak), checked_layout) is None


def test_the_exit_code_says_whether_a_layout_fits(capsys, monkeypatch):
    monkeypatch.setattr(advice, "LONGEST_S", -1.0)
    bloom = ROOT / "configs" / "bloom-176b.yaml"
    code, said = run(capsys, bloom, "parallel.tp=1", "parallel.pp=1", "train.recompute=full", "parallel.zero_stage=0")
    assert code == 1 and said.startswith("✗ ") and "\nFix: " in said
    for memory, wanted in ((48, 1), (80, 0)):  # the plan above that takes 46.1 GiB
        code, said = run(capsys, bloom, "--processes", 384, "--gpu-memory", memory)
        assert code == wanted and f"{memory} GiB, " in said.splitlines()[0], said


def test_adapters_are_counted_apart_and_one_process_is_one(capsys):
    code, said = run(capsys, QUICKSTART, "parallel.tp=1", "parallel.pp=1", "finetune.strategy=lora")
    adapters = 4 * 2 * 8 * (192 + 192)  # layers, query and value, rank, in and out
    assert code == 0 and f"TP1×PP1×DP1, 1 process, 2,566,272 parameters and {adapters:,} of adapters" in said


def test_time_needs_a_profile_and_says_where_it_goes(capsys, tmp_path):
    write(profile(), tmp_path / "cluster.json")
    code, said = run(capsys, QUICKSTART, "parallel.pp=1", "--profile", tmp_path / "cluster.json")
    assert code == 0 and "s per step, MFU" in said and "30 GFLOP/s of products" in said
    code, said = run(capsys, QUICKSTART, "parallel.pp=1", "--profile", tmp_path / "cluster.json", "--measure")
    assert code == 0 and "s per step, MFU" in said


@pytest.mark.parametrize(
    "words, expected",
    [
        (["parallel.pp=1", "--measure"], "--measure: expected --profile FILE too"),
        (["--profile", "{profile}"], "--profile: expected links between hosts"),
        (["--profile", "{nothing}"], "expected what roots doctor --json wrote"),
        (["parallel.pp=1", "--json", "{profile}/plan.json"], "expected a file that can be written"),
        (["--processes", "6"], "6"),
        (["model.heads=5"], "model.heads"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_a_line(capsys, tmp_path, words, expected):
    write(profile(), tmp_path / "cluster.json")
    places = {"profile": tmp_path / "cluster.json", "nothing": tmp_path / "nothing.json"}
    code, said = run(capsys, QUICKSTART, *(word.format(**places) for word in words))
    assert code == 2 and expected in said and "Traceback" not in said


@pytest.mark.parametrize(
    "damage, expected",
    [
        ({"ranks": ()}, "facts of ranks"),
        ({"speeds": (replace(profile().speeds[0], matmul_flops=0.0),)}, "matrix products above 0, found 0"),
        ({"speeds": (replace(profile().speeds[0], copy_bytes_per_s=float("nan")),)}, "copies above 0, found nan"),
        ({"speeds": (replace(profile().speeds[0], peak_flops=0.0),)}, "peak above 0"),
        ({"links": (replace(profile().links[0], bus_bytes_per_s=0.0),)}, "links above 0"),
        ({"links": (replace(profile().links[0], seconds=-1.0),)}, "links above 0, found -1"),
    ],
)
def test_a_profile_that_measured_nothing_is_refused(damage, expected):
    with pytest.raises(DataError, match=expected):
        cluster_speed_of(replace(profile(), **damage), 1e-6)


def test_long_sequences_are_planned(capsys):
    """Longer than the corpus that proofs learn from: 8,192 tokens is what both shipped Llama 3 configs have."""
    code, said = run(capsys, QUICKSTART, "parallel.pp=1", "data.seq_length=8192", "train.micro_batch=2")
    assert code == 0 and "2 processes" in said and "Warning" not in said


def test_a_profile_becomes_a_machine():
    machine = cluster_speed_of(profile("aabb", between=True), op_overhead_s=1e-6)
    assert (machine.flops_per_s, machine.bytes_per_s, machine.ranks_per_host, machine.peak_flops) == (
        3e10,
        1e10,
        2,
        5e10,
    )
    assert machine.links["between", "all_reduce"] == Link(latency_s=1e-4, bytes_per_s=2e9)
    assert machine.link([0, 1], "reduce_scatter") == machine.links["inside", "all_gather"]
    assert machine.link([0, 2], "send") == machine.links["between", "send"]
    with pytest.raises(DataError, match="inside hosts"):
        replace(machine, links={}).link([0, 1], "send")
    with pytest.raises(DataError, match="speeds of ranks"):
        cluster_speed_of(replace(profile(), speeds=()), 1e-6)
    assert [ring_bytes(name, 100, 4) for name in ("all_reduce", "all_gather", "reduce_scatter", "send")] == [
        150,
        75,
        75,
        100,
    ]


def at_once(**changes: object) -> ClusterSpeed:
    """Nothing takes time but what the test says."""
    link = Link(latency_s=0.0, bytes_per_s=float("inf"))
    links = {
        (where, operation): link
        for where in ("inside", "between")
        for operation in ("all_reduce", "all_gather", "send")
    }
    free = {
        "flops_per_s": float("inf"),
        "bytes_per_s": float("inf"),
        "op_overhead_s": 0.0,
        "peak_flops": None,
        "ranks_per_host": 8,
    }
    return ClusterSpeed(**{**free, "links": links, **changes})


def test_where_only_products_take_time_a_step_takes_its_flops():
    made = load(QUICKSTART).changed({"parallel.tp": 1, "parallel.pp": 1})
    seconds = predict(made, Layout(), at_once(flops_per_s=1e9)).seconds
    assert seconds.step == seconds.compute
    m, seq = made.model, made.data.seq_length
    unseen = m.layers * 3 * 4 * seq**2 * m.heads * m.width_of_head() / 2  # by causal attention, computed all the same
    full = flops_per_step(made) + made.train.global_batch * unseen
    assert seconds.compute * 1e9 == pytest.approx(full, rel=0.03)
    twice = made.changed({"parallel.tp": 2, "parallel.pp": 1})
    assert predict(twice, Layout(tp=2), at_once(flops_per_s=1e9)).seconds.compute == pytest.approx(
        seconds.compute / 2, rel=0.01
    )


def test_stages_that_take_equally_long_leave_the_bubble_of_the_papers():
    made = load(QUICKSTART).changed(
        {"parallel.tp": 1, "parallel.pp": 4, "train.micro_batch": 1, "model.layers": 64, "model.vocab": 8}
    )
    seconds = predict(made, Layout(pp=4), at_once(flops_per_s=1e9)).seconds
    assert seconds.bubble / seconds.compute == pytest.approx(3 / 8, rel=0.02)
    assert (seconds.tp, seconds.dp, seconds.optimizer) == (0, 0, 0)


def test_messages_take_their_latency_each():
    made = load(QUICKSTART).changed({"parallel.tp": 2, "parallel.pp": 1, "train.micro_batch": 8})
    machine = at_once(links={("inside", "all_reduce"): Link(latency_s=1.0, bytes_per_s=float("inf"))})
    blocks = 4 * made.model.layers  # two forward, two backward
    assert (
        blocks < predict(made, Layout(tp=2), machine).seconds.tp < blocks + 8
    )  # embedding, head, loss, partial gradients


def test_a_config_with_a_scaled_embedding_is_planned(capsys):
    """The factor is rounded on the host, whatever device the shapes are on."""
    code, said = run(capsys, QUICKSTART, "model.embedding_multiplier=13.8", "parallel.pp=1")
    assert code == 0 and "2,566,272 parameters" in said
