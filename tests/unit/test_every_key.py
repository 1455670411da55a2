"""Every key of the config does something, or is refused: none is ignored in silence.

For each key, in each of several small configs, each other value must break a rule of the checks, or change something
that is observed below: the schedule, the layout, DeepSpeed's settings, …, at last two training steps in this process.
What acts only in a live run (files, processes, time) names the file that reads it.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import NoneType, SimpleNamespace
from typing import Literal, get_args, get_origin
from unittest import mock

import pytest
import torch

import roots_dist
from roots_dist.accounting.bounds import bounds
from roots_dist.accounting.memory import rank_state
from roots_dist.assembly.passes import training_program
from roots_dist.assembly.run import build_run
from roots_dist.checks import readiness, unused
from roots_dist.checks.checks import check, layout_for
from roots_dist.checks.facts import Facts
from roots_dist.config.batch_ramp import batch_size_at
from roots_dist.config.lr_schedules import lr_schedule
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.config.text import parse_value
from roots_dist.errors import ConfigError
from roots_dist.layout import Layout
from roots_dist.learning.data.tasks import columns_of
from roots_dist.learning.models.flops import flops_per_step
from roots_dist.learning.objectives.synthetic import proof_objective, random_batches
from roots_dist.parallel.optim.trainable import trainable
from roots_dist.parallel.zero.ds_config import deepspeed_config
from roots_dist.runs.ranks.join import device_for
from roots_dist.runs.track.tracker import is_wanted
from roots_dist.runs.track.wandb import _begin
from roots_dist.runs.train.best_evaluation import best_evaluation
from roots_dist.runs.train.step import train_step
from roots_dist.verify.trainable import depths
from roots_dist.world.mesh import Mesh

PACKAGE = Path(roots_dist.__file__).parent
WORLD = 2
"""Processes that the checks are asked about; two steps are done in this one."""
SMALL = {
    "model": {"layers": 2, "hidden": 16, "heads": 2, "vocab": 61},
    "data": {"seq_length": 16},
    "train": {"steps": 10, "global_batch": 16, "micro_batch": 4},
    "optim": {"warmup_steps": 2},
    "advanced": {"engine": "reference"},
}
T5 = {"family": "t5", "positions": "relative"}
BERT = {"family": "bert", "segments": 2, "norm_position": "post"}
HELD_OUT = {"validation": "v", "tokenizer": "t"}
LABELS = {"labels": ["a", "b"]}
BASES: dict[str, dict[str, dict[str, object]]] = {
    "gpt": {"data": HELD_OUT, "train": {"eval_every": 5}},
    "bare gpt": {},
    "llama": {"model": {"positions": "rotary", "norm": "rmsnorm", "activation": "swiglu", "bias": False}},
    "windows": {"model": {"positions": "rotary", "window": 4, "layer_kinds": ["full", "window"]}},
    "experts": {
        "model": {
            "layers": 3, "bias": False, "experts": 4, "shared_expert_ffn": 8, "shared_expert_gate": True,
            "dense_layers": 1, "expert_groups": 2, "router_bias": True, "positions": "rotary", "kv_lora_rank": 8,
            "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6,
        },
        "objective": {"balance_loss": 0.1},
    },
    "own optimizer": {
        "advanced": {"extensions": [str(Path(__file__).with_name("descent.py"))]}, "optim": {"optimizer": "descent"},
    },
    "constant": {"optim": {"lr_schedule": "constant"}, "train": {"batch_ramp": [8, 8, 16]}},
    "in bf16": {"train": {"precision": "bf16", "spike_threshold": 5.0}},
    "on DeepSpeed": {"advanced": {"engine": "deepspeed"}},
    "without W&B": {"track": {"wandb": "disabled"}, "parallel": {"zero_stage": 0}},
    "interleaved": {"model": {"layers": 4}, "parallel": {"schedule": "interleaved", "virtual_stages": 2}},
    "bert": {"model": BERT, "objective": {"name": "mlm-nsp"}},
    "electra": {"model": BERT | {"family": "electra"}, "objective": {"name": "rtd"}},
    "t5": {"model": T5, "objective": {"name": "spans"}, "data": {"seq_length": 32}},
    "prefix": {"model": T5, "objective": {"name": "prefix"}},
    "classes": {
        "model": BERT, "objective": {"name": "classify"}, "finetune": LABELS | {"init_from": "run"}, "data": HELD_OUT,
        "train": {"eval_every": 5},
    },
    "tags, unfrozen": {
        "objective": {"name": "tag"}, "finetune": LABELS | {"strategy": "progressive", "unfreeze_every": 2},
    },
    "answers, lora": {"objective": {"name": "instruct"}, "finetune": {"strategy": "lora"}},
    "preferences": {"objective": {"name": "dpo"}, "data": HELD_OUT},
    "seq2seq, partial": {
        "model": T5, "objective": {"name": "seq2seq"},
        "finetune": {"strategy": "partial", "trainable": ["decoder.blocks.0.*"]},
    },
}  # fmt: skip
OTHERS: dict[str, object] = {
    "advanced.loss_chunk": 2,
    "train.spike_threshold": 6.0, "train.norm_spike_threshold": 6.0,
    **{f"advanced.{phase}_timeout_s": 30 for phase in ("init", "evaluate", "save")},
    "model.decoder_layers": 3, "model.kv_heads": 1, "model.head_dim": 4, "model.ffn": 24, "model.embedding_size": 8,
    "model.max_positions": 40, "model.rope_scaling": {"type": "linear", "factor": 2.0}, "model.window": 3,
    "model.experts": 5, "model.expert_ffn": 12, "model.shared_expert_ffn": 12, "model.experts_per_token": 3,
    "model.kv_lora_rank": 12, "model.q_lora_rank": 8, "model.qk_nope_head_dim": 6, "model.qk_rope_head_dim": 6,
    "model.v_head_dim": 8, "model.group_score_experts": 1,
    "model.dense_layers": 2, "objective.balance_loss": 0.2, "objective.router_z_loss": 0.1,
    "model.window_rope_theta": 100.0, "model.attention_scale": 0.5, "model.attention_softcap": 1.0,
    "model.logit_softcap": 1.0, "model.layer_kinds": ["window", "full"], "model.rotary_fraction": 0.5,
    **{
        f"model.{place}_bias": lambda c, place=place: not getattr(c.model, f"bias_of_{place}")()
        for place in ("qkv", "out", "mlp")
    },
    "model.init_std": 0.1, "model.relative_max_distance": 20, "model.dropout": 0.1,
    "model.attention_dropout": 0.1, "generator.layers": 3, "generator.hidden": 4, "generator.heads": 4,
    "generator.ffn": 20,
    "objective.random_replace_probability": 0.2, "objective.label_smoothing": 0.1, "objective.z_loss": 0.01,
    "data.train": ["c"], "data.validation": ["w"], "data.tokenizer": "u", "data.target_seq_length": 9,
    "finetune.init_from": "other", "finetune.trainable": ["decoder.blocks.*"], "finetune.epochs": 2,
    "finetune.unfreeze_every_epochs": 2.0, "finetune.lora_targets": ["key"], "finetune.pair_column": "other",
    "finetune.labels": ["a", "b", "c"], "finetune.chat_template": "c.jinja", "train.batch_ramp": [8, 8, 64],
    "train.exact": {"tensor": 2, "data": 2}, "finetune.chat_date": "2031-02-03",
    "train.global_batch": 24,
    "optim.min_lr": 1e-5, "optim.decay_steps": 3, "optim.eps": 1e-3, "optim.clip_grad": 1e-3,
    "parallel.ep": 2, "parallel.zero_ranks": 2, "model.groups_per_token": 2, "model.expert_groups": 4,
    "track.group": "g", "track.name": "n", "track.tags": ["x"], "advanced.threads": 2, "advanced.norm_eps": 1e-2,
    "advanced.extensions": [str(PACKAGE.parent / "configs" / "late.py")],
}  # fmt: skip
"""Another value of keys whose type and default do not suggest one that means something."""
COMPANY: dict[tuple[str, str], dict[str, object]] = {
    ("objective.name", "classify"): {"finetune.labels": ("a", "b")},
    ("objective.name", "tag"): {"finetune.labels": ("a", "b")},
    ("finetune.strategy", "partial"): {"finetune.trainable": ("blocks.0.*",)},
    ("model.family", "bert"): {"objective.name": "mlm"},
}
"""What a value means nothing without."""
READERS = {
    "data.train": "runs/train/loop.py",
    "data.validation": "runs/train/loop.py",
    "data.tokenizer": "runs/train/loop.py",
    "finetune.init_from": "runs/train/init_weights.py",
    "finetune.epochs": "learning/objectives/task_checks.py",
    "finetune.unfreeze_every_epochs": "learning/objectives/task_checks.py",
    "train.recheck_every": "runs/train/callbacks.py",
    "train.recompute": "assembly/rank_model.py",
    "train.compile": "assembly/fusing.py",
    "train.nonfinite": "runs/train/step.py",
    "train.spike_threshold": "runs/train/rewind.py",
    "train.norm_spike_threshold": "runs/train/rewind.py",
    "train.on_spike": "runs/train/loop.py",
    "train.log_every": "runs/train/callbacks.py",
    "train.eval_every": "runs/train/callbacks.py",
    "train.eval_sequences": "runs/train/callbacks.py",
    "train.sample_every": "runs/train/callbacks.py",
    "checkpoint.every": "runs/train/callbacks.py",
    "checkpoint.keep": "runs/train/saving.py",
    "checkpoint.asynchronous": "config/schema.py",
    "checkpoint.resume": "runs/train/resume.py",
    "checkpoint.max_failures": "runs/train/saving.py",
    "checkpoint.fallback_folder": "runs/train/saving.py",
    "checkpoint.url": "runs/train/resume.py",
    "checkpoint.run_id": "runs/train/resume.py",
    "track.folder": "runs/train/loop.py",
    "track.wandb": "runs/track/wandb.py",
    "track.tensorboard": "runs/track/trackers.py",
    "track.artifacts": "runs/track/wandb.py",
    "advanced.extensions": "config/schema.py",
    "advanced.loss_chunk": "learning/models/vocab_head.py",
    "advanced.timeout_s": "runs/ranks/join.py",
    "advanced.check_copies_every": "runs/train/callbacks.py",
    "advanced.differing_copies": "runs/train/copies.py",
    **{f"advanced.{phase}_timeout_s": "runs/ranks/join.py" for phase in ("init", "evaluate", "save")},
    "advanced.threads": "runs/ranks/join.py",
    "advanced.track_ranks": "runs/train/callbacks.py",
}
"""Keys that change no number of a step, and the file that acts on each; other tests run these."""
SWITCHED_OFF = {
    ("model.max_positions", "llama"): "the length that the model is made for: exports write it, longrope asks for it",
    ("model.max_positions", "windows"): "as in llama",
    ("model.max_positions", "experts"): "as in llama",
    ("track.group", "without W&B"): "the same file is tracked again when the override is gone; config.yaml keeps it",
    ("track.name", "without W&B"): "names the run in roots report too",
    ("track.project", "without W&B"): "as track.group",
    ("track.tags", "without W&B"): "as track.group",
}
"""Keys without effect in a base that are not refused there, and why. On one data rank parallel.zero_stage is another:
see the test below."""
INHERITED = {"model.tied_embeddings": ("classes", "tags, unfrozen")}
"""Part of what the model is from which fine-tuning starts, though a head over classes reads it not."""


def base(name: str) -> Config:
    return Config.from_tree({k: SMALL.get(k, {}) | BASES[name].get(k, {}) for k in {*SMALL, *BASES[name]}})


def leaves() -> list[str]:
    return [f"{s}.{key}" for s, info in Config.model_fields.items() for key in info.annotation.model_fields]


def others(config: Config, key: str) -> list[object]:
    """For a choice all the others, else one."""
    section, _, name = key.partition(".")
    value, kind = config.value(key), Config.model_fields[section].annotation.model_fields[name].annotation
    kind = next(part for part in get_args(kind) if part is not NoneType) if NoneType in get_args(kind) else kind
    if get_origin(kind) is Literal:
        return [choice for choice in get_args(kind) if choice != value]
    if key in OTHERS:
        other = OTHERS[key]
        return [other(config) if callable(other) else other]
    if kind is bool:
        return [not value]
    return [f"{value}-again" if kind is str else value / 2 if kind is float else value * 2 or 1]


# ── what is observed, the cheapest first ───────────────────────────────────────────────────────────────────────────


def _program(config: Config) -> object:
    alone = config.changed({"parallel.pp": 1, "parallel.tp": 1})
    return training_program(alone, alone.num_microbatches(1, batch_size_at(config.train, 0)), rank=0)


def _tracked(config: Config) -> object:
    """What W&B is told, beside the config itself."""
    if not is_wanted("wandb", config.track.wandb):
        return None
    wandb = SimpleNamespace(Settings=dict, init=lambda **options: options)
    with mock.patch("roots_dist.runs.track.wandb._identity", return_value="id"), mock.patch.object(Path, "mkdir"):
        return {k: v for k, v in _begin(wandb, "offline", config, Path("runs/x"), {}, ()).items() if k != "config"}


def _device(config: Config) -> object:
    """Where there is a GPU, and whether a machine without one will do."""
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=1),
    ):
        there = device_for(config, 0)
    return str(there), [p for p in readiness.check(config, Layout(), Facts()) if p.key == "train.device"]


def _steps(config: Config) -> Iterator[object]:
    """Samples, weights and moments before two steps and after each, and their losses and norms."""
    config = config.changed({"advanced.engine": "reference"})  # DeepSpeed needs a process group
    run = build_run(config, Mesh.single(), objective=proof_objective(config))
    learning_rate = lr_schedule(config.optim, config.train.steps)
    for step in range(2):
        batches = random_batches(config, step, 0, 1)
        yield [vars(batch) for batch in batches], {p.name: p.tensor.detach().clone() for p in run.params}
        report = train_step(run, batches, learning_rate(step))
        yield report.loss, report.grad_norm, {p.name: run.engine.read_state(p.name) for p in run.params}


OBSERVED: dict[str, Callable[[Config], object]] = {
    "learning rates": lambda c: [lr_schedule(c.optim, c.train.steps)(step) for step in range(c.train.steps)],
    "batches": lambda c: [(batch_size_at(c.train, s), c.num_microbatches(1)) for s in range(c.train.steps)],
    "layout": lambda c: layout_for(c, WORLD),
    "program": _program,
    "engine": lambda c: c.advanced.engine,
    "state of a rank": lambda c: rank_state(c, Layout(dp=2), 1000, 1000),
    "DeepSpeed": lambda c: deepspeed_config(c, 10**9) if c.advanced.engine == "deepspeed" else None,
    "bounds": lambda c: bounds(c, Layout(), flops_per_step(c), 1e12),
    "trainable": lambda c: trainable(c, depths(c)),
    "columns": lambda c: columns_of(c) if objective_of(c).rows else None,
    "best": lambda c: best_evaluation(c, {}),
    "W&B": _tracked,
    "device": _device,
}


def _observed(config: Config) -> Iterator[object]:
    """One after another, as long as somebody asks."""
    yield from (see(config) for see in OBSERVED.values())
    yield from _steps(config)


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are small: threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def _seen(name: str) -> list[object]:
    return list(_observed(base(name)))


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


# ── the law ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", BASES)
def test_the_base_itself_is_not_refused(name):
    assert check(base(name), WORLD) == []


def cases() -> list[tuple[str, str]]:
    """Whether these sections' keys act does not depend on the model, but for those that checks/unused.py knows."""
    plain = ("parallel.", "train.", "optim.", "checkpoint.", "track.", "advanced.")
    known = {key for use in unused.USES for key in use.keys}
    switched = ("on DeepSpeed", "without W&B", "own optimizer")
    few, models = ("gpt", "constant", *switched[:2], "interleaved"), [name for name in BASES if name not in switched]
    return [
        (key, name)
        for key in leaves()
        for name in (models if not key.startswith(plain) else BASES if key in known else few)
    ]


@pytest.mark.parametrize("key, name", cases())
def test_every_key_does_something_or_is_refused(key, name):
    before = base(name)
    for value in others(before, key):
        try:
            after = before.changed({key: value, **COMPANY.get((key, str(value)), {})})
        except ConfigError:
            continue
        assert after != before
        if check(after, WORLD) or key in READERS or name in INHERITED.get(key, ()) or (key, name) in SWITCHED_OFF:
            continue
        assert any(not _same(one, other) for one, other in zip(_seen(name), _observed(after), strict=True)), (
            f"{key} = {value!r} changes nothing in the config {name!r}: refuse it there, with a row of checks/unused.py"
        )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_zero_stage_needs_no_second_data_rank(stage):
    """Without one there is nothing to shard. Refused, it would have to leave the file for a trial in one process."""
    for name in ("gpt", "on DeepSpeed"):
        config = base(name).changed({"parallel.zero_stage": stage})
        assert check(config, 1) == check(config, WORLD) == []


@pytest.mark.parametrize("key", READERS)
def test_what_cannot_be_observed_is_read_where_it_acts(key):
    section, _, name = key.partition(".")
    nodes = list(ast.walk(ast.parse((PACKAGE / READERS[key]).read_text(encoding="utf-8"))))
    assigned = [(n.targets[0], n.value) for n in nodes if isinstance(n, ast.Assign)]
    assigned += [
        pair
        for a, b in assigned
        if isinstance(a, ast.Tuple) and isinstance(b, ast.Tuple)
        for pair in zip(a.elts, b.elts)
    ]
    aliases = {ast.unparse(target) for target, value in assigned if ast.unparse(value).endswith(f".{section}")}
    read = [ast.unparse(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr == name]
    assert any(owner.rpartition(".")[2] == section or owner in aliases for owner in read), read


NEEDS: dict[str, dict[str, object]] = {
    "parallel.cp_kind": {"parallel.cp": 2},
    "checkpoint.run_id": {"checkpoint.url": "memory://bucket/run"},
    "train.recheck_every": {"train.exact": {"data": 2}},
}
"""Keys that are read by what no base has, because the bases run in one process and on a disk: what such a run has."""


@pytest.mark.parametrize("key", [key for use in unused.USES for key in use.keys])
def test_a_key_is_refused_where_nothing_reads_it_and_only_there(key):
    def refused(name: str, also: dict[str, object]) -> list:
        (value, *_) = others(base(name), key)
        changed = base(name).changed({key: value, **also})
        return [p for p in check(changed, WORLD) if "it is only used with" in p.expected]

    found = {name: refused(name, {}) for name in BASES}
    if key in NEEDS:
        found["with what it needs"] = refused("gpt", NEEDS[key])
    assert any(found.values()) and not all(found.values()), found
    for name, (problem, *others_) in ((name, problems) for name, problems in found.items() if problems):
        assert problem.key == key and not others_ and "\n" not in str(problem)
        override = problem.fix.removeprefix("remove it, or override it with ")
        assert override.startswith(f"{key}=")
        assert check(base(name).changed({key: parse_value(key, override.partition("=")[2], "")}), WORLD) == []
