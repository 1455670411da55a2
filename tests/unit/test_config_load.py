"""Config files and overrides: what is read, where each value came from, and every mistake with its place."""

from __future__ import annotations

import re
from typing import get_args

import numpy
import pytest

from roots_dist.checks.checks import check
from roots_dist.checks.unused import USES
from roots_dist.config import text
from roots_dist.config.foreign import ANSWERS, CONVERTED
from roots_dist.config.load import load, read, to_yaml
from roots_dist.config.other_names import OTHER_NAMES, OTHER_VALUES, key_for
from roots_dist.config.renamed import RENAMED, RENAMED_VALUES
from roots_dist.config.schema import Config
from roots_dist.config.sections import ExactConfig, Source
from roots_dist.config.unknown_keys import known_keys, nearest
from roots_dist.errors import ConfigError
from roots_dist.runs.ranks.run_on_ranks import ready


@pytest.fixture
def write(tmp_path):
    def written(text: str | bytes):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return written


def refused(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert all(p.fix and p.expected for p in caught.value.problems)
    return caught.value.problems


def test_values_keep_their_types_and_their_origin(write):
    path = write("optim:\n  lr: 1e-4\ndata:\n  train: corpus/a\n  validation: [b, {path: c, weight: 2}]\n")
    found = read(path, ["model.layers=3", "track.tags=[x, 'y z']", "track.name='7'", "optim.decay_steps="])
    assert found.config.optim.lr == 1e-4
    assert found.config.data.train == (Source(path="corpus/a"),)
    assert found.config.data.validation == (Source(path="b"), Source(path="c", weight=2.0))
    assert found.config.track.tags == ("x", "y z") and found.config.track.name == "7"
    assert found.config.optim.decay_steps is None
    assert found.origins["optim.lr"] == f"{path}:2" and found.origins["data.validation.1.weight"] == f"{path}:5"
    assert found.origins["model.layers"] == "command line"


def test_an_override_reaches_a_key_of_a_record_that_is_off_by_default(write):
    path = write("train: {exact: }\n")
    assert load(path, ["train.exact.tensor=2", "train.exact.data=4"]).train.exact == ExactConfig(tensor=2, data=4)
    assert load(path, ["train.exact={tensor: 2, data: 8}", "train.exact.data=4"]).train.exact.data == 4
    with pytest.raises(ConfigError, match="train.exact.data = 0 .command line.: expected"):
        load(path, ["train.exact.data=0"])
    assert read(path, ["train.exact.data=2"]).origins["train.exact"] == "command line"


def test_an_override_beats_the_file_and_the_last_one_beats_the_first(write):
    path = write("model: {layers: 2}\ndata: {train: [a, b]}\n")
    config = load(path, ["model.layers=3", "model.layers=5", "data.train=[c]"])
    assert config.model.layers == 5 and [s.path for s in config.data.train] == ["c"]


def test_an_empty_file_is_the_default_config(write):
    assert load(write("# nothing\n")) == Config()


def test_what_is_printed_reads_back_equal(write):
    config = load(
        write(""), ["data.train=[a, {path: b, weight: 0.25}]", "optim.eps=1e-8", "train.batch_ramp=[2, 2, 9]"]
    )
    assert load(write(to_yaml(config))) == config


@pytest.mark.parametrize(
    "text, key, line, word",
    [
        ("optim:\n  lrr: 1\n", "optim.lrr", 2, "did you mean optim.lr"),
        ("model:\n  hiden: 4\n", "model.hiden", 2, "model.hidden"),
        ("modle: {}\n", "modle", 1, "did you mean model"),
        ("lr: 3\n", "lr", 1, "optim.lr"),
        ("train:\n  lr: 3\n", "train.lr", 2, "optim.lr"),
        ("data: {train: {path: a, wieght: 1}}\n", "data.train.0.wieght", 1, "weight"),
        ("zzzzqqqq: 3\n", "zzzzqqqq", 1, "--print-config"),
        ("model:\n  layers: two\n", "model.layers", 2, "Transformer blocks"),
        ("model:\n  layers: true\n", "model.layers", 2, "Transformer blocks"),
        ("model:\n  layers: 2.0\n", "model.layers", 2, "Transformer blocks"),
        ("model:\n  layers: 0\n", "model.layers", 2, "Transformer blocks"),
        ("model:\n  tied_embeddings: 1\n", "model.tied_embeddings", 2, "embedding"),
        ("model: {dropout: 1.0}\n", "model.dropout", 1, "embedding"),
        ("optim: {lr: .nan}\n", "optim.lr", 1, "write optim.lr=0.0003, its default, or another value (learning rate"),
        ("optim: {eps: .inf}\n", "optim.eps", 1, "write optim.eps=1e-08, its default"),
        ("optim: {lr: -1e-4}\n", "optim.lr", 1, "write optim.lr=0.0003, its default"),
        ("model: {window: 0}\n", "model.window", 1, "change model.window (keys that a query sees"),
        ("parallel: {zero_stage: 4}\n", "parallel.zero_stage", 1, "optimizer"),
        ("train: {exact: {tensor:2}}\n", "train.exact.tensor:2", 1, "write a space after the colon: tensor: 2"),
        ("parallel: {schedule: 1F1B}\n", "parallel.schedule", 1, "write parallel.schedule=1f1b"),
        ("parallel: {schedule: ZBH1}\n", "parallel.schedule", 1, "write parallel.schedule=zb-h1"),
        ("parallel: {schedule: ring}\n", "parallel.schedule", 1, "choose one of"),
        ("train: {device: gpu}\n", "train.device", 1, "write train.device=cuda"),
        ("train: {precision: no}\n", "train.precision", 1, "write train.precision=fp32"),
        ("train: {batch_ramp: [1, 2]}\n", "train.batch_ramp.2", 1, "give"),
        ("track: {name: 2024-01-01}\nmodel: 3\n", "model", 2, "indented"),
        ("data: {train: {weight: 2}}\n", "data.train.0.path", 1, "give"),
        ("data: {train: 7}\n", "data.train", 1, "write a list, as data.train=["),
        ("model: {layer_kinds: foo}\n", "model.layer_kinds", 1, "write a list, as model.layer_kinds=[full, window]"),
    ],
)
def test_a_wrong_key_or_value_is_refused_with_its_line_and_a_remedy(write, text, key, line, word):
    path = write(text)
    (problem,) = refused(path)
    assert problem.key == key and problem.origin == f"{path}:{line}" and word in problem.fix


@pytest.mark.parametrize(
    "text, word",
    [
        ("model:\n  layers: 3\n  layers: 4\n", "model.layers is written twice"),
        ("a: &a [1]\nb: *a\n", "aliases are not used"),
        ("model: {layers: 3\n", "expected"),
        ("model: !!python/object/apply:os.system [echo]\n", "could not determine a constructor"),
        ("model: !!python/name:os.system\n", "could not determine a constructor"),
        ("? [1, 2]\n: 3\n", "a key must be a word"),
        ("\tmodel: 3\n", "found character"),
        ("[" * 3000, "recursion"),
        ("a: 1\n---\nb: 2\n", "another document"),
    ],
)
def test_a_file_that_is_no_plain_yaml_is_refused(write, text, word):
    (problem,) = refused(write(text))
    assert word in str(problem.found)


PLAIN = "model:\n  layers: 2\n  hidden: 64\n  heads: 4\ntrain:\n  steps: 5\n  seed: 3\n"
SLIPS = {
    "a full-width colon": (lambda line: line.replace(":", "："), "write : instead of ："),
    "no space after a colon": (lambda line: line.replace(": ", ":"), "write a space after the colon"),
    "an equals sign": (lambda line: line.replace(": ", " = "), "write a colon"),
    "no colon": (lambda line: line.replace(":", ""), "write a colon"),
    "a tab": (lambda line: line.replace("  ", "\t"), "indent with spaces"),
    "a wide space": (lambda line: line.replace("  ", "\u3000"), "write a space instead of U+3000"),
    "an open quote": (lambda line: line.replace(": ", ': "'), "close the quotes"),
    "an open bracket": (lambda line: line.replace(": ", ": ["), "close the bracket"),
}


@pytest.mark.parametrize("slip", SLIPS)
@pytest.mark.parametrize("number", range(1, 8))
def test_a_slip_is_told_with_its_own_line(write, slip, number):
    """The parser sees most of them in the next line."""
    lines = PLAIN.splitlines()
    change, fix = SLIPS[slip]
    if (wrong := change(lines[number - 1])) == lines[number - 1]:
        return
    path = write("\n".join([*lines[: number - 1], wrong, *lines[number:], ""]))
    (problem,) = refused(path)
    assert problem.origin == f"{path}:{number}" and problem.fix.startswith(fix)


@pytest.mark.parametrize("text", [b"\xff\xfe\x00", "- 1\n- 2\n", "just words\n"])
def test_a_file_without_sections_is_refused(write, text):
    (problem,) = refused(write(text))
    assert problem.key.endswith("run.yaml")


def test_a_missing_file_names_its_neighbours(write):
    path = write("")
    (problem,) = refused(path.with_name("rnu.yaml"))
    assert "run.yaml" in problem.fix
    assert refused(path.parent / "no" / "x.yaml")[0].found == "no such file or directory"
    assert refused(path.parent)[0].found == "is a directory"


@pytest.mark.parametrize(
    "override, key, word",
    [
        ("optim.lrr=3", "optim.lrr", "optim.lr"),
        ("lr=3", "lr=3", "optim.lr=3"),
        ("model.layers", "model.layers", "model.layers=VALUE"),
        ("--optim.lr=3", "--optim.lr", "optim.lr"),
        ("model.layers=[", "model.layers", "quotes"),
        ("model.layers=many", "model.layers", "Transformer blocks"),
        ("model.layers=", "model.layers", "write model.layers="),
        ("model.layers=０", "model.layers", "give model.layers a whole number greater than or equal to 1 (number of"),
        ("layers=0", "layers=0", "give model.layers a whole number greater than or equal to 1 (number of"),
        ("n_layer=-1k", "n_layer=-1k", "give model.layers a whole number greater than or equal to 1 (number of"),
        ("model.dropout=200%", "model.dropout", "give model.dropout a number less than 1 ("),
        ("torch_dtype=float16", "torch_dtype=float16", "give train.precision one of the values 'fp32' or 'bf16'"),
        ("parallel={tp: 0, zz: 1}", "parallel", "write parallel.tp=VALUE"),
        ("train={learning_rate: 1e-4}", "train", "write optim.lr=0.0001"),
        ("optim=adamw_torch", "optim", "write optim.optimizer=adamw"),
        ("model.layers:0", "model.layers:0", "give model.layers a whole number greater than or equal to 1"),
        ("=3", "=3", "optim.lr=3"),
        ("data.train.0.path=x", "data.train.0.path", "data.train"),
    ],
)
def test_a_wrong_override_is_refused(write, override, key, word):
    problem = refused(write(""), [override])[0]
    assert problem.key == key and problem.origin == "command line" and word in problem.fix


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=-1", "train.steps", -1),
        ("train.stepss=1", "train.stepss", 1),
        ("model.d_model=3", "model.d_model", 3),
        ("train.steps='5'", "train.steps", "5"),
        ("train.steps=2.5", "train.steps", 2.5),
        ("train.steps=true", "train.steps", True),
        ("train.precision=fp16", "train.precision", "fp16"),
        ("optim.lr=.nan", "optim.lr", float("nan")),
        ("track.tags=a", "track.tags", "a"),
        ("data.train=[{path: a, wieght: 1}]", "data.train", [{"path": "a", "wieght": 1}]),
        ("train.exact.tensr=2", "train.exact.tensr", 2),
        ('track.folder="a\\0"', "track.folder", "a\0"),
        ("advanced.extensions=mine.py", "advanced.extensions", "mine.py"),
    ],
)
def test_a_change_in_python_is_refused_in_the_words_of_the_command_line(write, override, key, value):
    expected = [str(problem).replace(" (command line)", "") for problem in refused(write(""), [override])]
    with pytest.raises(ConfigError) as caught:
        Config().changed({"train.log_every": 2, key: value})
    assert str(caught.value) == "\n".join(expected)
    with pytest.raises(ConfigError) as caught:
        Config().changed({"optim.lrr": 2, "optim.beta2": 2, key: value})
    assert len(caught.value.problems) == 3 or key == "advanced.extensions", "all come at once"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"steps": 1}, "key = 'steps': expected a key of the config, section.key. Fix: did you mean train.steps"),
        ({"train": {"steps": 5}}, "Fix: write {'train.steps': 5}"),
        ({5: 1}, "key = 5: expected a key"),
        (["train.steps=5"], "expected a mapping of section.key to a value"),
        ({"optim.lr": object()}, "expected a value as YAML has them"),
        ({"optim.lr": numpy.arange(100)}, "expected a value as YAML has them"),
    ],
)
def test_what_is_no_change_is_told_in_a_line(values, words):
    with pytest.raises(ConfigError) as caught:
        Config().changed(values)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_change_takes_values_as_python_has_them(tmp_path):
    values = {"train.steps": numpy.int64(5), "track.folder": tmp_path, "train.exact.data": 4, "data.train": ("a", "b")}
    found = Config().changed(values)
    assert (found.train.steps, found.track.folder, found.train.exact) == (5, str(tmp_path), ExactConfig(data=4))
    assert [source.path for source in found.data.train] == ["a", "b"]
    with pytest.raises(ConfigError, match="steps = 6: expected no assignment"):
        found.train.steps = 6


def test_overrides_are_a_list_and_no_text(write):
    (problem,) = refused(write(""), "optim.lr=1")
    assert str(problem) == ("overrides = 'optim.lr=1': expected a list of texts. Fix: write overrides=['optim.lr=1'].")


def test_all_mistakes_come_at_once(write):
    problems = refused(write("optim: {lrr: 1}\nmodel: {layers: -1, heads: x}\n"), ["train.stepss=4", "nonsense"])
    assert {p.key for p in problems} == {"optim.lrr", "model.layers", "model.heads", "train.stepss", "nonsense"}


def test_nearest_prefers_the_same_word_in_another_section():
    keys = known_keys()
    assert nearest("train.tp", keys) == "parallel.tp"
    assert nearest("model.rope_thta", keys) == "model.rope_theta"
    assert nearest("qqqq.zzzz", keys) is None


def test_what_a_user_meets_is_about_sixty_keys():
    """Who pre-trains a GPT: generator.* is for one family, finetune.* for another command, and a key that is refused
    until another one is set, such as those of masks and of experts, is met with that one; so is a choice of one."""
    special, unused = (
        ("advanced.", "generator.", "finetune.", "optim.optimizer"),
        {k for u in USES if not u.used(Config()) for k in u.keys},
    )
    met = [k for k in known_keys() if k.count(".") == 1 and not k.startswith(special) and k not in unused]
    assert len([k for k in met if not k.startswith("model.")]) <= 55
    assert len([k for k in met if k.startswith("model.")]) <= 36  # a released model has few that are not the defaults


@pytest.mark.parametrize("old", RENAMED)
def test_a_key_under_its_old_name_is_refused_with_the_new_one(tmp_path, old):
    section, _, name = old.partition(".")
    path = tmp_path / "run.yaml"
    path.write_text(f"{section}:\n  {name}: 1\n")
    for refused in (lambda: read(path), lambda: read(path, [f"{old}=1"])):
        with pytest.raises(ConfigError) as caught:
            refused()
        assert f"{old} = 1" in str(caught.value) and f"Fix: it is called {RENAMED[old]} now." in str(caught.value)
    assert RENAMED[old] in known_keys() and old not in known_keys()


@pytest.mark.parametrize("key", ["objective.router_aux_loss_coef", "model.router_aux_loss_coef", "objective.aux_loss"])
def test_a_balance_of_a_whole_batch_is_refused_by_its_name(key):
    with pytest.raises(ConfigError) as caught:
        read("configs/quickstart.yaml", [f"{key}=0.01"])
    assert "Fix: use objective.balance_loss, which is of each sequence; that of a batch would" in str(caught.value)


@pytest.mark.parametrize(("key", "old"), RENAMED_VALUES)
def test_a_value_under_its_old_name_is_refused_with_the_new_one(tmp_path, key, old):
    path, new = tmp_path / "run.yaml", RENAMED_VALUES[key, old]
    path.write_text("{}")
    with pytest.raises(ConfigError, match=f"{key} = '{old}' .*Fix: it is called {new} now."):
        read(path, [f"{key}={old}"])
    assert read(path, [f"{key}={new}"]).config.value(key) == new


def test_what_other_systems_call_a_key_leads_to_it_alone():
    """Each name to one key, which exists, and no name is that of another key here."""
    known = known_keys()
    leaves = {key.rpartition(".")[2] for key in known}
    for key, names in OTHER_NAMES.items():
        assert key in known
        for name in names:
            assert name not in leaves and key_for(name) == key and nearest(f"model.{name}", known) == key, name
            assert key_for("--" + name.replace("_", "-")) == key
    assert key_for("colour") is None


def test_words_of_other_systems_for_a_value_are_answered_with_ours(write):
    for (key, ours), names in OTHER_VALUES.items():
        section, _, name = key.partition(".")
        for found in names:
            (problem,) = refused(write(f"{section}: {{{name}: '{found}'}}\n"))
            assert (problem.key, problem.fix) == (key, f"write {key}={ours}"), found


FOREIGN = {
    "gradient_accumulation_steps: 4": "leave it out: it follows from train.global_batch / (train.micro_batch × data "
    "ranks)",
    "warmup_ratio: 0.1": "write optim.warmup_steps=20, which is 0.1 × train.steps = 0.1 × 200",
    "warmup_ratio: 2": "write optim.warmup_steps=N, where N is warmup_ratio × train.steps",
    "warmup_ratio: a": "write optim.warmup_steps=N, where N is warmup_ratio × train.steps",
    "warmup_ratio: 0.0001": "write optim.warmup_steps=1, which is 0.0001 × train.steps = 0.0001 × 200",
    "warmup_ratio: 0": "write optim.warmup_steps=0, which is 0 × train.steps = 0 × 200",
    "save_steps: 0.05": "write checkpoint.every=10, which is 0.05 × train.steps = 0.05 × 200",
    "save_steps: 50": "it is called checkpoint.every here",
    "train_samples: 800": "write train.steps=100, which is 800 / train.global_batch = 800 / 8",
    "train_tokens: 1000000": "write train.steps=488, which is 1000000 / (train.global_batch × data.seq_length) = "
    "1000000 / (8 × 256)",
    "min_lr_ratio: 0.1": "write optim.min_lr=3e-05, which is 0.1 × optim.lr = 0.1 × 0.0003",
    "distributed_timeout_minutes: 30": "write advanced.timeout_s=1800, which is 30 × 60",
    "gradient_checkpointing: true": "write train.recompute=full: that is how it is called here",
    "activation_checkpointing: {partition_activations: true}": "it is called train.recompute here (",
    "bf16: true": "write train.precision=bf16",
    "bf16: false": "leave it out: without it train.precision=fp32",
    "bf16: {enabled: true}": "write train.precision=bf16",
    "fp16: true": "write train.precision=bf16, which needs no scaling of the loss: there is no fp16 here",
    "fp16: {enabled: auto}": "write train.precision=bf16, which needs no scaling of the loss: there is no fp16 here",
    "fp16: {enabled: false}": "leave it out: there is no fp16 here, only train.precision=fp32 or bf16",
    "zero_optimization: {stage: 2}": "write parallel.zero_stage=2",
    "zero_optimization: {stage: 3, overlap_comm: true}": "write parallel.zero_stage=3; leave out overlap_comm",
    "zero_optimization: {stage: auto}": "write parallel.zero_stage=STAGE, one of 0, 1, 2, 3",
    "deepspeed: {zero_optimization: {stage: 2}, zz: 1}": "zero_optimization: write parallel.zero_stage=2; remove zz",
    "deepspeed: ds.json": "write advanced.engine=deepspeed; what its file says is said by keys here: train.micro_batch",
    "optimizer: {type: AdamW, params: {betas: [0.9, 0.95]}}": "params: betas: write optim.beta1=0.9 optim.beta2=0.95",
    "scheduler: {type: WarmupLR}": "remove it; --print-config lists all keys",
    "untie_embeddings_and_output_weights: true": "write model.tied_embeddings=false",
    "report_to: none": "write track.wandb=disabled track.tensorboard=off",
    "fsdp: shard_grad_op auto_wrap": "write parallel.zero_stage=2",
    "num_gpus: 2": "leave it out, and write --processes N on the command line",
    "warmup: 10": "did you mean optim.warmup_steps",
}  # fmt: skip


@pytest.mark.parametrize("line", FOREIGN)
def test_a_name_of_another_system_is_answered_with_what_its_value_is_here(write, line):
    """In a file, in a section of it, as an override with a section and without one, behind which train.steps may be."""
    answer = FOREIGN[line]
    name, _, value = line.partition(": ")
    steps = "train: {steps: 200}\n"
    problems = [refused(write(f"{steps}{line}\n")), refused(write(f"train:\n  steps: 200\n  {line}\n"))]
    problems.append(refused(write("{}"), [f"train.{name}={value}", "train.steps=200"]))
    for found in problems:
        assert [problem.fix[: len(answer)] for problem in found] == [answer]
    if answer.startswith(("write", "leave")):
        alone = refused(write(steps), [f"{name}={value}"])[0].fix
        assert alone[: len(answer)].partition(":")[0] == answer.partition(":")[0]


def test_every_number_of_another_unit_names_keys(write):
    for name, rule in CONVERTED.items():
        assert {rule.key, *rule.times, *rule.over} <= set(known_keys()) and key_for(name) is None
        assert f"write {rule.key}=N, where N is {name}" in rule.advice(name, "x", {})
    assert not set(CONVERTED) & set(ANSWERS)
    for name, answer in ANSWERS.items():
        for value in (True, False, 1, "x", {}, [1, 2]):
            for word in re.findall(r"\b[a-z]+\.[a-z_0-9]+", answer(value) or ""):
                assert word in known_keys(), (name, word)
        assert key_for(name) is None


def test_a_key_that_a_rule_lacks_has_no_value(write):
    (problem,) = refused(write("model: {positions: rotary, rope_scaling: {type: linear}}\n"))
    assert (problem.key, problem.found) == ("model.rope_scaling.factor", None)


def test_a_path_of_a_config_elsewhere_is_said_to_be_relative_to_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "a.yaml").write_text("data: {train: corpus}\n")
    monkeypatch.chdir(tmp_path)
    for path, word in (("configs/a.yaml", "relative to the working directory, not"), ("a.yaml", "make it: ")):
        if word == "make it: ":
            (tmp_path / "configs" / "a.yaml").rename("a.yaml")
        loaded = read(path)
        with pytest.raises(ConfigError) as error:
            ready(loaded, 1, local_size=1)
        (problem,) = error.value.problems
        assert f"corpus.idx in {tmp_path}, the working directory" in problem.expected and word in problem.fix


@pytest.mark.parametrize("value", ["!!binary aGVsbG8=", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp 2024-01-01"])
def test_a_value_that_json_has_no_word_for_is_refused_in_one_line(value):
    """It was read, and broke where the tree was written as JSON."""
    with pytest.raises(ConfigError, match="track.name = .*expected a value in YAML's syntax.*Fix: "):
        text.parse_value("track.name", value, "command line")


def test_every_whole_number_has_a_bound_up_to_which_the_checks_end(write):
    """A longer number overflowed in NumPy and torch, filled the memory, or was counted to."""
    path = write("")
    keys = [
        f"{section}.{key}"
        for section, outer in Config.model_fields.items()
        for key, info in outer.annotation.model_fields.items()
        if info.annotation is int or int in get_args(info.annotation)
    ]
    assert len(keys) > 50
    for key in keys:
        for value in (2**63, 10**21, -(10**21)):
            (problem,) = refused(path, [f"{key}={value}"])
            assert (problem.key, problem.found, problem.origin) == (key, value, "command line"), problem
        for value in (2**31 - 1, 2**20):
            try:
                config = load(path, [f"{key}={value}"])
            except ConfigError:
                continue
            check(config, config.parallel.least_ranks())
    (problem,) = refused(path, [f"train.batch_ramp=[1, 1, {10**21}]"])
    assert problem.key == "train.batch_ramp" and "at most 2,147,483,647" in problem.expected
