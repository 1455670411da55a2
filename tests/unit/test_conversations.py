"""Rows of conversations in every format that data sets have: what is shown, what is learned, what is said of the rest.

Ids against transformers: tests/reference/test_chat_transformers.py.
"""

import csv
import gzip
import json
import re
from typing import get_args

import pytest
from chat_templates import MARKED, plain, write_tokenizer

from roots_dist.config.finetune import FinetuneConfig
from roots_dist.config.load import read
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, DataError
from roots_dist.learning.data.conversations import FORMATS, TextColumns, read_conversation
from roots_dist.learning.data.remarks import Remarks
from roots_dist.learning.data.rows import rows as read_rows
from roots_dist.learning.data.tasks import open_examples
from roots_dist.learning.data.tokenizer import load_codec
from roots_dist.learning.data.turns import Turns
from roots_dist.learning.objectives import make_row_objective
from roots_dist.learning.objectives.task_checks import check_rows, row_remarks

ASKED, SAID = {"role": "user", "content": "Add 1."}, {"role": "assistant", "content": "2"}
PAIR = [ASKED, SAID]
PART = {"type": "text"}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"n": 1}'}}
TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.fixture
def config(tmp_path):
    def made(template="chatml", seq=200, **finetune) -> Config:
        path = write_tokenizer(tmp_path, "bytes", plain(template) if str(template) in MARKED else template)
        data = {"tokenizer": path, "seq_length": seq, "train": str(tmp_path / "rows.jsonl")}
        tree = {"objective": {"name": "instruct"}, "data": data, "model": {"vocab": 500}, "finetune": finetune}
        return Config.model_validate(tree)

    return made


@pytest.fixture
def rows(tmp_path):
    def written(*values, name="rows.jsonl") -> str:
        lines = [value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for value in values]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(tmp_path / name)

    return written


def shown(config: Config, path: str) -> list[tuple[str, list[str]]]:
    """For each example its text, and the texts of what is learned."""
    codec, found = load_codec(config.data.tokenizer), []
    for row in open_examples(path, config).rows:
        runs, ids = [[]], row.first.tolist()
        for i, marked in zip(ids, row.token_labels.tolist()):
            runs[-1].append(i) if marked else runs.append([])
        found.append((codec.decode(ids), [codec.decode(run) for run in runs if run]))
    return found


def chatml(*turns: str) -> str:
    """`user: a` as ChatML writes it."""
    return "".join("<|im_start|>{}\n{}<|im_end|>\n".format(*turn.split(": ", 1)) for turn in turns)


# ── every format ───────────────────────────────────────────────────────────────────────────────────────────────────

TWO = ("user: Add 1.", "assistant: 2")
ROWS = {
    "messages": ({"messages": PAIR}, TWO),
    "parts": ({"messages": [ASKED | {"content": [PART | {"text": "Add "}, PART | {"text": "1."}]}, SAID]}, TWO),
    "an empty system text": (
        {"messages": [{"role": "system", "content": ""}, *PAIR]}, ("system: ", *TWO),
    ),
    "a system text of null": ({"messages": [{"role": "system", "content": None}, *PAIR]}, ("system: ", *TWO)),
    "role developer": (
        {"messages": [{"role": "developer", "content": "Be short."}, *PAIR]}, ("developer: Be short.", *TWO),
    ),
    "a tool's answer": (
        {"messages": [ASKED, SAID, {"role": "tool", "content": "3", "tool_call_id": "x"}, SAID]},
        (*TWO, "tool: 3", "assistant: 2"),
    ),
    "text as JSON": ({"messages": json.dumps(PAIR)}, TWO),
    "keys that are null": ({"messages": [ASKED | {"name": None, "tool_calls": None}, SAID | {"weight": None}]}, TWO),
    "sharegpt": ({"conversations": [{"from": "human", "value": "Add 1."}, {"from": "gpt", "value": "2"}]}, TWO),
    "sharegpt with system and tool": (
        {
            "conversations": [
                {"from": "system", "value": "Be kind."}, {"from": "human", "value": "Add 1."},
                {"from": "gpt", "value": "let me see"}, {"from": "tool", "value": "3"}, {"from": "gpt", "value": "2"},
            ]
        },
        ("system: Be kind.", "user: Add 1.", "assistant: let me see", "tool: 3", "assistant: 2"),
    ),
    "sharegpt, a system column": (
        {"system": "Be kind.", "conversations": [{"from": "human", "value": "Add 1."}, {"from": "gpt", "value": "2"}]},
        ("system: Be kind.", *TWO),
    ),
    "OpenAI's messages in conversations": ({"conversations": PAIR}, TWO),
    "roles in capitals": ({"messages": [ASKED | {"role": "User"}, SAID | {"role": "ASSISTANT"}]}, TWO),
    "an object of columns": ({"messages": {"role": ["user", "assistant"], "content": ["Add 1.", "2"]}}, TWO),
    "another format's column that is empty": ({"messages": None, "instruction": "Add 1.", "output": "2"}, TWO),
    "alpaca": ({"instruction": "Add.", "input": "1 and 1", "output": "2"}, ("user: Add.\n1 and 1", "assistant: 2")),
    "alpaca without input": ({"instruction": "Add 1.", "output": "2"}, TWO),
    "alpaca, empty input": ({"instruction": "Add 1.", "input": "", "output": "2"}, TWO),
    "prompt": ({"prompt": "Add 1.", "completion": "2"}, TWO),
    "prompt of messages": ({"prompt": [ASKED], "completion": [SAID]}, TWO),
    "columns": ({"text": "Add 1.", "label": "2"}, TWO),
    "messages in the text column": ({"text": PAIR}, TWO),
    "a question that is a list": ({"text": "[1, 2]", "label": "2"}, ("user: [1, 2]", "assistant: 2")),
}  # fmt: skip


@pytest.mark.parametrize("case", ROWS)
def test_a_row_of_every_format_is_the_conversation_that_it_says(config, rows, case):
    row, turns = ROWS[case]
    ((text, learned),) = shown(config(), rows(row))
    assert text == chatml(*turns)
    wanted = [turn.removeprefix("assistant: ") + "<|im_end|>" for turn in turns if turn.startswith("assistant: ")]
    assert learned == wanted


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_found_by_its_columns_said_once_and_may_be_named(config, rows, name):
    row = ROWS[name][0]
    path = rows(row, row)
    (remark,) = open_examples(path, config()).remarks
    assert remark == f"read as {FORMATS[name].title} (finetune.format={name}): 2 rows, the first is {path}:1"
    assert shown(config(format=name), path) == shown(config(), path)
    for other in FORMATS:
        if other != name and (name, other) != ("messages", "sharegpt"):
            with pytest.raises(
                DataError, match=r"rows.jsonl:1: \w+ = None: expected a column of this name; the file has"
            ):
                open_examples(path, config(format=other))


def test_the_keys_name_every_format_and_every_choice_of_turns():
    fields = FinetuneConfig.model_fields
    assert get_args(fields["format"].annotation) == ("auto", *FORMATS)
    assert get_args(fields["turns"].annotation) == get_args(Turns)


def test_columns_that_the_config_names_come_before_others(config, rows):
    path = rows({"q": "Add 1.", "a": "2", "messages": [ASKED, SAID | {"content": "3"}]})
    ((text, _),) = shown(config(text_column="q", label_column="a"), path)
    assert text == chatml(*TWO)
    alpaca = rows({"instruction": "Add.", "input": "1 and 1", "output": "2"})
    named = config(text_column="instruction", label_column="output")
    assert shown(named, alpaca)[0][0] == chatml("user: Add.\n1 and 1", "assistant: 2"), "with its input all the same"
    listed = rows({"dialog": PAIR, "messages": [ASKED]})
    assert shown(config(text_column="dialog"), listed)[0][0] == chatml(*TWO)


def test_one_file_may_have_several_formats(config, rows):
    path = rows(ROWS["messages"][0], ROWS["alpaca"][0])
    assert [text for text, _ in shown(config(), path)] == [chatml(*ROWS[name][1]) for name in ("messages", "alpaca")]
    assert len(open_examples(path, config()).remarks) == 2


def test_every_kind_of_file_has_the_same_rows(config, rows, tmp_path):
    """jsonl, a JSON list in one line or in many, csv and tsv with JSON text, parquet, and archives of them."""
    import pyarrow
    from pyarrow import parquet

    values = [{"id": n, "messages": [ASKED, SAID | {"content": f"{n} ist „drei“, é"}]} for n in range(3)]
    wanted = shown(config(), rows(*values))
    texts = {
        "list.json": json.dumps(values), "long.json": "\ufeff\n" + json.dumps(values, indent=1) + "\n\n",
        "lines.json": "\n".join(map(json.dumps, values)),
    }  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with gzip.open(tmp_path / "list.json.gz", "wt", encoding="utf-8") as file:
        file.write(texts["long.json"])
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerow(["id", "messages"])
            writer.writerows([v["id"], json.dumps(v["messages"])] for v in values)
    parquet.write_table(pyarrow.Table.from_pylist(values), tmp_path / "rows.parquet")
    for name in (*texts, "list.json.gz", "rows.csv", "rows.tsv", "rows.parquet"):
        assert shown(config(), str(tmp_path / name)) == wanted, name


def test_a_field_that_a_table_has_of_other_rows_is_not_there(config, tmp_path):
    """parquet gives every message every field that some message has."""
    import pyarrow
    from pyarrow import parquet

    values = [{"messages": PAIR}, {"messages": [ASKED, SAID | {"weight": 1, "name": "x", "tool_calls": [CALL]}]}]
    parquet.write_table(pyarrow.Table.from_pylist(values[::-1]), tmp_path / "rows.parquet")
    assert shown(config("qwen-3"), str(tmp_path / "rows.parquet"))[1] == (
        "<|im_start|>user\nAdd 1.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n2<|im_end|>\n",
        ["<think>\n\n</think>\n\n2<|im_end|>"],
    )


# ── nothing is dropped in silence ──────────────────────────────────────────────────────────────────────────────────


def remarks(config: Config, path: str) -> list[str]:
    """Without the format."""
    return [line for line in open_examples(path, config).remarks if not line.startswith("read as ")]


def test_columns_and_keys_that_are_not_read_are_named_once(config, rows):
    row = {"messages": [ASKED | {"mood": "glad"}, SAID], "id": "x", "source": None, "tools": [TOOL]}
    path = rows(row, row, {"messages": PAIR, "id": ""})
    assert remarks(config(), path) == [
        f"column 'id' is not read (finetune.format=messages): 2 rows, the first is {path}:1",
        f"key 'mood' of messages is not read: the tokenizer's template has no mood: 2 rows, the first is {path}:1",
        f"column 'tools' is not read: the tokenizer's template has no tools: 2 rows, the first is {path}:1",
    ]


def test_messages_that_a_template_leaves_out_are_said(config, rows):
    path = rows({"messages": [ASKED, SAID, {"role": "tool", "content": "three"}, SAID]})
    assert remarks(config("deepseek"), path) == [
        f"the tokenizer's template leaves out or rewrites messages of role tool: 1 row, the first is {path}:1"
    ]


@pytest.mark.parametrize("words", ["m.content[:1]", "m.content | upper"])
def test_answers_that_a_template_rewrites_are_said(config, rows, words):
    """They were learned as the template has them, and the remark was of users alone."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'user' %}{{ m.content }}{% else %}{{ "
        f"{words}"
        " }}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    path = rows({"messages": [ASKED, SAID | {"content": "two"}]})
    assert [line for line in remarks(config(template), path) if "leaves out or rewrites" in line] == [
        f"the tokenizer's template leaves out or rewrites messages of role assistant: 1 row, the first is {path}:1"
    ]


def test_a_developer_is_the_system_where_a_template_has_no_developer(config, rows):
    path = rows({"messages": [{"role": "developer", "content": "Be short."}, *PAIR]})
    c = config("llama-2")
    assert shown(c, path)[0][0].startswith("<s>[INST] <<SYS>>\nBe short.\n<</SYS>>\n\nAdd 1. [/INST]")
    (line,) = remarks(c, path)
    assert line.startswith("messages of role developer have role system: the tokenizer's template has no developer")


def test_weights_of_messages_are_obeyed(config, rows):
    talk = [ASKED, SAID, ASKED, SAID | {"content": "3"}, ASKED, SAID | {"content": "4"}]
    for off in ({"weight": 0}, {"train": False}, {"training": False}, {"weight": 0.0}):
        path = rows({"messages": [*talk[:3], talk[3] | off, talk[4], talk[5] | {"weight": 1, "train": True}]})
        assert shown(config(), path)[0][1] == ["2<|im_end|>", "4<|im_end|>"]
        assert [learned for _, learned in shown(config(turns="each"), path)] == [["2<|im_end|>"], ["4<|im_end|>"]]
        path = rows({"messages": [*talk[:5], talk[5] | off]})
        ((text, learned),) = shown(config(turns="last"), path)
        assert learned == ["3<|im_end|>"] and text.endswith("3<|im_end|>\n")
    path = rows({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}, *PAIR]})
    assert shown(config(), path)[0][1] == ["2<|im_end|>"]
    path = rows({"prompt": [*PAIR, ASKED], "completion": [SAID | {"content": "3"}]})
    assert shown(config(), path)[0][1] == ["3<|im_end|>"], "of a completion alone"


def test_messages_after_the_last_answer_are_kept_or_said(config, rows):
    path = rows({"messages": [*PAIR, {"role": "user", "content": "Thanks!"}]})
    assert shown(config(), path) == [(chatml(*TWO, "user: Thanks!"), ["2<|im_end|>"])]
    last = config(turns="last")
    assert shown(last, path) == [(chatml(*TWO), ["2<|im_end|>"])]
    (line,) = remarks(last, path)
    assert line.startswith("messages after the last answer are not read (finetune.turns=last): 1 row,")


def test_a_call_as_sharegpt_writes_it_is_that_of_openai(rows):
    text = json.dumps(CALL["function"])
    turns = [("human", "Add."), ("function_call", text), ("observation", "2"), ("gpt", "2")]
    row = next(read_rows(rows({"conversations": [{"from": who, "value": said} for who, said in turns]})))
    _, call, answer, _ = read_conversation(row, FORMATS["sharegpt"], TextColumns(), Remarks()).messages
    assert (call.role, call.content, call.learned, answer.role) == ("assistant", None, True, "tool")
    assert call.others == {"tool_calls": [{"type": "function", "function": CALL["function"]}]}


CALLS = {
    "a list": {"tool_calls": [CALL]},
    "a list as JSON text": {"tool_calls": json.dumps([CALL])},
    "OpenAI's older key": {"function_call": CALL["function"]},
    "the older key as JSON text": {"function_call": json.dumps(CALL["function"])},
}


@pytest.mark.parametrize("case", CALLS)
def test_a_call_is_the_same_however_it_is_written(config, rows, case):
    path = rows({"messages": [ASKED, {"role": "assistant", "content": None} | CALLS[case]]})
    ((_, learned),) = shown(config("qwen-3"), path)
    assert len(learned) == 1 and json.dumps(CALL["function"]) in learned[0]
    assert remarks(config("qwen-3"), path) == []


# ── what is refused, or skipped ────────────────────────────────────────────────────────────────────────────────────

CALLING = {"role": "assistant", "tool_calls": [CALL]}
SYSTEM = {"role": "system", "content": "a"}
IMAGE = {"type": "image_url", "image_url": {"url": "x"}}
WRONG = {
    "no such role": ({"messages": [{"role": "wizard", "content": "a"}, SAID]}, "role: system, .* correct this line"),
    "another role": ({"messages": [ASKED, {"role": "bot", "content": "a"}]}, "Fix: write assistant for 'bot' in all"),
    "a role and a space": ({"messages": [ASKED | {"role": "User "}, SAID]}, "Fix: write user for 'User ' in all lines"),
    "a misspelt role": ({"messages": [ASKED, SAID | {"role": "assistent"}]}, "Fix: write assistant for 'assistent'"),
    "a role's number": ({"messages": [ASKED, SAID | {"role": 1}]}, "messages with a role: system, "),
    "no role": ({"messages": [{"content": "a"}, SAID]}, "messages with a role: system, "),
    "another key of a role": ({"messages": [{"speaker": "user", "content": "a"}]}, "rename speaker to role in all"),
    "a role as a key": ({"messages": [{"user": "a"}, SAID]}, r'write \{"role": "user", "content": …\} for \{"user": …'),
    "another key of a text": ({"messages": [{"role": "user", "text": "a"}]}, "rename text to content in all"),
    "a misspelt key": ({"messages": [{"role": "user", "contnet": "a"}]}, "Fix: rename contnet to content in all lines"),
    "words": ({"messages": ["Add 1.", "2"]}, "messages that are objects with role and content"),
    "no list": ({"messages": {"user": "a"}}, "a list of messages, .* put it into a list"),
    "Python's text": ({"messages": str(PAIR)}, "a list of messages, .* this text is Python's. Fix: .* json.dumps"),
    "an empty list": ({"messages": []}, "at least one message. Fix: remove this line"),
    "an image": ({"messages": [ASKED | {"content": [IMAGE]}, SAID]}, r"parts \{type: text"),
    "content of a number": ({"messages": [ASKED, SAID | {"content": 2}]}, "content that is a text, null, or a list"),
    "an empty answer": ({"messages": [ASKED, SAID | {"content": " "}]}, "not empty, or with tool_calls"),
    "null and no calls": ({"messages": [ASKED, SAID | {"content": None}]}, "not empty, or with tool_calls"),
    "an empty question": ({"messages": [ASKED | {"content": ""}, SAID]}, "messages of the user with content"),
    "a question that calls": ({"messages": [ASKED | {"content": "", "tool_calls": [CALL]}, SAID]}, "of the user with"),
    "no answer": ({"messages": [ASKED]}, "messages = '1 message': expected at least one message of the assis"),
    "nothing with a weight": ({"messages": [ASKED, SAID | {"weight": 0}]}, "message of the assistant that is learned"),
    "half a weight": ({"messages": [ASKED, SAID | {"weight": 0.5}]}, "a weight of 0 or 1"),
    "a weight in words": ({"messages": [ASKED, SAID | {"train": "no"}]}, "a train of 0 or 1, or of false or true"),
    "a question to learn": ({"messages": [ASKED | {"train": True}, SAID]}, "no train on messages of user"),
    "calls that are none": ({"messages": [ASKED, SAID | {"tool_calls": "add"}]}, "tool_calls that are a list"),
    "a call that is no JSON": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(1)"}]},
        "a call of a function as JSON text",
    ),
    "a pair of answers": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "Fix: set objective.name=dpo"),
    "no instruction": ({"instructions": "a", "output": "b"}, "those of a conversation"),
    "calls without a place": ({"messages": [ASKED, CALLING]}, "a template that writes them"),
    "tools that are none": ({"messages": PAIR, "tools": "add"}, "a list of objects that describe functions"),
    "two system texts": ({"messages": [SYSTEM, *PAIR], "system": "b"}, "no system text beside"),
    "no format": ({"words": "a", "more": "b"}, r"those of a conversation: messages \(OpenAI's messages\); "),
    "an input that is none": ({"instruction": "a", "input": ["b"], "output": "c"}, "a text, or nothing"),
    "an empty output": ({"instruction": "a", "output": ""}, "text that is not empty"),
    "not a character": ({"messages": [ASKED | {"content": "\ufdd0"}, SAID]}, r"text without U\+FDD0"),
    "broken": ('{"messages": [', "corrupt JSON"),
    "a key twice": ('{"messages": [{"role": "user", "role": "assistant", "content": "a"}]}', "key 'role' stands twice"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_bad_row_stops_the_run_or_is_skipped_and_counted(config, rows, case):
    row, words = WRONG[case]
    path = rows({"messages": PAIR}, row, {"messages": PAIR})
    with pytest.raises(DataError, match=words) as refused:
        open_examples(path, config())
    said = str(refused.value)
    assert said.startswith(f"{path}:2") and "Fix: " in said and "\n" not in said
    assert said.endswith(skip := ", or leave invalid rows out with finetune.on_error=skip.")
    skipping = config(on_error="skip")
    assert [text for text, _ in shown(skipping, path)] == [chatml(*TWO)] * 2
    line = remarks(skipping, path)[-1]
    assert line.startswith("skips 1 row (finetune.on_error=skip): 1 × expected ") and line.endswith(
        f"{said.removesuffix(skip)}."
    )


def test_bad_rows_are_counted_by_what_was_expected_and_not_all_may_be_bad(config, rows):
    bad = [WRONG[case][0] for case in ("no answer", "broken", "no answer")]
    path = rows(*bad, {"messages": PAIR})
    line = remarks(config(on_error="skip"), path)[-1]
    assert line.startswith(
        "skips 3 rows (finetune.on_error=skip): 2 × expected at least one message of the assistant that"
    )
    assert line.count(f"the first is {path}:1") == 1
    with pytest.raises(DataError, match=r"expected at least one row; it has none \(skips 3 rows .*rows.jsonl:1"):
        open_examples(rows(*bad), config(on_error="skip"))


ROW = json.dumps({"messages": PAIR})
LISTS = {
    "a comma too few": (f"[{ROW}\n{ROW}]", 2, "neither a comma nor the end"),
    "an end too early": (f"[\n{ROW},\n", 4, "Expecting value"),
    "more behind it": (f"[{ROW}\n]\n{{}}", 2, "something follows the list"),
    "a number in it": (f"[{ROW},\n\n7]", 3, "a list of JSON objects"),
    "a key twice": (f'[{ROW},\n{{"text": "a", "text": "b"}}]', 2, "key 'text' stands twice"),
    "half a pair": (f'[{ROW},\n{{"text": "\\ud800"}}]', 2, "valid Unicode"),
}


@pytest.mark.parametrize("case", LISTS)
def test_a_list_that_is_none_is_refused_with_the_line_of_the_fault(config, rows, case):
    text, line, words = LISTS[case]
    path = rows(text, name="list.json")
    with pytest.raises(DataError, match=words) as refused:
        open_examples(path, config())
    assert str(refused.value).startswith(f"{path}:{line} = ") and "\n" not in str(refused.value)
    assert len(open_examples(path, config(on_error="skip"))) == 1


@pytest.mark.parametrize("text", [f"[{ROW}]", f"[\n{ROW}\n]"])
def test_a_list_under_another_name_is_refused_with_the_name_that_it_needs(config, rows, text):
    with pytest.raises(
        DataError, match=r"rows.jsonl:1 = .* if the file is one list of objects, its name should end in .j"
    ):
        open_examples(rows(text), config())


FILES = {
    "rows.csv": ("prompt;completion\na;b\n", r"rows.csv:1 = 'prompt;completion': expected columns parted by a comma"),
    "rows.tsv": ("prompt,completion\na,b\n", r"rows.tsv:1 = .* and not by ','. Fix: save it with a tab between"),
    "rows.jsonl": (json.dumps({"messages": PAIR}).encode("utf-16"), r"Fix: save the file as UTF-8: iconv -f UTF-16"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_another_kind_is_answered_with_its_own_fix(config, tmp_path, name):
    content, words = FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=words) as refused:
        open_examples(str(tmp_path / name), config())
    assert "\n" not in str(refused.value)


def test_what_is_too_long_to_learn_from_stops_the_run_or_is_skipped(config, rows):
    long = {"messages": [ASKED | {"content": "Add 1 to " * 20}, SAID]}
    path = rows({"messages": PAIR}, long)
    with pytest.raises(ConfigError, match=rf"the first is {path}:2\) it holds nothing of an answer") as refused:
        check_rows(config(seq=40))
    assert "finetune.on_error=skip" in str(refused.value)
    skipping = config(seq=40, on_error="skip")
    check_rows(skipping)
    objective = make_row_objective(skipping)
    assert objective.num_samples(objective.open(path)) == 1
    *_, line = row_remarks(skipping, objective)
    assert line.startswith("skips 1 sample (finetune.on_error=skip)") and line.endswith(f"the first is {path}:2")


def test_a_training_run_says_its_format_and_what_it_skips(config, rows):
    path = rows(*[{"messages": PAIR}] * 3, WRONG["no answer"][0])
    c = config(on_error="skip")
    padding, _, first, second = row_remarks(c, make_row_objective(c))
    assert padding.startswith("3 rows, each a sample: ") and "is padding" in padding
    assert first == f"read as OpenAI's messages (finetune.format=messages): 4 rows, the first is {path}:1"
    assert second.startswith("skips 1 row ")


# ── templates ──────────────────────────────────────────────────────────────────────────────────────────────────────


TEMPLATES = {
    "no default": ([{"name": "rag", "template": "a"}], "chat_template = 'rag': expected a template called default"),
    "no names": ([{"template": "a"}], "a template in Jinja, or a list of {name"),
    "a list of texts": (["a"], "a template in Jinja, or a list of {name"),
    "a number": (7, "a template in Jinja, or a list of {name"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_that_are_none_are_refused(config, rows, case):
    template, words = TEMPLATES[case]
    with pytest.raises(DataError, match=re.escape(words)) as refused:
        open_examples(rows({"messages": PAIR}), config(template))
    assert "Fix: " in str(refused.value) and "\n" not in str(refused.value)


def test_turns_are_never_rendered_without_those_before_them(config, rows):
    """A template that reads messages[0] finds the system's message there in every rendering."""
    template = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + plain("chatml")
    path = rows({"messages": [{"role": "system", "content": "s"}, *PAIR, *PAIR]})
    for turns, number in (("all", 1), ("last", 1), ("each", 2)):
        assert len(shown(config(template, turns=turns), path)) == number


def test_an_answer_that_its_prompt_does_not_lead_to_is_found_by_its_content_and_said(config, rows):
    """As DeepSeek R1: the prompt opens thoughts, which an answer in the text does not have."""
    opening = "{% if add_generation_prompt %}<think>{% endif %}"
    path, talk = rows({"messages": PAIR * 2}), (chatml(*TWO, *TWO), ["2<|im_end|>"] * 2)
    assert shown(config(plain("chatml") + opening), path) == [talk]
    (line,) = remarks(config(plain("chatml") + opening), path)
    assert line.startswith(
        "the tokenizer's template asks for answers with another text than it writes before them: 1 row"
    )
    assert shown(config(MARKED["chatml"] + opening), path) == [talk]
    assert not remarks(config(MARKED["chatml"] + opening), path)
    shouted = plain("chatml").replace("m.content", "m.content | upper") + opening
    with pytest.raises(DataError, match=r"asks for the answer of message 2 with another text .*\{% generation %\}"):
        open_examples(rows({"messages": [ASKED, SAID | {"content": "two"}]}), config(shouted))


def test_a_system_message_that_only_prompts_have_is_said_to_be_left_out(config, rows):
    """As Mistral 7B v0.3: only the last message may have it, if it is the user's."""
    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ messages[0].content + ' ' if loop.last and "
        "messages[0].role == 'system' else '' }}{{ m.content }} [/INST]{% elif m.role == 'assistant' %}"
        " {{ m.content }}</s>{% endif %}{% endfor %}"
    )
    path = rows({"messages": [SYSTEM | {"content": "Be kind."}, *PAIR * 2]})
    ((text, learned),) = shown(config(template), path)
    assert text == "[INST] Add 1. [/INST] 2</s>" * 2
    assert [answer.strip() for answer in learned] == ["2</s>"] * 2
    assert any("leaves out or rewrites messages of role system" in line for line in remarks(config(template), path))


def test_a_conversation_may_begin_with_the_assistant(config, rows):
    """Nothing is rendered before it: a template that reads messages[0] would find none."""
    template = "{% if messages[0].role == 'system' %}s{% endif %}" + plain("chatml")
    path = rows({"messages": [SAID, *PAIR]})
    assert shown(config(template), path) == [(chatml("assistant: 2", *TWO), ["2<|im_end|>"] * 2)]
    assert not remarks(config(template), path)


def test_marks_count_also_where_a_template_keeps_the_text_in_a_variable(config, rows):
    kept = "{% set text %}" + MARKED["chatml"] + "{% endset %}{{ text }}"
    assert shown(config(kept), rows({"messages": PAIR * 2})) == [(chatml(*TWO, *TWO), ["2<|im_end|>"] * 2)]


def test_marks_that_hold_nothing_of_a_row_are_told(config, rows):
    never = plain("chatml") + "{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    with pytest.raises(DataError, match=r"rows.jsonl:1: .*expected an answer that .* marks"):
        open_examples(rows({"messages": PAIR}), config(never))


def test_an_answer_without_an_end_token_is_learned_whole_and_white_space_behind_one_is_not(config, rows):
    path = rows({"messages": [ASKED, SAID | {"content": "2 is </s> in words"}]})
    bare = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    bare += "{% if add_generation_prompt %}[assistant]{% endif %}"
    assert shown(config(bare), path)[0][1] == [" 2 is </s> in words\n"]
    assert shown(config("gemma"), path)[0][1] == ["2 is </s> in words<end_of_turn>"]


def test_the_date_is_there_for_templates_as_in_transformers(config, rows):
    dated = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}" + plain("chatml")
    ((bare, _),) = shown(config(dated), rows({"messages": PAIR}))
    assert bare == chatml(*TWO)  # not the clock of the process that reads it
    ((text, _),) = shown(config(dated, chat_date="2031-02-03"), rows({"messages": PAIR}))
    assert text[:2] == "20" and text[4:] == chatml(*TWO)


@pytest.mark.parametrize("day", ["tomorrow", "2026-13-45", "2026-02-30"])
def test_a_date_that_is_none_is_refused_by_its_key(day, tmp_path):
    (tmp_path / "run.yaml").write_text("objective: {name: instruct}\n")
    with pytest.raises(ConfigError, match=rf"finetune\.chat_date = '{day}' .*expected a day, as 2026-01-31"):
        read(tmp_path / "run.yaml", [f"finetune.chat_date={day}"])
