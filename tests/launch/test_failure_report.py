"""Which of several failures is the cause: pure, over records and exit codes."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict

import pytest

from roots_dist.errors import DataError
from roots_dist.failures import RankIdentity, Record, _print_failure, describe, guarded
from roots_dist.runs.ranks.failure_report import read_records, summarize


def record(rank: int, message: str = "ValueError: x", *, time: float = 0.0, by_user=False, consequence=False) -> Record:
    return Record(rank, f"pp{rank} dp0 tp0", "n1", time, by_user, consequence, message, f"trace of {rank}", f"f{rank}")


def test_the_earliest_own_failure_comes_first_and_others_in_a_line():
    records = [record(2, "ValueError: a", time=1), record(0, "TypeError: b", time=2)]
    found = summarize(records, {0: 1, 1: -15, 2: 1, 3: -15}, 4)
    lines = found.text.splitlines()
    assert lines[0] == "╭─ rank 2 (pp2 dp0 tp0, node n1) failed first" and lines[1] == "│ ValueError: a"
    assert "rank 0 (pp0 dp0 tp0, node n1) failed too: TypeError: b (full traceback: f0)" in lines
    assert lines[-1] == "ranks 1, 3 stopped because of it." and found.code == 1


def test_what_a_peer_saw_is_not_the_cause_even_if_it_came_first():
    records = [record(0, "RuntimeError: Connection closed by peer", consequence=True, time=1), record(1, time=2)]
    found = summarize(records, {0: 1, 1: 1}, 2)
    assert found.text.startswith("╭─ rank 1") and "Connection closed" not in found.text


def test_a_killed_rank_is_the_cause_of_what_its_peers_saw():
    found = summarize([record(0, "Connection closed by peer", consequence=True)], {0: 1, 1: -9, 2: -15}, 3)
    assert found.text.splitlines()[0].startswith("✗ rank 1 was killed by SIGKILL")
    assert found.text.splitlines()[1] == "ranks 0, 2 stopped because of it."


def test_where_all_saw_a_peer_the_earliest_is_shown():
    records = [record(r, "recv timeout", consequence=True, time=r) for r in (1, 0)]
    assert summarize(records, {0: 1, 1: 1}, 2).text.startswith("╭─ rank 1")


def test_a_rank_that_was_stopped_from_outside_is_named():
    assert summarize([], {0: -15}, 1).text == "✗ rank 0 was killed by SIGTERM"


@pytest.mark.parametrize("code, word", [(7, "exit code 7"), (-11, "SIGSEGV"), (-9, "memory"), (-77, "signal 77")])
def test_an_end_without_a_word_says_how(code, word):
    assert word in summarize([], {1: code}, 2).text


@pytest.mark.parametrize("stopped", [-15, 128 + 15, -2])  # by the signal, or by itself when it came
def test_a_users_mistake_on_one_rank_alone_names_it(stopped):
    found = summarize([record(1, "✗ x", by_user=True)], {0: stopped, 1: 2}, 2)
    assert found.text.splitlines() == ["✗ x", "    on rank 1 (pp1 dp0 tp0, node n1)", "rank 0 stopped because of it."]
    assert found.code == 2


def test_many_ranks_are_summed_up():
    assert summarize([record(0)], {0: 1}, 384).text.endswith(
        "ranks 1, 2, 3, 4, 5, 6, 7, 8 and 375 more stopped because of it."
    )


def test_records_are_read_in_the_order_of_time(tmp_path):
    for rank, time in ((0, 3.0), (1, 1.0), (2, 2.0)):
        (tmp_path / f"rank_{rank:05d}.json").write_text(json.dumps(asdict(record(rank, time=time))))
    assert [r.rank for r in read_records(tmp_path)] == [1, 2, 0]


@pytest.mark.parametrize(
    "words, expected",
    [
        ("[gloo] Connection closed by peer [127.0.0.1]:4", True),
        ("failed to recv, got 0 bytes", True),
        ("loss is nan", False),
    ],
)
def test_gloos_words_mark_a_consequence(words, expected):
    assert describe(RuntimeError(words), RankIdentity(0, 2)).consequence is expected
    assert describe(DataError(words), RankIdentity(0, 2)).consequence is False


def test_one_process_reports_a_failure_and_ends(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught, guarded(RankIdentity(0, 1, folder=tmp_path)):
        raise ValueError("boom")
    assert caught.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith("╭─ rank 0") and "ValueError: boom" in err
    assert "boom" in (tmp_path / "errors" / "rank_00000.txt").read_text()


def test_a_users_mistake_in_one_process_is_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught, guarded(RankIdentity(0, 1, folder=tmp_path)):
        raise DataError("no tokens")
    assert caught.value.code == 2 and capsys.readouterr().err == "✗ no tokens\n"


def test_a_folder_that_cannot_be_written_does_not_hide_the_error(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit), guarded(RankIdentity(0, 1, folder=tmp_path / "file")):
        raise ValueError("boom")
    assert "ValueError: boom" in capsys.readouterr().err


def test_what_all_ranks_have_to_say_is_said_once_and_leaves_no_file(tmp_path, capsys, monkeypatch):
    """Each failure of a user under torchrun left a file in /tmp."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def say(message: str, ranks: int) -> int:
        for rank in range(ranks):
            who = RankIdentity(rank, 6, local_size=3)
            _print_failure(describe(DataError(message), who), who)
        return capsys.readouterr().err.count(message)

    for _ in range(2):  # torchrun starts its ranks again
        assert say("no tokens", 3) == 1 and not [*tmp_path.iterdir()]
    assert say("ended before the third", 2) == 1
    (left,) = tmp_path.iterdir()
    assert say("no rows", 3) == 1 and [*tmp_path.iterdir()] == [left]
    os.utime(left, (0, 0))
    assert say("no words", 3) == 1 and not [*tmp_path.iterdir()]
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    assert say("nowhere to count", 3) == 3
