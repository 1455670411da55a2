"""What is asked of a model that it cannot do is refused in one line that says what to do instead."""

import json

import pytest

from roots_dist.config.schema import Config
from roots_dist.errors import UserError
from roots_dist.learning.data.tokenizer import train
from roots_dist.runs.generate import chat, generate
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.generate.predict import cut_texts, examples
from roots_dist.runs.generate.prompts import Prompt, beyond_training, open_prompt_encoder, read_prompts
from roots_dist.runs.generate.request import TEMPERATURE, make_request
from roots_dist.runs.generate.sampling import Sampling

TEXTS = [f"The people of State {n} met Mr. Smith; unquestionably it rained there in {1800 + n}." for n in range(40)]
T5 = {"positions": "relative", "norm": "rmsnorm", "bias": False}
OBJECTIVES = {
    "clm": ("gpt", "bpe", {}), "instruct": ("gpt", "bpe", {}), "spans": ("t5", "unigram", T5),
    "mlm": ("bert", "wordpiece", {}),
    "classify": ("bert", "wordpiece", {}), "tag": ("bert", "wordpiece", {}),
    "rotary": ("gpt", "bpe", {"positions": "rotary"}),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    found = tmp_path_factory.mktemp("asked")
    for kind in ("wordpiece", "unigram", "bpe"):
        (found / f"{kind}.json").write_text(train(TEXTS, 300, kind=kind).json)
    (found / "empty.txt").write_text("\n \n")
    (found / "two.txt").write_text("The people\n\nof State\n")
    (found / "pairs.jsonl").write_text('{"prompt": "a", "pair": "b"}\n{"prompt": "c"}\n')
    (found / "endless.txt").symlink_to("/dev/zero")
    (found / "mark.txt").write_text("The people\n", encoding="utf-8-sig")
    (found / "bad.jsonl").write_text('{"prompt": "The people"}\n{"text": "of State"}\n')
    return found


def config(place, name: str, **changes) -> Config:
    family, kind, model = OBJECTIVES[name]
    labels = ["no", "yes"] if name in ("classify", "tag") else []
    tree = {
        "model": {"family": family, "layers": 1, "hidden": 16, "heads": 2, "vocab": 400, **model},
        "objective": {"name": "clm" if name == "rotary" else name},
        "data": {"seq_length": 24, "tokenizer": str(place / f"{kind}.json")},
        "finetune": {"labels": labels},
    }
    return Config.model_validate(tree).changed(changes)


REFUSED = [
    ("clm", {"prompt": ""}, (
"prompt = '': expected text that is not empty. Fix: give at least one word, or --prompts FILE."
)),
    ("clm", {"prompt": "The people", "max_tokens": 30}, (
"of at most 24 tokens, the number of learned positions; these are 3 + 30. Fix: a shorter prompt, or "
"--max-tokens 21."
)),
    ("clm", {"prompt": "The people " * 30}, "+ 1. Fix: a shorter prompt."),
    ("clm", {"prompt": "a", "beams": 4, "temperature": 0.5, "top_k": 3}, (
"--temperature = 0.5: expected no value with --beams, which takes the likeliest texts. Fix: leave "
"--temperature out."
)),
    ("clm", {"prompt": "a", "beams": 4, "temperature": 0.5, "top_k": 3}, (
"--top-k = 3: expected no value with --beams"
)),
    ("clm", {"prompt": "a", "beams": 4, "greedy": True}, "--greedy = True: expected no value with --beams"),
    ("clm", {"prompt": "a", "beams": 2, "samples": 3}, (
"--samples = 3: expected at most --beams = 2. Fix: raise --beams to 3, or lower --samples."
)),
    ("clm", {"prompt": "a", "greedy": True, "samples": 3}, (
"--samples = 3: expected 1, because all greedy answers are the same"
)),
    ("clm", {"prompt": "a", "greedy": True, "top_p": 0.3}, "--top-p = 0.3: expected no value with --greedy"),
    ("clm", {"prompt": "a", "length_penalty": 2.0}, (
"--length-penalty = 2.0: expected no value without --beams. Fix: add --beams 4."
)),
    ("clm", {"prompt": "a", "stop": ("",)}, "--stop = '': expected text that is not empty"),
    ("clm", {"prompt": "a", "raw": True}, (
"--raw = True: expected no value: with objective.name=clm every prompt is read as it is"
)),
    ("clm", {"prompt": "a", "top": 3}, (
"--top = 3: expected no value: a model of objective.name=clm writes. Fix: leave --top out."
)),
    ("clm", {"prompt": "a", "prompts": "two.txt"}, "--prompts = 'two.txt': expected no other prompt"),
    ("clm", {"prompts": "none.txt"}, (
"--prompts = 'none.txt': expected a file that can be read (no such file or directory: "
"none.txt in /"
)),
    ("clm", {"prompts": "endless.txt"}, "expected a file that can be read (not a plain file: endless.txt in /"),
    ("clm", {"prompts": "none.jsonl"}, "expected a file that can be read (no such file or directory: none.jsonl in /"),
    ("clm", {"prompts": "empty.txt"}, "--prompts = 'empty.txt': expected a file with at least one prompt"),
    ("clm", {"prompts": "bad.jsonl"}, "bad.jsonl:2: prompt = None: expected a text. Fix: write lines like"),
    ("clm", {"prompts": "two.txt", "max_tokens": 23}, (
"two.txt:1 = 'The people': expected prompt and continuation of at most 24"
)),
    ("clm", {"prompt": "a", "max_tokens": 3, "output": "nowhere/a.jsonl"}, (
"--output = 'nowhere/a.jsonl': expected a file in an existing folder. Fix: make nowhere."
)),
    ("clm", {"prompt": "a", "max_tokens": 3, "output": "."}, (
"--output = '.': expected a file, and this is a folder. Fix: choose another file."
)),
    ("clm", {"prompt": "a", "max_tokens": 3, "output": "/proc/a.jsonl"}, (
"--output = '/proc/a.jsonl': expected a file that can be written ("
)),
    ("clm", {"prompt": "a \udcff", "max_tokens": 3}, (
"prompt = 'a ?': expected text in Unicode, and these bytes are not."
)),
    ("clm", {"prompt": "a", "max_tokens": 3, "stop": ("\udcff",)}, "udcff',)\": expected text in Unicode. Fix: "),
    ("classify", {"prompts": "pairs.jsonl"}, (
"pairs.jsonl:1 = 'a': expected no second text, because this model was trained on single texts. Fix: leave pair "
"out."
)),
    ("mlm", {"prompt": "The people met."}, (
"prompt = 'The people met.': expected a text with a mask ([MASK]). Fix: write [MASK] where a word is "
"missing."
)),
    ("mlm", {"prompt": "[MASK] met." * 30}, (
"expected at most 22 tokens of 24 learned positions, because two tokens enclose it"
)),
    ("mlm", {"prompt": "[MASK]", "temperature": 0.3}, (
"--temperature = 0.3: expected no value: a model of objective.name=mlm fills masks."
)),
    ("classify", {"prompt": "It rained.", "beams": 2}, (
"--beams = 2: expected no value: a model of objective.name=classify gives a text a label."
)),
    ("classify", {"prompt": "It rained.", "pair": "so"}, (
"--pair = 'so': expected no value: this model was trained on single texts"
)),
    ("tag", {"prompt": "It rained.", "top": 2}, (
"--top = 2: expected no value: a model of objective.name=tag gives each word a label."
)),
]  # fmt: skip


@pytest.mark.parametrize("name, asked, words", REFUSED, ids=lambda value: value if isinstance(value, str) else None)
def test_what_cannot_be_is_refused_before_anything_is_loaded(place, monkeypatch, name, asked, words):
    monkeypatch.chdir(place)
    paths = {key: place.__class__(value) for key, value in asked.items() if key in ("prompts", "output")}
    with pytest.raises(UserError) as refused:
        generate.check(config(place, name), GenerateOptions(**asked | paths))
    lines = [line for line in refused.value.cli_message().splitlines() if words in line]
    assert len(lines) == 1 and lines[0].startswith("✗ ") and "Fix: " in lines[0], refused.value.cli_message()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_each_model_is_for_is_not_refused(place, name):
    prompt = "The [MASK] of State" if name == "mlm" else "The people of State"
    writes = {"stop": ("x",), "samples": 2, "top_p": 0.5} if name in ("clm", "instruct", "spans", "rotary") else {}
    generate.check(config(place, name), GenerateOptions(prompt=prompt, **writes))
    if name == "rotary":  # no position is its last
        generate.check(config(place, name), GenerateOptions(prompt=prompt * 30, max_tokens=500))


def test_a_run_without_a_tokenizer_or_with_an_unknown_label_says_so(place):
    with pytest.raises(
        UserError, match="data.tokenizer = None: expected a tokenizer to encode and decode text. Fix: name the"
    ):
        generate.check(config(place, "clm", **{"data.tokenizer": None}), GenerateOptions(prompt="a", max_tokens=3))
    with pytest.raises(
        UserError,
        match="expected a second text, because this model was trained on pairs. Fix: give it with --pair TEXT",
    ):
        generate.check(config(place, "classify", **{"finetune.pair_column": "other"}), GenerateOptions(prompt="a"))


def test_who_does_not_converse_says_so_in_one_line(place):
    for name, words in {
        "mlm": (
            "model.family = 'bert': expected gpt, because a conversation needs a decoder. "
            "Fix: fill masks in with roots generate."
        ),
        "spans": "model.family = 't5': expected gpt, because a conversation needs a decoder. Fix: use roots generate.",
    }.items():
        with pytest.raises(UserError) as refused:
            chat.check(config(place, name), GenerateOptions())
        assert refused.value.cli_message() == f"✗ {words}"
    with pytest.raises(
        UserError, match="tp × parallel.pp = 2: expected 1, because a conversation runs in one process. Fix: "
    ):
        chat.check(config(place, "clm", **{"parallel.tp": 2}), GenerateOptions())
    chat.check(config(place, "clm"), GenerateOptions(temperature=0.3))


def test_prompts_come_from_lines_and_from_rows(place):
    assert [(g.text, g.place) for g in read_prompts(GenerateOptions(prompts=place / "two.txt"))] == [
        ("The people", f"{place}/two.txt:1"), ("of State", f"{place}/two.txt:3"),
    ]  # fmt: skip
    assert [given.text for given in read_prompts(GenerateOptions(prompts=place / "mark.txt"))] == [
        "The people"
    ]  # without the byte order mark
    assert [(g.text, g.pair) for g in read_prompts(GenerateOptions(prompts=place / "pairs.jsonl"))] == [
        ("a", "b"),
        ("c", None),
    ]


def test_t5_reads_a_prompt_as_it_was_taught(place):
    """Closed by its end; a sentinel is one token, without the space that training never shows before it."""
    words = open_prompt_encoder(config(place, "spans"), talks=False)
    tokens = [words.codec.backend.id_to_token(i) for i in words.ids("The people <extra_id_0> State <extra_id_1>")]
    assert tokens[-2:] == ["<extra_id_1>", "</s>"] and tokens.count("<extra_id_0>") == 1
    assert tokens[tokens.index("<extra_id_0>") - 1] != "▁" and tokens[tokens.index("<extra_id_0>") + 1].startswith("▁")
    assert words.start == words.codec.backend.token_to_id("<pad>")
    sentinel = words.codec.backend.token_to_id("<extra_id_0>")
    said = [sentinel, *words.codec.encode("met"), words.specials.end]
    assert words.stops().text(said) == "met"
    assert words.stops(prompts=("a <extra_id_0> b",)).text(said) == "<extra_id_0> met"


def test_an_instruct_model_reads_the_template_and_raw_the_text(place):
    c = config(place, "instruct")
    talking, plain = open_prompt_encoder(c, talks=True), open_prompt_encoder(c, talks=False)
    assert talking.codec.decode(talking.ids("Did it rain?")) == "user: Did it rain?\nassistant:"
    assert plain.codec.decode(plain.ids("Did it rain?")) == "Did it rain?"
    assert talking.ends == plain.ends == {talking.codec.backend.token_to_id("<|endoftext|>")}


def test_what_a_template_closes_an_answer_with_ends_it(place):
    backend = train(TEXTS, 300).backend
    backend.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    (place / "marked.json").write_text(backend.to_str())
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if "
        "add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (place / "marked.jinja").write_text(template)
    changes = {"data.tokenizer": str(place / "marked.json"), "finetune.chat_template": str(place / "marked.jinja")}
    words = open_prompt_encoder(config(place, "instruct", **changes), talks=True)
    assert words.ends == {backend.token_to_id("<|im_end|>"), backend.token_to_id("<|endoftext|>")}
    assert Prompt("x").place == "prompt" and len(words.ids("a")) < len(words.ids("a b c d e f"))


def test_a_model_is_sampled_as_its_generation_config_says_unless_an_option_does(place, tmp_path):
    (tmp_path / "tokenizer.json").write_text((place / "bpe.json").read_text())
    c = config(place, "clm").changed({"data.tokenizer": str(tmp_path / "tokenizer.json")})
    assert make_request(GenerateOptions(), c).sampling == Sampling(TEMPERATURE)
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05}
    (tmp_path / "generation_config.json").write_text(json.dumps(said))
    assert make_request(GenerateOptions(), c).sampling == Sampling(0.6, 20, 0.95, None, 1.05)
    assert make_request(GenerateOptions(top_p=0.5), c).sampling == Sampling(0.6, 20, 0.5, None, 1.05)
    assert make_request(GenerateOptions(greedy=True), c).sampling == Sampling(0.0)
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"do_sample": False}))
    assert make_request(GenerateOptions(), c).sampling == Sampling(TEMPERATURE)
    (tmp_path / "generation_config.json").write_text(json.dumps(said | {"top_p": "much"}))
    with pytest.raises(UserError, match="top_p = 'much': expected a number from 1e-06 to 1. Fix: "):
        make_request(GenerateOptions(), c)


def test_a_model_with_rotary_positions_holds_what_it_was_made_for_not_what_a_run_trained_on(place):
    c = config(place, "rotary").changed({"model.max_positions": 4096})
    assert open_prompt_encoder(c, talks=False).positions == 4096


@pytest.mark.parametrize("name, words", [("rotary", "rotary"), ("spans", "relative")])
def test_prompts_longer_than_any_text_of_training_are_remarked(place, name, words):
    """They are read whole, which nothing else says."""
    encoder = open_prompt_encoder(config(place, name), talks=False)
    assert encoder.config.model.positions == words and beyond_training([[1] * 24, [1]], encoder) is None
    said = "25 tokens. All are read, but the model was made for texts of 24: answers may be worse"
    assert beyond_training([[1] * 25], encoder) == f"the prompt has {said}"
    assert beyond_training([[1], [1] * 25], encoder) == f"the longest prompt has {said}"


def test_texts_that_are_cut_before_they_are_classified_are_remarked(place):
    encoder = open_prompt_encoder(config(place, "classify"), talks=False)
    short, long = Prompt("The people", None, "prompt 1"), Prompt("The people " * 40, None, "prompt 2")
    assert cut_texts(examples([short], encoder), encoder) is None
    only = "longer than data.seq_length = 24: only the beginning is read"
    assert cut_texts(examples([long], encoder), encoder) == f"the text is {only}"
    assert cut_texts(examples([short, long, long], encoder), encoder) == f"2 of 3 texts are {only}"
