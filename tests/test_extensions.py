"""Extensions: the page's file trains, is proven, is kept and checked; nobody's folder runs code by itself."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import roots_dist
from roots_dist.assembly.run import build_run
from roots_dist.cli.main import main
from roots_dist.config.extensions import COPIES, extended, pinned
from roots_dist.config.load import load, read, to_yaml
from roots_dist.config.records import learning_rate_of, objective_of
from roots_dist.config.run_config import config_of_run
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, ExchangeError
from roots_dist.learning.data.batches import Batches
from roots_dist.learning.data.prepare import prepare
from roots_dist.learning.data.tasks import collect_labels, open_examples
from roots_dist.runs.report.run_list import find_runs, list_runs
from roots_dist.runs.report.run_record import read_runs
from roots_dist.runs.track import try_next
from roots_dist.runs.train import banner
from roots_dist.runs.train.resume import rate_line
from roots_dist.runs.train.step import train_step
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.storage.exchange.exporting import checked, export_model
from roots_dist.testing.parity import FLOAT64_BOUNDS, differences, merge, trace
from roots_dist.testing.world import on_world
from roots_dist.world.mesh import Mesh

ROOT = Path(__file__).parents[1]
FILE = (ROOT / "configs/late.py").read_text(encoding="utf-8")
TEXTS = [f"The people of the United States met Mr. Smith; it rained there in {n}." for n in range(1800, 1930)]
NAMES = {
    "objective.name": "late",
    "model.activation": "squared_relu",
    "parallel.schedule": "all-at-once",
    "optim.lr_schedule": "inverse_root",
    "optim.optimizer": "heavy_ball",
}
OURS = [f"{key}={value}" for key, value in NAMES.items()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    found = tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found)
        patch.setattr(banner, "PEAK_S", 0.02)
        (found / "mine.py").write_text(FILE)
        (found / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
        prepare([str(found / "texts.jsonl")], found / "text", vocab=300)
        tree = {
            "model": {"layers": 2, "hidden": 16, "heads": 2, "vocab": 300},
            "data": {"train": "text/train_text_document", "tokenizer": "text/tokenizer.json", "seq_length": 16},
            "train": {"steps": 2, "global_batch": 4, "device": "cpu"},
            "optim": {"warmup_steps": 1},
            "track": {"folder": "runs/mine", "wandb": "disabled", "tensorboard": "off"},
            "advanced": {"threads": 1},
        }
        (found / "plain.yaml").write_text(to_yaml(Config.model_validate(tree)))
        config = load("plain.yaml", ["advanced.extensions=[mine.py]", *OURS])
        (found / "run.yaml").write_text(to_yaml(config).replace(config.advanced.extensions[0], "mine.py"))
        yield found


def test_the_page_shows_the_file():
    page = (ROOT / "docs/extensions.md").read_text(encoding="utf-8")
    assert re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) == [FILE]


def test_the_names_of_a_file_are_values_and_its_records_are_asked(place):
    config = load("run.yaml")
    assert objective_of(config).title == "the second half"
    assert config.advanced.extensions == tuple(pinned(["mine.py"])) and len(config.advanced.extensions[0]) > 64
    assert learning_rate_of(config)(3) == pytest.approx(config.optim.lr * 0.5)
    assert config.changed({"train.steps": 9}).extension is config.extension
    with pytest.raises(ConfigError, match="objective.name = 'late'"):
        load("run.yaml", ["advanced.extensions=[]"])
    (first, *_) = next(roots_dist.batches(config))
    assert (first.targets[0] < 0).tolist() == [True] * 8 + [False] * 8


def test_a_file_trains_and_is_resumed_and_a_change_of_the_models_code_is_refused(place, caplog):
    roots_dist.train("run.yaml")
    (copy,) = (place / "runs/mine" / COPIES).iterdir()
    assert copy.read_text() == FILE
    file = place / "mine.py"
    file.write_text(FILE + "\n# another\n")
    try:
        with pytest.raises(ConfigError, match=r"advanced.extensions = \[.*choose another track.folder"):
            roots_dist.train("run.yaml", ["train.steps=3"])
        with pytest.raises(ConfigError, match="it has changed since"):
            roots_dist.train("runs/mine/config.yaml", ["train.steps=3"])
    finally:
        file.write_text(FILE)
    roots_dist.train("runs/mine/config.yaml", ["train.steps=3"])


def test_a_runs_folder_runs_no_code_by_itself(place):
    roots_dist.train("run.yaml", ["track.folder=runs/told", "train.steps=1"])
    with pytest.raises(ConfigError, match="'mine.py'.*a run's folder may come from anybody.*'advanced.extensions="):
        roots_dist.load("runs/told")
    model = roots_dist.load("runs/told", ["advanced.extensions=[mine.py]"])
    assert model.logits("The people").shape[1] == 300
    (place / "other.py").write_text(FILE + "\n")
    with pytest.raises(ConfigError, match="'other.py'.*the bytes that the run was trained with"):
        config_of_run("runs/told", ["advanced.extensions=[other.py]"])


def test_a_rule_of_ones_own_steps_as_torchs_own_optimizer_of_that_name(place):
    """Three steps in float64 beside torch.optim.SGD with momentum, which is given the same gradients."""
    config = load("run.yaml", [*EXACT, "optim.clip_grad=0", "optim.weight_decay=0.3", "optim.beta1=0.8"])
    run = build_run(config, Mesh.single())
    twins = {p.name: p.tensor.detach().clone() for p in run.params}
    sgd = torch.optim.SGD(twins.values(), lr=1, momentum=0.8)

    def give(gradients):
        for p, gradient in gradients:
            twins[p.name].grad = gradient.clone()

    run.engine.on_gradients = give
    batches = Batches.open(config, run.objective, config.data.train, 0, 1)
    for step, rate in enumerate((1e-2, 5e-3, 2e-2)):
        train_step(run, batches.at(step), rate)
        sgd.param_groups[0]["lr"] = rate
        for p in run.params:
            twins[p.name].mul_(1 - rate * 0.3 if len(p.spec.shape) > 1 else 1)
        sgd.step()
        for p in run.params:
            torch.testing.assert_close(p.tensor.detach(), twins[p.name], rtol=0, atol=1e-14)


REFUSED_WITH_A_RULE = {
    "advanced.engine=deepspeed": "optim.optimizer = 'heavy_ball'.* Fix: set advanced.engine=reference",
    "train.exact={data: 1}": "optim.optimizer = 'heavy_ball'.*a rule of the package with train.exact",
    "optim.beta2=0.5": "optim.beta2 = 0.5.*only used with optim.optimizer=adamw",
}


@pytest.mark.parametrize("word", REFUSED_WITH_A_RULE)
def test_what_a_rule_does_not_work_with_is_refused(place, word):
    from roots_dist.checks.checks import check

    problems = check(load("run.yaml", [word, "parallel.schedule=1f1b"]), 1)
    assert re.search(REFUSED_WITH_A_RULE[word], "\n".join(map(str, problems))), problems


def test_the_state_of_one_rule_is_not_given_to_another(place):
    words = ["track.folder=runs/ruled", "train.steps=1"]
    roots_dist.train("run.yaml", words)
    with pytest.raises(ConfigError, match="optim.optimizer = 'adamw': expected heavy_ball as in .*step_00000001"):
        roots_dist.train("run.yaml", [*words, "train.steps=2", "optim.optimizer=adamw"])


def test_what_a_run_says_to_try_next_names_its_files(place):
    first, _ = try_next.next_commands(load("run.yaml"), Path("runs/mine"))
    assert first.endswith(""" 'advanced.extensions=[mine.py]'""")
    (place / "my file.py").write_text(FILE)
    first, _ = try_next.next_commands(load("run.yaml", ["advanced.extensions=['my file.py']"]), Path("runs/mine"))
    *_, override = shlex.split(first)
    assert load("plain.yaml", [override]).advanced.extensions == tuple(pinned(["my file.py"]))


READER = """
from roots_dist import Extension

def blocks(path):
    for text in path.read_text().split("\\n--\\n"):
        yield {"text": text, "label": "b" if "rained" in text else "a"} if text != "odd" else text

EXTENSION = Extension(readers={".blocks": blocks})
"""


def test_files_of_a_kind_of_ones_own_are_documents_and_rows(place, capsys):
    (place / "reader.py").write_text(READER)
    (place / "taken.py").write_text(READER.replace(".blocks", ".txt"))
    (place / "texts.blocks").write_text("\n--\n".join([*TEXTS, "odd"]))
    words = ["prepare", "texts.blocks", "--output", "own", "--vocab", "300"]
    for more, said in [
        ([], "expected a name ending in one of .txt"),
        (["--extension", "reader.py"], "texts.blocks:131: the extension's reader failed (it gave str, not a mapping"),
        (["--extension", "taken.py"], "EXTENSION.readers = '.txt': expected a suffix in lower case that is not one of"),
    ]:
        with pytest.raises(SystemExit):
            main([*words, *more])
        assert said in capsys.readouterr().err
    manifest = prepare(["texts.blocks"], "own", vocab=300, on_error="skip", extension=["reader.py"])
    assert manifest.train.documents + manifest.validation.documents == len(TEXTS)
    assert sum(manifest.defects.values()) == 1
    own = ["finetune.on_error=skip", "advanced.extensions=[reader.py]"]
    config = load(
        "plain.yaml",
        ["model.family=bert", "objective.name=classify", "data.train=texts.blocks", "finetune.labels=[a,b]", *own],
    )
    assert len(open_examples("texts.blocks", config)) == len(TEXTS)
    assert collect_labels(["texts.blocks"], config) == ("b",)


def test_a_run_with_a_rate_of_its_own_is_exported(place):
    words = ["track.folder=runs/rate", "train.steps=1", "objective.name=clm", "model.activation=gelu"]
    roots_dist.train("run.yaml", words)
    named = ["advanced.extensions=[mine.py]"]
    with pytest.raises(ConfigError, match="add 'advanced.extensions="):
        export_model(place / "runs/rate", place / "export")
    with pytest.raises(ExchangeError, match="train.steps = '2': expected no override but advanced.extensions"):
        export_model(place / "runs/rate", place / "export", extensions=["train.steps=2"])
    export_model(place / "runs/rate", place / "export", extensions=named)
    assert checked(place / "runs/rate", place / "export", "float32", named)[1]


def test_what_a_run_recorded_is_read_without_its_code(place):
    """`roots ls`, `roots report`, and the checkpoint of a run whose file has changed or is gone."""
    run = place / "runs" / "kept"
    roots_dist.train("run.yaml", [f"track.folder={run}", "train.steps=1"])
    (place / "sentinel.py").write_text(f"open({str(place / 'has_run')!r}, 'w')\n{FILE}")
    recorded = (run / "config.yaml").read_text()
    (own,) = load("run.yaml").advanced.extensions
    (sentinel,) = pinned(["sentinel.py"])
    for entry in (own.replace("mine", "gone"), sentinel):
        (run / "config.yaml").write_text(recorded.replace(own, entry))
        assert "kept" in "".join(list_runs(find_runs(place / "runs"), (), 200).lines)
        assert read_runs([run], ())[0].config["objective.name"] == "late"
    with pytest.raises(ConfigError, match="advanced.extensions"):  # of another digest
        best_or_newest(run)
    assert not (place / "has_run").exists()
    (run / "config.yaml").write_text(recorded.replace(own, own.replace("mine", "gone")))
    assert best_or_newest(run).name.endswith("1")
    (run / "config.yaml").write_text(recorded.replace("heads: 2", "heads: 1"))
    with pytest.raises(ConfigError, match="model.heads = 1"):
        best_or_newest(run)


def test_a_run_goes_on_with_the_learning_rate_of_an_extension(place):
    cosine, ours = load("run.yaml", ["optim.lr_schedule=cosine"]), load("run.yaml")
    was, foreign = (config.model_dump(mode="json") for config in (cosine, ours))
    now = ours.changed({"train.steps": 9})
    assert rate_line(was, now, 2) == "the learning rate of step 3 is 1.7e-04; that of step 2 was 3.0e-04"
    assert rate_line(foreign, now, 2) is None


UNUSABLE = {
    "no file": (None, "a Python file that can be read"),
    "no extension": ("x = 1\n", "a line EXTENSION = Extension"),
    "an error": ("\nx = y\n", r"bad.py:2' .*NameError: name 'y' is not defined"),
    "no Python": ("def f(:\n", r"bad.py:1' .*SyntaxError"),
    "no function": (
        "from roots_dist import Extension\nEXTENSION = Extension(activations={'x': 1})",
        r"for EXTENSION.activations\['x'\], found int",
    ),
    "a schedule of ours": (
        "from roots_dist import *\nEXTENSION = Extension(lr_schedules={'cosine': LrSchedule(after_warmup=None)})",
        "'cosine' is taken",
    ),
    "a rule alone": (
        "from roots_dist import Extension\nEXTENSION = Extension(optimizers={'x': abs})",
        r"NewOptimizer for EXTENSION.optimizers\['x'\], found builtin",
    ),
    "a name of ours": (
        "from roots_dist import Extension\nEXTENSION = Extension(activations={'gelu': abs})",
        "'gelu' is taken",
    ),
    "a record of another name": (FILE.replace('name="late"', 'name="last"'), "its record says 'last'"),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_a_file_that_cannot_be_used_is_refused_in_a_line(place, what):
    text, words = UNUSABLE[what]
    if text is not None:
        (place / "bad.py").write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        read("plain.yaml", ["advanced.extensions=[bad.py]"])
    assert len(refused.value.problems) == 1 and refused.value.problems[0].origin == "command line"
    (place / "bad.py").unlink(missing_ok=True)


def test_a_program_that_deadlocks_is_refused_before_the_first_process(place):
    bad = FILE.replace("actions=gpipe", "actions=lambda rank, ranks, n: gpipe(rank, ranks, n)[: n if rank else None]")
    (place / "stuck.py").write_text(bad)
    config = load("run.yaml", ["advanced.extensions=[stuck.py]", "parallel.pp=2"])
    from roots_dist.checks.checks import check

    (problem,) = check(config, 2)
    assert problem.key == "parallel.schedule" and problem.found == "all-at-once"


EXACT = ["advanced.float64=true", "advanced.engine=reference", "advanced.vocab_multiple=2"]


def test_a_layout_computes_what_one_process_computes(place):
    """The objective, the activation and both schedules: two tensor ranks by two stages against one process."""
    one, four = (
        merge(on_world(tp * pp, trace, load("run.yaml", [*EXACT, f"parallel.tp={tp}", f"parallel.pp={pp}"]), 0, 2))
        for tp, pp in ((1, 1), (2, 2))
    )
    for row in differences(one, four, FLOAT64_BOUNDS):
        assert row.passed, row
    plain = merge(on_world(1, trace, load("plain.yaml", EXACT), 0, 2))
    assert any(not row.passed for row in differences(one, plain, FLOAT64_BOUNDS)), "the extension changes nothing"


@pytest.mark.full
def test_roots_verify_proves_it(place):
    from commands import roots

    found = roots("verify", "run.yaml", "parallel.tp=2", "parallel.pp=2", OMP_NUM_THREADS=1)
    assert found.returncode == 0, found.stdout + found.stderr


def test_two_files_are_one_extension_unless_they_share_a_name(place):
    (place / "second.py").write_text("from roots_dist import Extension\nEXTENSION = Extension(activations={'id': abs})")
    both = extended(tuple(pinned(["mine.py", "second.py"])))
    assert set(both.activations) == {"squared_relu", "id"} and set(both.objectives) == {"late"}
    assert both.objectives["late"] is extended(tuple(pinned(["mine.py"]))).objectives["late"], "a file has run twice"
    (place / "again.py").write_text(FILE)
    with pytest.raises(ConfigError, match="'late' is taken"):
        extended(tuple(pinned(["mine.py", "again.py"])))
