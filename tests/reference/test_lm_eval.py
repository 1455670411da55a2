"""lm-evaluation-harness over the live model says what its own `hf` backend says of the same weights, in every layout.

Small random models in float64, whose windows are shorter than the texts: contexts are cut, long texts roll, prompts
too.
"""

import json
import os
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from test_generation_transformers import LAYOUTS, decoder, stirred
from test_transformers import SEQ, VOCAB, gpt2, llama
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from roots_dist.assembly.passes import build_passes
from roots_dist.config.schema import Config
from roots_dist.errors import DataError
from roots_dist.layout import Layout
from roots_dist.runs.evaluate.harness import RESULTS_FILE, check_task_names, open_tasks, run_harness
from roots_dist.runs.evaluate.harness_model import harness_model
from roots_dist.runs.evaluate.options import EvaluateOptions
from roots_dist.testing.world import on_warm_world
from roots_dist.world.mesh import Mesh

TEXT = (
    "the people of the united states are the people of one union and the union of the states is one people\n"
    "our common defence general welfare and liberty secure what we ordain for every citizen\n"
    "a more perfect peace with all nations has been maintained during this past year by public treaty\n"
) * 5
ENDS = {"gpt2": ("<|endoftext|>", None), "llama": ("</s>", "<s>")}
"""The tokens that end and begin a text of each family."""
PAIRS = [
    ("the people of", " the union"),
    ("", "the states are one"),
    ("one union and the union of the states is one people the people of the united states", " are one"),
    ("the ", "people"),
    ("the people", " of the united states are the"),
    ("the people of", " the states"),
    ("is", "\n"),
]
ROLLING = [
    "the people of the united states are the people of one union and the union of the states",
    "one",
    "is one people\n",
]
GREEDY = {"until": ["\n", " one"], "max_gen_toks": 5}
PROMPTS = [
    ("the people of", GREEDY),
    ("one union and the union of the states is one people the people of the united states", GREEDY),
    ("are the", {"until": ["e"], "max_gen_toks": 3}),
    ("the", {"until": ["unions"], "max_gen_toks": 4, "num_beams": 3}),
]


def tokenizer(family: str, path: Path) -> str:
    """Byte-level, of the text's own letters; Llama's begins every text with a token."""
    end, begin = ENDS[family]
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = [end, *([begin] if begin else [])]
    made.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=special, show_progress=False))
    if begin:
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, made.token_to_id(begin))]
        )
    assert made.get_vocab_size() == VOCAB  # the model can say nothing that is no text
    made.save(str(path))
    return str(path)


def requests(kind: str, arguments: list[tuple]) -> list:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def asked(lm) -> dict[str, list]:
    starts = [" ".join(TEXT.split()[: 1 + n % 6]) + "\n" * (n % 2) for n in range(12)]
    said = lm.generate_until(
        requests("generate_until", [(start, {"until": [], "max_gen_toks": 1}) for start in starts])
    )
    greedy = [(a, b) for a, b in zip(starts, said) if b and len(lm.tok_encode(a + b)) == len(lm.tok_encode(a)) + 1]
    return {
        "scores": lm.loglikelihood(requests("loglikelihood", PAIRS + greedy)),
        "rolling": lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in ROLLING])),
        "texts": lm.generate_until(requests("generate_until", PROMPTS)),
    }


def live(config: dict, size: int, rank: int):
    config = Config.model_validate(config)
    layout = Layout(dp=size // (config.parallel.tp * config.parallel.pp), pp=config.parallel.pp, tp=config.parallel.tp)
    return stirred(build_passes(config, Mesh.connect(layout, rank)))


def ours(rank: int, size: int, config: dict) -> dict[str, list]:
    return asked(harness_model(live(config, size, rank)))


def theirs(model, family: str, path: str) -> dict[str, list]:
    from lm_eval.models.huggingface import HFLM

    end, begin = ENDS[family]
    words = transformers.PreTrainedTokenizerFast(tokenizer_file=path, eos_token=end, bos_token=begin, pad_token=end)
    model.generation_config.eos_token_id = words.eos_token_id
    return asked(HFLM(pretrained=model, tokenizer=words, backend="causal", device="cpu", batch_size=3, max_length=SEQ))


@pytest.mark.parametrize("family, layouts", [(gpt2, LAYOUTS[1:]), (llama, LAYOUTS[2:])], ids=["gpt2", "llama"])
def test_every_layout_says_what_the_hf_backend_says(family, layouts, tmp_path):
    name = family.__name__
    config, model = decoder(family)
    path = tokenizer(name, tmp_path / "tokenizer.json")
    config = config.changed({"data.tokenizer": path, "train.micro_batch": 2})
    wanted = theirs(model, name, path)
    assert {hit for _, hit in wanted["scores"]} == {True, False} and any(wanted["texts"])
    worlds = [[ours(0, 1, config.model_dump())]]
    for size, keys in layouts:
        worlds.append(on_warm_world(size, ours, config.changed({"train.global_batch": 8, **keys}).model_dump()))
    for found in (found for ranks in worlds for found in ranks):
        assert [hit for _, hit in found["scores"]] == [hit for _, hit in wanted["scores"]]
        for kind in ("scores", "rolling"):
            mine, other = ([one[0] if kind == "scores" else one for one in side[kind]] for side in (found, wanted))
            torch.testing.assert_close(torch.tensor(mine), torch.tensor(other), rtol=1e-5, atol=1e-5)
        assert found["texts"] == wanted["texts"]


CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """
task: local_write
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/choice.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: " of"
generation_kwargs: {until: ["\\n"], max_gen_toks: 3}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def tasks(folder: Path) -> str:
    questions, choices = ["the people", "the", "one union"], [" of", " people", " one"]
    rows = [{"question": question, "choices": choices, "answer": n} for n, question in enumerate(questions)]
    (folder / "choice.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("write", WRITE)):
        (folder / f"{name}.yaml").write_text(text.replace("FOLDER", str(folder)))
    return str(folder)


def evaluated(rank: int, size: int, config: dict, folder: str) -> str:
    os.environ["HF_HOME"], os.environ["HF_HUB_OFFLINE"] = f"{folder}/cache", "1"
    options = EvaluateOptions(lm_eval="local_choice,local_write", include_path=folder)
    found = run_harness(live(config, size, rank), open_tasks(options, rank), None, Path(folder))
    return json.dumps(found.get("results"))


def test_a_folder_of_tasks_is_evaluated_and_written_into_the_run(tmp_path):
    config, _ = decoder(gpt2)
    config = config.changed({"data.tokenizer": tokenizer("gpt2", tmp_path / "tokenizer.json"), "train.global_batch": 4})
    folder = tasks(tmp_path)
    ((alone,), (first, second)) = (
        on_warm_world(size, evaluated, config.changed({"parallel.tp": size}).model_dump(), folder) for size in (1, 2)
    )
    assert second == "null"
    alone, first = json.loads(alone), json.loads(first)
    assert alone == first and set(alone) == {"local_choice", "local_write"}
    assert json.loads((tmp_path / RESULTS_FILE).read_text())["results"] == first
    lm = harness_model(live(config.model_dump(), 1, 0))
    right = []
    for n, question in enumerate(["the people", "the", "one union"]):
        scores = lm.loglikelihood(
            requests("loglikelihood", [(question, f" {choice}") for choice in (" of", " people", " one")])
        )
        right.append(max(range(3), key=lambda i: scores[i][0]) == n)
    assert alone["local_choice"]["acc,none"] == pytest.approx(sum(right) / 3)


@pytest.mark.parametrize(
    "how, words",
    [
        ({"max_gen_toks": SEQ}, f"max_gen_toks = {SEQ}: expected less than data.seq_length = {SEQ}"),
        ({"until": ["x"]}, "max_gen_toks = 256: expected less than data.seq_length"),
        ({"max_gen_toks": 2, "num_beam_groups": 2}, "num_beam_groups = 2: expected one of until, max_gen_toks"),
    ],
)
def test_generation_that_cannot_be_is_refused(how, words, tmp_path):
    config, _ = decoder(gpt2)
    config = config.changed({"data.tokenizer": tokenizer("gpt2", tmp_path / "tokenizer.json")})
    with pytest.raises(DataError, match=f"{words}.*Fix: "):
        harness_model(live(config.model_dump(), 1, 0)).generate_until(requests("generate_until", [("the", how)]))


def test_a_task_that_is_not_there_is_refused_with_those_that_sound_like_it():
    with pytest.raises(DataError, match="--lm-eval = 'piqo': expected the name of a task. Fix: choose from piqa"):
        check_task_names(["piqa", "hellaswag", *map(str, range(20))], ["hellaswag", "piqo"])
    with pytest.raises(DataError, match="Fix: choose from mine, other"):
        check_task_names(["mine", "other"], ["zzz"])
    assert check_task_names(["mine", "other"], ["other", "mine", "other"]) == ["other", "mine"]


def test_a_task_that_cannot_be_loaded_is_refused_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tasks(tmp_path)
    (tmp_path / "choice.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"'local_choice': expected tasks that can be loaded \(.*choice.jsonl.*\)\. Fix: "
    ):
        open_tasks(EvaluateOptions(lm_eval="local_choice", include_path=folder), 0)
    with pytest.raises(DataError, match="--include-path = '.*nowhere': expected a folder. Fix: "):
        open_tasks(EvaluateOptions(lm_eval="local_choice", include_path=str(tmp_path / "nowhere")), 0)
