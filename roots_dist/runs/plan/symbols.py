"""Let torch compute shapes that are plain numbers without sympy and torch._dynamo, which it imports for symbols.

    with without_symbols(): operations on the meta device      # 1 s less of processor time than the first one outside

torch's shape rules ask other modules whether sizes are equal, and have torch._dynamo mark functions that it must not
trace. With plain numbers the answers are trivial. Whatever else they ask is answered by the real module.
"""

from __future__ import annotations

import importlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any


def _are_equal(one: Any, other: Any) -> bool:
    return tuple(one) == tuple(other) if isinstance(one, (tuple, list)) else bool(one == other)


class _Expression:
    """A type that no size has."""


ANSWERS: Mapping[str, Mapping[str, Any]] = {
    "sympy": {"Basic": _Expression},
    "torch.fx.experimental.symbolic_shapes": {
        **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious"), bool),
        "statically_known_true": bool,
        "sym_and": lambda *conditions: all(conditions),
        "sym_or": lambda *conditions: any(conditions),
        "sym_eq": _are_equal,
        "guard_int": int,
        "guarding_hint_or_throw": lambda number: number,
        "has_guarding_hint": lambda number: True,
        "is_nested_int": lambda number: False,
        "free_unbacked_symbols": lambda numbers: frozenset(),
    },
    "torch.utils._sympy.functions": {"Max": max},
}
"""Modules that are slow to import -> their functions and classes, for plain numbers."""
DYNAMO = "torch._dynamo"


class _Substitute(ModuleType):
    """Stands for a module. When something else of that one is asked for, all of them are imported."""

    def __init__(self, name: str, answers: Mapping[str, Any], leave: Callable[[], None]) -> None:
        super().__init__(name)
        self.__dict__.update(answers)
        self._leave = leave

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # import asks for __path__
            raise AttributeError(name)
        self._leave()
        return getattr(importlib.import_module(self.__name__), name)


@contextmanager
def without_symbols() -> Iterator[None]:
    """Keep torch from importing these modules. Nothing of it remains afterwards. No other thread may import modules of
    torch meanwhile."""
    untraced: weakref.WeakSet[Callable[..., Any]] = weakref.WeakSet()

    def disable(function: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        untraced.add(function)
        return function

    def leave() -> None:
        for name, module in substitutes.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]

    dynamo = {"disable": disable, "config": SimpleNamespace(error_on_nested_fx_trace=True)}
    every: Mapping[str, Mapping[str, Any]] = {**ANSWERS, DYNAMO: dynamo}
    missing = {name: answers for name, answers in every.items() if name not in sys.modules}
    substitutes = {name: _Substitute(name, answers, leave) for name, answers in missing.items()}
    sys.modules.update(substitutes)
    try:
        yield
    finally:
        leave()
        for function in untraced:  # torch._compile keeps there what `disable` has returned
            function.__dict__.pop("__dynamo_disable", None)
