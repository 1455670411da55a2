"""on_world: results come back whole, failures are told with the cause first, nothing is left running."""

import os
import resource
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
import torch.distributed as dist
from patience import alive, gone

from roots_dist.testing import world
from roots_dist.testing.world import RankPool, WorldFailed, on_warm_world, on_world


def summed(rank, size, number):
    total = torch.full((2, 3), float(rank + number), dtype=torch.float64)
    dist.all_reduce(total)
    return {"total": total, "place": (rank, size), "nested": [{"half": total.to(torch.bfloat16)[0]}, None, "text"]}


def test_every_rank_returns_tensors_in_nested_containers():
    results = on_world(3, summed, 10)
    assert [r["place"] for r in results] == [(0, 3), (1, 3), (2, 3)]
    for result in results:
        assert torch.equal(result["total"], torch.full((2, 3), 33.0, dtype=torch.float64))
        assert result["nested"][0]["half"].dtype == torch.bfloat16
        assert result["nested"][1:] == [None, "text"]


@pytest.fixture
def little_grace(monkeypatch):
    """Others than the rank that fails are killed soon, where nothing is asked of what they say."""
    monkeypatch.setattr(world, "GRACE_S", 1.0)


def pid_threads_and_group(rank, size):
    preloaded = "deepspeed" in sys.modules
    return os.getpid(), torch.get_num_threads(), dist.get_backend(), os.environ["WORLD_SIZE"], preloaded


def test_one_rank_too_gets_a_new_process_with_a_group():
    (first,), (second,) = on_world(1, pid_threads_and_group), on_world(1, pid_threads_and_group)
    assert len({first[0], second[0], os.getpid()}) == 3
    assert first[1:] == (1, "gloo", "1", True)


def processor_seconds(rank, size):
    """Seconds of this process since its start, imports included if they were not inherited."""
    return time.process_time()


def test_a_world_is_cheap_after_the_first():
    on_world(1, pid_threads_and_group)
    assert max(on_world(4, processor_seconds)) < 1.0  # 0.03 s; with `spawn` the imports alone take 3


def test_warm_ranks_stay_and_each_call_has_a_group_of_its_own():
    first, second = on_warm_world(2, pid_threads_and_group), on_warm_world(2, pid_threads_and_group)
    assert [rank[0] for rank in first] == [rank[0] for rank in second]
    assert [found["place"] for found in on_warm_world(2, summed, 10)] == [(0, 2), (1, 2)]
    assert on_warm_world(2, groups_of_before) == on_warm_world(2, groups_of_before) == [1, 1]
    (other,) = on_warm_world(1, pid_threads_and_group)
    assert other[0] not in {rank[0] for rank in first}


def groups_of_before(rank, size):
    """How many groups there are before this call makes one of its own."""
    found = len(dist.distributed_c10d._world.pg_map)
    dist.new_group([0, 1])
    return found


def test_warm_ranks_that_failed_are_replaced(little_grace):
    first = on_warm_world(2, pid_threads_and_group)
    with pytest.raises(WorldFailed, match="the real cause"):
        on_warm_world(2, one_raises, timeout=30)
    second = on_warm_world(2, pid_threads_and_group)
    assert not {rank[0] for rank in first} & {rank[0] for rank in second}
    os.kill(second[0][0], signal.SIGKILL)
    assert gone([second[0][0]])
    third = on_warm_world(2, pid_threads_and_group)
    assert not {rank[0] for rank in second} & {rank[0] for rank in third}


def test_a_world_that_is_closed_leaves_no_process():
    before = _workers()
    standing = RankPool(2)
    standing.run(summed, 0)
    assert len(_workers()) == len(before) + 2
    standing.close()
    assert _workers() == before


def test_a_world_whose_ranks_do_not_meet_is_tried_again(tmp_path, monkeypatch):
    folders = []

    def broken_at_first(prefix: str) -> str:
        folders.append(tmp_path / f"{prefix}{len(folders)}")
        (folders[-1] / "store").mkdir(parents=True) if len(folders) < 3 else folders[-1].mkdir()
        return str(folders[-1])

    monkeypatch.setattr("roots_dist.testing.world.tempfile.mkdtemp", broken_at_first)
    assert [found["place"] for found in on_world(2, summed, 1)] == [(0, 2), (1, 2)]
    assert len(folders) == 3 and not any(folder.exists() for folder in folders)
    del folders[:]
    monkeypatch.setattr("roots_dist.testing.world.ATTEMPTS", 2)
    with pytest.raises(WorldFailed, match="Is a directory"):
        on_world(2, summed, 1)
    assert len(folders) == 2


def test_what_has_begun_is_not_begun_again(tmp_path):
    with pytest.raises(WorldFailed, match="the real cause"):
        on_world(2, notes_and_raises, str(tmp_path))
    assert (tmp_path / "notes0").read_text() == "begun\n"


def notes_and_raises(rank, size, folder):
    with open(f"{folder}/notes{rank}", "a") as notes:
        notes.write("begun\n")
    raise ValueError("the real cause, in _connect\nof another kind")


def test_the_parent_keeps_its_environment():
    before = dict(os.environ)
    on_world(1, pid_threads_and_group)
    assert dict(os.environ) == before


def one_raises(rank, size):
    if rank == 1:
        raise ValueError("the real cause")
    dist.all_reduce(torch.ones(1))


def test_the_first_cause_is_told_first():
    with pytest.raises(WorldFailed) as failure:
        on_world(3, one_raises, timeout=30)
    text = str(failure.value)
    assert text.startswith("of 3 ranks, 3 failed\n\nrank 1 raised:")
    assert text.index("ValueError: the real cause") < text.index("rank 0 raised:")
    assert "one_raises" in text


def one_hangs(rank, size):
    if rank == 0:
        time.sleep(1000)
    dist.all_reduce(torch.ones(1))


def test_a_hang_is_killed_and_each_rank_says_where_it_stood():
    before = _workers()
    with pytest.raises(WorldFailed, match="of 2 ranks, 2 failed to finish within 2 s") as failure:
        on_world(2, one_hangs, timeout=2)
    assert "in one_hangs" in str(failure.value)
    assert _workers() == before


def one_sleeps_on(rank, size):
    if rank == 1:
        raise ValueError("the real cause")
    time.sleep(1000)


def test_a_rank_that_does_not_notice_the_failure_is_killed_long_before_the_timeout(little_grace):
    start = time.monotonic()
    with pytest.raises(WorldFailed, match="rank 1 raised") as failure:
        on_world(2, one_sleeps_on, timeout=250)
    assert time.monotonic() - start < 125  # GRACE_S and little more on a free machine
    assert str(failure.value).index("rank 1 raised") < str(failure.value).index("rank 0 was still running")


def one_is_killed(rank, size):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def test_a_rank_that_dies_without_a_word_is_the_cause():
    with pytest.raises(WorldFailed, match="rank 1 died with exit code -9") as failure:
        on_world(2, one_is_killed, timeout=30)
    assert str(failure.value).index("rank 1 died") < str(failure.value).index("rank 0 raised")


def one_is_killed_while_it_writes(rank, size):
    """The kernel lets it write no byte, and kills it when it tries."""
    if rank == 1:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        raise ValueError("this cannot be written")
    dist.all_reduce(torch.ones(1))


def test_a_rank_that_is_killed_while_it_writes_its_error_is_still_the_cause():
    with pytest.raises(WorldFailed, match=f"rank 1 died with exit code {-signal.SIGXFSZ}") as failure:
        on_world(2, one_is_killed_while_it_writes, timeout=30)
    assert str(failure.value).index("rank 1 died") < str(failure.value).index("rank 0 raised")


def test_an_empty_error_file_hides_nothing(tmp_path):
    (tmp_path / "error1").touch()
    (tmp_path / "error0").write_text("1.5\nBroken pipe")
    said = world._report(tmp_path, [1, -9], [], 30)
    assert said.index("rank 1 died with exit code -9") < said.index("rank 0 raised:\nBroken pipe")


def leaves_without_a_word(rank, size):
    os._exit(0)


def test_leaving_without_a_result_is_a_failure():
    with pytest.raises(WorldFailed, match="rank 0 died with exit code 0"):
        on_world(1, leaves_without_a_word)


def leaves_early(rank, size):
    sys.exit(0)


def test_leaving_early_is_a_failure():
    with pytest.raises(WorldFailed, match="SystemExit"):
        on_world(1, leaves_early)


def returns_code(rank, size):
    return _Planted()


class _Planted:
    def __reduce__(self):
        return os.system, ("true",)


def test_a_result_that_is_code_is_refused():
    with pytest.raises(Exception, match="(?s)weights_only.*system"):
        on_world(1, returns_code)


SCRIPT = """
import sys, time
import torch, torch.distributed as dist
from roots_dist.testing.world import on_world

def work(rank, size, seconds):
    if seconds:
        with open("log", "a") as log:
            log.write("started\\n")
    time.sleep(seconds)
    total = torch.ones(1)
    dist.all_reduce(total)
    return total.item()

if __name__ == "__main__":
    print(on_world(2, work, 0), flush=True)
    on_world(2, work, 1000)
"""


@pytest.mark.timeout(400)
def test_a_plain_script_may_use_it_and_ranks_die_with_a_parent_that_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    log = tmp_path / "log"
    with open(tmp_path / "output", "w") as output:
        parent = subprocess.Popen(
            [sys.executable, "script.py"], cwd=tmp_path, env=_environment(), stdout=output, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + 250
    while not (log.exists() and log.read_text().count("started") == 2):
        assert time.monotonic() < deadline and parent.poll() is None, (tmp_path / "output").read_text()
        time.sleep(0.05)
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 3  # the forkserver and two ranks
    parent.kill()
    parent.wait()
    assert gone(process.pid for process in family)
    assert (tmp_path / "output").read_text() == "[2.0, 2.0]\n"


def _environment():
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return {**os.environ, "PYTHONPATH": package}


def _workers():
    """Processes below this one that are neither the forkserver nor the resource tracker."""
    return [worker for helper in psutil.Process().children() for worker in helper.children() if alive(worker.pid)]
