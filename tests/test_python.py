"""The Python surface: its examples run, its numbers are those of its parts, and a user's numbers are logged."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import roots

import roots_dist
from roots_dist.api import training
from roots_dist.config.load import to_yaml
from roots_dist.learning.data.prepare import prepare
from roots_dist.runs.ranks.stop_signal import read_end
from roots_dist.runs.track.metrics import METRICS_FILE, is_own
from roots_dist.runs.train import banner, callbacks
from roots_dist.runs.train.spikes import Spikes

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
TEXTS = [
    f"The people of the United States met Mr. Smith; unquestionably it rained there in {n}." for n in range(1800, 1960)
]
SMALL = {"layers": 2, "hidden": 32, "heads": 2, "vocab": 300}
WORDS = "The people of State"
HEADS = "model.hidden = 32: expected a multiple of model.heads = 5"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder as `make train` leaves it, of a corpus and a model that are smaller."""
    found = tmp_path_factory.mktemp("python")
    (found / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([str(found / "texts.jsonl")], found / "data/sotu", vocab=SMALL["vocab"])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found)
        patch.setattr(banner, "PEAK_S", 0.02)
        config = roots_dist.read_config(ROOT / "configs/quickstart.yaml").changed(
            {f"model.{key}": value for key, value in SMALL.items()}
            | {"data.seq_length": 32, "train.steps": 6, "train.eval_every": 3, "train.eval_sequences": 4}
            | {"optim.warmup_steps": 2, "checkpoint.every": 4, "advanced.threads": 1, "track.wandb": "disabled"}
        )
        (found / "configs").mkdir()
        (found / "configs/quickstart.yaml").write_text(to_yaml(config))
        roots_dist.train(config.changed({"parallel.tp": 1, "parallel.pp": 1}))
        yield found


def test_the_import_takes_no_torch_and_every_name_is_there():
    program = "import sys, roots_dist; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)
    assert all(getattr(roots_dist, name) for name in roots_dist.__all__)
    assert {*re.findall(r"`(\w+)\(", PAGE.split("## Reference")[1])} <= {*roots_dist.__all__}
    with pytest.raises(AttributeError, match="nothing"):
        _ = roots_dist.nothing


def test_every_example_of_the_page_runs(place, capsys):
    """One after the other, as a reader types them."""
    names: dict[str, object] = {}
    assert len(EXAMPLES) == PAGE.count("```python") == 4
    for number, code in enumerate(EXAMPLES, 1):
        exec(compile(code, f"example {number}", "exec"), names)
    records = [json.loads(line) for line in (place / "runs/watched" / METRICS_FILE).read_text().splitlines()]
    assert [r["step"] for r in records if "mine/surprise" in r] == [6]
    said = capsys.readouterr().out
    assert "surprise " in said and "evaluated after step 3" in said and "step_00000004" in said


def test_a_prompt_longer_than_the_texts_of_training_is_remarked_once(place, caplog):
    model = roots_dist.load("runs/quickstart")
    model.answers([WORDS * 20, WORDS], max_tokens=2)
    model.generate(WORDS, max_tokens=2)
    (said,) = [record.getMessage() for record in caplog.records if "tokens" in record.getMessage()]
    assert said.endswith("All are read, but the model was made for texts of 32: answers may be worse")


def test_a_score_is_what_the_logits_say(place):
    model = roots_dist.load("runs/quickstart")
    ids = model.tokens(WORDS)
    logits = model.logits(WORDS)
    assert logits.shape == (len(ids), SMALL["vocab"]) and torch.equal(logits, model.logits(ids))
    each = logits[:-1].double().log_softmax(-1)[range(len(ids) - 1), ids[1:]]
    found = model.score(WORDS)
    assert found.log_probability == pytest.approx(float(each.sum()), abs=1e-4) and found.tokens == len(ids) - 1
    rest = model.score(" State", given="The people of")
    known = len(model.tokens("The people of"))
    assert rest.log_probability == pytest.approx(float(each[known - 1 :].sum()), abs=1e-4)
    greedy = model.generate(WORDS, max_tokens=1, greedy=True)
    assert greedy == model.text([*ids, int(logits[-1].argmax())])[len(model.text(ids)) :]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model: model.generate("a", max_tokens=0), "max_tokens = 0: expected 1 or more"),
        (lambda model: model.generate("a", tokens=3), "tokens = 3: expected one of max_tokens"),
        (lambda model: model.generate("a", top=3), "--top = 3"),
        (lambda model: model.generate(" "), "prompt 1 = ' '"),
        (lambda model: model.generate("\ud800"), "expected text in Unicode"),
        (lambda model: model.generate(["a", "b"]), "prompt = ['a', 'b']: expected text. Fix: give one text; answers()"),
        (lambda model: model.generate("a", max_new_tokens=5), "Fix: write max_tokens=5"),
        (lambda model: model.generate("a", do_sample=True), "Fix: leave it out"),
        (lambda model: model.generate("a", temperature="hot"), "temperature = 'hot': expected a finite number"),
        (lambda model: model.generate("a", temperature=float("nan")), "temperature = nan: expected a finite number"),
        (lambda model: model.generate("a", max_tokens=True), "max_tokens = True: expected a whole number"),
        (
            lambda model: model.generate("a", stop="end"),
            "stop = 'end': expected a list of texts",
        ),
        (lambda model: model.answers("a"), "prompts = 'a': expected a list of texts. Fix: write prompts=['a']"),
        (lambda model: model.answers([1]), "prompts = [1]: expected a list of texts"),
        (lambda model: model.tokens("\ud800"), "expected text in Unicode"),
        (lambda model: model.text([300]), "token id = 300: expected 0 to 299"),
        (lambda model: model.text("a"), "ids = 'a': expected a list of whole numbers"),
        (
            lambda model: model.logits(torch.zeros(2)),
            "text = tensor([0., 0.]): expected text or a list",
        ),
        (lambda model: model.score(""), "text = ''"),
        (lambda model: model.logits([300]), "token id = 300: expected 0 to 299"),
        (lambda model: roots_dist.train("configs/quickstart.yaml"), "torchrun --nproc-per-node 4"),
        (lambda model: roots_dist.train(read(), every=2.5), "every = 2.5: expected a whole number"),
        (lambda model: roots_dist.train(read(), on_step=3), "on_step = 3: expected a function"),
        (
            lambda model: roots_dist.train(read("model.heads=5")),
            HEADS,
        ),
        (lambda model: next(roots_dist.batches(read("model.heads=5"))), HEADS),
        (lambda model: roots_dist.training(read("model.heads=5")).__enter__(), HEADS),
        (lambda model: roots_dist.batches(read(), first_step=-1), "first_step = -1: expected 0 or more"),
        (lambda model: roots_dist.batches(None), "config = None: expected a Config or text or a path"),
        (lambda model: roots_dist.read_config(read()), "expected text or a path. Fix: give the path of a YAML file"),
        (
            lambda model: roots_dist.read_config("configs/quickstart.yaml", "optim.lr=1"),
            "overrides = 'optim.lr=1': expected a list of texts. Fix: write overrides=['optim.lr=1']",
        ),
        (lambda model: roots_dist.load("runs/quickstart", {"optim.lr": 1}), "Fix: write overrides=['optim.lr=1']"),
        (lambda model: roots_dist.load("a", [("optim.lr", 1)]), "Fix: write overrides=['optim.lr=1']"),
        (lambda model: roots_dist.load("a", optim_lr=3), "Fix: write overrides=['optim.lr=3']"),
        (lambda model: roots_dist.train(read(), on_step=lambda: None), "expected a function of one argument, a Moment"),
        (lambda model: roots_dist.train(read(), onstep=print), "Fix: write on_step=print"),
        (lambda model: read().changed(train=3), "Fix: write config.changed({'train."),
        (lambda model: read().changed(train_steps=5), "Fix: write config.changed({'train.steps': 5})"),
        (lambda model: read().changed(lr=0.1), "Fix: write config.changed({'optim.lr': 0.1})"),
        (lambda model: read().changed({"train.steps": -1}), "train.steps = -1: expected"),
        (lambda model: roots_dist.train(model.config, every=0), "every = 0"),
        (lambda model: roots_dist.train(model.config, ["train.steps=3"]), "config.changed"),
        (lambda model: roots_dist.load(folder="runs/quickstart"), "expected one of run, overrides"),
        (lambda model: roots_dist.load("nowhere", override=["a=1"]), "Fix: write overrides=['a=1']"),
        (lambda model: roots_dist.load(), "expected load(run, overrides=()); missing a required argument: 'run'"),
        (
            lambda model: roots_dist.train(read(), [], print),
            "arguments of train = 3: expected train(config, overrides=(), *, on_step",
        ),
        (lambda model: roots_dist.train("a.yaml", steps=5), "Fix: write overrides=['train.steps=5']"),
        (lambda model: roots_dist.train("a.yaml", learning_rate=0.1), "Fix: write overrides=['optim.lr=0.1']"),
        (lambda model: model.score("a", "b", c=1), "score: c = 1: expected one of text"),
        (lambda model: roots_dist.load("nowhere"), "nowhere is not the folder of a run"),
    ],
)
def test_what_cannot_be_is_told_in_a_line(place, call, words):
    with pytest.raises(roots_dist.UserError, match=re.escape(words)) as caught:
        call(roots_dist.load("runs/quickstart"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, fix", [("learning_rate", "called config.optim.lr here"), ("betta1", "mean beta1")])
def test_a_key_that_a_config_has_not_is_told_the_one_that_was_meant(name, fix):
    with pytest.raises(AttributeError, match=f"Fix: .*{fix}"):
        getattr(roots_dist.Config().optim, name)


def test_a_run_that_is_not_opened_says_how():
    run = roots_dist.training(read())
    with pytest.raises(
        AttributeError, match=re.escape("Fix: write `with training(config) as run:` and, inside it, run.step")
    ):
        run.step()


def read(*overrides):
    alone = {"parallel.tp": 1, "parallel.pp": 1, "track.folder": "runs/none"}
    return roots_dist.read_config("configs/quickstart.yaml", overrides).changed(alone)


FUNCTIONS = ("batches", "load", "read_config", "train", "training")
METHODS = [
    (kind, name)
    for kind in (roots_dist.Model, roots_dist.Training)
    for name, value in vars(kind).items()
    if inspect.isfunction(value) and not name.startswith("_")
]


@pytest.mark.parametrize(("kind", "name"), [*((None, name) for name in FUNCTIONS), *METHODS])
def test_every_parameter_refuses_what_it_does_not_take(kind, name):
    """With all parameters of another type, each is named, in a line."""
    call = getattr(roots_dist, name) if kind is None else getattr(object.__new__(kind), name)
    parameters = inspect.signature(call).parameters.values()
    given = {p.name: object() for p in parameters if p.kind is not p.VAR_KEYWORD}
    if not given:
        return
    with pytest.raises(roots_dist.UserError) as caught:
        call(**given)
    assert [line.partition(" = ")[0] for line in str(caught.value).splitlines()] == [*given]


def test_the_functions_of_the_table_are_all_that_there_are():
    assert {n for n in roots_dist.__all__ if inspect.isfunction(getattr(roots_dist, n))} == {*FUNCTIONS}


def test_a_metric_needs_a_section_of_its_own(place):
    config = roots_dist.read_config(
        "configs/quickstart.yaml", ["parallel.tp=1", "parallel.pp=1", "track.folder=runs/bad"]
    )
    with pytest.raises(roots_dist.UserError, match="metric loss/mine = 1.0: expected section/name"):
        roots_dist.train(config, on_step=lambda now: {"loss/mine": 1.0})
    for found in (3.0, {"mine/x": "one"}, {1: 2.0}, [("mine/x", 1.0)]):
        with pytest.raises(roots_dist.UserError, match="what <lambda> returned = .*: expected a mapping"):
            roots_dist.train(config, on_step=lambda now, found=found: found)
    assert is_own("mine/x") and not any(map(is_own, ("x", "mine/", "/x", "time/x_s", "optim/grad_norm/x")))


def score_it(now):
    found = {"mine/score": now.model.score(WORDS).log_probability}
    return found | {"mine/logit": float(now.model.logits(WORDS).double().std())}


def train_on_ranks(words):
    (folder,) = words
    overrides = [f"track.folder={folder}", "parallel.pp=1", "parallel.sequence_parallel=true", "train.steps=3"]
    roots_dist.train("configs/quickstart.yaml", overrides, on_step=score_it)


def test_a_function_is_called_on_every_rank_of_any_layout(place):
    """Two tensor ranks tell the numbers of one process."""
    found = roots("runs/two", ranks=2, main=train_on_ranks)
    assert found.returncode == 0, found.stderr
    config = roots_dist.read_config("configs/quickstart.yaml", ["parallel.tp=1", "parallel.pp=1", "train.steps=3"])
    roots_dist.train(config.changed({"track.folder": "runs/one"}), on_step=score_it)
    one, two = (
        [json.loads(line) for line in (place / folder / METRICS_FILE).read_text().splitlines()]
        for folder in ("runs/one", "runs/two")
    )
    scores = [[r["mine/score"] for r in records if "mine/score" in r] for records in (one, two)]
    assert len(scores[0]) == 3 and scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert [r["mine/logit"] for r in two if "mine/logit" in r] == pytest.approx(
        [r["mine/logit"] for r in one if "mine/logit" in r], rel=1e-4
    )


def test_a_step_of_ones_own_is_the_one_that_the_run_would_take(place, monkeypatch):
    """It skipped no spike, and compared no copies."""
    compared = []
    monkeypatch.setattr(callbacks, "check_copies", lambda run, step: compared.append(step))
    own = {"track.folder": "runs/own", "parallel.tp": 1, "parallel.pp": 1, "train.spike_threshold": 3.0}
    config = roots_dist.read_config("configs/quickstart.yaml").changed(own | {"advanced.check_copies_every": 2})
    with roots_dist.training(config) as run:
        run._state.spikes = Spikes(3.0, [0.1] * 16)
        reports = [run.step() for _ in range(2)]
        assert [report.is_spike for report in reports] == [True, True] and compared == [2]
        assert run._state.skipped == 2 and run._state.mesh.progress.step == 2
        with pytest.raises(roots_dist.UserError, match="step 3: loss .* is the third spike in a row"):
            run.step()


def test_a_hang_of_a_program_is_told_in_the_folder_of_its_run(place, monkeypatch):
    seen, real = [], training.joined
    monkeypatch.setattr(training, "joined", lambda *args, who: seen.append(who.folder) or real(*args, who=who))
    own = {"track.folder": "runs/hangs", "parallel.tp": 1, "parallel.pp": 1}
    with roots_dist.training(roots_dist.read_config("configs/quickstart.yaml").changed(own)) as run:
        run._state.mesh.progress.on_hang("rank 1 does not come")
    assert seen == [Path("runs/hangs")]
    assert read_end(Path("runs/hangs/ended.txt")) == "failed: rank 1 does not come"
