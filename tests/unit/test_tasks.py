"""Rows of a task: read, checked with file and line, tokenised, and made into samples, each held against what it must
be."""

import csv
import gzip
import json

import numpy as np
import pytest

from roots_dist.accounting.sizes import parameters
from roots_dist.config.schema import Config
from roots_dist.errors import DataError
from roots_dist.learning.data.rows import rows
from roots_dist.learning.data.specials import read_specials, synthetic_specials
from roots_dist.learning.data.tasks import collect_labels, open_examples
from roots_dist.learning.data.tokenizer import load_codec, train
from roots_dist.learning.models import pieces_of
from roots_dist.learning.objectives import OBJECTIVES, make_row_objective
from roots_dist.learning.objectives.classify import longest_first, padded
from roots_dist.learning.objectives.task_checks import complete_from_rows, row_remarks
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.world.batch import IGNORE, PADDING
from roots_dist.world.sharding import parameters_of

TEXTS = [
    (
        f"The people of State {n} met Mr. Smith; unquestionably it rained there in {1800 + n}. It is "
        "Unquestionably, Smithsonian."
    )
    for n in range(40)
]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    found = tmp_path_factory.mktemp("tasks")
    for kind in ("wordpiece", "unigram", "bpe"):
        (found / f"{kind}.json").write_text(train(TEXTS, 400, kind=kind).json)
    return found


def config(
    place, task: str, family: str = "bert", kind: str = "wordpiece", seq: int = 24, labels=("no", "yes"), **finetune
) -> Config:
    relative = {"positions": "relative", "norm": "rmsnorm", "bias": False} if family == "t5" else {}
    return Config.model_validate(
        {
            "model": {
                "family": family,
                "layers": 1,
                "hidden": 16,
                "heads": 2,
                "vocab": 500,
                "segments": 2 * (family == "bert"),
                **relative,
            },
            "objective": {"name": task},
            "data": {
                "seq_length": seq,
                "tokenizer": str(place / f"{kind}.json"),
                "target_seq_length": 8 if task == "seq2seq" else None,
            },
            "finetune": {"labels": labels, **finetune},
        }
    )


def written(place, lines, name="rows.jsonl") -> str:
    (place / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return str(place / name)


def sample(c: Config, path: str, index: int = 0) -> dict[str, np.ndarray]:
    objective = OBJECTIVES[c.objective.name](c, read_specials(c.data.tokenizer, c.model.vocab))
    return objective.sample(objective.open(path), index, np.random.default_rng(0))


def said(c: Config, ids) -> str:
    return load_codec(c.data.tokenizer).decode([int(i) for i in ids])


ROWS = [
    {"text": "It rained.", "label": "yes", "other": "Mr. Smith met the people."},
    {"text": "The State met.", "label": "no", "other": "There it is."},
]


def test_csv_tsv_and_archives_hold_the_same_rows(place):
    c = config(place, "classify", pair_column="other")
    plain = open_examples(written(place, ROWS), c)
    with gzip.open(place / "rows.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)
    paths = [str(place / "rows.jsonl.gz")]
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with open(place / name, "w", newline="") as file:
            writer = csv.DictWriter(file, ["label", "text", "other"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
        paths.append(str(place / name))
    for path in paths:
        for mine, theirs in zip(open_examples(path, c).rows, plain.rows, strict=True):
            assert mine.label == theirs.label
            assert np.array_equal(mine.first, theirs.first) and np.array_equal(mine.second, theirs.second)


def test_a_pair_stands_as_in_bert_and_is_cut_from_the_longer_text(place):
    c = config(place, "classify", pair_column="other")
    fields = sample(c, written(place, ROWS))
    shown = fields["tokens"][fields["document_ids"] >= 0]
    assert said(c, shown) == "[CLS] it rained. [SEP] mr. smith met the people. [SEP]"
    assert fields["labels"] == 1
    first = int(np.flatnonzero(fields["segment_ids"])[0])
    assert (
        said(c, fields["tokens"][:first]) == "[CLS] it rained. [SEP]"
        and fields["segment_ids"].sum() == len(shown) - first
    )
    short = sample(config(place, "classify", pair_column="other", seq=8), written(place, ROWS))
    assert (
        len(short["tokens"]) == 8
        and (short["document_ids"] == 0).all()
        and short["segment_ids"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    )


@pytest.mark.parametrize("pad, filled", [(7, 7), (0, 0), (None, 0)])
def test_a_short_text_is_filled_with_padding(pad, filled):
    fields = padded(np.array([4, 5, 6]), 5, pad)
    assert fields["tokens"].tolist() == [4, 5, 6, filled, filled]
    assert fields["document_ids"].tolist() == [0, 0, 0, PADDING, PADDING]


@pytest.mark.parametrize("room", range(2, 13))
def test_the_longer_text_is_cut_first(room):
    for a in range(1, 9):
        for b in range(1, 9):
            first, second = longest_first(np.arange(a), np.arange(b), room)
            wanted = [a, b]
            while sum(wanted) > room:  # token by token, as transformers' longest_first
                wanted[int(wanted[1] > wanted[0] or (wanted[1] == wanted[0]))] -= 1
            assert [len(first), len(second)] == wanted
            assert first.tolist() == list(range(len(first))) and second.tolist() == list(range(len(second)))


def test_a_decoder_reads_the_text_alone_as_transformers_does(place):
    c = config(place, "classify", family="gpt", kind="bpe")
    fields = sample(c, written(place, ROWS))
    assert said(c, fields["tokens"][fields["document_ids"] >= 0]) == "It rained."


@pytest.mark.parametrize("kind, family", [("wordpiece", "bert"), ("bpe", "gpt"), ("unigram", "bert")])
def test_the_label_of_a_word_is_on_its_first_token(place, kind, family):
    words = ["Unquestionably", ",", "Mr.", "Smithsonian"]
    c = config(place, "tag", family, kind)
    if kind == "unigram":  # has no [CLS]: of its own text alone
        c = config(place, "tag", "gpt", kind)
    row = {"text": words, "label": ["yes", "no", "no", "yes"]}
    fields = sample(c, written(place, [row, {"text": " ".join(words), "label": "yes no no yes"}]))
    places = np.flatnonzero(fields["labels"] != IGNORE)
    assert fields["labels"][places].tolist() == [1, 0, 0, 1]
    ends = [*places[1:], np.flatnonzero(fields["document_ids"] >= 0)[-1] + (1 if c.model.family == "gpt" else 0)]
    for word, start, end in zip(words, places, ends):
        assert said(c, fields["tokens"][start:end]).strip().lower() == word.lower()
    again = sample(c, written(place, [row, {"text": " ".join(words), "label": "yes no no yes"}]), 1)
    assert all(np.array_equal(again[name], fields[name]) for name in fields)


@pytest.mark.parametrize("family, kind, room, words", [("bert", "wordpiece", 22, 22), ("gpt", "bpe", 24, 12)])
def test_a_row_of_words_that_just_fits_its_sample_is_learned_to_the_end(place, family, kind, room, words):
    c = config(place, "tag", family, kind, seq=24)
    objective = make_row_objective(c)
    path = written(place, [{"text": ["."] * n, "label": ["yes"] * n} for n in (words, words + 1)])
    source = objective.open(str(path))
    lengths = [len(row.first) for row in source.rows]
    assert [objective.too_long(row) for row in source.rows] == [length > room for length in lengths], lengths
    assert lengths[0] <= room < lengths[1]
    for index, row in enumerate(source.rows):
        fields = objective.sample(source, index, np.random.default_rng(0))
        assert (fields["document_ids"] >= 0).sum() == min(24, len(row.first) + 24 - room)
        assert (fields["labels"] != IGNORE).sum() == (row.token_labels[:room] != IGNORE).sum()


def test_only_the_answer_is_learned_and_the_question_is_what_will_be_asked(place):
    c = config(place, "instruct", family="gpt", kind="bpe", seq=40)
    row = {"text": "Did it rain?", "label": "It rained."}
    path = written(
        place,
        [row, {"messages": [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["label"]}]}],
    )
    fields = sample(c, path)
    learned = fields["targets"] != IGNORE
    assert said(c, fields["targets"][learned]) == " It rained.<|endoftext|>"
    assert said(c, fields["tokens"][: np.flatnonzero(learned)[0] + 1]) == "user: Did it rain?\nassistant:"
    assert np.array_equal(sample(c, path, 1)["tokens"], fields["tokens"])
    objective = OBJECTIVES["instruct"](c, read_specials(c.data.tokenizer, 500))
    question, answer = objective.question(objective.open(path), 1)
    assert (said(c, question), said(c, answer)) == ("user: Did it rain?\nassistant:", " It rained.<|endoftext|>")


def test_a_template_of_marked_roles_is_read_as_transformers_reads_it(place):
    """Two turns: both answers are learned, each with its end; marks are single tokens."""
    import transformers

    backend = load_codec(place / "bpe.json").backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (place / "chat.json").write_text(backend.to_str())
    (place / "chatml.jinja").write_text(CHATML)
    c = config(place, "instruct", family="gpt", kind="chat", seq=120, chat_template=str(place / "chatml.jinja"))
    talk = [("user", "Did it rain?"), ("assistant", "It did."), ("user", "There?"), ("assistant", "There it rained.")]
    messages = [{"role": role, "content": content} for role, content in talk]
    fields = sample(c, written(place, [{"messages": messages}]))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(place / "chat.json"))
    theirs.chat_template = CHATML
    ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
    shown = fields["tokens"][fields["document_ids"] >= 0]
    assert shown.tolist() == ids[:-1]
    assert said(c, fields["targets"][fields["targets"] != IGNORE]) == "It did.<|im_end|>There it rained.<|im_end|>"


def test_the_answer_of_seq2seq_ends_even_where_it_is_cut(place):
    c = config(place, "seq2seq", family="t5", kind="unigram", seq=16)
    fields = sample(
        c, written(place, [{"text": "It rained.", "label": "The people of State 7 met there unquestionably."}])
    )
    end = read_specials(c.data.tokenizer, 500).end
    assert len(fields["targets"]) == 8 and fields["targets"][-1] == end and fields["decoder_tokens"][0] == 0
    assert fields["decoder_tokens"][1:].tolist() == fields["targets"][:-1].tolist()
    assert said(c, fields["tokens"][fields["document_ids"] >= 0]).startswith("It rained.")


def test_labels_are_those_of_the_rows_numbers_by_their_size(place):
    c = config(place, "classify", labels=())
    assert collect_labels([written(place, ROWS)], c) == ("no", "yes")
    numbered = [{"text": "a", "label": n} for n in (10, 9, 2)]
    assert collect_labels([written(place, numbered)], c) == ("2", "9", "10")


def test_labels_have_one_order_also_where_two_are_one_number_or_none_at_all(place):
    c = config(place, "classify", labels=())
    strange = ["--3", "9" * 5000, "-1", "1", "001", "01", "²"]
    path = written(place, [{"text": "a", "label": label} for label in strange])
    assert collect_labels([path], c) == ("-1", "001", "01", "1", "--3", "9" * 5000, "²")


WRONG = {
    "no JSON": ("classify", ['{"text": '], "rows.jsonl:1 .*corrupt JSON"),
    "no object": ("classify", [ROWS[0], "[1]"], "rows.jsonl:2 .*not a JSON object"),
    "no such column": (
        "classify",
        [{"txt": "a", "label": "yes"}],
        "text = None: expected a column of this name; the file has txt, label. Fix: set finetune.text_column=txt",
    ),
    "a column that other rows have": (
        "classify",
        [ROWS[0], {"sentence": "a", "label": "yes"}],
        "jsonl:2: text = None: expected a value, as in the rows before; this row has sentence, label. Fix: correct",
    ),
    "another name": ("classify", [{"sentence": "a", "label": "yes"}], "Fix: set finetune.text_column=sentence"),
    "empty": (
        "classify",
        [ROWS[0], {"text": "  ", "label": "yes"}],
        "rows.jsonl:2: text = '  ': expected text that is not empty",
    ),
    "a number for text": ("classify", [{"text": 3, "label": "yes"}], "rows.jsonl:1: text = 3"),
    "no label": ("classify", [{"text": "a", "label": None}], "rows.jsonl:1: label = None: expected a label"),
    "a fraction for a label": ("classify", [{"text": "a", "label": 0.5}], "rows.jsonl:1: label = 0.5"),
    "an unknown label": (
        "classify",
        [{"text": "a", "label": "maybe"}],
        "rows.jsonl:1: label = 'maybe': expected one of the 2 labels no, yes",
    ),
    "fewer tags than words": (
        "tag",
        [{"text": ["a", "b"], "label": ["no"]}],
        "1 labels': expected one for each of the 2 words",
    ),
    "an empty word": ("tag", [{"text": ["a", ""], "label": ["no", "no"]}], "expected a list of words"),
    "half a surrogate pair": (
        "classify",
        [ROWS[0], '{"text": "a \\ud800", "label": "yes"}'],
        "rows.jsonl:2 .*valid Unicode",
    ),
    "half of one in a label": ("classify", ['{"text": "a", "label": "\\ud800"}'], "rows.jsonl:1 .*valid Unicode"),
    "a text of nothing, long": (
        "classify",
        [{"text": "\u200b" * 9999, "label": "yes"}],
        r"rows.jsonl:1: text = '(.u200b){120}…'",
    ),
    "no row": ("classify", [""], "expected at least one row; it has none. Fix: write rows into it, as"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_learned_is_refused_with_its_line(place, case):
    task, lines, words = WRONG[case]
    with pytest.raises(DataError, match=words) as refused:
        open_examples(written(place, lines), config(place, task))
    assert "\n" not in str(refused.value) and "Fix: " in str(refused.value)


SKIPPED = {
    "classify": ("bert", "wordpiece", ROWS[0], {"text": " ", "label": "no"}),
    "tag": ("bert", "wordpiece", {"text": "It rained", "label": "yes no"}, {"text": "It rained", "label": "yes"}),
    "seq2seq": ("t5", "unigram", {"text": "It rained.", "label": "It did."}, {"text": "It rained."}),
    "instruct": ("gpt", "bpe", {"text": "It rained.", "label": "It did."}, {"text": "It rained.", "label": " "}),
}


@pytest.mark.parametrize("task", SKIPPED)
def test_bad_rows_of_every_task_may_be_skipped_and_are_counted(place, task):
    family, kind, good, bad = SKIPPED[task]
    path = written(place, [good, bad, "no JSON", good, good])
    with pytest.raises(DataError, match="rows.jsonl:2"):
        open_examples(path, config(place, task, family, kind))
    c = config(place, task, family, kind, on_error="skip")
    assert len(open_examples(path, c)) == 3
    (line,) = (line for line in open_examples(path, c).remarks if line.startswith("skips"))
    assert line.startswith("skips 2 rows (finetune.on_error=skip): 1 × expected ") and "1 × expected a JSON obj" in line
    assert f"the first is {path}:2: " in line and "\n" not in line
    alone = open_examples(written(place, [good, good, good]), config(place, task, family, kind))
    assert all(
        np.array_equal(a.first, b.first) and a.label == b.label
        for a, b in zip(alone.rows, open_examples(path, c).rows, strict=True)
    )


def test_labels_are_those_of_the_rows_that_are_not_skipped(place):
    path = written(place, [ROWS[0], {"text": "a", "label": None}, "no JSON", ROWS[1]])
    assert collect_labels([path], config(place, "classify", labels=(), on_error="skip")) == ("no", "yes")
    with pytest.raises(DataError, match="rows.jsonl:2: label = None"):
        collect_labels([path], config(place, "classify", labels=()))


def test_columns_of_a_task_that_are_not_read_are_named_once(place):
    path = written(place, [row | {"idx": 7, "none": ""} for row in ROWS])
    assert open_examples(path, config(place, "classify")).remarks == tuple(
        f"column {name!r} is not read: 2 rows, the first is {path}:1" for name in ("other", "idx")
    )
    assert len(open_examples(path, config(place, "classify", pair_column="other")).remarks) == 1


@pytest.mark.parametrize("lines", [["text,label", "a,yes,more"], ["text,label", "a"]])
def test_a_line_of_csv_with_other_fields_is_refused(place, lines):
    with pytest.raises(DataError, match="rows.csv:2"):
        open_examples(written(place, lines, "rows.csv"), config(place, "classify"))


def test_csv_may_have_long_texts_but_not_two_columns_of_one_name(place):
    c = config(place, "classify")
    (example,) = open_examples(written(place, ["text,label", f"{'it rained ' * 20_000},yes"], "rows.csv"), c).rows
    assert len(example.first) >= 40_000
    with pytest.raises(DataError, match="rows.csv:1 = 'text': expected a name of its own"):
        open_examples(written(place, ["text,text,label", "a,b,yes"], "rows.csv"), c)
    with pytest.raises(
        DataError, match="rows.csv:3: no row of csv .*; expected one. Fix: correct"
    ):  # where it begins, not where the file ends
        open_examples(written(place, ["text,label", "a,yes", '"b,yes', "c,yes"], "rows.csv"), c)


QUOTES = {
    "as characters, as GLUE has them": (
        ["text\tlabel", '"He left.\t1', 'She said "no".\t0', '""\t1', 'end"\t0'],
        ['"He left.', 'She said "no".', '""', 'end"'],
    ),
    "unbalanced, and only at two ends": (
        ["text\tlabel", '"He left\t1', "in between\t0", 'and came."\t0'],
        ['"He left', "in between", 'and came."'],
    ),
    "of a csv writer": (["text\tlabel", '"He said ""no""."\t1', "It rained.\t0"], ['He said "no".', "It rained."]),
    "around tabs and line breaks": (["text\tlabel", '"one\ttwo"\t1', '"three\n""3"""\t0'], ["one\ttwo", 'three\n"3"']),
}


@pytest.mark.parametrize("case", QUOTES)
def test_quotes_in_a_tsv_are_characters_unless_every_field_that_has_some_is_quoted_in_full(place, case):
    lines, texts = QUOTES[case]
    found = list(rows(written(place, lines, "rows.tsv")))
    assert [row.values["text"] for row in found] == texts and {row.values["label"] for row in found} == {"0", "1"}
    assert found[-1].line == "\n".join(lines).count("\n") + 1


def test_a_line_of_tsv_with_other_fields_is_refused_whatever_quotes_mean(place):
    with pytest.raises(
        DataError,
        match=r"rows.tsv:3: 3 fields; expected 2, as in the first line. Fix: quote the fields that contain a tab",
    ):
        list(rows(written(place, ["text\tlabel", '"a\t1', "b\tc\t0"], "rows.tsv")))


def test_a_template_that_fails_on_a_row_is_told_with_its_line(place):
    (place / "adds.jinja").write_text("{{ messages[0].content + 1 }}")
    c = config(place, "instruct", family="gpt", kind="bpe", chat_template=str(place / "adds.jinja"))
    with pytest.raises(DataError, match="rows.jsonl:1: .*adds.jinja refuses it"):
        open_examples(written(place, [{"text": "a", "label": "b"}]), c)


def test_conversations_without_an_answer_and_files_that_are_none_are_refused(place):
    c = config(place, "instruct", family="gpt", kind="bpe")
    for messages in (
        [{"role": "user", "content": "a"}],
        [{"role": "bot", "content": "a"}],
        [{"role": "assistant", "content": " "}],
    ):
        with pytest.raises(DataError, match="rows.jsonl:1: messages = "):
            open_examples(written(place, [{"messages": messages}]), c)
    (place / "bad.jinja").write_text("{% for %}")
    with pytest.raises(DataError, match="finetune.chat_template = .*bad.jinja"):
        open_examples(
            written(place, [{"text": "a", "label": "b"}]),
            config(place, "instruct", "gpt", "bpe", chat_template=str(place / "bad.jinja")),
        )
    (place / "cut.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode() * 50)[:-20])
    for name, words in (
        ("none.jsonl", "no such file"),
        ("rows.doc", "a name ending in"),
        ("cut.jsonl.gz", "a whole archive"),
    ):
        with pytest.raises(DataError, match=words):
            open_examples(str(place / name), config(place, "classify"))


def test_settings_of_a_tokenizer_that_are_no_object_are_refused(place):
    (place / "listed").mkdir()
    (place / "listed" / "tokenizer.json").write_text((place / "bpe.json").read_text())
    (place / "listed" / "tokenizer_config.json").write_text("[]")
    c = config(place, "instruct", family="gpt", kind="listed/tokenizer")
    with pytest.raises(
        DataError,
        match="data.tokenizer = .*tokenizer_config.json': expected a tokenizer_config.json .*it is no object",
    ):
        open_examples(written(place, [{"text": "a", "label": "b"}]), c)


def test_a_file_that_is_written_anew_is_read_anew(place):
    c = config(place, "classify")
    assert len(open_examples(written(place, ROWS), c)) == 2
    assert len(open_examples(written(place, [*ROWS, ROWS[0]]), c)) == 3


@pytest.mark.parametrize(
    "family, task",
    [
        ("bert", "classify"),
        ("bert", "tag"),
        ("electra", "classify"),
        ("gpt", "classify"),
        ("gpt", "tag"),
        ("gpt", "instruct"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_with_their_head(family, task, tied):
    c = Config.model_validate(
        {
            "model": {"family": family, "layers": 2, "hidden": 16, "heads": 2, "tied_embeddings": tied},
            "objective": {"name": task},
            "finetune": {"labels": ["a", "b", "c"]},
        }
    )
    built: dict = {}
    for spec in pieces_of(c, TensorParallel()):
        built[spec.name] = spec.build(built)
    assert parameters(c) == sum(p.tensor.numel() for p in parameters_of(built.items()) if not p.is_copy)


def test_what_a_proof_learns_from_has_too_long_texts_too():
    from roots_dist.learning.objectives.synthetic import random_source

    c = Config.model_validate(
        {
            "model": {"family": "bert", "vocab": 50},
            "objective": {"name": "classify"},
            "data": {"seq_length": 16},
            "finetune": {"labels": ["a", "b"]},
        }
    )
    objective = OBJECTIVES["classify"](c, synthetic_specials(50))
    cut = [objective.too_long(row) for row in random_source(c).rows]
    assert any(cut) and not all(cut)


def test_passes_over_the_rows_are_rounded_up_to_whole_steps_once(place):
    c = config(place, "classify", epochs=3, unfreeze_every_epochs=1.5).changed({"train.global_batch": 16})
    path = written(place, ROWS * 10, "twenty.jsonl")
    made = complete_from_rows(c.changed({"data.train": path}))
    assert (made.train.steps, made.finetune.unfreeze_every) == (4, 2)  # 60 / 16 and 30 / 16; one pass has 1.25


def test_a_batch_that_is_larger_than_the_rows_is_remarked(place):
    c = config(place, "classify").changed({"data.train": written(place, ROWS), "train.global_batch": 5})
    (line,) = (one for one in row_remarks(c, make_row_objective(c)) if "global_batch" in one)
    assert line.endswith("is more than the 2 samples of data.train: a step takes some of them 3 times")
