"""The model families as records: what each can do, and what its layers are like. One table; everything else asks it.

    model.family --records.py--> FamilyRecord: checks, accounting, learning/models/, generation, exchange

The pieces of a family are in learning/models/ (MODELS, by the same names). The objectives say which families learn them
(config/objectives.py). No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

POSITIONS = ("learned", "rotary", "sinusoidal", "alibi", "relative", "none")
"""Values of model.positions, the usual ones first."""
_ENCLOSED = ("cls", "sep", "pad")
_RELATIVE = {"relative": "the bias of relative distances is t5's"}
_BOTH_WAYS = {
    **_RELATIVE,
    "alibi": "alibi looks back only",
    "none": "without positions an encoder does not know the order of words",
}


@dataclass(frozen=True, kw_only=True)
class FamilyRecord:
    name: str
    title: str
    stacks: Literal["decoder", "encoder", "encoder-decoder"]
    special_tokens: tuple[str, ...]
    """The special tokens that mean something to a model of this family; names of config/special_tokens.py."""
    encloses_with: tuple[str, ...] = ()
    """Special tokens around the texts that it gives labels to; none: it reads them as they are."""
    unfit_positions: Mapping[str, str] = field(default_factory=dict)
    """Values of model.positions that it cannot have -> why."""
    has_generator: bool = False
    """True if a small model of generator.* may learn beside it."""
    init: Literal["plain", "residual", "fan-in"] = "plain"
    """Initial weights: residual makes those smaller that end a residual branch; fan-in goes by a matrix's inputs."""
    scaled_attention: bool = True
    """True if scores are divided by the root of the head's width; T5 has the scale in its initial weights."""
    mlp_dropout: bool = False
    """True if the MLP has dropout inside too."""
    pooling: Literal["last", "pooler", "dense"] = "last"
    """Input of the head that classifies a text: the last token, or the first through BERT's pooler or ELECTRA's
    layer."""
    last_norm: Literal["norm", "final"] | None = None
    """Name of the last norm, in the head, of a stack whose norms stand before each branch; None: there is none."""

    @property
    def is_decoder(self) -> bool:
        """True for one causal stack: it goes on with a text."""
        return self.stacks == "decoder"

    @property
    def is_encoder(self) -> bool:
        """True for one stack in which every position sees every other: it writes nothing."""
        return self.stacks == "encoder"

    @property
    def has_two_stacks(self) -> bool:
        """True for a decoder over an encoder: it answers a text."""
        return self.stacks == "encoder-decoder"

    @property
    def positions(self) -> tuple[str, ...]:
        """Values of model.positions that it can have, the usual one first."""
        return tuple(name for name in POSITIONS if name not in self.unfit_positions)


FAMILIES: dict[str, FamilyRecord] = {
    record.name: record
    for record in (
        FamilyRecord(
            name="gpt",
            title="decoder (GPT, BLOOM, Llama)",
            stacks="decoder",
            special_tokens=("pad", "unk", "end"),
            unfit_positions=_RELATIVE,
            init="residual",
            last_norm="norm",
        ),
        FamilyRecord(
            name="bert",
            title="encoder",
            stacks="encoder",
            special_tokens=("pad", "cls", "sep", "mask", "unk"),
            encloses_with=_ENCLOSED,
            unfit_positions=_BOTH_WAYS,
            pooling="pooler",
            last_norm="final",
        ),
        FamilyRecord(
            name="electra",
            title="encoder with a generator",
            stacks="encoder",
            special_tokens=("pad", "cls", "sep", "mask", "unk"),
            encloses_with=_ENCLOSED,
            unfit_positions=_BOTH_WAYS,
            has_generator=True,
            pooling="dense",
        ),
        FamilyRecord(
            name="t5",
            title="both stacks",
            stacks="encoder-decoder",
            special_tokens=("pad", "unk", "end"),
            unfit_positions={name: "both stacks know distances alone" for name in POSITIONS if name != "relative"},
            init="fan-in",
            scaled_attention=False,
            mlp_dropout=True,
        ),
    )
}


if TYPE_CHECKING:
    FamilyName = str
else:  # a record added to the table is a value of the key
    FamilyName = Literal[tuple(FAMILIES)]


def decoders() -> str:
    """The families that go on with a text, as a message says them."""
    return " or ".join(name for name, record in FAMILIES.items() if record.is_decoder)
