"""Special tokens by a tokenizer's files: who is asked first, what is left to the names, and what is refused."""

import json

import pytest
import tokenizers as hf
from typer.testing import CliRunner

from roots_dist.cli.main import app
from roots_dist.config.special_tokens import describe, read_special_tokens, special_tokens
from roots_dist.errors import DataError
from roots_dist.learning.data.chat import open_chat
from roots_dist.learning.data.specials import read_specials
from roots_dist.learning.data.tokenizer import load

WORDS = ("<s>", "</s>", "<stop>", "<turn>", "<pad>", "a", "<|endoftext|>")
TREE = {"model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(WORDS)}, "unk_token": "a"}}
SETTINGS, MAP, GENERATION, MODEL = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)


def ids(*words: str) -> tuple[int, ...]:
    return tuple(map(WORDS.index, words))


def names(*words: str) -> dict:
    return dict(zip(("bos_token", "eos_token"), words))


GENERAL = {"bos_token_id": 3, "eos_token_id": [2, 1]}
OTHERS = {"bos_token_id": 50256, "eos_token_id": 50256, "pad_token_id": -1}
ORDER = [
    ({}, "<s>", ("<|endoftext|>",)),  # by their names
    ({SETTINGS: names("<turn>", "<stop>"), MAP: names("a", "a")}, "<turn>", ("<stop>",)),
    ({SETTINGS: {"model_max_length": 9}, MAP: names("<turn>", "<stop>")}, "<turn>", ("<stop>",)),
    ({SETTINGS: {"eos_token": "<stop>"}}, None, ("<stop>",)),  # files that name an end and no beginning mean it
    ({SETTINGS: {"bos_token": None, "eos_token": None}}, None, ("<|endoftext|>",)),
    ({SETTINGS: {"bos_token": None}, MODEL: {"bos_token_id": 0}}, None, ("<|endoftext|>",)),
    ({SETTINGS: {"bos_token": None}, MAP: {"bos_token": {"content": "<turn>"}}}, "<turn>", ("<|endoftext|>",)),
    ({GENERATION: GENERAL, MODEL: {"eos_token_id": 5}}, "<turn>", ("<stop>", "</s>")),
    ({MODEL: {"bos_token_id": 3, "eos_token_id": 2}}, "<turn>", ("<stop>",)),
    ({SETTINGS: names("<s>", "<turn>"), GENERATION: {"eos_token_id": [2, 3]}}, "<s>", ("<turn>", "<stop>")),
    ({SETTINGS: names("<s>", "<turn>"), MODEL: {"eos_token_id": [2, 3]}}, "<s>", ("<turn>", "<stop>")),
    ({MODEL: OTHERS}, "<s>", ("<|endoftext|>",)),  # ids that this tokenizer does not have
]  # fmt: skip


@pytest.mark.parametrize("files, bos, eos", ORDER)
def test_who_says_it_first_counts(files, bos, eos):
    found = special_tokens(TREE, files)
    assert (found.bos, found.eos) == (None if bos is None else WORDS.index(bos), ids(*eos))
    assert found.pad == WORDS.index("<pad>") and found.end == found.eos[0]
    assert found.first == (found.end if bos is None else found.bos)
    assert found.eos_is_listed == ("eos_token_id" in files.get(GENERATION, {}))


def processor(single: str, *tokens: str) -> dict:
    made = hf.processors.TemplateProcessing(single=single, special_tokens=[(t, WORDS.index(t)) for t in tokens])
    return json.loads(made.__getstate__())


BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
ROBERTA = {
    "type": "RobertaProcessing",
    "cls": ["<s>", 0],
    "sep": ["</s>", 1],
    "trim_offsets": True,
    "add_prefix_space": True,
}
AROUND = [
    (None, {}, (), ()),
    (BYTES, {}, (), ()),
    (processor("<s> $A </s>", "<s>", "</s>"), {}, ("<s>",), ("</s>",)),
    (processor("<s> <turn> $A", "<s>", "<turn>"), {}, ("<s>", "<turn>"), ()),
    ({"type": "Sequence", "processors": [BYTES, processor("<s> $A", "<s>")]}, {}, ("<s>",), ()),
    (ROBERTA, {}, ("<s>",), ("</s>",)),
    (None, {"add_bos_token": True, "add_eos_token": True}, ("<s>",), ("</s>",)),
    (processor("<s> $A", "<s>"), {"add_bos_token": True}, ("<s>",), ()),
    (processor("<s> $A", "<s>"), {"add_bos_token": False}, ("<s>",), ()),  # as transformers 5 reads it
    (None, {"add_bos_token": False}, (), ()),
]


@pytest.mark.parametrize("post_processor, how, before, after", AROUND)
def test_what_stands_around_a_text_is_known_without_the_library(post_processor, how, before, after, tmp_path):
    files = {SETTINGS: names("<s>", "</s>") | how}
    found = special_tokens(TREE | {"post_processor": post_processor}, files)
    assert (found.before, found.after) == (ids(*before), ids(*after))
    assert (found.add_bos, found.add_eos) == ("<s>" in before, "</s>" in after)
    if not how:
        tree = json.loads(hf.Tokenizer(hf.models.WordLevel(TREE["model"]["vocab"], unk_token="a")).to_str())
        read = hf.Tokenizer.from_str(json.dumps(tree | {"post_processor": post_processor}))
        assert read.encode("a").ids == [*found.before, WORDS.index("a"), *found.after]


REFUSED = [
    (
        {SETTINGS: {"eos_token": "<no>"}},
        "tokenizer_config.json: eos_token = '<no>': expected a token of tokenizer.json",
    ),
    ({MAP: {"bos_token": "<no>"}}, "special_tokens_map.json: bos_token = '<no>': expected a token of tokenizer.json"),
    ({SETTINGS: {"pad_token": 3}}, "tokenizer_config.json: pad_token = 3: expected a token, or null"),
    ({GENERATION: {"eos_token_id": "</s>"}}, "generation_config.json: eos_token_id = '</s>': expected the id of a"),
    ({MODEL: {"bos_token_id": [True]}}, "config.json: bos_token_id = [True]: expected the id of a token"),
]


@pytest.mark.parametrize("files, told", REFUSED)
def test_what_names_no_token_is_refused_in_a_line(files, told, tmp_path):
    for name, tree in {"tokenizer.json": TREE, **files}.items():
        (tmp_path / name).write_text(json.dumps(tree))
    with pytest.raises(DataError) as refused:
        read_special_tokens(tmp_path / "tokenizer.json")
    assert str(refused.value).startswith(told) and "Fix: " in str(refused.value) and "\n" not in str(refused.value)
    assert describe(str(tmp_path / "tokenizer.json")) == f"special tokens: {refused.value}"


def test_a_mark_of_byte_order_and_an_empty_name_are_nothing(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(TREE))
    (tmp_path / SETTINGS).write_bytes(b"\xef\xbb\xbf" + json.dumps({"bos_token": "", "eos_token": "<stop>"}).encode())
    found = read_special_tokens(tmp_path / "tokenizer.json")
    assert (found.bos, found.eos) == (None, ids("<stop>"))


@pytest.mark.parametrize("name", ["tokenizer.json", SETTINGS, GENERATION])
def test_a_file_that_cannot_be_read_is_named(name, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(TREE))
    (tmp_path / name).write_text("{")
    with pytest.raises(DataError, match=f"/{name}': expected a {name} that can be read"):
        read_special_tokens(tmp_path / "tokenizer.json")


def test_documents_and_objectives_ask_the_same(tmp_path):
    tokenizer = hf.Tokenizer(hf.models.WordLevel(TREE["model"]["vocab"], unk_token="a"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / SETTINGS).write_text(json.dumps(names("<turn>", "<stop>")))
    (tmp_path / GENERATION).write_text(json.dumps({"eos_token_id": [1, 2]}))
    read, specials = load(tmp_path / "tokenizer.json"), read_specials(tmp_path / "tokenizer.json", len(WORDS))
    assert read.end_token == "<stop>" and read.specials == specials.tokens
    assert specials.end == WORDS.index("<stop>") and specials.tokens.eos == ids("<stop>", "</s>")
    assert specials.special[list(ids("<stop>", "</s>", "<turn>"))].all() and not specials.special[WORDS.index("a")]
    assert load(tmp_path / "tokenizer.json", "</s>").end_token == "</s>"


def test_a_chat_template_knows_what_special_tokens_map_names(tmp_path):
    for name, tree in {"tokenizer.json": TREE, SETTINGS: {"bos_token": None}, MAP: names("<turn>", "<stop>")}.items():
        (tmp_path / name).write_text(json.dumps(tree))
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}")
    chat = open_chat(None, str(tmp_path / "tokenizer.json"), "<stop>")
    assert chat.prompt([{"role": "user", "content": "a"}]) == "<turn>a<stop>"


def test_commands_show_the_tokens_and_who_names_them(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(TREE | {"post_processor": processor("<turn> $A", "<turn>")}))
    (tmp_path / SETTINGS).write_text(json.dumps(names("<turn>", "<stop>")))
    (tmp_path / "config.yaml").write_text(f"data: {{train: gone, tokenizer: {tmp_path}/tokenizer.json}}\n")
    done = CliRunner().invoke(app, ["train", str(tmp_path / "config.yaml"), "--print-config"])
    last = done.output.rstrip("\n").rpartition("\n")[2]
    assert last.startswith(f"# special tokens of {tmp_path}/tokenizer.json: bos <turn> = 3 (tokenizer_config.json); ")
    assert "eos <stop> = 2 (tokenizer_config.json); pad <pad> = 4 (by its name)" in last
    assert last.endswith("a text is read as <turn> TEXT")
    assert "names no tokenizer.json" in describe(None)
