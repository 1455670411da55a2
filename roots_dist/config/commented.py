"""A config as a person begins to edit it: the keys that are set, each below what it means, and a schema for editors.

{section: {key: value}} --commented_yaml--> text          Config --editor_schema--> JSON schema of every key
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import yaml

from roots_dist.config.schema import Config
from roots_dist.config.sections import DataConfig

SCHEMA_FILE = "roots.schema.json"
WIDTH = 100


def commented_yaml(tree: Mapping[str, Mapping[str, Any]], head: str) -> str:
    """The sections with a comment above each key. The first line tells an editor where the schema is."""
    lines = [f"# yaml-language-server: $schema={SCHEMA_FILE}", *_comment(head, "")]
    for name, keys in tree.items():
        section: Any = Config.model_fields[name].annotation
        lines += ["", f"{name}:"]
        for key, value in keys.items():
            lines += _comment(section.model_fields[key].description or "", "  ")
            written = yaml.safe_dump({key: value}, default_flow_style=True, allow_unicode=True, width=10**6).strip()
            lines.append(f"  {written[1:-1]}")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")


def editor_schema() -> dict[str, Any]:
    """JSON schema of the config, for completion and checks in an editor."""
    schema = Config.model_json_schema()
    source = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Source"}]}
    keys = schema["$defs"][DataConfig.__name__]["properties"]
    for key in ("train", "validation"):  # a path stands for a source, and one source for a list of them
        several = {"anyOf": [*source["anyOf"], {"type": "array", "items": source}]}
        keys[key] = several | {"description": keys[key]["description"]}
    return schema
