"""Options of a command as a dataclass: one class per command, beside the code that reads it.

@dataclass class EvaluateOptions: limit: Annotated[int | None, typer.Option(help=...)] = None
@with_options def evaluate(run: Run, options: EvaluateOptions)  -->  roots evaluate RUN --limit 100
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Annotated, Any, get_args, get_origin, get_type_hints


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Make each field of the command's dataclass parameters a typer option, and build the dataclasses from the given
    values. Every field needs a default; tuples of text become repeatable options."""
    hints = get_type_hints(command, include_extras=True)
    classes = {name: hint for name, hint in hints.items() if isinstance(hint, type) and is_dataclass(hint)}
    shown: dict[str, inspect.Parameter] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        if name in classes:
            types = get_type_hints(classes[name], include_extras=True)
            shown |= {field.name: _option(field, types[field.name]) for field in fields(classes[name])}
        else:
            shown[name] = parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name])

    @functools.wraps(command)
    def called(**values: Any) -> None:
        built = {
            name: options(**{field.name: _value(field, values[field.name]) for field in fields(options)})
            for name, options in classes.items()
        }
        of_classes = {field.name for options in classes.values() for field in fields(options)}
        command(**{name: value for name, value in values.items() if name not in of_classes}, **built)

    called.__signature__ = inspect.Signature([*shown.values()])  # type: ignore[attr-defined]  # this is what typer reads
    called.__annotations__ = {name: parameter.annotation for name, parameter in shown.items()}
    return called


def _is_tuple(field: Field[Any]) -> bool:
    return isinstance(field.default, tuple)


def _option(field: Field[Any], annotation: Any) -> inspect.Parameter:
    """Parameter for typer, which has lists (None if not given) instead of tuples."""
    if _is_tuple(field):
        assert get_origin(annotation) is Annotated, field
        annotation = Annotated[(list[str] | None, *get_args(annotation)[1:])]
    default = None if _is_tuple(field) else inspect.Parameter.empty if field.default is MISSING else field.default
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _value(field: Field[Any], given: Any) -> Any:
    return tuple(given or ()) if _is_tuple(field) else given
