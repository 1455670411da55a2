"""`roots export RUN HF_FOLDER`: a run's model in the format of transformers, which vLLM and other tools read too.

    checkpoint --tensor by tensor, adapters merged, padding removed--> model.safetensors + config.json, tokenizer

config.json is written explicitly so that versions 4 and 5 of transformers read it alike. The folder appears when it is
complete.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roots_dist.accounting.sizes import generator_of, parameters
from roots_dist.config.extensions import KEY
from roots_dist.config.load import CONFIG_FILE
from roots_dist.config.records import family_of, is_bare, objective_of
from roots_dist.config.run_config import config_of_run
from roots_dist.config.schema import Config
from roots_dist.config.text import parse_file
from roots_dist.errors import CheckpointError, ExchangeError
from roots_dist.learning.models import pieces_of
from roots_dist.learning.models.lora import merge_adapter
from roots_dist.learning.models.parameter_locations import shapes
from roots_dist.parallel.optim.trainable import ADAPTER
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.storage.checkpoint.disk import write_file
from roots_dist.storage.checkpoint.format import Manifest, read_index, write_json
from roots_dist.storage.checkpoint.object_store import Place
from roots_dist.storage.checkpoint.save import SHARD_BYTES, safetensors_of
from roots_dist.storage.checkpoint.verified import best_or_newest
from roots_dist.storage.exchange import ARCHITECTURES
from roots_dist.storage.exchange.compare import compare, is_alone
from roots_dist.storage.exchange.electra import GENERATOR_CLASS, GENERATOR_NAMES
from roots_dist.storage.exchange.forms import ROBERTA_OFFSET
from roots_dist.storage.exchange.hf_config import hf_config_of, incompatibilities
from roots_dist.storage.exchange.model_card import CARD, model_card
from roots_dist.storage.exchange.shards import bytes_of, new_folder, refuse_content, write_shards
from roots_dist.storage.exchange.table import GENERATOR, Architecture, Head, Rule, Shapes, rules
from roots_dist.storage.exchange.tensors import INDEX, ONE_FILE, ORIGIN, Tensors, exchange_error, read_json
from roots_dist.storage.exchange.tokenizer import special_ids, token_settings, write_tokenizer

LARGE = 1_000_000_000
"""Number of parameters above which an export is not compared with the run by default."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_model(run: Path, folder: Path, dtype: str = "float32", extensions: Sequence[str] = ()) -> str:
    """Write the folder and return a summary. Raises a UserError, with nothing written.

    `extensions` are overrides of advanced.extensions, for a run that was trained with files of one's own."""
    _refuse_other_keys(extensions)
    if (folder / CONFIG_FILE).exists() and not (run / CONFIG_FILE).exists():
        expected = f"a new folder for the model, and not a run; {run} is none"
        raise exchange_error("folder", str(folder), expected, f"write roots export {folder} {run}")
    refuse_content(folder)
    if dtype not in DTYPES:
        raise exchange_error("--dtype", dtype, f"one of {', '.join(DTYPES)}", "choose one of these")
    config = config_of_run(run, extensions).config
    special = special_ids(config)
    architecture, head = architecture_for(config, special, origin_of(run))
    checkpoint = best_or_newest(run)
    model = shapes(pieces_of(config, TensorParallel()))
    alone = objective_of(config).has_generator and is_alone(checkpoint)
    model = {name: shape for name, shape in model.items() if not (alone and name.startswith(GENERATOR_NAMES))}
    plain = {name: shape for name, shape in model.items() if not name.endswith(ADAPTER)}
    table = [rule.within(("",) if alone else ("", GENERATOR)) for rule in rules(architecture, head, config, plain)]
    weights = _weights(checkpoint, model)
    with new_folder(folder) as partial:
        for prefix in dict.fromkeys(_folder(name) for rule in table for name in rule.written):
            (partial / prefix).mkdir(exist_ok=True)
            of = generator_of(config) if prefix else config
            named = head._replace(architecture=GENERATOR_CLASS) if prefix else head
            settings = hf_config_of(of, architecture, named) | {"dtype": dtype, "torch_dtype": dtype}
            _write_settings(partial / prefix, settings, config, token_settings(config, run, special))
            left_out = f"{architecture.base}." if head.bare else prefix
            _write_tensors(partial / prefix, prefix, left_out, table, config, plain, weights, DTYPES[dtype])
            write_tokenizer(config, partial / prefix)
        card = model_card(config, run, checkpoint.name, head.architecture)
        (partial / CARD).write_text(card, encoding="utf-8")
    half = ", without a generator" if alone else ""
    return f"{folder}: {head.architecture}{half} in {dtype} ({_other_dtype(run, dtype)}), from {checkpoint}"


def _refuse_other_keys(overrides: Sequence[str]) -> None:
    for override in overrides:
        key, _, value = override.partition("=")
        if key != KEY:
            expected = f"no override but {KEY}: an export holds the run as it was trained"
            raise exchange_error(key, value, expected, "leave it out")


def why_unchecked(run: Path, extensions: Sequence[str] = ()) -> str | None:
    """The reason why an export is not compared with the run by default; None if it is, because that takes seconds."""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install 'roots_dist[exchange]')"
    is_large = parameters(config_of_run(run, extensions).config) >= LARGE
    return f"it has {LARGE:.0e} parameters or more (--check compares it)" if is_large else None


def checked(run: Path, folder: Path, dtype: str, extensions: Sequence[str] = ()) -> tuple[str, bool]:
    """The difference of the export's logits from the run's, in words, and a bool: True if it is acceptable (for
    bfloat16, it is rounding)."""
    result = compare(run, folder, extensions)
    text = f"logits: largest difference {result.difference:.1e}, of up to {result.largest:.3g}"
    if dtype != "float32":
        return f"{text}: the rounding of {dtype}", True
    return f"{text} {'✓' if result.equal else '✗: more than rounding, do not use this export'}", result.equal


def origin_of(run: Path, key: str = "architecture") -> str | None:
    """Class (or dtype, by its key) that the run was imported as, or that the run was which it was fine-tuned from; None
    if there is none."""
    seen: set[Path] = set()
    while run not in seen and (run / CONFIG_FILE).is_file():
        found = read_json(run / ORIGIN).get(key) if (run / ORIGIN).is_file() else None
        if found is not None:
            return str(found)
        seen.add(run)
        section = parse_file(run / CONFIG_FILE)[0].get("finetune")
        run = Path((section or {}).get("init_from") or run)
    return None


def _other_dtype(run: Path, dtype: str) -> str:
    """Say how the other dtype is written."""
    other = next(name for name in DTYPES if name != dtype)
    came = origin_of(run, "dtype") == other
    size = "takes half the bytes" if dtype == "float32" else "rounds nothing"
    return f"--dtype {other} {'is what was imported' if came else size}"


def architecture_for(
    config: Config, special: Mapping[str, int], origin: str | None = None
) -> tuple[Architecture, Head]:
    """The architecture that the model came as, or else the first one that supports every feature of this model. Raises
    ExchangeError naming what the closest one lacks."""
    tables = _tables(config, special, origin)
    bare = is_bare(config)
    able = [(table, head) for table in tables if (head := table.head_for(config.objective.name, bare))]
    if not able:
        known = ", ".join(dict.fromkeys(name for table in tables for head in table.heads for name in head.objectives))
        raise exchange_error("objective.name", config.objective.name, f"one of {known}", "export a run of one of these")
    lacks = [list(incompatibilities(config, table, head)) for table, head in able]
    if all(lacks):
        raise ExchangeError(min(lacks, key=len)[0])
    return able[lacks.index([])]


def _tables(config: Config, special: Mapping[str, int], origin: str | None) -> list[Architecture]:
    """Architectures of the model's family, in the order in which they are tried. Those that count positions from the
    padding id are for models whose tokenizer has that id: then BERT without segments is exported as RoBERTa."""
    pad = special.get("pad")

    def came_as(table: Architecture) -> bool:
        return origin is not None and table.head(origin) is not None

    def counts_from_padding(table: Architecture) -> bool:
        return any(fixed.theirs == "pad_token_id" for fixed in table.fixed)

    def fits(table: Architecture) -> bool:
        return not counts_from_padding(table) or pad == ROBERTA_OFFSET - 1 or (pad is None and came_as(table))

    def order(table: Architecture) -> tuple[bool, bool]:
        return not came_as(table), not (counts_from_padding(table) and config.model.segments <= 1)

    family = [table for table in ARCHITECTURES.values() if table.ours["model.family"] == config.model.family]
    return sorted(filter(fits, family), key=order)


def _weights(checkpoint: Place, model: Shapes) -> Tensors:
    """The checkpoint's weights, checked to be complete and of this model."""
    manifest = Manifest.read(checkpoint)
    files = read_index(checkpoint, "weight")
    for file in sorted(set(files.values())):
        manifest.check_size(checkpoint, file)
        manifest.check_hash(checkpoint, file)
    weights = Tensors(checkpoint, files, CheckpointError)
    odd = sorted(files.keys() ^ model.keys())
    if odd:
        what = "is not in the model of config.yaml" if odd[0] in files else "is missing"
        raise CheckpointError(
            f"{checkpoint}: {odd[0]} {what}. Fix: use the config.yaml that the checkpoint was saved with."
        )
    for name, shape in model.items():
        if weights.shape(name) != shape:
            fix = "use the config.yaml that it was saved with"
            raise CheckpointError(f"{checkpoint}: {name}: shape = {weights.shape(name)}: expected {shape}. Fix: {fix}.")
    return weights


def _write_settings(
    folder: Path, settings: dict[str, Any], config: Config, tokens: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    """Write config.json and generation_config.json; `tokens` has the keys of each that are about tokens."""
    objective = objective_of(config)
    ids, generation = tokens
    if family_of(config).has_two_stacks:
        start = {"decoder_start_token_id": ids["pad_token_id"] or 0, "pad_token_id": ids["pad_token_id"] or 0}
        ids, generation = ids | start, start | generation
    if objective.answer == "classify" and family_of(config).is_decoder and ids["pad_token_id"] is None:
        ids = ids | {"pad_token_id": 0}  # transformers finds the end of a text by its padding
    fixed = {key: value for key, value in settings.items() if key in ids}  # RoBERTa's positions depend on it
    write_json(folder / "config.json", settings | ids | fixed)
    if objective.answer == "write":
        write_json(folder / "generation_config.json", generation)


def _write_tensors(
    folder: Path,
    prefix: str,
    left_out: str,
    table: list[Rule],
    config: Config,
    model: Shapes,
    weights: Tensors,
    dtype: torch.dtype,
) -> None:
    """Write the tensors of the folder `prefix`, in the order of the table, under their names without `left_out`."""
    wanted = [(name, rule) for rule in table for name in rule.written if _folder(name) == prefix]

    def theirs() -> Iterator[tuple[str, Tensor]]:
        for name, rule in wanted:
            parts = [_whole(weights, n, config).to(torch.float32) for n in rule.ours]
            yield name.removeprefix(left_out), rule.form.join(config, parts).to(dtype_of(rule))

    def dtype_of(rule: Rule) -> torch.dtype:
        return torch.float32 if rule.wide else dtype

    def bytes_in(rule: Rule) -> int:
        shape = rule.form.join(config, [torch.empty(model[n], device="meta") for n in rule.ours]).shape
        return bytes_of(shape, dtype_of(rule))

    sizes = {name.removeprefix(left_out): bytes_in(rule) for name, rule in wanted}
    where: dict[str, str] = {}

    def write(number: int, total: int, tensors: dict[str, Tensor]) -> None:
        file = ONE_FILE if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
        where.update(dict.fromkeys(tensors, file))
        write_file(folder / file, safetensors_of(tensors))

    write_shards(theirs(), sizes, SHARD_BYTES, write)
    if len(set(where.values())) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where})


def _whole(weights: Tensors, name: str, config: Config) -> Tensor:
    """The parameter, with its adapter merged if it has one."""
    a, b = (name.removesuffix(".weight") + end for end in ADAPTER)
    w = weights.get(name)
    return merge_adapter(w, weights.get(a), weights.get(b), config.finetune.lora_alpha) if a in weights.files else w


def _folder(name: str) -> str:
    return GENERATOR if name.startswith(GENERATOR) else ""
