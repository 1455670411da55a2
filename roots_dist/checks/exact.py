"""What `train.exact` asks of a config: degrees that the layout divides, and shapes that the degrees divide.

What cannot be exact, because its sums follow the layout, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator

from roots_dist.accounting.sizes import generator_of
from roots_dist.config.batch_ramp import batch_sizes
from roots_dist.config.records import family_of, objective_of, target_seq
from roots_dist.config.schema import Config, Exact
from roots_dist.errors import Problem
from roots_dist.layout import Layout


def check(config: Config, layout: Layout) -> Iterator[Problem]:
    exact = config.train.exact
    if exact is None:
        return
    for name, degree, key, ranks in (
        ("tensor", exact.tensor, "parallel.tp", layout.tp),
        ("data", exact.data, "data ranks", layout.dp),
    ):
        if degree & (degree - 1):
            below = 1 << degree.bit_length() - 1
            yield _problem(f"{name}: {degree}", "a power of two", f"use {below} or {2 * below}")
        elif degree % ranks:
            yield _problem(f"{name}: {degree}", f"a multiple of {key} = {ranks}", f"raise {name}, or use fewer ranks")
    if config.train.device == "cpu" and config.advanced.threads is None:
        yield Problem(
            key="advanced.threads",
            found=None,
            expected="a number with train.exact: sums of a CPU depend on its threads, which follow the layout else",
            fix="set advanced.threads=1",
        )
    yield from _shapes(config, exact)
    yield from _refused(config, layout)


def cut_over_tensor_ranks(config: Config) -> dict[str, int]:
    """What tensor ranks have equal parts of: its name in words, and its size."""
    m = config.model
    cut = {
        "model.heads": m.heads,
        **m.widths_of_mlps(),
        "model.vocab, padded to advanced.vocab_multiple,": config.padded_vocab(),
    }
    if objective_of(config).has_generator:
        generator = generator_of(config).model
        cut |= {
            "the generator's heads (generator.heads)": generator.heads,
            "the generator's ffn": generator.width_of_ffn(),
        }
    return cut


def _problem(found: str, expected: str, fix: str) -> Problem:
    return Problem(key="train.exact", found=found, expected=expected, fix=fix)


def _shapes(config: Config, exact: Exact) -> Iterator[Problem]:
    cut = cut_over_tensor_ranks(config) | {"data.seq_length": config.data.seq_length}
    if family_of(config).has_two_stacks:
        cut["the decoder's number of positions"] = target_seq(config)
    found = f"tensor: {exact.tensor}"
    for name, size in cut.items():
        if size % exact.tensor:
            yield _problem(found, f"a divisor of {name} = {size}", "lower tensor, or change that")
    kv_heads = config.model.num_kv_heads()
    if kv_heads % exact.tensor and exact.tensor % kv_heads:
        expected = f"a divisor or a multiple of model.kv_heads = {kv_heads}"
        yield _problem(found, expected, "lower tensor, or change that")
    unit = config.train.micro_batch * exact.data
    wrong = next((size for size in batch_sizes(config.train) if size % unit), None)
    if wrong is not None:
        expected = f"every batch a multiple of train.micro_batch × data = {unit}, and not {wrong}"
        fix = f"lower data, or use a batch of {-(-wrong // unit) * unit}"
        yield _problem(f"data: {exact.data}", expected, fix)


def _refused(config: Config, layout: Layout) -> Iterator[Problem]:
    m, p, objective, finetune = config.model, config.parallel, config.objective, config.finetune
    for key, found, is_wrong, expected in (
        ("parallel.cp", p.cp, p.cp > 1, "1"),
        ("model.family", m.family, m.family in config.extension.families, "a family of the package"),
        ("parallel.schedule", p.schedule, p.schedule in config.extension.schedules, "a schedule of the package"),
        ("model.experts", m.experts, m.experts is not None, "none"),
        ("model.qk_norm", m.qk_norm, m.qk_norm == "whole", "head, or none"),
        ("model.branches", m.branches, m.has_parallel_branches(), "sequential"),
        ("objective.name", objective.name, objective_of(config).has_references, "an objective of one text"),
        ("finetune.strategy", finetune.strategy, finetune.strategy == "lora", "full, partial or progressive"),
        ("advanced.float64", True, config.advanced.float64, "false"),
        ("advanced.engine", "deepspeed", config.advanced.engine == "deepspeed", "reference"),
    ):
        if is_wrong:
            expected = f"{expected} with train.exact, because its sums may follow the layout"
            yield Problem(key=key, found=found, expected=expected, fix="change it, or leave train.exact out")
