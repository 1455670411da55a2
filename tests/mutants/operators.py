"""Systematic mutants: every place of a file where an operator, a number, a condition or a statement could be another.

    source --mutations--> Mutation(line, what, mutated source), …

What changes no number is left out: annotations, decorators, docstrings, messages, assertions, what is raised, and on
which device a tensor is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
}  # fmt: skip
Variant = tuple[ast.expr | ast.stmt, ast.AST]
SILENT = (ast.Assert, ast.Raise, ast.Import, ast.ImportFrom, ast.AnnAssign, ast.JoinedStr)
"""Parts of a file in which nothing is mutated."""


@dataclass(frozen=True)
class Mutation:
    """A file with one thing changed."""

    line: int
    what: str
    """Before and after, on one line each."""
    place: str
    """The line, with [before -> after] where that stands: a name that other lines leave as it is."""
    source: str


def mutations(source: str) -> Iterator[Mutation]:
    """All of a file, in its order. Only the mutated part is written anew; everything else stays as it is."""
    text = source.encode()
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, mutated in _variants(ast.parse(source)):
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        before, after = text[begin:end].decode(), ast.unparse(mutated)
        after = f"({after})" if isinstance(mutated, ast.expr) and not isinstance(mutated, ast.Constant) else after
        changed = (text[:begin] + after.encode() + text[end:]).decode()
        what = f"{' '.join(before.split())} -> {' '.join(after.split())}"
        ends = text.find(b"\n", end)
        place = f"{text[starts[node.lineno - 1] : begin].decode()}[{what}]{text[end:ends].decode()}".strip()
        yield Mutation(node.lineno, what, place, changed)


def _variants(tree: ast.Module) -> Iterator[Variant]:
    """Each part that can be another, and what it could be."""
    silent = {id(part) for node in ast.walk(tree) if _is_silent(node) for part in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            kinds = [arg.annotation for arg in ast.walk(node.args) if isinstance(arg, ast.arg)]
            for part in (*kinds, node.returns):
                silent |= {id(inner) for inner in ast.walk(part)} if part is not None else set()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            silent |= {id(inner) for part in node.decorator_list for inner in ast.walk(part)}
    found = [pair for node in ast.walk(tree) for pair in _of(node) if id(pair[0]) not in silent]
    yield from sorted(found, key=lambda pair: (pair[0].lineno, pair[0].col_offset))


def _is_silent(node: ast.AST) -> bool:
    is_message = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Problem"
    return is_message or isinstance(node, SILENT)


def _of(node: ast.AST) -> Iterator[Variant]:
    if isinstance(node, (ast.If, ast.While, ast.IfExp)) and not _is_negated_itself(node.test):
        yield node.test, ast.UnaryOp(ast.Not(), node.test)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        yield node, ast.Compare(node.left, [COMPARISONS[type(node.ops[0])]()], node.comparators)
    elif isinstance(node, ast.BinOp) and type(node.op) in ARITHMETIC:
        yield node, ast.BinOp(node.left, ARITHMETIC[type(node.op)](), node.right)
    elif isinstance(node, ast.AugAssign) and type(node.op) in ARITHMETIC:
        yield node, ast.AugAssign(node.target, ARITHMETIC[type(node.op)](), node.value)
    elif isinstance(node, ast.BoolOp):
        yield node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield node, node.operand
    elif isinstance(node, ast.Constant) and type(node.value) is int:
        yield node, ast.Constant(node.value + 1)
    elif _changes_something(node):
        yield node, ast.Pass()
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg not in (None, "device"):
                rest = [other for other in node.keywords if other is not keyword]
                yield node, ast.Call(node.func, node.args, rest)


def _is_negated_itself(test: ast.expr) -> bool:
    """Whether what the condition becomes as an operator is what it becomes as a condition."""
    if isinstance(test, ast.UnaryOp):
        return isinstance(test.op, ast.Not)
    turned = (ast.Eq, ast.NotEq, ast.Is, ast.IsNot, ast.In, ast.NotIn)
    return isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], turned)


def _changes_something(node: ast.AST) -> bool:
    """A statement that is there for what it does, and without which names are still bound."""
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], (ast.Attribute, ast.Subscript))
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
