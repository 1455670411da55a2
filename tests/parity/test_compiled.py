"""Compiled kernels (train.compile) compute what single operations compute: each for itself, and whole layouts."""

import pytest
import torch
from cases import case, compare
from models import config

from roots_dist.testing.parity import trace
from roots_dist.testing.world import on_warm_world

pytestmark = pytest.mark.full

CASES = [
    case("llama", train__compile=True),
    case("llama", tp=2, sequence_parallel=True, model__attention_dropout=0.1, train__compile=True),
    case("llama", tp=2, pp=2, schedule="zb-h1", train__recompute="full", train__compile=True),
    case("gemma", tp=2, cp=2, train__compile=True),
    case("stable", dp=2, zero_stage=1, train__recompute="selective", train__compile=True),
    case("bert", tp=2, train__compile=True),
    case("t5", tp=2, sequence_parallel=True, train__compile=True),
]


@pytest.mark.parametrize("case", CASES)
def test_a_compiled_layout_computes_what_one_process_does(case):
    compare(case)


class Calls:
    """Keeps the first call of each function with other numbers, and with other tensors left out."""

    def __init__(self):
        self.found = {}

    def __call__(self, function):
        def kept(*args):
            told = tuple(arg.dim() if isinstance(arg, torch.Tensor) else arg for arg in args)
            args = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
            self.found.setdefault((function, told), args)
            return function(*args)

        return kept


BOUNDS = {torch.float64: 1e-12, torch.float32: 3e-6}


def each_compiled(rank: int, size: int, *names: str) -> dict[str, list[float]]:
    """Function -> number of kernels, largest relative differences in float64 and float32."""
    from unittest import mock

    from torch._inductor import metrics

    calls = Calls()
    with mock.patch("roots_dist.assembly.run.choose_fuse", return_value=calls):
        for name in names:
            trace(0, 1, config(name, model__layers=2, train__global_batch=2), 0, 1)
    found: dict[str, list[float]] = {}
    for (function, _), args in calls.found.items():
        entry = found.setdefault(function.__name__, [0, 0.0, 0.0])
        for number, dtype in enumerate(BOUNDS, 1):
            given = [a.to(dtype) if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]
            torch.compiler.reset()
            metrics.reset()
            compiled = torch.compile(function, fullgraph=True, dynamic=False)(*given)
            entry[0] = max(entry[0], metrics.generated_kernel_count)
            for a, b in zip(_several(compiled), _several(function(*given))):
                assert a.dtype == b.dtype and a.shape == b.shape, function
                entry[number] = max(entry[number], float((a.double() - b.double()).norm() / max(1, b.double().norm())))
    return found


def _several(out):
    return out if isinstance(out, tuple) else (out,)


def test_each_kernel_is_one_graph_and_computes_the_same():
    (found,) = on_warm_world(1, each_compiled, "llama", "gemma", "stable", "bert", "t5", timeout=1500)
    assert all(doubles <= 1e-12 and singles <= 3e-6 for _, doubles, singles in found.values()), found
