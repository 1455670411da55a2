"""Kernels of the layers' functions (train.compile): which there are, that they are pure, and who chooses them.

That they compute the same when they are compiled: tests/parity/test_compiled.py.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from roots_dist import environment
from roots_dist.assembly import fusing
from roots_dist.assembly.fusing import choose_fuse, wants_compiler
from roots_dist.checks import exact, readiness
from roots_dist.checks.facts import Facts
from roots_dist.config.activations import GATED
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError
from roots_dist.layout import Layout
from roots_dist.learning.models.activations import FUNCTIONS, activation
from roots_dist.testing.parity import FLOAT64_BOUNDS, differences, merge, trace
from roots_dist.testing.world import on_warm_world
from roots_dist.world import rng
from roots_dist.world.fuse import Compiler, eager
from roots_dist.world.mesh import Axis, Mesh
from tests.parity.models import config as model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEAD = {"highest", "sums", "gradient"}
RMSNORM, DROPOUT = {"_rms", "_rms_backward_of_all"}, {"_wholly_dropped"}
KERNELS = {
    "llama": {*HEAD, *RMSNORM, *DROPOUT, "rotate", "_swiglu", "_swiglu_backward"},
    "stable": {*HEAD, *DROPOUT, "rotate"},
    "gemma": {*HEAD, *RMSNORM, "rotate", "_geglu", "_geglu_backward"},
    "bert": {*HEAD, *DROPOUT, "dropped_softmax", "dropped_softmax_backward"},
    "t5": {*HEAD, *RMSNORM, *DROPOUT, "dropped_softmax", "dropped_softmax_backward"},
}
"""A model of tests/parity/models.py -> the functions that its layers hand over."""


class Recorder:
    """Stands for the compiler: notes what is called, and fails where a function writes to what it is given, returns
    it, or is given what it could not be compiled for."""

    def __init__(self):
        self.called = Counter()

    def __call__(self, function):
        def fused(*args):
            given = [arg for arg in args if isinstance(arg, Tensor)]
            assert all(isinstance(arg, Tensor | int | float | bool | None) for arg in args), function
            before = [tensor.clone() for tensor in given]
            with torch.no_grad():
                out = function(*args)
            assert all(torch.equal(a, b) for a, b in zip(given, before)), f"{function} writes to its arguments"
            made = {tensor.untyped_storage()._cdata for tensor in tree_leaves(out)}
            assert not made & {tensor.untyped_storage()._cdata for tensor in given}, f"{function} returns an argument"
            self.called[function.__name__] += 1
            return out

        return fused


@pytest.mark.parametrize("name", KERNELS)
def test_layers_hand_over_pure_functions(name):
    config = model(name, model__layers=2, train__global_batch=2)
    config = config.changed({"model.decoder_layers": 1}) if name == "t5" else config
    recorder = Recorder()
    with mock.patch("roots_dist.assembly.run.choose_fuse", return_value=recorder):
        found = merge([trace(0, 1, config, 0, 1)])
    assert {*recorder.called} == KERNELS[name]
    rows = differences(merge([trace(0, 1, config, 0, 1)]), found, FLOAT64_BOUNDS)
    assert all(row.passed for row in rows), "\n".join(map(str, rows))


@pytest.mark.parametrize("name", GATED)
def test_a_gated_activation_keeps_its_inputs_and_has_autograds_gradients(name):
    draw = torch.Generator().manual_seed(1)
    gate, up, grad = (torch.randn(3, 5, generator=draw, dtype=torch.float64) for _ in range(3))
    of_two, kept = activation(Config(), name), []

    def gradients(function: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
        given = [x.clone().requires_grad_() for x in (gate, up)]
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            out = function(*given)
        return [out.detach(), *torch.autograd.grad(out, given, grad)]

    found = gradients(of_two)
    assert len(kept) == 2
    plain = gradients(lambda gate, up: FUNCTIONS[GATED[name]](gate) * up)
    torch.testing.assert_close(found, plain, rtol=1e-13, atol=1e-13)


def asked(value: object, **more: object) -> Config:
    return Config().changed({"train.compile": value, **more})


def test_auto_compiles_on_a_gpu_alone_and_never_an_exact_run():
    assert [wants_compiler(asked("auto"), device) for device in (CPU, CUDA)] == [False, True]
    assert [wants_compiler(asked(value), CPU) for value in (True, False)] == [True, False]
    assert not wants_compiler(asked("auto", **{"train.exact": {"data": 2}}), CUDA)
    assert choose_fuse(asked("auto"), Mesh.single()) is eager


def test_exact_runs_refuse_it_by_name():
    config = asked(True, **{"train.exact": {"data": 2}, "advanced.threads": 1})
    (problem,) = exact.check(config, Layout(), [8])
    assert problem.key == "train.compile" and "with train.exact" in problem.expected


def test_a_machine_without_a_compiler_is_refused_before_the_first_process_group():
    (problem,) = readiness.check(asked(True, **{"data.train": ["c"]}), Layout(), Facts(compiler=False))
    assert problem.key == "train.compile" and "apt-get install g++" in problem.fix and "\n" not in str(problem)
    for config, facts in ((asked("auto"), Facts(compiler=False)), (asked(True), Facts())):
        assert "train.compile" not in [p.key for p in readiness.check(config, Layout(), facts)]


def test_the_compiler_is_looked_for_where_torch_does(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert not environment.has_cpp_compiler()
    for name in ("g++", "mine"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    assert environment.has_cpp_compiler()
    for name, found in (("mine", True), ("yours", False)):
        monkeypatch.setenv("CXX", name)
        assert environment.has_cpp_compiler() == found


class Elsewhere(Axis):
    """A world in which another rank cannot compile."""

    def sum_(self, tensor):
        return tensor.add_(1)


@pytest.mark.parametrize(
    "world, trouble, said",
    [
        (Axis("world"), "no g++ at all", r"no g\+\+ at all"),
        (Elsewhere("world"), None, "another rank"),
    ],
)
def test_where_a_rank_cannot_compile_none_does(world, trouble, said, caplog):
    mesh = replace(Mesh.single(), world=world)
    with mock.patch.object(fusing, "why_not", return_value=trouble):
        with pytest.raises(ConfigError, match=f"train.compile = True: expected .*{said}.*Fix: install g\\+\\+"):
            choose_fuse(asked(True), mesh)
        with caplog.at_level(logging.WARNING), mock.patch.object(fusing, "wants_compiler", return_value=True):
            assert choose_fuse(asked("auto"), mesh) is eager
    assert re.search(said, caplog.text) and caplog.text.count("\n") == 1


def compile_here(rank: int, size: int) -> list[object]:
    """A mask by single operations, and by those of the graph that is traced; and what is said of a compiler that
    fails."""

    def failing(graph, inputs):
        raise RuntimeError("no headers\nand much more")

    torch.compiler.reset()
    x, rows = torch.linspace(-3, 3, 600).view(3, 200), rng.fold(7, torch.arange(3))
    masks = [
        fuse(rng._wholly_dropped)(x, rows, rng.limit_of(0.3), 1 / 0.7, 5) for fuse in (eager, Compiler("aot_eager"))
    ]
    return [*masks, fusing.why_not(Compiler(failing), CPU)]


def test_a_traced_mask_is_the_same_and_a_failure_is_told_in_one_line():
    """In a process that has what is imported for it."""
    ((plain, compiled, told),) = on_warm_world(1, compile_here)
    assert torch.equal(plain, compiled) and 0.2 < (plain == 0).float().mean() < 0.4
    assert "no headers and much more" in told and len(told) <= fusing.MOST_LETTERS
