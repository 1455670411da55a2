"""YAML in and out, for configs: plain data alone, each value with its line, nothing overwritten in silence.

A safe loader with these differences: a key written twice is refused, and so are aliases (a few lines of them unfold to
gigabytes), whole numbers in base 8 or 60, and characters that no path may have; `1e-4` is a number, and dates are text.
"""

from __future__ import annotations

import codecs
import difflib
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from roots_dist.errors import ConfigError, FileProblem, Problem
from roots_dist.files import where, why

Origins = dict[str, str]


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call] # types-PyYAML leaves it out
            raise yaml.MarkedYAMLError("aliases are not used here", problem_mark=event.start_mark)
        return super().compose_node(parent, index)


# YAML 1.1 wants a dot in every float and calls 2024-01-01 a date; its on/off/yes/no stay booleans as YAML says.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {  # what JSON has no word for: a config with such a value broke later
    tag: constructor
    for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] not in ("binary", "set", "omap", "pairs", "timestamp")
}


def _number(loader: _Loader, node: ScalarNode) -> int | float:
    """A number as people mean it: YAML 1.1 takes 010 for 8, and 12:30 for 750."""
    kind = "60" if ":" in node.value else "8" if re.fullmatch("[-+]?0[0-7_]+", node.value) else ""
    value = yaml.SafeLoader.yaml_constructors[node.tag](loader, node)
    if kind:
        raise yaml.MarkedYAMLError(problem=f"{node.value} is {value} in base {kind}", problem_mark=node.start_mark)
    return value  # type: ignore[no-any-return] # an int or a float, by the node's tag


for _tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
    _Loader.add_constructor(_tag, _number)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


UNUSABLE = re.compile("[\0\ud800-\udfff]")
"""Characters that neither a path nor UTF-8 has; YAML writes them as escapes, "\\0" and "\\ud800"."""
PAIR = re.compile("[\ud800-\udbff][\udc00-\udfff]")
"""One character beyond U+FFFF, as JSON escapes it."""


def _character(pair: re.Match[str]) -> str:
    return pair[0].encode("utf-16-le", "surrogatepass").decode("utf-16-le")


def unusable(tree: object, key: str, origins: Origins) -> Iterator[Problem]:
    """Problems of the texts that could be in no path and in no file of UTF-8, of all that is below a key."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from unusable(value, f"{key}.{name}" if key else str(name), origins)
    elif isinstance(tree, list):
        for index, value in enumerate(tree):
            yield from unusable(value, f"{key}.{index}", origins)
    elif isinstance(tree, str) and (odd := UNUSABLE.search(tree)):
        expected = f"a text without U+{ord(odd[0]):04X}, which is in no path"
        yield Problem(key=key, found=tree, expected=expected, fix="remove the character", origin=origins.get(key, ""))


class _Dumper(yaml.SafeDumper):
    """Lists of plain values on one line, as people write them."""


def _represent_list(dumper: yaml.SafeDumper, values: list[Any]) -> Node:
    plain = not any(isinstance(value, (dict, list)) for value in values)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", values, flow_style=plain)


_Dumper.add_representer(list, _represent_list)


def dump(tree: dict[str, Any]) -> str:
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def parse_file(path: Path) -> tuple[dict[str, Any], Origins]:
    """The tree of a config file, and the line of every key. Raises ConfigError if it is no mapping in YAML."""
    try:
        with path.open(encoding="utf-8") as file:
            source = file.read(LONGEST + 1)
    except (OSError, UnicodeDecodeError) as error:
        expected = "a YAML file that can be read"
        if isinstance(error, FileNotFoundError):
            expected = f"a YAML file: {where(path)}"
        fix = _remedy(path) if isinstance(error, OSError) else f"save it as UTF-8: iconv -f {_encoding(path)} -t UTF-8"
        raise _refusal(path, why(error), expected, fix) from None
    if len(source) > LONGEST:
        raise _refusal(
            path, "longer than any config", f"a YAML file of at most {LONGEST:,} characters", "check the path"
        )
    try:
        tree, origins = _parse(source, str(path), str(path))
    except ConfigError as error:
        if path.suffix.lower() not in ENDINGS:
            fix = "name a YAML file, such as those in configs/"
            raise ConfigError([replace(problem, fix=fix) for problem in error.problems]) from None
        raise ConfigError([_with_slip(problem, source) for problem in error.problems]) from None
    if tree is None:
        return {}, {}
    if isinstance(tree, dict):  # a section that is a word: what should have been its keys
        lines = [(n, slip) for n, line in enumerate(source.splitlines(), 1) if (slip := _slip(line))]
        if lines and any(
            not isinstance(section, (dict, type(None))) or ":" in str(key) for key, section in tree.items()
        ):
            number, slip = lines[0]
            found, origin = repr(source.splitlines()[number - 1].strip()), f"{path}:{number}"
            raise ConfigError([FileProblem(key=str(path), found=found, expected="YAML", fix=slip, origin=origin)])
    if not isinstance(tree, dict):
        raise _refusal(
            path,
            f"a {WORDS.get(type(tree), type(tree).__name__)}",
            "sections (model:, data:, train:, ...)",
            "see configs/quickstart.yaml",
        )
    return tree, origins


def _encoding(path: Path) -> str:
    """Probable encoding of a file that is not UTF-8: Windows marks UTF-16."""
    with path.open("rb") as file:
        return "UTF-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "LATIN1"


def _with_slip(problem: Problem, source: str) -> Problem:
    """The problem with what to change in its line, or in the one before, where that is one of the usual slips: the
    parser sees what is wrong with a line only in the next one."""
    place, _, number = problem.origin.rpartition(":")
    lines = source.splitlines()
    near = [int(number), int(number) - 1] if number.isdigit() else []
    for line in (line for line in near if 0 < line <= len(lines)):
        if (slip := _slip(lines[line - 1]) or _without_colon(lines[line - 1])) is not None:
            found = problem.found if line == near[0] else lines[line - 1].strip()
            return replace(problem, found=found, fix=slip, origin=f"{place}:{line}")
    return problem


def parse_value(key: str, source: str, origin: str) -> Any:
    """The value of an override, in YAML's syntax."""
    return _parse(source, key, origin)[0]


def _parse(source: str, name: str, origin: str) -> tuple[Any, Origins]:
    origins: Origins = {}
    loader = None
    try:
        loader = _Loader(source)
        node = loader.get_single_node()
        if node is None:
            return None, {}
        _walk(node, "", origin, origins)
        return loader.construct_document(node), origins
    except yaml.reader.ReaderError as error:
        at, code = error.position, ord(source[error.position])
        number, column = source.count("\n", 0, at) + 1, at - source.rfind("\n", 0, at)
        expected, fix = f"text that can be printed, but character {column} is U+{code:04X}", "remove it"
        if code == 0 and name == origin:
            fix = "save the file as UTF-8"
        if name != origin:
            raise ConfigError([Problem(key=name, found=source, expected=expected, fix=fix, origin=origin)]) from None
        found, place = repr(_around(source, at)), f"{origin}:{number}"
        raise ConfigError([FileProblem(key=name, found=found, expected=expected, fix=fix, origin=place)]) from None
    except (yaml.YAMLError, ValueError, KeyError, RecursionError) as error:
        mark = _mark(error, source)
        line = f"{origin}:{mark.line + 1}" if mark is not None and name == origin else origin
        reason = (
            getattr(error, "problem", None) or getattr(error, "context", None) or str(error) or type(error).__name__
        )
        found = source if name != origin else " ".join(reason.split())
        usual = "correct this line" if name == origin else "put the value into quotes"
        problem = (Problem if name != origin else FileProblem)(
            key=name,
            found=found,
            expected="YAML" if name == origin else f"a value in YAML's syntax ({' '.join(reason.split())})",
            fix=next((fix for words, fix in REASONS.items() if words in reason), usual),
            origin=line,
        )
        raise ConfigError([problem]) from None
    finally:
        if loader is not None:
            loader.dispose()


def _mark(error: Exception, source: str) -> Any:
    """The place of a mistake; None if there is none. It is the beginning of what is not closed or has no colon, which
    the parser notices in a line behind it."""
    mark, begin = getattr(error, "problem_mark", None), getattr(error, "context_mark", None)
    if mark is None or begin is None or begin.line >= mark.line:
        return mark
    context = getattr(error, "context", None) or ""
    lines = source.splitlines()
    is_key = mark.line >= len(lines) or re.match(r"\s*\w+:(\s|$)", lines[mark.line])
    is_open = "quoted scalar" in context or (is_key and "flow" in context)
    return begin if is_open or "simple key" in context else mark


def _around(source: str, at: int) -> str:
    """The line of a character, or what of it is near."""
    start, end = source.rfind("\n", 0, at) + 1, source.find("\n", at)
    return source[max(start, at - 20) : min(at + 20, end if end >= 0 else len(source))]


def _walk(node: Node, prefix: str, origin: str, origins: Origins) -> None:
    """Write down the line of every key; refuse one that is written twice."""
    if isinstance(node, ScalarNode):
        node.value = PAIR.sub(_character, node.value)
    if isinstance(node, SequenceNode):
        for index, value in enumerate(node.value):
            _note(f"{prefix}{index}", value, origin, origins)
    elif isinstance(node, MappingNode):
        for key, value in node.value:
            if not isinstance(key, ScalarNode):
                raise yaml.MarkedYAMLError("a key must be a word", problem_mark=key.start_mark)
            name = f"{prefix}{key.value}"
            if name in origins:
                raise yaml.MarkedYAMLError(f"{name} is written twice", problem_mark=key.start_mark)
            _note(name, value, origin, origins, key)


def _note(name: str, value: Node, origin: str, origins: Origins, key: Node | None = None) -> None:
    origins[name] = f"{origin}:{(key or value).start_mark.line + 1}"
    _walk(value, f"{name}.", origin, origins)


def _refusal(path: Path, found: str, expected: str, fix: str) -> ConfigError:
    return ConfigError([FileProblem(key=str(path), found=found, expected=expected, fix=fix)])


def _remedy(path: Path) -> str:
    if re.match(r"\w+\.\w+=", str(path)):
        return "name the config before the overrides"
    if path.is_symlink() and not path.exists():
        return f"the file is a link to {os.readlink(path)}, where there is none: remove the link, or correct it"
    if re.match(r"\w+:/", str(path)):
        return "download it first, and give the path of the file"
    if "\\" in str(path) and (unix := Path(str(path).replace("\\", "/"))).exists():
        return f"did you mean {unix}"
    if (path / "config.yaml").is_file():
        return f"the config of this run is {path / 'config.yaml'}"
    named = Path("configs") / f"{path.name.removesuffix('.yaml')}.yaml"
    if named.is_file() and not path.exists():
        return f"did you mean {named}"
    folder = path if path.is_dir() else path.parent
    beside = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    stems = [name.removesuffix(".yaml") for name in beside]
    if not path.is_file() and (close := difflib.get_close_matches(path.stem, stems, n=1, cutoff=0.7)):
        return f"did you mean {folder / close[0]}.yaml"
    return (
        f"name one of the files there: {', '.join(beside[:12])}"
        if beside
        else "give the path of a config, as configs/quickstart.yaml"
    )


WORDS = {list: "list", str: "text", int: "number", float: "number", bool: "word"}
"""Type of what a file holds instead of sections -> its name."""
ENDINGS = ("", ".yaml", ".yml", ".json")
"""Endings of files that may be configs with a slip."""
LONGEST = 1 << 24
"""Characters of a config: a device never ends."""
REASONS = {
    "mapping values are not allowed": "indent it as the line above, or put a value with a colon into quotes",
    "end of stream": "close the quotes",
    "expected ',' or": "close the bracket, or put a value with a colon into quotes",
    "expected <block end>": "indent it as the keys above it",
    "is written twice": "remove one of the two",
    "in base 8": "write it without the leading 0, or put it into quotes if it is text",
    "in base 60": "write one number without colons, or put it into quotes if it is text",
}
"""Words of the parser -> what to do."""
LOOKALIKES = {"：": ":", "，": ",", "“": '"', "”": '"', "‘": "'", "’": "'", "\u00a0": " ", "　": " "}
"""Characters of other keyboards and of word processors -> those of YAML."""


def _slip(line: str) -> str | None:
    """The fix for a line of YAML with one of a few common slips; None if it has none of them."""
    body = line.split("#")[0]
    if "\t" in body:
        return "indent with spaces: this line has a tab"
    for odd, plain in LOOKALIKES.items():
        if odd in body:
            shown = "a space" if plain == " " else plain
            return f"write {shown} instead of {odd if odd.strip() else f'U+{ord(odd):04X}'}"
    if found := re.match(r"\s*([A-Za-z_]\w*):([^\s:/\\][^:]*)$", body.rstrip()):
        return f"write a space after the colon, {found[1]}: {found[2]}"
    if found := re.match(r"\s*([A-Za-z_]\w*)\s*=\s*(\S.*)$", body.rstrip()):
        return f"write a colon, {found[1]}: {found[2]}"
    return None


def _without_colon(line: str) -> str | None:
    """The fix for a line that is a key without a colon, alone or before its value; None if it is none."""
    found = re.match(r"\s*([A-Za-z_]\w*)(?:\s+([^\s:\[\]{}\"',]+))?$", line.split("#")[0].rstrip())
    return None if found is None else f"write a colon, {found[1]}: {found[2] or ''}".rstrip()
