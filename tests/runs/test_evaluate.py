"""`roots evaluate`: the loss of a checkpoint does not depend on the layout that reads it, and is the one training
logged."""

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from commands import environ, roots, without_progress

from roots_dist.assembly.passes import build_passes
from roots_dist.cli.evaluate import EVALUATE, evaluation
from roots_dist.config.load import Loaded
from roots_dist.config.schema import Config
from roots_dist.config.sections import Source
from roots_dist.errors import CheckpointError, ConfigError
from roots_dist.layout import Layout
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.store import Writer
from roots_dist.learning.data.tokenizer import load_codec
from roots_dist.learning.data.tokenizer import train as train_tokenizer
from roots_dist.learning.objectives import make_objective
from roots_dist.runs.evaluate.answers import answer_questions
from roots_dist.runs.evaluate.evaluate import evaluate
from roots_dist.runs.evaluate.held_out import Score
from roots_dist.runs.evaluate.options import EvaluateOptions
from roots_dist.runs.evaluate.sources import names
from roots_dist.runs.ranks.run_on_ranks import ready
from roots_dist.runs.track.metrics import METRICS_FILE, read_lines
from roots_dist.runs.train.loop import train
from roots_dist.storage.checkpoint.load import load_weights
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.testing.world import on_warm_world, on_world
from roots_dist.world.mesh import Mesh

VOCAB, SEQ, TOKENS = 61, 8, 700


def corpus(path: Path, seed: int) -> str:
    """Only some of the ids occur, which can be learned in three steps."""
    path.parent.mkdir(exist_ok=True)
    with Writer(path, np.dtype("<u2")) as writer:
        writer.add(np.random.default_rng(seed).integers(0, VOCAB // 4, TOKENS).astype("<u2"))
        writer.commit()
    return str(path)


def trained(rank: int, size: int, config: Config) -> None:
    train(config, Mesh.single())


def found(rank: int, size: int, folder: str, overrides: list[str]) -> Score:
    loaded = EVALUATE.fit(EVALUATE.read(folder, overrides), size)
    layout = ready(loaded, size, None, EVALUATE.not_required)
    return evaluate(loaded.config, Mesh.connect(layout, rank))


def evaluated(rank: int, size: int, folder: str, overrides: list[str]) -> tuple[float, int]:
    score = found(rank, size, folder, overrides)
    return score.loss, score.targets


def of_sources(rank: int, size: int, folder: str, overrides: list[str]) -> dict[str, tuple[float, int]]:
    score = found(rank, size, folder, overrides)
    return {name: (one.loss, one.targets) for name, one in [*score.sources.items(), ("together", score)]}


def of_labels(rank: int, size: int, folder: str, overrides: list[str]) -> tuple[list[list[int]], dict[str, float]]:
    score = found(rank, size, folder, overrides)
    return score.confusion.tolist(), score.metrics()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Trained in one process for three steps; its batch of 3 sequences fits no other layout."""
    place = tmp_path_factory.mktemp("evaluate")
    config = Config.model_validate(
        {
            "model": {"layers": 2, "hidden": 32, "heads": 4, "vocab": VOCAB},
            "data": {
                "train": corpus(place / "train", 0),
                "validation": corpus(place / "held_out", 1),
                "seq_length": SEQ,
            },
            "train": {"steps": 3, "global_batch": 3, "micro_batch": 3, "device": "cpu", "eval_sequences": 10**6},
            "optim": {"lr": 1e-2},
            "track": {"folder": str(place / "run"), "wandb": "disabled"},
        }
    )
    on_world(1, trained, config)
    (place / "train.bin").unlink()  # evaluation does not need it
    return place / "run"


@pytest.mark.parametrize(
    "size, overrides",
    [
        (4, ["parallel.tp=2", "parallel.pp=2"]),
        (2, ["parallel.tp=2", "parallel.sequence_parallel=true", "train.micro_batch=2"]),
        (2, ["parallel.pp=2", "train.micro_batch=5"]),
        (3, []),
    ],
)
def test_the_loss_is_the_one_that_training_logged_in_any_layout(run, size, overrides):
    logged = [line["loss/validation"] for line in read_lines(run / METRICS_FILE) if "loss/validation" in line]
    assert logged[0] > logged[-1] + 1e-3
    for loss, targets in on_warm_world(size, evaluated, str(run), overrides):
        assert targets == (TOKENS - 1) // SEQ * SEQ  # all of the held-out text
        assert loss == pytest.approx(logged[-1], rel=1e-6)


def test_the_command_starts_the_processes_that_a_layout_needs(run):
    command = [sys.executable, "-m", "roots_dist", "evaluate", str(run), "parallel.tp=2"]
    found = subprocess.run(command, env=environ(), capture_output=True, text=True, timeout=250)
    assert found.returncode == 0, found.stderr
    assert without_progress(found.stderr) == ""
    loss = float(re.search(r"^loss +([\d.]+) nats per token", found.stdout, re.MULTILINE)[1])
    assert loss == pytest.approx(on_warm_world(1, evaluated, str(run), [])[0][0], abs=1e-4)
    assert f"{(TOKENS - 1) // SEQ * SEQ:,} in {(TOKENS - 1) // SEQ} sequences" in found.stdout


def test_what_is_no_run_or_has_nothing_to_be_measured_on_is_refused(run, tmp_path):
    with pytest.raises(CheckpointError, match="not the folder of a run.*Fix: "):
        EVALUATE.read(str(tmp_path), [])
    with pytest.raises(ConfigError) as refused:
        EVALUATE.read(str(run), ["data.validation=[]"])
    assert [p.key for p in refused.value.problems] == ["data.validation"]
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    loaded = EVALUATE.fit(EVALUATE.read(str(tmp_path), []), 1)
    with pytest.raises(CheckpointError, match="no complete checkpoint.*Fix: "):
        evaluate(loaded.config, Mesh.single())


def test_a_rule_of_training_does_not_bind_evaluation_and_others_do(run):
    loaded = EVALUATE.fit(EVALUATE.read(str(run), ["data.tokenizer=gone.json"]), 1)
    assert ready(loaded, 1, 1, EVALUATE.not_required) == Layout()
    with pytest.raises(ConfigError) as refused:
        ready(loaded, 1, 1)
    assert [p.key for p in refused.value.problems] == ["data.train", "data.tokenizer"]
    wide = Loaded(loaded.config.changed({"parallel.tp": 3}))
    with pytest.raises(ConfigError, match="parallel.tp = 3"):
        ready(wide, 3, 1, EVALUATE.not_required)


def test_each_source_has_a_row_and_all_together_count_every_target_once(run, tmp_path):
    paths = [corpus(tmp_path / "books" / "text", 2), corpus(tmp_path / "papers", 3)]
    alone = [on_warm_world(1, evaluated, str(run), [f"data.validation={path}"])[0] for path in paths]
    assert abs(alone[0][0] - alone[1][0]) > 1e-4
    targets = sum(count for _, count in alone)
    wanted = {"text": alone[0], "papers": alone[1], "together": (sum(loss * n for loss, n in alone) / targets, targets)}
    both = f"data.validation={json.dumps(paths)}"
    for size, overrides in ((1, []), (4, ["parallel.tp=2", "train.micro_batch=3"])):
        for rows in on_warm_world(size, of_sources, str(run), [both, *overrides]):
            assert rows.keys() == wanted.keys()
            for name, (loss, count) in rows.items():
                assert count == wanted[name][1] and loss == pytest.approx(wanted[name][0], rel=1e-6)
    shown = roots("evaluate", str(run), both)
    assert shown.returncode == 0, shown.stderr
    assert re.search(r"^text +696 +\d\.\d{4}.*\n^papers +696.*\n^all +1,392", shown.stdout, re.MULTILINE)


def test_a_source_is_named_by_as_much_of_its_path_as_tells_it_apart():
    def called(*paths: str) -> list[str]:
        return names([Source(path=path) for path in paths])

    assert called("data/sotu/validation_text_document", "data/pile.v2/validation_text_document") == ["sotu", "pile.v2"]
    assert called("a/one/held_out", "b/one/held_out", "b/two/held_out") == [
        "a/one/held_out",
        "b/one/held_out",
        "b/two/held_out",
    ]
    assert called("rows/mine.jsonl.gz", "/rows/yours.csv") == ["mine", "yours"]
    assert called("x/held_out", "x/held_out") == ["x/held_out", "x/held_out#2"]
    assert called("validation_text_document") == ["validation_text_document"]


TEXTS = [
    f"it {'rained' if n % 3 else 'was dry'} in town {n} and nobody {'came' if n % 2 else 'left'}" for n in range(40)
]


def a_task(place: Path, task: str, family: str, rows: list[dict], labels: list[str], steps: int = 3, **more) -> Path:
    """A run of a few steps on rows, held out the same ones."""
    place.mkdir()
    (place / "tokenizer.json").write_text(
        train_tokenizer(TEXTS, 300, kind="bpe" if family == "gpt" else "unigram").json
    )
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_file = str(place / "rows.jsonl")
    model = {"family": family, "layers": 2, "hidden": 32, "heads": 4, "vocab": 400}
    model |= {"positions": "relative", "norm": "rmsnorm", "bias": False, "activation": "relu"} if family == "t5" else {}
    config = Config.model_validate(
        {
            "model": model,
            "objective": {"name": task},
            "data": {
                "train": rows_file,
                "validation": rows_file,
                "tokenizer": str(place / "tokenizer.json"),
                "seq_length": 48,
                **more,
            },
            "finetune": {"labels": labels},
            "train": {"steps": steps, "global_batch": 4, "micro_batch": 4, "device": "cpu", "eval_sequences": 10**6},
            "optim": {"lr": 1e-2},
            "track": {"folder": str(place / "run"), "wandb": "disabled"},
        }
    )
    on_world(1, trained, config)
    return place / "run"


@pytest.mark.parametrize("task, labels", [("classify", ["dry", "wet", "other"]), ("tag", ["no", "yes"])])
def test_what_was_taken_for_what_is_the_same_in_every_layout_and_logged_in_training(task, labels, tmp_path):
    marks = [["yes" if len(word) > 3 else "no" for word in text.split()] for text in TEXTS]
    kinds = ["wet" if "rained" in text else "dry" for text in TEXTS]
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, kinds if task == "classify" else marks)]
    run = a_task(tmp_path / "task", task, "gpt", rows, labels)
    ((table, metrics),) = on_warm_world(1, of_labels, str(run), [])
    expected = sum(map(len, marks)) if task == "tag" else len(rows)
    given = [
        sum(m.count(label) for m in marks) if task == "tag" else sum(r["label"] == label for r in rows)
        for label in labels
    ]
    assert [sum(row) for row in table] == given and sum(given) == expected
    right = sum(table[i][i] for i in range(len(labels)))
    assert metrics[f"accuracy/validation/{task}"] == pytest.approx(right / expected)
    assert {"f1/validation", "mcc/validation"} <= metrics.keys() and ("f1/validation/yes" in metrics) == (task == "tag")
    logged = [line for line in read_lines(run / METRICS_FILE) if "f1/validation" in line][-1]
    assert {name: logged[name] for name in metrics} == pytest.approx(metrics, abs=1e-6)
    for size, overrides in ((4, ["parallel.tp=2", "train.micro_batch=3"]), (2, ["parallel.pp=2"])):
        assert all(other == table for other, _ in on_warm_world(size, of_labels, str(run), overrides))
    if task == "tag":
        return
    shown = roots("evaluate", str(run), "--json", str(run / "scores.json"))
    assert shown.returncode == 0, shown.stderr
    written = json.loads((run / "scores.json").read_text())
    assert {name: written[name] for name in metrics} == pytest.approx(metrics, abs=1e-6) and "checkpoint" in written
    for label, row in zip(labels, table):
        assert re.search(rf"^{label} +" + " +".join(f"{n:,}" for n in row) + r"\s*$", shown.stdout, re.MULTILINE), (
            shown.stdout
        )
        assert re.search(rf"^{label} +\d\.\d{{3}} +\d\.\d{{3}} +\d\.\d{{3}} +{sum(row)}", shown.stdout, re.MULTILINE)


def answers(rank: int, size: int, folder: str, overrides: list[str]) -> list:
    loaded = EVALUATE.fit(EVALUATE.read(folder, overrides), size)
    passes = build_passes(loaded.config, Mesh.connect(ready(loaded, size, None, EVALUATE.not_required), rank))
    load_weights(best_or_newest(Path(folder)), passes.model.params, passes.mesh)
    objective = make_objective(loaded.config)
    held_out = Batches.open(
        loaded.config, objective, loaded.config.data.validation, passes.mesh.dp.rank, passes.mesh.dp.size
    )
    found = answer_questions(passes, objective, held_out, load_codec(loaded.config.data.tokenizer), 7)
    return [found.exact_match, [list(one) for one in found.questions]]


@pytest.mark.parametrize("task, family", [("instruct", "gpt"), ("seq2seq", "t5")])
def test_greedy_answers_are_held_against_the_right_ones(task, family, tmp_path):
    rows = [{"text": text, "label": "it left" if n % 5 == 0 else "no  no"} for n, text in enumerate(TEXTS)]
    more = {"target_seq_length": 8} if family == "t5" else {}
    run = a_task(tmp_path / "task", task, family, rows, [], steps=60, **more)
    ((match, questions),) = on_warm_world(1, answers, str(run), [])
    assert 0 < match < 1, questions
    assert len(questions) == 7 and all(
        "town" in question and expected in ("no no", "it left") for question, expected, _ in questions
    )
    assert match == sum(expected == answer for _, expected, answer in questions) / 7
    for other in on_warm_world(4, answers, str(run), ["parallel.tp=2"]) + on_warm_world(
        2, answers, str(run), ["parallel.pp=2"]
    ):
        assert other == [match, questions]


def test_what_a_run_cannot_be_asked_for_is_refused_in_a_line(run):
    def refusal(overrides: Sequence[str] = (), **options) -> str:
        with pytest.raises(ConfigError) as refused:
            evaluation(EvaluateOptions(**options)).read(str(run), overrides)
        return refused.value.cli_message()

    assert refusal(["objective.name=classify"], ngram=3).startswith(
        "✗ --ngram = 'a run of classify': expected a causal run"
    )
    assert "data.train = []: expected the text that the n-gram baseline is counted on" in refusal(
        ["data.train=[]"], ngram=2
    )
    assert refusal(lm_eval="piqa").startswith("✗ data.tokenizer = None: expected the run's tokenizer")
    assert refusal(limit=3) == "✗ --limit = 3: expected --lm-eval with it. Fix: add --lm-eval TASKS."
    assert refusal(include_path="mine").startswith("✗ --include-path = 'mine': expected --lm-eval with it")
    assert refusal(["data.validation=[]"], ngram=2).startswith("✗ data.validation = []: expected a held-out corpus")
    with_tasks = evaluation(EvaluateOptions(lm_eval="piqa")).read(
        str(run), ["data.validation=[]", "data.tokenizer=mine.json"]
    )
    assert with_tasks.config.data.validation == ()


def test_n_grams_stand_beside_the_run_and_need_its_training_text(run, tmp_path):
    command = evaluation(EvaluateOptions(ngram=2))
    with pytest.raises(ConfigError) as gone:
        ready(command.read(str(run), []), 1, 1, command.not_required)
    assert [p.key for p in gone.value.problems] == ["data.train"]
    training = f"data.train={corpus(tmp_path / 'train', 0)}"
    shown = roots("evaluate", str(run), training, "--ngram", "2", "parallel.tp=2", ranks=2)
    assert shown.returncode == 0, shown.stderr
    loss = float(re.search(r"^loss +([\d.]+)", shown.stdout, re.MULTILINE)[1])
    rows = dict(re.findall(r"^(uniform|unigram|bigram|this run) +([\d.]+)", shown.stdout, re.MULTILINE))
    assert float(rows["uniform"]) == pytest.approx(np.log(VOCAB), abs=1e-4) and float(rows["this run"]) == loss
    assert float(rows["unigram"]) < float(rows["uniform"]) and f"from {TOKENS} training tokens" in shown.stdout


TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" rained", " dry"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def test_tasks_of_a_folder_are_evaluated_without_held_out_text_and_without_a_network(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    (tmp_path / "choice.yaml").write_text(TASK.replace("FOLDER", str(tmp_path)))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:6]))
    (tmp_path / "tokenizer.json").write_text(train_tokenizer(["it rained"], 4, kind="words", min_count=1).json)
    words = [str(run), "data.validation=[]", f"data.tokenizer={tmp_path / 'tokenizer.json'}", "parallel.tp=2"]
    words += ["--lm-eval", "local_choice", "--include-path", str(tmp_path), "--limit", "4"]
    shown = roots("evaluate", *words, ranks=2)
    assert shown.returncode == 0, shown.stderr
    assert (
        "|local_choice|" in shown.stdout and shown.stdout.count("local_choice") == 1 and "Traceback" not in shown.stderr
    )
    results = json.loads((run / "lm_eval.json").read_text())
    assert results["n-samples"]["local_choice"] == {"original": 6, "effective": 4}
