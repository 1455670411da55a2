"""The base class of the config's sections: typed, frozen, unknown keys refused, whole numbers within bounds."""

from __future__ import annotations

from typing import Any

from annotated_types import Le
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from roots_dist.errors import ConfigError, Problem, Short

LARGEST = 2**31 - 1
"""Largest whole number of a key that does not name another with `le`: products of a few of them are still exact in
int64 and in the float64 of a prediction."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    def __setattr__(self, name: str, value: object) -> None:
        expected, fix = "no assignment: a config stays as it is", "write config.changed({'section.key': value})"
        raise ConfigError([Problem(key=name, found=Short(value), expected=expected, fix=fix)])

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
