"""Check that a config's model computes what a checkpoint's computes. Shapes do not tell: 16 × 16 is two heads or four.

state.json of the checkpoint, config --_resolved--> what determines the function --> equal, or the keys that differ
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from pydantic import ValidationError

from roots_dist.config.activations import ACTIVATIONS
from roots_dist.config.extensions import split
from roots_dist.config.families import FAMILIES
from roots_dist.config.init_from import FREE
from roots_dist.config.objectives import OBJECTIVES
from roots_dist.config.rope_scaling import LongRope
from roots_dist.config.schema import Config
from roots_dist.errors import CheckpointError, ConfigError, EnvironmentProblem, Problem
from roots_dist.storage.checkpoint.format import STATE_FILE, read_json, url_of
from roots_dist.storage.checkpoint.keep import check_complete, found_steps
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.storage.checkpoint.run_identity import run_id

RESTART = "choose another track.folder, or start from scratch with checkpoint.resume=false"
"""The fix for a run that would train another model."""


def refuse_to_resume(config: Config) -> None:
    """Raise ConfigError for a run whose folder holds the checkpoint of another model, of other bits or of another
    optimizer. It is known before a process starts, from the newest checkpoint whose files have their sizes; the ranks
    compare the hashes and look again. Nothing is asked of an object store."""
    run = Path(config.track.folder)
    found = _newest_in(run) if config.checkpoint.resume else None
    if found is not None:
        step, checkpoint = found
        refuse_another_model(checkpoint, config)
        refuse_other_bits(checkpoint, config)
        if step > 0:
            refuse_another_optimizer(checkpoint, config)


def _newest_in(run: Path) -> tuple[int, Place] | None:
    """The newest checkpoint in a run's folder that looks whole, after its step; None where none does."""
    with suppress(CheckpointError, EnvironmentProblem, OSError):
        if url_of(run):
            return None
        own = run_id(run)
        for step, path in reversed(found_steps(run).items()):
            with suppress(CheckpointError):
                check_complete(path, step, own)
                return step, path
    return None


def refuse_another_model(checkpoint: Place, config: Config, fix: str = RESTART) -> None:
    """Raise ConfigError if the checkpoint's model computes another function. Weights of equal shapes may: fewer but
    wider heads, other positions, another activation. No extension is run: the config may be that of a run's folder.
    `fix`: what to do besides setting the key back."""
    try:
        saved = Config.from_record(read_json(checkpoint / STATE_FILE)["config"])
    except (KeyError, ValidationError):
        return  # written by another program or version: names and shapes are still compared by load()
    has_labels, own = _may_have_labels(config), is_of_extension(config)
    was, now = (_resolved(one, has_labels, own) for one in (saved, config))
    differing = [key for key in now if key in was and now[key] != was[key]]
    consequences = [key for key in differing if _is_default(saved, key) and _is_default(config, key)]
    causes = [key for key in differing if key not in consequences]
    problems = [_model_problem(key, now[key], was[key], checkpoint, config, fix) for key in causes or consequences]
    if problems:
        raise ConfigError(problems)


BITS = ("exact", "micro_batch", "precision")
"""Keys of `train` that decide the bits of an exact run."""


def refuse_other_bits(checkpoint: Place, config: Config, device: str | None = None) -> None:
    """Raise ConfigError if an exact run would go on with other bits than it has begun with. A run that has
    not been exact may become so. `device`: kind of device, as cpu; None if it is not known yet."""
    state = read_json(checkpoint / STATE_FILE)
    try:
        saved = Config.from_record(state["config"])
    except (KeyError, ValidationError):
        return
    if config.train.exact is None or saved.train.exact is None:
        return
    was, now = (_bits(one) for one in (saved, config))
    if device is not None:
        was["device"], now["device"] = state.get("device", device), device
    problems = [
        Problem(
            key=key,
            found=now[key],
            expected=f"{was[key]} as in {checkpoint}: with train.exact a run keeps the bits that it has begun with",
            fix="set it back, or leave train.exact out",
        )
        for key in now
        if now[key] != was[key]
    ]
    if problems:
        raise ConfigError(problems)


def refuse_another_optimizer(checkpoint: Place, config: Config) -> None:
    """Raise ConfigError if the moments of a checkpoint are those of another optimizer's rule, to which they would mean
    something else."""
    try:
        was = Config.from_record(read_json(checkpoint / STATE_FILE)["config"]).optim.optimizer
    except (KeyError, ValidationError):
        return
    now = config.optim.optimizer
    if now != was:
        expected = f"{was} as in {checkpoint}, whose state of the optimizer would be used"
        fix = "set it back, or start another run from these weights with finetune.init_from"
        raise ConfigError([Problem(key="optim.optimizer", found=now, expected=expected, fix=fix)])


def _bits(config: Config) -> dict[str, object]:
    """Settings that decide the bits of an exact run, besides its model, its optimizer and its data."""
    train, advanced = config.train, config.advanced
    found: dict[str, object] = {f"train.{key}": getattr(train, key) for key in BITS}
    return found | {f"advanced.{key}": getattr(advanced, key) for key in ("loss_chunk", "grad_dtype", "threads")}


def _model_problem(key: str, value: object, was: object, checkpoint: Place, config: Config, restart: str) -> Problem:
    where = f"in {checkpoint}, whose weights would be used"
    if key == "model.max_positions" and config.model.max_positions is None:
        expected = f"{was}, the number of learned positions {where}"
        shorter = (
            f"set model.max_positions={was} for shorter samples, " if config.data.seq_length < int(str(was)) else ""
        )
        return Problem(key="data.seq_length", found=value, expected=expected, fix=f"set it back, {shorter}{restart}")
    return Problem(key=key, found=value, expected=f"{was} as {where}", fix=f"set it back, {restart}")


def is_of_extension(config: Config) -> bool:
    """True if code of an extension is part of the model's function."""
    return config.model.family not in FAMILIES or config.model.activation not in ACTIVATIONS


DERIVED = ("model.kv_heads", "model.head_dim", "model.ffn")
"""Keys whose defaults follow from other keys."""


def _is_default(config: Config, key: str) -> bool:
    """True if the value of a key follows from others, and nobody has set it."""
    return key in DERIVED and config.value(key) is None


def _may_have_labels(config: Config) -> bool:
    """True if finetune.labels belongs to the function, or may: with an objective of an extension it is compared in any
    case."""
    known = OBJECTIVES.get(config.objective.name)
    return known is None or known.has_labels


def _resolved(config: Config, has_labels: bool, own_code: bool) -> dict[str, object]:
    """Settings that determine the function of a model with given weights: model.* with its defaults filled in, and
    other keys. Does not run the config's extensions."""
    m = config.model
    filled = {"kv_heads": m.num_kv_heads(), "head_dim": m.width_of_head(), "ffn": m.width_of_ffn()}
    found: dict[str, object] = {f"model.{key}": value for key, value in {**m.model_dump(), **filled}.items()}
    found |= {"advanced.norm_eps": config.advanced.norm_eps, "advanced.float64": config.advanced.float64}
    if own_code:
        found["advanced.extensions"] = [split(entry)[1][:12] for entry in config.advanced.extensions]
    if has_labels:
        found["finetune.labels"] = config.finetune.labels  # a head of as many other labels fits too
    if config.finetune.strategy == "lora":
        found["finetune.lora_alpha"] = config.finetune.lora_alpha
    if isinstance(m.rope_scaling, LongRope):  # it has two functions
        long = config.data.seq_length > m.rope_scaling.original_length
        found["data.seq_length beyond model.rope_scaling.original_length"] = long
    if m.positions == "learned":
        found["model.max_positions"] = m.max_positions or config.data.seq_length
    return {key: value for key, value in found.items() if key not in FREE}
