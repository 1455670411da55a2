"""config.json <-> our Config, by the table of an architecture; what either side cannot express is refused by name.

    config.json --read_hf_config--> {"model.hidden": 768, …}
    Config --incompatibilities--> problems, or none: --hf_config_of--> config.json

Nothing is dropped silently: an unknown key is refused too, unless it is empty (null, {}, []).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from roots_dist.checks import checks
from roots_dist.config.records import objective_of
from roots_dist.config.schema import Config
from roots_dist.errors import ConfigError, ExchangeError, Problem
from roots_dist.storage.exchange.table import Architecture, Head, Key
from roots_dist.storage.exchange.tensors import exchange_error

COMMON: tuple[tuple[str, object], ...] = (
    ("is_decoder", False), ("add_cross_attention", False), ("tie_encoder_decoder", False), ("pruned_heads", {}),
    ("cross_attention_hidden_size", None), ("quantization_config", None), ("sliding_window", None),
    ("layer_types", None),
    ("position_embedding_type", "absolute"), ("rope_interleaved", False),
)  # fmt: skip
"""Keys of any model type that change the computation, and the only values that we support."""
HARMLESS = frozenset(
    [
        "_name_or_path",
        "architectures",
        "auto_map",
        "model_type",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "torchscript",
        "use_bfloat16",
        "tokenizer_class",
        "name_or_path",
        "return_dict",
        "return_dict_in_generate",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "use_cache",
        "use_return_dict",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "finetuning_task",
        "task_specific_params",
        "prefix",
        "chunk_size_feed_forward",
        "tf_legacy_loss",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "cls_token_id",
        "sep_token_id",
        "mask_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "begin_suppress_tokens",
        "suppress_tokens",
        "bad_words_ids",
        "max_length",
        "min_length",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "num_return_sequences",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "remove_invalid_values",
        "exponential_decay_length_penalty",
        "initializer_range",
        "initializer_factor",
        "gradient_checkpointing",
        "output_past",
        "n_ctx",
        "n_special",
        "n_inner",
        "predict_special_tokens",
        "classifier_dropout",
        "summary_type",
        "summary_use_proj",
        "summary_activation",
        "summary_proj_to_labels",
        "summary_first_dropout",
        "summary_last_dropout",
        "directionality",
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        "pooler_type",
        "generator_size",
        "embedding_dropout",
        "unk_index",
        "attention_softmax_in_fp32",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "skip_bias_add",
        "skip_bias_add_qkv",
        "offset_alibi",
        "pretraining_tp",
        "slow_but_exact",
        "seq_length",
        "n_positions",
        "dense_act_fn",
        "is_gated_act",
        "_attn_implementation",
        "attn_implementation",
        "is_llama_config",
        "transformers.js_config",
    ]
)
"""Keys that do not affect an unmasked forward pass: names, dropout of heads, generation, execution."""


def read_hf_config(tree: Mapping[str, Any], architecture: Architecture, where: str) -> dict[str, object]:
    """Our config values for a config.json. Raises ExchangeError for the first setting that is not supported."""
    tree = architecture.flatten(dict(tree))
    found: dict[str, object] = dict(architecture.ours)
    set_by: dict[str, str] = {}
    known = {fixed.theirs for fixed in architecture.fixed}
    for key in architecture.keys:
        known |= {key.theirs, *key.aliases}
        value = _to_ours(tree, key, where)
        if key.ours in found and found[key.ours] != value:
            other = set_by.get(key.ours)
            expected = (
                f"the same as {other} = {tree.get(other)!r}" if other else f"one that means {_as_json(found[key.ours])}"
            )
            raise _error(
                where, key.theirs, tree.get(key.theirs, key.default), f"{expected}: our models have a single {key.ours}"
            )
        found[key.ours], set_by[key.ours] = value, key.theirs
    for fixed in architecture.fixed:
        value = tree.get(fixed.theirs, fixed.value if fixed.default is ... else fixed.default)
        if value != fixed.value and value not in fixed.equivalent:
            raise _error(
                where, fixed.theirs, value, f"{fixed.description or _as_json(fixed.value)}: the only supported value"
            )
    for name, value in COMMON:
        if name not in known and tree.get(name) not in (value, None, False):
            raise _error(where, name, tree[name], f"{_as_json(value)}: the only supported value")
    strange = [
        k for k, v in tree.items() if k not in known | HARMLESS | dict(COMMON).keys() and v not in (None, {}, [])
    ]
    if strange:
        raise _error(where, strange[0], tree[strange[0]], f"a known key of model type {architecture.model_type}")
    return found


def config_of(values: Mapping[str, object], architecture: Architecture, where: str) -> Config:
    """The checked Config with these values. Raises ExchangeError in terms of config.json, or ConfigError."""
    tree: dict[str, dict[str, object]] = {}
    for name, value in values.items():
        section, key = name.split(".")
        tree.setdefault(section, {})[key] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        ours = ".".join(map(str, details["loc"][:2]))
        theirs = next((key.theirs for key in architecture.keys if key.ours == ours), ours)
        raise _error(where, theirs, details["input"], details["msg"].removeprefix("Input should be ")) from error
    problems = checks.check(config, 1)
    if problems:
        raise ConfigError(problems)
    return config


def labels_of(tree: Mapping[str, Any], where: str) -> list[str]:
    """Names of a head's classes, in the order of its outputs."""
    if tree.get("problem_type") not in (None, "single_label_classification"):
        raise _error(
            where, "problem_type", tree["problem_type"], "single_label_classification: each text has one label"
        )
    given = tree.get("id2label") or tree.get("num_labels", 2)
    try:
        given = {i: f"LABEL_{i}" for i in range(given)} if isinstance(given, int) else given
        names = {int(i): str(name) for i, name in given.items()}
    except (AttributeError, ValueError):
        names = {}
    if len(names) < 2 or sorted(names) != list(range(len(names))):
        raise _error(where, "id2label", given, "the names of outputs 0, 1 … of two or more classes")
    return [names[i] for i in range(len(names))]


def effective_values(config: Config) -> dict[str, object]:
    """Every config value with its default filled in, as their config needs it."""
    m = config.model
    found = {f"{section}.{key}": value for section, keys in config.model_dump().items() for key, value in keys.items()}
    return found | {
        "model.kv_heads": m.num_kv_heads(),
        "model.head_dim": m.width_of_head(),
        "model.ffn": m.width_of_ffn(),
        "model.decoder_layers": m.num_decoder_layers(),
        "model.embedding_size": m.width_of_embedding(),
        "model.segments": max(1, m.segments),
        "model.max_positions": m.max_positions or config.data.seq_length,
    }


def incompatibilities(config: Config, architecture: Architecture, head: Head) -> Iterator[Problem]:
    """Features of this model that a model of that type lacks."""
    values, m = effective_values(config), config.model

    def problem(key: str, expected: object) -> Problem:
        fix = "train with that, or use `roots generate` and `roots evaluate`, which read the run itself"
        return Problem(key=key, found=values[key], expected=f"{expected} for {head.architecture}", fix=fix)

    for name, value in architecture.ours.items():
        if values[name] != value:
            yield problem(name, _as_json(value))
    for key in architecture.keys:
        if key.translation is not None and values[key.ours] not in key.translation.values():
            yield problem(key.ours, " or ".join(dict.fromkeys(map(_as_json, key.translation.values()))))
    if architecture.plain_heads:
        if m.num_kv_heads() != m.heads:
            yield problem("model.kv_heads", f"model.heads = {m.heads}")
        if m.heads * m.width_of_head() != m.hidden:
            yield problem("model.head_dim", f"model.hidden / model.heads = {m.hidden / m.heads:g}")
    if architecture.even_width and m.hidden % m.heads:
        yield problem("model.hidden", f"a multiple of model.heads = {m.heads}")
    if architecture.plain_ffn and m.width_of_ffn() != 4 * m.hidden:
        yield problem("model.ffn", f"4 × model.hidden = {4 * m.hidden}")


def hf_config_of(config: Config, architecture: Architecture, head: Head) -> dict[str, object]:
    """config.json of a compatible model, without its special tokens."""
    values = effective_values(config)
    tree: dict[str, object] = {"architectures": [head.architecture], "model_type": architecture.model_type}
    tree |= {fixed.theirs: fixed.value for fixed in architecture.fixed}
    tree |= {key.theirs: _to_theirs(key, values[key.ours]) for key in architecture.keys}
    labels = config.finetune.labels
    if objective_of(config).has_labels:
        tree["id2label"] = {str(i): name for i, name in enumerate(labels)}
        tree["label2id"] = {name: i for i, name in enumerate(labels)}
    tree |= {"initializer_range": config.model.std(), "use_cache": True}
    return architecture.nest(tree)


def _to_ours(tree: Mapping[str, Any], key: Key, where: str) -> object:
    """Our value for a key."""
    name = next((name for name in (key.theirs, *key.aliases) if name in tree), None)
    value = key.default if name is None else tree[name]
    if key.translation is not None:
        if not isinstance(value, (str, bool)) or value not in key.translation:
            raise _error(where, key.theirs, value, " or ".join(map(_as_json, key.translation)))
        return key.translation[value]
    return value - key.shift if key.shift and isinstance(value, int) else value


def _to_theirs(key: Key, value: object) -> object:
    if key.translation is not None:
        return next(theirs for theirs, ours in key.translation.items() if ours == value)
    return value + key.shift if key.shift else value  # type: ignore[operator]  # a shift is of a number


def _as_json(value: object) -> str:
    """The value as written in JSON."""
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _error(where: str, key: str, found: object, expected: str) -> ExchangeError:
    fix = "use a model without it: only models that compute the same function are imported"
    return exchange_error(f"{where}: {key}", found, expected, fix)
