"""Fine-tuning as users do it: from a run, with rows, by every strategy, in one process and in TP2 × PP2; the best
checkpoint is kept, and a run that has stopped early stays so."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from checkpoints import sound
from commands import roots

from roots_dist.cli.main import main
from roots_dist.cli.read_config import read_config
from roots_dist.config.load import load, to_yaml
from roots_dist.config.schema import Config
from roots_dist.layout import Layout
from roots_dist.learning.data.prepare import prepare
from roots_dist.learning.data.rows import rows
from roots_dist.runs.track.metrics import METRICS_FILE, read_lines
from roots_dist.runs.train.loop import train
from roots_dist.storage.checkpoint.format import Manifest
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.testing.world import on_world
from roots_dist.world.mesh import Mesh

pytestmark = pytest.mark.timeout(1500)  # the first test waits for its fixtures' runs, which may share the machine
ROOT = Path(__file__).parents[2]
SEQ = 32
MODEL = {
    "family": "bert", "layers": 2, "hidden": 64, "heads": 4, "vocab": 1200, "segments": 2, "norm_position": "post",
    "embedding_norm": True, "activation": "gelu", "init_std": 0.08,
}  # fmt: skip
STRATEGIES = {
    "full": ["optim.lr=1e-3"],
    "partial": ["finetune.strategy=partial", "finetune.trainable=[head.*, blocks.*]", "optim.lr=3e-3"],
    "progressive": ["finetune.strategy=progressive", "finetune.unfreeze_every_epochs=1",
                    "finetune.layer_lr_decay=0.9", "optim.lr=4e-3"],
    "lora": [
        "finetune.strategy=lora", (
"finetune.lora_targets=[query, key, value, out, up, down]"
), "finetune.lora_rank=16", "finetune.lora_alpha=32",
        "finetune.epochs=9", "optim.lr=7e-3",
    ],
}  # fmt: skip
TP2_PP2 = ["parallel.tp=2", "parallel.pp=2", "train.micro_batch=32"]


def finetuned(rank: int, size: int, path: str, words: list[str], strategies: tuple[str, ...], name: str) -> None:
    """Each strategy, as the command does it on a rank, without a launcher's seconds; in the folder STRATEGY-NAME."""
    for strategy in strategies:
        folder = Path(path).parent / f"{strategy}-{name}"
        config = read_config(path, [f"track.folder={folder}", *STRATEGIES[strategy], *words]).config
        train(config, Mesh.connect(Layout(pp=config.parallel.pp, tp=config.parallel.tp), rank))


def trained(rank: int, size: int, path: str) -> None:
    train(read_config(path, []).config, Mesh.single())


def ran(*words: str, ranks: int = 1) -> str:
    done = roots(*words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Rows of twelve languages, a small BERT that has read the paragraphs of their training part, a config for the
    task."""
    found = tmp_path_factory.mktemp("finetune")
    subprocess.run([sys.executable, ROOT / "examples" / "tasks.py", found / "tasks"], check=True, capture_output=True)
    prepare(
        [found / "tasks/languages.train.jsonl"], found / "text", kind="wordpiece", vocab=1200, validation=0.1, workers=1
    )
    sections = {
        "model": MODEL,
        "objective": {"name": "mlm"},
        "optim": {"lr": 2e-3, "warmup_steps": 20},
        "track": {"wandb": "disabled", "folder": str(found / "bert")},
        "advanced": {"threads": 1},
    }
    data = {
        "train": str(found / "text/train_text_document"),
        "tokenizer": str(found / "text/tokenizer.json"),
        "seq_length": SEQ,
    }
    train = {"steps": 150, "global_batch": 32, "micro_batch": 32, "device": "cpu"}
    (found / "bert.yaml").write_text(to_yaml(Config.model_validate({**sections, "data": data, "train": train})))
    on_world(1, trained, str(found / "bert.yaml"))
    task = f"""
objective: {{name: classify}}
data: {{train: {found}/tasks/languages.train.jsonl, validation: {found}/tasks/languages.validation.jsonl}}
finetune: {{init_from: {found}/bert, epochs: 6, metric: accuracy}}
train: {{global_batch: 32, micro_batch: 32, device: cpu, eval_every: 57, eval_sequences: 300}}
optim: {{lr_schedule: linear, warmup_steps: 10, weight_decay: 0.01}}
advanced: {{threads: 1}}
track: {{wandb: disabled}}
"""
    (found / "task.yaml").write_text(task)
    return found


@pytest.fixture(scope="module")
def alone(place) -> Callable[[str], Path]:
    """The run of a strategy in one process."""

    @cache
    def trained(strategy: str) -> Path:
        on_world(1, finetuned, str(place / "task.yaml"), [], (strategy,), "1", timeout=600)
        return place / f"{strategy}-1"

    return trained


@pytest.fixture(scope="module")
def begun(place) -> None:
    """The first steps of each strategy in four processes, in the folder STRATEGY-begun."""
    words = [*TP2_PP2, "finetune.epochs=null", "train.steps=20", "train.eval_every=0", "train.eval_sequences=8"]
    on_world(4, finetuned, str(place / "task.yaml"), words, tuple(STRATEGIES), "begun", timeout=600)


def curve(folder: Path, name: str) -> dict[int, float]:
    """What was logged by this name, by step."""
    return {line["step"]: line[name] for line in read_lines(folder / METRICS_FILE) if name in line}


ACCURACY = "accuracy/validation/classify"


def beats_the_majority_class(place: Path, folder: Path) -> bool:
    """By far: right more than half of the time, and that is more than four times as often."""
    labels = Counter(row.values["label"] for row in rows(place / "tasks" / "languages.validation.jsonl"))
    accuracies = curve(folder, ACCURACY)
    return 4 * max(labels.values()) / sum(labels.values()) < 0.5 < accuracies[max(accuracies)]


@pytest.mark.parametrize(
    "strategy", ["full", "lora", *(pytest.param(name, marks=pytest.mark.full) for name in ("partial", "progressive"))]
)
def test_each_strategy_beats_the_majority_class_by_far(place, alone, strategy):
    """What the others compute is compared in every run of the suite, by parity and with plain torch."""
    assert beats_the_majority_class(place, alone(strategy))


@pytest.mark.full
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_does_in_four_processes_what_it_does_in_one(place, alone, begun, strategy):
    """While the learning rate warms up; how long a run is has no say in that."""
    one, four = (curve(folder, "loss/train") for folder in (alone(strategy), place / f"{strategy}-begun"))
    for step in range(1, 6):
        assert four[step] == pytest.approx(one[step], rel=1e-4)  # later, rounding has its way


@pytest.mark.full
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_strategy_learns_as_much_in_four_processes(place, alone, strategy):
    """The first steps are compared in every run of the suite, and parity compares steps in which blocks join."""
    on_world(4, finetuned, str(place / "task.yaml"), TP2_PP2, (strategy,), "4", timeout=600)
    one, four = (curve(folder, "loss/train") for folder in (alone(strategy), place / f"{strategy}-4"))
    assert four.keys() == one.keys()
    assert beats_the_majority_class(place, place / f"{strategy}-4")


def test_the_run_says_what_it_is_and_is_used_by_its_best_checkpoint(place, alone):
    folder = alone("full")
    config = load(folder / "config.yaml")
    assert (
        config.finetune.labels[:3] == ("Czech", "Danish", "Dutch")
        and config.model.hidden == 64
        and config.train.steps == -(-6 * 595 // 32)  # passes over the rows, rounded up once
    )
    best = json.loads((folder / "best.json").read_text())
    scores = curve(folder, ACCURACY)
    del scores[0]
    assert best == {"step": max(scores, key=scores.get), ACCURACY: max(scores.values())}
    assert Manifest.read(best_or_newest(folder)).step == best["step"]
    assert str(best_or_newest(folder)) in ran("evaluate", str(folder), "train.eval_sequences=8")


def test_a_run_stops_when_it_does_not_get_better_and_stays_stopped(place):
    folder = place / "stopped"
    words = [
        f"track.folder={folder}",
        "finetune.patience=2",
        "finetune.metric=loss",
        "optim.lr=1e-12",
        "optim.min_lr=0",
        "optim.warmup_steps=0",
        "train.eval_every=3",
        "checkpoint.keep=1",
    ]
    said = ran("finetune", str(place / "task.yaml"), *words, "optim.weight_decay=0", "train.eval_sequences=16")
    steps = [Manifest.read(path).step for path in sound(folder)]
    best = json.loads((folder / "best.json").read_text())["step"]
    assert max(steps) < 40 and {best, max(steps)} == {*steps} and f"best: step {best}" in said
    assert "%" in ran("generate", str(folder), "A text."), "whose corpora are not read"
    again = ran("finetune", str(place / "task.yaml"), *words, "optim.weight_decay=0", "train.eval_sequences=16")
    assert f"stopped after step {max(steps)}: no better evaluation since step {best}" in again


def test_a_finetuned_run_goes_on_where_it_was_interrupted(place):
    """A progressive run, saved when the head and one group learn, has the same curve as the whole one; what it started
    from may be gone by then."""
    shutil.copytree(place / "bert", place / "gone")
    folder = place / "progressive-part"
    words = [
        f"finetune.init_from={place / 'gone'}",
        "checkpoint.every=30",
        "train.steps=50",
        "finetune.epochs=null",
        "train.eval_every=0",
        "train.eval_sequences=16",
        "checkpoint.keep=9",
    ]
    on_world(1, finetuned, str(place / "task.yaml"), words, ("progressive",), "part")
    whole = curve(folder, "loss/train")
    shutil.rmtree(place / "gone")
    for path in sound(folder)[1:]:
        (path / "manifest.json").unlink()
    said = ran(
        "finetune",
        str(place / "task.yaml"),
        f"track.folder={folder}",
        *STRATEGIES["progressive"],
        *words,
        "parallel.pp=2",
        "train.micro_batch=8",
        ranks=2,
    )
    assert "resumed after step 30 with parallel.pp = 2 (was 1)" in said
    again = curve(folder, "loss/train")
    assert again.keys() == whole.keys()
    assert [again[step] for step in range(1, 41)] == pytest.approx([whole[step] for step in range(1, 41)], rel=1e-3)


REFUSED = {
    "no start": (["finetune.init_from=null"], "finetune.init_from = None"),
    "a start that is none": (
        ["finetune.init_from=data"],
        "finetune.init_from = 'data' (command line): expected the folder of a run or of an import",
    ),
    "another model": (["model.hidden=128"], "model.hidden = 128 (command line): expected 64 as in finetune.init_from="),
    "more positions than there are": (
        ["data.seq_length=512"],
        "data.seq_length = 512 (command line): expected at most model.max_positions = 32",
    ),
    "a pattern of nothing": (
        ["finetune.strategy=partial", "finetune.trainable=[hed.*]"],
        "finetune.trainable = 'hed.*'",
    ),
    "an adapter of nothing": (
        ["finetune.strategy=lora", "finetune.lora_targets=[querry]"],
        "Fix: choose for example query",
    ),
    "a top that learns alone": (
        ["finetune.strategy=progressive", "finetune.unfreeze_every=112"],
        "finetune.unfreeze_every = 112 (command line): expected fewer steps than train.steps = 112",
    ),
    "steps beside epochs": (
        ["train.steps=20"],
        "train.steps = 20 (command line): expected 112, which are finetune.epochs = 6 passes over data.train",
    ),
    "F1 of no classes": (
        ["objective.name=mlm", "finetune.metric=f1", "finetune.epochs=null"],
        "finetune.metric = 'f1'",
    ),
    "patience without an evaluation": (["finetune.patience=2", "train.eval_every=0"], "finetune.patience = 2"),
    "a column that is not there": (
        ["finetune.label_column=lang"],
        "languages.train.jsonl:1: lang = None: expected a column of this name; the file has text, label",
    ),
    "labels that are not those of the rows": (["finetune.labels=[a, b]"], "one of the 2 labels a, b"),
    "a task of another family": (["objective.name=instruct"], "objective.name = 'instruct'"),
}


def refusal(capsys, *words: str) -> str:
    """What the command says, in this process: it starts no other."""
    with pytest.raises(SystemExit) as left:
        main(words)
    said = capsys.readouterr().err
    assert left.value.code == 2 and all(line.startswith("✗") for line in said.strip().splitlines()), said
    return said


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_learned_is_refused_in_one_line(place, case, capsys):
    words, expected = REFUSED[case]
    assert expected in refusal(
        capsys, "finetune", str(place / "task.yaml"), f"track.folder={place / 'refused'}", "parallel.tp=2", *words
    )
    assert not (place / "refused").exists()


def test_a_start_whose_weights_do_not_fit_is_refused_by_name(place):
    config = (place / "bert" / "config.yaml").read_text()
    other = place / "other"
    other.mkdir()
    (other / "config.yaml").write_text(config.replace("layers: 2", "layers: 3"))
    (other / "checkpoints").symlink_to(place / "bert" / "checkpoints")
    done = roots(
        "finetune", str(place / "task.yaml"), f"track.folder={place / 'refused'}", f"finetune.init_from={other}"
    )
    assert done.returncode == 2 and "model.layers = 3: expected 2 as in" in done.stderr, done.stderr


def test_training_does_not_take_a_start(place, capsys):
    assert "Fix: roots finetune" in refusal(
        capsys, "train", str(place / "task.yaml"), f"track.folder={place / 'refused'}"
    )
