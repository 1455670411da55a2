"""The learning rate against transformers' schedulers: the same after warm-up, one step earlier in it."""

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from roots_dist.config.lr_schedules import LR_SCHEDULES, lr_schedule
from roots_dist.config.sections import OptimConfig

STEPS, WARMUP, LR = 50, 7, 3e-3


def of_transformers(make, steps: int = STEPS, **options) -> list[float]:
    """Rates of steps 0 … steps, as the scheduler gives them."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    scheduler = make(optimizer, num_warmup_steps=WARMUP, **options)
    rates = []
    for _ in range(steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


CASES = {
    "constant": (transformers.get_constant_schedule_with_warmup, {}, {}),
    "linear": (transformers.get_linear_schedule_with_warmup, {"num_training_steps": STEPS}, {}),
    "cosine": (transformers.get_cosine_schedule_with_warmup, {"num_training_steps": STEPS}, {}),
    "cosine with a floor": (
        transformers.get_cosine_with_min_lr_schedule_with_warmup,
        {"num_training_steps": STEPS, "min_lr": LR / 10},
        {"min_lr": LR / 10},
    ),
    "wsd": (
        transformers.get_wsd_schedule,
        {"num_training_steps": STEPS, "num_decay_steps": 10, "decay_type": "linear"},
        {},  # 20 % of 50 steps are 10
    ),
    "wsd, longer decay": (
        transformers.get_wsd_schedule,
        {"num_training_steps": STEPS, "num_decay_steps": 25, "decay_type": "linear"},
        {"decay_steps": 25},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rates_are_those_of_transformers(case):
    make, theirs, ours = CASES[case]
    expected = of_transformers(make, **theirs)
    at = lr_schedule(OptimConfig(lr_schedule=case.split()[0].strip(","), lr=LR, warmup_steps=WARMUP, **ours), STEPS)
    assert [at(step) for step in range(WARMUP)] == pytest.approx(expected[1 : WARMUP + 1], rel=1e-12)
    assert [at(step) for step in range(WARMUP, STEPS)] == pytest.approx(expected[WARMUP:STEPS], rel=1e-9)


def test_the_ends_by_hand():
    at = lr_schedule(OptimConfig(lr_schedule="linear", lr=1.0, min_lr=0.2, warmup_steps=2, decay_steps=4), 100)
    assert [at(step) for step in range(8)] == pytest.approx([0.5, 1, 1, 0.8, 0.6, 0.4, 0.2, 0.2])
    assert at(99) == pytest.approx(0.2)


@given(
    shape=st.sampled_from(sorted(LR_SCHEDULES)),
    steps=st.integers(1, 200),
    warmup=st.integers(0, 250),
    decay=st.none() | st.integers(1, 300),
    floor=st.sampled_from([0.0, 1e-4]),
)
def test_every_step_learns_and_none_exceeds_the_peak(shape, steps, warmup, decay, floor):
    at = lr_schedule(
        OptimConfig(lr_schedule=shape, lr=1e-3, min_lr=floor, warmup_steps=warmup, decay_steps=decay), steps
    )
    rates = [at(step) for step in range(steps)]
    assert all(0 <= r <= 1e-3 * (1 + 1e-12) for r in rates)
    if decay is None:
        assert all(r > 0 for r in rates)
    peak = min(warmup, steps)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)


@pytest.mark.parametrize("name", LR_SCHEDULES)
def test_a_schedule_reads_what_it_says_that_it_reads(name):
    """What it does not read is refused by the checks."""

    def curve(**changes: object) -> list[float]:
        at = lr_schedule(OptimConfig(**{"lr_schedule": name, "lr": LR, "warmup_steps": WARMUP, **changes}), STEPS)
        return [at(step) for step in range(STEPS)]

    others = {
        "min_lr": LR / 10,
        "decay_steps": 20,
        "weight_decay": 0.3,
        "beta1": 0.5,
        "beta2": 0.7,
        "eps": 1e-3,
        "router_bias_rate": 0.1,
        "clip_grad": 2.0,
    }
    assert {"lr", "lr_schedule", "warmup_steps", "optimizer", *others} == {*OptimConfig.model_fields}
    assert {key for key, value in others.items() if curve(**{key: value}) != curve()} == LR_SCHEDULES[name].reads
    assert curve(lr=LR / 2) != curve() != curve(warmup_steps=WARMUP + 1)
