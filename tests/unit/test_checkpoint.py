"""A checkpoint has no layout: what one layout saves, every other one reads back bit for bit, and faults are named."""

import hashlib
import json
import resource
import shutil
import zlib
from pathlib import Path

import pytest
import torch
from checkpoints import newest
from safetensors.torch import load_file, save_file
from torch import nn

from roots_dist.errors import CheckpointError
from roots_dist.layout import Layout
from roots_dist.parallel.optim.trainable import Trainable
from roots_dist.parallel.zero.seam import STATE
from roots_dist.storage.checkpoint.format import Manifest, plan_shards
from roots_dist.storage.checkpoint.load import load, load_initial_weights, load_weights
from roots_dist.storage.checkpoint.save import save
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.world.mesh import Mesh
from roots_dist.world.sharding import Param, ShardSpec

LAYERS = 4
EMBED = "embed.tokens.weight"


def specs(tp: int, layers: int = LAYERS) -> dict[str, ShardSpec]:
    """Every kind of parameter: cut by rows, by columns, into fewer parts than ranks, not at all, tied."""
    layer = {
        "query.weight": ShardSpec(shape=(16, 8), shard_dim=0),
        "key.weight": ShardSpec(shape=(8, 8), shard_dim=0, shards=min(tp, 2)),
        "down.weight": ShardSpec(shape=(8, 24), shard_dim=1),
        "norm.weight": ShardSpec(shape=(8,)),
        "query.bias": ShardSpec(shape=(16,), shard_dim=0),
    }
    return {EMBED: ShardSpec(shape=(64, 8), shard_dim=0)} | {
        f"blocks.{i}.{name}": spec for i in range(layers) for name, spec in layer.items()
    }


def whole(name: str, kind: str, shape: tuple[int, ...], dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{kind}/{seed}".encode()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def stage(mesh: Mesh, layers: int = LAYERS, dtype: torch.dtype = torch.float32) -> list[Param]:
    """What this pipeline rank holds: a run of layers, the embedding on the first, its copy on the last."""
    first, last = mesh.pp.rank == 0, mesh.pp.rank == mesh.pp.size - 1
    per_rank = -(-layers // mesh.pp.size)
    mine = [f"blocks.{i}." for i in range(mesh.pp.rank * per_rank, (mesh.pp.rank + 1) * per_rank)]
    found = []
    for name, spec in specs(mesh.tp.size, layers).items():
        if name == EMBED and last and not first:
            spec = ShardSpec(shape=spec.shape, shard_dim=0, copy_of=EMBED)
        if name.startswith(tuple(mine)) or (name == EMBED and (first or last)):
            found.append(Param(name, nn.Parameter(torch.zeros(spec.local_shape(mesh.tp), dtype=dtype)), spec, mesh.tp))
    return found


class FakeEngine:
    """Keeps state as the seam promises it: per parameter, this tensor rank's slice, whole over dp."""

    def __init__(self, params: list[Param], dtype: torch.dtype = torch.float32, seed: int | None = 0):
        self.optimizer_steps, self.trainable = {0: 0 if seed is None else 7}, {p.name: Trainable() for p in params}
        self.states = {}
        for p in params if seed is not None else ():
            self.states[p.name] = {k: whole(p.name, k, p.spec.shape, dtype, seed)[p.slices].clone() for k in STATE}

    def read_state(self, name, *, copy=True):
        return dict(self.states[name])

    def write_state(self, name, state):
        self.states[name] = state

    def unfreeze(self, step):
        pass

    def finish_loading(self, optimizer_steps):
        self.optimizer_steps = optimizer_steps


def save_on(rank: int, size: int, run: str, layout: Layout, step: int = 7, shard_bytes: int = 4000) -> str:
    mesh = Mesh.connect(layout, rank)
    params = stage(mesh)
    return str(save(Path(run), step, FakeEngine(params), params, mesh, {"samples": 56}, shard_bytes=shard_bytes))


def load_on(rank: int, size: int, folder: str, layout: Layout) -> dict:
    """Number of values compared, all equal bit for bit to what was saved."""
    mesh = Mesh.connect(layout, rank)
    params = stage(mesh)
    engine = FakeEngine(params, seed=None)
    state = load(Path(folder), engine, params, mesh)
    assert engine.optimizer_steps == {0: 7} and (state["step"], state["samples"]) == (7, 56)
    load_weights(Path(folder), params, mesh)
    assert engine.states.keys() == {p.name for p in params}
    for p in params:
        for kind in STATE:
            assert torch.equal(engine.states[p.name][kind], whole(p.name, kind, p.spec.shape)[p.slices]), (p.name, kind)
        assert torch.equal(p.tensor.detach(), whole(p.name, "weight", p.spec.shape)[p.slices])
    return {"values": sum(p.tensor.numel() for p in params)}


def start_on(rank: int, size: int, folder: str, layout: Layout) -> None:
    """Only weights are those that were saved; moments stay as they were. Copies of tied weights too."""
    mesh = Mesh.connect(layout, rank)
    params = stage(mesh)
    engine = FakeEngine(params, seed=1)
    load_initial_weights(Path(folder), engine, params, mesh)
    assert any(p.is_copy for p in params) == (0 < mesh.pp.rank == mesh.pp.size - 1)
    for p in params:
        for kind in STATE:
            expected = whole(p.name, kind, p.spec.shape, seed=0 if kind == "weight" else 1)
            assert torch.equal(engine.states[p.name][kind], expected[p.slices]), (p.name, kind)


def saved_alone(run: Path, *, step: int = 7, dtype: torch.dtype = torch.float32, seed: int = 0, **options) -> Path:
    mesh = Mesh.single()
    params = stage(mesh, dtype=dtype)
    return save(run, step, FakeEngine(params, dtype, seed), params, mesh, {"samples": 56}, **options)


@pytest.fixture(scope="module")
def of_one(tmp_path_factory) -> Path:
    return saved_alone(tmp_path_factory.mktemp("one"), shard_bytes=4000)


def tensors(folder: Path, stem: str) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read without the package: each must be in one file only."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob(f"{stem}-*-of-*.safetensors"):
        part = load_file(path)
        assert not found.keys() & part.keys()
        found |= part
    return found


@pytest.mark.parametrize(
    "layout", [Layout(tp=2, pp=2), Layout(tp=4), Layout(pp=2, dp=2), Layout(tp=2, dp=2), Layout(tp=2, cp=2)], ids=str
)
def test_what_a_layout_saves_is_whole_and_read_by_every_other(layout, of_one, tmp_path):
    folder = Path(on_warm_world(layout.world_size, save_on, str(tmp_path), layout, timeout=250)[0])
    for kind, stem in zip(STATE, ("model", "exp_avg", "exp_avg_sq")):
        found = tensors(folder, stem)
        assert found.keys() == specs(1).keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, whole(name, kind, specs(1)[name].shape))
    assert load_on(0, 1, str(folder), Layout())["values"] == sum(t.numel() for t in tensors(of_one, "model").values())


@pytest.mark.parametrize(
    "layout", [Layout(tp=4), Layout(pp=4), Layout(tp=2, pp=2), Layout(dp=3), Layout(cp=3)], ids=str
)
def test_every_layout_reads_what_one_process_saved(layout, of_one):
    on_warm_world(layout.world_size, load_on, str(of_one), layout, timeout=250)


def test_every_layout_starts_from_what_one_process_saved(of_one):
    layout = Layout(tp=2, pp=2)
    on_warm_world(layout.world_size, start_on, str(of_one), layout)


def test_files_are_as_hugging_face_names_them_and_hashed(of_one):
    index = json.loads((of_one / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(of_one, "model").values())
    manifest = json.loads((of_one / "manifest.json").read_text())
    assert manifest["files"].keys() == {p.name for p in of_one.iterdir()} - {"manifest.json"}
    for name, facts in manifest["files"].items():
        content = (of_one / name).read_bytes()
        assert facts == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert all((of_one / f).stat().st_size < 4000 + 2000 for f in files)  # the limit, and a header


def test_float64_is_kept_and_not_read_as_float32(tmp_path):
    folder = saved_alone(tmp_path, dtype=torch.float64)
    assert tensors(folder, "exp_avg")[EMBED].dtype == torch.float64
    params = stage(Mesh.single())
    with pytest.raises(CheckpointError, match=rf"{EMBED}: dtype = F64: expected F32"):
        load(folder, FakeEngine(params), params, Mesh.single())


def _cut(folder: Path) -> None:
    path = next(folder.glob("exp_avg-00001-*"))
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder: Path) -> None:
    path = next(folder.glob("model-00001-*"))
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def _rewrite(folder: Path, name: str, change) -> None:
    """A file that was changed on purpose, with a manifest that agrees."""
    path = folder / name
    change(path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _json(change):
    def apply(path: Path) -> None:
        value = json.loads(path.read_text())
        change(value)
        path.write_text(json.dumps(value))

    return apply


def _holder(folder: Path, name: str) -> str:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][name]


def _reshape(path: Path) -> None:
    content = load_file(path)
    save_file(content | {EMBED: content[EMBED].reshape(8, 64)}, path)


def _remove(path: Path) -> None:
    content = load_file(path)
    del content[EMBED]
    save_file(content, path)


INDEX = "model.safetensors.index.json"
FAULTS = {
    "cut short": (_cut, r"exp_avg-00001-of-\d+.safetensors: size = \d+: expected \d+ bytes"),
    "a bit flipped": (_flip, r"model-00001-of-\d+.safetensors: sha256 differs"),
    "a file gone": (lambda f: next(f.glob("exp_avg_sq-00002-*")).unlink(), r"exp_avg_sq-00002-of-.*: is missing"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "manifest.json: is missing"),
    "torn manifest": (lambda f: (f / "manifest.json").write_text('{"step": 7, "fi'), "manifest.json: cannot be read"),
    "a list as manifest": (lambda f: (f / "manifest.json").write_text("[]"), "expected an object, found list"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text("{}"), r"format = None: expected 2"),
    "later format": (lambda f: _json(lambda v: v.update(format=3))(f / "manifest.json"), "format = 3: expected 2"),
    "manifest without files": (lambda f: _json(lambda v: v.update(files={}))(f / "manifest.json"), "is not listed"),
    "manifest with a path": (
        lambda f: _json(lambda v: v["files"].update({"../x": {"bytes": 1, "sha256": ""}}))(f / "manifest.json"),
        "expected a plain file name",
    ),
    "index with a path": (
        lambda f: _rewrite(f, INDEX, _json(lambda v: v["weight_map"].update({EMBED: "../x.safetensors"}))),
        "weight_map is damaged",
    ),
    "index to an unlisted file": (
        lambda f: _rewrite(f, INDEX, _json(lambda v: v["weight_map"].update({EMBED: "x.safetensors"}))),
        "x.safetensors is not in the manifest",
    ),
    "tensor missing": (
        lambda f: _rewrite(f, INDEX, _json(lambda v: v["weight_map"].pop(EMBED))),
        rf"{INDEX}: {EMBED} is missing",
    ),
    "tensor not in its file": (lambda f: _rewrite(f, _holder(f, EMBED), _remove), rf"model-.*: {EMBED}: "),
    "wrong shape": (
        lambda f: _rewrite(f, _holder(f, EMBED), _reshape),
        rf"model-.*: {EMBED}: shape = \(8, 64\): expected \(64, 8\)",
    ),
    "other step": (lambda f: _rewrite(f, "state.json", _json(lambda v: v.update(step=8))), "step = 8: expected 7"),
    "not safetensors": (
        lambda f: _rewrite(f, _holder(f, EMBED), lambda p: p.write_bytes(b"\x80\x04]\x94.")),
        rf"model-.*: {EMBED}: ",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_nothing_is_changed(fault, of_one, tmp_path):
    change, words = FAULTS[fault]
    folder = shutil.copytree(of_one, tmp_path / "checkpoints" / "step_00000007")
    change(folder)
    params = stage(Mesh.single())
    engine = FakeEngine(params, seed=None)
    with pytest.raises(CheckpointError, match=words):
        load(folder, engine, params, Mesh.single())
    assert not engine.states and engine.optimizer_steps == {0: 0}


def test_another_model_is_refused(of_one):
    mesh = Mesh.single()
    more, fewer = stage(mesh, layers=LAYERS + 1), stage(mesh, layers=LAYERS - 1)
    with pytest.raises(CheckpointError, match=r"blocks.4.query.weight is missing. Fix: use the config"):
        load(of_one, FakeEngine(more), more, mesh)
    with pytest.raises(CheckpointError, match=r"blocks.3.down.weight and 4 more: not in this model"):
        load_weights(of_one, fewer)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_folder_is_given_as_text_or_as_a_path(kind, of_one):
    params = stage(Mesh.single())
    assert load(kind(of_one), FakeEngine(params, seed=None), params, Mesh.single())["step"] == 7
    assert load_weights(kind(of_one), params)["step"] == 7
    engine = FakeEngine(params, seed=None)
    engine.optimizer_steps = {0: 0, 5: 0}
    with pytest.raises(CheckpointError, match=r"state.json: parameters are trained from steps \[0\]: expected"):
        load(kind(of_one), engine, params, Mesh.single())


def flip_seen_by_one(rank: int, size: int, folder: str) -> str:
    """Hashes are shared out: one rank sees the damage, all say so."""
    mesh = Mesh.connect(Layout(tp=2, pp=2), rank)
    params = stage(mesh)
    with pytest.raises(CheckpointError) as error:
        load(Path(folder), FakeEngine(params), params, mesh)
    return str(error.value)


def test_all_ranks_report_what_one_has_seen(of_one, tmp_path):
    folder = shutil.copytree(of_one, tmp_path / "damaged")
    _flip(folder)
    words = on_world(4, flip_seen_by_one, str(folder), timeout=250)
    assert len(set(words)) == 1 and "sha256 differs" in words[0] and words[0].startswith("rank ")


def full_disk_on_one(rank: int, size: int, run: str) -> str:
    """The system refuses rank 2's writes; nothing is patched."""
    mesh = Mesh.connect(Layout(tp=2, pp=2), rank)
    params = stage(mesh)
    save(Path(run), 7, FakeEngine(params), params, mesh, {"samples": 56})
    if rank == 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError) as error:
        save(Path(run), 8, FakeEngine(params), params, mesh, {"samples": 64})
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return str(error.value)


def test_a_full_disk_on_one_rank_is_an_error_on_all_and_leaves_the_old_checkpoint(tmp_path):
    words = on_world(4, full_disk_on_one, str(tmp_path), timeout=250)
    assert len(set(words)) == 1 and "rank 2 (pp1 dp0 tp0): cannot write" in words[0] and "File too large" in words[0]
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000007"]
    assert load_on(0, 1, str(newest(tmp_path)), Layout())


@pytest.mark.parametrize("owners", [1, 2, 3, 8])
def test_the_plan_is_balanced_and_within_the_limit(owners):
    generator = torch.Generator().manual_seed(owners)
    sizes = torch.randint(1, 1000, (200,), generator=generator).tolist()
    plan = plan_shards(sizes, owners, limit=3000)
    load_of = [sum(s for s, o in zip(sizes, plan.owner) if o == who) for who in range(owners)]
    assert max(load_of) <= 4 / 3 * sum(sizes) / owners
    assert sorted(set(plan.shard)) == list(range(plan.num_shards))
    for number in range(plan.num_shards):
        mine = [i for i in range(200) if plan.shard[i] == number]
        assert sum(sizes[i] for i in mine) <= 3000 and len({plan.owner[i] for i in mine}) == 1


def test_a_manifest_survives_its_own_writing(of_one, tmp_path):
    manifest = Manifest.read(of_one)
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
