"""Columns that a file of rows does not have: which of those that it has are meant by them.

    no text, there are sentence, label --fix_of_column--> "set finetune.text_column=sentence"
    neither messages nor an answer --fix_of_format--> "set finetune.text_column=question finetune.label_column=reply"

rows.py and conversations.py ask here when they cannot read a row.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence

from roots_dist.config.objectives import Rows

QUESTIONS = ("instruction", "prompt", "question", "query", "input", "inputs", "problem", "request", "source")
"""Columns of other data sets that hold what is asked."""
ANSWERS = ("output", "completion", "response", "answer", "reply", "solution", "outputs", "target", "targets", "summary")
"""Columns of other data sets that hold what is answered."""
MEANT: Mapping[str, Sequence[str]] = {
    "text": (
        "sentence", "tokens", "words", "content", "sentence1", "premise", "review", "comment", "tweet", "title",
        "body", "document", "article", "message", *QUESTIONS,
    ),
    "label": (
        "labels", "class", "category", "sentiment", "intent", "tag", "tags", "ner_tags", "pos_tags", "label_text",
        "stars", "rating", "score", *ANSWERS,
    ),
    "instruction": QUESTIONS,
    "prompt": QUESTIONS,
    "output": ANSWERS,
    "completion": ANSWERS,
    "messages": ("message", "conversation", "dialog", "dialogue", "chat", "turns", "history"),
    "conversations": ("conversation", "dialog", "dialogue", "chat", "turns", "history"),
    "chosen": ("preferred", "accepted", "better", "winner", "good", "chosen_response", "response_chosen"),
    "rejected": ("dispreferred", "declined", "worse", "loser", "bad", "rejected_response", "response_rejected"),
}  # fmt: skip
"""Column of ours -> its names in other data sets, the likeliest first."""
OPTIONS = ("text", "label")
"""Columns with an option of their own, finetune.text_column, of which this is the default."""
EXAMPLES: Mapping[Rows, str] = {
    "labelled texts": '{"text": "worth every minute", "label": "good"}',
    "labelled words": '{"text": ["Ada", "wrote"], "label": ["name", "none"]}',
    "conversations": '{"messages": [{"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"}]}',
    "preferences": '{"prompt": "2 + 3?", "chosen": "5", "rejected": "23"}',
    "texts and answers": '{"text": "a long text", "label": "its summary"}',
}
"""Kind of rows -> a row."""
NAME_IT = "name it with finetune.text_column, finetune.pair_column or finetune.label_column"
"""The fix for a missing column of which nothing is known."""


def meant_by(column: str, there: Collection[str]) -> str | None:
    """The column that stands for a missing one; None if none is known to."""
    plain = {name.strip().lower(): name for name in there}
    known = next((plain[name] for name in (column.lower(), *MEANT.get(column, ())) if name in plain), None)
    near = difflib.get_close_matches(column.lower(), plain, 1, 0.75)
    return known or (plain[near[0]] if near else None)


def fix_of_column(column: str, there: Collection[str]) -> str:
    """Say what to do about a missing column whose name is an option's default, or was given for one."""
    found = meant_by(column, there)
    if found is None:
        return NAME_IT
    return f"set finetune.{column}_column={found}" if column in OPTIONS else f"did you mean {found}"


def fix_to_rename(column: str, there: Collection[str]) -> str:
    """Say what to do about a missing column whose name a format sets."""
    if (found := meant_by(column, there)) is not None:
        return f"rename {found} to {column} in all lines"
    return f"rename the column that holds it to {column}, or choose another finetune.format or objective.name"


def fix_of_format(there: Collection[str], lists: Collection[str], forms: Sequence[Sequence[str]]) -> str:
    """Say what to do about rows whose columns are those of no format. lists: those of the columns that hold messages.
    forms: the columns that each format needs."""
    if lists:
        return f"set finetune.text_column={next(iter(lists))}"
    asked, answered = (next((name for name in names if name in there), None) for names in (QUESTIONS, ANSWERS))
    if asked is not None and answered is not None:
        if {"instruction", "input"} <= set(there):
            return fix_to_rename("output", there)
        return f"set finetune.text_column={asked} finetune.label_column={answered}"
    for form in forms:
        lacks = [column for column in form if column not in there]
        meant = [meant_by(column, set(there) - set(form)) for column in lacks]
        if len(lacks) < len(form) and None not in meant:
            return "rename " + ", ".join(f"{old} to {new}" for old, new in zip(meant, lacks)) + " in all lines"
    begun = next((form for form in forms if 0 < len(set(form) & set(there)) < len(form)), None)
    if begun is not None:
        lacks = [column for column in begun if column not in there]
        return f"add {' and '.join(lacks)} to each line, beside {' and '.join(set(begun) & set(there))}"
    return "rename the columns, or name yours with finetune.text_column and finetune.label_column"
