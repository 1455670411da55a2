"""`roots import HF_FOLDER RUN`: convert a Hugging Face model to a run's folder with a checkpoint of step 0.

    config.json --hf_config.py--> config.yaml    tensors --rules, one by one--> checkpoints/step_00000000    tokenizer

Everything is checked before anything is written, and RUN appears when it is complete. It is then a run like any other:
evaluate, generate and fine-tuning (finetune.init_from) read their slices in any layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from roots_dist import __version__
from roots_dist.config.init_from import OF_VOCAB_HEAD
from roots_dist.config.load import CONFIG_FILE, to_yaml
from roots_dist.config.objectives import OBJECTIVES
from roots_dist.config.schema import Config
from roots_dist.idx_format import TOKENIZER
from roots_dist.learning.models import pieces_of
from roots_dist.learning.models.parameter_locations import shapes
from roots_dist.parallel.tensor.collectives import TensorParallel
from roots_dist.storage.checkpoint.format import CHECKPOINTS, FORMAT, shard_name, step_name, write_json
from roots_dist.storage.checkpoint.save import SHARD_BYTES, part_file, write_metadata, write_shard
from roots_dist.storage.exchange.classes import architecture_of
from roots_dist.storage.exchange.hf_config import Reading, config_of, labels_of, read_hf_config
from roots_dist.storage.exchange.matching import MatchedTensors, match_and_check, refuse_absurd_sizes
from roots_dist.storage.exchange.shards import bytes_of, new_folder, refuse_content, write_shards
from roots_dist.storage.exchange.table import GENERATOR, Architecture, Head, Rule, Shapes, rules
from roots_dist.storage.exchange.tensors import ORIGIN, exchange_error, open_folder, read_json, refuse_other_formats
from roots_dist.storage.exchange.tokenizer import copy_tokenizer, tokens_beyond, vocab_of


def import_model(folder: Path, run: Path, generator: Path | None = None) -> str:
    """Write the run's folder and return a summary. Raises a UserError, with nothing written."""
    refuse_content(run)
    refuse_other_formats(folder)
    tree = read_json(folder / "config.json")
    tensors = {"": open_folder(folder)}
    architecture, head = architecture_of(tree, folder, tensors[""])
    values, ignored = _config_values(tree, architecture, head, folder)
    has_generator = OBJECTIVES[head.objectives[0]].has_generator
    if generator is not None and not has_generator:
        raise exchange_error("--generator", str(generator), f"none beside {head.architecture}", "leave it out")
    if generator is not None:
        values |= _generator_values(read_json(generator / "config.json"), values, architecture, generator)
        tensors[GENERATOR] = open_folder(generator)
    alone = has_generator and generator is None
    vocab = vocab_of(folder)
    config = config_of(values | _run_values(run, vocab is not None), architecture, f"{folder}/config.json")
    beyond = tokens_beyond(folder, config.model.vocab) if vocab is not None else {}
    refuse_absurd_sizes(config, tensors)
    model = shapes(pieces_of(config, TensorParallel()))
    model = {name: shape for name, shape in model.items() if not (alone and name.startswith("generator."))}
    table = rules(architecture, head, config, model)
    table = [rule.within(tuple(tensors)) for rule in table]
    further = architecture.left_out(tree)
    found = match_and_check(table, config, model, tensors, architecture, further)
    with new_folder(run) as partial:
        copy_tokenizer(folder, partial, beyond)
        (partial / CONFIG_FILE).write_text(to_yaml(config), encoding="utf-8")
        dtype = dtype_of(tree)
        origin = {"imported_from": str(folder), "generator": generator and str(generator)}
        write_json(
            partial / ORIGIN, origin | {"architecture": head.architecture, "dtype": dtype, "version": __version__}
        )
        _write_checkpoint(partial, table, config, model, found)
    count = sum(torch.Size(shape).numel() for shape in model.values())
    spoken = "" if vocab is not None else "; there is no tokenizer.json: name data.tokenizer where text is read"
    unread = f"; ignored, because they change no function: {', '.join(ignored)}" if ignored else ""
    what = f"{head.architecture} as model.family={config.model.family}, {count:,} parameters in {len(model)} tensors"
    half = "; without its generator it can be fine-tuned, not pre-trained (--generator)" if alone else ""
    half = "; it has no head: name it as finetune.init_from" if head.bare else half
    left = f"; without {len(beyond)} added tokens, beyond the model's vocabulary: {', '.join(beyond)}" if beyond else ""
    if behind := found.matching(further):
        left += f"; without {len(behind)} tensors of layers that predict further tokens (MTP), as transformers reads it"
    remark = architecture.remark(tree, config)
    return f"{run}: {what}{half}{unread}{spoken}{left}" + (f"; {remark}" if remark else "")


def dtype_of(tree: Mapping[str, Any]) -> str | None:
    """Data type of the tensors as a config.json names it; versions of transformers write one key or the other."""
    found = tree.get("dtype") or tree.get("torch_dtype")
    return None if found is None else str(found)


def _config_values(tree: Mapping[str, Any], architecture: Architecture, head: Head, folder: Path) -> Reading:
    where = f"{folder}/config.json"
    values, ignored = read_hf_config(tree, architecture, where)
    values["objective.name"] = head.objectives[0]
    if OBJECTIVES[head.objectives[0]].has_labels:
        values["finetune.labels"] = () if head.bare else labels_of(tree, where)
        values = {name: value for name, value in values.items() if name not in OF_VOCAB_HEAD}
    return Reading(values, ignored)


def _generator_values(
    tree: Mapping[str, Any], values: Mapping[str, Any], architecture: Architecture, folder: Path
) -> dict[str, object]:
    """Config values of the generator: its own sizes; everything else must equal the discriminator's."""
    found = read_hf_config(tree, architecture, f"{folder}/config.json").values
    own = {"model.layers", "model.hidden", "model.heads", "model.ffn"}
    for key in architecture.keys:
        if key.ours not in own and found[key.ours] != values[key.ours]:
            same = f"{values[key.ours]}, as the discriminator has"
            fix = "use the generator that it was trained with"
            raise exchange_error(f"{folder}/config.json: {key.theirs}", found[key.ours], same, fix)
    return {name.replace("model.", "generator."): found[name] for name in own}


def _run_values(run: Path, has_tokenizer: bool) -> dict[str, object]:
    return {"track.folder": str(run), "data.tokenizer": str(run / TOKENIZER) if has_tokenizer else None}


def _write_checkpoint(run: Path, table: Sequence[Rule], config: Config, model: Shapes, found: MatchedTensors) -> None:
    """Write the checkpoint that the trainer would write before the first step: float32 master weights, no moments."""
    folder = run / CHECKPOINTS / step_name(0)
    folder.mkdir(parents=True)

    def ours() -> Iterator[tuple[str, Tensor]]:
        for rule in table:
            if rule.ours:
                yield from zip(rule.ours, rule.form.split(config, found.finite(rule.theirs).to(torch.float32)))

    written: list[dict[str, Any]] = []

    def write(number: int, total: int, tensors: dict[str, Tensor]) -> None:
        written.append({"kind": "weight", **write_shard(folder / shard_name("weight", number, total), tensors)})

    sizes = {name: bytes_of(model[name], torch.float32) for rule in table for name in rule.ours}
    write_shards(ours(), sizes, SHARD_BYTES, write)
    write_json(part_file(folder, 0), {"shards": written})
    state = {"format": FORMAT, "step": 0, "version": __version__, "layout": "import", "taken": {"0": 0}}
    write_metadata(folder, 0, state | {"config": config.model_dump(mode="json")}, num_ranks=1)
