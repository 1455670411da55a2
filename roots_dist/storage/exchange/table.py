"""What a family's table is made of, and how it becomes the list of all tensors of one model.

    Architecture (gpt2.py, llama.py, …) + the parameters that the model has
        --rules--> [Rule: their name, our names, form]

Both verbs walk the same rules: import splits theirs into ours, export joins ours into theirs. settings.py does the same
with the keys of config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count
from typing import Any, NamedTuple

from roots_dist.config.schema import Config
from roots_dist.storage.exchange.forms import SAME, Form

GENERATOR = "generator/"
"""Before the names of tensors that lie in a folder of that name (ELECTRA)."""
Shapes = Mapping[str, tuple[int, ...]]


class Entry(NamedTuple):
    """A row of a table. `{i}` is the number of a block, `*` is weight and bias; what the model has not is left out."""

    theirs: str
    ours: tuple[str, ...]
    form: Form = SAME
    copies: tuple[str, ...] = ()
    """Other names under which they keep the same tensor, too."""
    echoes: tuple[str, ...] = ()
    """Names under which some files have it again: read, if there is no other; must be equal; not written."""
    idle: tuple[str, ...] = ()
    """Names of tensors that their class has too and does not use: written as a copy, not looked at."""
    when: Callable[[Config], bool] = lambda config: True


class Rule(NamedTuple):
    """An entry for one tensor."""

    theirs: str
    ours: tuple[str, ...]
    form: Form
    copies: tuple[str, ...]
    echoes: tuple[str, ...]
    idle: tuple[str, ...]

    def within(self, folders: Sequence[str]) -> Rule:
        """Without the names that lie in other folders than these ("" and GENERATOR)."""
        if GENERATOR in folders:
            return self
        copies, echoes = (
            tuple(n for n in names if not n.startswith(GENERATOR)) for names in (self.copies, self.echoes)
        )
        return self._replace(copies=copies, echoes=echoes)

    @property
    def needed(self) -> tuple[str, ...]:
        """Under which names the tensor has to be there."""
        return (self.theirs, *self.copies)

    @property
    def written(self) -> tuple[str, ...]:
        return (*self.needed, *self.idle)

    @property
    def names(self) -> tuple[str, ...]:
        """All of theirs that are equal."""
        return (*self.needed, *self.echoes)


class Key(NamedTuple):
    """A key of config.json and the key of ours that says the same."""

    theirs: str
    ours: str
    default: object = None
    """What it is where config.json is silent."""
    words: Mapping[Any, object] | None = None
    """Their word -> ours, where these differ. The first of theirs is written."""
    older: tuple[str, ...] = ()
    """Names of it in older files."""
    shift: int = 0
    """Theirs is so much more than ours."""


class Fixed(NamedTuple):
    """A key of config.json of which our model has one value only."""

    theirs: str
    value: object
    """The one, which is written too."""
    default: object = ...
    """What it is where config.json is silent, if not that."""
    same: tuple[object, ...] = ()
    """Others that give the same function."""
    words: str = ""
    """What a user should have, if the value alone does not say it."""


class Head(NamedTuple):
    """What stands on the stack."""

    architecture: str
    """Name of the class in transformers."""
    learns: tuple[str, ...]
    """Objectives of ours with this head. An import gets the first."""
    entries: tuple[Entry, ...]


class Architecture(NamedTuple):
    """A model type of transformers, as data."""

    model_type: str
    base: str
    """Prefix of the stack's tensors, which some files leave out."""
    heads: tuple[Head, ...]
    stack: tuple[Entry, ...]
    ours: Mapping[str, object]
    """What our config says of every model of this type."""
    keys: tuple[Key, ...]
    fixed: tuple[Fixed, ...] = ()
    plain_heads: bool = True
    """As many key/value heads as query heads, and together as wide as the model."""
    even_width: bool = True
    """The model is as wide as a multiple of its heads, though these may have another width."""
    plain_ffn: bool = False
    """An MLP of four times the width, whatever config.json says."""
    unused: tuple[str, ...] = ()
    """Patterns of tensors that some files have and that change nothing."""
    flatten: Callable[[dict[str, Any]], dict[str, Any]] = lambda tree: tree
    """config.json with nested keys on one level."""
    nest: Callable[[dict[str, Any]], dict[str, Any]] = lambda tree: tree
    """The other way round, as both versions of transformers read it."""

    def head(self, architecture: str) -> Head | None:
        return next((head for head in self.heads if head.architecture == architecture), None)

    def head_for(self, objective: str) -> Head | None:
        return next((head for head in self.heads if objective in head.learns), None)


def rules(architecture: Architecture, head: Head, config: Config, shapes: Shapes) -> list[Rule]:
    """Every tensor of the model, in the order of the table. Each of our parameters is in one rule."""
    found = [
        rule
        for entry in (*architecture.stack, *head.entries)
        if entry.when(config)
        for rule in _expanded(entry, shapes)
    ]
    told = [name for rule in found for name in rule.ours]
    assert sorted(told) == sorted(shapes), (architecture.model_type, set(told) ^ set(shapes))
    claimed = {name for rule in found for name in rule.written}
    return [rule._replace(echoes=tuple(n for n in rule.echoes if n not in claimed)) for rule in found]


def _expanded(entry: Entry, shapes: Shapes) -> Iterator[Rule]:
    for i in count() if "{i}" in entry.theirs else range(1):
        some = False
        for kind in ("weight", "bias") if "*" in entry.theirs else ("",):

            def named(names: Sequence[str], i: int = i, kind: str = kind) -> tuple[str, ...]:
                return tuple(name.replace("{i}", str(i)).replace("*", kind) for name in names)

            ours = named(entry.ours)
            if all(name in shapes for name in ours):
                some = True
                (theirs,) = named([entry.theirs])
                copies, echoes, idle = map(named, (entry.copies, entry.echoes, entry.idle))
                yield Rule(theirs, ours, entry.form, copies, echoes, idle)
        if not some:
            return


def same(pairs: Mapping[str, str]) -> tuple[Entry, ...]:
    """Layers that differ by nothing but their names: theirs -> ours."""
    return tuple(Entry(f"{theirs}.*", (f"{ours}.*",)) for theirs, ours in pairs.items())


QKV = tuple(f"blocks.{{i}}.attention.{part}.*" for part in ("query", "key", "value"))
"""Of a decoder's block."""
