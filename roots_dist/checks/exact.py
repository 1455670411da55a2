"""Requirements of `train.exact` on a config: degrees that the layout divides, and shapes that the degrees divide.

What cannot be exact, because its sums follow the layout, is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from roots_dist.accounting.sizes import generator_of
from roots_dist.config.records import family_of, objective_of, target_seq
from roots_dist.config.schema import Config
from roots_dist.errors import Problem, present
from roots_dist.layout import Layout


def check(config: Config, layout: Layout, batches: Sequence[int]) -> Iterator[Problem]:
    """batches: the sizes that a step may have; none if they are wrong themselves."""
    exact = config.train.exact
    if exact is None:
        return
    yield from _tensor(config, exact.tensor, layout.tp)
    yield from _data(config, exact.data, layout.dp, batches)
    yield from _context(config, exact.context, layout.cp)
    if config.train.device == "cpu" and config.advanced.threads is None:
        yield Problem(
            key="advanced.threads",
            found=None,
            expected="a number with train.exact: sums of a CPU depend on its threads, which follow the layout else",
            fix="set advanced.threads=1",
        )
    if 1 < layout.ep < layout.cp and exact.data > layout.dp:
        yield Problem(
            key="parallel.ep",
            found=layout.ep,
            expected=f"1, or a multiple of parallel.cp = {layout.cp} where a data rank has several data shards "
            f"(train.exact.data = {exact.data} on {layout.dp}): experts add up whole texts",
            fix=f"use {layout.cp}, or set train.exact.data={layout.dp}",
        )
    if layout.ep > 1 and config.train.recheck_every:
        yield Problem(
            key="train.recheck_every",
            found=config.train.recheck_every,
            expected="0 with parallel.ep above 1, where no rank computes a microbatch alone",
            fix="leave it out, or set parallel.ep=1",
        )
    yield from _refused(config, layout)


def cut_over_tensor_ranks(config: Config) -> dict[str, int]:
    """The sizes that are divided evenly over tensor ranks, by their names in words."""
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


def _tensor(config: Config, degree: int, tp: int) -> Iterator[Problem]:
    """One line at most, of the first thing that is wrong."""
    cut = cut_over_tensor_ranks(config) | _lengths(config)
    kv_heads = config.model.num_kv_heads()

    def problem_of(number: int) -> str | None:
        uncut = _uncut(cut, number)
        if number & (number - 1):
            return "a power of two"
        if number % tp:
            return f"a multiple of parallel.tp = {tp}"
        if uncut:
            return f"a divisor of {' and of '.join(uncut)}"
        if kv_heads % number and number % kv_heads:
            return f"a divisor or a multiple of model.kv_heads = {kv_heads}"
        return None

    if (expected := problem_of(degree)) is not None:
        fits = [number for number in _powers(math.gcd(*cut.values())) if problem_of(number) is None]
        fix = _one_of(fits) or "choose a parallel.tp that is a power of two and divides what is named, or change that"
        yield Problem(key="train.exact.tensor", found=degree, expected=expected, fix=fix)


def _data(config: Config, degree: int, dp: int, batches: Sequence[int]) -> Iterator[Problem]:
    micro = config.train.micro_batch

    def problem_of(number: int) -> str | None:
        wrong = next((size for size in batches if size % (micro * number)), None)
        if number & (number - 1):
            return "a power of two"
        if number % dp:
            return f"a multiple of the number of data ranks, which is {dp}"
        if wrong is not None:
            return f"every batch a multiple of train.micro_batch × train.exact.data = {micro * number}, and not {wrong}"
        return None

    if (expected := problem_of(degree)) is not None:
        fits = [number for number in _powers(math.gcd(*batches, 0) or degree) if problem_of(number) is None]
        fix = _one_of(fits) or "choose a number of data ranks that is a power of two and divides every batch"
        yield Problem(key="train.exact.data", found=degree, expected=expected, fix=fix)


def _uncut(sizes: Mapping[str, int], unit: int) -> list[str]:
    """Sizes that are no multiple of the unit."""
    return [f"{name} = {size}" for name, size in sizes.items() if size % unit]


def _lengths(config: Config) -> dict[str, int]:
    """Numbers of positions: their names in words, and the sizes."""
    found = {"data.seq_length": config.data.seq_length}
    if family_of(config).has_two_stacks:
        found["the decoder's positions (data.target_seq_length)"] = target_seq(config)
    return found


def _context(config: Config, degree: int, cp: int) -> Iterator[Problem]:
    lengths, tensor = _lengths(config), present(config.train.exact).tensor

    def problem_of(number: int) -> str | None:
        unit = math.lcm(2 * number, tensor * number) if number > 1 else 1
        uncut = _uncut(lengths, unit)
        if number & (number - 1):
            return "a power of two"
        if number % cp:
            return f"a multiple of parallel.cp = {cp}"
        if uncut:
            return (
                f"one that cuts {' and '.join(uncut)} evenly: into 2 × train.exact.context runs of positions, and "
                "into train.exact.context × train.exact.tensor"
            )
        return None

    if (expected := problem_of(degree)) is not None:
        fits = [number for number in _powers(max(lengths.values())) if problem_of(number) is None]
        fix = _one_of(fits) or "choose a parallel.cp that is a power of two, and lengths that it cuts evenly"
        yield Problem(key="train.exact.context", found=degree, expected=expected, fix=fix)


def _powers(most: int) -> list[int]:
    """The powers of two up to a number."""
    return [1 << i for i in range(most.bit_length())]


def _one_of(numbers: Sequence[int]) -> str | None:
    if len(numbers) < 2:
        return f"use {numbers[0]}" if numbers else None
    return f"choose one of {', '.join(map(str, numbers))}"


def _refused(config: Config, layout: Layout) -> Iterator[Problem]:
    m, p, objective = config.model, config.parallel, config.objective
    rule = config.optim.optimizer
    for key, found, is_wrong, expected in (
        ("parallel.cp_kind", p.cp_kind, p.cp > 1 and p.cp_kind != "gather", "gather"),
        ("model.family", m.family, m.family in config.extension.families, "a family of the package"),
        ("optim.optimizer", rule, rule in config.extension.optimizers, "a rule of the package"),
        ("parallel.schedule", p.schedule, p.schedule in config.extension.schedules, "a schedule of the package"),
        ("model.qk_norm", m.qk_norm, m.qk_norm == "whole", "head, or none"),
        ("model.kv_lora_rank", m.kv_lora_rank, m.kv_lora_rank is not None, "none"),
        ("model.branches", m.branches, m.has_parallel_branches(), "sequential"),
        ("objective.name", objective.name, objective_of(config).has_references, "an objective of one text"),
        (
            "objective.name",
            objective.name,
            present(config.train.exact).context > 1 and objective_of(config).has_labels,
            "an objective of tokens, or train.exact.context=1,",
        ),
        ("train.compile", True, config.train.compile is True, "auto or false"),
        ("advanced.float64", True, config.advanced.float64, "false"),
        ("advanced.engine", "deepspeed", config.advanced.engine == "deepspeed", "reference"),
    ):
        if is_wrong:
            expected = f"{expected} with train.exact, because its sums may follow the layout"
            yield Problem(key=key, found=found, expected=expected, fix="change it, or leave train.exact out")
