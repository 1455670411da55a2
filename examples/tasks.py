"""Small real tasks out of the embedded corpora, as rows to fine-tune on: python examples/tasks.py data/tasks

    embedded:human-rights, embedded:state-of-the-union --> FOLDER/NAME.train.jsonl, FOLDER/NAME.validation.jsonl

    languages   a paragraph                       -> its language                      (classify; seq2seq: spelled out)
    pairs       two paragraphs                    -> are they of the same language?    (classify, finetune.pair_column)
    words       words of several languages        -> the language of each word         (tag)
    answers     a question about a paragraph      -> an answer                         (instruct)
    eras        some sentences of a president     -> before 1861, until 1932, since    (classify)

What is held out are other paragraphs (of a parallel text: in every language), and other addresses.
"""

from __future__ import annotations

import json
import lzma
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from roots_dist.learning.data.embedded import path_of

LANGUAGES = (
    "English", "French", "Spanish", "Italian", "German, Standard (1996)", "Dutch", "Danish",
    "Polish", "Czech", "Finnish",
    "Turkish", "Indonesian",
)  # fmt: skip
HELD_OUT = 4
"""Every fourth paragraph, every fourth address."""
WORDS = 40
"""Words of the longest passage."""
PAIRS = 8
"""How often each passage is paired with others."""
ASKED = 20
"""Words that a question quotes, at most."""
Row = dict[str, object]
Split = dict[str, list[Row]]


def documents(name: str) -> list[dict]:
    with lzma.open(path_of(f"embedded:{name}"), "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def passages(text: str) -> Iterator[str]:
    words = text.split()
    yield from (" ".join(words[i : i + WORDS]) for i in range(0, len(words), WORDS) if len(words) - i >= 4)


def part(number: int) -> str:
    return "validation" if number % HELD_OUT == HELD_OUT - 1 else "train"


def paragraphs() -> Split:
    """{text, label} of every passage, label being its language's first word."""
    found: Split = {"train": [], "validation": []}
    for document in documents("human-rights"):
        if document["language"] in LANGUAGES:
            for i, paragraph in enumerate(document["text"].split("\n\n")):
                label = document["language"].partition(",")[0]
                found[part(i)] += [{"text": text, "label": label} for text in passages(paragraph)]
    return found


def pairs(draw: random.Random, rows: list[Row]) -> list[Row]:
    by_label: dict[object, list[object]] = {}
    for row in rows:
        by_label.setdefault(row["label"], []).append(row["text"])

    def pair(row: Row) -> Row:
        same = draw.random() < 0.5
        label = row["label"] if same else draw.choice([other for other in by_label if other != row["label"]])
        return {"text": row["text"], "other": draw.choice(by_label[label]), "label": "same" if same else "different"}

    return [pair(row) for row in rows for _ in range(PAIRS)]


def words(draw: random.Random, rows: list[Row]) -> list[Row]:
    def mixed() -> Row:
        text: list[str] = []
        labels: list[object] = []
        while len(text) < WORDS:
            row = draw.choice(rows)
            some = row["text"].split()
            start = draw.randrange(len(some))
            text += some[start : start + draw.randint(2, 6)]
            labels += [row["label"]] * (len(text) - len(labels))
        return {"text": text, "label": labels}

    return [mixed() for _ in rows]


def answers(draw: random.Random, rows: list[Row]) -> list[Row]:
    return [
        {"messages": [
            {"role": "user", "content": f"Which language is this? {' '.join(row['text'].split()[:ASKED])}"},
            {"role": "assistant", "content": f"This is {row['label']}."},
        ]}
        for row in rows
    ]  # fmt: skip


def eras() -> Split:
    found: Split = {"train": [], "validation": []}
    for i, document in enumerate(documents("state-of-the-union")):
        era = "before 1861" if document["year"] < 1861 else "until 1932" if document["year"] <= 1932 else "since 1933"
        found[part(i)] += [{"text": text, "label": era} for text in passages(document["text"])]
    return found


def main(folder: Path) -> None:
    draw = random.Random(0)
    base = paragraphs()
    made = {
        "languages": base,
        **{make.__name__: {name: make(draw, rows) for name, rows in base.items()} for make in (pairs, words, answers)},
        "eras": eras(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, split in made.items():
        for which, rows in split.items():
            draw.shuffle(rows)
            path = folder / f"{name}.{which}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        print(f"{name:<10} {len(split['train']):>6} rows to learn, {len(split['validation']):>5} held out")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "data/tasks"))
