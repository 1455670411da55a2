"""The table of an architecture, and its expansion to the list of all tensors of one model.

    Architecture (gpt2.py, llama.py, …) + the parameters of the model --rules--> [Rule: their name, our names, form]

Both directions use the same rules: import splits their tensors into ours, export joins ours into theirs. hf_config.py
does the same with the keys of config.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from roots_dist.config.schema import Config
from roots_dist.storage.exchange.forms import SAME, Form

GENERATOR = "generator/"
"""Prefix of the names of tensors in a folder of that name (ELECTRA)."""
Shapes = Mapping[str, tuple[int, ...]]


class Entry(NamedTuple):
    """A row of a table. `{i}` is the number of a block, `{j}` that of an expert, `*` stands for weight and bias; names
    that the model lacks are skipped."""

    theirs: str
    ours: tuple[str, ...]
    form: Form = SAME
    copies: tuple[str, ...] = ()
    """Other names under which they store the same tensor."""
    echoes: tuple[str, ...] = ()
    """Names under which some files repeat the tensor: read if there is no other, must be equal, never written."""
    idle: tuple[str, ...] = ()
    """Names of tensors that their class has but does not use: written as a copy, never read."""
    when: Callable[[Config], bool] = lambda config: True
    wide: bool = False
    """True if an export has it in float32, whatever the dtype of the others."""


class Rule(NamedTuple):
    """An entry that is expanded to one tensor."""

    theirs: str
    ours: tuple[str, ...]
    form: Form
    copies: tuple[str, ...]
    echoes: tuple[str, ...]
    idle: tuple[str, ...]
    wide: bool

    def within(self, folders: Sequence[str]) -> Rule:
        """The rule without names in other folders than these ("" and GENERATOR)."""
        if GENERATOR in folders:
            return self
        copies, echoes = (
            tuple(n for n in names if not n.startswith(GENERATOR)) for names in (self.copies, self.echoes)
        )
        return self._replace(copies=copies, echoes=echoes)

    @property
    def needed(self) -> tuple[str, ...]:
        """Names under which the tensor must exist."""
        return (self.theirs, *self.copies)

    @property
    def written(self) -> tuple[str, ...]:
        """Names under which the tensor is written."""
        return (*self.needed, *self.idle)

    @property
    def names(self) -> tuple[str, ...]:
        """All of their names for this tensor."""
        return (*self.needed, *self.echoes)


class Refusal(Exception):
    """A key of config.json that is not read as it stands."""

    def __init__(self, key: str, found: object, expected: str, fix: str):
        super().__init__(key)
        self.key, self.found, self.expected, self.fix = key, found, expected, fix


def contradiction(key: str, found: object, other: str, value: object, why: str, fix: str) -> Refusal:
    """The error for two keys that say different things, of which another reader may follow the other one."""
    return Refusal(key, found, f"the same as {other} = {value!r}: {why}", fix)


class ConfigKey(NamedTuple):
    """A key of config.json and the corresponding key of our config."""

    theirs: str
    ours: str
    default: object = None
    """Value if config.json does not have the key."""
    translation: Mapping[Any, object] | None = None
    """Their value -> ours, where they differ. The first of theirs is written."""
    aliases: tuple[str, ...] = ()
    """Names of the key in older files."""
    to_ours: Callable[[Any], object] = lambda value: value
    """Compute our number from theirs, where they differ."""
    to_theirs: Callable[[Any], object] = lambda value: value
    """The reverse."""


class Fixed(NamedTuple):
    """A key of config.json for which our model supports only one value."""

    theirs: str
    value: object
    """The supported value, which is also written."""
    default: object = ...
    """Value if config.json does not have the key; by default the supported value."""
    equivalent: tuple[object, ...] = ()
    """Other values that give the same function."""
    description: str = ""
    """Expectation in the error message, if the value alone does not say it."""
    written: bool = True
    """True if an export has the key; some keys stand only in some files."""


def unread(**values: object) -> tuple[Fixed, ...]:
    """Keys that released files have and no class of transformers reads, each with what it says of the function that is
    computed all the same; another value would say something else."""
    return tuple(Fixed(name, value, equivalent=(None,), written=False) for name, value in values.items())


class Head(NamedTuple):
    """A head on the stack."""

    architecture: str
    """Name of the class in transformers."""
    objectives: tuple[str, ...]
    """Our objectives with this head. An import gets the first one."""
    entries: tuple[Entry, ...]
    aliases: tuple[str, ...] = ()
    """Names of the class in older files."""
    bare: bool = False
    """True for the stack alone, as BertModel: a start for fine-tuning. It becomes a task whose labels are not known
    yet, and its files have no prefix of the stack."""


class Architecture(NamedTuple):
    """A model type of transformers, as data."""

    model_type: str
    base: str
    """Prefix of the stack's tensors, which some files omit."""
    heads: tuple[Head, ...]
    stack: tuple[Entry, ...]
    ours: Mapping[str, object]
    """Our config values that hold for every model of this type."""
    keys: tuple[ConfigKey, ...]
    fixed: tuple[Fixed, ...] = ()
    derived: Mapping[str, Callable[[Mapping[str, Any]], object]] = MappingProxyType({})
    """Our config keys whose value follows from other values of ours, for every model of this type."""
    inert: tuple[str, ...] = ()
    """Keys of config.json that change no function of this model type, whatever their value."""
    remark: Callable[[Mapping[str, Any], Config], str] = lambda tree, config: ""
    """Remark of an import on settings of training that it does not take over, given config.json and our config."""
    kinds: tuple[str, ...] = ("full",)
    """Values of model.layer_kinds that its layers can have."""
    even_width: bool = True
    """True if the model's width must be a multiple of its heads, even if the head width is set separately."""
    plain_ffn: bool = False
    """True if the MLP is always four times as wide as the model."""
    unused: tuple[str, ...] = ()
    """Patterns of tensors that some files contain and that have no effect."""
    left_out: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda tree: ()
    """Patterns, given config.json, of tensors of further layers that are no part of the model: an import says that it
    has left them out."""
    flatten: Callable[[dict[str, Any]], dict[str, Any]] = lambda tree: tree
    """Convert config.json with nested keys to a single level."""
    nest: Callable[[dict[str, Any]], dict[str, Any]] = lambda tree: tree
    """The reverse, in a form that both versions of transformers read."""

    def head(self, architecture: str) -> Head | None:
        return next((head for head in self.heads if architecture in (head.architecture, *head.aliases)), None)

    def head_for(self, objective: str, bare: bool = False) -> Head | None:
        return next((head for head in self.heads if objective in head.objectives and head.bare == bare), None)


def rules(architecture: Architecture, head: Head, config: Config, shapes: Shapes) -> list[Rule]:
    """Every tensor of the model, in the order of the table. Each of our parameters is in exactly one rule."""
    found = [
        rule
        for entry in (*architecture.stack, *head.entries)
        if entry.when(config)
        for rule in _expanded(entry, shapes)
    ]
    covered = [name for rule in found for name in rule.ours]
    assert sorted(covered) == sorted(shapes), (architecture.model_type, set(covered) ^ set(shapes))
    claimed = {name for rule in found for name in rule.written}
    return [rule._replace(echoes=tuple(n for n in rule.echoes if n not in claimed)) for rule in found]


def _expanded(entry: Entry, shapes: Shapes) -> Iterator[Rule]:
    numbers = range(1 + max((int(part) for name in shapes for part in name.split(".") if part.isdigit()), default=0))
    for i in numbers if "{i}" in entry.theirs else range(1):  # of several kinds of blocks, some lack the parameter
        for j in numbers if "{j}" in entry.theirs else range(1):
            some = False
            for kind in ("weight", "bias") if "*" in entry.theirs else ("",):

                def named(names: Sequence[str], i: int = i, j: int = j, kind: str = kind) -> tuple[str, ...]:
                    return tuple(n.replace("{i}", str(i)).replace("{j}", str(j)).replace("*", kind) for n in names)

                ours = named(entry.ours)
                if all(name in shapes for name in ours):
                    some = True
                    (theirs,) = named([entry.theirs])
                    copies, echoes, idle = map(named, (entry.copies, entry.echoes, entry.idle))
                    yield Rule(theirs, ours, entry.form, copies, echoes, idle, entry.wide)
            if not some:  # this block has no such expert, and none behind it
                break


def same_layout(pairs: Mapping[str, str]) -> tuple[Entry, ...]:
    """Entries of layers that differ only in their names: theirs -> ours."""
    return tuple(Entry(f"{theirs}.*", (f"{ours}.*",)) for theirs, ours in pairs.items())


def with_defaults(keys: Iterable[ConfigKey], **defaults: object) -> tuple[ConfigKey, ...]:
    """The same keys, some with another value where config.json does not have them."""
    return tuple(key._replace(default=defaults.get(key.theirs, key.default)) for key in keys)


def renamed(heads: Iterable[Head], name: str) -> tuple[Head, ...]:
    """The same heads in classes whose names begin with this one."""
    return tuple(head._replace(architecture=name + _task(head.architecture), aliases=()) for head in heads)


def with_bare_stack(table: Architecture, name: str | None = None) -> Architecture:
    """The table with the class of the stack alone, behind those of its tasks.

    name: what the class is called before `Model`, by default as the first class of the table before `For`.
    """
    tagged = table.head_for("tag")
    entries = tuple(e for e in tagged.entries if not any("head.classifier" in n for n in e.ours)) if tagged else ()
    first = table.heads[0].architecture
    name = name or first[: first.index("LMHead" if "LMHead" in first else "For")]
    return table._replace(heads=(*table.heads, Head(f"{name}Model", ("tag",), entries, bare=True)))


def _task(architecture: str) -> str:
    """LlamaForCausalLM -> ForCausalLM"""
    return architecture[architecture.index("For") :]


def variant(
    base: Architecture,
    model_type: str,
    name: str,
    *,
    tasks: Sequence[str] | None = None,
    ours: Mapping[str, object] = MappingProxyType({}),
    without: Sequence[str] = (),
    keys: Sequence[ConfigKey] = (),
    fixed: Sequence[Fixed] = (),
    defaults: Mapping[str, object] = MappingProxyType({}),
    **others: Any,
) -> Architecture:
    """The table of a model type that differs from another one in what is said here.

    name: what its classes begin with. tasks: the classes that it has, as ForCausalLM; by default those of the base.
    without: keys of config.json that it does not have; switches among them may be there, off.
    keys, fixed: those that it has besides, or says otherwise.
    defaults: other values of keys where config.json does not have them.
    """
    heads = renamed([h for h in base.heads if tasks is None or _task(h.architecture) in tasks], name)
    gone = {*without, *(key.theirs for key in keys), *(row.theirs for row in fixed)}
    kept = with_defaults([key for key in base.keys if key.theirs not in gone], **defaults)
    told = {key.ours for key in keys}
    off = [
        Fixed(key.theirs, False, written=False) for key in base.keys if key.theirs in without and key.default is False
    ]
    return base._replace(
        model_type=model_type,
        heads=others.pop("heads", heads),
        ours={name: value for name, value in base.ours.items() if name not in told} | dict(ours),
        keys=(*kept, *keys),
        fixed=(*(row for row in base.fixed if row.theirs not in gone), *fixed, *dict.fromkeys(off)),
        **others,
    )


def biases(qkv: bool, out: bool, mlp: bool) -> dict[str, object]:
    """Config values that say which linear layers of a block have biases."""
    return {"model.qkv_bias": qkv, "model.out_bias": out, "model.mlp_bias": mlp}


BIASED, UNBIASED = biases(True, True, True), biases(False, False, False)
QKV = tuple(f"blocks.{{i}}.attention.{part}.*" for part in ("query", "key", "value"))
"""Query, key and value of a decoder's block."""
