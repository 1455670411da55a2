"""The base class of the config's sections: typed, frozen, unknown keys refused, whole numbers within bounds."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any

from annotated_types import Le
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from roots_dist.config.other_names import key_for
from roots_dist.errors import ConfigError, Problem, Short

LARGEST = 2**31 - 1
"""Largest whole number of a key that does not name another with `le`: products of a few of them are still exact in
int64 and in the float64 of a prediction."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __setattr__(self, name: str, value: object) -> None:
        expected, fix = "no assignment: a config stays as it is", "write config.changed({'section.key': value})"
        raise ConfigError([Problem(key=name, found=Short(value), expected=expected, fix=fix)])

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Pydantic's own names, else the error for a key that is not there, with the one that was meant."""
            if name.startswith("_"):
                return super().__getattr__(name)
            near = difflib.get_close_matches(name, type(self).model_fields, 1)
            known = f"it is called config.{key} here" if (key := key_for(name)) else "see docs/config.md for all keys"
            fix = f"did you mean {near[0]}" if near else known
            raise AttributeError(f"{name}: the config has no such key here. Fix: {fix}.")

    @field_validator("*")
    @classmethod
    def _is_usable(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "":
            raise PydanticCustomError("empty", "text that is not empty")
        if not isinstance(value, (int, tuple)):  # as most: a config has hundreds of keys, and is read at every start
            return value
        numbers = value if isinstance(value, tuple) else (value,)
        has_own = any(isinstance(limit, Le) for limit in cls.model_fields[str(info.field_name)].metadata)
        if not has_own and any(isinstance(number, int) and abs(number) > LARGEST for number in numbers):
            raise PydanticCustomError("beyond", f"whole numbers of at most {LARGEST:,}")
        return value
