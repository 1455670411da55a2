"""Two commands that write one folder at once: one of them is refused, and what is there is of the other alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from roots_dist.errors import ExchangeError
from roots_dist.storage.exchange.shards import new_folder


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    """The second emptied the first one's folder, and the first published what both had written since."""
    with new_folder(tmp_path / "model") as first:
        (first / "config.json").write_text("first")
        with pytest.raises(ExchangeError, match="no other process writes .*Fix: wait"), new_folder(tmp_path / "model"):
            raise AssertionError("two write it")
        (first / "weights").write_text("first")
    assert sorted(os.listdir(tmp_path)) == ["model"] and sorted(os.listdir(tmp_path / "model")) == [
        "config.json",
        "weights",
    ]


def test_what_a_killed_one_has_left_is_emptied_and_a_failure_leaves_nothing(tmp_path):
    left = tmp_path / ".model.partial"
    (left / "generator").mkdir(parents=True)
    (left / "old").symlink_to(tmp_path)
    seen = []

    def fails() -> None:
        with new_folder(tmp_path / "model") as folder:
            seen.extend([folder, *folder.iterdir()])
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fails()
    assert seen == [left]
    assert not os.listdir(tmp_path)


def test_what_is_published_is_on_disk_before_its_name(tmp_path, monkeypatch):
    """After a loss of power an export could be there with files of no bytes."""
    synced, rename, fsync = [], os.rename, os.fsync

    def published(old: Path, new: Path) -> None:
        assert {"a", "b", "generator", ".model.partial"} <= set(synced)
        rename(old, new)

    monkeypatch.setattr(
        os, "fsync", lambda fd: (synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name), fsync(fd))
    )
    monkeypatch.setattr(os, "rename", published)
    with new_folder(tmp_path / "model") as folder:
        (folder / "generator").mkdir()
        for path in (folder / "a", folder / "generator" / "b"):
            path.write_text("x")
    assert not shutil.rmtree(tmp_path / "model")
