"""`roots generate` and `roots chat` as users start them: every kind of model, in every layout the same answer."""

import json
import os
import pty
import re
import select
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import environ, roots, without_progress

from roots_dist.assembly.run import build_run
from roots_dist.cli.chat import CHAT
from roots_dist.cli.generate import GENERATE
from roots_dist.config.load import to_yaml
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError
from roots_dist.layout import Layout
from roots_dist.learning.data.tokenizer import load, train
from roots_dist.learning.objectives import make_objective
from roots_dist.runs.generate import chat as chats
from roots_dist.runs.generate.generate import generate, load_model
from roots_dist.runs.generate.options import GenerateOptions
from roots_dist.runs.generate.prompts import open_prompt_encoder
from roots_dist.runs.generate.request import make_request
from roots_dist.runs.ranks.run_on_ranks import ready
from roots_dist.storage.checkpoint.save import save
from roots_dist.testing.world import on_warm_world
from roots_dist.world.batch import stack_samples
from roots_dist.world.mesh import Mesh

TEXTS = [f"The people of State {n} met Mr. Smith; unquestionably it rained there in {1800 + n}." for n in range(40)]
ENCODER = {"norm_position": "post", "embedding_norm": True, "activation": "gelu", "segments": 2}
T5 = {"positions": "relative", "norm": "rmsnorm", "bias": False}
RUNS = {
    "gpt": ("gpt", "clm", "bpe", {"positions": "rotary"}),
    "instruct": ("gpt", "instruct", "bpe", {}),
    "t5": ("t5", "spans", "unigram", T5),
    "bert": ("bert", "mlm", "wordpiece", ENCODER),
    "electra": ("electra", "rtd", "wordpiece", ENCODER),
    "classify": ("bert", "classify", "wordpiece", ENCODER),
    "pairs": ("electra", "classify", "wordpiece", ENCODER),
    "decoder": ("gpt", "classify", "bpe", {}),
    "tag": ("bert", "tag", "wordpiece", ENCODER),
}
"""Family, objective, tokenizer, model.*"""
ASKED = {
    "gpt": GenerateOptions(prompt="The people of", max_tokens=12, greedy=True),
    "instruct": GenerateOptions(prompt="Did it rain?", max_tokens=12, seed=3),
    "t5": GenerateOptions(prompt="The <extra_id_0> of State met", max_tokens=8, beams=3, samples=2),
    "bert": GenerateOptions(prompt="The [MASK] of State met [MASK] Smith.", top=3),
    "electra": GenerateOptions(prompt="The [MASK] of State met <mask> Smith.", top=3),
    "classify": GenerateOptions(prompt="The people met Mr. Smith."),
    "pairs": GenerateOptions(prompt="The people met Mr. Smith.", pair="It rained there."),
    "decoder": GenerateOptions(prompt="The people met Mr. Smith."),
    "tag": GenerateOptions(prompt="The people met Mr. Smith."),
}
SEQ = 48


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A run of each kind, as training leaves it, of a model that has learned nothing; and files of prompts."""
    found = tmp_path_factory.mktemp("generate")
    for kind in ("wordpiece", "unigram", "bpe"):
        (found / f"{kind}.json").write_text(train(TEXTS, 300, kind=kind).json)
    for name, (family, objective, kind, model) in RUNS.items():
        path = found / f"{kind}.json"
        sizes = {"family": family, "layers": 2, "hidden": 32, "heads": 4, "vocab": load(path).vocab, "init_std": 0.4}
        config = Config.model_validate(
            {
                "model": sizes | model,
                "generator": {"hidden": 16, "heads": 2} if family == "electra" else {},
                "objective": {"name": objective},
                "data": {"seq_length": SEQ, "tokenizer": str(path), "train": "gone", "validation": "gone"},
                "train": {"device": "cpu", "global_batch": 3},
                "finetune": {
                    "labels": ["no", "yes", "maybe"] if objective in ("classify", "tag") else [],
                    "pair_column": "other" if name == "pairs" else None,
                },
                "track": {"folder": str(found / name), "wandb": "disabled"},
                "advanced": {"threads": 1, "timeout_s": 60},
            }
        )
        run = build_run(config, Mesh.single())
        (found / name).mkdir()
        (found / name / "config.yaml").write_text(to_yaml(config))
        save(found / name, 1, run.engine, run.params, Mesh.single(), {"tokens": 0, "skipped": 0})
    (found / "prompts.txt").write_text("The people\nIt rained there in 1805. Unquestionably\nMr. Smith\n")
    return found


def config_of(command, run: Path, overrides: list[str], size: int) -> tuple[Config, Layout]:
    loaded = command.fit(command.read(str(run), overrides), size)
    layout = ready(loaded, size, None, command.not_required)
    return loaded.config, layout


def answered(run: Path, asked: GenerateOptions, rank: int = 0, size: int = 1, overrides: list[str] = []) -> str:  # noqa: B006
    """What is shown on this rank."""
    config, layout = config_of(GENERATE, run, overrides, size)
    shown: list[str] = []
    GENERATE.check(config, options=asked)
    generate(config, Mesh.connect(layout, rank), options=asked, show=shown.append)
    return "".join(shown)


def all_answered(rank: int, size: int, place: str, overrides: list[str]) -> dict[str, str]:
    return {name: answered(Path(place) / name, asked, rank, size, overrides) for name, asked in ASKED.items()}


def apart(text: str) -> tuple[str, list[float]]:
    """What is said, and the percentages in it."""
    return re.sub(r"[\d.]+%", "%", text), [float(share) for share in re.findall(r"([\d.]+)%", text)]


def test_every_kind_of_model_answers_alike_in_one_process_and_in_tp2_pp2(place):
    alone = all_answered(0, 1, str(place), [])
    first, *others = on_warm_world(
        4, all_answered, str(place), ["parallel.tp=2", "parallel.pp=2", "parallel.sequence_parallel=true"]
    )
    for name, text in alone.items():
        words, shares = apart(text)
        assert apart(first[name]) == (words, pytest.approx(shares, abs=0.011)), name  # the last digit shown is rounded
    assert all(not text for other in others for text in other.values())  # one rank speaks
    assert alone["gpt"].startswith("The people of") and alone["gpt"].endswith("\n") and len(alone["gpt"]) > 20
    assert alone["t5"].count("\n\n") == 1 and "</s>" not in alone["t5"]
    assert alone["bert"].count("%") == alone["electra"].count("%") == 6 and "mask 2" in alone["bert"]
    assert alone["bert"].splitlines()[-1].startswith("the") and "mask" not in alone["bert"].splitlines()[-1]
    assert sorted(line.split()[1] for line in alone["classify"].splitlines()) == ["maybe", "no", "yes"]
    assert [line.split()[0] for line in alone["tag"].splitlines()] == ["The", "people", "met", "Mr.", "Smith."]


def records(rank: int, size: int, run: str, overrides: list[str], how: dict) -> list:
    output = Path(run) / f"answers-{size}-{how['seed']}.jsonl"
    asked = GenerateOptions(prompts=Path(run).parent / "prompts.txt", output=output, max_tokens=9, **how)
    shown = answered(Path(run), asked, rank, size, overrides)
    if rank > 0:
        return []
    assert shown == f"{3 * (asked.samples or 1)} answers in {output}\n"
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("how", [{"seed": 1, "samples": 2}, {"seed": 2, "beams": 2}], ids=["drawn", "beams"])
def test_data_ranks_share_a_file_of_prompts_and_all_answers_are_written_in_its_order(place, how):
    alone = records(0, 1, str(place / "gpt"), [], how)
    shared, _ = on_warm_world(2, records, str(place / "gpt"), [], how)
    assert [(r["prompt"], r["text"]) for r in shared] == [(r["prompt"], r["text"]) for r in alone]
    prompts = (place / "prompts.txt").read_text().splitlines()
    assert [r["prompt"] for r in alone] == [prompt for prompt in prompts for _ in range(how.get("samples", 1))]
    assert all(r["text"] for r in alone)
    assert all(("score" in r) == ("beams" in how) for r in alone)


def test_what_is_streamed_is_what_several_are_answered_with(place):
    several = answered(place / "gpt", GenerateOptions(prompts=place / "prompts.txt", max_tokens=15, greedy=True))
    prompts = (place / "prompts.txt").read_text().splitlines()
    one_by_one = [
        answered(place / "gpt", GenerateOptions(prompt=prompt, max_tokens=15, greedy=True)) for prompt in prompts
    ]
    assert several == "\n".join(one_by_one)


def test_a_stop_string_ends_the_text_before_it(place):
    whole = (
        answered(place / "gpt", GenerateOptions(prompt="The people", max_tokens=30, greedy=True))
        .removeprefix("The people")
        .rstrip("\n")
    )
    stop = whole[12:15]
    cut = answered(place / "gpt", GenerateOptions(prompt="The people", max_tokens=30, greedy=True, stop=("zzzz", stop)))
    assert cut == f"The people{whole[: whole.index(stop)]}\n"


def test_labels_are_those_that_evaluation_sees(place):
    """The same row through the reader of files, as in training; the text is longer than data.seq_length."""
    text = " ".join(TEXTS[:6])
    for name in ("classify", "tag", "decoder"):
        config, _ = config_of(GENERATE, place / name, [], 1)
        label = ["no"] * len(text.split()) if name == "tag" else "no"
        (place / "row.jsonl").write_text(json.dumps({"text": text, "label": label}) + "\n")
        objective = make_objective(config)
        batch = stack_samples([objective.sample(objective.open(str(place / "row.jsonl")), 0, None)], [0], 0)
        passes = load_model(config, Mesh.single())
        (term,) = passes.forward([batch])
        shown = answered(place / name, GenerateOptions(prompt=text))
        if name == "tag":
            labels = [line.split()[1] for line in shown.splitlines() if not line.startswith("(")]
            assert len(labels) == int(term.count) < len(text.split()) and labels.count("no") == int(term.hits)
            assert f"({len(text.split()) - len(labels)} more words do not fit data.seq_length = {SEQ})" in shown
        else:
            p = {line.split()[1]: float(line.split("%")[0]) / 100 for line in shown.splitlines()}
            assert p["no"] == pytest.approx(torch.exp(-term.sum).item(), abs=1e-4)


def talk(place: Path, lines: list[str | BaseException], run: str = "gpt", overrides: list[str] = [], **how) -> str:  # noqa: B006
    config, _ = config_of(CHAT, place / run, overrides, 1)
    said, shown = iter(lines), []

    def read_line() -> str:
        line = next(said, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    asked = GenerateOptions(**{"max_tokens": 8, "greedy": True} | how)
    CHAT.check(config, options=asked)
    chats.chat(config, Mesh.single(), options=asked, read_line=read_line, show=shown.append)
    return "".join(shown).split("\n", 1)[1]


def test_a_conversation_goes_on_from_what_was_said_until_it_is_reset(place):
    first, twice = talk(place, ["Who met?"]), talk(place, ["Who met?", "Who met?"])
    assert twice.startswith(first) and twice != first + first
    assert talk(place, ["Who met?", "/reset", "Who met?"]) == f"{first}(forgotten)\n{first}"


def test_commands_are_no_part_of_the_conversation(place):
    assert talk(place, ["/help", "", "  ", "/exit", "Who met?"]) == chats.HELP
    assert talk(place, ["Who \udcff?"]) == talk(place, ["Who ??"])  # a byte that is no text
    assert talk(place, [KeyboardInterrupt(), "/reset"]) == "\n(forgotten)\n"


def test_the_prompt_of_a_conversation_is_the_template_with_all_that_was_said(place):
    config, _ = config_of(CHAT, place / "instruct", [], 1)
    shown: list[str] = []
    words = open_prompt_encoder(config, talks=True)
    asked = GenerateOptions(max_tokens=4, greedy=True)
    one = chats.ChatSession(
        load_model(config, Mesh.single()), words, make_request(asked, config), words.stops(), shown.append
    )
    one.reply_to("Who?")
    answer = one.history[1]["content"]
    assert "".join(shown).strip() == answer
    prompt = words.codec.decode(words.conversation([*one.history, {"role": "user", "content": "So?"}]))
    assert prompt == f"user: Who?\nassistant: {answer}<|endoftext|>\nuser: So?\nassistant:"


def test_what_the_model_cannot_hold_is_forgotten_the_oldest_first(place):
    config, _ = config_of(CHAT, place / "instruct", [], 1)
    words, shown = open_prompt_encoder(config, talks=True), []
    request = make_request(GenerateOptions(max_tokens=6, greedy=True), config)
    one = chats.ChatSession(load_model(config, Mesh.single()), words, request, words.stops(), shown.append)
    for number in range(6):
        one.reply_to(f"Who {number}?")
        assert one.history[-2]["content"] == f"Who {number}?" and one.history[-1]["role"] == "assistant"
        assert len(words.conversation(one.history[:-1])) <= SEQ - 6
    assert "forgotten: the model holds 48 tokens)" in "".join(shown) and len(one.history) < 12
    kept = list(one.history)
    one.reply_to("Who met Mr. Smith there? " * 9)
    assert "shorten it)" in shown[-1]
    assert all(message in kept for message in one.history)  # what could not be said is not remembered


def test_ctrl_c_stops_an_answer_and_not_the_conversation(place):
    config, _ = config_of(CHAT, place / "gpt", ["data.seq_length=500"], 1)
    words, shown = open_prompt_encoder(config, talks=True), []

    def show(text: str) -> None:
        shown.append(text)
        if len(shown) == 3:
            raise KeyboardInterrupt

    passes = load_model(config, Mesh.single())
    one = chats.ChatSession(
        passes, words, make_request(GenerateOptions(max_tokens=20, greedy=True), config), words.stops(), show
    )
    one.reply_to("Who?")
    assert 3 <= len(shown) < 8 and one.history[1]["content"] == "".join(shown).strip()
    one.reply_to("Who?")
    assert len(shown) > 8 and [m["role"] for m in one.history] == ["user", "assistant"] * 2


def test_a_model_that_was_not_taught_to_converse_stops_before_it_speaks_for_the_user(place, monkeypatch):
    """Whatever it says first is made the user's name."""
    whole = talk(place, ["Who met?"], max_tokens=20).rstrip("\n")
    name = whole[6:9]
    monkeypatch.setattr(chats, "USER_TURN", (name,))
    assert talk(place, ["Who met?"], max_tokens=20) == whole[: whole.index(name)].rstrip() + "\n"
    assert talk(place, ["Who met?"], run="instruct", max_tokens=20) == talk(
        place, ["Who met?"], run="instruct", max_tokens=20, stop=("zzzz",)
    )


def test_a_conversation_is_held_by_one_process(place):
    for run, overrides, words in (("gpt", ["parallel.pp=2"], "runs in one process"), ("bert", [], "needs a decoder")):
        loaded = CHAT.fit(CHAT.read(str(place / run), overrides), 1)
        with pytest.raises(ConfigError, match=words):
            CHAT.check(loaded.config, options=GenerateOptions())


def started(*words: str, **how) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "roots_dist", *words], env=environ(), text=True, capture_output=True, timeout=250, **how
    )


def test_the_command_starts_the_processes_that_a_layout_needs_with_all_of_its_options(place):
    found = started(
        "generate",
        str(place / "gpt"),
        "The people of",
        "parallel.tp=2",
        "--max-tokens",
        "12",
        "--greedy",
        "--stop",
        "zzzz",
    )
    assert (found.returncode, without_progress(found.stderr)) == (0, "")
    assert found.stdout == answered(place / "gpt", ASKED["gpt"])


def test_overrides_may_follow_a_file_of_prompts_and_a_mistake_is_one_line(place):
    found = roots("generate", str(place / "bert"), "advanced.threads=1", "--prompts", str(place / "prompts.txt"))
    assert found.returncode == 2 and not found.stdout
    assert found.stderr == (
        f"✗ {place}/prompts.txt:1 = 'The people': expected a text with a mask ([MASK]). Fix: write [MASK] "
        "where a word is missing.\n"
    )


def test_a_conversation_can_be_piped(place):
    found = started("chat", str(place / "gpt"), "--max-tokens", "8", "--greedy", input="Who met?\n/reset\nWho met?\n")
    assert (found.returncode, without_progress(found.stderr)) == (0, "")
    assert found.stdout.split("\n", 1)[1] == talk(place, ["Who met?", "/reset", "Who met?"])


def test_a_terminal_has_a_prompt_and_ctrl_c_there_stops_the_answer(place):
    master, slave = pty.openpty()
    words = [
        "chat",
        str(place / "gpt"),
        "data.seq_length=8000",
        "--max-tokens",
        "3900",
        "--greedy",
    ]  # nobody waits for all of it
    child = subprocess.Popen(
        [sys.executable, "-m", "roots_dist", *words], env=environ(), stdin=slave, stdout=slave, stderr=slave,
        preexec_fn=partial(_terminal_of, slave),
    )  # fmt: skip
    os.close(slave)
    try:
        _until(master, "> ")
        os.write(master, b"Who met?\n")
        _until(master, "\n", least=80)
        os.write(master, b"\x03")
        _until(master, "> ")
        os.write(master, b"/exit\n")
        assert child.wait(timeout=250) == 0
    finally:
        child.kill()
        os.close(master)


def _terminal_of(terminal: int) -> None:
    os.setsid()
    os.login_tty(terminal)


def _until(terminal: int, end: str, least: int = 0) -> str:
    """What appears, up to `end`, and at least so many characters."""
    text, deadline = "", time.monotonic() + 250
    while len(text) < least or end not in text:
        assert time.monotonic() < deadline, text
        if select.select([terminal], [], [], 1)[0]:
            text += os.read(terminal, 4096).decode(errors="replace")
    return text
