"""docs/config.md, made from the config tree itself: every key with its default, what it may be, and its meaning.

    python docs/make_config.py        roots_dist/config/sections.py --> docs/config.md

tests/test_readme.py fails while the page does not say what the tree says.
"""

from __future__ import annotations

from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from roots_dist.config.other_names import OTHER_NAMES
from roots_dist.config.schema import Config
from roots_dist.config.sections import Source

PAGE = Path(__file__).with_name("config.md")
HEAD = """\
# The config

A run is one YAML file ([configs/](../configs)) over one typed tree. What a file leaves out has the default below; what it
misspells is refused, with the nearest known key. So is a name of Megatron-LM, DeepSpeed, nanoGPT or Hugging Face ("elsewhere" below,
whatever section or dashes are before it), with the name that the key has here, or with a value in the unit of ours
(`warmup_ratio=0.1`), and their word for a value (`rope`, `bfloat16`, `1F1B`). On the command line any key is replaced by
`section.key=value`, where the value is YAML: `optim.lr=1e-3`, `parallel.sequence_parallel=true`, `'train.batch_ramp=[8, 8, 4000]'`.

    roots train configs/quickstart.yaml parallel.tp=1 parallel.pp=4 --print-config

shows the whole resolved tree and trains nothing. Below the tree it lists what keeps the config from running. It does not look for the
files and the memory that the run needs. A run keeps the tree as `config.yaml` in its folder. There is no key for data ranks: their
number dp is that of the processes, divided by tp × cp × pp. A whole number is at most 2,147,483,647 where no other bound is said.

*Made by `docs/make_config.py` from `roots_dist/config/sections.py` and `model.py`.*
"""
WORDS = {int: "whole number", float: "number", bool: "true, false", str: "text"}
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


def allowed(kind: Any, info: FieldInfo) -> str:
    """`whole number ≥ 1`, `cosine, linear`, `text, or null`"""
    if get_origin(kind) is Annotated:
        return " or ".join(map(mapping, get_args(get_args(kind)[0])))
    inner = [part for part in get_args(kind) if part is not NoneType]
    if get_origin(kind) is Literal:
        return ", ".join(map(default, inner))
    if NoneType in get_args(kind):
        return f"{allowed(inner[0], info)}, or null"
    if get_origin(kind) is tuple:
        if inner[0] is Source:
            return "prefix, or list of prefixes or of {path, weight}"
        if get_origin(inner[0]) is Literal:
            return f"list of {allowed(inner[0], info)}"
        return "list of text" if inner[-1] is Ellipsis else f"list of {len(inner)} numbers"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return mapping(kind)
    limits = [f"{sign} {number(getattr(m, name))}" for name, sign in BOUNDS for m in info.metadata if hasattr(m, name)]
    return " ".join([WORDS[kind], " and ".join(limits)]).strip()


def number(limit: float) -> str:
    return f"{limit:,}" if isinstance(limit, int) else f"{limit:g}"


def mapping(record: type[BaseModel]) -> str:
    """`{type: linear, factor}`, `{tensor, data}`"""
    types = [get_args(info.annotation) for name, info in record.model_fields.items() if name == "type"]
    names = list(record.model_fields)
    return f"{{{', '.join([f'type: {types[0][0]}', *names[1:]] if types else names)}}}"


def default(value: object) -> str:
    """As YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if value == ():
        return "[]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def rows(section: type[BaseModel], title: str) -> list[str]:
    lines = ["| key | default | may be | meaning |", "|---|---|---|---|"]
    for name, info in section.model_fields.items():
        assert info.description, f"{section.__name__}.{name} has no description"
        elsewhere = ", ".join(OTHER_NAMES.get(f"{title}.{name}", ()))
        meaning = f"{info.description.rstrip('.')}. Elsewhere: {elsewhere}." if elsewhere else info.description
        cells = (f"`{name}`", default(info.default), allowed(info.annotation, info), meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return lines


def page() -> str:
    parts = [HEAD.rstrip()]
    for name, info in Config.model_fields.items():
        section = info.annotation
        doc = vars(section).get("__doc__") or ""
        parts += ["", f"## {name}", "", *([doc.strip(), ""] if doc else []), *rows(section, name)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
