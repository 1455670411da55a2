"""Ranks that differ are named before the first step: which, where, and in what. Over a real store, on threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from commands import roots
from patience import comes_true

from roots_dist.config.schema import Config
from roots_dist.environment import World
from roots_dist.errors import EnvironmentProblem
from roots_dist.layout import Layout
from roots_dist.learning.data.store import Writer
from roots_dist.runs.ranks import fingerprint as prints
from roots_dist.runs.ranks import handshake, join
from roots_dist.runs.ranks.fingerprint import digests, fingerprint
from roots_dist.runs.ranks.handshake import Identity, RanksDiffer, _hello, identity_of, shake_hands

CONFIG = Config(data={"train": "nowhere/train"}, train={"global_batch": 4}, advanced={"threads": 1})


@pytest.fixture(autouse=True)
def code_is_read_once(monkeypatch):
    """By all these threads of one process."""
    code = prints.of_code()
    monkeypatch.setattr(prints, "of_code", lambda: code)


def meet(prints_of: list[Any], ranks: list[int] | None = None, seconds: float = 20) -> list[str]:
    """What each rank says; empty if it has found all alike. Each thread is a rank with its own connection."""
    ranks = list(range(len(prints_of))) if ranks is None else ranks
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    size, said = len(prints_of), [""] * len(ranks)

    def be(number: int, rank: int) -> None:
        store = dist.PrefixStore("x", dist.TCPStore("127.0.0.1", server.port, wait_for_workers=False))
        who = Identity(rank, f"n{rank // 2}", 1000 + rank, 0.0)
        try:
            shake_hands(store, who, size, Layout(dp=size), prints_of[rank], seconds)
            assert identity_of(store, rank) == who
        except (RanksDiffer, EnvironmentProblem) as error:
            said[number] = f"{type(error).__name__}: {error}"

    threads = {pair: threading.Thread(target=be, args=pair) for pair in enumerate(ranks)}
    for (_, rank), thread in threads.items():
        if rank > 0:
            thread.start()
    if 0 in ranks:  # which waits for the others: they have arrived, however busy the machine is
        theirs = [_hello(rank) for rank in set(ranks) - {0}]
        assert comes_true(lambda: not theirs or dist.PrefixStore("x", server).check(theirs))
        threads[ranks.index(0), 0].start()
    for thread in threads.values():
        thread.join()
    return said


def of(config: Config = CONFIG, layout: str = "DP4", said: tuple[str, ...] = ("train",)) -> Any:
    return fingerprint(config, layout, torch.device("cpu"), said)


def with_text(part: str, name: str, text: str) -> Callable[[], Any]:
    return lambda: {**of(), part: {**of()[part], name: text}}


def test_ranks_that_are_alike_go_on():
    own = of()
    assert meet([own] * 4) == [""] * 4


CHANGES = {
    "optim.lr": 7e-4,
    "optim.weight_decay": 0.3,
    "optim.clip_grad": 0.5,
    "train.seed": 7,
    "train.steps": 3,
    "train.micro_batch": 2,
    "train.global_batch": 8,
    "train.precision": "bf16",
    "model.dropout": 0.3,
    "model.norm": "rmsnorm",
    "model.activation": "relu",
    "model.hidden": 32,
    "model.layers": 3,
    "data.seq_length": 8,
    "parallel.sequence_parallel": True,
    "parallel.zero_stage": 2,
    "checkpoint.every": 3,
    "track.folder": "elsewhere",
}


def test_the_key_the_rank_and_its_host_are_named_on_all_ranks():
    others, changed = of(), of(CONFIG.changed({"optim.lr": 7e-4}))
    said = meet([others, others, changed, others])
    expected = (
        "RanksDiffer: rank 2 (host n1) (pp0 dp2 tp0): config: optim.lr = 0.0007: expected 0.0003 as on ranks 0-1, 3. "
        "Fix: start all ranks with one command and one config file."
    )
    assert said == [expected] * 4


def test_every_key_but_that_of_threads_is_compared():
    usual = prints.of_config(CONFIG)
    for key, value in CHANGES.items():
        changed = prints.of_config(CONFIG.changed({key: value}))
        assert {name for name, text in changed.items() if text != usual[name]} == {key}
        assert digests({"config": changed}) != digests({"config": usual})
    tree = CONFIG.model_dump()
    assert {f"{s}.{k}" for s in tree for k in tree[s]} - set(usual) == {"advanced.threads"}


@pytest.mark.parametrize(
    "change, named",
    [
        (with_text("versions", "torch", "1.0"), "versions: torch = 1.0: expected"),
        (with_text("code", "roots_dist/x.py", "1 bytes"), "code: roots_dist/x.py = 1 bytes: expected nothing"),
        (with_text("corpus", "c.bin", "9 bytes"), "corpus: c.bin = 9 bytes: expected nothing"),
        (with_text("environment", "NCCL_ALGO", "Tree"), "environment: NCCL_ALGO = Tree: expected "),
        (lambda: of(layout="TP4"), "layout: layout = TP4: expected DP4"),
        (lambda: of(said=("generate", "x")), "command: command = generate x: expected train"),
    ],
)
def test_whatever_differs_is_named(change, named):
    assert named in meet([change(), of(), of(), of()])[3]


def test_two_kinds_are_named_and_of_two_ranks_nobody_can_say_which_is_wrong():
    one, other = of(CONFIG.changed({"optim.lr": 1e-5})), of(CONFIG.changed({"train.seed": 5}))
    said = meet([of(), one, other, of(), of()])[0]
    assert "rank 1 (host n0) (pp0 dp1 tp0): config: optim.lr" in said and "rank 2 (host n1)" in said
    assert "one of the two is wrong" in meet([of(), one])[1]


def test_a_rank_that_does_not_come_or_comes_twice_is_named():
    own = of()
    said = meet([own] * 3, ranks=[0, 2], seconds=0.3)
    assert all("rank 1 (pp0 dp1 tp0): did not arrive within 0.3 s, the other 2 did" in text for text in said)
    with pytest.MonkeyPatch.context() as patch:  # rank 0 does not answer at all
        patch.setattr(handshake, "SLACK_S", 0.0)
        said = meet([own] * 2, ranks=[1], seconds=0.1)
    assert "rank 0 (pp0 dp0 tp0): did not arrive within 0.1 s" in said[0]
    assert any("expected one process of this rank" in text for text in meet([own] * 2, ranks=[0, 1, 1], seconds=0.5))


def test_ranks_that_an_elastic_agent_has_started_anew_are_told_so(monkeypatch):
    """Where a node came or went, the agent's store still has the ranks before, and no restart is counted."""
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    store, own = dist.HashStore(), of()
    shake_hands(store, Identity(0, "n0", 7, 0.0), 1, Layout(), own, 1)
    expected = r"and process 7 on n0 has arrived before\. Fix: .*; if .* set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    with pytest.raises(EnvironmentProblem, match=expected):
        shake_hands(store, Identity(0, "n0", 9, 0.0), 1, Layout(), own, 1)


def test_an_agent_that_was_started_anew_counts_from_zero_and_its_ranks_meet_the_others(monkeypatch):
    """A host's agent was killed and comes back: its ranks are of its first start, the others' of their second."""
    world, own = World(0, 1, 0, 1, "127.0.0.1", 0, "none"), of()
    monkeypatch.setattr(join, "fingerprint", lambda *_: own)

    def keys(count: str, shared: str) -> Any:
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", count)
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", shared)
        store = dist.HashStore()
        monkeypatch.setattr(join, "rendezvous", lambda *_: store)
        join._meet(CONFIG, world, Layout(), torch.device("cpu"), [])
        return store.list_keys()

    assert keys("1", "False") == keys("0", "False")
    assert keys("1", "True") != keys("0", "True")  # one store for both starts: keys of the dead lie in it


def test_files_are_compared_by_content_and_large_ones_by_blocks(tmp_path, monkeypatch):
    small, large = tmp_path / "a.bin", tmp_path / "b.bin"
    monkeypatch.setattr(prints, "WHOLE_BYTES", 1 << 18)
    small.write_bytes(b"x" * 100)
    large.write_bytes(b"y" * (1 << 19))
    before = prints.of_files(iter([small, large, tmp_path / "none"]))
    assert before[str(tmp_path / "none")] == "not there"
    small.write_bytes(b"x" * 99 + b"z")
    large.write_bytes(b"y" * ((1 << 19) - 1) + b"z")
    after = prints.of_files(iter([tmp_path, tmp_path / "none"]))
    assert all(after[str(path)] != before[str(path)] for path in (small, large))


def test_a_run_whose_ranks_differ_ends_with_one_line(tmp_path):
    """Also where they would wait for each other, in groups that the others do not make."""
    prefix, tokens = tmp_path / "train", np.arange(400, dtype=np.int64) % 61
    with Writer(prefix, np.dtype("<u2")) as writer:
        writer.add(tokens)
        writer.commit()
    config = {
        "model": {"layers": 2, "hidden": 16, "heads": 2, "vocab": 61},
        "data": {"train": str(prefix), "seq_length": 8},
        "parallel": {"tp": 2},
        "train": {"steps": 2, "global_batch": 2, "device": "cpu"},
        "track": {"folder": str(tmp_path / "run"), "wandb": "disabled", "tensorboard": "off"},
        "advanced": {"threads": 1, "timeout_s": 60},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    ran = roots("train", str(tmp_path / "c.yaml"), ranks=2, own_words={1: ["parallel.tp=1"]})
    assert ran.returncode == 2 and ran.stderr.count("✗") == 1 and "Traceback" not in ran.stderr, ran.stderr
    (said,) = (line for line in ran.stderr.splitlines() if "✗" in line)
    assert said.startswith("✗ rank 1 (host ") and "layout: layout = TP1×PP1×DP2 of 2 ranks: expected TP2" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
