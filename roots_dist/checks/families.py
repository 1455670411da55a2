"""Which family learns which objective, and what each cannot do without. Pure arithmetic; called by checks.py."""

from __future__ import annotations

from collections.abc import Iterator

from roots_dist.accounting.sizes import num_blocks, span_lengths, target_seq
from roots_dist.config.schema import Config
from roots_dist.errors import Problem

LEARNS = {
    "gpt": ("clm", "classify", "tag", "instruct"),
    "bert": ("mlm", "mlm-nsp", "classify", "tag"),
    "electra": ("rtd", "classify", "tag"),
    "t5": ("spans", "prefix", "seq2seq"),
}
"""Objectives of each family: for pre-training, then for fine-tuning."""
HIDES = {"mlm": 3, "mlm-nsp": 5, "rtd": 3}
"""Objectives that hide single tokens, and the shortest samples that hold their special tokens and text."""


def check(config: Config) -> Iterator[Problem]:
    name, family = config.objective.name, config.model.family
    if name not in LEARNS[family]:
        fits = next((other for other, objectives in LEARNS.items() if name in objectives), family)
        yield Problem(
            key="objective.name",
            found=name,
            expected=f"for model.family={family} one of {', '.join(LEARNS[family])}",
            fix=f"set objective.name={LEARNS[family][0]}, or model.family={fits}",
        )
        return
    yield from _positions(config)
    yield from _places(config)
    yield from _task(config)
    if family in ("bert", "electra"):
        yield from _encoder(config)
    if family == "t5":
        yield from _t5(config)


def _positions(config: Config) -> Iterator[Problem]:
    m = config.model
    if m.positions == "relative" and m.family != "t5":
        yield Problem(
            key="model.positions",
            found=m.positions,
            expected="other positions: the bias of relative distances is t5's",
            fix="use learned, rotary or alibi",
        )


def _task(config: Config) -> Iterator[Problem]:
    """Labels that are not told are read off the rows, before anything is checked here."""
    f, o = config.finetune, config.objective
    if f.metric in ("f1", "mcc") and o.name not in ("classify", "tag"):
        yield Problem(
            key="finetune.metric",
            found=f.metric,
            expected=f"loss or accuracy for objective.name={o.name}: it has no classes",
            fix="use loss",
        )
    if f.patience and not (config.data.validation and config.train.eval_every):
        expected = "0 where nothing is evaluated while it learns"
        yield Problem(
            key="finetune.patience",
            found=f.patience,
            expected=expected,
            fix="set data.validation and train.eval_every, or leave it out",
        )
    if f.strategy == "progressive" and f.unfreeze_every >= config.train.steps:
        groups = -(-num_blocks(config) // f.unfreeze_blocks) + 2  # what is above the blocks, and what is below them
        key, found = (
            ("finetune.unfreeze_every", f.unfreeze_every)
            if f.unfreeze_every_epochs is None
            else ("finetune.unfreeze_every_epochs", f.unfreeze_every_epochs)
        )
        expected = (
            f"fewer steps than train.steps = {config.train.steps}: as it is, nothing but the top would ever learn"
        )
        fix = f"set finetune.unfreeze_every={max(1, config.train.steps // groups)}, or train longer"
        yield Problem(key=key, found=found, expected=expected, fix=fix)
    if o.name not in ("classify", "tag"):
        return
    if len(f.labels) == 1 or len(set(f.labels)) < len(f.labels):
        yield Problem(
            key="finetune.labels",
            found=list(f.labels),
            expected="two labels or more, each once",
            fix="leave it out: labels are read off data.train",
        )
    special = 0 if config.model.family == "gpt" else 2
    texts = 1 if f.pair_column is None else 2
    least = texts + (texts - 1 if special == 0 else texts + 1)
    if config.data.seq_length < least:
        yield Problem(
            key="data.seq_length",
            found=config.data.seq_length,
            expected=f"at least {least}: text and its special tokens",
            fix="use 128",
        )


def _places(config: Config) -> Iterator[Problem]:
    m, seq = config.model, config.data.seq_length
    if m.positions == "learned" and m.max_positions is not None and m.max_positions < seq:
        yield Problem(
            key="data.seq_length",
            found=seq,
            expected=f"at most model.max_positions = {m.max_positions}: there are no more learned positions",
            fix=f"use {m.max_positions}, or raise model.max_positions",
        )


def _encoder(config: Config) -> Iterator[Problem]:
    m, o = config.model, config.objective
    if m.positions in ("none", "alibi"):
        why = "the order of words would be lost" if m.positions == "none" else "alibi looks back only"
        fix = "use learned, as BERT, or rotary"
        yield Problem(
            key="model.positions",
            found=m.positions,
            expected=f"other positions for model.family={m.family}: {why}",
            fix=fix,
        )
    if o.name not in HIDES:
        return
    if o.mask_replace_probability + o.random_replace_probability > 1 + 1e-9:
        yield Problem(
            key="objective.random_replace_probability",
            found=o.random_replace_probability,
            expected=(
                f"at most 1 - objective.mask_replace_probability = {1 - o.mask_replace_probability:g}: both are "
                "shares of the hidden tokens"
            ),
            fix="use 0.1, with objective.mask_replace_probability=0.8",
        )
    if config.data.seq_length < HIDES[o.name]:
        yield Problem(
            key="data.seq_length",
            found=config.data.seq_length,
            expected=f"at least {HIDES[o.name]}: the special tokens of objective.name={o.name}, and text",
            fix="use 512, as BERT",
        )
    if o.name == "mlm-nsp" and m.segments < 2:
        yield Problem(
            key="model.segments",
            found=m.segments,
            expected="at least 2 for objective.name=mlm-nsp: the model must tell the two texts apart",
            fix="set model.segments=2",
        )


def _t5(config: Config) -> Iterator[Problem]:
    m = config.model
    one_way = (
        ("model.positions", m.positions, "relative", "both stacks know distances alone"),
        ("model.norm_position", m.norm_position, "pre", "each stack ends with a norm"),
        ("model.embedding_norm", m.embedding_norm, False, "both stacks begin with the same bare words"),
    )
    for key, found, right, why in one_way:
        if found != right:
            said = str(right).lower()
            yield Problem(key=key, found=found, expected=f"{said} for model.family=t5: {why}", fix=f"set {key}={said}")
    if m.relative_buckets < 4:
        yield Problem(
            key="model.relative_buckets",
            found=m.relative_buckets,
            expected="at least 4: two for each side, one near and one far",
            fix="use 32, as T5",
        )
    elif m.relative_max_distance <= m.relative_buckets // 2:
        yield Problem(
            key="model.relative_max_distance",
            found=m.relative_max_distance,
            expected=f"more than {m.relative_buckets // 2}, the single distances that have one of "
            f"model.relative_buckets = {m.relative_buckets} each",
            fix=f"use {4 * m.relative_buckets}",
        )
    if config.objective.name == "prefix" and config.data.seq_length < 2:
        yield Problem(
            key="data.seq_length",
            found=config.data.seq_length,
            expected="at least 2: a beginning and how it goes on",
            fix="use 512, as T5",
        )
    if config.objective.name == "spans" and config.data.seq_length < (least := span_lengths(config).inputs):
        yield Problem(
            key="data.seq_length",
            found=config.data.seq_length,
            expected=f"at least {least}: a token that is seen, a sentinel and the end",
            fix="use 512, as T5",
        )
    elif config.parallel.sequence_parallel:
        yield from _cut_targets(config)


def _cut_targets(config: Config) -> Iterator[Problem]:
    """Under sequence parallelism the decoder's positions are cut too."""
    tp, seq, target = config.parallel.tp, config.data.seq_length, target_seq(config)
    if target % tp == 0 or seq % tp:  # the latter has been told
        return
    if config.objective.name == "spans":
        key, found, told = (
            "data.seq_length",
            seq,
            f"one that gives targets of a multiple of parallel.tp = {tp}, not {target}",
        )
    else:
        key, found, told = "data.target_seq_length", target, f"a multiple of parallel.tp = {tp}"
    longer = range(seq + tp, seq + 64 * tp, tp) if key == "data.seq_length" else ()
    fits = [s for s in longer if span_lengths(config.changed({"data.seq_length": s})).targets % tp == 0]
    fix = (
        f"use {fits[0]}"
        if fits
        else f"use {-(-target // tp) * tp}"
        if not longer
        else "set parallel.sequence_parallel=false"
    )
    yield Problem(
        key=key,
        found=found,
        expected=f"{told}, because parallel.sequence_parallel cuts the decoder's positions too",
        fix=fix,
    )
