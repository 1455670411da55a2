"""What is learned of a conversation, against transformers' apply_chat_template and its mask of the assistant's tokens.

Templates are like those of nine released models, each as released (the answers follow from generation prompts) and with
{% generation %}; the tokenizers are byte-level, and two that put a space before each piece of text.
"""

import json
import re

import pytest
import tokenizers
import transformers
from chat_templates import MARKED, TOKENIZERS, plain, tokenizer_json, write_tokenizer

from roots_dist.config.schema import Config
from roots_dist.errors import DataError
from roots_dist.learning.data.tasks import open_examples

REWRITE = {"qwen-3", "phi-3"}
"""Templates that write an answer differently when the conversation goes on."""
SYSTEM = [{"role": "system", "content": "You are kind."}]
TALK = [
    {"role": "user", "content": "Did it rain?"},
    {"role": "assistant", "content": "It rained in State 7."},
    {"role": "user", "content": "And there?"},
    {"role": "assistant", "content": "<think>\nThe people met.\n</think>\n\nThere it rained too — é 三."},
]


def theirs(style, kind, messages, **options):
    """Ids, and the mask of the assistant's tokens."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_json(kind)),
        bos_token="<s>",
        eos_token="</s>",
        chat_template=MARKED[style],
    )
    found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, **options)
    return found["input_ids"], found["assistant_masks"]


def ours(folder, template, kind, messages, **finetune):
    """Ids and marks of each example."""
    path = write_tokenizer(folder, kind, template)
    (folder / "rows.jsonl").write_text(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    config = Config.model_validate(
        {"objective": {"name": "instruct"}, "data": {"tokenizer": path}, "model": {"vocab": 500}, "finetune": finetune}
    )
    rows = open_examples(str(folder / "rows.jsonl"), config).rows
    return [(row.first.tolist(), row.token_labels.tolist()) for row in rows]


def last_turn(style, kind, messages):
    """transformers' ids of all, and its mask of the last answer alone: of the tokens that the prompt has not."""
    ids, mask = theirs(style, kind, messages)
    _, before = theirs(style, kind, messages[:-1], add_generation_prompt=True)
    return ids, [0] * len(before) + mask[len(before) :]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("style", MARKED)
def test_marked_answers_are_those_of_transformers(style, kind, tmp_path):
    for messages in (TALK[:2], SYSTEM + TALK[:2], TALK, SYSTEM + TALK):
        if style == "qwen-3" and len(messages) > 3:
            continue
        assert ours(tmp_path, MARKED[style], kind, messages) == [theirs(style, kind, messages)]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("style", sorted(set(MARKED) - REWRITE))
def test_answers_of_a_released_template_are_those_that_marks_would_name(style, kind, tmp_path):
    for messages in (TALK[:2], SYSTEM + TALK[:2], TALK, SYSTEM + TALK):
        assert ours(tmp_path, plain(style), kind, messages) == [theirs(style, kind, messages)]


@pytest.mark.parametrize("template", [MARKED, {style: plain(style) for style in MARKED}], ids=["marked", "released"])
@pytest.mark.parametrize("style", MARKED)
def test_the_last_answer_or_each_is_learned_of_any_template(style, template, tmp_path):
    messages = SYSTEM + TALK
    first, last = (last_turn(style, "spaces", part) for part in (messages[:3], messages))
    assert ours(tmp_path, template[style], "spaces", messages, turns="last") == [last]
    assert ours(tmp_path, template[style], "spaces", messages, turns="each") == [first, last]


@pytest.mark.parametrize("style", sorted(REWRITE))
def test_all_answers_of_a_template_that_rewrites_the_past_are_refused(style, tmp_path):
    with pytest.raises(DataError, match="rows.jsonl:1: .* differently when the conversation goes on") as refused:
        ours(tmp_path, plain(style), "bytes", SYSTEM + TALK)
    assert "finetune.turns=last" in str(refused.value) and "=each" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert len(ours(tmp_path, plain(style), "bytes", SYSTEM + TALK[:2])) == 1, "one answer is never rewritten"


def test_tools_and_calls_are_written_as_transformers_writes_them(tmp_path):
    tools = [{"type": "function", "function": {"name": "rain", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "1", "function": {"name": "rain", "arguments": {"at": "é"}}}
    messages = [
        {"role": "user", "content": "Did it rain?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "yes"},
        {"role": "assistant", "reasoning": "It says yes.", "content": "It did."},
    ]
    path = write_tokenizer(tmp_path, "bytes", plain("qwen-3"))
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": messages, "tools": tools}) + "\n")
    config = Config.model_validate(
        {"objective": {"name": "instruct"}, "data": {"tokenizer": path}, "model": {"vocab": 500}}
    )
    (row,) = open_examples(str(tmp_path / "rows.jsonl"), config).rows
    ids, mask = theirs("qwen-3", "bytes", messages, tools=tools)
    assert row.first.tolist() == ids and row.token_labels.tolist() == mask


def test_a_tokenizers_template_for_tools_is_taken_for_rows_with_tools(tmp_path):
    """As transformers takes it: Command R and Hermes have one called default, and one called tool_use."""
    tools = [{"type": "function", "function": {"name": "rain"}}]
    given = {"default": plain("chatml"), "tool_use": plain("qwen-3")}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(tokenizer_json("bytes")), chat_template=given
    )
    path = write_tokenizer(tmp_path, "bytes", [{"name": name, "template": text} for name, text in given.items()])
    rows = [{"messages": TALK[:2]}, {"messages": TALK[:2], "tools": tools}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = Config.model_validate(
        {"objective": {"name": "instruct"}, "data": {"tokenizer": path}, "model": {"vocab": 500}}
    )
    found = open_examples(str(tmp_path / "rows.jsonl"), config)
    expected = [tokenizer.apply_chat_template(TALK[:2], tools=asked, return_dict=False) for asked in (None, tools)]
    assert [row.first.tolist() for row in found.rows] == expected and expected[0] != expected[1]
    assert not any("is not read" in line for line in found.remarks)


def test_a_template_with_marks_may_close_a_text_as_it_likes(tmp_path):
    """Phi-3's answers stay the same up to their marks' end; Qwen 3's do not."""
    assert ours(tmp_path, MARKED["phi-3"], "bytes", TALK) == [theirs("phi-3", "bytes", TALK)]
    with pytest.raises(DataError, match="differently when the conversation goes on"):
        ours(tmp_path, MARKED["qwen-3"], "bytes", TALK)


def test_the_templates_as_released_have_no_marks():
    assert all("generation %" in MARKED[style] for style in MARKED)
    assert not any(re.search(r"generation -?%", plain(style)) for style in MARKED)
