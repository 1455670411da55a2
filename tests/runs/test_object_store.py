"""Checkpoints in an object store: a run trains, goes on, is evaluated and exported as from a disk, and a kill at any
write leaves the checkpoint before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from commands import roots
from safetensors.torch import save_file

from roots_dist.checks.facts import Facts, gather
from roots_dist.checks.readiness import check
from roots_dist.config.load import to_yaml
from roots_dist.config.run_config import config_of_run
from roots_dist.config.schema import Config
from roots_dist.errors import CheckpointError, EnvironmentProblem
from roots_dist.layout import Layout
from roots_dist.learning.data.store import Writer
from roots_dist.runs.evaluate.evaluate import evaluate
from roots_dist.runs.train import save_job
from roots_dist.runs.train.loop import TrainParts, train
from roots_dist.storage.checkpoint import answers, object_store
from roots_dist.storage.checkpoint.disk import names
from roots_dist.storage.checkpoint.format import checkpoints_folder
from roots_dist.storage.checkpoint.keep import found_steps, remove_leftovers
from roots_dist.storage.checkpoint.object_store import UNFINISHED, ObjectPath, place_of
from roots_dist.storage.checkpoint.object_tensors import open_tensors
from roots_dist.storage.checkpoint.verified import best_or_newest, newest_verified
from roots_dist.storage.exchange.exporting import export_model
from roots_dist.world.mesh import Mesh


@pytest.fixture
def url() -> str:
    store = fsspec.filesystem("memory")
    store.store.clear()
    store.pseudo_dirs[:] = [""]
    return "memory://bucket/runs/mine"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("store") / "text"
    with Writer(path, np.dtype("<u2")) as writer:
        writer.add(np.random.default_rng(0).integers(0, 61, 600).astype("<u2"))
        writer.commit()
    return str(path)


def config_of(text: str, folder: Path, url: str | None, **changes: object) -> Config:
    tree = {
        "model": {"layers": 1, "hidden": 16, "heads": 2, "vocab": 61},
        "data": {"train": text, "validation": text, "seq_length": 8},
        "train": {"steps": 4, "global_batch": 2, "micro_batch": 2, "device": "cpu", "eval_sequences": 4},
        "optim": {"lr_schedule": "constant"},
        "checkpoint": {"every": 1, "url": url},
        "track": {"folder": str(folder), "wandb": "disabled", "tensorboard": "off"},
    }
    return Config.model_validate(tree).changed(changes)


def shards(checkpoint: object_store.Place) -> dict[str, str]:
    files = json.loads(
        (checkpoint / "manifest.json").read_text()
        if isinstance(checkpoint, Path)
        else (checkpoint / "manifest.json").read()
    )["files"]
    return {name: facts["sha256"] for name, facts in files.items() if name.endswith(".safetensors")}


def test_a_run_lives_in_a_store_as_on_a_disk(text, url, tmp_path, capsys, caplog):
    run = tmp_path / "run"
    assert train(config_of(text, run, url), Mesh.single()) == 0
    assert checkpoints_folder(run) == place_of(url) and not (run / "checkpoints").exists()
    assert names(place_of(url)) == ["run.json", "step_00000003", "step_00000004"]
    assert train(config_of(text, run, url, **{"train.steps": 6}), Mesh.single()) == 0
    assert train(config_of(text, tmp_path / "disk", None, **{"train.steps": 6}), Mesh.single()) == 0
    assert list(found_steps(run)) == [5, 6]
    for step in (5, 6):
        name = f"step_0000000{step}"
        assert shards(place_of(url) / name) == shards(tmp_path / "disk" / "checkpoints" / name)
    evaluate(config_of_run(run).config, Mesh.single())
    assert f"{url}/step_00000006" in "".join(capsys.readouterr().out.split())
    said = export_model(run, tmp_path / "exported"), export_model(tmp_path / "disk", tmp_path / "from_disk")
    assert f"{url}/step_00000006" in said[0]
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("exported", "from_disk")]
    assert weights[0] == weights[1]

    damaged = place_of(url) / "step_00000006" / "state.json"
    with damaged.writing() as file:
        file.write(b"{}")
    assert str(best_or_newest(run)) == f"{url}/step_00000005"
    assert names(place_of(url))[1:] == ["step_00000005", "step_00000006.damaged", "step_00000006.damaged.txt"]
    with pytest.raises(CheckpointError, match="checkpoint.url = None: expected memory://bucket/runs/mine, where"):
        train(config_of(text, run, None), Mesh.single())
    with pytest.raises(CheckpointError, match="checkpoint.resume = False: .* memory://bucket/runs/mine holds"):
        train(config_of(text, run, url, **{"checkpoint.resume": False}), Mesh.single())
    shutil.rmtree(tmp_path / "disk" / "checkpoints.url", ignore_errors=True)
    with pytest.raises(CheckpointError, match="checkpoint.url = 'memory://other/x': expected .*disk/checkpoints"):
        train(config_of(text, tmp_path / "disk", "memory://other/x"), Mesh.single())


class Killed(BaseException):
    pass


def test_a_kill_at_any_change_leaves_what_was_committed(text, url, tmp_path, monkeypatch):
    """Every object that is put, copied or removed is one moment."""
    run, store = tmp_path / "run", fsspec.filesystem("memory")
    config = config_of(text, run, url, **{"checkpoint.asynchronous": False, "checkpoint.keep": 1})
    left, committed = [10**9], []
    for name in ("cp_file", "rm_file", "open"):
        real = getattr(type(store), name)

        def counted(self, path, *args, real=real, name=name, **kwargs):
            if name != "open" or (args and args[0] == "wb"):
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return real(self, path, *args, **kwargs)

        monkeypatch.setattr(type(store), name, counted)
    parts = TrainParts(on_checkpoint=(lambda state, path: committed.append(state.step),))
    assert train(config.changed({"train.steps": 1}), Mesh.single(), parts) == 0
    kept = {key: file.getvalue() for key, file in store.store.items()}
    folder = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    calls = 0
    while True:
        store.store.clear()
        for key, content in kept.items():
            store.pipe_file(key, content)
        for name, content in folder.items():
            (run / name).write_bytes(content)
        left[0], committed[:] = calls, []
        try:
            train(config.changed({"train.steps": 2}), Mesh.single(), parts)
        except Killed:
            left[0] = 10**9
            assert newest_verified(run, Mesh.single())[1] == []  # as a command that only reads sees it
            remove_leftovers(place_of(url))
            found, damages = newest_verified(run, Mesh.single())
            assert found is not None and not damages, (calls, names(place_of(url)))
            assert found.name == "step_00000002" if committed else found.name in ("step_00000001", "step_00000002")
            assert not any((place_of(url) / name / UNFINISHED).exists() for name in names(place_of(url)))
        else:
            break
        calls += 1
    assert calls > 15 and names(place_of(url)) == ["run.json", "step_00000002"]


def test_only_the_rows_that_are_asked_for_are_fetched(url, tmp_path, monkeypatch):
    tensors = {"a": torch.randn(6, 4), "b": torch.randn(3).to(torch.bfloat16), "c": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "file")
    path = place_of(url) / "file"
    with path.writing() as file:
        file.write((tmp_path / "file").read_bytes())
    opened, fetched = open_tensors(path), []
    real = ObjectPath.read
    monkeypatch.setattr(ObjectPath, "read", lambda self, a, b: fetched.append(b - a) or real(self, a, b))
    assert torch.equal(opened.get_slice("a")[2:4, 1:3], tensors["a"][2:4, 1:3]) and fetched == [2 * 4 * 4]
    for name, tensor in tensors.items():
        assert torch.equal(opened.get_slice(name)[:] if tensor.ndim else opened.get_slice(name)[()], tensor)
    assert opened.get_slice("b").get_dtype() == "BF16" and opened.get_slice("a").get_shape() == [6, 4]
    for content in (b"", b"\xff" * 8, b"\x08" + bytes(7) + b"no json!"):
        with path.writing() as file:
            file.write(content)
        with pytest.raises(OSError, match="is no safetensors file"):
            open_tensors(path)
    with pytest.raises(OSError, match="d cannot be read"):
        opened.get_slice("d")


def test_a_store_that_cannot_be_reached_is_one_line(text, tmp_path, monkeypatch):
    config = config_of(text, tmp_path, "warp://bucket/x")
    (problem,) = [p for p in check(config, Layout(), gather(config, 1)) if "checkpoint" in p.key]
    assert "checkpoint.url = 'warp://bucket/x': expected a store that can be written (warp://: " in str(problem)
    assert not check(config_of(text, tmp_path, None), Layout(), Facts())

    def no_network(*args, **kwargs):
        raise ConnectionError("no such host") if kwargs.get("host") else ValueError("no credentials")

    monkeypatch.setattr(fsspec, "filesystem", no_network)
    monkeypatch.setattr(answers, "WAITS_S", (0.0,))
    with pytest.raises(EnvironmentProblem, match="s3://bucket/x = no answer .*ValueError: no credentials: .*Fix: see"):
        place_of("s3://bucket/x/").exists()


@pytest.mark.full
def test_two_ranks_keep_their_checkpoints_in_s3(text, tmp_path, monkeypatch):
    """A server of the S3 protocol on this machine, through s3fs."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    try:
        _, port = server.get_host_and_port()
        for key, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
        }.items():  # fmt: skip
            monkeypatch.setenv(key, value)
        fsspec.filesystem("s3").mkdir("bucket")
        run, config = tmp_path / "run", tmp_path / "run.yaml"
        config.write_text(to_yaml(config_of(text, run, "s3://bucket/runs/mine", **{"parallel.tp": 2})))
        for words in (
            ["train", str(config)], ["train", str(config), "train.steps=6"], ["evaluate", str(run)],
            ["export", str(run), str(tmp_path / "exported")],
        ):  # fmt: skip
            done = roots(*words, ranks=2 if words[0] == "train" else 1)
            assert done.returncode == 0, done.stderr
        assert names(place_of("s3://bucket/runs/mine")) == ["run.json", "step_00000005", "step_00000006"]
        found, damages = newest_verified(run, Mesh.single())
        assert str(found) == "s3://bucket/runs/mine/step_00000006" and not damages
        assert not (place_of("s3://bucket/runs/mine") / "step_00000006" / UNFINISHED).exists()
    finally:
        server.stop()


@pytest.mark.parametrize("killed", ["while the old one is copied", "while the old one is removed"])
def test_a_kill_in_a_replacement_leaves_the_old_checkpoint(url, killed):
    folder = place_of(url)
    whole, part = {"a": b"1", "manifest.json": b"{}"}, {"a": b"1"}
    final, aside = (whole, part) if killed == "while the old one is copied" else (part, whole)
    for name, files in (("step_4", final), (".step_4.replaced", aside)):
        for file, content in files.items():
            with (folder / name / file).writing() as out:
                out.write(content)
    remove_leftovers(folder)
    assert names(folder) == ["step_4"]
    assert sorted(names(folder / "step_4")) == ["a", "manifest.json"]


def test_keys_in_an_url_and_a_store_that_takes_nothing_are_told_before_the_start(text, tmp_path, monkeypatch):
    made = config_of(text, tmp_path, "memory://me:secret@bucket/run")
    assert "keys belong into the environment" in str(gather(made, 1).store_trouble)

    def refuse(*_, **__):
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", refuse)
    assert "AccessDenied" in str(gather(config_of(text, tmp_path, "memory://bucket/run"), 1).store_trouble)


HANDED_ON = {
    "file:///etc": "file:// is none of the object stores s3, ",
    "local:///tmp/run": "local:// is none",
    "/etc": "one URL, as s3://",
    "simplecache::s3://bucket/run": "one URL, as s3://",
    "zip://x::file:///tmp/a.zip": "one URL, as s3://",
    "http://169.254.169.254/latest": "http:// is none",
    "s3://key:secret@bucket/run": "keys belong into the environment",
    "s3://bucket/../other": "a bucket and plain names after it",
    "s3://bucket/run?versionId=3": "a bucket and plain names",
    "s3://bucket/*": "a bucket and plain names",
    "s3://bucket/a\ns3://bucket/b": "one URL, as|a bucket and plain",
    "s3://": "a bucket and plain names",
    "": "one URL, as",
    "memory://" + "a" * 2000: "a bucket and plain names",
}


@pytest.mark.parametrize("url", HANDED_ON)
def test_the_folder_of_somebody_else_leads_to_no_file_and_no_other_host(url, text, tmp_path, monkeypatch):
    """A file in it said where its checkpoints are, and fsspec would open whatever that is."""
    (tmp_path / "config.yaml").write_text(to_yaml(config_of(text, tmp_path, None)))
    (tmp_path / "checkpoints.url").write_text(url)
    monkeypatch.setattr(fsspec, "filesystem", lambda *_, **__: pytest.fail("a file system was opened"))
    for reads in (best_or_newest, checkpoints_folder, found_steps):
        said = f"checkpoints.url = .*expected the URL .*({HANDED_ON[url]}).*Fix: put back"
        with pytest.raises(CheckpointError, match=said):
            reads(tmp_path)
    if url:
        made = config_of(text, tmp_path / "own", None).changed({"checkpoint.fallback_folder": url})
        assert "://" not in url or gather(made, 1).store_trouble


def test_a_run_does_not_go_on_with_what_another_has_in_the_store(text, url, tmp_path):
    """The second run took the checkpoints of the first for its own, and went on with them."""
    first, second = tmp_path / "first", tmp_path / "second"
    assert train(config_of(text, first, url), Mesh.single()) == 0
    own = json.loads((first / "run.json").read_text())["id"]
    before = dict(fsspec.filesystem("memory").store)
    for changes in ({}, {"checkpoint.resume": False}, {"train.steps": 9, "checkpoint.run_id": "other"}):
        with pytest.raises(
            CheckpointError, match=f"this run alone: its checkpoints are of run {own}, start 1 of {first}"
        ):
            train(config_of(text, second, url, **changes), Mesh.single())
    assert dict(fsspec.filesystem("memory").store) == before
    taken = config_of(text, second, url, **{"checkpoint.run_id": own, "train.steps": 6})
    assert train(taken, Mesh.single()) == 0 and list(found_steps(second)) == [5, 6]
    with pytest.raises(CheckpointError, match=f"checkpoint.run_id = 'other': expected {own}, the run that is in"):
        train(taken.changed({"checkpoint.run_id": "other"}), Mesh.single())
    (first / "run.json").write_text('{"id": "other"}')
    with pytest.raises(CheckpointError, match=f"are of run {own}, .*Fix: choose another checkpoint.url"):
        best_or_newest(first)
    assert names(place_of(url)) == ["run.json", "step_00000005", "step_00000006"], "nothing was set aside"


def test_an_earlier_start_of_the_run_does_not_save_any_more(text, url, tmp_path, caplog):
    """A node that was cut off goes on, or the run's folder was copied: both would replace and delete what the other
    saves."""
    run, copy = tmp_path / "run", tmp_path / "copy"

    def another_begins(state, report):
        if state.step == 2:
            shutil.copytree(run, copy)
            assert train(config_of(text, copy, url, **{"optim.lr": 0.1}), Mesh.single()) == 0

    config = config_of(text, run, url, **{"train.steps": 6, "checkpoint.asynchronous": False})
    config = config.changed({"checkpoint.max_failures": 2})
    with pytest.raises(CheckpointError, match=f"no other run saves: another has begun there since, start 2 of {copy}"):
        train(config, Mesh.single(), TrainParts(on_step=(another_begins,)))
    last = json.loads((place_of(url) / "step_00000004" / "state.json").read())
    assert last["config"]["optim"]["lr"] == 0.1 and names(place_of(url))[1:] == ["step_00000003", "step_00000004"]


def test_two_runs_that_save_in_one_fallback_folder_keep_their_own_steps(text, tmp_path, monkeypatch):
    """The second one's step replaced the first one's."""
    elsewhere, real = tmp_path / "elsewhere", save_job.write_checkpoint
    full = [True]

    def save(into, *rest, **more):
        if full[0] and into.parent != elsewhere:
            raise CheckpointError("No space left on device")
        return real(into, *rest, **more)

    monkeypatch.setattr(save_job, "write_checkpoint", save)
    said = {}
    for name in ("a", "b"):
        config = config_of(text, tmp_path / name, None, **{"checkpoint.fallback_folder": str(elsewhere)})
        assert train(config.changed({"optim.lr": {"a": 0.1, "b": 0.2}[name]}), Mesh.single()) == 0
    full[0] = False
    for name in ("a", "b"):
        own = json.loads((tmp_path / name / "run.json").read_text())["id"]
        four = elsewhere / own / "checkpoints" / "step_00000004"
        rate = json.loads((four / "state.json").read_text())["config"]["optim"]["lr"]
        assert rate == {"a": 0.1, "b": 0.2}[name]
        config = config_of(text, tmp_path / name, None, **{"checkpoint.fallback_folder": str(elsewhere)})
        with pytest.raises(CheckpointError, match=f"but {four} is one. Fix: move it to {tmp_path / name}/checkpoints"):
            train(config, Mesh.single())
        said[name] = rate
    assert len(said) == 2
