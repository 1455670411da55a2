"""The section `finetune` of the config: what is trained of a model that exists, and how its rows are read."""

from __future__ import annotations

from datetime import date
from typing import Literal

from pydantic import Field, field_validator
from pydantic_core import PydanticCustomError

from roots_dist.config.section import Section


class FinetuneConfig(Section):
    """Fine-tuning of a model that exists."""

    init_from: str | None = Field(None, description="folder of the run, or of the import, to start from")
    strategy: Literal["full", "partial", "progressive", "lora"] = Field(
        "full", description="what learns: everything; some; the top first, then more; low-rank adapters"
    )
    trainable: tuple[str, ...] = Field(
        (), description="partial: patterns of names that learn, as head.* or blocks.1?.*"
    )
    epochs: int | None = Field(
        None, ge=1, description="passes over data.train, instead of train.steps; rounded up to whole steps once"
    )
    unfreeze_every: int = Field(100, ge=1, description="progressive: steps until the next blocks learn too")
    unfreeze_every_epochs: float | None = Field(
        None, gt=0, description="progressive: the same in passes over data.train"
    )
    unfreeze_blocks: int = Field(1, ge=1, description="progressive: blocks that join at a time, from the top")
    layer_lr_decay: float = Field(
        1.0, gt=0, le=1, description="learning rate of each block, as a share of the next one's"
    )
    lora_rank: int = Field(8, ge=1, description="lora: rank of the adapters")
    lora_alpha: float = Field(16.0, gt=0, description="lora: adapters are scaled by alpha / rank")
    lora_targets: tuple[str, ...] = Field(("query", "value"), description="lora: linear layers that get an adapter")
    text_column: str = Field("text", description="column of the text, question or source")
    pair_column: str | None = Field(None, description="classify: column of the second text")
    label_column: str = Field("label", description="column of the label, of a list of them (tag), or of the answer")
    labels: tuple[str, ...] = Field((), description="classify, tag: names of the labels; default: those of data.train")
    on_error: Literal["stop", "skip"] = Field(
        "stop", description="what an invalid row does: it ends the run, or it is counted and left out"
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt", "columns"] = Field(
        "auto", description="instruct: how rows write conversations; auto: found by the columns"
    )
    turns: Literal["all", "last", "each"] = Field(
        "all",
        description="instruct, dpo: which answers of a conversation are learned: all in one sample, the last, or each "
        "in a sample of its own",
    )
    packing: bool = Field(
        False,
        description="instruct: several rows in a training sample, each with attention and positions of its own; "
        "train.global_batch counts samples",
    )
    chat_date: str | None = Field(
        None,
        description="instruct, dpo: day that a template writes with strftime_now, as 2026-01-31; default: none, so "
        "that rows are the same whenever they are read",
    )
    chat_template: str | None = Field(
        None, description="instruct, dpo: file of a Jinja chat template; default: the tokenizer's"
    )
    metric: Literal["loss", "accuracy", "f1", "mcc"] = Field(
        "loss",
        description="of held-out rows: which checkpoint is the best, and when it stops; f1 (macro) and mcc of classes",
    )
    patience: int = Field(0, ge=0, description="evaluations without a better one until it stops; 0: never")

    @field_validator("chat_date")
    @classmethod
    def _is_a_day(cls, value: str | None) -> str | None:
        try:
            return value if value is None else date.fromisoformat(value).isoformat()
        except ValueError:
            raise PydanticCustomError("day", "a day, as 2026-01-31") from None
